//! What a running weftd knows, as tables or as JSON.
//!
//! Each view is one request and one table. With `--json` the protocol's own structures are printed, without
//! selection or order of ours, so that a program sees what the daemon said. In the tables, what needs attention is
//! marked and comes first.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde::de::DeserializeOwned;
use weft_api::{
    Bandwidth, Client, Counters, DropInfo, Empty, FdbInfo, FlowInfo, FreeBuffers, HostPortInfo, LeaseInfo,
    MasqueradeInfo, NatInfo, NeighbourInfo, NodeInfo, PortInfo, Request, RouteInfo, Status, WayInfo,
};

use crate::output::{self, Style, plain};
use crate::table::Table;

/// How long the daemon has to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What can be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The daemon as a whole.
    Status,
    /// Its ports.
    Ports,
    /// Its routes.
    Routes,
    /// Its forwarding database.
    Fdb,
    /// The neighbours it answers for.
    Neigh,
    /// Its flow cache.
    Flows,
    /// What leaves the cluster in the node's name.
    Nat,
    /// Its leases.
    Leases,
    /// Its drop counters.
    Drops,
    /// The nodes it knows.
    Nodes,
}

/// Prints a view. True if the daemon reported problems.
pub fn show(view: View, socket: &Path, json: bool) -> Result<bool> {
    let style = Style::stdout();
    match view {
        View::Status => {
            let answer: Status = ask(socket, &Request::Status)?;
            if json {
                output::print_json(&answer)?;
            } else {
                output::print(&status(&answer, style))?;
            }
            return Ok(!answer.problems.is_empty());
        }
        View::Ports => show_list(socket, &Request::Ports, json, |list| ports(list, style)),
        View::Routes => show_list(socket, &Request::Routes, json, |list| routes(list, style)),
        View::Fdb => show_list(socket, &Request::Fdb, json, |list| fdb(list, style)),
        View::Neigh => show_list(socket, &Request::Neigh, json, |list| neigh(list, style)),
        View::Flows => show_list(socket, &Request::Flows, json, |list| flows(list, style)),
        View::Nat => show_list(socket, &Request::Nat, json, |list| nat(list, style)),
        View::Leases => show_list(socket, &Request::Leases, json, |list| leases(list, style)),
        View::Drops => show_list(socket, &Request::Drops, json, |list| drops(list, style)),
        View::Nodes => show_list(socket, &Request::Nodes, json, |list| nodes(list, style)),
    }?;
    Ok(false)
}

/// Gives the node's ranges back.
pub fn leave(socket: &Path) -> Result<()> {
    let Empty {} = ask(socket, &Request::Leave)?;
    output::progress(
        "this node's ranges are given back; the node is no part of the cluster until weftd is started again",
    );
    Ok(())
}

/// Makes the daemon read its configuration again.
pub fn reload(socket: &Path) -> Result<()> {
    let Empty {} = ask(socket, &Request::Reload)?;
    output::progress("the new configuration is in force");
    Ok(())
}

/// Asks the daemon at `socket` one question.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> Result<T> {
    Ok(Client::connect(socket, PATIENCE)?.call(request)?)
}

fn show_list<T: DeserializeOwned + Serialize>(
    socket: &Path,
    request: &Request,
    json: bool,
    render: impl FnOnce(Vec<T>) -> String,
) -> Result<()> {
    let answer: Vec<T> = ask(socket, request)?;
    if json { output::print_json(&answer) } else { output::print(&render(answer)) }
}

/// What other nodes are sent by. `weft nodes` has those that are sent something else.
fn tunnel(status: &Status) -> String {
    let format = if status.encapsulation.is_empty() { "vxlan" } else { &status.encapsulation };
    format!("{format}, VNI {}, VTEP MAC {}", status.vni, status.vtep_mac)
}

fn status(status: &Status, style: Style) -> String {
    let mut text = String::new();
    if status.problems.is_empty() {
        text.push_str(&style.good("all is well"));
        text.push('\n');
    }
    for problem in &status.problems {
        text.push_str(&style.bad(&format!("PROBLEM  {}", plain(problem))));
        text.push('\n');
    }
    let unaccounted = imbalance(&status.counters);
    if unaccounted != 0 {
        text.push_str(&format!("note     {unaccounted} frames are on their way, or unaccounted for\n"));
    }
    text.push('\n');
    let counters = &status.counters;
    let lines = [
        ("node", format!("{} ({} mode)", status.node, status.mode)),
        ("weftd", format!("version {}, pid {}, up {}", status.version, status.pid, duration(status.uptime))),
        ("workers", status.workers.to_string()),
        ("pods", format!("{} attached, MTU {}, ports: {}", status.pods, status.mtu, status.port)),
        ("peers", format!("{}{}", status.peers, source(status))),
        ("ranges", status.ranges.join(" ")),
        ("gateway", format!("{} at {}", addresses(&status.gateways), status.gateway_mac)),
        ("itself", host_port(status.host_port.as_ref())),
        ("leaving", masquerade(status.masquerade.as_ref())),
        ("underlay", format!("{}, MTU {}, {}", status.underlay, status.underlay_mtu, status.underlay_kind)),
        ("tunnel", tunnel(status)),
        ("tables", format!("epoch {}", status.epoch)),
        ("buffers", status.free.map_or_else(String::new, |free| buffers(free, status.workers))),
        ("in", format!("{} frames, {}", counters.received, bytes(counters.received_bytes))),
        ("merged", format!("{} of them became part of a superframe", counters.merged)),
        ("out", format!("{} frames, {}", counters.sent, bytes(counters.sent_bytes))),
        ("dropped", format!("{} frames (`weft drops` says why)", counters.dropped)),
    ];
    for (name, value) in lines.into_iter().filter(|(name, value)| *name != "leaving" || !value.is_empty()) {
        text.push_str(&format!("{name:<9}{}\n", plain(&value)));
    }
    for range in &status.leases {
        let full = range.leased >= range.size;
        // A number that nobody will ever count to says nothing.
        let of = if range.size > u64::from(u32::MAX) { String::new() } else { format!(" of {}", range.size) };
        let line = format!("{:<9}{}{of} in {}", "leases", range.leased, plain(&range.range));
        text.push_str(&if full { style.bad(&format!("{line}: full")) } else { line });
        text.push('\n');
    }
    text
}

fn buffers(free: FreeBuffers, workers: usize) -> String {
    let huge = match free.huge_pages {
        0 => String::new(),
        count if count == workers => "; the small ones are in huge pages".into(),
        1 => "; the small ones of 1 worker are in huge pages".into(),
        count => format!("; the small ones of {count} workers are in huge pages"),
    };
    format!("{} small and {} large ones are free{huge}", free.chunks, free.supers)
}

fn source(status: &Status) -> String {
    if status.source.is_empty() { String::new() } else { format!(", known from: {}", status.source) }
}

/// Frames that came in or were made and have not been accounted for.
pub fn imbalance(counters: &Counters) -> i128 {
    let wide = |value: u64| i128::from(value);
    wide(counters.received) + wide(counters.created)
        - wide(counters.sent)
        - wide(counters.dropped)
        - wide(counters.merged)
}

fn ports(mut list: Vec<PortInfo>, style: Style) -> String {
    list.sort_by_key(|port| (port.state == "up", port.id));
    let mut table = Table::new(&[
        ">port",
        "role",
        "kind",
        "state",
        ">worker",
        "name",
        "mac",
        "addresses",
        ">in",
        ">bytes in",
        ">merged",
        ">out",
        ">bytes out",
        ">dropped",
        "limit to / from",
        "offloads",
    ]);
    for port in list {
        let name = if port.ifname.is_empty() { port.name } else { format!("{}/{}", port.name, port.ifname) };
        let up = port.state == "up";
        let cells = vec![
            port.id.to_string(),
            port.role,
            port.kind,
            port.state,
            port.worker.map_or("all".to_owned(), |worker| worker.to_string()),
            name,
            port.mac,
            addresses(&port.addresses),
            port.counters.received.to_string(),
            bytes(port.counters.received_bytes),
            port.counters.merged.to_string(),
            port.out.to_string(),
            bytes(port.out_bytes),
            port.counters.dropped.to_string(),
            port.bandwidth.as_ref().map(limits).unwrap_or_default(),
            port.offloads,
        ];
        table.push(cells, !up);
    }
    table.render(style, "no ports")
}

fn routes(list: Vec<RouteInfo>, style: Style) -> String {
    let mut table = Table::new(&["destination", "via", "underlay"]);
    for route in list {
        let underlay = route.underlay.map(|address| address.to_string()).unwrap_or_default();
        table.row([route.destination, route.via, underlay]);
    }
    table.render(style, "no routes")
}

fn nat(list: Vec<NatInfo>, style: Style) -> String {
    let mut table = Table::new(&["protocol", "pod", "as", "to", "state", ">age", ">last seen"]);
    for session in list {
        table.row([
            session.protocol,
            endpoint(session.inside, session.inside_port),
            endpoint(session.outside, session.outside_port),
            endpoint(session.remote, session.remote_port),
            session.state,
            duration(session.age),
            duration(session.idle),
        ]);
    }
    table.render(style, "nothing leaves the cluster in this node's name")
}

fn masquerade(info: Option<&MasqueradeInfo>) -> String {
    let Some(info) = info else { return String::new() };
    let (first, last) = info.ports;
    let ways = if info.ways.is_empty() { "nowhere".into() } else { info.ways.join(", ") };
    let back = match info.taken_back {
        0 => String::new(),
        count => format!(", {count} taken back"),
    };
    format!(
        "{ways}, ports {first}-{last}, at most {} taken; {} of {} conversations, of {} pods{back}",
        info.fullest, info.sessions, info.limit, info.pods
    )
}

fn fdb(list: Vec<FdbInfo>, style: Style) -> String {
    let mut table = Table::new(&["mac", "at", "kind", ">last seen"]);
    for entry in list {
        let seen = if entry.kind == "static" { String::new() } else { duration(entry.age) };
        table.row([entry.mac, entry.at, entry.kind, seen]);
    }
    table.render(style, "no entries")
}

fn neigh(list: Vec<NeighbourInfo>, style: Style) -> String {
    let mut table = Table::new(&["address", "mac", "at"]);
    for neighbour in list {
        table.row([neighbour.address.to_string(), neighbour.mac, neighbour.at]);
    }
    table.render(style, "no neighbours")
}

fn flows(mut list: Vec<FlowInfo>, style: Style) -> String {
    list.sort_by_key(|flow| std::cmp::Reverse(flow.bytes));
    let mut table = Table::new(&["protocol", "source", "destination", "from", "to", ">frames", ">bytes", ">last seen"]);
    for flow in list {
        table.row([
            flow.protocol,
            endpoint(flow.source, flow.source_port),
            endpoint(flow.destination, flow.destination_port),
            flow.from,
            flow.to,
            flow.frames.to_string(),
            bytes(flow.bytes),
            duration(flow.age),
        ]);
    }
    table.render(style, "no flows")
}

fn leases(list: Vec<LeaseInfo>, style: Style) -> String {
    let mut table = Table::new(&["address", "network", "container", "interface", "attached"]);
    for lease in list {
        let attached = if lease.attached { "yes" } else { "no" };
        let key = lease.key;
        table.row([lease.address.to_string(), key.network, key.container, key.ifname, attached.to_owned()]);
    }
    table.render(style, "no leases")
}

fn drops(mut list: Vec<DropInfo>, style: Style) -> String {
    list.retain(|info| info.count > 0);
    list.sort_by(|a, b| (b.is_loss, b.count).cmp(&(a.is_loss, a.count)).then_with(|| a.port.cmp(&b.port)));
    let mut table = Table::new(&["reason", ">count", "", "entered by", "meaning"]);
    for info in list {
        let kind = if info.is_loss { "LOST" } else { "fine" };
        let entered = format!("port {} {}", info.port, info.name);
        let cells = vec![info.reason, info.count.to_string(), kind.to_owned(), entered, info.meaning];
        table.push(cells, info.is_loss);
    }
    table.render(style, "no frame was dropped")
}

fn nodes(list: Vec<NodeInfo>, style: Style) -> String {
    let mut table = Table::new(&[
        "name",
        "underlay",
        "ranges",
        "vtep mac",
        ">sent",
        ">received",
        ">last seen",
        ">carries",
        ">round trip",
        ">lost",
        "state",
        "encapsulation",
        "by",
    ]);
    for node in list {
        let name = if node.local { format!("{} (this node)", node.name) } else { node.name };
        let seen = match node.last_seen {
            Some(age) => duration(age),
            None if node.local => String::new(),
            None => "never".to_owned(),
        };
        let silent = !node.local && node.last_seen.is_none() && node.sent > 0;
        let asked = node.asked.as_ref();
        let is_bad = asked.is_some_and(|way| way.state == "away" || way.measured.is_some_and(|mtu| mtu < way.mtu));
        let cells = vec![
            name,
            node.underlay.to_string(),
            node.ranges.join(" "),
            node.vtep_mac,
            node.sent.to_string(),
            node.received.to_string(),
            seen,
            asked.map(carries).unwrap_or_default(),
            asked.and_then(round_trip).unwrap_or_default(),
            asked.and_then(|way| way.loss).map(|loss| format!("{:.0} %", loss * 100.0)).unwrap_or_default(),
            asked.map(state).unwrap_or_default(),
            node.encapsulation,
            node.way,
        ];
        table.push(cells, silent || is_bad);
    }
    table.render(style, "no nodes")
}

/// What the way to a node carries, and what pods use if that is more.
fn carries(way: &WayInfo) -> String {
    match way.measured {
        Some(mtu) if mtu < way.mtu => format!("{mtu} of {}", way.mtu),
        Some(mtu) => mtu.to_string(),
        None => format!("{}?", way.mtu),
    }
}

/// The median of the last round trips, and the last one.
fn round_trip(way: &WayInfo) -> Option<String> {
    Some(format!("{:.1} / {:.1} ms", way.rtt_median? / 1000.0, way.rtt? / 1000.0))
}

fn state(way: &WayInfo) -> String {
    match way.state.as_str() {
        "unknown" => way.state.clone(),
        state => format!("{state} for {}", duration(way.since)),
    }
}

/// Losses by reason, summed over ports.
pub fn losses(list: &[DropInfo]) -> BTreeMap<&str, u64> {
    let mut sums = BTreeMap::new();
    for info in list.iter().filter(|info| info.is_loss && info.count > 0) {
        *sums.entry(info.reason.as_str()).or_insert(0) += info.count;
    }
    sums
}

fn addresses(list: &[IpAddr]) -> String {
    list.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
}

/// Rates towards and from a pod.
fn limits(bandwidth: &Bandwidth) -> String {
    let rate = |rate: u64| match rate {
        0 => "-".to_owned(),
        rate if rate % 1_000_000_000 == 0 => format!("{} Gb/s", rate / 1_000_000_000),
        rate if rate % 1_000_000 == 0 => format!("{} Mb/s", rate / 1_000_000),
        rate if rate % 1000 == 0 => format!("{} kb/s", rate / 1000),
        rate => format!("{rate} b/s"),
    };
    format!("{} / {}", rate(bandwidth.ingress_rate), rate(bandwidth.egress_rate))
}

fn host_port(info: Option<&HostPortInfo>) -> String {
    let Some(info) = info else { return "no interface in the pod network".to_owned() };
    let HostPortInfo { ifname, mac, routes, protocol, .. } = info;
    format!("{} on {ifname} at {mac}, {routes} kernel routes (protocol {protocol})", addresses(&info.addresses))
}

fn endpoint(address: IpAddr, port: u16) -> String {
    if port == 0 { address.to_string() } else { std::net::SocketAddr::new(address, port).to_string() }
}

/// Seconds for people: `0.4s`, `12s`, `3m05s`, `2h07m`, `4d03h`.
fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".to_owned();
    }
    if seconds < 10.0 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole / 3600 % 24),
    }
}

/// Bytes for people, in powers of 1024.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let places = usize::from(value.fract() != 0.0);
    format!("{value:.places$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Status {
        Status {
            problems: vec![],
            node: "n1".into(),
            version: "0.1.0".into(),
            pid: 7,
            uptime: 187.0,
            mode: "routed".into(),
            ranges: vec!["10.244.1.0/24".into()],
            gateways: vec!["10.244.1.1".parse().unwrap()],
            gateway_mac: "02:00:00:00:00:01".into(),
            vtep_mac: "02:00:00:00:00:02".into(),
            underlay: "10.200.0.1:8472".into(),
            underlay_kind: "udp".into(),
            workers: 2,
            port: "tap".into(),
            source: "file".into(),
            host_port: None,
            masquerade: None,
            encapsulation: "gre".into(),
            vni: 1,
            mtu: 1450,
            underlay_mtu: 1500,
            pods: 2,
            peers: 1,
            leases: vec![weft_api::RangeUse {
                range: "10.244.1.0/24".into(),
                leased: 2,
                resting: 0,
                reserved: 0,
                size: 253,
            }],
            epoch: 3,
            counters: Counters { received: 10, sent: 8, dropped: 2, ..Counters::default() },
            free: None,
        }
    }

    #[test]
    fn huge_pages_are_said_if_any_worker_has_some() {
        let shown = |huge_pages| buffers(FreeBuffers { chunks: 7, supers: 2, huge_pages }, 2);
        assert_eq!(shown(0), "7 small and 2 large ones are free");
        assert_eq!(shown(1), "7 small and 2 large ones are free; the small ones of 1 worker are in huge pages");
        assert_eq!(shown(2), "7 small and 2 large ones are free; the small ones are in huge pages");
    }

    fn dropped(reason: &str, is_loss: bool, count: u64) -> DropInfo {
        DropInfo { port: 1, name: "p".into(), reason: reason.into(), meaning: "m".into(), is_loss, count }
    }

    #[test]
    fn status_leads_with_what_is_wrong() {
        let mut answer = sample();
        assert!(status(&answer, Style::PLAIN).starts_with("all is well\n"));
        answer.problems = vec!["peer n2 is silent; is its weftd running?".into()];
        let text = status(&answer, Style::PLAIN);
        assert!(text.starts_with("PROBLEM  peer n2 is silent"), "{text}");
        assert!(!text.contains("all is well"));
        assert!(text.contains("weftd    version 0.1.0, pid 7, up 3m07s\nworkers  2\n"), "{text}");
    }

    #[test]
    fn status_marks_a_full_range_and_frames_unaccounted_for() {
        let mut answer = sample();
        assert!(!status(&answer, Style::PLAIN).contains("unaccounted"));
        answer.counters.received = 11;
        answer.leases[0].leased = 253;
        let text = status(&answer, Style::PLAIN);
        assert!(text.contains("1 frames are on their way"), "{text}");
        assert!(text.contains("253 of 253 in 10.244.1.0/24: full"), "{text}");
    }

    #[test]
    fn drops_show_losses_first_and_leave_out_zeros() {
        let text = drops(
            vec![dropped("Answered", false, 900), dropped("NoRoute", true, 1), dropped("TooShort", true, 0)],
            Style::PLAIN,
        );
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("NoRoute"), "{text}");
        assert!(lines[2].starts_with("Answered"), "{text}");
        assert_eq!(lines.len(), 3);
        assert_eq!(drops(vec![], Style::PLAIN), "no frame was dropped\n");
    }

    #[test]
    fn losses_are_summed_by_reason() {
        let list = [dropped("NoRoute", true, 1), dropped("NoRoute", true, 2), dropped("Answered", false, 5)];
        assert_eq!(losses(&list).into_iter().collect::<Vec<_>>(), [("NoRoute", 3)]);
    }

    #[test]
    fn a_port_that_is_not_up_comes_first() {
        let port = |id, state: &str| PortInfo {
            id,
            role: "pod".into(),
            kind: "tap".into(),
            state: state.into(),
            name: "c".into(),
            ifname: "eth0".into(),
            mac: String::new(),
            addresses: vec![],
            bandwidth: None,
            offloads: String::new(),
            worker: Some(0),
            counters: Counters::default(),
            out: 0,
            out_bytes: 0,
            drops: BTreeMap::new(),
        };
        let text = ports(vec![port(1, "up"), port(2, "gone")], Style::PLAIN);
        assert!(text.lines().nth(1).unwrap().contains("gone"), "{text}");
    }

    #[test]
    fn frames_that_became_part_of_a_superframe_are_shown() {
        let mut answer = sample();
        (answer.counters.received, answer.counters.merged) = (4321, 4311);
        let text = status(&answer, Style::PLAIN);
        assert!(text.contains("merged   4311 of them became part of a superframe\n"), "{text}");
        assert!(!text.contains("unaccounted"), "{text}");
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(
            [duration(0.44), duration(12.9), duration(7620.0), duration(f64::NAN)],
            ["0.4s", "12s", "2h07m", "?"]
        );
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1024), bytes(1536), bytes(1 << 30)],
            ["0 B", "1023 B", "1 KiB", "1.5 KiB", "1 GiB"]
        );
        assert_eq!(bytes(u64::MAX), "16 EiB");
        assert_eq!(endpoint("fd00::1".parse().unwrap(), 80), "[fd00::1]:80");
    }
}
