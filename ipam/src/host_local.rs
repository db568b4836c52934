//! The folder in which the host-local plugin keeps its addresses: read to take them over, written to give them back.
//!
//! `<dataDir>/<network>/` holds a file for each address, named by it, with the container's id, CR LF and the interface's name (old versions: the
//! id alone); `last_reserved_ip.<n>` with the address last given from range set n; and `lock`, which is held locked while anything changes. host-local
//! syncs nothing, so that a crash may leave files that are empty or hold rubbish: somebody unknown has those addresses, or nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::leases::Leases;
use crate::record::{Owner, Record};

const LOCK: &str = "lock";
const LAST: &str = "last_reserved_ip.";
/// An id of 64 digits and an interface's name are 82 bytes; what is much longer is something else.
const MAX_FILE: u64 = 4096;
/// `IFNAMSIZ` less the terminating zero.
const MAX_IFNAME: usize = 15;
/// Where a record keeps the network of an address whose owner is not known.
const NETWORK: &str = "network";

/// What a folder of host-local's says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Foreign {
    /// The network: the folder's name, unless another was given.
    pub network: String,
    /// The addresses of each attachment. The interface is empty where only the container is known.
    pub owners: BTreeMap<Owner, BTreeSet<IpAddr>>,
    /// Addresses that somebody unknown has, or nobody: the file is empty, or holds no owner.
    pub unknown: BTreeSet<IpAddr>,
    /// The addresses last given, by range set.
    pub rounds: Vec<IpAddr>,
    /// Names of files that are none of host-local's.
    pub passed_over: Vec<String>,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Addresses.
    pub addresses: usize,
    /// Of these, such whose owner is not known.
    pub unknown: usize,
    /// Addresses last given.
    pub rounds: usize,
}

/// Who has an address of which nothing else is known. No CNI request can name it.
pub fn unknown_owner(address: IpAddr) -> Owner {
    Owner { network: String::new(), container: "unknown".into(), ifname: address.to_string() }
}

impl Foreign {
    /// What is to be remembered with an address whose owner is not known.
    pub fn labels(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(NETWORK.to_owned(), self.network.clone())])
    }
}

/// Reads the folder of a network.
///
/// # Errors
/// Another program holds its lock, or something in it cannot be read.
pub fn foreign(folder: &Path, network: &str) -> io::Result<Foreign> {
    let _lock = lock(folder, false)?;
    let mut found = Foreign { network: network.to_owned(), ..Foreign::default() };
    let mut rounds = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let plain = entry.file_type()?.is_file();
        let set = name.strip_prefix(LAST).and_then(|set| set.parse::<u32>().ok());
        match (name.parse::<IpAddr>(), set) {
            _ if name == LOCK => {}
            (Ok(address), _) if plain => match owner(&read(&entry.path())?, network) {
                Some(owner) => drop(found.owners.entry(owner).or_default().insert(address.to_canonical())),
                None => drop(found.unknown.insert(address.to_canonical())),
            },
            (_, Some(set)) if plain => {
                let text = read(&entry.path())?;
                rounds.extend(std::str::from_utf8(&text).ok().and_then(|text| Some((set, text.trim().parse().ok()?))));
            }
            _ => found.passed_over.push(name),
        }
    }
    found.rounds = rounds.into_values().collect();
    found.passed_over.sort();
    Ok(found)
}

/// Writes the leases of a network into a folder, as host-local would have it. Files that are there must say the same.
///
/// # Errors
/// A file is there and says something else; another program holds the lock; the disk refuses.
pub fn export(leases: &Leases, network: &str, folder: &Path) -> io::Result<Written> {
    fs::create_dir_all(folder)?;
    let _lock = lock(folder, true)?;
    let mut written = Written::default();
    let unknown = |record: &Record| {
        record.owner == record.leases.first().map(|lease| unknown_owner(lease.address)).unwrap_or_default()
            && record.facts.labels.get(NETWORK).is_some_and(|of| of == network)
    };
    for record in leases.iter() {
        let Owner { network: of, container, ifname } = &record.owner;
        let content = match (of == network, ifname.as_str()) {
            (true, "") => container.clone(),
            (true, _) => format!("{container}\r\n{ifname}"),
            (false, _) if unknown(record) => String::new(),
            _ => continue,
        };
        for address in record.addresses() {
            write(&folder.join(address.to_string()), content.as_bytes(), false)?;
            written.addresses += 1;
            written.unknown += usize::from(content.is_empty());
        }
    }
    let mut rounds: Vec<(IpAddr, IpAddr)> =
        leases.rounds().filter(|(pool, ..)| pool.is_empty()).map(|(_, set, last)| (set, last)).collect();
    rounds.sort_unstable();
    for (set, (_, last)) in rounds.into_iter().enumerate() {
        write(&folder.join(format!("{LAST}{set}")), last.to_string().as_bytes(), true)?;
        written.rounds += 1;
    }
    File::open(folder)?.sync_all()?;
    Ok(written)
}

fn lock(folder: &Path, make: bool) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(make).mode(0o600).custom_flags(FLAGS);
    let file = match options.open(folder.join(LOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !make => return Ok(None),
        opened => opened?,
    };
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        let error = io::Error::from(error);
        io::Error::new(
            error.kind(),
            format!("{} is locked by another program ({error}): stop the runtime, or try again", LOCK),
        )
    })?;
    Ok(Some(file))
}

// NONBLOCK is for a pipe in the place of a file, which would hold up the opening for ever.
const FLAGS: i32 = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits() as i32;

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The owner that a file names, if it names one that could be.
fn owner(bytes: &[u8], network: &str) -> Option<Owner> {
    let text = std::str::from_utf8(bytes).ok().filter(|text| text.len() as u64 <= MAX_FILE)?;
    let (container, ifname) = text.split_once('\n').unwrap_or((text, ""));
    let (container, ifname) = (container.trim(), ifname.trim());
    let odd = |c: char| c.is_control() || c.is_whitespace();
    let fits = !container.is_empty() && ifname.len() <= MAX_IFNAME && !container.contains(odd) && !ifname.contains(odd);
    fits.then(|| Owner { network: network.to_owned(), container: container.to_owned(), ifname: ifname.to_owned() })
}

/// Writes a file, or finds that it says the same already.
fn write(path: &Path, content: &[u8], replace: bool) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600).custom_flags(FLAGS);
    if replace {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if read(path)? == content {
                return Ok(());
            }
            let what =
                format!("{} is there already and names another owner: export into an empty folder", path.display());
            Err(io::Error::new(error.kind(), what))
        }
        opened => {
            let mut file = opened?;
            file.write_all(content)?;
            file.sync_all()
        }
    }
}
