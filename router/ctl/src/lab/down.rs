//! Ending a lab: the processes that were recorded, then what was about to make more of it, then whatever lives in its
//! namespaces, then these, then the files.
//!
//! Every step is tried even if one before it failed, each is harmless if there is nothing to do, and none looks at
//! anything but the record. The record goes last, so that what could not be ended can be tried again.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, bail};

use super::record::{self, Record, Stored};
use super::{net, process};

/// Ends a lab. False if there is none.
pub fn down(lab: &str) -> Result<bool> {
    match Record::load(lab)? {
        Stored::Absent => return Ok(false),
        Stored::Empty => record::remove(lab)?,
        Stored::Present(record) => tear_down(&record)?,
    }
    Ok(true)
}

/// Ends everything that a record names.
pub fn tear_down(record: &Record) -> Result<()> {
    let mut failures = Vec::new();
    let mut attempt = |outcome: Result<()>| failures.extend(outcome.err().map(|error| format!("{error:#}")));
    if record.is_of_this_boot() {
        attempt(process::end_recorded(&record.processes));
        if let Some(creator) = &record.creator {
            attempt(process::end_marked(&record.lab, creator));
        }
    }
    let ids: BTreeSet<_> = record.netns.iter().filter_map(|netns| process::netns_id(&net::path(netns))).collect();
    attempt(process::end_inside(&ids));
    for netns in record.netns.iter().rev() {
        attempt(net::remove_namespace(netns));
    }
    // One that is there again was made meanwhile.
    for netns in record.netns.iter().filter(|netns| net::path(netns).exists()) {
        attempt(net::remove_namespace(netns));
        if net::path(netns).exists() {
            attempt(Err(anyhow!("the network namespace {netns} is there still; is the lab being built?")));
        }
    }
    if !failures.is_empty() {
        bail!("the lab {} could not be ended as a whole:\n{}", record.lab, failures.join("\n"));
    }
    record::remove(&record.lab).context("all of the lab has ended but its record")
}
