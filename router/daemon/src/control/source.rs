//! Where knowledge of the cluster comes from, behind one interface.
//!
//! A [`Source`] follows an engine for as long as weftd runs and publishes, whenever something changed, *what is*: whole, never a
//! difference ([`View`]). Who listens compares it with what is in force; a view that was missed is made up for by the next one. A
//! source never gives up, and what it last knew holds until it knows better: an engine that is away takes nothing from anybody.
//!
//! The static file is the source that has everything to say at once, and again on each reload: it needs nobody to follow it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::cluster::Cluster;
use super::config::Config;
use super::config::source::SourceConfig;
use super::etcd::Etcd;
use super::kubernetes::Kubernetes;

/// What a source has to say.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The cluster; `None` until it is known.
    pub cluster: Option<Arc<Cluster>>,
    /// Why it is not in step.
    pub trouble: Option<String>,
    /// The addresses that pods of this node have, as the engine knows it, in order.
    pub pods: Arc<Vec<IpAddr>>,
    /// This node's address among the nodes, as the engine knows it, if it does and the file does not say it.
    pub address: Option<IpAddr>,
}

/// Something that knows the cluster.
pub trait Source {
    /// Publishes what is, for ever, obeys orders, and says what this node is, `facts`, whenever that changes. To be run as a task.
    fn follow(self, views: Views, orders: mpsc::Receiver<Order>, facts: Facts) -> impl Future<Output = ()> + Send;
}

/// What this node is: its own configuration, as its machine has it at the moment.
pub type Facts = watch::Receiver<Arc<Config>>;

/// Waits until this node has another address than it has now: connections from the one before lead nowhere any more.
pub async fn moved(mut facts: Facts) {
    let address = facts.borrow_and_update().underlay.address;
    // Whoever knows it better has ended: then it stays.
    while facts.changed().await.is_ok() {
        if facts.borrow_and_update().underlay.address != address {
            return;
        }
    }
    std::future::pending().await
}

/// What a source can be told to do.
#[derive(Debug)]
pub enum Order {
    /// Give up what this node holds in the engine, for it goes for good.
    Leave(oneshot::Sender<Result<(), String>>),
    /// This node serves: pods can be attached.
    Serving,
    /// These ranges are not this node's any more, but pods still have addresses of them.
    Keeps(Vec<IpNet>),
}

/// Where a source publishes.
#[derive(Debug)]
pub struct Views(watch::Sender<View>);

impl Views {
    /// The source is in step and knows this; `trouble` is what it cannot do nevertheless. Without a cluster, what was known stays.
    pub fn publish(&self, cluster: Option<Cluster>, trouble: Option<String>) {
        self.0.send_if_modified(|view| {
            let changed = cluster.is_some() && view.cluster.as_deref() != cluster.as_ref();
            let said = view.trouble != trouble;
            view.trouble = trouble;
            if changed {
                view.cluster = cluster.map(Arc::new);
            }
            changed || said
        });
    }

    /// The source is not in step, and why.
    pub fn trouble(&self, why: String) {
        self.0.send_if_modified(|view| {
            let new = view.trouble.as_ref() != Some(&why);
            view.trouble = Some(why);
            new
        });
    }

    /// Pods of this node have these addresses.
    pub fn pods(&self, addresses: Vec<IpAddr>) {
        self.0.send_if_modified(|view| {
            let new = *view.pods != addresses;
            if new {
                view.pods = Arc::new(addresses);
            }
            new
        });
    }

    /// This node's address among the nodes.
    pub fn address(&self, address: Option<IpAddr>) {
        self.0.send_if_modified(|view| std::mem::replace(&mut view.address, address) != address);
    }

    /// What was published last.
    pub fn last(&self) -> View {
        self.0.borrow().clone()
    }
}

/// A source that is being followed.
pub struct Following {
    /// What it says.
    pub views: watch::Receiver<View>,
    /// What it is told.
    pub orders: mpsc::Sender<Order>,
    /// What this node is.
    pub facts: watch::Sender<Arc<Config>>,
}

/// Starts to follow what the configuration names, beginning with what was known when weftd last ran. `None` if it is the file. To be
/// called inside a tokio runtime.
pub fn follow(config: &Config, known: Option<Cluster>) -> Option<Following> {
    let view = View { cluster: known.map(Arc::new), ..View::default() };
    let (sender, views) = watch::channel(view);
    let (orders, inbox) = mpsc::channel(8);
    let (facts, heard) = watch::channel(Arc::new(config.clone()));
    match &config.source {
        SourceConfig::File => return None,
        SourceConfig::Etcd(etcd) => {
            let source = Etcd::new(config.clone(), (**etcd).clone());
            drop(tokio::spawn(source.follow(Views(sender), inbox, heard)));
        }
        SourceConfig::Kubernetes(kubernetes) => {
            let source = Kubernetes::new(config.clone(), (**kubernetes).clone());
            drop(tokio::spawn(source.follow(Views(sender), inbox, heard)));
        }
    }
    Some(Following { views, orders, facts })
}

/// How soon a change is put in force. A single one at once, and some in a row nearly so; but a node spends no more than a small part of
/// its time on others that come and go all the time: what it spends beyond that is owed, up to a limit, and while too much is owed,
/// changes wait for each other.
#[derive(Debug)]
pub struct Pace {
    last: Instant,
    owed: Duration,
    gathering: Duration,
}

impl Pace {
    /// Changes that come within this time after another was put in force wait for the end of it.
    const GATHERING: Duration = Duration::from_millis(20);
    /// The part of its time that a node spends on changes for as long as they come: one of so many.
    const PART: u32 = 20;
    /// What it may spend in a row.
    const CREDIT: Duration = Duration::from_secs(1);
    const MAX_GATHERING: Duration = Duration::from_secs(1);

    /// Nothing is owed yet.
    pub fn new(now: Instant) -> Pace {
        Pace { last: now, owed: Duration::ZERO, gathering: Pace::GATHERING }
    }

    /// When a change of now is to be put in force.
    pub fn due(&self, now: Instant) -> Instant {
        now.max(self.last + self.gathering)
    }

    /// Changes were put in force, and that took from `started` to `now`.
    pub fn spent(&mut self, started: Instant, now: Instant) {
        let cost = now.saturating_duration_since(started);
        let paid = now.saturating_duration_since(self.last) / Pace::PART;
        self.owed = self.owed.saturating_sub(paid).saturating_add(cost).min(Pace::CREDIT * 2);
        self.last = now;
        self.gathering = if self.owed <= Pace::CREDIT {
            Pace::GATHERING
        } else {
            (cost * Pace::PART).clamp(Pace::GATHERING, Pace::MAX_GATHERING)
        };
    }
}

/// How long to wait before another attempt: longer each time, up to a limit, and for each node another while, so that many do
/// not come at once.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    last: Duration,
    random: u64,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    /// A limit for those who must be back in step within five seconds.
    pub const SOON: Duration = Duration::from_secs(3);

    /// For a node that differs from others by `seed`, waiting for `last` at most.
    pub fn until(seed: u64, last: Duration) -> Backoff {
        Backoff { next: Backoff::FIRST, last, random: seed | 1 }
    }

    /// An attempt was a success.
    pub fn reset(&mut self) {
        self.next = Backoff::FIRST;
    }

    /// How long to wait: between half of the step and the whole.
    pub fn step(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.last);
        self.spread(whole)
    }

    /// Something between half of `whole` and all of it.
    pub fn spread(&mut self, whole: Duration) -> Duration {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        whole / 2 + (whole / 2).mul_f64((self.random >> 11) as f64 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_grows_to_its_limit_and_is_spread() {
        let mut backoff = Backoff::until(7, Backoff::SOON);
        let steps: Vec<Duration> = (0..12).map(|_| backoff.step()).collect();
        assert!(steps[0] >= Backoff::FIRST / 2 && steps[0] <= Backoff::FIRST);
        assert!(steps[6..].iter().all(|step| *step >= Backoff::SOON / 2 && *step <= Backoff::SOON), "{steps:?}");
        assert!(steps[6..].windows(2).any(|two| two[0].abs_diff(two[1]) > Duration::from_millis(50)), "{steps:?}");
        backoff.reset();
        assert!(backoff.step() <= Backoff::FIRST);
    }

    #[test]
    fn changes_in_a_row_are_soon_in_force_and_endless_ones_cost_a_small_part_of_the_time() {
        let (cost, start) = (Duration::from_millis(13), Instant::now());
        let mut pace = Pace::new(start);
        let (mut now, mut waits) = (start + Duration::from_secs(1), Vec::new());
        for _ in 0..5000 {
            // The next change is there as soon as the last is in force.
            let due = pace.due(now);
            waits.push(due - now);
            now = due + cost;
            pace.spent(due, now);
        }
        assert!(waits[0].is_zero() && waits[..50].iter().all(|wait| *wait <= Pace::GATHERING), "{:?}", &waits[..50]);
        let share = (cost * 5000).as_secs_f64() / (now - start).as_secs_f64();
        assert!(share < 0.06, "{share}");
        assert!(waits.iter().all(|wait| *wait <= Pace::MAX_GATHERING));
        // After a rest they are soon in force again.
        now += Duration::from_secs(60);
        pace.spent(now, now);
        assert_eq!(pace.due(now), now + Pace::GATHERING);
    }

    #[tokio::test]
    async fn another_address_is_heard_of_and_another_mtu_is_not_one() {
        let text = "node = \"n1\"\nmode = \"routed\"\nranges = [\"10.244.1.0/24\"]\n[underlay]\naddress = \"10.200.0.1\"\n";
        let config = Config::read(text, &Default::default()).unwrap().config;
        let (sender, facts) = watch::channel(Arc::new(config.clone()));
        let heard = tokio::spawn(moved(facts));
        sender.send(Arc::new(Config { mtu: 1300, ..config.clone() })).unwrap();
        tokio::task::yield_now().await;
        assert!(!heard.is_finished());
        let mut other = config;
        other.underlay.address = "10.200.0.9".parse().unwrap();
        sender.send(Arc::new(other)).unwrap();
        heard.await.unwrap();
    }

    #[test]
    fn only_what_is_new_wakes_the_listener() {
        let (sender, mut views) = watch::channel(View::default());
        let source = Views(sender);
        source.publish(Some(Cluster::default()), None);
        assert!(views.has_changed().unwrap());
        views.mark_unchanged();
        source.publish(Some(Cluster::default()), None);
        assert!(!views.has_changed().unwrap());
        source.trouble("away".into());
        assert!(views.has_changed().unwrap());
        views.mark_unchanged();
        source.trouble("away".into());
        assert!(!views.has_changed().unwrap());
        assert!(source.last().cluster.is_some(), "what was known stays");
        source.publish(Some(Cluster::default()), None);
        assert!(views.borrow_and_update().trouble.is_none());
    }
}
