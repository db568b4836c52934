//! Taking over what the host-local plugin gave, and giving it back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Serialize;
use weft_ipam::{Facts, Foreign, Owner, Store, unknown_owner};

use super::{View, open, read};
use crate::output;

/// What a folder came to.
#[derive(Default, Serialize)]
struct Imported {
    network: String,
    /// Attachments, or containers of unknown interface.
    attachments: usize,
    addresses: usize,
    /// Of these, such that nobody is known to have.
    unknown: usize,
    /// Attachments and addresses that had been taken over before.
    known: usize,
    last_given: Vec<IpAddr>,
    passed_over: Vec<String>,
}

pub fn import(folder: &Path, network: Option<String>, boot_id: &Path, view: &View) -> anyhow::Result<()> {
    let boot = fs::read_to_string(boot_id).with_context(|| format!("cannot read the boot id {}", boot_id.display()))?;
    let found = folders(folder, network)?;
    let mut foreign = Vec::new();
    for (folder, network) in found {
        foreign
            .push(weft_ipam::foreign(&folder, &network).with_context(|| format!("cannot read {}", folder.display()))?);
    }
    let store = open(&view.store.folder())?;
    let mut all = Vec::new();
    for found in foreign {
        all.push(take_over(&store, found, boot.trim())?);
    }
    if view.json {
        return output::print_json(&all);
    }
    let mut text = String::new();
    for done in all {
        let Imported { network, attachments, addresses, unknown, known, .. } = &done;
        text.push_str(&format!("{}: {addresses} addresses of {attachments} attachments\n", output::plain(network)));
        if *known > 0 {
            text.push_str(&format!("  {known} of them were here already\n"));
        }
        if *unknown > 0 {
            text.push_str(&format!(
                "  {unknown} addresses have files without an owner: they stay taken until the next boot, or `weft ipam release`\n"
            ));
        }
        for name in &done.passed_over {
            text.push_str(&format!("  {} is none of host-local's files and was passed over\n", output::plain(name)));
        }
    }
    output::print(&text)
}

/// The folders of networks, and the networks' names.
fn folders(folder: &Path, network: Option<String>) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let whole = folder.canonicalize().with_context(|| format!("cannot open {}", folder.display()))?;
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let entries = || fs::read_dir(&whole).map(|all| all.filter_map(Result::ok).map(|entry| entry.path()));
    let entries: Vec<PathBuf> = entries().with_context(|| format!("cannot list {}", whole.display()))?.collect();
    let own = |path: &PathBuf| {
        let name = name(path);
        path.is_file() && (name.parse::<IpAddr>().is_ok() || name.starts_with("last_reserved_ip.") || name == "lock")
    };
    if network.is_some() || entries.is_empty() || entries.iter().any(own) {
        let network = network.unwrap_or_else(|| name(&whole));
        return Ok(vec![(whole, network)]);
    }
    let below: Vec<(PathBuf, String)> =
        entries.into_iter().filter(|path| path.is_dir()).map(|path| (path.clone(), name(&path))).collect();
    if below.is_empty() {
        bail!("{} is no folder of host-local's: there is no file named by an address in it", whole.display());
    }
    Ok(below)
}

fn take_over(store: &Store, found: Foreign, boot: &str) -> anyhow::Result<Imported> {
    let labels = found.labels();
    let unknown: Vec<(Owner, BTreeSet<IpAddr>)> =
        found.unknown.iter().map(|address| (unknown_owner(*address), BTreeSet::from([*address]))).collect();
    let mut done = Imported {
        network: found.network.clone(),
        attachments: found.owners.len(),
        unknown: unknown.len(),
        last_given: found.rounds.clone(),
        passed_over: found.passed_over,
        ..Imported::default()
    };
    let mut wanted = Vec::new();
    let mut conflicts = Vec::new();
    for (owner, addresses) in found.owners.into_iter().chain(unknown) {
        done.addresses += addresses.len();
        let here: Option<BTreeSet<IpAddr>> = store.get(&owner).map(|record| record.addresses().collect());
        if here.as_ref() == Some(&addresses) {
            done.known += 1;
            continue;
        }
        let holders = addresses.iter().filter_map(|address| Some((address, store.by_address("", *address)?)));
        conflicts
            .extend(holders.map(|(address, record)| format!("{address} of {owner} is leased to {}", record.owner)));
        if let Some(here) = here {
            conflicts.push(format!("{owner} has {here:?} here, and {addresses:?} there"));
        }
        wanted.push((owner, addresses));
    }
    if !conflicts.is_empty() {
        conflicts.sort();
        bail!("{}: nothing of it was taken over:\n{}", found.network, conflicts.join("\n"));
    }
    let facts = |owner: &Owner| Facts {
        boot: boot.to_owned(),
        labels: if owner.network.is_empty() { labels.clone() } else { BTreeMap::new() },
        ..Facts::default()
    };
    let all = wanted.into_iter().map(|(owner, addresses)| {
        let facts = facts(&owner);
        (owner, addresses.into_iter().collect(), facts)
    });
    store.adopt_all(all.collect())?;
    for last in &found.rounds {
        store.adopt_round("", *last)?;
    }
    Ok(done)
}

pub fn export(folder: &Path, network: Option<String>, view: &View) -> anyhow::Result<()> {
    let leases = read(&view.store)?;
    let networks: BTreeSet<&str> =
        leases.iter().map(|record| record.owner.network.as_str()).filter(|network| !network.is_empty()).collect();
    let named = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let network = match network {
        Some(network) => network,
        None if networks.contains(named.as_str()) => named,
        None if networks.len() == 1 => networks.iter().map(|network| (*network).to_owned()).collect(),
        None => {
            bail!("which network? Name one with --network: {}", networks.into_iter().collect::<Vec<_>>().join(", "))
        }
    };
    let written = weft_ipam::export(&leases, &network, folder)
        .with_context(|| format!("cannot write {network} to {}", folder.display()))?;
    if view.json {
        #[derive(Serialize)]
        struct Exported {
            network: String,
            addresses: usize,
            unknown: usize,
            last_given: usize,
        }
        let weft_ipam::Written { addresses, unknown, rounds: last_given } = written;
        return output::print_json(&Exported { network, addresses, unknown, last_given });
    }
    output::print(&format!("{}: {} addresses in {}\n", output::plain(&network), written.addresses, folder.display()))
}
