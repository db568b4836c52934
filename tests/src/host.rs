//! A node as a computer of its own, as far as Linux has namespaces for it: mounts, processes, cgroups and network, and
//! a disk that outlives its reboots.
//!
//! Container runtimes want to own a computer: fixed paths below `/etc`, `/run` and `/var/lib`, daemons that outlive
//! whoever started them, mounts. Here each node has these for itself, with Weft where `make install` puts it, in the
//! same folders and with the same defaults. `/usr` is the machine's. When the first process ends, everything that ran
//! or was mounted is gone: that is how a test ends, whatever has failed, and how a node loses its power.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::command::{Background, Said, eventually, run, run_with};
use crate::daemon::Daemon;
use crate::machine::{binaries, port};
use crate::netns::OwnNetns;

use rustix::process::Signal;
use weft_api::{Empty, Request};

const PATIENCE: Duration = Duration::from_secs(20);

/// A node with namespaces of its own.
pub struct Host<'a> {
    /// Its number, from 1; its addresses have it in them.
    pub number: u8,
    cluster: &'a Cluster,
    disk: PathBuf,
    running: Option<Running>,
    weftd: Option<Service>,
}

/// What is there between power on and power off.
struct Running {
    netns: OwnNetns,
    _unshare: Background,
    first: u32,
}

/// A program that runs on a host.
pub struct Service {
    process: Background,
    /// Its process id as this machine sees it.
    pub pid: u32,
}

impl<'a> Host<'a> {
    /// A computer that is on, with 10.200.0.`number` on the cluster's underlay, the plugins of this machine, and
    /// `weft-cni` among them. Nothing of Weft runs.
    #[track_caller]
    pub fn new(cluster: &'a Cluster, number: u8) -> Host<'a> {
        let disk = cluster.folder.path().join(format!("n{number}.disk"));
        std::fs::create_dir(&disk).expect("the folder is writable");
        let mut host = Host { number, cluster, disk, running: None, weftd: None };
        host.power_on();
        host.sh("rm -rf /etc/cni; mkdir -p /etc/cni/net.d /opt/cni/bin /etc/weft
             for plugin in /usr/lib/cni/*; do ln -s $plugin /opt/cni/bin/; done
             cp /run/test/programs/weft-cni /opt/cni/bin/");
        host
    }

    /// The network namespace.
    pub fn netns(&self) -> &OwnNetns {
        &self.running().netns
    }

    /// Its disk, as seen from this machine: `etc`, `opt`, and `lib`, which is its `/var/lib`.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// A path of the host's, as seen from this machine, while it is on.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.running().first))
    }

    /// A program to be run on it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--cgroup", "--net", "--target", &self.running().first.to_string()]);
        // To be in the namespace of a cgroup does not mean to be in the cgroup.
        command.args(["sh", "-c", "cd /; echo 0 >/sys/fs/cgroup/first/cgroup.procs; exec \"$@\"", "sh", program]);
        command
    }

    /// Runs a command line; words are separated by white space.
    #[track_caller]
    pub fn exec(&self, line: &str) -> Said {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().expect("a program"));
        command.args(words);
        run(command)
    }

    /// Runs a script that must succeed: what it printed.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let mut command = self.command("sh");
        command.args(["-ec", script]);
        run(command).must()
    }

    /// Writes a file.
    #[track_caller]
    pub fn write(&self, path: &str, content: &str) {
        let mut command = self.command("sh");
        command.args(["-ec", "mkdir -p \"${1%/*}\"; cat >\"$1\"", "sh", path]);
        run_with(command, content.as_bytes(), PATIENCE).must();
    }

    /// Starts a program that stays; what it prints goes to a log by this name.
    #[track_caller]
    pub fn start(&self, name: &str, program: &[&str]) -> Service {
        let mut command = self.command("sh");
        let log = format!("/run/test/disk/log/{name}");
        command.args(["-c", "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1", "sh", &log]).args(program);
        let process = Background::start(command);
        Service { pid: child_of(process.pid()), process }
    }

    /// What a program has logged, in all boots.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.disk.join("log").join(name)).unwrap_or_default()
    }

    /// Configures weftd with everything where it is by default, and starts it. `more` is appended: peers, limits.
    #[track_caller]
    pub fn start_weft(&mut self, more: &str) {
        let number = self.number;
        let port = port().map(|port| format!("port = \"{port}\"\n")).unwrap_or_default();
        self.write(
            "/etc/weft/weftd.toml",
            &format!(
                "{port}node = \"n{number}\"\nmode = \"routed\"\n\
                 ranges = [\"10.244.{number}.0/24\", \"fd00:10:244:{number}::/64\"]\n\
                 [underlay]\naddress = \"10.200.0.{number}\"\n{more}"
            ),
        );
        self.start_weftd();
    }

    /// Starts weftd with the configuration that is there.
    #[track_caller]
    pub fn start_weftd(&mut self) {
        let weftd = self.start("weftd", &["/run/test/programs/weftd"]);
        let pid = weftd.pid;
        self.weftd = Some(weftd);
        let daemon = self.daemon();
        let started = std::time::Instant::now();
        while let Err(error) = daemon.try_ask::<Empty>(&Request::Ready) {
            let waited = started.elapsed();
            assert!(waited < PATIENCE, "weftd {pid} of n{}: {error}:\n{}", self.number, self.log("weftd"));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its weftd.
    #[track_caller]
    pub fn daemon(&self) -> Daemon {
        let weftd = self.weftd.as_ref().expect("weftd was started");
        Daemon { socket: self.path("/run/weft/weftd.sock"), pid: weftd.pid }
    }

    /// Ends weftd by a signal and waits for its end.
    #[track_caller]
    pub fn end_weftd(&mut self, signal: Signal) {
        self.weftd.take().expect("weftd was started").end(signal);
    }

    /// Pulls the plug: no process ends in an orderly way, and nothing is left but the disk.
    pub fn power_off(&mut self) {
        self.weftd = None;
        let Some(Running { netns, _unshare: unshare, first }) = self.running.take() else { return };
        drop(unshare);
        let gone = || !Path::new(&format!("/proc/{first}")).exists();
        eventually("a host without power is gone", PATIENCE, gone);
        // Devices go with the namespace, a little later than its name.
        drop(netns);
        let port = format!("link show n{}", self.number);
        eventually("the underlay's end of the cable is gone", PATIENCE, || {
            let mut command = Command::new("ip");
            command.args(["-n", &self.cluster.underlay().0]).args(port.split(' '));
            !run(command).success
        });
        let name = self.cgroup();
        let remove = format!(
            "mount -t cgroup2 none /sys/fs/cgroup; cd /sys/fs/cgroup; [ ! -d {name} ] || find {name} -depth -type d -exec rmdir {{}} +"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", &remove]);
        eventually("a host's cgroup is empty and can go", PATIENCE, || again(&command).success);
    }

    /// Turns it on: all that it has is its disk.
    #[track_caller]
    pub fn power_on(&mut self) {
        let netns = self.cluster.machine(self.number);
        let script = self.cluster.folder.path().join("host.sh");
        std::fs::write(&script, include_str!("host.sh")).expect("the folder is writable");
        let mut command = netns.command("unshare");
        let log = self.disk.with_extension("boot");
        let line = "log=$1; shift; exec \"$@\" >>\"$log\" 2>&1";
        command.args(["--mount", "sh", "-c", line, "sh"]).arg(&log);
        command.args(["sh", "-eu"]).arg(&script).args(["enter", &self.cgroup()]).arg(&self.disk).arg(binaries());
        let unshare = Background::start(command);
        let started = std::time::Instant::now();
        // On its way it has other children as well.
        let booted = |pid: &u32| Path::new(&format!("/proc/{pid}/root/run/test/booted")).exists();
        let first = loop {
            if let Some(first) = children(unshare.pid()).into_iter().find(booted) {
                break first;
            }
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(started.elapsed() < PATIENCE, "n{} does not boot:\n{}", self.number, said());
            std::thread::sleep(Duration::from_millis(5));
        };
        self.running = Some(Running { netns, _unshare: unshare, first });
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("the host is on")
    }

    fn cgroup(&self) -> String {
        format!("weft-{}-n{}", self.cluster.name, self.number)
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        // A second panic while a test unwinds would end the whole run.
        let end = std::panic::AssertUnwindSafe(|| self.power_off());
        if std::panic::catch_unwind(end).is_err() {
            eprintln!("n{} of {} is not gone", self.number, self.cluster.name);
        }
    }
}

impl Service {
    /// Sends it a signal and waits for its end.
    #[track_caller]
    pub fn end(mut self, signal: Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid as i32).expect("a process id is not zero");
        rustix::process::kill_process(pid, signal).expect("it runs");
        eventually("a program ends by a signal", PATIENCE, || self.process.has_ended());
    }
}

/// The one process that another has forked, once it has.
#[track_caller]
fn child_of(parent: u32) -> u32 {
    eventually("a program starts", PATIENCE, || !children(parent).is_empty());
    children(parent)[0]
}

fn children(parent: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn again(command: &Command) -> Said {
    let mut again = Command::new(command.get_program());
    again.args(command.get_args());
    run(again)
}
