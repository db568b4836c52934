//! What the tests need of the machine: root, programs, the binaries under test, and to be alone.
//!
//! What is missing is a failure that names the command that helps, never a test that passes without having looked.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

static TURN: Mutex<()> = Mutex::new(());

/// Programs, and the Debian package each comes with.
const PROGRAMS: [(&str, &str); 9] = [
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("nstat", "iproute2"),
    ("ping", "iputils-ping"),
    ("iperf3", "iperf3"),
    ("traceroute", "traceroute"),
    ("ethtool", "ethtool"),
    ("sh", "dash"),
];

/// The right to make namespaces and to measure; one test at a time has it, on the whole machine.
pub struct Turn {
    _process: MutexGuard<'static, ()>,
    _machine: File,
}

/// Waits until no other test with real daemons runs. Fails if the machine lacks what such a test needs.
pub fn turn() -> Turn {
    // A test that failed leaves the lock poisoned and nothing else: what it made is removed as it unwinds.
    let process = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests make network namespaces: run them as root, `sudo make test`"
    );
    need(&PROGRAMS);
    let path = std::env::temp_dir().join("weft-tests.lock");
    let machine = File::create(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
    flock(&machine, FlockOperation::LockExclusive).expect("a lock on a local file can be waited for");
    Turn { _process: process, _machine: machine }
}

/// Lets this process have so many descriptors open.
#[track_caller]
pub fn raise_descriptor_limit(count: u64) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= count) {
        return;
    }
    assert!(limit.maximum.is_none_or(|most| most >= count), "{count} descriptors are needed: raise `ulimit -Hn`");
    setrlimit(Resource::Nofile, Rlimit { current: Some(count), ..limit })
        .expect("a limit under the hard one can be set");
}

/// Fails unless these programs are there; with each comes its Debian package.
#[track_caller]
pub fn need(programs: &[(&str, &str)]) {
    for (program, package) in programs {
        let is_there = if program.starts_with('/') { Path::new(program).exists() } else { find(program).is_some() };
        assert!(is_there, "{program} is missing: `apt-get install {package}`");
    }
}

/// Where a program of the machine is.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// The folder of `weftd`, `weft` and `weft-cni`: `WEFT_BIN_DIR`, or where `make build` puts them.
pub fn binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os("WEFT_BIN_DIR") {
        return folder.into();
    }
    let own = std::env::current_exe().expect("a running program has a path");
    // target/<profile>/deps/<test>
    let target = own.ancestors().nth(3).unwrap_or(Path::new("/"));
    target.join("weft")
}

/// A binary under test.
pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(
        path.is_file(),
        "{} is missing: `make build` builds it (`make test` does so first), or set WEFT_BIN_DIR to the folder that has it",
        path.display()
    );
    path
}

/// The kind of the pods' ports that the tests shall use where they do not care: `WEFT_TEST_PORT`, or weftd's own choice.
pub fn port() -> Option<String> {
    std::env::var("WEFT_TEST_PORT").ok()
}

/// The same for how the tunnel's packets leave and enter nodes: `WEFT_TEST_UNDERLAY`.
pub fn underlay_kind() -> Option<String> {
    std::env::var("WEFT_TEST_UNDERLAY").ok()
}

/// A name that no other process uses: `weft-t<pid>-<what>` for namespaces, `t<pid><what>` for labs.
pub fn unique(what: impl AsRef<OsStr>) -> String {
    format!("t{}{}", std::process::id(), what.as_ref().to_string_lossy())
}
