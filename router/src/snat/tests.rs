use std::collections::{HashMap, HashSet};

use crate::snat::*;

const START: Instant = Instant(1_000_000_000_000);
const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 5));

fn later(seconds: u64) -> Instant {
    START + Duration::from_secs(seconds)
}

fn pod(number: u32) -> IpAddr {
    let [_, _, c, d] = number.to_be_bytes();
    [10, 244, c, d].into()
}

fn server(number: u8) -> IpAddr {
    [203, 0, 113, number].into()
}

fn snat(ports: u16) -> Snat {
    Snat::new(Limits { first: 50_000, last: 50_000 + ports - 1, ..Limits::default() }, 7)
}

fn key(protocol: u8, from: (IpAddr, u16), to: (IpAddr, u16)) -> FlowKey {
    FlowKey::between(protocol, from, to)
}

/// As which port a flow leaves, and whether the answer to that finds it.
fn open(snat: &Snat, flow: &FlowKey, now: Instant) -> Result<u16, DropReason> {
    let leaving = snat.open(flow, NODE, now)?;
    assert_eq!((leaving.address, leaving.side), (NODE, Side::Source));
    let (_, far) = flow.ports();
    let far = if is_ping(flow.protocol()) { leaving.port } else { far };
    let entering = snat.entering(&key(flow.protocol(), (NODE, leaving.port), (flow.dst(), far))).unwrap();
    assert_eq!((entering.address, entering.port), (flow.src(), flow.ports().0), "the answer is the pod's");
    assert_eq!(entering.handle, leaving.handle);
    Ok(leaving.port)
}

fn establish(snat: &Snat, flow: &FlowKey, now: Instant) {
    let handle = snat.leaving(flow).unwrap().handle;
    for (side, flags) in [(Side::Source, 2), (Side::Destination, 0x12), (Side::Source, 0x10)] {
        snat.pass(handle, side, flags, now).unwrap();
    }
}

#[test]
fn as_many_tcp_connections_to_one_server_as_there_are_ports() {
    let snat = snat(200);
    let flow = |port| key(ip::TCP, (pod(1), port), (server(1), 443));
    let ports: HashSet<u16> = (1..=200).map(|port| open(&snat, &flow(port), START).unwrap()).collect();
    assert_eq!(ports.len(), 200);
    assert_eq!(open(&snat, &flow(201), START), Err(DropReason::MasqueradePorts));
    assert_eq!(open(&snat, &flow(7), START), Ok(snat.leaving(&flow(7)).unwrap().port), "what is known stays");
    // Another port of the same server, and another server, are other destinations.
    assert!(open(&snat, &key(ip::TCP, (pod(1), 201), (server(1), 80)), START).is_ok());
    assert!(open(&snat, &key(ip::TCP, (pod(1), 201), (server(2), 443)), START).is_ok());
    assert_eq!((snat.usage().sessions, snat.usage().fullest, snat.usage().ports), (202, 200, 200));
}

#[test]
fn sixty_thousand_flows_of_twenty_pods_fit_ten_thousand_ports() {
    let snat = snat(10_000);
    let mut seen = HashSet::new();
    for flow in 0..60_000_u32 {
        let from = (pod(1 + flow % 20), (10_000 + flow / 20) as u16);
        let to = (server(1), 8000 + (flow % 16) as u16);
        let port = open(&snat, &key(ip::TCP, from, to), START).unwrap();
        assert!(seen.insert((port, to.1)), "no two have the same port towards the same server");
    }
    let usage = snat.usage();
    assert_eq!((usage.sessions, usage.pods, usage.taken_back), (60_000, 20, 0));
    assert_eq!(usage.fullest, 3750);
}

#[test]
fn who_takes_all_ports_gives_back_what_others_ask_for() {
    let snat = snat(1000);
    let flow = |number, port| key(ip::TCP, (pod(number), port), (server(1), 443));
    for port in 1..=1000 {
        open(&snat, &flow(1, port), START).unwrap();
        if port <= 400 {
            establish(&snat, &flow(1, port), START);
        }
    }
    assert_eq!(open(&snat, &flow(1, 1001), later(1)), Err(DropReason::MasqueradePorts));
    let others = (1..=400).filter(|port| open(&snat, &flow(2, *port), later(1)).is_ok()).count();
    assert_eq!(others, 400);
    let kept = (1..=400).filter(|port| snat.leaving(&flow(1, *port)).is_some()).count();
    assert_eq!(kept, 400, "what nobody answered goes first");
    // Nobody is an abuser who has no more than half.
    let more = (401..=1000).filter(|port| open(&snat, &flow(2, *port), later(2)).is_ok()).count();
    assert_eq!(more, 100);
    let half = (1..=1000).filter(|port| snat.leaving(&flow(1, *port)).is_some()).count();
    assert_eq!(half, 500);
    assert_eq!(open(&snat, &flow(3, 1), later(2)), Err(DropReason::MasqueradePorts));
}

#[test]
fn a_udp_socket_has_one_port_for_all_destinations() {
    let snat = snat(100);
    let flow = |port, to| key(ip::UDP, (pod(1), port), to);
    let port = open(&snat, &flow(5000, (server(1), 53)), START).unwrap();
    for number in 2..=200 {
        assert_eq!(open(&snat, &flow(5000, (server(number), 1000 + u16::from(number))), START), Ok(port));
    }
    assert_ne!(open(&snat, &flow(5001, (server(1), 53)), START), Ok(port));
    // Who was not spoken to is not let in.
    assert!(snat.entering(&key(ip::UDP, (NODE, port), (server(1), 54))).is_none());
    assert!(snat.entering(&key(ip::UDP, (NODE, port), (server(201), 53))).is_none());
    assert_eq!(snat.usage().fullest, 2);
    for socket in 5002..5100 {
        open(&snat, &flow(socket, (server(1), 53)), START).unwrap();
    }
    assert_eq!(open(&snat, &flow(5100, (server(1), 53)), START), Err(DropReason::MasqueradePorts));
    assert_eq!(open(&snat, &flow(5000, (server(9), 99)), START), Ok(port), "a socket that has one needs none");
    assert!(open(&snat, &key(ip::UDP, (pod(2), 1), (server(1), 53)), START).is_ok(), "the abuser's are taken back");
}

#[test]
fn pings_are_told_apart_by_their_identifiers() {
    let snat = snat(100);
    let flow = |number, id| key(ip::ICMP, (pod(number), id), (server(1), id));
    let first = open(&snat, &flow(1, 7), START).unwrap();
    assert_ne!(open(&snat, &flow(2, 7), START), Ok(first));
    assert_eq!(open(&snat, &flow(1, 7), START), Ok(first));
    assert_eq!(snat.open(&key(132, (pod(1), 1), (server(1), 1)), NODE, START), Err(DropReason::NotMasqueraded));
}

#[test]
fn sessions_end_in_their_protocols_time() {
    for (protocol, answered, seconds) in [
        (ip::TCP, false, 240),
        (ip::TCP, true, 7440),
        (ip::UDP, false, 120),
        (ip::UDP, true, 300),
        (ip::ICMP, false, 60),
    ] {
        let snat = snat(100);
        let flow = key(protocol, (pod(1), 9), (server(1), 9));
        open(&snat, &flow, START).unwrap();
        if answered {
            establish(&snat, &flow, START);
        }
        let sweep = |from: u64| {
            (0..SWEEP_PARTS as u64).for_each(|part| {
                snat.tick(later(from + part * 4));
            })
        };
        sweep(seconds - 16);
        assert!(snat.leaving(&flow).is_some(), "{protocol} {answered}");
        sweep(seconds + 1);
        assert!(snat.leaving(&flow).is_none(), "{protocol} {answered}");
        assert_eq!(snat.usage(), SnatUse { limit: 131_072, ports: 100, ..SnatUse::default() });
        assert_eq!(snat.tick(later(10_000)), None);
    }
}

#[test]
fn what_is_over_gives_its_port_to_who_needs_it() {
    let snat = snat(10);
    let flow = |port| key(ip::TCP, (pod(1), port), (server(1), 443));
    for port in 1..=10 {
        open(&snat, &flow(port), START).unwrap();
        establish(&snat, &flow(port), START);
    }
    assert_eq!(open(&snat, &flow(11), START), Err(DropReason::MasqueradePorts));
    let handle = snat.leaving(&flow(3)).unwrap().handle;
    snat.pass(handle, Side::Source, tcp_fin(), later(1));
    assert_eq!(open(&snat, &flow(11), later(2)), Err(DropReason::MasqueradePorts), "half closed");
    snat.pass(handle, Side::Destination, tcp_fin(), later(3));
    assert!(open(&snat, &flow(11), later(4)).is_ok());
    assert_eq!(snat.pass(handle, Side::Source, 0x10, later(5)), None, "a stale handle finds nothing");
}

fn tcp_fin() -> u8 {
    0x11
}

#[test]
fn a_reset_that_was_a_lie_ends_nothing() {
    let snat = snat(10);
    let flow = key(ip::TCP, (pod(1), 1), (server(1), 443));
    open(&snat, &flow, START).unwrap();
    establish(&snat, &flow, START);
    let handle = snat.leaving(&flow).unwrap().handle;
    snat.pass(handle, Side::Destination, 4, later(1));
    assert!(snat.sessions(later(1))[0].over);
    snat.pass(handle, Side::Destination, 0x10, later(2));
    assert!(!snat.sessions(later(2))[0].over);
}

#[test]
fn a_pod_and_the_node_have_so_many_sessions_and_no_more() {
    let limits = Limits { sessions: 50, per_pod: 20, ..Limits::default() };
    let snat = Snat::new(limits, 1);
    let flow = |number, port| key(ip::UDP, (pod(number), port), (server(1), 53));
    for number in 1..=2 {
        for port in 1..=20 {
            open(&snat, &flow(number, port), START).unwrap();
        }
        assert_eq!(open(&snat, &flow(number, 21), START), Err(DropReason::MasqueradeQuota));
    }
    for port in 1..=10 {
        open(&snat, &flow(3, port), START).unwrap();
    }
    assert_eq!(open(&snat, &flow(3, 11), START), Err(DropReason::MasqueradeFull));
    snat.forget(|address| address == NODE);
    assert_eq!(snat.usage().sessions, 0);
    assert!(open(&snat, &flow(3, 11), START).is_ok());
}

/// A small reference: nobody's answers ever arrive at another one.
#[test]
fn no_two_conversations_look_the_same_outside() {
    let snat = snat(64);
    let mut state = 0x1234_5678_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut outside: HashMap<FlowKey, FlowKey> = HashMap::new();
    for step in 0..20_000_u64 {
        let now = START + Duration::from_millis(step * 50);
        let protocol = [ip::TCP, ip::UDP, ip::ICMP][random(3) as usize];
        let from = (pod(1 + random(5) as u32), 100 + random(40) as u16);
        let to = (server(1 + random(3) as u8), 1 + random(2) as u16);
        let to = if protocol == ip::ICMP { (to.0, from.1) } else { to };
        let inside = key(protocol, from, to);
        if let Ok(leaving) = snat.open(&inside, NODE, now) {
            let far = if protocol == ip::ICMP { leaving.port } else { to.1 };
            let key = key(protocol, (NODE, leaving.port), (to.0, far));
            if let Some(other) = outside.insert(key, inside)
                && other != inside
            {
                assert_ne!(
                    snat.leaving(&other).map(|known| known.port),
                    Some(leaving.port),
                    "{other:?} and {inside:?}"
                );
            }
            let flags = [2, 0x10, 0x11, 4][random(4) as usize];
            snat.pass(leaving.handle, if random(2) == 0 { Side::Source } else { Side::Destination }, flags, now);
        }
        if random(50) == 0 {
            snat.tick(now);
        }
    }
    let sessions = snat.sessions(START);
    let distinct: HashSet<_> =
        sessions.iter().map(|session| (session.protocol, session.outside, session.remote)).collect();
    assert_eq!(distinct.len(), sessions.len());
    assert_eq!(snat.usage().sessions, sessions.len());
}
