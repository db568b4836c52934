//! `weftd`: the node daemon.
//!
//! A control plane (tokio, one thread: signals and accepting clients; a thread for each client) around the data plane,
//! which has threads of its own in `weft-router`. Read [`control`] for how a file becomes tables, [`attach`] for how a
//! pod gets its interface, [`api`] for how it is asked.

mod api;
mod attach;
mod conflist;
mod control;
mod egress;
mod hostport;
mod log;
mod metrics;
mod netlink;
mod node;
mod probing;
mod shortage;
mod sysctl;
mod uplink;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, sleep_until};
use weft_router::Event;

use control::cluster::Cluster;
use control::config::source::SourceConfig;
use control::config::{Checked, Config, Log};
use control::kubernetes::address;
use control::saved;
use control::source::{self, Following, Order, View};
use log::LogLevel;
use metrics::http::Subject;
use netlink::routes::PROTOCOL;
use node::Node;

/// How often [`keep_house`] is due.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// How long after a change of the cluster it is kept on disk.
const KEEP_AFTER: Duration = Duration::from_secs(1);

const FAILED: u8 = 1;
const MISCONFIGURED: u8 = 2;

/// The weft node daemon.
#[derive(Debug, Parser)]
#[command(
    name = "weftd",
    version,
    about,
    after_help = "Signals:
  SIGHUP            read the configuration again; a wrong one is logged and the old one stays
  SIGTERM, SIGINT   stop

Environment, with [kubernetes] in the configuration:
  NODE_NAME                                         this node's name, if the configuration has none
  KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT  the API server, if the configuration has none

Exit codes:
  0  stopped by SIGTERM or SIGINT; or the configuration is valid (--check); or nothing is left in the kernel (--forget)
  1  could not start, or the data plane stopped
  2  wrong usage or configuration"
)]
struct Arguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = "/etc/weft/weftd.toml")]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
    /// Take away the routes that weftd left in the kernel, by which packets for pods are answered as unreachable, and exit. weftd must not
    /// be running.
    #[arg(long, conflicts_with = "check")]
    forget: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.check {
        return check(&arguments.config);
    }
    if arguments.forget {
        return match hostport::forget() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("weftd: cannot take the routes of weftd away (ip route flush proto {PROTOCOL}): {error}");
                ExitCode::from(FAILED)
            }
        };
    }
    // First of all, for a SIGHUP that nobody listens for ends the process.
    let (runtime, signals) = match prepare() {
        Ok(ready) => ready,
        Err(error) => {
            eprintln!("weftd: {error:#}");
            return ExitCode::from(FAILED);
        }
    };
    let Checked { config, warnings } = match node::read_config(&arguments.config, None) {
        Ok(checked) => checked,
        Err(error) => return misconfigured(&error),
    };
    let level = log::start(config.log);
    node::log_warnings(&arguments.config, &warnings);
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!(%error, "cannot raise the limit of open files (ulimit -n); each pod takes one");
    }
    match run(runtime, signals, config, arguments.config, level) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn check(path: &Path) -> ExitCode {
    log::start(Log { level: tracing::Level::WARN, json: false });
    match node::read_config(path, None) {
        Ok(checked) => {
            node::log_warnings(path, &checked.warnings);
            println!("{} is valid", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => misconfigured(&error),
    }
}

fn misconfigured(error: &anyhow::Error) -> ExitCode {
    eprintln!("weftd: {error:#}");
    ExitCode::from(MISCONFIGURED)
}

/// The signals that weftd obeys.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

/// The control plane's runtime, and its signals, which are kept from then on until someone receives them.
fn prepare() -> anyhow::Result<(Runtime, Signals)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(api::MAX_CONNECTIONS + 16)
        .thread_name("weft-api")
        .build()
        .context("cannot start the control plane: not enough memory or descriptors")?;
    let inside = runtime.enter();
    let signals = Signals {
        terminate: signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?,
        interrupt: signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?,
        hangup: signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?,
    };
    drop(inside);
    Ok((runtime, signals))
}

/// As many open files as the service manager allows at all: a pod's port holds one, and the usual soft limit is small.
fn raise_descriptor_limit() -> rustix::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
}

/// Serves until a signal or the end of the data plane.
fn run(runtime: Runtime, signals: Signals, config: Config, path: PathBuf, level: LogLevel) -> anyhow::Result<()> {
    let stopped = runtime.block_on(begin(signals, config, path, level));
    // Requests under way have until their deadline; silent clients are cut off.
    runtime.shutdown_timeout(api::GRACE);
    stopped
}

/// Makes the node, as soon as it is known what it is, and serves.
async fn begin(mut signals: Signals, mut config: Config, path: PathBuf, level: LogLevel) -> anyhow::Result<()> {
    let mut early = None;
    let subject = Arc::new(Subject::default());
    if let Some(address) = config.metrics {
        metrics::http::start(&subject, address).await?;
    }
    if config.source != SourceConfig::File {
        let socket = api::socket::Bound::new(&config.socket)?;
        match find_address(&config, &path, &socket, &mut signals, &subject).await? {
            Some(found) => config = found,
            None => return Ok(()),
        }
        early = Some(socket);
    }
    let workers = node::workers(&config);
    // Before anybody is told what this node takes in.
    let tunnels = uplink::Tunnels::open(&mut config, workers);
    let known = known_before(&config);
    let mut following = source::follow(&config, known.clone());
    let view = match following.as_mut().zip(early.as_ref()) {
        None => View::default(),
        Some((following, socket)) => {
            let Some(view) = await_ranges(socket, &mut signals, &mut following.views, &subject).await else {
                tracing::info!("stopping");
                return Ok(());
            };
            view
        }
    };
    let (socket_path, first) = (config.socket.clone(), view.cluster.clone());
    let (kicks, kicked) = std::sync::mpsc::channel();
    let (mut node, removals) = Node::start(config, tunnels, view, path, level, kicks)?;
    node.orders = following.as_ref().map(|following| following.orders.clone());
    node.facts = following.as_ref().map(|following| following.facts.clone());
    let node = Arc::new(node);
    watch_veths(&node, removals)?;
    attach::watch::start(&node).context("cannot start a thread (ulimit -u)")?;
    hostport::watch::start(&node, kicked)?;
    probing::start(&node)?;
    let listener = Arc::downgrade(&node);
    node.uplink.on_path_mtu(move || {
        if let Some(node) = listener.upgrade() {
            node.path_mtus_changed();
        }
    });
    let listener = Arc::downgrade(&node);
    node.egress.on_change(Box::new(move || {
        if let Some(node) = listener.upgrade() {
            node.leads_changed();
        }
    }));
    if first.is_some_and(|first| known.as_ref() != Some(&*first)) {
        node.keep_cluster();
    }
    let socket = early.map_or_else(|| api::socket::Bound::new(&socket_path), Ok)?;
    if let Some(Following { views, .. }) = following {
        drop(tokio::spawn(put_in_force(Arc::clone(&node), views)));
    }
    serve(&node, signals, socket, &subject).await
}

/// The configuration with this machine's underlay address as the source has it, if the file does not say it; `None` if a signal came
/// first.
async fn find_address(
    config: &Config,
    path: &Path,
    socket: &api::socket::Bound,
    signals: &mut Signals,
    subject: &Subject,
) -> anyhow::Result<Option<Config>> {
    let kubernetes = match &config.source {
        SourceConfig::Kubernetes(kubernetes) if !config.underlay.is_given => kubernetes,
        _ => return Ok(Some(config.clone())),
    };
    let had = saved::address(&config.state_dir);
    let (sender, views) = watch::channel(View::default());
    let tell = |why: String| {
        subject.waits(&why);
        drop(sender.send_replace(View { trouble: Some(why), ..View::default() }));
    };
    let found = address::discover(kubernetes, &config.node, had, tell);
    tokio::pin!(found);
    let waiting = api::waiting::Waiting::new(views.clone());
    let found = loop {
        tokio::select! {
            found = &mut found => break found,
            _ = signals.terminate.recv() => return Ok(None),
            _ = signals.interrupt.recv() => return Ok(None),
            Ok(stream) = socket.accept() => waiting.serve(stream),
        }
    };
    let Some(found) = found else {
        tracing::warn!(address = %config.underlay.address, "the cluster does not say this machine's address: taking its main one");
        return Ok(Some(config.clone()));
    };
    Ok(Some(node::read_config(path, Some(found))?.config))
}

/// What was known of the cluster when weftd last ran.
fn known_before(config: &Config) -> Option<Cluster> {
    if config.source == SourceConfig::File {
        return None;
    }
    match saved::load(&config.state_dir, config) {
        Ok(known) => known.filter(|known| !known.ranges.is_empty()),
        Err(why) => {
            tracing::warn!("{why}; the source has to say everything anew");
            None
        }
    }
}

/// Waits until the source has said what this node's ranges are; `None` if a signal came first.
async fn await_ranges(
    socket: &api::socket::Bound,
    signals: &mut Signals,
    views: &mut watch::Receiver<View>,
    subject: &Subject,
) -> Option<View> {
    let waiting = api::waiting::Waiting::new(views.clone());
    loop {
        let view = views.borrow_and_update().clone();
        if view.cluster.as_ref().is_some_and(|cluster| !cluster.ranges.is_empty()) {
            return Some(view);
        }
        subject.waits(view.trouble.as_deref().unwrap_or("its source has not answered yet"));
        match &view.trouble {
            Some(why) => tracing::warn!("waiting for this node's ranges: {why}"),
            None => tracing::info!("waiting for this node's ranges"),
        }
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => return None,
                _ = signals.interrupt.recv() => return None,
                _ = signals.hangup.recv() => tracing::warn!("nothing is read again before this node's ranges are known"),
                changed = views.changed() => match changed {
                    Ok(()) => break,
                    // The source's task ends with a panic only.
                    Err(_) => return None,
                },
                Ok(stream) = socket.accept() => waiting.serve(stream),
            }
        }
    }
}

async fn serve(
    node: &Arc<Node>,
    mut signals: Signals,
    socket: api::socket::Bound,
    subject: &Subject,
) -> anyhow::Result<()> {
    let path = node.state().desired.config.socket.clone();
    // After the socket is bound and before anyone is served: a shim that still gave up finds the socket on its second try.
    attach::tombstone::honour_all(node);
    attach::reconcile::at_start(node);
    let mut data_plane = watch_data_plane(node)?;
    let server = api::Server::new(Arc::clone(node));
    subject.is(node);
    let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
    housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut keeping: Option<JoinHandle<()>> = None;
    tracing::info!(socket = %path.display(), pid = std::process::id(), "ready");
    if let Some(orders) = &node.orders {
        // There is room for it: a source that has ended takes none, which ended with a panic.
        let _ = orders.try_send(Order::Serving);
    }
    let config = Arc::clone(&node.state().desired.config);
    drop(tokio::task::spawn_blocking(move || conflist::tell_runtime(&config)));
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hangup.recv() => {
                let node = Arc::clone(node);
                tokio::task::spawn_blocking(move || drop(node.reload()));
            }
            // One at a time: a slow disk, or an attachment that takes long, must not pile them up.
            _ = housekeeping.tick() => if keeping.as_ref().is_none_or(JoinHandle::is_finished) {
                let node = Arc::clone(node);
                keeping = Some(tokio::task::spawn_blocking(move || keep_house(&node)));
            },
            _ = data_plane.recv() => anyhow::bail!("the data plane has stopped: see the log above, then restart weftd"),
            stream = async { server.has_room().await; socket.accept().await } => server.serve(stream).await,
        }
    }
    tracing::info!("stopping");
    Ok(())
}

/// Puts what a source says in force, one view after the other. What is kept on disk follows after a while, for in a cluster that forms
/// one change comes after the other.
async fn put_in_force(node: Arc<Node>, mut views: watch::Receiver<View>) {
    let mut keep_at: Option<Instant> = None;
    loop {
        let keeping = sleep_until(keep_at.unwrap_or_else(Instant::now));
        let view = tokio::select! {
            changed = views.changed() => match changed {
                Ok(()) => Some(views.borrow_and_update().clone()),
                Err(_) => return,
            },
            () = keeping, if keep_at.is_some() => None,
        };
        let is_keeping = view.is_none();
        let acting = Arc::clone(&node);
        let done = tokio::task::spawn_blocking(move || match view {
            Some(view) => acting.follow(view),
            None => {
                acting.keep_cluster();
                false
            }
        });
        match done.await {
            Ok(_) if is_keeping => keep_at = None,
            Ok(true) => drop(keep_at.get_or_insert_with(|| Instant::now() + KEEP_AFTER)),
            Ok(false) => {}
            Err(_) => tracing::error!("news of the cluster could not be put in force, see above: report this as a bug"),
        }
    }
}

/// Releases that the disk did not take are tried again, what shims left while weftd did not answer and what pods left that are gone is
/// freed, what could not be bound to this node's address is tried again, and the counters are remembered.
fn keep_house(node: &Node) {
    node.write_pending_releases();
    node.review_former();
    node.review_uplink();
    attach::tombstone::honour_all(node);
    attach::reconcile::reconcile(node);
    node.keep_sample();
}

/// Follows what the data plane notices. The receiver ends when the data plane does.
fn watch_data_plane(node: &Arc<Node>) -> anyhow::Result<mpsc::Receiver<()>> {
    let events = node.router.events().clone();
    let node: Weak<Node> = Arc::downgrade(node);
    let (alive, ended) = mpsc::channel(1);
    let follow = move || {
        let _alive = alive;
        while let Ok(event) = events.recv() {
            let Some(node) = node.upgrade() else { break };
            match event {
                Event::PortGone(port, why) => node.port_gone(port, why),
                Event::WorkerEnded(worker) => node.worker_ended(worker),
            }
        }
    };
    let thread = std::thread::Builder::new().name("weft-events".into()).stack_size(256 * 1024);
    thread.spawn(follow).context("cannot start a thread: not enough memory or processes (ulimit -u)")?;
    Ok(ended)
}

/// Follows the ends of veths.
fn watch_veths(node: &Arc<Node>, removals: Receiver<Option<u32>>) -> anyhow::Result<()> {
    let node: Weak<Node> = Arc::downgrade(node);
    let follow = move || {
        while let Ok(removed) = removals.recv() {
            let Some(node) = node.upgrade() else { break };
            match removed {
                Some(index) => node.veth_removed(index),
                None => node.veths_removed(),
            }
        }
    };
    let thread = std::thread::Builder::new().name("weft-removals".into()).stack_size(256 * 1024);
    thread.spawn(follow).context("cannot start a thread: not enough memory or processes (ulimit -u)")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_raised_to_what_is_allowed() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        raise_descriptor_limit().unwrap();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!((limit.current, limit.maximum), (maximum, maximum));
    }
}
