//! Leases and reservations: looking at them, and changing single ones.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, bail};
use serde::Serialize;
use weft_api::{AttachmentKey, Client, Empty, Request, Reserve, Status};
use weft_ipam::{Facts, Leases, Owner, RESERVED, Record, reserved_owner};

use super::{Place, View, read};
use crate::output::{self, Style};
use crate::show::ask;
use crate::table::Table;

/// How long weftd has to answer.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// A record as it is shown.
#[derive(Serialize)]
struct Shown {
    /// `lease`, `reserved`, or `unknown`: an address that was taken over or saved, and nobody knows from whom.
    kind: &'static str,
    network: String,
    container: String,
    ifname: String,
    pool: String,
    addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
    /// Seconds since 1970.
    leased_at: u64,
    boot: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    netns_cookie: Option<u64>,
    labels: BTreeMap<String, String>,
}

impl Shown {
    fn of(record: &Record) -> Shown {
        let Owner { network, container, ifname } = record.owner.clone();
        let facts = &record.facts;
        Shown {
            kind: match (network.as_str(), container.as_str()) {
                ("", RESERVED) => "reserved",
                ("", "unknown" | "lost") => "unknown",
                _ => "lease",
            },
            network,
            container,
            ifname,
            pool: facts.pool.clone(),
            addresses: record.addresses().collect(),
            mac: facts.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
            leased_at: facts.time,
            boot: facts.boot.clone(),
            netns_cookie: facts.netns.map(|netns| netns.cookie),
            labels: facts.labels.clone(),
        }
    }

    /// Namespace and name of the pod, or what the address is kept for.
    fn pod(&self) -> String {
        let label = |key: &str| self.labels.get(key).map(String::as_str).unwrap_or_default();
        match (label("K8S_POD_NAMESPACE"), label("K8S_POD_NAME")) {
            ("", "") => label(NOTE).to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        }
    }

    fn addresses(&self) -> String {
        self.addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
    }
}

/// The label of a reservation's purpose.
const NOTE: &str = "note";

pub fn list(view: &View) -> anyhow::Result<()> {
    let leases = read(&view.store)?;
    let mut all: Vec<Shown> = leases.iter().map(|record| Shown::of(record)).collect();
    all.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    if view.json {
        return output::print_json(&all);
    }
    let mut table = Table::new(&["address", "kind", "network", "container", "interface", "pod"]);
    for shown in all {
        let pod = shown.pod();
        table.row([shown.addresses(), shown.kind.to_owned(), shown.network, shown.container, shown.ifname, pod]);
    }
    output::print(&table.render(Style::stdout(), "no leases"))
}

pub fn show(what: &str, view: &View) -> anyhow::Result<()> {
    let leases = read(&view.store)?;
    let found: Vec<Shown> = matching(&leases, what).into_iter().map(Shown::of).collect();
    if found.is_empty() {
        bail!("nobody has {what}: `weft ipam ls` lists all");
    }
    if view.json {
        return output::print_json(&found);
    }
    let mut text = String::new();
    for shown in found {
        let mut lines = vec![
            ("kind", shown.kind.to_owned()),
            ("address", shown.addresses()),
            ("network", shown.network.clone()),
            ("container", shown.container.clone()),
            ("interface", shown.ifname.clone()),
            ("pool", shown.pool.clone()),
            ("mac", shown.mac.clone().unwrap_or_default()),
            ("leased", if shown.leased_at == 0 { String::new() } else { format!("{} s after 1970", shown.leased_at) }),
            ("boot", shown.boot.clone()),
            ("netns", shown.netns_cookie.map(|cookie| format!("cookie {cookie}")).unwrap_or_default()),
        ];
        lines.extend(shown.labels.iter().map(|(key, value)| (key.as_str(), value.clone())));
        for (name, value) in lines.into_iter().filter(|(_, value)| !value.is_empty()) {
            text.push_str(&format!("{:<20}{}\n", output::plain(name), output::plain(&value)));
        }
        text.push('\n');
    }
    output::print(text.trim_end_matches('\n')).and_then(|()| output::print("\n"))
}

/// By address, by the beginning of a container id, or by the name of a pod.
fn matching<'a>(leases: &'a Leases, what: &str) -> Vec<&'a Record> {
    let address: Option<IpAddr> = what.parse().ok();
    let fits = |record: &&Record| match address {
        Some(address) => record.addresses().any(|has| has == address.to_canonical()),
        None => {
            let name = record.facts.labels.get("K8S_POD_NAME");
            let of = record.facts.labels.get("K8S_POD_NAMESPACE");
            let pod = name.is_some_and(|name| {
                name == what || of.is_some_and(|of| what.strip_prefix(of.as_str()) == Some(&format!("/{name}")))
            });
            !what.is_empty() && (record.owner.container.starts_with(what) || pod)
        }
    };
    leases.iter().map(|record| &**record).filter(fits).collect()
}

pub fn ranges(socket: &Path, json: bool) -> anyhow::Result<()> {
    let status: Status = ask(socket, &Request::Status)?;
    if json {
        return output::print_json(&status.leases);
    }
    let mut table = Table::new(&["range", ">leased", ">resting", ">reserved", ">free", ">of"]);
    for range in status.leases {
        let free = range.size.saturating_sub(range.leased).saturating_sub(range.resting);
        // A number that nobody will ever count to says nothing.
        let many = |count: u64| if count > u64::from(u32::MAX) { "plenty".to_owned() } else { count.to_string() };
        let cells = vec![
            range.range,
            range.leased.to_string(),
            range.resting.to_string(),
            many(range.reserved),
            many(free),
            many(range.size),
        ];
        table.push(cells, free == 0);
    }
    output::print(&table.render(Style::stdout(), "no ranges"))
}

pub fn reserve(address: IpAddr, note: String, store: &Place, socket: &Path) -> anyhow::Result<()> {
    match Client::connect(socket, PATIENCE) {
        Ok(mut weftd) => {
            let Empty {} = weftd.call(&Request::Reserve(Reserve { address, note }))?;
        }
        Err(_) => {
            let labels = BTreeMap::from([(NOTE.to_owned(), note)]);
            let labels = labels.into_iter().filter(|(_, note)| !note.is_empty()).collect();
            store.open()?.adopt(reserved_owner(address), &[address], Facts { labels, ..Facts::default() })?;
        }
    }
    output::progress(&format!("{address} is reserved"));
    Ok(())
}

pub fn release(what: &str, store: &Place, socket: &Path) -> anyhow::Result<()> {
    let owner = {
        let leases = read(store)?;
        let found = matching(&leases, what);
        match &found[..] {
            [one] => one.owner.clone(),
            [] => bail!("nobody has {what}: `weft ipam ls` lists all"),
            several => bail!("{what} means {} leases: write the whole container id, or an address", several.len()),
        }
    };
    match Client::connect(socket, PATIENCE) {
        Ok(mut weftd) => {
            let Owner { network, container, ifname } = owner.clone();
            let Empty {} = weftd.call(&Request::Del(AttachmentKey { network, container, ifname }))?;
        }
        Err(_) => {
            let opened = store.open()?;
            // When it rests from is not known without weftd: then it rests from weftd's next start on, if that is after a boot.
            let released = opened.release(&owner, since_boot()?);
            opened.flush().context("the release is not durable")?;
            released.context("somebody else released it")?;
        }
    }
    output::progress(&format!("{owner} is released"));
    Ok(())
}

/// Milliseconds since the boot.
fn since_boot() -> anyhow::Result<u64> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Ok(u64::try_from(now.tv_sec)? * 1000 + u64::try_from(now.tv_nsec)? / 1_000_000)
}
