//! More than an hour without an engine, by a clock that is moved by hand: how often it is asked, how soon its return is noticed, and that
//! nothing grows meanwhile.
//!
//! Everything is in one thread and one runtime whose time stands still unless [`pass`] moves it, a step at a time, with room for sockets
//! after each. A [`Door`] stands where the engine's server does and treats whoever comes in one of several [`Way`]s. The Kubernetes API
//! has its double behind the door; etcd needs none, for what counts is when it is asked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use weft_tests::kubernetes::Api;

use super::config::Config;
use super::host::Host;
use super::kubernetes::tests::certificates;
use super::source::{self, Following, View};

/// The clock's step, and how often sockets are looked at in each.
const STEP: Duration = Duration::from_millis(100);
const LOOKS: usize = 8;
/// How long each way of being away lasts; there are six, and each comes twice.
const PHASE: Duration = Duration::from_secs(6 * 60);
/// Within this a node has to be in step again.
const BACK: Duration = Duration::from_secs(5);
/// What memory may grow by in the second half of the outage, in KiB: less than a KiB for each attempt.
const GROWTH: u64 = 2048;

/// How a server treats those who come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Serves,
    /// Nobody listens.
    Closed,
    /// Connections are ended at once.
    HangsUp,
    /// What comes is read by nobody.
    Hangs,
    /// It speaks something else.
    Garbage,
    /// Another authority has signed its certificate.
    Stranger,
    /// Every request is refused.
    Fails,
}

const AWAY: [Way; 6] = [Way::Closed, Way::HangsUp, Way::Hangs, Way::Garbage, Way::Stranger, Way::Fails];

/// Where the server is.
struct Door {
    way: watch::Sender<Way>,
    came: Arc<Mutex<Vec<Instant>>>,
    url: String,
}

impl Door {
    fn open(api: Option<Arc<Api>>, folder: PathBuf) -> Door {
        let first = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = first.local_addr().unwrap();
        drop(first);
        let (way, mut told) = watch::channel(Way::Serves);
        let came = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&came);
        tokio::spawn(async move {
            let mut hung = Vec::new();
            loop {
                let how = *told.borrow_and_update();
                // What hung is forgotten, but not closed, when the server is back.
                if how != Way::Serves {
                    hung.clear();
                }
                let mut inside = JoinSet::new();
                if how == Way::Closed {
                    told.changed().await.unwrap();
                    continue;
                }
                let listener = TcpListener::bind(address).await.unwrap();
                while !told.has_changed().unwrap() {
                    tokio::select! {
                        Ok((stream, _)) = listener.accept() => {
                            log.lock().unwrap().push(Instant::now());
                            if how == Way::Hangs {
                                hung.push(stream);
                            } else {
                                inside.spawn(serve(api.clone(), stream, how, folder.clone()));
                            }
                        }
                        Some(_) = inside.join_next() => {}
                        _ = told.changed() => break,
                    }
                }
            }
        });
        Door { way, came, url: format!("https://{address}") }
    }

    /// How many came in the last phase, and how many different pauses there were between them.
    fn came(&self) -> (usize, usize) {
        let came = std::mem::take(&mut *self.came.lock().unwrap());
        let mut pauses: Vec<Duration> = came.windows(2).map(|two| two[1] - two[0]).collect();
        pauses.sort_unstable();
        pauses.dedup();
        (came.len(), pauses.len())
    }
}

async fn serve(api: Option<Arc<Api>>, stream: TcpStream, how: Way, folder: PathBuf) {
    let file = |name: &str| folder.join(name);
    match (how, api) {
        (Way::Garbage, _) => {
            stream.writable().await.unwrap();
            let _ = stream.try_write(b"SSH-2.0-OpenSSH_10.0\r\n");
        }
        (Way::Serves | Way::Fails, Some(api)) => {
            api.connection(stream, Some((&file("server.pem"), &file("server.key")))).await;
        }
        (Way::Stranger, Some(api)) => {
            api.connection(stream, Some((&file("stranger.pem"), &file("stranger.key")))).await;
        }
        _ => {}
    }
}

/// Lets time pass, for everybody but this machine.
async fn pass(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        tokio::time::advance(STEP.min(end - Instant::now())).await;
        for _ in 0..LOOKS {
            tokio::task::yield_now().await;
        }
    }
}

/// Runs in a runtime whose clock stands still. Tokio would move it whenever all wait, also for sockets; not while a thread blocks.
fn by_hand<T>(scenario: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let said = runtime.block_on(async {
        let blocked = tokio::task::spawn_blocking(move || wait.recv());
        let said = scenario.await;
        drop(done);
        drop(blocked.await);
        said
    });
    runtime.shutdown_background();
    said
}

/// Runs the test of this name in a process of its own, whose memory is nobody else's; whether this is it.
fn is_alone(name: &str) -> bool {
    const ALONE: &str = "WEFT_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut again = Command::new(std::env::current_exe().unwrap());
    let said = again.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let text = [said.stdout, said.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(said.status.success() && text.contains("1 passed"), "{text}");
    eprintln!("{}", text.lines().filter(|line| line.contains("KiB")).collect::<Vec<_>>().join("\n"));
    false
}

/// Memory in use, in KiB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn follow(table: &str, folder: &Path) -> Following {
    let text = format!(
        "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\nstate_dir = \"{}\"\n[underlay]\naddress = \"10.200.0.1\"\n{table}",
        folder.display()
    );
    source::follow(&Config::read(&text, &Host::default()).unwrap().config, None).unwrap()
}

/// How long it takes until that is seen.
async fn until(views: &watch::Receiver<View>, what: &str, is_so: impl Fn(&View) -> bool) -> Duration {
    let started = Instant::now();
    while !is_so(&views.borrow()) {
        let waited = started.elapsed();
        assert!(waited < Duration::from_secs(60), "{what}: not after {waited:?}: {:?}", views.borrow());
        // This machine's part of the work takes the time that it takes, by another clock.
        for _ in 0..4 {
            pass(STEP / 4).await;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    started.elapsed()
}

/// Those who came while it was away are few, but never far between, and not in step with each other.
#[track_caller]
fn assert_bounded(way: Way, (came, pauses): (usize, usize), streams: u64) {
    let seconds = PHASE.as_secs();
    if way == Way::Closed {
        return assert_eq!(came, 0);
    }
    assert!((came as u64) < streams * seconds, "{came} came in {seconds} s: {way:?}");
    assert!(came as u64 > seconds / (2 * BACK.as_secs()), "{came} came in {seconds} s: {way:?}");
    assert!(pauses > 1, "{pauses} different pauses: {way:?}");
}

#[test]
fn after_an_hour_without_the_kubernetes_api_a_node_is_in_step_within_seconds() {
    if !is_alone("control::outage::after_an_hour_without_the_kubernetes_api_a_node_is_in_step_within_seconds") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path());
    fs::write(folder.path().join("token"), "good").unwrap();
    let grown = by_hand(async {
        let api = Arc::new(Api::start());
        (1..=3).for_each(|number| drop(api.add_node(number)));
        let door = Door::open(Some(Arc::clone(&api)), folder.path().to_owned());
        let at = folder.path().display();
        let table =
            format!("[kubernetes]\nservers = [\"{}\"]\ntoken_file = \"{at}/token\"\nca = \"{at}/ca.pem\"\n", door.url);
        let Following { views, orders: _orders, facts: _facts } = follow(&table, folder.path());
        let peers = |view: &View| view.cluster.as_ref().map_or(0, |cluster| cluster.peers.len());
        until(&views, "it is in step", |view| peers(view) == 2 && view.trouble.is_none()).await;
        let (mut halves, mut number) = ([0; 2], 3);
        for half in &mut halves {
            for way in AWAY {
                api.spoil(|faults| faults.fail = if way == Way::Fails { usize::MAX } else { 0 });
                door.way.send_replace(way);
                door.came();
                pass(PHASE).await;
                assert_bounded(way, door.came(), 2);
                assert!(views.borrow().trouble.is_some(), "{way:?} is noticed");
                assert_eq!(peers(&views.borrow()), usize::from(number) - 1, "what was known stays");
                number += 1;
                api.add_node(number);
                api.spoil(|faults| faults.fail = 0);
                door.way.send_replace(Way::Serves);
                let is_back = |view: &View| peers(view) == usize::from(number) - 1 && view.trouble.is_none();
                let back = until(&views, &format!("in step again after {way:?}"), is_back).await;
                assert!(back < BACK, "{way:?}: {back:?}");
                pass(Duration::from_secs(5)).await;
            }
            *half = resident();
        }
        halves
    });
    eprintln!("{} KiB after half of the outage, {} KiB after all of it", grown[0], grown[1]);
    assert!(grown[1] < grown[0] + GROWTH, "{grown:?} KiB");
}

#[test]
fn after_an_hour_without_etcd_it_is_asked_within_seconds() {
    if !is_alone("control::outage::after_an_hour_without_etcd_it_is_asked_within_seconds") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path());
    let grown = by_hand(async {
        let door = Door::open(None, folder.path().to_owned());
        let at = folder.path().display();
        let table = format!(
            "[etcd]\nendpoints = [\"{}\"]\nnetwork = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\nca = \"{at}/ca.pem\"\n",
            door.url
        );
        let Following { views, orders: _orders, facts: _facts } = follow(&table, folder.path());
        let mut halves = [0; 2];
        for half in &mut halves {
            for way in [Way::Closed, Way::HangsUp, Way::Hangs, Way::Garbage, Way::Closed, Way::HangsUp] {
                door.way.send_replace(way);
                door.came();
                pass(PHASE).await;
                assert_bounded(way, door.came(), 1);
                assert!(views.borrow().trouble.is_some(), "{way:?} is noticed");
                door.way.send_replace(Way::Serves);
                let since = Instant::now();
                while door.came.lock().unwrap().is_empty() {
                    assert!(since.elapsed() < BACK, "{way:?}: nobody comes");
                    pass(STEP).await;
                }
            }
            *half = resident();
        }
        halves
    });
    eprintln!("{} KiB after half of the outage, {} KiB after all of it", grown[0], grown[1]);
    assert!(grown[1] < grown[0] + GROWTH, "{grown:?} KiB");
}
