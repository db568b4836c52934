//! Under load nothing is overtaken: the numbers of a flow that reach a receiver never go back.

use std::time::Duration;

use weft_tests::flood::{Flood, Receiver, SMALL, Shape};
use weft_tests::lab::{Lab, Pod};
use weft_tests::machine::turn;
use weft_tests::traffic;

/// Flows of each sender: single datagrams of all sizes, and trains that leave the pod as superframes.
const SHAPES: [Shape; 8] = [
    Shape { size: SMALL, train: 1 },
    Shape { size: 200, train: 1 },
    Shape { size: 1400, train: 1 },
    Shape { size: SMALL, train: 40 },
    Shape { size: 700, train: 20 },
    Shape { size: 1400, train: 40 },
    Shape { size: 1400, train: 1 },
    Shape { size: 64, train: 1 },
];

/// Without it the TCP stream beside the flows would hardly get through.
const PAUSE: Duration = Duration::from_millis(3);

/// All senders to one pod at once, and a TCP stream beside them whose bytes are compared.
#[track_caller]
fn stays_in_order(senders: &[&Pod], to: &Pod, over6: bool) {
    let address = if over6 { to.ipv6.into() } else { to.ipv4.into() };
    let receiver = Receiver::start(&to.netns(), address);
    let floods: Vec<Flood> =
        senders.iter().map(|from| Flood::start(&from.netns(), receiver.address, &SHAPES, PAUSE)).collect();
    traffic::transfer(&senders[0].netns(), &to.netns(), address, 256 << 10);
    std::thread::sleep(Duration::from_secs(1));
    let sent: u64 = floods.into_iter().map(Flood::stop).sum();
    let seen = receiver.stop();
    let received: u64 = seen.flows.values().sum();
    println!("{address}: {received} of {sent} datagrams");
    assert_eq!((seen.overtaken, seen.repeated), (0, 0), "of {received} datagrams to {}: {seen:?}", to.name);
    // A flow of which nothing came would be in order, too.
    assert_eq!(seen.flows.len(), senders.len() * SHAPES.len(), "{seen:?}");
    assert!(received > 5_000, "only {received} of {sent} datagrams arrived at {}", to.name);
}

fn no_flow_is_reordered(workers: &str) {
    let _turn = turn();
    let lab = Lab::up(&format!("o{workers}"), 2, 3, "routed", &["--workers", workers]);
    let (near, neighbour, third, far) = (lab.pod(1, 1), lab.pod(1, 2), lab.pod(1, 3), lab.pod(2, 1));
    stays_in_order(&[near, third], neighbour, true);
    stays_in_order(&[near, neighbour], far, false);
    stays_in_order(&[near, neighbour], far, true);
    // To one pod from its own node and from another.
    stays_in_order(&[near, far], neighbour, false);
    lab.assert_conserved();
}

#[test]
fn no_flow_is_reordered_under_load_by_one_worker() {
    no_flow_is_reordered("1");
}

#[test]
fn no_flow_is_reordered_under_load_by_two_workers() {
    no_flow_is_reordered("2");
}
