//! The Kubernetes API as the source: Nodes are the nodes, and their `podCIDRs` the ranges.
//!
//! | object | what is read | what is written |
//! |---|---|---|
//! | Nodes | `podCIDRs`, `InternalIP`s, two annotations ([`objects`]) | this node's annotation, by merge patch, and its condition `NetworkUnavailable`, by strategic merge patch of the status |
//! | Pods of this node | addresses, `hostNetwork`, phase: what is no lease here is not given to others | nothing |
//!
//! Two [`mirror`]s follow them, each by a stream of its own; whenever something changed, [`members`] makes the cluster of what is, and what
//! this node says about itself is compared with what should stand there ([`claim`]). It is written only if it differs, and as a
//! patch that names the Node's UID, so that it can never be written to another one of the same name. In a steady state
//! two streams are open, and nothing is asked.
//!
//! Nothing of this is needed for traffic: while no server answers, what was known stays in force.

mod access;
pub mod address;
mod claim;
mod client;
mod members;
mod mirror;
mod objects;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::Method;
use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::cluster::Cluster;
use super::config::Config;
use super::config::kubernetes::KubernetesConfig;
use super::etcd::own;
use super::source::{Backoff, Facts, Order, Pace, Source, Views};
use claim::{Claim, GRACE, Step};
use client::{Client, Doing, Failure, Patch};
use mirror::{Kind, Mirror, escaped};
use objects::{ANNOUNCED, Node, Pod};

/// By whom the API says that fields were written.
const FIELD_MANAGER: &str = "weftd";
/// Nodes that start together write one after the other: as each of them knows how many they are, it waits for a time that is longer the more
/// they are. The others know its address until then by its Node alone.
const PER_NODE: Duration = Duration::from_millis(20);
const MAX_SCATTERED: Duration = Duration::from_secs(60);
/// The same after the API was away, for those that have something to write.
const BACK: Duration = Duration::from_secs(2);
/// How long the first list of pods may take before it is done without.
const AWAITING_PODS: Duration = Duration::from_secs(2);
/// Addresses of pods that are remembered: more than a node has pods.
const MAX_POD_ADDRESSES: usize = 4096;
/// Between two requests that write to the Node: the stream tells of the first one meanwhile.
const BETWEEN_WRITES: Duration = Duration::from_millis(100);

/// The source.
pub struct Kubernetes {
    local: Config,
    config: KubernetesConfig,
    seed: u64,
    changed: Arc<Notify>,
    nodes: Arc<Mirror<Node>>,
    pods: Arc<Mirror<Pod>>,
    claim: Claim,
    /// The address by which this Node's annotation knows this machine since weftd runs.
    announced: Option<String>,
    /// Whether another weftd has spoken for this Node, and may object.
    is_contested: bool,
    /// When the claim is settled, if nobody objects.
    settled: Option<Instant>,
    /// Whether pods can be attached here.
    serves: bool,
    /// Until when the first list of pods is waited for.
    pods_until: Option<Instant>,
    /// Ranges of before that pods still have addresses of.
    former: Vec<IpNet>,
    /// Why this node's own facts are not written.
    unwritten: Option<String>,
    /// Before that, nothing is written; `None` until it is known how many nodes there are.
    write_from: Option<Instant>,
    /// Whether the Nodes are not in step.
    is_away: bool,
    server: usize,
    backoff: Backoff,
}

impl Kubernetes {
    /// For the node with this configuration.
    pub fn new(local: Config, config: KubernetesConfig) -> Kubernetes {
        let seed = seed_of(&local.node);
        let changed = Arc::new(Notify::new());
        Kubernetes {
            seed,
            nodes: Arc::new(Mirror::new(Arc::clone(&changed))),
            pods: Arc::new(Mirror::new(Arc::clone(&changed))),
            changed,
            claim: Claim::default(),
            announced: None,
            is_contested: false,
            settled: None,
            serves: false,
            pods_until: None,
            former: Vec::new(),
            unwritten: None,
            write_from: None,
            is_away: false,
            server: seed as usize,
            backoff: Backoff::until(seed, Backoff::SOON * 10),
            local,
            config,
        }
    }
}

/// A number that differs from node to node, and from start to start.
fn seed_of(node: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (node, std::process::id(), SystemTime::now()).hash(&mut hasher);
    hasher.finish()
}

impl Source for Kubernetes {
    async fn follow(mut self, views: Views, mut orders: mpsc::Receiver<Order>, mut facts: Facts) {
        let identity = match own::identity(&self.local.state_dir) {
            Ok(identity) => identity,
            Err(error) => {
                // Without one this node only listens.
                views.trouble(format!("kubernetes: {error:#}"));
                String::new()
            }
        };
        // Ends with this task, whatever ends it.
        let mut followers = self.follow_objects();
        let mut due: Option<Instant> = None;
        let mut pace = Pace::new(Instant::now());
        let mut writing: Option<JoinHandle<Written>> = None;
        loop {
            let changed = Arc::clone(&self.changed);
            tokio::select! {
                () = changed.notified() => {
                    let soon = pace.due(Instant::now());
                    due = Some(due.map_or(soon, |due| due.min(soon)));
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    let started = Instant::now();
                    let write;
                    (write, due) = self.settle(&identity, &views, writing.is_some());
                    writing = writing.or(write.map(|write| tokio::spawn(write.carry_out())));
                    pace.spent(started, Instant::now());
                }
                written = async { writing.as_mut().expect("a branch that is taken has it").await }, if writing.is_some() => {
                    writing = None;
                    self.has_written(written.unwrap_or_else(|error| Written { claim: None, result: Err(Failure::new(error)) }));
                    due = Some(Instant::now());
                }
                Some(order) = orders.recv() => {
                    self.obey(order);
                    due = Some(Instant::now());
                }
                Ok(()) = facts.changed() => {
                    let address = self.local.underlay.address;
                    self.local = facts.borrow_and_update().as_ref().clone();
                    if self.local.underlay.address != address {
                        // Connections from the address before lead nowhere any more.
                        drop(std::mem::replace(&mut followers, self.follow_objects()));
                        writing.take().inspect(JoinHandle::abort);
                    }
                    due = Some(Instant::now());
                }
            }
        }
    }
}

struct EndsWith(JoinHandle<()>);

impl Drop for EndsWith {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Something that is to be written into this machine's Node.
struct Write {
    config: KubernetesConfig,
    server: usize,
    nodes: Arc<Mirror<Node>>,
    node: String,
    what: &'static str,
    media: &'static str,
    body: Value,
    /// What the claim is then.
    claim: Option<Claim>,
}

/// How that went.
struct Written {
    claim: Option<Claim>,
    result: Result<(), Failure>,
}

impl Write {
    async fn carry_out(self) -> Written {
        Written { claim: self.claim, result: self.patch().await }
    }

    async fn patch(&self) -> Result<(), Failure> {
        let client = Client::of_first(&self.config, self.server).await?;
        let doing = Doing { verb: "patch", what: self.what };
        let sub = self.what.strip_prefix(Node::WHAT).unwrap_or_default();
        let path = format!("{}/{}{sub}?fieldManager={FIELD_MANAGER}", Node::PATH, escaped(&self.node));
        let patch = Patch { media: self.media, body: &self.body };
        let answer = client.send(doing, Method::PATCH, &path, Some(patch)).await?;
        let bytes = client.whole(doing, answer).await?;
        // The stream tells of it, too, but later: the same must not be written twice.
        self.nodes.learn(&String::from_utf8_lossy(&bytes));
        Ok(())
    }
}

impl Kubernetes {
    /// Follows the objects, until that is dropped.
    fn follow_objects(&self) -> EndsWith {
        let (nodes, pods) = (Arc::clone(&self.nodes), Arc::clone(&self.pods));
        let (for_nodes, for_pods, seed) = (self.config.clone(), self.config.clone(), self.seed);
        let here = format!("spec.nodeName={}", self.local.node);
        EndsWith(tokio::spawn(async move {
            tokio::join!(nodes.follow(for_nodes, None, seed), pods.follow(for_pods, Some(here), seed.rotate_left(32)));
        }))
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Serving => self.serves = true,
            Order::Keeps(former) => self.former = former,
            Order::Leave(answer) => {
                let why = "Kubernetes gives this node its range, and takes it with its Node: drain it, then `kubectl delete node`";
                // Whoever asked may have gone.
                let _ = answer.send(Err(why.into()));
            }
        }
    }

    /// Publishes what is; what is to be written, if nothing `is_writing`, and when to look again, if nothing changes until then.
    fn settle(&mut self, identity: &str, views: &Views, is_writing: bool) -> (Option<Write>, Option<Instant>) {
        let nodes = Arc::clone(&self.nodes);
        let (cluster, wrong, own) = {
            let known = nodes.known();
            if !known.is_complete {
                if let Some(why) = &known.trouble {
                    tell(views, format!("kubernetes: {why}"));
                }
                return (None, None);
            }
            let is_back = std::mem::replace(&mut self.is_away, known.trouble.is_some()) && !self.is_away;
            let until = self.scattered(known.objects.len(), if is_back { BACK } else { MAX_SCATTERED });
            self.write_from = match self.write_from {
                None => Some(until),
                // It was put off for a server that did not answer.
                Some(from) if is_back => {
                    self.backoff.reset();
                    Some(from.min(until))
                }
                from => from,
            };
            if let Some(until) = self.await_pods(views) {
                return (None, Some(until));
            }
            let (cluster, wrong) = members::cluster(&self.local, &known.objects);
            (cluster, wrong, known.objects.get(&self.local.node).and_then(|node| node.as_ref().ok()).cloned())
        };
        if self.settled.is_some_and(|settled| settled <= Instant::now()) {
            self.settled = None;
            self.claim.is_settled();
        }
        let (mut write, mut again) = (None, self.settled);
        views.address(own.as_ref().and_then(|own| members::address_said(&self.local, own)));
        if let Some(own) = own.filter(|_| !identity.is_empty()) {
            write = self.missing(identity, &own);
            if write.is_none() {
                self.unwritten = None;
            } else if is_writing {
                write = None;
            } else if self.write_from.is_some_and(|from| from > Instant::now()) {
                (write, again) = (None, self.write_from);
            }
        }
        self.publish(cluster, wrong, views);
        (write, again)
    }

    /// When this node writes, if all of them have something to write.
    fn scattered(&self, nodes: usize, most: Duration) -> Instant {
        let within = PER_NODE.saturating_mul(u32::try_from(nodes).unwrap_or(u32::MAX)).min(most);
        Instant::now() + within.mul_f64(self.seed as f64 / u64::MAX as f64)
    }

    /// Publishes the pods' addresses. Before the first address is given those that pods have should be known: until when to wait for that.
    fn await_pods(&mut self, views: &Views) -> Option<Instant> {
        let pods = self.pods.known();
        if pods.is_complete {
            let addresses =
                pods.objects.values().flatten().flat_map(|pod| &pod.addresses).filter_map(|text| text.parse().ok());
            let mut addresses: Vec<IpAddr> = addresses.take(MAX_POD_ADDRESSES).collect();
            addresses.sort_unstable();
            addresses.dedup();
            views.pods(addresses);
            return None;
        }
        if pods.trouble.is_some() || views.last().cluster.is_some() {
            return None;
        }
        let until = *self.pods_until.get_or_insert_with(|| Instant::now() + AWAITING_PODS);
        (until > Instant::now()).then_some(until)
    }

    /// What should stand in this machine's Node, and is missing there.
    fn missing(&mut self, identity: &str, node: &Node) -> Option<Write> {
        let ours = members::announcement(&self.local, identity, &self.former);
        let (claim, step) = self.claim.next(node, &ours, self.announced.as_deref());
        self.is_contested = claim == Claim::Contested;
        let (what, media, body, claim) = match step {
            Step::Announce | Step::Insist => {
                if step == Step::Insist {
                    let name = &self.local.node;
                    tracing::warn!(
                        "another machine says that it is the Node {name:?}: one of them must get another name"
                    );
                }
                // Also if no answer comes: then this may be what stands there.
                self.announced = Some(ours.underlay.clone());
                let text = serde_json::to_string(&ours).expect("strings and numbers become JSON");
                let body = json!({"metadata": {"uid": node.uid, "annotations": {ANNOUNCED: text}}});
                ("nodes", "application/merge-patch+json", body, Some(claim))
            }
            Step::GiveWay | Step::Done => {
                self.claim = claim;
                let is_ready = self.serves && claim == Claim::Held;
                if !is_ready || node.network_unavailable.as_deref() == Some("False") {
                    return None;
                }
                let body = ready_condition(&node.uid, SystemTime::now());
                ("nodes/status", "application/strategic-merge-patch+json", body, None)
            }
        };
        Some(Write {
            config: self.config.clone(),
            server: self.server,
            nodes: Arc::clone(&self.nodes),
            node: self.local.node.clone(),
            what,
            media,
            body,
            claim,
        })
    }

    fn has_written(&mut self, written: Written) {
        let pause = match written.result {
            Ok(()) => {
                self.unwritten = None;
                self.backoff.reset();
                if let Some(claim) = written.claim {
                    self.claim = claim;
                    if claim == Claim::Contested {
                        self.settled.get_or_insert_with(|| Instant::now() + GRACE);
                    }
                }
                BETWEEN_WRITES
            }
            Err(failure) => {
                // Whoever has a range can serve with it, also if nobody can be told.
                self.unwritten = Some(failure.to_string());
                self.server = self.server.wrapping_add(1);
                let pause = self.backoff.step();
                failure.retry_after.map_or(pause, |asked| asked + pause)
            }
        };
        self.write_from = Some(Instant::now() + pause);
    }

    fn publish(&self, mut cluster: Cluster, wrong: Option<String>, views: &Views) {
        let known = views.last().cluster;
        let lost = (self.claim == Claim::Lost).then(|| {
            format!(
                "another machine is the Node {:?}: give this one another name; if that one is gone for good, remove the annotation {ANNOUNCED}",
                self.local.node
            )
        });
        let waits = self.is_contested;
        if lost.is_some() {
            cluster.ranges.clear();
        } else if cluster.ranges.is_empty() || waits {
            // What this node had until now is still its pods'.
            cluster.ranges = known.as_ref().map(|known| known.ranges.clone()).unwrap_or_default();
        }
        let waits = waits.then(|| "another weftd spoke for this Node until now: waiting whether it objects".to_owned());
        let away = [self.nodes.known().trouble.clone(), self.pods.known().trouble.clone()].into_iter().flatten().next();
        let trouble =
            lost.or(wrong).or(away).or(waits).or(self.unwritten.clone()).map(|why| format!("kubernetes: {why}"));
        if let Some(why) = trouble.as_ref().filter(|why| views.last().trouble.as_ref() != Some(*why)) {
            tracing::warn!("{why}");
        }
        let is_known = !cluster.ranges.is_empty() || known.is_some();
        views.publish(is_known.then_some(cluster), trouble);
    }
}

/// The source is not in step, and why: said once.
fn tell(views: &Views, why: String) {
    if views.last().trouble.as_ref() != Some(&why) {
        tracing::warn!("{why}; what was known of the cluster stays in force");
    }
    views.trouble(why);
}

/// The patch that says that pods on this node have a network.
fn ready_condition(uid: &str, now: SystemTime) -> Value {
    let now = humantime::format_rfc3339_seconds(now).to_string();
    json!({
        "metadata": {"uid": uid},
        "status": {"conditions": [{
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "WeftIsUp",
            "message": "weftd serves pods on this node",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }]},
    })
}

#[cfg(test)]
pub(super) mod tests;
