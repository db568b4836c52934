//! What the core costs beside itself: with large tables beside small ones, and with two workers beside one.
//!
//! Each turn measures both, one right after the other, the other one first in every second turn; ratios are formed within
//! the turn. Shown are medians, of the ratios with the least and the greatest. An argument selects the rows whose name contains
//! it.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use weft_benches::cases::FLOWS;
use weft_benches::cpu_time::clocks_per_nanosecond;
use weft_benches::frames::{Ends, udp};
use weft_benches::node::Family::V4;
use weft_benches::node::{self, Bed, FAR, NODES, START, Template};
use weft_encap::offload::Offload;
use weft_router::RouterConfig;
use weft_router::bridge::Fdb;
use weft_router::tables::{Mode, Node, NodeId, Tables, Via};

/// Entries of a small and of a large table.
const FEW: u32 = 10;
const MANY: u32 = 1_000_000;
/// Flows that are active beside both.
const ACTIVE: u32 = 10_000;
/// Room for so many flows holds all of them, or has forgotten each when its turn comes.
const CACHED: usize = 65_536;
const UNCACHED: usize = 1024;

/// Frames of a turn: each active flow several times.
const FRAMES: u64 = 10 * ACTIVE as u64;
/// Frames of a turn for each worker.
const FRAMES_OF_WORKER: u64 = 1 << 18;
const TURNS: usize = 21;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    println!("{:<44} {:>21} {:>21}   ratio", "CPU time of a frame", "10 entries", "1,000,000 entries");
    for (name, build) in FLAT.into_iter().filter(|(name, _)| wanted(name)) {
        let (mut few, mut many) = (build(FEW), build(MANY));
        let turns = turns(|| few.turn(), || many.turn());
        print(name, &turns, |[few, many]| many / few);
    }
    println!("\n{:<44} {:>21} {:>21}   throughput", "wall time of a frame, for each worker", "1 worker", "2 workers");
    for (name, mode) in WORKERS.into_iter().filter(|(name, _)| wanted(name)) {
        let turns = turns(|| workers(1, mode), || workers(2, mode));
        print(name, &turns, |[one, two]| 2.0 * one / two);
    }
}

// Turns, and what is shown of them.

/// Nanoseconds for each frame, of both that are compared.
type Turn = [f64; 2];

fn turns(mut first: impl FnMut() -> f64, mut second: impl FnMut() -> f64) -> Vec<Turn> {
    let turn = |number| {
        if number % 2 == 0 {
            let first = first();
            [first, second()]
        } else {
            let second = second();
            [first(), second]
        }
    };
    (0..TURNS).map(turn).collect()
}

fn print(name: &str, turns: &[Turn], ratio: impl Fn(&Turn) -> f64) {
    let sorted = |values: &mut dyn Iterator<Item = f64>| {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let time = |which: usize| {
        let median = sorted(&mut turns.iter().map(|turn| turn[which]))[TURNS / 2];
        let clocks = clocks_per_nanosecond().map_or(String::new(), |rate| format!(" ({:.0} clocks)", median * rate));
        format!("{median:.1} ns{clocks}")
    };
    let ratios = sorted(&mut turns.iter().map(ratio));
    let [least, median, greatest] = [ratios[0], ratios[TURNS / 2], ratios[TURNS - 1]];
    println!("{name:<44} {:>21} {:>21}   {median:.2} ({least:.2} to {greatest:.2})", time(0), time(1));
}

// Large tables.

/// A node whose tables have so many entries, and frames of the active flows.
type Build = fn(u32) -> Active;

const FLAT: [(&str, Build); 6] = [
    ("routes, flows cached", |entries| routed(entries, CACHED)),
    ("routes, first packets", |entries| routed(entries, UNCACHED)),
    ("MACs, encapsulate, flows cached", |entries| bridged(entries, FEW, CACHED, encapsulated)),
    ("MACs, encapsulate, first packets", |entries| bridged(entries, entries.min(ACTIVE), UNCACHED, encapsulated)),
    ("MACs, decapsulate, flows cached", |entries| bridged(entries, FEW, CACHED, decapsulated)),
    ("MACs, decapsulate, first packets", |entries| bridged(entries, entries.min(ACTIVE), UNCACHED, decapsulated)),
];

struct Active {
    bed: Bed,
    templates: Vec<Template>,
}

impl Active {
    fn turn(&mut self) -> f64 {
        let templates = || self.templates.iter().cycle();
        self.bed.forward(ACTIVE.into(), 1, templates(), |work| work());
        self.bed.time(FRAMES, 1, templates()).as_nanos() as f64 / FRAMES as f64
    }
}

/// Routes to a few nodes. There is one for each that all flows could take; those beyond are more specific.
fn routed(entries: u32, flows: usize) -> Active {
    let mut tables = node::tables(Mode::Routed, 0);
    for id in 0..FEW as u16 {
        let range = format!("{}.0.0.0/8", FIRST + id as u8).parse().expect("a prefix");
        let (underlay, vtep_mac) = (node::node_underlay(NodeId(id)), node::far_mac(id.into()));
        tables.add_node(NodeId(id), Node::new(underlay, vtep_mac, vec![range]));
    }
    for number in 0..entries.saturating_sub(FEW) {
        // First all of 24 bits, then some of 26 below them.
        let (len, host) = if number < FEW << 16 { (24, 0) } else { (26, 64) };
        let range = format!("{}/{len}", far_address(number, host)).parse().expect("a prefix");
        tables.add_route(range, Via::Node(NodeId((number % FEW) as u16)));
    }
    let template = |flow: u32| {
        // Evenly over all of the ranges.
        let dst = far_address(flow % FEW + flow / FEW * 65 * FEW, 70).into();
        Template::from_pod(&udp(Ends { dst, ..node::outwards(V4) }, port(flow)), Offload::default())
    };
    Active::new(tables, Fdb::new(1, Duration::MAX, 0), flows, (0..ACTIVE).map(template))
}

/// The first byte of the ranges of the first of a few nodes.
const FIRST: u8 = 16;

/// An address of the `number`th subnet of 24 bits, of those of a few nodes in turn.
fn far_address(number: u32, host: u8) -> Ipv4Addr {
    let [_, _, high, low] = (number / FEW).to_be_bytes();
    Ipv4Addr::new(FIRST + (number % FEW) as u8, high, low, host)
}

/// Learned MACs, of which so many are in use.
fn bridged(entries: u32, used: u32, flows: usize, template: fn(u32, u32) -> Template) -> Active {
    let fdb = Fdb::new(2 * MANY as usize, Duration::MAX, 0);
    (0..entries).for_each(|number| fdb.learn(node::far_mac(number), FAR, START));
    // Those in use stand anywhere among the others.
    let number = |flow| (flow % used) * (entries / used);
    let templates = (0..ACTIVE).map(|flow| template(number(flow), flow));
    Active::new(node::tables(Mode::Bridged, NODES), fdb, flows, templates)
}

fn encapsulated(mac: u32, flow: u32) -> Template {
    Template::from_pod(&udp(node::across(mac), port(flow)), Offload::default())
}

fn decapsulated(mac: u32, flow: u32) -> Template {
    Template::from_node(&udp(node::back(mac), port(flow)), Offload::default())
}

fn port(flow: u32) -> u16 {
    1000 + flow as u16
}

impl Active {
    fn new(tables: Tables, fdb: Fdb, flows: usize, templates: impl Iterator<Item = Template>) -> Active {
        let config = RouterConfig { flows, ..RouterConfig::default() };
        Active { bed: Bed::sharing(Arc::new(tables), Arc::new(fdb), &config), templates: templates.collect() }
    }
}

// Several workers.

const WORKERS: [(&str, Mode); 2] =
    [("workers, routed, encapsulate", Mode::Routed), ("workers, bridged, decapsulate", Mode::Bridged)];

/// Each worker forwards frames of its own, by tables and learned MACs that all share. Returns nanoseconds for each frame of
/// the slowest.
fn workers(count: usize, mode: Mode) -> f64 {
    let tables = Arc::new(node::tables(mode, NODES));
    let config = RouterConfig::default();
    let fdb = Arc::new(Fdb::new(config.fdb_limit, config.fdb_age, config.seed));
    let gate = Gate { arrived: AtomicUsize::new(0), count };
    let worker = |number| {
        let bed = Bed::sharing(Arc::clone(&tables), Arc::clone(&fdb), &config);
        work(bed, &frames_of(number, mode), &gate)
    };
    let worker = &worker;
    let spent = thread::scope(|scope| {
        let threads: Vec<_> = (0..count as u32).map(|number| scope.spawn(move || worker(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a worker does not panic")).max()
    });
    spent.expect("there is a worker").as_nanos() as f64 / FRAMES_OF_WORKER as f64
}

/// Frames of one worker: no other has the same flows or MACs.
fn frames_of(worker: u32, mode: Mode) -> Vec<Template> {
    let first = worker * u32::from(FLOWS);
    match mode {
        Mode::Routed => {
            let ends = |flow| udp(node::outwards(V4), port(first + flow));
            (0..FLOWS.into()).map(|flow| Template::from_pod(&ends(flow), Offload::default())).collect()
        }
        Mode::Bridged => (0..FLOWS.into()).map(|flow| decapsulated(first + flow, flow)).collect(),
    }
}

/// Wall time that a worker is in the core. All enter it at the same time, again and again, since what surrounds it (making
/// frames) is not what is measured.
fn work(mut bed: Bed, templates: &[Template], gate: &Gate) -> Duration {
    let _leaving = Leaving(gate);
    let mut templates = templates.iter().cycle();
    bed.forward(FLOWS.into(), 1, &mut templates, |work| work());
    let (mut spent, mut round) = (Duration::ZERO, 0);
    bed.forward(FRAMES_OF_WORKER, 1, &mut templates, |work| {
        round += 1;
        gate.pass(round);
        let start = Instant::now();
        work();
        spent += start.elapsed();
    });
    spent
}

/// Lets nobody through before all have arrived. Nobody sleeps, as that would take longer than what is measured.
struct Gate {
    arrived: AtomicUsize,
    count: usize,
}

impl Gate {
    fn pass(&self, round: usize) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        while self.arrived.load(Ordering::Acquire) < round * self.count {
            std::hint::spin_loop();
        }
    }
}

/// Opens the gate for good: whoever leaves, were it by a panic, is not waited for.
struct Leaving<'a>(&'a Gate);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.arrived.store(usize::MAX / 2, Ordering::Release);
    }
}
