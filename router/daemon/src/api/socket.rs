//! The unix socket: who may see it, and whose it is.
//!
//! It is made with mode 0600 (set on the socket before it gets its name, so that it never has another; the process's
//! umask would be everybody's), in a folder that is made with mode 0700 if it is not there. A file that a dead daemon
//! left is replaced; a living one is an error, and so is any file that is no socket.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener as Unwatched, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;

use crate::shortage::is_shortage;

/// Clients that the kernel keeps waiting until they are accepted.
const BACKLOG: i32 = 4096;

/// The listening socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct Bound {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that nobody else's file is removed in the end.
    file: (u64, u64),
    /// Given up for a moment to turn a client away when no descriptor is left for it.
    spare: Mutex<Option<File>>,
}

/// A client that has connected.
#[derive(Debug)]
pub struct Arrived {
    /// Its connection.
    pub stream: UnixStream,
    /// Who it is. Of its process nothing is known: it may be outside of weftd's own namespace, and has no number there.
    pub uid: u32,
    /// It has the last descriptor: it is to be told so and no more.
    pub last: bool,
}

impl Bound {
    /// Listens at `path`. To be called inside a tokio runtime.
    ///
    /// # Errors
    /// What is in the way, and what to do.
    pub fn new(path: &Path) -> anyhow::Result<Bound> {
        if let Some(folder) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .with_context(|| format!("cannot make the socket's folder {}", folder.display()))?;
        }
        make_room(path)?;
        let listener = listen(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        let stat = fs::symlink_metadata(path).with_context(|| format!("{} vanished", path.display()))?;
        let spare = Mutex::new(File::open("/").ok());
        Ok(Bound { listener, path: path.to_owned(), file: (stat.dev(), stat.ino()), spare })
    }

    /// The next client.
    pub async fn accept(&self) -> io::Result<Arrived> {
        self.restock();
        let accepted = match self.listener.accept().await {
            // The kernel looks for a descriptor before it looks for a client, so there may be none yet; by the time one comes, there
            // may be room again.
            Err(error) if is_shortage(&error) && self.give_up_spare() => self.listener.accept().await,
            accepted => accepted,
        };
        let (stream, _) = accepted?;
        let last = !self.restock();
        let uid = stream.peer_cred()?.uid();
        Ok(Arrived { stream: stream.into_std()?, uid, last })
    }

    /// Whether there is a spare descriptor now.
    fn restock(&self) -> bool {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.is_none() {
            *spare = File::open("/").ok();
        }
        spare.is_some()
    }

    fn give_up_spare(&self) -> bool {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|stat| (stat.dev(), stat.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn make_room(path: &Path) -> anyhow::Result<()> {
    let stat = match fs::symlink_metadata(path) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    };
    if !stat.file_type().is_socket() {
        bail!("{} is there and is no socket: move it away, or configure another socket", path.display());
    }
    match knock(path) {
        // EAGAIN: someone listens, but is stopped or so busy that the backlog is full.
        Ok(()) | Err(Errno::AGAIN) => {
            bail!("another weftd listens at {}: stop it, or configure another socket", path.display())
        }
        Err(Errno::CONNREFUSED) => {
            fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {}", path.display()))
        }
        Err(error) => Err(error).with_context(|| format!("cannot tell whose socket {} is", path.display())),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = unconnected()?;
    // The file takes its mode from the socket's inode, see unix_bind_bsd in
    // https://github.com/torvalds/linux/blob/v6.12/net/unix/af_unix.c
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(Unwatched::from(socket))
}

/// Whether someone listens at `path`, without waiting for them.
fn knock(path: &Path) -> rustix::io::Result<()> {
    rustix::net::connect(&unconnected()?, &SocketAddrUnix::new(path)?)
}

fn unconnected() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/weftd.sock");
        let bound = Bound::new(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        let error = Bound::new(&path).unwrap_err();
        assert!(error.to_string().starts_with("another weftd listens at"), "{error}");
        drop(bound);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weftd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let bound = Bound::new(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(bound);
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert!(Bound::new(&path).unwrap_err().to_string().contains("is no socket"));
    }

    #[tokio::test]
    async fn a_daemon_that_is_stopped_with_a_full_backlog_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weftd.sock");
        let stopped = unconnected().unwrap();
        rustix::net::bind(&stopped, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&stopped, 0).unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        assert_eq!(knock(&path), Err(Errno::AGAIN));
        let error = Bound::new(&path).unwrap_err();
        assert!(error.to_string().starts_with("another weftd listens at"), "{error}");
        drop(waiting);
    }
}
