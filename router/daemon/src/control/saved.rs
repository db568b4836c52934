//! The last good state of the cluster, on disk: a node starts, attaches pods and forwards while its engine is away.
//!
//! One file, `<state_dir>/cluster`: a line `weft cluster 1 <CRC-32 of the rest, eight hex digits>`, then JSON. It is written beside its
//! place, synced and renamed, so that there is always a whole one. What does not fit its checksum, or belongs to a node of another
//! name, is as good as none, and is said. What it holds passes the same door as what comes from the engine ([`admit`]).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::cluster::{Cluster, Record, admit};
use super::config::Config;

/// Its name in the state folder.
const FILE: &str = "cluster";
const HEAD: &str = "weft cluster 1 ";
/// The largest cluster has some megabytes.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Saved {
    node: String,
    /// Its underlay address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    ranges: Vec<String>,
    nodes: Vec<Record>,
}

/// Keeps `cluster`.
///
/// # Errors
/// The disk's; what was kept before is still there.
pub fn save(folder: &Path, local: &Config, cluster: &Cluster) -> std::io::Result<()> {
    let saved = Saved {
        node: local.node.clone(),
        address: Some(local.underlay.address),
        ranges: cluster.ranges.iter().map(ToString::to_string).collect(),
        nodes: cluster.records().collect(),
    };
    write_durably(folder, FILE, &framed(&serde_json::to_vec(&saved)?))
}

/// What was kept last, as it holds for this configuration; `None` if there is nothing.
///
/// # Errors
/// There is something, and it cannot be used.
pub fn load(folder: &Path, local: &Config) -> Result<Option<Cluster>, String> {
    let path = folder.join(FILE);
    let Some(saved) = read(&path)? else { return Ok(None) };
    if saved.node != local.node {
        return Err(format!("{} belongs to the node {:?}", path.display(), saved.node));
    }
    let ranges: Vec<IpNet> = saved.ranges.iter().filter_map(|range| range.parse().ok()).collect();
    Ok(Some(admit(local, ranges, saved.nodes)))
}

/// This machine's underlay address when that was kept.
pub fn address(folder: &Path) -> Option<IpAddr> {
    read(&folder.join(FILE)).ok()??.address
}

fn read(path: &Path) -> Result<Option<Saved>, String> {
    let shown = path.display();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot open {shown}: {error}")),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(|error| format!("cannot read {shown}: {error}"))?;
    let body = unframed(&bytes).ok_or_else(|| format!("{shown} is damaged: its checksum is wrong"))?;
    serde_json::from_slice(body).map(Some).map_err(|error| format!("{shown} is not understood: {error}"))
}

/// Writes a small file so that after a crash there is the old one or the new one, and nothing between.
///
/// # Errors
/// The disk's.
pub fn write_durably(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let beside = folder.join(format!(".{name}.new"));
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, folder.join(name))?;
    File::open(folder)?.sync_all()
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{HEAD}{:08x}\n", crc32fast::hash(body)).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

fn unframed(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_prefix(HEAD.as_bytes())?;
    let (sum, body) = (std::str::from_utf8(rest.get(..8)?).ok()?, rest.get(9..)?);
    (rest[8] == b'\n' && u32::from_str_radix(sum, 16).ok()? == crc32fast::hash(body)).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::host::Host;

    fn local() -> Config {
        let text = "node = \"n1\"\nmode = \"routed\"\nmtu = 1450\n[underlay]\naddress = \"10.200.0.1\"\n[etcd]\n\
                    endpoints = [\"http://10.200.0.9:2379\"]\nnetwork = [\"10.244.0.0/16\"]";
        Config::read(text, &Host::default()).unwrap().config
    }

    fn cluster() -> Cluster {
        let record = Record {
            name: "n2".into(),
            underlay: "10.200.0.2".into(),
            ranges: vec!["10.244.2.0/24".into()],
            vtep_mac: Some("02:00:00:00:00:02".into()),
            ..Record::default()
        };
        admit(&local(), vec!["10.244.1.0/24".parse().unwrap()], [record])
    }

    #[test]
    fn what_is_kept_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("state");
        assert_eq!(load(&folder, &local()), Ok(None));
        save(&folder, &local(), &cluster()).unwrap();
        assert_eq!(load(&folder, &local()), Ok(Some(cluster())));
        assert_eq!(address(&folder), Some(local().underlay.address));
    }

    #[test]
    fn every_damaged_byte_and_every_cut_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &local(), &cluster()).unwrap();
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            load(folder.path(), &local()).expect_err("a bit was flipped");
            fs::write(&path, &whole[..at]).unwrap();
            load(folder.path(), &local()).expect_err("it was cut");
        }
    }

    #[test]
    fn another_nodes_state_is_not_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &Config { node: "n7".into(), ..local() }, &cluster()).unwrap();
        let why = load(folder.path(), &local()).unwrap_err();
        assert!(why.ends_with("belongs to the node \"n7\""), "{why}");
    }
}
