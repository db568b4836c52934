//! Which pods' network namespaces are still there.
//!
//! A lease outlives weftd, so what it remembers of its pod has to tell that pod from all others, later and in another process. Paths and
//! inodes do not, for the kernel gives them away again; a namespace's cookie does, until the next boot, and with the boot id for ever.
//!
//! Two things say that a namespace is gone, and both come from the kernel; that nobody has seen it means nothing, for weftd may be in a
//! container that shows it neither processes nor mounts:
//!
//! - From Linux 6.18 on it can be opened by its cookie ([`weft_router::port::sys::namespace::lives`]).
//! - Before, it gets a number in weftd's own namespace (`RTM_NEWNSID`) when the pod is attached. The number goes when the namespace does, and
//!   is drawn at random, so that it does not come back by itself.
//!
//! Where neither works (before 5.14 there are no cookies), only a boot makes a lease stale, and DEL and GC free the others.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::io::Errno;
use weft_ipam::{Facts, Netns, NetnsNumber};
use weft_router::port::sys::namespace as kernel;

use super::namespace::Namespace;
use super::{DRAWS, random};
use crate::netlink::Netlink;

/// A boot id has 36 bytes; a file of tests may have other content, but not any.
const MAX_BOOT_ID: u64 = 128;

/// What this process needs to know to tell the living from the dead.
#[derive(Debug)]
pub struct Census {
    boot: String,
    /// Weftd's own namespace.
    own: Option<Netns>,
}

/// What became of a lease's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is there.
    Lives,
    /// It is gone.
    Gone,
    /// Nobody can tell.
    Unknown,
}

/// One look at all namespaces.
#[derive(Debug)]
pub struct Look<'a> {
    census: &'a Census,
    by_handle: bool,
    /// Who is asked about numbers; opened by the first who needs it.
    netlink: Option<Netlink>,
}

impl Census {
    /// Reads the boot id, and finds out who we are.
    pub fn new(boot_id: &Path) -> Census {
        let boot = read_boot_id(boot_id).unwrap_or_else(|error| {
            tracing::warn!(path = %boot_id.display(), %error, "the boot id cannot be read: leases from before a boot stay until DEL or GC");
            String::new()
        });
        let own = File::open("/proc/thread-self/ns/net").ok();
        let own = own.and_then(|file| {
            Some(Netns { cookie: kernel::cookie().ok()?, inode: inode(file.as_fd()).ok()?, number: None })
        });
        Census { boot, own }
    }

    /// The id of this boot; empty if it is not known.
    pub fn boot(&self) -> &str {
        &self.boot
    }

    /// What is to be remembered of a pod's namespace.
    pub fn describe(&self, namespace: &Namespace) -> Option<Netns> {
        let mut netns = namespace.netns()?;
        if !self.finds_by_handle() {
            netns.number = self.own.and_then(|own| match number(namespace.as_fd()) {
                Ok(id) => Some(NetnsNumber { home: own.cookie, id }),
                Err(error) => {
                    tracing::debug!(%error, "a namespace gets no number");
                    None
                }
            });
        }
        Some(netns)
    }

    /// A look at what is there now.
    pub fn look(&self) -> Look<'_> {
        Look { census: self, by_handle: self.finds_by_handle(), netlink: None }
    }

    /// Whether namespaces can be found by their cookies: the one that is there for sure is.
    fn finds_by_handle(&self) -> bool {
        self.own.is_some_and(|own| lives(own).is_ok_and(|lives| lives))
    }
}

impl Look<'_> {
    /// What became of the namespace that `facts` remember.
    pub fn fate(&mut self, facts: &Facts) -> Fate {
        if !facts.boot.is_empty() && !self.census.boot.is_empty() && facts.boot != self.census.boot {
            return Fate::Gone;
        }
        let Some(netns) = facts.netns.filter(|_| facts.boot == self.census.boot) else { return Fate::Unknown };
        if self.by_handle {
            match lives(netns) {
                Ok(true) => return Fate::Lives,
                Ok(false) => return Fate::Gone,
                Err(_) => {}
            }
        }
        match netns.number.filter(|number| self.census.own.is_some_and(|own| own.cookie == number.home)) {
            Some(number) => self.fate_of_number(number.id),
            None => Fate::Unknown,
        }
    }

    fn fate_of_number(&mut self, id: i32) -> Fate {
        if self.netlink.is_none() {
            self.netlink = Netlink::open().ok();
        }
        match self.netlink.as_mut().map(|netlink| netlink.has_namespace(id)) {
            Some(Ok(true)) => Fate::Lives,
            Some(Ok(false)) => Fate::Gone,
            Some(Err(_)) | None => Fate::Unknown,
        }
    }
}

/// The inode of a namespace's file.
pub fn inode(namespace: BorrowedFd<'_>) -> rustix::io::Result<u64> {
    Ok(rustix::fs::fstat(namespace)?.st_ino)
}

fn lives(netns: Netns) -> io::Result<bool> {
    kernel::lives(netns.cookie, u32::try_from(netns.inode).map_err(io::Error::other)?)
}

/// The number that a namespace has here; gives it one if it has none.
fn number(namespace: BorrowedFd<'_>) -> io::Result<i32> {
    let mut netlink = Netlink::open()?;
    for _ in 0..DRAWS {
        let drawn = i32::from_ne_bytes(random()?) & i32::MAX;
        match netlink.number_namespace(namespace, drawn) {
            Ok(()) => return Ok(drawn),
            // Either the namespace has a number, or another one has this one.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        if let Some(known) = netlink.namespace_number(namespace)? {
            return Ok(known);
        }
    }
    Err(Errno::EXIST.into())
}

fn read_boot_id(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_BOOT_ID + 1).read_to_string(&mut text)?;
    let id = text.trim();
    if id.is_empty() || text.len() as u64 > MAX_BOOT_ID || id.chars().any(char::is_control) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no boot id"));
    }
    Ok(id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    fn census() -> Census {
        Census::new(Path::new("/proc/sys/kernel/random/boot_id"))
    }

    /// A namespace, and what is remembered of it, once with a number.
    fn pod(census: &Census) -> (OwnedFd, [Facts; 2]) {
        let fd = kernel::new_network().unwrap();
        let namespace = Namespace::check(Some(fd.try_clone().unwrap()), "/x").unwrap();
        let netns = census.describe(&namespace).unwrap();
        let home = census.own.unwrap().cookie;
        let numbered =
            Netns { cookie: 1 << 62, number: Some(NetnsNumber { home, id: number(fd.as_fd()).unwrap() }), ..netns };
        let facts = |netns| Facts { boot: census.boot().to_owned(), netns: Some(netns), ..Facts::default() };
        (fd, [facts(netns), facts(numbered)])
    }

    #[test]
    fn a_namespace_is_there_until_it_is_not() {
        let census = census();
        let (fd, [facts, numbered]) = pod(&census);
        let by_number = |facts: &Facts| Look { census: &census, by_handle: false, netlink: None }.fate(facts);
        assert_eq!(census.look().fate(&facts), Fate::Lives);
        assert_eq!(by_number(&numbered), Fate::Lives);
        assert_eq!(number(fd.as_fd()).unwrap(), numbered.netns.unwrap().number.unwrap().id, "it keeps its number");
        drop(fd);
        let gone = || census.look().fate(&facts) == Fate::Gone && by_number(&numbered) == Fate::Gone;
        assert!((0..6000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            gone()
        }));
    }

    #[test]
    fn who_lives_does_so_whoever_else_comes_and_goes() {
        let census = census();
        let pods: Vec<(OwnedFd, [Facts; 2])> = (0..60).map(|_| pod(&census)).collect();
        let until = std::time::Instant::now() + Duration::from_secs(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while std::time::Instant::now() < until {
                    drop(pod(&census));
                }
            });
            while std::time::Instant::now() < until {
                let mut look = Look { census: &census, by_handle: false, netlink: None };
                assert!(pods.iter().all(|(_, [_, numbered])| look.fate(numbered) == Fate::Lives));
            }
        });
    }

    #[test]
    fn what_is_not_known_lives_and_another_boot_is_the_end() {
        let census = census();
        let (_fd, [facts, numbered]) = pod(&census);
        assert_eq!(census.look().fate(&Facts::default()), Fate::Unknown);
        let imported = Facts { netns: None, ..facts.clone() };
        assert_eq!(census.look().fate(&imported), Fate::Unknown);
        for of_old in [&facts, &imported] {
            assert_eq!(census.look().fate(&Facts { boot: "before".into(), ..of_old.clone() }), Fate::Gone);
        }
        // A number counts in the namespace in which it was given, and there only.
        let mut elsewhere = numbered;
        elsewhere.netns.as_mut().unwrap().number.as_mut().unwrap().home ^= 1;
        assert_eq!(Look { census: &census, by_handle: false, netlink: None }.fate(&elsewhere), Fate::Unknown);
        let blind = Census { boot: String::new(), own: None };
        assert_eq!(blind.look().fate(&facts), Fate::Unknown);
    }

    #[test]
    fn a_boot_id_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("boot");
        for (text, expected) in [("b1\n", Some("b1")), ("", None), ("a\nb", None), (&"x".repeat(200), None)] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_boot_id(&path).ok().as_deref(), expected);
        }
        assert!(read_boot_id(folder.path()).is_err());
    }
}
