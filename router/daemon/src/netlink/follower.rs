//! Following what the kernel tells of links, addresses, routes, rules and neighbours: the thread, for those who make something of it.
//!
//! A [`Follow`] is asked what is due, told what the kernel has told, and woken when somebody has something new for it; between that its thread
//! sleeps. It belongs to the network namespace of whoever started it. Each has a thread of its own, for one may have thousands of routes to read
//! while another has a next hop to tell of. The thread ends when its [`Follower`] goes.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use weft_encap::mac::Mac;

use super::Netlink;
use super::paths::{Change, Neighbour};

/// How often [`Follow::tick`] is called.
const TICK: Duration = Duration::from_secs(1);

/// Somebody who follows the kernel.
pub trait Follow: Send + 'static {
    /// The thread's name.
    const THREAD: &'static str;
    /// The thread's stack, in bytes.
    const STACK: usize;

    /// Does what is due; says when to ask again, if nothing happens until then.
    fn work(&mut self, kernel: &mut Netlink) -> Option<Instant>;

    /// A second is over.
    fn tick(&mut self, kernel: &mut Netlink);

    /// Somebody has something new: [`Follower::wake`].
    fn woken(&mut self);

    /// The kernel has told.
    ///
    /// # Errors
    /// What is known can no longer be kept in step.
    fn told(&mut self, changes: &[Change], kernel: &mut Netlink) -> io::Result<()>;

    /// Notices cannot be read any more: this is the end.
    fn lost(&mut self, error: &io::Error);

    /// What else is listened to.
    fn beside(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// There is something to read beside.
    fn heard(&mut self) {}
}

/// The thread, as others see it.
#[derive(Debug)]
pub struct Follower(Arc<Wake>);

/// Told when there is something new, and when nobody wants to know any more.
#[derive(Debug)]
struct Wake {
    fd: OwnedFd,
    has_ended: AtomicBool,
}

impl Follower {
    /// Starts it, in the namespace of the calling thread.
    ///
    /// # Errors
    /// There are no descriptors or threads left, or netlink is not allowed.
    pub fn start<F: Follow>(mut follow: F) -> anyhow::Result<Follower> {
        let mut notices = Netlink::follow_paths().context("cannot follow the kernel's routes and neighbours")?;
        let mut kernel = Netlink::open().context("cannot open a netlink socket")?;
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")?;
        let wake = Arc::new(Wake { fd, has_ended: AtomicBool::new(false) });
        let follower = Follower(Arc::clone(&wake));
        let run = move || {
            // What was told before the socket was open was told to nobody.
            let followed = follow
                .told(&[Change::Everything], &mut kernel)
                .and_then(|()| run(&mut follow, &mut notices, &mut kernel, &wake));
            if let Err(error) = followed {
                follow.lost(&error);
            }
        };
        let builder = thread::Builder::new().name(F::THREAD.into()).stack_size(F::STACK);
        builder.spawn(run).context("cannot start a thread (ulimit -u)")?;
        Ok(follower)
    }

    /// Has [`Follow::woken`] be called.
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.0.fd, &1_u64.to_ne_bytes());
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Release);
        self.wake();
    }
}

fn run<F: Follow>(follow: &mut F, notices: &mut Netlink, kernel: &mut Netlink, wake: &Wake) -> io::Result<()> {
    let mut ticked = Instant::now();
    loop {
        let due = follow.work(kernel);
        if ticked.elapsed() >= TICK {
            ticked = Instant::now();
            follow.tick(kernel);
        }
        let patience = TICK.saturating_sub(ticked.elapsed());
        let patience = due.map_or(patience, |due| patience.min(due.saturating_duration_since(Instant::now())));
        let [woken, told, heard] = wait(follow, notices, wake, patience)?;
        if wake.has_ended.load(Ordering::Acquire) {
            return Ok(());
        }
        if woken {
            let _ = rustix::io::read(&wake.fd, &mut [0_u8; 8]);
            follow.woken();
        }
        if told {
            let changes = notices.changes()?;
            follow.told(&changes, kernel)?;
        }
        if heard {
            follow.heard();
        }
    }
}

/// Sleeps until there is something to do: whether it was woken, told something, or there is something beside.
fn wait<F: Follow>(follow: &F, notices: &Netlink, wake: &Wake, patience: Duration) -> io::Result<[bool; 3]> {
    let patience = Timespec { tv_sec: patience.as_secs() as _, tv_nsec: patience.subsec_nanos().into() };
    let (beside, events) = match follow.beside() {
        Some(beside) => (beside, PollFlags::IN),
        // There is always one, and nothing is asked of it.
        None => (notices.readable(), PollFlags::empty()),
    };
    let mut ready = [
        PollFd::new(&wake.fd, PollFlags::IN),
        PollFd::from_borrowed_fd(notices.readable(), PollFlags::IN),
        PollFd::from_borrowed_fd(beside, events),
    ];
    match poll(&mut ready, Some(&patience)) {
        Ok(_) => Ok(ready.map(|fd| !fd.revents().is_empty())),
        Err(rustix::io::Errno::INTR) => Ok([false; 3]),
        Err(error) => Err(error.into()),
    }
}

/// All neighbours with a MAC, by device and address, and whether they have been silent for a while.
#[derive(Debug, Default)]
pub struct Neighbours(HashMap<(u32, IpAddr), (Mac, bool)>);

impl Neighbours {
    /// Takes a neighbour's new state in. Returns whether any way may have changed by that.
    pub fn take(&mut self, neighbour: Neighbour) -> bool {
        let key = (neighbour.device, neighbour.address);
        match neighbour.mac {
            Some(mac) => self.0.insert(key, (mac, neighbour.is_stale)).is_none_or(|(old, _)| old != mac),
            None => self.0.remove(&key).is_some(),
        }
    }

    /// Asks for all of them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn learn(&mut self, kernel: &mut Netlink) -> io::Result<()> {
        let all = kernel.neighbours()?;
        self.0.clear();
        for neighbour in all {
            self.take(neighbour);
        }
        Ok(())
    }
}

impl Deref for Neighbours {
    type Target = HashMap<(u32, IpAddr), (Mac, bool)>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Neighbours {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Says what is done with it.
    struct Told(Sender<&'static str>);

    impl Follow for Told {
        const THREAD: &'static str = "told";
        const STACK: usize = 256 << 10;

        fn work(&mut self, _: &mut Netlink) -> Option<Instant> {
            None
        }

        fn tick(&mut self, _: &mut Netlink) {
            let _ = self.0.send("tick");
        }

        fn woken(&mut self) {
            let _ = self.0.send("woken");
        }

        fn told(&mut self, changes: &[Change], _: &mut Netlink) -> io::Result<()> {
            let is_first = changes == [Change::Everything];
            let _ = self.0.send(if is_first { "everything" } else { "told" });
            Ok(())
        }

        fn lost(&mut self, _: &io::Error) {}
    }

    /// Waits for that.
    fn expect(said: &Receiver<&'static str>, what: &str) {
        while said.recv_timeout(Duration::from_secs(10)).expect("it says something") != what {}
    }

    #[test]
    fn a_follower_learns_everything_first_is_woken_and_ends_with_its_handle() {
        let (say, said) = channel();
        let follower = Follower::start(Told(say)).unwrap();
        expect(&said, "everything");
        follower.wake();
        expect(&said, "woken");
        expect(&said, "tick");
        drop(follower);
        // The thread is gone, and what it held.
        while said.recv_timeout(Duration::from_secs(10)) != Err(std::sync::mpsc::RecvTimeoutError::Disconnected) {}
    }

    #[test]
    fn a_neighbour_is_news_once() {
        let mut all = Neighbours::default();
        let at = |mac| Neighbour { device: 2, address: [10, 0, 0, 1].into(), mac, is_stale: false };
        let mac = Some(Mac([2, 0, 0, 0, 0, 1]));
        assert!(all.take(at(mac)) && !all.take(at(mac)) && all.take(at(None)) && !all.take(at(None)));
    }
}
