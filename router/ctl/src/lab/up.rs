//! Building a lab, step by step; undoing it if a step fails.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use super::check::Matrix;
use super::daemon::{self, Files};
use super::plan::{self, Plan, Source};
use super::record::{self, Cluster, Kind, Node, Pod, Record, Stored};
use super::{cni, down, etcd, net};
use crate::interrupt;
use crate::output::{self, Style};
use crate::table::Table;

/// The programs that a lab tries out.
#[derive(Debug)]
pub struct Programs {
    /// The daemon.
    pub weftd: PathBuf,
    /// The plugin.
    pub weft_cni: PathBuf,
}

impl Programs {
    /// Finds them in `folder`, or beside this program.
    pub fn find(folder: Option<&Path>) -> Result<Programs> {
        let own = super::peer::own_path()?;
        let beside = own.parent().unwrap_or(Path::new("/"));
        let folder = folder.unwrap_or(beside);
        let folder = folder.canonicalize().with_context(|| format!("there is no folder {}", folder.display()))?;
        let find = |name: &str| {
            let path = folder.join(name);
            if !path.is_file() {
                bail!(
                    "{} is missing; build it (`cargo build --workspace`) or say where it is with --bin-dir",
                    path.display()
                );
            }
            Ok(path)
        };
        Ok(Programs { weftd: find("weftd")?, weft_cni: find("weft-cni")? })
    }
}

/// Builds the lab. If that fails, nothing of it is left, unless `keep` is set.
pub fn up(plan: &Plan, programs: &Programs, keep: bool) -> Result<Cluster> {
    let mut record = reserve(plan, Kind::Weft)?;
    build(plan, programs, &mut record).map_err(|error| undo(&record, error, keep))
}

/// Reserves the names of a lab and writes down what will be made.
pub fn reserve(plan: &Plan, kind: Kind) -> Result<Record> {
    if Record::load(&plan.lab)? == Stored::Absent {
        net::check_free(plan)?;
    }
    Record::create(plan, kind)
}

/// Undoes what a failed build has made, and says so if that fails as well.
pub fn undo(record: &Record, error: anyhow::Error, keep: bool) -> anyhow::Error {
    let command = record::down_command(&record.lab);
    if keep {
        return anyhow!("{error:#}\nwhat was made is left to look at; end it with `{command}`");
    }
    match down::tear_down(record) {
        Ok(()) => error,
        Err(second) => anyhow!("{error:#}\nand undoing it failed; try `{command}`: {second:#}"),
    }
}

fn build(plan: &Plan, programs: &Programs, record: &mut Record) -> Result<Cluster> {
    let started = Instant::now();
    let step = |what: String| output::progress(&format!("{:5.1} s  {what}", started.elapsed().as_secs_f64()));
    let count = |n: u8, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let (nodes, pods) = (count(plan.nodes, "node"), count(plan.pods, "pod"));
    step(format!("{nodes} with {pods} each, {} mode", plan.mode.name()));
    net::make_namespaces(plan)?;
    net::make_underlay(plan)?;
    step("namespaces and underlay are there".to_owned());
    let engine = match plan.source {
        Source::File => None,
        Source::Etcd => Some(etcd::start(plan)?),
    };
    for node in plan.node_numbers() {
        let process = daemon::start(plan, node, &programs.weftd)?;
        record.processes.push(process);
        record.save()?;
    }
    for (node, process) in plan.node_numbers().zip(&record.processes) {
        daemon::await_ready(plan, node, process)?;
    }
    // Beside the daemons, which are told apart by their place in the record.
    record.processes.extend(engine);
    record.save()?;
    step("each node's weftd is ready".to_owned());
    let cluster = attach_all(plan, programs, record)?;
    step("pods are attached".to_owned());
    if cluster.pods().count() > 1 {
        Matrix::reach(&cluster)?.require_all(&plan.lab, &cluster)?;
        step("every pod reaches every other, over IPv4 and IPv6".to_owned());
    }
    record.cluster = Some(cluster.clone());
    record.save()?;
    Ok(cluster)
}

/// Attaches the pods of all nodes, the nodes side by side as in a cluster.
fn attach_all(plan: &Plan, programs: &Programs, record: &Record) -> Result<Cluster> {
    let nodes = thread::scope(|scope| {
        let start = |node| scope.spawn(move || attach(plan, programs, node));
        let threads: Vec<_> = plan.node_numbers().map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("attaching does not panic");
        threads.into_iter().map(join).collect::<Result<Vec<Vec<Pod>>>>()
    })?;
    let node = |((number, pods), process): ((u8, Vec<Pod>), &super::process::Process)| Node {
        name: plan::node_name(number),
        netns: plan.node_netns(number),
        underlay: plan.underlay_address(number).to_string(),
        socket: Files::of(&plan.lab, number).socket,
        pid: process.pid,
        pods,
    };
    Ok(Cluster { nodes: plan.node_numbers().zip(nodes).zip(&record.processes).map(node).collect() })
}

fn attach(plan: &Plan, programs: &Programs, node: u8) -> Result<Vec<Pod>> {
    let files = Files::of(&plan.lab, node);
    let attach = |pod| {
        interrupt::check()?;
        let request = cni::Request {
            lab: &plan.lab,
            plugin: &programs.weft_cni,
            socket: &files.socket,
            state_dir: &files.state_dir,
            name: &plan::pod_name(node, pod),
            netns: &plan.pod_netns(node, pod),
        };
        let outcome = cni::add(&request);
        interrupt::check()?;
        outcome.map_err(|error| anyhow!("{error:#}{}", daemon::log_tail(&files.log)))
    };
    plan.pod_numbers().map(attach).collect()
}

/// The lab for people: what there is, and what to try.
pub fn summary(plan: &Plan, cluster: &Cluster, style: Style) -> String {
    let mut table = Table::new(&["node", "underlay", "pod", "namespace", "IPv4", "IPv6", "MAC"]);
    for node in &cluster.nodes {
        if node.pods.is_empty() {
            table.push(vec![node.name.clone(), node.underlay.clone()], false);
        }
        for pod in &node.pods {
            table.row([
                node.name.clone(),
                node.underlay.clone(),
                pod.name.clone(),
                pod.netns.clone(),
                pod.ipv4.to_string(),
                pod.ipv6.to_string(),
                pod.mac.clone(),
            ]);
        }
    }
    let mut text = table.render(style, "no pods");
    text.push_str("\ntry:\n");
    for line in suggestions(plan, cluster) {
        text.push_str(&format!("  {line}\n"));
    }
    text
}

fn suggestions(plan: &Plan, cluster: &Cluster) -> Vec<String> {
    let name = if plan.lab == plan::DEFAULT { String::new() } else { format!("--name {} ", plan.lab) };
    let mut lines = Vec::new();
    let pods: Vec<&Pod> = cluster.pods().collect();
    if let [first, .., last] = pods.as_slice() {
        lines.push(format!("weft lab exec {name}{} -- ping -c 3 {}", first.name, last.ipv4));
        lines.push(format!("weft lab exec {name}{} -- iperf3 -s -D", last.name));
        lines.push(format!("weft lab exec {name}{} -- iperf3 -C cubic -c {}", first.name, last.ipv4));
    }
    if let Some(node) = cluster.nodes.first() {
        lines.push(format!("weft --socket {} status", node.socket.display()));
        lines.push(format!("weft --socket {} drops", node.socket.display()));
    }
    lines.push(record::down_command(&plan.lab));
    lines
}
