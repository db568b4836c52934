//! What Prometheus is told, in the OpenMetrics text format.
//!
//! Everything is read when it is asked for; nothing is kept for it but the counts of requests ([`Requests`]). Labels come from small
//! fixed sets (a port's role, a drop's reason, this node's ranges): there is no series for a pod, a peer or a flow, of which a
//! cluster has too many. `weft ports`, `weft nodes` and `weft flows` show those.

pub mod http;
mod process;
mod requests;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use weft_api::{Failure, Status, code};
use weft_ipam::Counts;
use weft_router::DropReason;
use weft_router::stats::PortStats;

use crate::api::{show, status};
use crate::control::desired::is_underlay;
use crate::node::Node;
pub use requests::Requests;

/// The content type of [`exposition`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of this moment.
///
/// # Errors
/// The data plane does not answer.
pub fn exposition(node: &Node) -> Result<String, Failure> {
    write(Reading::take(node)?, &node.requests)
}

fn write(reading: Reading, requests: &Requests) -> Result<String, Failure> {
    let mut registry = Registry::default();
    requests.register(&mut registry);
    registry.register_collector(Box::new(reading));
    let mut out = String::new();
    let written = text::encode(&mut out, &registry);
    written.map_err(|error| Failure::new(code::INTERNAL, format!("the metrics cannot be written: {error}")))?;
    Ok(out)
}

/// The node at one moment.
#[derive(Debug)]
struct Reading {
    status: Status,
    ready: bool,
    ways: crate::probing::Counts,
    leases: Counts,
    ports: [Ports; 2],
    process: process::Usage,
}

/// All ports of one role.
#[derive(Debug, Default)]
struct Ports {
    role: &'static str,
    up: u64,
    stats: PortStats,
}

impl Reading {
    fn take(node: &Node) -> Result<Reading, Failure> {
        let ready = status::ready(node).is_ok();
        let status = status::status(node)?;
        let snapshot = show::snapshot(node, false)?;
        let mut ports = ["pod", "underlay"].map(|role| Ports { role, ..Ports::default() });
        for port in &snapshot.ports {
            let of = &mut ports[usize::from(is_underlay(port.id))];
            of.up += u64::from(port.up);
            of.stats += &port.stats;
        }
        // A counter never falls: what pods that left have sent stays in it.
        ports[0].stats += &node.state().retired;
        let ways = node.probing.counts();
        Ok(Reading { status, ready, ways, leases: node.store.counts(), ports, process: process::Usage::take() })
    }

    fn write_node(&self, out: &mut Writer<'_>) -> fmt::Result {
        let Status { node, version, mode, problems, uptime, epoch, pods, peers, workers, .. } = &self.status;
        let labels = [("node", node.as_str()), ("version", version), ("mode", mode)];
        out.gauge("weft_info", "Always 1; its labels say what runs here", [(&labels[..], 1.0)])?;
        let ready = f64::from(u8::from(self.ready));
        out.plain("weft_ready", "Whether pods can be attached (1), as CNI's STATUS says", ready)?;
        let problems = problems.len() as f64;
        out.plain("weft_problems", "Problems that `weft status` shows", problems)?;
        out.plain("weft_uptime_seconds", "Seconds since weftd started", *uptime)?;
        out.plain("weft_tables_epoch", "Changes of the tables since weftd started", *epoch as f64)?;
        out.plain("weft_pods", "Attachments that have a port", *pods as f64)?;
        out.plain("weft_peers", "Other nodes that are known", *peers as f64)?;
        let asked = self.ways.active as f64;
        out.plain("weft_peers_asked", "Other nodes that are asked about the way to them, for there is traffic", asked)?;
        out.plain("weft_peers_away", "Other nodes that answered once, and do not any more", self.ways.away as f64)?;
        let narrow = self.ways.narrow as f64;
        out.plain("weft_peers_narrow", "Other nodes to which the way carries less than pods use", narrow)?;
        out.counter("weft_probes", "Questions to other nodes about the way to them", [(&[][..], self.ways.asked)])?;
        out.counter("weft_probe_answers", "Answers to these", [(&[][..], self.ways.answered)])?;
        out.plain("weft_workers", "Threads of the data plane that were started", *workers as f64)?;
        let Some(masquerade) = &self.status.masquerade else { return Ok(()) };
        let sessions = "Conversations that leave the cluster in the node's name";
        out.plain("weft_masquerade_sessions", sessions, masquerade.sessions as f64)?;
        let fullest = "Reserved ports that are taken where fewest are left";
        out.plain("weft_masquerade_ports_taken", fullest, masquerade.fullest.into())
    }

    fn write_ports(&self, out: &mut Writer<'_>) -> fmt::Result {
        let labels = self.ports.each_ref().map(|ports| [("role", ports.role)]);
        let by_role = |value: fn(&PortStats) -> u64| {
            self.ports.iter().zip(&labels).map(move |(ports, labels)| (&labels[..], value(&ports.stats)))
        };
        let up = self.ports.iter().zip(&labels).map(|(ports, labels)| (&labels[..], ports.up as f64));
        out.gauge("weft_ports", "Ports that are up", up)?;
        out.counter(
            "weft_received_frames",
            "Frames that came in by ports of this role",
            by_role(|stats| stats.received),
        )?;
        out.counter("weft_received_bytes", "Their bytes", by_role(|stats| stats.received_bytes))?;
        out.counter("weft_sent_frames", "Frames of these that left, by any port", by_role(|stats| stats.sent))?;
        out.counter("weft_sent_bytes", "Their bytes", by_role(|stats| stats.sent_bytes))?;
        let created = by_role(PortStats::created);
        out.counter("weft_created_frames", "Copies, replies and segments made because of these", created)?;
        out.counter(
            "weft_merged_frames",
            "Frames of these that became part of another",
            by_role(|stats| stats.merged),
        )?;
        let help = "Frames that the kernel dropped before they could be received, because its buffer was full";
        out.counter("weft_overrun_frames", help, by_role(|stats| stats.overruns))?;
        let help = "Frames that left by these and that the kernel then dropped: a device was down or its queue full";
        out.counter("weft_undelivered_frames", help, by_role(|stats| stats.undelivered))
    }

    fn write_drops(&self, out: &mut Writer<'_>) -> fmt::Result {
        let count =
            |reason: &DropReason| -> u64 { self.ports.iter().map(|ports| ports.stats.dropped[*reason as usize]).sum() };
        // All of them, also those that never happened: a rate needs a beginning.
        let all = DropReason::ALL.iter();
        let labelled: Vec<_> = all
            .map(|reason| {
                let loss = if reason.is_loss() { "true" } else { "false" };
                ([("reason", reason.name()), ("loss", loss)], count(reason))
            })
            .collect();
        let samples = labelled.iter().map(|(labels, count)| (&labels[..], *count));
        out.counter(
            "weft_dropped_frames",
            "Frames that ended here, by reason; `weft drops` says what each means",
            samples,
        )
    }

    fn write_memory(&self, out: &mut Writer<'_>) -> fmt::Result {
        let by_range = |value: Value| -> Vec<_> {
            let ranges = self.status.leases.iter();
            ranges.map(|range| ([("range", range.range.as_str())], value(range) as f64)).collect()
        };
        let families: [(&str, &str, Value); 4] = [
            ("weft_addresses_leased", "Addresses that are leased, by range", |range| range.leased),
            ("weft_addresses_resting", "Addresses that were freed and are not given again yet", |range| range.resting),
            ("weft_addresses_reserved", "Addresses that are given to nobody", |range| range.reserved),
            ("weft_addresses", "Addresses that can be leased in all, by range", |range| range.size),
        ];
        for (name, help, value) in families {
            let samples = by_range(value);
            out.gauge(name, help, samples.iter().map(|(labels, value)| (&labels[..], *value)))?;
        }
        let free = self.status.free.map_or((0, 0), |free| (free.chunks, free.supers));
        let labels = [[("kind", "chunk")], [("kind", "super")]];
        let samples = labels.iter().map(|labels| &labels[..]).zip([free.0 as f64, free.1 as f64]);
        out.gauge("weft_buffers_free", "Buffers of the data plane that hold no frame", samples)
    }

    fn write_leases(&self, out: &mut Writer<'_>) -> fmt::Result {
        let Counts { leased, released, exhausted, woken, commits, failed } = self.leases;
        let families = [
            ("weft_leases_given", "Leases given", leased),
            ("weft_leases_released", "Leases released", released),
            ("weft_leases_exhausted", "Requests for which no address was free", exhausted),
            ("weft_leases_woken", "Addresses that were given before their rest was over", woken),
            ("weft_lease_store_writes", "Writes to the lease store, each for one change or more", commits),
            ("weft_lease_store_failures", "Writes to the lease store that failed", failed),
        ];
        families.iter().try_for_each(|(name, help, value)| out.total(name, help, ConstCounter::new(*value)))
    }

    fn write_process(&self, out: &mut Writer<'_>) -> fmt::Result {
        let process::Usage { cpu, resident, descriptors, descriptor_limit } = self.process;
        out.total("process_cpu_seconds", "CPU time of weftd, user and system", ConstCounter::new(cpu))?;
        out.plain("process_resident_memory_bytes", "Memory of weftd that is resident", resident as f64)?;
        out.plain("process_open_fds", "Open descriptors of weftd", descriptors as f64)?;
        out.plain("process_max_fds", "Most descriptors that weftd may have open", descriptor_limit as f64)
    }
}

impl Collector for Reading {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Writer(encoder);
        self.write_node(&mut out)?;
        self.write_ports(&mut out)?;
        self.write_drops(&mut out)?;
        self.write_memory(&mut out)?;
        self.write_leases(&mut out)?;
        self.write_process(&mut out)
    }
}

/// A figure of a range.
type Value = fn(&weft_api::RangeUse) -> u64;

type Labels<'l> = &'l [(&'l str, &'l str)];

/// Writes a metric at a time: a sample for each set of labels. `_total` comes behind a counter's name by itself.
struct Writer<'e>(DescriptorEncoder<'e>);

impl Writer<'_> {
    fn plain(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        gauge.encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn gauge<'l>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        samples
            .into_iter()
            .try_for_each(|(labels, value)| ConstGauge::new(value).encode(family.encode_family(&labels)?))
    }

    fn counter<'l>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'l>, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        samples
            .into_iter()
            .try_for_each(|(labels, value)| ConstCounter::new(value).encode(family.encode_family(&labels)?))
    }

    fn total(&mut self, name: &str, help: &str, counter: impl EncodeMetric) -> fmt::Result {
        let family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter.encode(family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            problems: vec!["one".into()],
            node: "n\"1".into(),
            version: "0.1.0".into(),
            mode: "routed".into(),
            uptime: 1.5,
            pods: 3,
            leases: vec![weft_api::RangeUse {
                range: "10.244.1.0/24".into(),
                leased: 3,
                resting: 0,
                reserved: 0,
                size: 254,
            }],
            masquerade: Some(weft_api::MasqueradeInfo::default()),
            free: Some(weft_api::FreeBuffers { chunks: 7, supers: 2, huge_pages: 0 }),
            ..serde_json::from_value(serde_json::json!({
                "problems": [], "node": "", "version": "", "pid": 1, "uptime": 0.0, "mode": "", "ranges": [],
                "gateways": [], "gateway_mac": "", "vtep_mac": "", "underlay": "", "underlay_kind": "", "vni": 1,
                "mtu": 1450, "underlay_mtu": 1500, "pods": 0, "peers": 0, "leases": [], "epoch": 4,
                "counters": weft_api::Counters::default(),
            }))
            .unwrap()
        }
    }

    fn text() -> String {
        let mut ports = ["pod", "underlay"].map(|role| Ports { role, ..Ports::default() });
        (ports[0].up, ports[0].stats.received, ports[0].stats.dropped[3]) = (3, 17, 2);
        let requests = Requests::default();
        requests.count("add", 11, std::time::Duration::from_millis(30));
        let leases = Counts { leased: 5, ..Counts::default() };
        let process = process::Usage { cpu: 0.25, resident: 4096, descriptors: 9, descriptor_limit: 1024 };
        let ways = crate::probing::Counts::default();
        write(Reading { status: status(), ready: true, ways, leases, ports, process }, &requests).unwrap()
    }

    #[test]
    fn every_family_has_a_type_a_help_and_a_sample() {
        let text = text();
        for line in [
            "weft_ready 1.0",
            "weft_pods 3.0",
            "weft_received_frames_total{role=\"pod\"} 17",
            "weft_addresses_leased{range=\"10.244.1.0/24\"} 3.0",
            "weft_leases_given_total 5",
            "weft_buffers_free{kind=\"super\"} 2.0",
            "process_cpu_seconds_total 0.25",
            "weft_cni_requests_total{operation=\"add\",code=\"11\"} 1",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("node=\"n\\\"1\""), "a quote in a label is escaped: {text}");
        let third = DropReason::ALL[3];
        assert!(text.contains(&format!("reason=\"{}\",loss=\"{}\"}} 2", third.name(), third.is_loss())), "{text}");
        let families = text.lines().filter(|line| line.starts_with("# TYPE")).count();
        assert!(families >= 20 && families == text.lines().filter(|line| line.starts_with("# HELP")).count(), "{text}");
    }

    /// A table's row for each family: name, type, labels, meaning.
    fn rows() -> Vec<String> {
        let text = text();
        let lines = || text.lines().filter(|line| !line.starts_with('#'));
        let row = |line: &str| {
            let (name, help) = line.strip_prefix("# HELP ")?.split_once(' ')?;
            let kind = text.lines().find_map(|line| line.strip_prefix(&format!("# TYPE {name} "))).unwrap();
            let end = if kind == "counter" { "_total" } else { "" };
            let sample = lines().find(|line| line.starts_with(&format!("{name}{end}"))).unwrap();
            let labels =
                sample.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(inside, _)| inside);
            let labels: Vec<_> = labels.split("\",").filter_map(|label| label.split_once('=')).collect();
            let labels: Vec<_> = labels.iter().map(|(label, _)| *label).filter(|label| *label != "le").collect();
            Some(format!("| `{name}{end}` | {kind} | {} | {} |", labels.join(", "), help.trim_end_matches('.')))
        };
        text.lines().filter_map(row).collect()
    }

    #[test]
    fn every_family_is_documented() {
        let documented = include_str!("../../../../deploy/metrics.md");
        let documented: Vec<&str> = documented.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(documented, rows(), "the table in deploy/metrics.md should be:\n{}", rows().join("\n"));
    }

    #[test]
    fn the_number_of_series_does_not_depend_on_pods_and_peers() {
        assert!(text().lines().filter(|line| !line.starts_with('#')).count() < 120 + DropReason::COUNT);
    }
}
