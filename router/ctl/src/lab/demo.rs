//! `weft lab demo`: Weft at work, beside the kernel's own data path, in under a minute.
//!
//! A lab of two nodes with two pods each is built, and its twin on kernel bridge and VXLAN. Shown are the round trips
//! between all pods, the rate of one TCP stream on both (taken in turns, so that a busy machine slows both), a large
//! transfer with its hash, and every frame that was dropped, by reason. The demo fails if anything is not right: a
//! pair that does not answer, a byte that changed, a frame unaccounted for, a thing left behind. A low rate is
//! shown, and is no failure: it depends on the machine.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use weft_api::{DropInfo, PortInfo, Request};

use super::check::Matrix;
use super::plan::{Mode, Plan};
use super::record::{Cluster, Record, Stored};
use super::transfer::{self, Checked, Way};
use super::up::{self, Programs};
use super::{down, net, record, twin};
use crate::output::{self, Style};
use crate::show;
use crate::table::Table;

const LAB: &str = "demo";
const TWIN: &str = "demo-kernel";
/// Requests for one round-trip time.
const PINGS: u32 = 9;
/// How many times each rate is measured, and for how long.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(900);
/// The largest transfer that is hashed. Without optimisation the hash alone would take a minute.
const MOST: u64 = if cfg!(debug_assertions) { 64 << 20 } else { 1 << 30 };
const LEAST: u64 = 16 << 20;
/// How long that transfer should take at most at the rate that was measured, and may take.
const HASHED_SECONDS: f64 = 6.0;
const HASHED_WITHIN: Duration = Duration::from_secs(15);
/// How long frames may still be on their way after the traffic has ended.
const SETTLE: Duration = Duration::from_secs(3);

/// The labs that the demo has built, so that it removes these and no others.
struct Built {
    labs: Vec<&'static str>,
}

impl Built {
    fn remove(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        for lab in self.labs.drain(..) {
            outcome = outcome.and(down::down(lab).map(drop));
        }
        outcome
    }
}

impl Drop for Built {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            output::complain(&format!("{error:#}"));
        }
    }
}

/// Shows it.
pub fn run(programs: &Programs) -> Result<()> {
    let started = Instant::now();
    let style = Style::stdout();
    let plan = |lab| Plan::new(lab, 2, 2, Mode::Routed, 1500).map(|plan| Plan { is_passing: true, ..plan });
    let (lab, kernel) = (plan(LAB)?, plan(TWIN)?);
    for abandoned in [LAB, TWIN] {
        end_abandoned(abandoned)?;
    }
    let mut built = Built { labs: Vec::new() };
    let shown = present(&lab, &kernel, programs, &mut built, style);
    let removed = built.remove();
    let faults = shown?;
    removed?;
    let left = left_behind(&[&lab, &kernel]);
    let faults: Vec<String> = faults.into_iter().chain(left).collect();
    let seconds = started.elapsed().as_secs_f64();
    if !faults.is_empty() {
        bail!("the demo is not right:\n  {}", faults.join("\n  "));
    }
    let line = format!("All of it is right. Nothing is left behind. ({seconds:.0} s)");
    output::print(&format!("\n{}\n", style.good(&line)))
}

/// Ends what a demo has left that was killed.
fn end_abandoned(lab: &str) -> Result<()> {
    if let Stored::Present(record) = Record::load(lab)?
        && record.is_abandoned()
    {
        output::progress(&format!("the lab {lab} was left by a demo that was killed; it is removed first"));
        down::tear_down(&record)?;
    }
    Ok(())
}

/// Builds, measures and prints; returns what is not right.
fn present(lab: &Plan, kernel: &Plan, programs: &Programs, built: &mut Built, style: Style) -> Result<Vec<String>> {
    let cluster = up::up(lab, programs, false)?;
    built.labs.push(LAB);
    twin::build(kernel)?;
    built.labs.push(TWIN);
    output::progress("         the twin on kernel bridge and VXLAN is there\n");
    let mut faults = Vec::new();

    heading("Two nodes, two pods each, on this machine", style)?;
    output::print(&layout(&cluster, style))?;

    heading("Ping from each pod to each other, IPv4 / IPv6, round trip in µs", style)?;
    let matrix = Matrix::measure(&cluster, PINGS, Duration::from_secs(8))?;
    output::print(&matrix_table(&matrix, &cluster, style))?;
    faults.extend(
        matrix
            .missing(&cluster)
            .iter()
            .map(|pair| format!("{} does not reach {} ({})", pair.from, pair.to, pair.address)),
    );

    let title = format!("TCP, one stream, Gb/s, median of {ROUNDS} in turns of {:.1} s", ROUND.as_secs_f64());
    heading(&title, style)?;
    let rates = Rates::measure(kernel, &cluster)?;
    output::print(&rates.table(style))?;

    heading("A large transfer across nodes, hashed on both sides", style)?;
    let checked = large_transfer(&cluster, rates.across.weft)?;
    output::print(&transfer_line(&checked, style))?;
    faults.extend((!checked.is_right()).then(|| "the transfer's hash is wrong".to_owned()));

    heading("Frames that ended in a router", style)?;
    faults.extend(accounts(&cluster, style)?);
    Ok(faults)
}

fn heading(title: &str, style: Style) -> Result<()> {
    output::print(&format!("\n{}\n", style.strong(&format!("── {title}"))))
}

fn layout(cluster: &Cluster, style: Style) -> String {
    let mut table = Table::new(&["node", "underlay", "pod", "IPv4", "IPv6", "MAC"]);
    for node in &cluster.nodes {
        for pod in &node.pods {
            table.row([
                node.name.clone(),
                node.underlay.clone(),
                pod.name.clone(),
                pod.ipv4.to_string(),
                pod.ipv6.to_string(),
                pod.mac.clone(),
            ]);
        }
    }
    table.render(style, "no pods")
}

fn matrix_table(matrix: &Matrix, cluster: &Cluster, style: Style) -> String {
    // The pods of the demo are known beforehand, so that these can be headings.
    let mut table = Table::new(&["from \\ to", ">n1-p1", ">n1-p2", ">n2-p1", ">n2-p2"]);
    for from in cluster.pods() {
        let mut cells = vec![from.name.clone()];
        let mut bad = false;
        for to in cluster.pods() {
            if to.name == from.name {
                cells.push("·".to_owned());
                continue;
            }
            let rtts = [to.ipv4.into(), to.ipv6.into()].map(|address: IpAddr| matrix.rtt(&from.name, address));
            bad |= rtts.contains(&None);
            let shown = rtts.map(|rtt| rtt.map_or("LOST".to_owned(), |rtt| format!("{rtt:.0}")));
            cells.push(shown.join(" / "));
        }
        table.push(cells, bad);
    }
    let missing = matrix.missing(cluster).len();
    let pairs = cluster.pods().count() * (cluster.pods().count() - 1) * 2;
    format!("{}{} of {pairs} answer\n", table.render(style, "no pods"), pairs - missing)
}

/// Two figures to compare, in Gb/s.
struct Pair {
    weft: f64,
    kernel: f64,
}

struct Rates {
    across: Pair,
    same: Pair,
}

impl Rates {
    fn measure(kernel: &Plan, cluster: &Cluster) -> Result<Rates> {
        let weft = Ends::of_cluster(cluster)?;
        let kernel = Ends::of_twin(kernel);
        let mut taken: [Vec<f64>; 4] = Default::default();
        for _ in 0..ROUNDS {
            let ways = [weft.across(), kernel.across(), weft.same(), kernel.same()];
            for (rates, way) in taken.iter_mut().zip(ways) {
                rates.push(transfer::rate(way, ROUND)?);
            }
        }
        let [weft_across, kernel_across, weft_same, kernel_same] = taken.map(median);
        Ok(Rates {
            across: Pair { weft: weft_across, kernel: kernel_across },
            same: Pair { weft: weft_same, kernel: kernel_same },
        })
    }

    fn table(&self, style: Style) -> String {
        let mut table = Table::new(&["", ">Weft", ">kernel", ">ratio", "the kernel's path"]);
        for (way, pair, path) in
            [("across nodes", &self.across, "bridge, VXLAN, bridge"), ("same node", &self.same, "bridge")]
        {
            let ratio = if pair.kernel > 0.0 { pair.weft / pair.kernel } else { 0.0 };
            table.row([
                way.to_owned(),
                format!("{:.2}", pair.weft),
                format!("{:.2}", pair.kernel),
                format!("{ratio:.2}"),
                path.to_owned(),
            ]);
        }
        table.render(style, "")
    }
}

/// The pods between which streams run: from the first pod of the first node to its neighbour, and to the second node.
struct Ends {
    from: String,
    near: (String, IpAddr),
    far: (String, IpAddr),
}

impl Ends {
    fn of_cluster(cluster: &Cluster) -> Result<Ends> {
        let pods: Vec<_> = cluster.pods().collect();
        let [from, near, far, _] = pods.as_slice() else { bail!("the demo's lab has {} pods, not 4", pods.len()) };
        let end = |pod: &super::record::Pod| (pod.netns.clone(), pod.ipv4.into());
        Ok(Ends { from: from.netns.clone(), near: end(near), far: end(far) })
    }

    fn of_twin(plan: &Plan) -> Ends {
        let end = |node, pod| (plan.pod_netns(node, pod), twin::pod_address(node, pod).into());
        Ends { from: plan.pod_netns(1, 1), near: end(1, 2), far: end(2, 1) }
    }

    fn across(&self) -> Way<'_> {
        Way { from: &self.from, to: &self.far.0, address: self.far.1 }
    }

    fn same(&self) -> Way<'_> {
        Way { from: &self.from, to: &self.near.0, address: self.near.1 }
    }
}

fn large_transfer(cluster: &Cluster, gbps: f64) -> Result<Checked> {
    transfer::checked(Ends::of_cluster(cluster)?.across(), large(gbps), HASHED_WITHIN)
}

/// As much as fits the time at this rate, as a power of two.
fn large(gbps: f64) -> u64 {
    let fits = (gbps * 1e9 / 8.0 * HASHED_SECONDS) as u64;
    let fits = fits.clamp(LEAST, MOST);
    1 << fits.ilog2()
}

fn transfer_line(checked: &Checked, style: Style) -> String {
    let short =
        |hash: &Option<String>| hash.as_deref().map_or("none".to_owned(), |hash| hash.chars().take(16).collect());
    let (sent, received) = (short(&checked.sent.sha256), short(&checked.received.sha256));
    let verdict = if checked.is_right() { style.good("the same") } else { style.bad("DIFFERENT") };
    let (size, seconds) = (show::bytes(checked.received.bytes), checked.received.seconds);
    format!("{size} in {seconds:.1} s; SHA-256 sent {sent}…, received {received}…: {verdict}\n")
}

/// Shows the drops of all nodes, and checks that every frame is accounted for.
fn accounts(cluster: &Cluster, style: Style) -> Result<Vec<String>> {
    let faults = settle(cluster)?;
    let mut ends = Dropped::default();
    let (mut entered, mut lost) = (0, 0);
    for node in &cluster.nodes {
        let drops: Vec<DropInfo> = show::ask(&node.socket, &Request::Drops)?;
        lost += drops.iter().filter(|info| info.is_loss).map(|info| info.count).sum::<u64>();
        ends.add(&node.name, drops);
        let ports: Vec<PortInfo> = show::ask(&node.socket, &Request::Ports)?;
        entered += ports.iter().map(|port| port.counters.received + port.counters.created).sum::<u64>();
    }
    output::print(&ends.table(style))?;
    let verdict = if faults.is_empty() { style.good("all accounted for") } else { style.bad("NOT all accounted for") };
    output::print(&format!("{entered} frames came in or were made, {lost} were lost, {verdict}\n"))?;
    Ok(faults)
}

/// The drops of all ports of all nodes, by reason.
#[derive(Default)]
struct Dropped {
    reasons: BTreeMap<String, Reason>,
}

struct Reason {
    is_loss: bool,
    meaning: String,
    nodes: BTreeMap<String, u64>,
}

impl Dropped {
    fn add(&mut self, node: &str, drops: Vec<DropInfo>) {
        for info in drops.into_iter().filter(|info| info.count > 0) {
            let new = || Reason { is_loss: info.is_loss, meaning: info.meaning, nodes: BTreeMap::new() };
            let reason = self.reasons.entry(info.reason).or_insert_with(new);
            *reason.nodes.entry(node.to_owned()).or_default() += info.count;
        }
    }

    fn table(&self, style: Style) -> String {
        let mut table = Table::new(&["reason", ">frames", "", "on", "meaning"]);
        let losses = self.reasons.iter().filter(|(_, reason)| reason.is_loss);
        for (name, reason) in losses.chain(self.reasons.iter().filter(|(_, reason)| !reason.is_loss)) {
            let count: u64 = reason.nodes.values().sum();
            let nodes: Vec<&str> = reason.nodes.keys().map(String::as_str).collect();
            let kind = if reason.is_loss { "LOST" } else { "fine" };
            let cells = [name.clone(), count.to_string(), kind.to_owned(), nodes.join(" "), reason.meaning.clone()];
            table.push(cells.into(), reason.is_loss);
        }
        table.render(style, "none")
    }
}

/// Waits until nothing is on its way any more; what then is unaccounted for is a fault.
fn settle(cluster: &Cluster) -> Result<Vec<String>> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let faults = unaccounted(cluster)?;
        if faults.is_empty() || Instant::now() >= deadline {
            return Ok(faults);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn unaccounted(cluster: &Cluster) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for node in &cluster.nodes {
        let ports: Vec<PortInfo> = show::ask(&node.socket, &Request::Ports)?;
        for port in ports {
            let difference = show::imbalance(&port.counters);
            if difference != 0 {
                faults.push(format!("{} port {}: {difference} frames are unaccounted for", node.name, port.id));
            }
        }
    }
    Ok(faults)
}

/// What should have gone with the labs and has not.
fn left_behind(plans: &[&Plan]) -> Vec<String> {
    let netns = plans.iter().flat_map(|plan| plan.all_netns());
    let paths = netns.map(|netns| net::path(&netns)).chain(plans.iter().map(|plan| record::folder(&plan.lab)));
    paths
        .filter(|path: &std::path::PathBuf| path.exists())
        .map(|path| format!("{} is left behind", path.display()))
        .collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::plan;

    #[test]
    fn the_large_transfer_fits_the_time_and_the_limits() {
        assert_eq!(large(0.0), LEAST);
        assert_eq!(large(1000.0), MOST);
        assert_eq!(large(0.05), 32 << 20);
    }

    #[test]
    fn a_median_is_the_middle_one() {
        assert!((median(vec![9.0, 1.0, 5.0]) - 5.0).abs() < 1e-9);
        assert!(median(vec![]).abs() < 1e-9);
    }

    #[test]
    fn the_ratio_of_the_twins_is_shown() {
        let pair = |weft, kernel| Pair { weft, kernel };
        let text = Rates { across: pair(5.0, 10.0), same: pair(1.0, 0.0) }.table(Style::PLAIN);
        assert!(text.lines().nth(1).unwrap().contains("5.00   10.00   0.50"), "{text}");
        assert!(text.lines().nth(2).unwrap().contains("0.00"), "{text}");
    }

    #[test]
    fn a_wrong_hash_is_said_aloud() {
        let tally = |hash: &str| transfer::Tally { bytes: 1 << 20, seconds: 0.5, sha256: Some(hash.to_owned()) };
        let line = |a, b| transfer_line(&Checked { sent: tally(a), received: tally(b) }, Style::PLAIN);
        assert!(line("aa", "aa").ends_with("the same\n"));
        assert!(line("aa", "ab").ends_with("DIFFERENT\n"));
    }

    #[test]
    fn drops_are_summed_by_reason_with_losses_first_and_marked() {
        let drop = |reason: &str, is_loss, count| DropInfo {
            port: 1,
            name: String::new(),
            reason: reason.to_owned(),
            meaning: "m".to_owned(),
            is_loss,
            count,
        };
        let mut dropped = Dropped::default();
        dropped.add("n1", vec![drop("Answered", false, 4), drop("Answered", false, 3), drop("NoRoute", true, 0)]);
        dropped.add("n2", vec![drop("Answered", false, 1), drop("TooShort", true, 2)]);
        let text = dropped.table(Style::PLAIN);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(lines, ["TooShort       2  LOST  n2     m", "Answered       8  fine  n1 n2  m"]);
    }

    #[test]
    fn both_labs_have_names_of_their_own() {
        assert_ne!(plan::prefix(LAB), plan::prefix(TWIN));
        plan::check_name(TWIN).unwrap();
    }
}
