//! Bulk TCP by `iperf3`: whoever doubts a figure can take it again by hand.
//!
//! Congestion control is cubic on both sides, whatever the machine prefers; others behave differently on the paths
//! that are compared. A server stays in each receiving pod, and is killed when it is dropped.

use std::io::Read;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::bed::End;
use crate::lab::command::{Run, quote};

/// How long to try to reach a server that is just coming up, or still busy with the run before.
const REACH: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(30);
/// How much longer than asked for a run may take.
const MARGIN: Duration = Duration::from_secs(10);
/// What the briefest of runs sends, for a stream.
const LEAST: &str = "4M";

/// A server in a pod.
#[derive(Debug)]
pub struct Server(Child);

impl Server {
    /// Starts it.
    pub fn start(netns: &str) -> Result<Server> {
        let run = Run::inside(netns, "iperf3").arg("-s");
        Ok(Server(run.spawn_detached(Stdio::null())?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Bulk {
    /// Streams at a time.
    pub streams: u8,
    /// From the server to the client.
    pub reverse: bool,
    /// For so many seconds; a few bytes only, if absent.
    pub seconds: Option<u32>,
}

/// What arrived.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrived {
    /// Gigabits per second.
    pub gbps: f64,
    /// Bytes.
    pub bytes: f64,
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    end: Ending,
}

#[derive(Default, Deserialize)]
struct Ending {
    sum_received: Option<Sum>,
    sender_tcp_congestion: Option<String>,
    receiver_tcp_congestion: Option<String>,
}

#[derive(Deserialize)]
struct Sum {
    bytes: f64,
    bits_per_second: f64,
}

impl Bulk {
    fn args(self, to: &End) -> Vec<String> {
        let mut args = vec!["-J".to_owned(), "-C".to_owned(), "cubic".to_owned(), "-c".to_owned()];
        args.extend([to.address.to_string(), "-P".to_owned(), self.streams.to_string()]);
        args.extend(match self.seconds {
            Some(seconds) => ["-t".to_owned(), seconds.to_string()],
            None => ["-n".to_owned(), LEAST.to_owned()],
        });
        args.extend(self.reverse.then(|| "-R".to_owned()));
        args
    }

    fn length(self) -> Duration {
        Duration::from_secs(u64::from(self.seconds.unwrap_or(1)))
    }

    /// Starts it, to run beside something else.
    pub fn start(self, from: &End, to: &End) -> Result<Running> {
        // The server may still be busy with the run before; a few bytes tell.
        Bulk { seconds: None, ..self }.run(from, to)?;
        Ok(Running(Run::inside(&from.netns, "iperf3").args(self.args(to)).spawn(Stdio::null())?))
    }

    /// Runs it to its end.
    pub fn run(self, from: &End, to: &End) -> Result<Arrived> {
        let shown = || format!("iperf3 {} in {}", self.args(to).join(" "), from.netns);
        let deadline = Instant::now() + REACH;
        loop {
            let run = Run::inside(&from.netns, "iperf3").args(self.args(to)).within(self.length() + MARGIN);
            let ended = run.wait()?;
            match read(&ended.stdout) {
                Ok(arrived) => return Ok(arrived),
                Err(error) if is_passing(&error) && Instant::now() < deadline => thread::sleep(AGAIN),
                Err(error) => return Err(error).with_context(shown),
            }
        }
    }
}

/// A run in the background; it is killed when this is dropped.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// An error if it has ended.
    pub fn check(&mut self) -> Result<()> {
        let Some(status) = self.0.try_wait()? else { return Ok(()) };
        let mut report = Vec::new();
        if let Some(stdout) = &mut self.0.stdout {
            stdout.read_to_end(&mut report)?;
        }
        read(&report)?;
        bail!("it ended too early ({status})")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a server that comes up, or ends what it did before, explains the error.
fn is_passing(error: &anyhow::Error) -> bool {
    let text = error.to_string();
    ["refused", "busy", "unable to receive control message"].iter().any(|part| text.contains(part))
}

fn read(stdout: &[u8]) -> Result<Arrived> {
    let report: Report =
        serde_json::from_slice(stdout).with_context(|| format!("it printed no report: {}", quote(stdout)))?;
    if let Some(error) = report.error {
        bail!("it says: {}", quote(error.as_bytes()));
    }
    for used in [report.end.sender_tcp_congestion, report.end.receiver_tcp_congestion].into_iter().flatten() {
        if used != "cubic" {
            bail!("it used {used:?} in place of cubic; is the module tcp_cubic there?");
        }
    }
    let sum = report.end.sum_received.context("its report has no sum of what was received")?;
    if sum.bytes <= 0.0 || !sum.bits_per_second.is_finite() || sum.bits_per_second <= 0.0 {
        bail!("nothing arrived");
    }
    Ok(Arrived { gbps: sum.bits_per_second / 1e9, bytes: sum.bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let text = br#"{"start":{},"intervals":[],"end":{"sum_sent":{"bytes":9,"bits_per_second":9},
            "sum_received":{"bytes":2500000000,"bits_per_second":20e9},
            "sender_tcp_congestion":"cubic","receiver_tcp_congestion":"cubic"}}"#;
        assert_eq!(read(text).unwrap(), Arrived { gbps: 20.0, bytes: 2.5e9 });
    }

    #[test]
    fn what_is_no_measurement_is_an_error() {
        let error = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        assert!(error("").contains("no report"));
        assert!(error(r#"{"end":{}}"#).contains("no sum"));
        assert!(error(r#"{"end":{"sum_received":{"bytes":0,"bits_per_second":0}}}"#).contains("nothing arrived"));
        let other = r#"{"end":{"sum_received":{"bytes":1,"bits_per_second":1},"sender_tcp_congestion":"bbr"}}"#;
        assert!(error(other).contains("bbr"));
        let busy = read(br#"{"error":"error - the server is busy running a test. try again later"}"#).unwrap_err();
        assert!(is_passing(&busy));
        assert!(!is_passing(&read(br#"{"error":"no route to host"}"#).unwrap_err()));
    }
}
