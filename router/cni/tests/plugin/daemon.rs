//! weftd, played over the real protocol: it notes what it is asked and answers what the test wants.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_api::{Answer, Connection, Failure, MAX_REQUEST};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub request: Value,
    /// Device and inode of the namespace whose descriptor came with it.
    pub netns: Option<(u64, u64)>,
}

/// What to do with a request.
pub enum Reaction {
    Answer(Answer<Value>),
    HangUp,
}

pub struct Daemon {
    socket: PathBuf,
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

pub fn ok(value: Value) -> Reaction {
    Reaction::Answer(Answer::Ok(value))
}

pub fn refuse(code: u32, msg: &str) -> Reaction {
    Reaction::Answer(Answer::Error(Failure::new(code, msg)))
}

/// What an ADD makes here.
pub fn attached() -> Value {
    json!({
        "ifname": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450,
        "addresses": [
            { "address": "10.244.1.2/24", "gateway": "10.244.1.1" },
            { "address": "fd00:10:244:1::2/64", "gateway": "fd00:10:244:1::1" }
        ],
        "routes": [
            { "destination": "0.0.0.0/0", "gateway": "10.244.1.1" },
            { "destination": "::/0", "gateway": "fd00:10:244:1::1" }
        ]
    })
}

impl Daemon {
    /// One that does everything that it is asked.
    pub fn willing(folder: &Path) -> Daemon {
        Daemon::start(folder, |seen, _| match seen.request["op"].as_str().unwrap() {
            "add" => ok(attached()),
            "gc" => ok(json!({ "freed": [] })),
            _ => ok(json!({})),
        })
    }

    /// One that reacts as told; the second argument is the number of the request.
    pub fn start(folder: &Path, react: impl Fn(&Seen, usize) -> Reaction + Send + 'static) -> Daemon {
        let socket = folder.join("weftd.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (noted, stopped) = (seen.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                serve(stream.unwrap(), &noted, &react);
            }
        });
        Daemon { socket, seen, stop, thread: Some(thread) }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The one request that came.
    #[track_caller]
    pub fn only(&self) -> Seen {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen[0].clone()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the played daemon failed");
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn serve(stream: UnixStream, noted: &Mutex<Vec<Seen>>, react: &impl Fn(&Seen, usize) -> Reaction) {
    let mut connection = Connection::new(stream, MAX_REQUEST);
    let soon = || Instant::now() + Duration::from_secs(10);
    while let Some(line) = connection.receive(soon()).unwrap() {
        let incoming = line.request().unwrap();
        let netns = incoming.descriptor.map(|descriptor| {
            let status = rustix::fs::fstat(&descriptor).unwrap();
            (status.st_dev, status.st_ino)
        });
        let seen = Seen { request: serde_json::to_value(&incoming.request).unwrap(), netns };
        let number = {
            let mut noted = noted.lock().unwrap();
            noted.push(seen.clone());
            noted.len() - 1
        };
        match react(&seen, number) {
            Reaction::Answer(answer) => connection.answer(&answer, soon()).unwrap(),
            Reaction::HangUp => return,
        }
    }
}
