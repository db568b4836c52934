//! The laboratory: a cluster on one machine, from network namespaces.
//!
//! `weft lab up` makes what a small cluster consists of: nodes and pods as namespaces ([`net`]), a weftd for each node
//! ([`daemon`]), pods attached by the plugin as a runtime would ([`cni`]). It is done when every pod reaches every
//! other ([`check`]). Before anything is made it is written down ([`record`]), and `weft lab down` ends exactly what
//! was written down, whatever state it is in. `weft lab demo` shows such a lab at work beside its twin on the kernel's
//! own data path ([`twin`]).

mod check;
mod cni;
pub mod command;
pub mod daemon;
mod demo;
pub mod down;
mod etcd;
pub mod net;
pub mod peer;
mod ping;
pub mod plan;
pub mod process;
pub mod record;
mod transfer;
pub mod twin;
pub mod up;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::interrupt;
use crate::output::{self, Style};
use crate::table::Table;
use record::{Record, Stored};

/// What can be done with labs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build a lab; done when every pod reaches every other.
    Up(Up),
    /// List the labs on this machine.
    Ls {
        /// Print them as JSON.
        #[arg(long)]
        json: bool,
    },
    /// End a lab and remove all of it. Harmless if there is none.
    Down(Down),
    /// Run a command in a pod or on a node of a lab, e.g. `weft lab exec n1-p1 -- ping 10.244.2.2`.
    Exec(Exec),
    /// Show a lab at work, beside the kernel's own data path, in under a minute.
    Demo(Binaries),
}

/// Which lab.
#[derive(Debug, Args)]
pub struct Name {
    /// The lab's name, for more than one at a time; part of its namespaces' names.
    #[arg(long, value_name = "LAB", default_value = plan::DEFAULT, hide_default_value = true, value_parser = parse_name)]
    name: String,
}

/// Where weftd and weft-cni are.
#[derive(Debug, Args)]
pub struct Binaries {
    /// The folder of weftd and weft-cni; that of this program unless given.
    #[arg(long, value_name = "FOLDER", env = "WEFT_BIN_DIR")]
    bin_dir: Option<PathBuf>,
}

impl Binaries {
    /// Finds them.
    pub fn find(&self) -> Result<up::Programs> {
        up::Programs::find(self.bin_dir.as_deref())
    }
}

/// The lab to build.
#[derive(Debug, Args)]
pub struct Up {
    /// Number of nodes.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=i64::from(plan::MAX_NODES)))]
    nodes: u8,
    /// Number of pods on each node.
    #[arg(long, value_name = "M", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=i64::from(plan::MAX_PODS)))]
    pods: u8,
    /// Ranges for each node and routes between them, or one L2 segment over all nodes.
    #[arg(long, value_enum, default_value_t = plan::Mode::Routed)]
    mode: plan::Mode,
    /// MTU of the underlay; pods have less by what the encapsulation takes, which is 50 bytes for VXLAN.
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u32).range(i64::from(plan::MIN_MTU)..=i64::from(plan::MAX_MTU)))]
    mtu: u32,
    /// Workers of each node's weftd; as many as it chooses unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(plan::MAX_WORKERS)))]
    workers: Option<u8>,
    /// What pods get as devices; TAPs unless given.
    #[arg(long, value_enum)]
    port: Option<plan::Port>,
    /// Where the nodes know each other from: their configuration, or an etcd that the lab runs.
    #[arg(long, value_enum, default_value_t = plan::Source::File)]
    source: plan::Source,
    /// How the tunnel's packets leave and enter the nodes; by UDP unless given.
    #[arg(long, value_enum)]
    underlay: Option<plan::Underlay>,
    /// What addresses the nodes have on the underlay. By IPv6, pods have an MTU of 20 bytes less.
    #[arg(long, value_enum, value_name = "FAMILY", default_value_t = plan::Family::Ipv4)]
    underlay_family: plan::Family,
    /// What packets between nodes are wrapped in.
    #[arg(long, value_enum, value_name = "KIND", default_value_t = plan::Encapsulation::Vxlan)]
    encapsulation: plan::Encapsulation,
    /// Pods leave the cluster, and reach other nodes' own addresses, in their node's name.
    #[arg(long)]
    masquerade: bool,
    /// Print the cluster as JSON.
    #[arg(long)]
    json: bool,
    /// Leave what was made if it fails, to look at it.
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    binaries: Binaries,
}

/// The lab to end.
#[derive(Debug, Args)]
pub struct Down {
    /// All labs on this machine.
    #[arg(long, conflicts_with = "name")]
    all: bool,
    #[command(flatten)]
    name: Name,
}

/// Where to run what.
#[derive(Debug, Args)]
pub struct Exec {
    #[command(flatten)]
    name: Name,
    /// A pod or a node, e.g. n1-p1, or n1.
    place: String,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// What the lab runs inside its namespaces.
#[derive(Debug, Subcommand)]
pub enum PeerCommand {
    /// Ping many targets; the job comes on stdin.
    Ping,
    /// Receive one TCP stream.
    Receive(transfer::Receive),
    /// Send one TCP stream.
    Send(transfer::Send),
}

#[derive(Serialize)]
struct Listed {
    name: String,
    kind: Option<record::Kind>,
    mode: Option<plan::Mode>,
    state: String,
    nodes: usize,
    pods: usize,
}

/// Does what the command line says.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Up(args) => {
            prepare()?;
            up(&args)
        }
        Command::Ls { json } => ls(json),
        Command::Down(args) => {
            require_root()?;
            down(&args)
        }
        Command::Exec(args) => {
            require_root()?;
            exec(&args)
        }
        Command::Demo(binaries) => {
            prepare()?;
            demo::run(&binaries.find()?)
        }
    }
}

/// Does what a peer's command line says.
pub fn run_peer(command: PeerCommand) -> Result<()> {
    match command {
        PeerCommand::Ping => ping::run(),
        PeerCommand::Receive(args) => transfer::receive(&args),
        PeerCommand::Send(args) => transfer::send(&args),
    }
}

fn up(args: &Up) -> Result<()> {
    let plan =
        plan::Plan::new(&args.name.name, args.nodes, args.pods, args.mode, args.mtu)?.over(args.underlay_family)?;
    let plan = plan.wrapped(args.encapsulation)?;
    let (source, masquerade) = (args.source, args.masquerade);
    let plan =
        plan::Plan { workers: args.workers, port: args.port, underlay: args.underlay, source, masquerade, ..plan };
    let programs = args.binaries.find()?;
    let cluster = up::up(&plan, &programs, args.keep)?;
    if args.json { output::print_json(&cluster) } else { output::print(&up::summary(&plan, &cluster, Style::stdout())) }
}

fn down(args: &Down) -> Result<()> {
    let labs = if args.all { record::all()? } else { vec![args.name.name.clone()] };
    let mut failures = Vec::new();
    for lab in &labs {
        match down::down(lab) {
            Ok(true) => output::progress(&format!("the lab {lab} has ended")),
            Ok(false) => output::progress(&format!("there is no lab {lab}")),
            Err(error) => failures.push(format!("{error:#}")),
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(())
}

fn ls(json: bool) -> Result<()> {
    let labs = record::all()?.iter().map(|lab| listed(lab)).collect::<Result<Vec<_>>>()?;
    if json {
        return output::print_json(&labs);
    }
    let mut table = Table::new(&["lab", "data path", "mode", ">nodes", ">pods", "state"]);
    for lab in labs {
        let kind = lab.kind.map_or("", record::Kind::name);
        let mode = lab.mode.map_or("", plan::Mode::name);
        let cells =
            [lab.name, kind.into(), mode.into(), lab.nodes.to_string(), lab.pods.to_string(), lab.state.clone()];
        table.push(cells.into(), lab.state != "up");
    }
    output::print(&table.render(Style::stdout(), "no labs; `weft lab up` builds one"))
}

fn listed(lab: &str) -> Result<Listed> {
    let broken = |state: String| Listed { name: lab.to_owned(), kind: None, mode: None, state, nodes: 0, pods: 0 };
    let record = match Record::load(lab) {
        Ok(Stored::Present(record)) => record,
        Ok(Stored::Empty | Stored::Absent) => return Ok(broken("incomplete".to_owned())),
        Err(error) => return Ok(broken(format!("{error:#}"))),
    };
    let is_pod = |netns: &&String| netns.strip_prefix(&plan::prefix(lab)).is_some_and(|rest| rest.contains("-p"));
    let pods = record.netns.iter().filter(is_pod).count();
    let nodes = record.netns.len() - pods - 1;
    Ok(Listed {
        name: lab.to_owned(),
        kind: Some(record.kind),
        mode: Some(record.mode),
        state: state(&record),
        nodes,
        pods,
    })
}

fn state(record: &Record) -> String {
    if record.cluster.is_none() {
        return "incomplete".to_owned();
    }
    let dead: Vec<&str> = record
        .processes
        .iter()
        .filter(|process| !record.is_of_this_boot() || !process.is_alive())
        .map(|process| process.what.as_str())
        .collect();
    let gone = record.netns.iter().filter(|netns| !net::path(netns).exists());
    let dead: Vec<&str> = dead.into_iter().chain(gone.map(String::as_str)).collect();
    if dead.is_empty() { "up".to_owned() } else { format!("gone: {}", dead.join(", ")) }
}

fn exec(args: &Exec) -> Result<()> {
    let lab = &args.name.name;
    let Stored::Present(record) = Record::load(lab)? else {
        bail!("there is no lab {lab}; `weft lab ls` lists those there are");
    };
    let netns = format!("{}{}", plan::prefix(lab), args.place);
    if !record.netns.contains(&netns) {
        let places: Vec<&str> = record.netns.iter().filter_map(|name| name.strip_prefix(&plan::prefix(lab))).collect();
        bail!("the lab {lab} has no {:?}; it has {}", args.place, places.join(" "));
    }
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "exec", &netns]).args(&args.command);
    Err(command.exec()).context("cannot run `ip`; install it with `apt-get install iproute2`")
}

/// What every command that makes something needs.
pub fn prepare() -> Result<()> {
    require_root()?;
    command::Run::ip("-V").succeed()?;
    interrupt::listen()
}

fn require_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root, for it makes network namespaces: try it with `sudo`");
    }
    Ok(())
}

fn parse_name(name: &str) -> Result<String> {
    plan::check_name(name)?;
    Ok(name.to_owned())
}
