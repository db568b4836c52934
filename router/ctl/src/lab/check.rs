//! Does every pod reach every other, and if not, why?
//!
//! Each pod pings all others over IPv4 and IPv6. What is found is a matrix of echoes; what is missing in it is
//! explained with all there is: ICMP errors that came back, losses that the daemons counted, the ends of their logs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use weft_api::{DropInfo, Request};

use super::daemon::{self, Files};
use super::ping::{self, Echo, Job};
use super::record::{Cluster, Pod};
use crate::output::plain;
use crate::show;

/// How long all pods together may take, and how much longer for each pod.
const WITHIN: Duration = Duration::from_secs(10);
const WITHIN_PER_POD: Duration = Duration::from_millis(200);
/// How many pods ping at once.
const AT_ONCE: usize = 8;
/// How many pairs an error names.
const NAMED: usize = 8;

/// Who reached whom.
pub struct Matrix {
    /// For each pod, by name, its echoes.
    rows: BTreeMap<String, Vec<Echo>>,
}

/// A pair that should work and does not.
#[derive(Debug, PartialEq, Eq)]
pub struct Missing {
    /// Who asked.
    pub from: String,
    /// Who should have answered.
    pub to: String,
    /// By this address.
    pub address: IpAddr,
    /// What was heard instead.
    pub reason: Option<String>,
}

impl Matrix {
    /// Lets all pods ping all others at once, until each has answered or the time is up.
    pub fn reach(cluster: &Cluster) -> Result<Matrix> {
        let count = u32::try_from(cluster.pods().count()).unwrap_or(u32::MAX);
        let deadline = Instant::now() + WITHIN + WITHIN_PER_POD * count;
        let pods: Vec<&Pod> = cluster.pods().collect();
        let next = AtomicUsize::new(0);
        let rows = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(pods.len()) {
                scope.spawn(|| {
                    while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
                        let row = echoes(cluster, pod, 1, left).map(|echoes| (pod.name.clone(), echoes));
                        rows.lock().expect("no thread panics with the lock held").push(row);
                    }
                });
            }
        });
        let rows = rows.into_inner().expect("no thread panics with the lock held");
        Ok(Matrix { rows: rows.into_iter().collect::<Result<_>>()? })
    }

    /// Measures the round trips between all pods, one pair at a time.
    pub fn measure(cluster: &Cluster, count: u32, within: Duration) -> Result<Matrix> {
        let deadline = Instant::now() + within;
        let mut rows = BTreeMap::new();
        for pod in cluster.pods() {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(500));
            rows.insert(pod.name.clone(), echoes(cluster, pod, count, left)?);
        }
        Ok(Matrix { rows })
    }

    /// The round trip from a pod to an address, in microseconds.
    pub fn rtt(&self, from: &str, to: IpAddr) -> Option<f64> {
        self.rows.get(from)?.iter().find(|echo| echo.target == to)?.rtt
    }

    /// The pairs that do not work.
    pub fn missing(&self, cluster: &Cluster) -> Vec<Missing> {
        let mut missing = Vec::new();
        for from in cluster.pods() {
            for (to, address) in others(cluster, from) {
                let echo = self.rows.get(&from.name).and_then(|row| row.iter().find(|echo| echo.target == address));
                if echo.is_some_and(|echo| echo.rtt.is_some()) {
                    continue;
                }
                let reason = echo.and_then(|echo| echo.reason.clone());
                missing.push(Missing { from: from.name.clone(), to: to.name.clone(), address, reason });
            }
        }
        missing
    }

    /// An error that explains what is missing, if anything is.
    pub fn require_all(&self, lab: &str, cluster: &Cluster) -> Result<()> {
        let missing = self.missing(cluster);
        if missing.is_empty() {
            return Ok(());
        }
        let total: usize = cluster.pods().map(|pod| others(cluster, pod).count()).sum();
        let mut text = format!("{} of {total} pings between pods are not answered:\n", missing.len());
        text.push_str(&name_pairs(&missing));
        text.push_str(&observations(lab, cluster, &missing));
        bail!("{}", text.trim_end());
    }
}

/// All addresses that a pod should reach.
fn others<'a>(cluster: &'a Cluster, from: &Pod) -> impl Iterator<Item = (&'a Pod, IpAddr)> {
    let from = from.name.clone();
    let others = cluster.pods().filter(move |pod| pod.name != from);
    others.flat_map(|pod| [(pod, IpAddr::from(pod.ipv4)), (pod, IpAddr::from(pod.ipv6))])
}

fn echoes(cluster: &Cluster, pod: &Pod, count: u32, within: Duration) -> Result<Vec<Echo>> {
    let targets = others(cluster, pod).map(|(_, address)| address).collect();
    ping::ping(&pod.netns, &Job { targets, count, within: within.as_secs_f64() })
}

fn name_pairs(missing: &[Missing]) -> String {
    let mut text = String::new();
    for pair in missing.iter().take(NAMED) {
        let reason = pair.reason.as_deref().map_or("no answer".to_owned(), plain);
        let _ = writeln!(text, "  {} → {} ({}): {reason}", pair.from, pair.to, pair.address);
    }
    if missing.len() > NAMED {
        let _ = writeln!(text, "  … and {} more", missing.len() - NAMED);
    }
    text
}

/// What the daemons of the nodes concerned have to say.
fn observations(lab: &str, cluster: &Cluster, missing: &[Missing]) -> String {
    let concerned = |name: &str| missing.iter().any(|pair| pair.from == name || pair.to == name);
    let mut text = String::new();
    for (number, node) in (1u8..).zip(&cluster.nodes) {
        if !node.pods.iter().any(|pod| concerned(&pod.name)) {
            continue;
        }
        match show::ask::<Vec<DropInfo>>(&node.socket, &Request::Drops) {
            Ok(drops) => text.push_str(&losses(&node.name, &drops)),
            Err(error) => drop(writeln!(text, "{}: {error:#}", node.name)),
        }
        let _ = writeln!(text, "{}", daemon::log_tail(&Files::of(lab, number).log).trim_start());
    }
    text
}

fn losses(node: &str, drops: &[DropInfo]) -> String {
    let losses = show::losses(drops);
    if losses.is_empty() {
        return format!("{node}: weftd has counted no loss\n");
    }
    let list: Vec<String> = losses.iter().map(|(reason, count)| format!("{} {count}", plain(reason))).collect();
    format!("{node}: losses counted by weftd: {}\n", list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::Node;

    fn pod(node: u8, pod: u8) -> Pod {
        Pod {
            name: format!("n{node}-p{pod}"),
            netns: format!("weft-n{node}-p{pod}"),
            ifname: "eth0".into(),
            mac: String::new(),
            ipv4: [10, 244, node, pod + 1].into(),
            ipv6: format!("fd00:10:244:{node}::{}", pod + 1).parse().unwrap(),
            gateway4: [10, 244, node, 1].into(),
        }
    }

    fn cluster() -> Cluster {
        let node = |number: u8| Node {
            name: format!("n{number}"),
            netns: format!("weft-n{number}"),
            underlay: format!("10.200.0.{number}"),
            socket: "/nonexistent/weft.sock".into(),
            pid: 1,
            pods: vec![pod(number, 1)],
        };
        Cluster { nodes: vec![node(1), node(2)] }
    }

    fn matrix(silent: Option<IpAddr>) -> Matrix {
        let cluster = cluster();
        let echo = |address| Echo {
            target: address,
            rtt: (Some(address) != silent).then_some(50.0),
            reason: (Some(address) == silent).then(|| "10.244.1.1 says: the host is unreachable".to_owned()),
        };
        let row = |pod: &Pod| (pod.name.clone(), others(&cluster, pod).map(|(_, address)| echo(address)).collect());
        Matrix { rows: cluster.pods().map(row).collect() }
    }

    #[test]
    fn a_pod_should_reach_all_others_over_both_versions() {
        let cluster = cluster();
        let from = cluster.pods().next().unwrap();
        let reached: Vec<String> = others(&cluster, from).map(|(_, address)| address.to_string()).collect();
        assert_eq!(reached, ["10.244.2.2", "fd00:10:244:2::2"]);
    }

    #[test]
    fn a_full_matrix_misses_nothing() {
        let matrix = matrix(None);
        assert!(matrix.missing(&cluster()).is_empty());
        matrix.require_all("x", &cluster()).unwrap();
        assert_eq!(matrix.rtt("n1-p1", "10.244.2.2".parse().unwrap()), Some(50.0));
        assert_eq!(matrix.rtt("n1-p1", "10.244.1.2".parse().unwrap()), None);
    }

    #[test]
    fn a_silent_pair_is_named_with_the_reason() {
        let silent: IpAddr = "fd00:10:244:2::2".parse().unwrap();
        let error = matrix(Some(silent)).require_all("x", &cluster()).unwrap_err().to_string();
        assert!(error.starts_with("1 of 4 pings"), "{error}");
        assert!(
            error.contains("n1-p1 → n2-p1 (fd00:10:244:2::2): 10.244.1.1 says: the host is unreachable"),
            "{error}"
        );
        assert!(error.contains("n1: cannot reach weftd"), "{error}");
    }

    #[test]
    fn a_pod_that_was_never_asked_is_missing_too() {
        let missing = Matrix { rows: BTreeMap::new() }.missing(&cluster());
        assert_eq!(missing.len(), 4);
        assert_eq!(missing[0].reason, None);
    }
}
