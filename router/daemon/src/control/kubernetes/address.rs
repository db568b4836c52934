//! This machine's underlay address, if its configuration does not say it: the operator's annotation, else the Node's `InternalIP`,
//! else that of the default route.
//!
//! It is needed before anything else can begin, and may be late: a cloud provider's controller gives Nodes their addresses after their
//! kubelets have registered them. So a node waits for it, though not for ever, and the one that it had when it ran last is better
//! than a guess.

use std::net::IpAddr;
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::time::{Instant, sleep};

use super::client::{Client, Doing, Failure};
use super::members::address_of;
use super::mirror::{Kind, escaped};
use super::objects::Node;
use super::seed_of;
use crate::control::config::kubernetes::KubernetesConfig;
use crate::control::source::Backoff;

/// How long to wait for a server that answers, if the machine's address at the last start is known.
const BRIEFLY: Duration = Duration::from_secs(3);
/// How long to wait for an address in the Node.
const PATIENTLY: Duration = Duration::from_secs(20);

/// The address, or `None` if there is none to be had (yet). `tell` is told why it takes so long.
pub async fn discover(
    config: &KubernetesConfig,
    node: &str,
    had: Option<IpAddr>,
    tell: impl Fn(String),
) -> Option<IpAddr> {
    let started = Instant::now();
    let seed = seed_of(node);
    let mut backoff = Backoff::until(seed, Backoff::SOON / 3);
    let mut server = seed as usize;
    loop {
        let (why, patience) = match ask(config, node, server).await {
            Ok(Some(address)) => return Some(address),
            Ok(None) => (format!("the Node {node:?} has no InternalIP yet"), PATIENTLY),
            Err(failure) if failure.status == Some(StatusCode::NOT_FOUND) => {
                (format!("there is no Node {node:?} yet"), PATIENTLY)
            }
            Err(failure) => (failure.to_string(), if had.is_some() { BRIEFLY } else { PATIENTLY }),
        };
        tell(format!("kubernetes: {why}"));
        if started.elapsed() >= patience {
            return had;
        }
        server = server.wrapping_add(1);
        sleep(backoff.step()).await;
    }
}

async fn ask(config: &KubernetesConfig, node: &str, server: usize) -> Result<Option<IpAddr>, Failure> {
    let client = Client::of_first(config, server).await?;
    let doing = Doing { verb: "get", what: Node::WHAT };
    let answer = client.send(doing, Method::GET, &format!("{}/{}", Node::PATH, escaped(node)), None).await?;
    let bytes = client.whole(doing, answer).await?;
    Node::read(&String::from_utf8_lossy(&bytes)).map(|(_, node)| address_of(&node)).map_err(Failure::new)
}
