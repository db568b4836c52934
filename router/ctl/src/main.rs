//! `weft`: the command line.
//!
//! One half asks a running weftd for its state over its unix socket and prints it ([`show`]): tables for people, the
//! protocol's own structures with `--json`. The other half ([`lab`]) builds a cluster on one machine from network
//! namespaces, with the real daemon and the real plugin, and takes it down again.
//!
//! Results go to stdout, progress and errors to stderr. The exit code is 0 if all went well, 1 if not, 2 if the
//! command line was wrong, and 3 if `weft status` or `weft doctor` succeeded and there are problems.

mod bench;
mod doctor;
mod install_cni;
mod interrupt;
mod ipam;
mod lab;
mod output;
mod show;
mod table;
mod uninstall;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::show::View;

/// Exit code of `weft status` and `weft doctor` when there are problems to report.
const EXIT_PROBLEMS: u8 = 3;

const EXIT_CODES: &str = "Exit code: 0 all went well; 1 an error; 2 a wrong command line; 3 `weft status` or
`weft doctor` found problems.
Colour is used on a terminal only, and never if NO_COLOR is set.";

/// The pod network of a bare-metal cluster: what it is doing, and a laboratory to try it in.
#[derive(Parser)]
#[command(name = "weft", version, after_help = EXIT_CODES)]
struct Cli {
    /// The socket of the weftd to ask.
    #[arg(long, global = true, value_name = "PATH", default_value = weft_api::SOCKET)]
    socket: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The daemon's state; what is wrong comes first. Exits with 3 if anything is.
    Status(Format),
    /// The ports of the router, with counters.
    Ports(Format),
    /// Which destinations lead where.
    Routes(Format),
    /// The forwarding database: which MAC is where.
    Fdb(Format),
    /// The neighbours that the router answers for.
    Neigh(Format),
    /// The flows in the cache, busiest first.
    Flows(Format),
    /// The conversations that leave the cluster in this node's name, and as which port, the youngest first.
    Nat(Format),
    /// The addresses that are leased, and to whom.
    Leases(Format),
    /// The frames that ended here, by reason; losses first.
    Drops(Format),
    /// The nodes of the cluster.
    Nodes(Format),
    /// The lease store: looking at it, checking it, taking over another plugin's addresses.
    #[command(subcommand)]
    Ipam(ipam::Command),
    /// Make weftd read its configuration again.
    Reload,
    /// Give this node's ranges back to the cluster's engine, before the node goes for good. Refused while pods are attached.
    Leave,
    /// Put the plugin where this node's container runtime looks for it.
    InstallCni(install_cni::Install),
    /// Take Weft off this node, and leave it as it was. Refused while pods are attached.
    Uninstall(uninstall::Uninstall),
    /// Is this node fit for Weft? What is not, and what to change. Exits with 3 if there is a problem.
    Doctor(doctor::Doctor),
    /// A cluster on this machine, from network namespaces.
    #[command(subcommand)]
    Lab(lab::Command),
    /// What the lab runs inside its namespaces.
    #[command(subcommand, hide = true)]
    LabPeer(lab::PeerCommand),
    /// Weft beside the kernel's own data path and others, measured on this machine in one run.
    Bench(bench::Bench),
    /// What the benchmark runs inside pods.
    #[command(subcommand, hide = true)]
    BenchPeer(bench::Program),
}

#[derive(Args)]
struct Format {
    /// Print the daemon's answer as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    let (view, format) = match cli.command {
        Command::Status(format) => (View::Status, format),
        Command::Ports(format) => (View::Ports, format),
        Command::Routes(format) => (View::Routes, format),
        Command::Fdb(format) => (View::Fdb, format),
        Command::Neigh(format) => (View::Neigh, format),
        Command::Flows(format) => (View::Flows, format),
        Command::Nat(format) => (View::Nat, format),
        Command::Leases(format) => (View::Leases, format),
        Command::Drops(format) => (View::Drops, format),
        Command::Nodes(format) => (View::Nodes, format),
        Command::Reload => return show::reload(&cli.socket).map(|()| 0),
        Command::Leave => return show::leave(&cli.socket).map(|()| 0),
        Command::Doctor(arguments) => {
            return doctor::run(&arguments, &cli.socket)
                .map(|found_problems| if found_problems { EXIT_PROBLEMS } else { 0 });
        }
        Command::InstallCni(args) => return install_cni::install(&args).map(|()| 0),
        Command::Uninstall(args) => return uninstall::uninstall(&args, &cli.socket).map(|()| 0),
        Command::Ipam(command) => return ipam::run(command, &cli.socket),
        Command::Lab(command) => return lab::run(command).map(|()| 0),
        Command::LabPeer(command) => return lab::run_peer(command).map(|()| 0),
        Command::Bench(args) => return bench::run(&args).map(|()| 0),
        Command::BenchPeer(program) => return bench::run_program(program).map(|()| 0),
    };
    let found_problems = show::show(view, &cli.socket, format.json)?;
    Ok(if found_problems { EXIT_PROBLEMS } else { 0 })
}
