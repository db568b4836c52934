//! A real etcd in the namespace of a cluster's underlay, and what an operator can do to it: stop it, put an older state back, ask for
//! passwords and certificates.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::command::{Background, eventually, run};
use crate::machine::find;

/// Its address on the underlay.
pub const ADDRESS: &str = "10.200.0.250";

const PATIENCE: Duration = Duration::from_secs(20);

/// A running etcd.
pub struct Etcd {
    netns: String,
    folder: PathBuf,
    options: String,
    scheme: &'static str,
    /// What `etcdctl` is given besides.
    credentials: String,
    process: Option<Background>,
}

impl Etcd {
    /// Starts one without passwords and certificates.
    #[track_caller]
    pub fn start(cluster: &Cluster) -> Etcd {
        let mut etcd = Etcd::new(cluster, "http", "", "");
        etcd.start_again();
        etcd
    }

    /// Starts one that has certificates, gives out tokens that end after some seconds, and then asks everybody for a certificate and a
    /// password: the user `weft` with the password `secret` may do what is needed below `/weft`, and no more.
    #[track_caller]
    pub fn start_guarded(cluster: &Cluster, token_seconds: u32) -> Etcd {
        let folder = cluster.folder.path().display().to_string();
        certificates(&folder);
        let options = format!(
            "--cert-file {folder}/server.pem --key-file {folder}/server.key --trusted-ca-file {folder}/ca.pem --client-cert-auth \
             --auth-token jwt,pub-key={folder}/token.pub,priv-key={folder}/token.key,sign-method=RS256,ttl={token_seconds}s"
        );
        let certificate = format!("--cacert {folder}/ca.pem --cert {folder}/client.pem --key {folder}/client.key");
        let mut etcd = Etcd::new(cluster, "https", &options, &certificate);
        etcd.start_again();
        for command in [
            "user add root:root",
            "user add weft:secret",
            "role add weft",
            "role grant-permission weft --prefix=true readwrite /weft/",
            "user grant-role weft weft",
            "auth enable",
        ] {
            etcd.ctl(command);
        }
        etcd.credentials.push_str(" --user root:root");
        etcd
    }

    fn new(cluster: &Cluster, scheme: &'static str, options: &str, credentials: &str) -> Etcd {
        for (program, package) in [("etcd", "etcd-server"), ("etcdctl", "etcd-client"), ("openssl", "openssl")] {
            assert!(find(program).is_some(), "{program} is missing: `apt-get install {package}`");
        }
        let underlay = cluster.underlay();
        underlay.ip(&format!("address add {ADDRESS}/24 dev br0"));
        Etcd {
            netns: underlay.0.clone(),
            folder: cluster.folder.path().to_owned(),
            options: options.to_owned(),
            scheme,
            credentials: credentials.to_owned(),
            process: None,
        }
    }

    /// Starts it again with the data that it has, and waits until it serves.
    #[track_caller]
    pub fn start_again(&mut self) {
        let (netns, options, data) = (&self.netns, &self.options, self.data());
        let url = self.url();
        let peer = "http://127.0.0.1:2380";
        let script = format!(
            "exec ip netns exec {netns} etcd --name t --data-dir {} --listen-client-urls {url} --advertise-client-urls {url} \
             --listen-peer-urls {peer} --initial-advertise-peer-urls {peer} --initial-cluster t={peer} {options} >>{} 2>&1",
            data.display(),
            self.log().display()
        );
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        self.process = Some(Background::start(command));
        let health = || run(self.command("endpoint health")).success;
        let started = std::time::Instant::now();
        while !health() {
            let log = std::fs::read_to_string(self.log()).unwrap_or_default();
            assert!(started.elapsed() < PATIENCE, "etcd does not serve:\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it at once.
    #[track_caller]
    pub fn stop(&mut self) {
        // Dropping kills it.
        self.process = None;
        eventually("etcd is away", PATIENCE, || !run(self.command("endpoint health")).success);
    }

    /// Writes what it has to a file.
    #[track_caller]
    pub fn snapshot(&self) -> PathBuf {
        let path = self.folder.join("etcd.snapshot");
        self.ctl(&format!("snapshot save {}", path.display()));
        path
    }

    /// Puts back what was written to a file. It must have been stopped.
    #[track_caller]
    pub fn restore(&mut self, snapshot: &Path) {
        assert!(self.process.is_none(), "etcd runs");
        std::fs::remove_dir_all(self.data()).expect("there is data");
        let mut command = self.command("");
        command.args(["snapshot", "restore", "--skip-hash-check", "--name", "t"]);
        command.args(["--initial-cluster", "t=http://127.0.0.1:2380"]);
        command.args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380", "--data-dir"]);
        command.arg(self.data()).arg(snapshot);
        run(command).must();
        self.start_again();
    }

    /// Its URL for clients.
    pub fn url(&self) -> String {
        format!("{}://{ADDRESS}:2379", self.scheme)
    }

    /// Runs `etcdctl`; words are separated by white space.
    #[track_caller]
    pub fn ctl(&self, line: &str) -> String {
        run(self.command(line)).must()
    }

    /// The keys that begin with this.
    #[track_caller]
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let said = self.ctl(&format!("get --prefix --keys-only {prefix}"));
        said.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.folder.join("etcd.log")
    }

    fn data(&self) -> PathBuf {
        self.folder.join("etcd")
    }

    /// `etcdctl` with these arguments; words are separated by white space.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new("ip");
        command.env("ETCDCTL_API", "3");
        command.args(["netns", "exec", &self.netns, "etcdctl", "--endpoints", &self.url()]);
        command.args(["--dial-timeout", "2s", "--command-timeout", "2s"]);
        command.args(self.credentials.split_whitespace()).args(line.split_whitespace());
        command
    }
}

/// An authority, a certificate of etcd and one of its clients, and the key of tokens.
#[track_caller]
fn certificates(folder: &str) {
    let script = format!(
        "set -e; cd {folder}
         openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=weft-test-ca
         for who in server client; do
             openssl req -newkey rsa:2048 -nodes -keyout $who.key -out $who.csr -subj /CN=$who
             printf 'subjectAltName=IP:{ADDRESS}\\nextendedKeyUsage=serverAuth,clientAuth\\n' > $who.ext
             openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $who.pem -days 2 -extfile $who.ext
         done
         openssl genrsa -out token.key 2048
         openssl rsa -in token.key -pubout -out token.pub"
    );
    run(crate::command::shell(&script)).must();
}
