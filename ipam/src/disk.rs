//! What the journal needs of a disk, and the disk that is a folder.
//!
//! The trait is small so that a test can stand in its place, record every write and replay any crash: the journal
//! promises durability in terms of these eight calls and nothing else. A write or truncation may be lost, torn or
//! reordered by a crash until `sync` of that file has returned; a `rename` until `sync_folder` has.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::error::OpenError;
use crate::journal::MAX_JOURNAL;

/// Name of the journal in the store's folder.
pub const JOURNAL_FILE: &str = "leases.journal";
/// Name of the file that becomes the journal when a compaction is complete; a left-over one means nothing.
pub const NEXT_FILE: &str = "leases.journal.new";
/// Name of the file that the writer holds locked; it contains the writer's pid.
pub const LOCK_FILE: &str = "lock";

/// Which of the two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Which {
    /// The journal.
    Journal,
    /// The journal-to-be, while it is compacted.
    Next,
}

/// Where a journal lives. See the module for what each call promises.
pub trait Disk: Send {
    /// The journal's whole content; `None` if there is none.
    fn load(&mut self) -> io::Result<Option<Vec<u8>>>;
    /// Makes [`Which::Next`] an empty file, whatever it was.
    fn create_next(&mut self) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`. After an error any part of them may have been written.
    fn write(&mut self, file: Which, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was written to `file`, and its length, survive a crash.
    fn sync(&mut self, file: Which) -> io::Result<()>;
    /// Cuts the journal to `length` bytes.
    fn truncate(&mut self, length: u64) -> io::Result<()>;
    /// Lets [`Which::Next`] take the place of the journal.
    fn rename(&mut self) -> io::Result<()>;
    /// Makes a rename survive a crash.
    fn sync_folder(&mut self) -> io::Result<()>;
    /// Removes [`Which::Next`]; it is no error if there is none.
    fn remove_next(&mut self) -> io::Result<()>;
}

/// A folder of a file system, locked against a second writer.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    folder: File,
    journal: Option<File>,
    next: Option<File>,
    // Held for its lock, which ends with the descriptor, however the process ends.
    _lock: File,
}

impl Folder {
    /// Makes the folder if need be and locks it.
    pub(crate) fn lock(path: &Path) -> Result<Self, OpenError> {
        let context = |action| move |source| OpenError::Io { action, path: path.to_owned(), source };
        make_folder(path).map_err(context("create"))?;
        let folder = File::open(path).map_err(context("open"))?;
        let mut lock = private().truncate(false).open(path.join(LOCK_FILE)).map_err(context("lock"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(OpenError::Locked { path: path.to_owned(), pid: holder(&mut lock) });
            }
            Err(errno) => return Err(context("lock")(errno.into())),
        }
        let pid = format!("{}\n", std::process::id());
        // The pid only serves the message of a second writer; a full disk must not stop the first.
        let _ = lock.set_len(0).and_then(|()| lock.write_all_at(pid.as_bytes(), 0));
        Ok(Self { path: path.to_owned(), folder, journal: None, next: None, _lock: lock })
    }

    fn open(&mut self, file: Which) -> io::Result<&File> {
        let opened = match file {
            Which::Journal => &self.journal,
            Which::Next => &self.next,
        };
        opened.as_ref().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the file was not opened"))
    }
}

impl Disk for Folder {
    fn load(&mut self) -> io::Result<Option<Vec<u8>>> {
        let options = OpenOptions::new().read(true).write(true).custom_flags(FLAGS).clone();
        let Some((file, bytes)) = read(&options, &self.path)? else { return Ok(None) };
        self.journal = Some(file);
        Ok(Some(bytes))
    }

    fn create_next(&mut self) -> io::Result<()> {
        self.remove_next()?;
        self.next = Some(private().create_new(true).open(self.path.join(NEXT_FILE))?);
        Ok(())
    }

    fn write(&mut self, file: Which, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.open(file)?.write_all_at(bytes, offset)
    }

    fn sync(&mut self, file: Which) -> io::Result<()> {
        self.open(file)?.sync_data()
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.open(Which::Journal)?.set_len(length)
    }

    fn rename(&mut self) -> io::Result<()> {
        std::fs::rename(self.path.join(NEXT_FILE), self.path.join(JOURNAL_FILE))?;
        self.journal = self.next.take();
        Ok(())
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        self.folder.sync_all()
    }

    fn remove_next(&mut self) -> io::Result<()> {
        self.next = None;
        match std::fs::remove_file(self.path.join(NEXT_FILE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// The journal of the store in `folder`, without the lock: the writer may be at work.
pub(crate) fn load_unlocked(folder: &Path) -> io::Result<Option<Vec<u8>>> {
    let options = OpenOptions::new().read(true).custom_flags(FLAGS).clone();
    Ok(read(&options, folder)?.map(|(_, bytes)| bytes))
}

// NONBLOCK is for a pipe in the place of a file, which would hold up the opening for ever.
const FLAGS: i32 = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits() as i32;

fn private() -> OpenOptions {
    OpenOptions::new().read(true).write(true).create(true).mode(0o600).custom_flags(FLAGS).clone()
}

fn read(options: &OpenOptions, folder: &Path) -> io::Result<Option<(File, Vec<u8>)>> {
    let file = match options.open(folder.join(JOURNAL_FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the journal is not a plain file"));
    }
    let mut bytes = Vec::new();
    (&file).take(MAX_JOURNAL + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_JOURNAL {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than any journal that is written here"));
    }
    Ok(Some((file, bytes)))
}

/// Makes the folder and makes its name durable: a lease is not, if the folder around it vanishes.
fn make_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    // The topmost folder that is made is a name in one that existed, so that one counts as well.
    let made = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.is_dir()).count();
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    for parent in path.ancestors().skip(1).take(made) {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn holder(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
