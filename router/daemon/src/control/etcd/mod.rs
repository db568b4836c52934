//! etcd as the source: nodes find each other by its keys, and get their ranges out of one network as leases.
//!
//! A *session* is one connection: list all keys (or, if nothing changed while etcd was away, none), follow them from there, keep this
//! node's own part as it should be ([`mirror`] decides what that takes), and publish what is. If anything fails, the session ends with
//! the reason and the next one begins, at another server if that answers, after a while that grows. Whatever the reason was, nothing of it needs
//! to be remembered: a session begins by comparing what is with what should be.
//!
//! A revision that goes backwards, or another cluster's id, means that etcd was restored from an older state, or made anew. Then
//! everything is listed again, every node claims what it has, and nodes that are not in the keys any more stay for [`MERCY`]: they are
//! about to do the same.
//!
//! Steady state: a stream that is silent while nothing changes, and one request for both leases in a third of the short one's time.

mod client;
mod messages;
pub mod mirror;
pub mod own;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until};

use super::cluster::{Cluster, Record, admit, mode_name};
use super::config::Config;
use super::config::source::EtcdConfig;
use super::source::{Backoff, Facts, Order, Pace, Source, Views, moved};
use client::Client;
use messages::{
    Compare, DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, Request, RequestOp, Response, TxnRequest,
    TxnResponse, WatchResponse,
};
use mirror::{Holder, Me, Mirror, Step, number_of};
use own::Held;

/// For how long nodes stay that are in the keys no more after etcd was set back.
const MERCY: Duration = Duration::from_secs(30);
/// How long to wait before trying again to get a slot that somebody else was faster to claim, at most.
const CONTENDED: Duration = Duration::from_millis(100);
/// How long to wait about at least before the next attempt.
const SHORTLY: Duration = Duration::from_millis(400);
/// Claims in a row.
const MAX_CLAIMS: usize = 16;

/// The source.
pub struct Etcd {
    local: Config,
    config: EtcdConfig,
    folder: PathBuf,
    mirror: Option<Mirror>,
    /// Nodes that were there before etcd was set back, and until when they stay.
    missed: BTreeMap<u32, Holder>,
    mercy_ends: Option<Instant>,
    held: Held,
    /// The address by which etcd knows this node since it runs.
    announced: Option<String>,
    /// Why this node has no slot.
    waits: Option<String>,
    left: bool,
    backoff: Backoff,
}

/// When what is due.
struct Timers {
    keep: Instant,
    publish: Option<Instant>,
    pace: Pace,
    retry: Option<Instant>,
}

impl Etcd {
    /// For the node with this configuration.
    pub fn new(local: Config, config: EtcdConfig) -> Etcd {
        let folder = local.state_dir.clone();
        let held = own::load(&folder);
        let backoff =
            Backoff::until(u64::from(number_of(&local.node)) << 16 | u64::from(std::process::id()), Backoff::SOON);
        Etcd {
            local,
            config,
            folder,
            mirror: None,
            missed: BTreeMap::new(),
            mercy_ends: None,
            held,
            announced: None,
            waits: None,
            left: false,
            backoff,
        }
    }
}

impl Source for Etcd {
    async fn follow(mut self, views: Views, mut orders: mpsc::Receiver<Order>, mut facts: Facts) {
        let mut server = number_of(&self.local.node) as usize;
        loop {
            let started = Instant::now();
            let here = facts.clone();
            let Err(error) = tokio::select! {
                ended = self.session(server, &views, &mut orders, &mut facts) => ended,
                () = moved(here) => continue,
            };
            let why = format!("etcd: {error:#}");
            if views.last().trouble.as_ref() != Some(&why) {
                tracing::warn!("{why}; what was known of the cluster stays in force");
            }
            views.trouble(why);
            server = server.wrapping_add(1);
            // Attempts that wait long for nothing follow each other at once, for the next one may be answered.
            let pause = self.backoff.step();
            let pause = sleep(pause.saturating_sub(started.elapsed()).max(self.backoff.spread(SHORTLY)));
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    Some(order) = orders.recv() => {
                        if let Order::Leave(answer) = order {
                            // Whoever asked may have gone.
                            let _ = answer.send(Err("etcd is away".into()));
                        }
                    }
                }
            }
        }
    }
}

impl Etcd {
    /// Follows one connection until it fails.
    async fn session(
        &mut self,
        server: usize,
        views: &Views,
        orders: &mut mpsc::Receiver<Order>,
        facts: &mut Facts,
    ) -> Result<std::convert::Infallible> {
        let identity = own::identity(&self.folder)?;
        self.local = facts.borrow_and_update().as_ref().clone();
        let mut client = Client::connect(&self.config, server).await?;
        self.catch_up(&mut client).await?;
        let from = self.mirror().revision + 1;
        let mut watch = client.watch(self.keys("").as_bytes(), from).await.context("cannot follow the keys")?;
        self.keep_leases(&mut client).await?;
        let now = Instant::now();
        let mut timers = Timers { keep: now + self.keeping(), publish: None, pace: Pace::new(now), retry: None };
        self.settle(&mut client, &identity, views, &mut timers).await?;
        tracing::info!(revision = self.mirror().revision, "in step with etcd");
        self.backoff.reset();
        loop {
            let publish = timers.publish.into_iter().chain(timers.retry).chain(self.mercy_ends).min();
            tokio::select! {
                told = watch.message() => {
                    if self.take_in(told.context("the stream of changes ended")?)? {
                        timers.publish.get_or_insert_with(|| timers.pace.due(Instant::now()));
                    }
                }
                () = sleep_until(timers.keep) => {
                    timers.keep = Instant::now() + self.keeping();
                    if self.keep_leases(&mut client).await? {
                        timers.publish = Some(Instant::now());
                    }
                }
                () = sleep_until(publish.unwrap_or_else(Instant::now)), if publish.is_some() => {
                    self.settle(&mut client, &identity, views, &mut timers).await?;
                }
                Ok(()) = facts.changed() => {
                    self.local = facts.borrow_and_update().as_ref().clone();
                    timers.publish = Some(Instant::now());
                }
                Some(order) = orders.recv() => {
                    if let Order::Leave(answer) = order {
                        self.leave(&mut client, &identity, views, answer).await?;
                    }
                }
            }
        }
    }

    /// Lists everything, unless nothing has changed since this node was in step last.
    async fn catch_up(&mut self, client: &mut Client) -> Result<()> {
        let keys = self.keys("");
        if let Some(mirror) = &self.mirror {
            let now = client.probe(self.keys("network").as_bytes()).await?;
            if (now.cluster_id, now.revision) == (mirror.cluster_id, mirror.revision) {
                return Ok(());
            }
        }
        let (header, list) = client.list(keys.as_bytes()).await.context("cannot list the keys")?;
        let mirror = Mirror::of(&header, &self.config.prefix, list);
        if let Some(before) = &self.mirror
            && (header.cluster_id != before.cluster_id || header.revision < before.revision)
        {
            tracing::warn!(
                revision = header.revision,
                before = before.revision,
                "etcd was set back, or is another cluster's: everything was listed again"
            );
            self.missed = mirror.missing(before).into_iter().collect();
            self.mercy_ends = Some(Instant::now() + MERCY);
        }
        self.mirror = Some(mirror);
        Ok(())
    }

    /// Whether that told of a change.
    fn take_in(&mut self, told: Option<WatchResponse>) -> Result<bool> {
        let Some(told) = told else { bail!("the stream of changes ended") };
        if told.canceled {
            // What was missed can only be listed.
            let stale = told.compact_revision > 0;
            self.mirror = if stale { None } else { self.mirror.take() };
            bail!(
                "etcd ended the stream of changes: {}",
                if stale { "they are compacted" } else { &told.cancel_reason }
            );
        }
        let prefix = self.config.prefix.clone();
        let mirror = self.mirror_mut();
        if let Some(header) = &told.header {
            mirror.revision = mirror.revision.max(header.revision);
        }
        let mut changed = false;
        for event in told.events {
            let Some(key) = event.kv else { continue };
            changed = true;
            if event.kind == 1 { mirror.delete(&prefix, &key) } else { mirror.put(&prefix, &key) }
        }
        Ok(changed)
    }

    /// Brings this node's own part in order, as far as that is possible, and publishes.
    async fn settle(&mut self, client: &mut Client, identity: &str, views: &Views, timers: &mut Timers) -> Result<()> {
        let started = Instant::now();
        (timers.publish, timers.retry) = (None, None);
        if self.mercy_ends.is_some_and(|ends| ends <= Instant::now()) {
            self.mercy_ends = None;
            self.missed.clear();
        }
        if !self.left {
            let settled = self.claim(client, identity).await?;
            if !settled {
                timers.retry = Some(Instant::now() + self.backoff.spread(CONTENDED));
            }
        }
        self.publish(identity, views);
        timers.pace.spent(started, Instant::now());
        Ok(())
    }

    /// Whether nothing is left to be done but to wait.
    async fn claim(&mut self, client: &mut Client, identity: &str) -> Result<bool> {
        self.waits = None;
        for _ in 0..MAX_CLAIMS {
            let me = self.me(identity);
            let step = self.mirror().next(&me);
            match step {
                Step::Done => {
                    self.announced = Some(me.holder.record.underlay);
                    let slot = self.mirror().own_slot(identity);
                    self.hold(|held| held.slot = slot)?;
                    return Ok(true);
                }
                Step::Wait(why) => {
                    // If another machine is this node, the leases may be that one's.
                    self.hold(|held| held.leases = [0; 2])?;
                    self.waits = Some(why);
                    return Ok(true);
                }
                _ if me.leases.contains(&0) => self.lease(client).await?,
                step => self.carry_out(client, &me, step).await?,
            }
        }
        Ok(false)
    }

    /// A transaction that does what a step says, or learns what is in its way.
    async fn carry_out(&mut self, client: &mut Client, me: &Me, step: Step) -> Result<()> {
        let put = |key: String, value: Vec<u8>, lease: i64| PutRequest { key: key.into_bytes(), value, lease };
        let name = &me.holder.record.name;
        let announce = [
            put(self.keys(&format!("nodes/{name}")), serde_json::to_vec(&me.alive())?, me.leases[0]),
            put(self.keys(&format!("resting/{}", me.holder.identity)), serde_json::to_vec(name)?, me.leases[1]),
        ];
        let (mut compare, mut puts) = (Vec::new(), Vec::new());
        match step {
            Step::Found => {
                let key = self.keys("network");
                compare.push(Compare::unchanged(key.clone().into_bytes(), 0));
                puts.push(put(key, serde_json::to_vec(&me.network.shown())?, 0));
            }
            Step::Claim { slot, changed, of } => {
                let key = self.keys(&format!("slots/{slot}"));
                compare.push(Compare::unchanged(key.clone().into_bytes(), changed));
                let resting = of.map(|of| self.keys(&format!("resting/{of}")));
                compare.extend(resting.map(|resting| Compare::unchanged(resting.into_bytes(), 0)));
                puts.push(put(key, serde_json::to_vec(&me.holder)?, 0));
                puts.extend(announce);
            }
            _ => puts.extend(announce),
        }
        let look = |key: &Vec<u8>| RangeRequest { key: key.clone(), ..RangeRequest::default() };
        let failure: Vec<RequestOp> = compare.iter().map(|compare| Request::Range(look(&compare.key)).into()).collect();
        let success = puts.iter().map(|put| Request::Put(put.clone()).into()).collect();
        let looked: Vec<Vec<u8>> = compare.iter().map(|compare| compare.key.clone()).collect();
        // Also if no answer comes: then this may be what etcd says of this node.
        self.announced = Some(me.holder.record.underlay.clone());
        let answer = client.transact(TxnRequest { compare, success, failure }).await?;
        self.learn(&answer, puts, &looked);
        Ok(())
    }

    /// What a transaction wrote, or found, before the stream of changes tells of it.
    fn learn(&mut self, answer: &TxnResponse, puts: Vec<PutRequest>, looked: &[Vec<u8>]) {
        let prefix = self.config.prefix.clone();
        let revision = answer.header.as_ref().map_or(0, |header| header.revision);
        let mirror = self.mirror_mut();
        if answer.succeeded {
            for put in puts {
                let PutRequest { key, value, lease } = put;
                let key = KeyValue { key, value, lease, create_revision: revision, mod_revision: revision };
                mirror.put(&prefix, &key);
            }
            return;
        }
        let found = answer.responses.iter().map(|response| match &response.response {
            Some(Response::Range(range)) => range.kvs.as_slice(),
            _ => &[],
        });
        for (key, found) in looked.iter().zip(found) {
            match found.first() {
                Some(found) => mirror.put(&prefix, found),
                None => mirror
                    .delete(&prefix, &KeyValue { key: key.clone(), mod_revision: revision, ..KeyValue::default() }),
            }
        }
    }

    /// The leases that are missing.
    async fn lease(&mut self, client: &mut Client) -> Result<()> {
        let seconds = [self.config.lease, self.config.lease + self.config.rest];
        for (number, seconds) in seconds.into_iter().enumerate() {
            if self.held.leases[number] == 0 {
                let id = client.grant(seconds).await.context("cannot get a lease")?;
                self.hold(|held| held.leases[number] = id)?;
            }
        }
        Ok(())
    }

    /// Keeps the leases; whether one of them has ended.
    async fn keep_leases(&mut self, client: &mut Client) -> Result<bool> {
        let cluster_id = self.mirror().cluster_id;
        if self.held.cluster_id != cluster_id {
            self.hold(|held| *held = Held { cluster_id, leases: [0; 2], slot: held.slot })?;
        }
        let leases: Vec<i64> = self.held.leases.into_iter().filter(|lease| *lease != 0).collect();
        if leases.is_empty() {
            return Ok(false);
        }
        let left = client.keep_alive(&leases).await.context("cannot keep the leases")?;
        let ended: Vec<i64> = leases.iter().zip(left).filter(|(_, left)| *left <= 0).map(|(lease, _)| *lease).collect();
        if ended.is_empty() {
            return Ok(false);
        }
        tracing::warn!("this node's lease ended in etcd, which did not hear of it for too long; it gets another one");
        self.hold(|held| held.leases.iter_mut().filter(|lease| ended.contains(lease)).for_each(|lease| *lease = 0))?;
        Ok(true)
    }

    /// Gives this node's slot back.
    async fn leave(
        &mut self,
        client: &mut Client,
        identity: &str,
        views: &Views,
        answer: oneshot::Sender<Result<(), String>>,
    ) -> Result<()> {
        let left = self.give_back(client, identity).await;
        let told = match &left {
            Ok(()) => Ok(()),
            Err(error) => Err(format!("{error:#}")),
        };
        if told.is_ok() {
            tracing::info!("this node has left the cluster");
            self.publish(identity, views);
        }
        // Whoever asked may have gone.
        let _ = answer.send(told);
        left
    }

    async fn give_back(&mut self, client: &mut Client, identity: &str) -> Result<()> {
        let me = self.me(identity);
        if let Some(slot) = self.mirror().own_slot(identity) {
            let key = self.keys(&format!("slots/{slot}")).into_bytes();
            let value = serde_json::to_vec(&Holder { left: true, ..me.holder.clone() })?;
            let alive = self.keys(&format!("nodes/{}", me.holder.record.name)).into_bytes();
            let changed = self.mirror().slots[&slot].changed;
            let transaction = TxnRequest {
                compare: vec![Compare::unchanged(key.clone(), changed)],
                success: vec![
                    Request::Put(PutRequest { key, value, lease: me.leases[1] }).into(),
                    Request::Delete(DeleteRangeRequest { key: alive }).into(),
                ],
                failure: Vec::new(),
            };
            if !client.transact(transaction).await?.succeeded {
                bail!("this node's part of the network was changed meanwhile: try again");
            }
        }
        self.left = true;
        if me.leases[0] != 0 {
            client.revoke(me.leases[0]).await?;
        }
        self.hold(|held| *held = Held { cluster_id: held.cluster_id, ..Held::default() })
    }

    fn publish(&self, identity: &str, views: &Views) {
        let (mirror, network) = (self.mirror(), &self.config.network);
        let own = mirror.own_slot(identity).filter(|_| !self.left);
        let known = views.last().cluster;
        let ranges = match own {
            Some(slot) => network.ranges(slot),
            None if self.left => Vec::new(),
            // What this node had until now is still its pods'.
            None => known.as_ref().map(|cluster| cluster.ranges.clone()).unwrap_or_default(),
        };
        let missed = self.missed.iter().filter(|(slot, _)| !mirror.slots.contains_key(slot));
        let missed =
            missed.map(|(slot, holder)| Record { ranges: mirror::ranges(network, *slot), ..holder.record.clone() });
        let others: Vec<Record> = mirror.others(identity, network).into_iter().chain(missed).collect();
        let mut cluster: Cluster = admit(&self.local, ranges, others);
        cluster.problems.extend(mirror.strange().first().map(|slot| {
            format!("etcd's key {} cannot be read: repair or delete it", self.keys(&format!("slots/{slot}")))
        }));
        let trouble = self.waits.clone().or_else(|| self.left.then(|| "this node has left the cluster".to_owned()));
        let is_known = !cluster.ranges.is_empty() || known.is_some();
        views.publish(is_known.then_some(cluster), trouble);
    }

    fn me(&self, identity: &str) -> Me {
        let local = &self.local;
        let record = Record {
            name: local.node.clone(),
            underlay: local.underlay.address.to_string(),
            addresses: Vec::new(),
            ranges: Vec::new(),
            vtep_mac: Some(local.vtep_mac.to_string()),
            mode: Some(mode_name(local.mode).into()),
            vni: Some(local.vni.get()),
            port: Some(local.underlay.port),
            accepts: Some(local.underlay.accepted()),
        };
        let holder = Holder { identity: identity.to_owned(), record, left: false };
        let network = self.config.network.clone();
        Me { holder, leases: self.held.leases, had: self.held.slot, was_at: self.announced.clone(), network }
    }

    /// Changes what this node holds, on disk first.
    fn hold(&mut self, change: impl FnOnce(&mut Held)) -> Result<()> {
        let mut held = self.held;
        change(&mut held);
        if held != self.held {
            own::save(&self.folder, &held)?;
            self.held = held;
        }
        Ok(())
    }

    fn keeping(&mut self) -> Duration {
        self.backoff.spread(Duration::from_secs(self.config.lease) / 3)
    }

    fn keys(&self, rest: &str) -> String {
        format!("{}/{rest}", self.config.prefix)
    }

    fn mirror(&self) -> &Mirror {
        self.mirror.as_ref().expect("a session begins by listing the keys")
    }

    fn mirror_mut(&mut self) -> &mut Mirror {
        self.mirror.as_mut().expect("a session begins by listing the keys")
    }
}
