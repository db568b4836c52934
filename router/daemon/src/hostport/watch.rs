//! Who looks after the host port: one thread that hears of changes, one that puts things right.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::thread::{Builder, sleep};
use std::time::Duration;

use anyhow::Context;

use crate::netlink::Netlink;
use crate::netlink::routes::Change;
use crate::node::Node;

/// Changes come in groups, and a group is looked at once.
const SETTLE: Duration = Duration::from_millis(50);
/// Least time between two looks: somebody who changes things without end shall not keep a CPU busy.
const PAUSE: Duration = Duration::from_millis(500);
/// What could not be put right is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// After the kernel failed to tell of changes.
const RECOVER: Duration = Duration::from_secs(1);

/// Makes the host port, and looks after it from then on.
///
/// # Errors
/// No thread can be started.
pub fn start(node: &Arc<Node>, kicks: Receiver<()>) -> anyhow::Result<()> {
    let mut well = node.host.keep(node);
    let watcher = Arc::downgrade(node);
    // The underlay's device is followed also without a host port.
    spawn("weft-host-watch", move || follow(&watcher))?;
    if node.state().desired.config.host_port.is_none() {
        return Ok(());
    }
    let keeper = Arc::downgrade(node);
    let keep = move || {
        let patience = |well: bool| if well { Duration::MAX } else { AGAIN };
        while let Ok(()) | Err(RecvTimeoutError::Timeout) = kicks.recv_timeout(patience(well)) {
            sleep(SETTLE);
            // One look sees all that has changed until then.
            while kicks.try_recv().is_ok() {}
            let Some(node) = keeper.upgrade() else { break };
            well = node.host.keep(&node);
            drop(node);
            sleep(PAUSE);
        }
    };
    spawn("weft-host-keep", keep)
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let thread = Builder::new().name(name.into()).stack_size(512 * 1024).spawn(run);
    thread.map(drop).context("cannot start a thread: not enough memory or processes (ulimit -u)")
}

fn follow(node: &Weak<Node>) {
    loop {
        let followed = Netlink::follow_all().and_then(|mut netlink| {
            // What happened before the socket was open was told to nobody.
            let Some(now) = node.upgrade() else { return Ok(()) };
            now.host.kick();
            now.follow_uplink(None);
            drop(now);
            loop {
                let change = netlink.await_change()?;
                let Some(node) = node.upgrade() else { return Ok(()) };
                match change {
                    Change::Interface(index) => node.follow_uplink(Some(index)),
                    Change::Much => node.follow_uplink(None),
                    // Whose interface may have this node's address from now on.
                    Change::Route(to) if to.prefix_len() == 0 => node.follow_uplink(None),
                    Change::Route(_) => {}
                }
                if node.host.concerns(change) {
                    node.host.kick();
                }
            }
        });
        match followed {
            Ok(()) => return,
            Err(error) => tracing::warn!(%error, "the kernel does not tell of changes to interfaces and routes"),
        }
        sleep(RECOVER);
    }
}
