//! Settings of the kernel's network, below `/proc/sys/net`, of the namespace that the thread is in.
//!
//! In a container that folder is read-only, as it should be for most. A container of weftd's is given it a second time, at
//! [`OF_CONTAINERS`], for what concerns its pods' interfaces and its own: a mount of it shows each thread its own namespace, too.

use std::io;
use std::path::{Path, PathBuf};

use crate::shortage::is_shortage;

/// Where it is.
const USUAL: &str = "/proc/sys/net";

/// Where a container has it to be written.
const OF_CONTAINERS: &str = "/host/proc/sys/net";

/// Whether there is such a setting, or a folder of settings.
pub fn exists(name: &str) -> bool {
    Path::new(USUAL).join(name).exists()
}

/// Sets what is called `name`, such as `ipv6/conf/eth0/accept_dad`, if it has another value.
///
/// # Errors
/// The kernel's, with the path: there is no such setting, or it may not be written here either.
pub fn set(name: &str, value: &str) -> io::Result<()> {
    set_below([USUAL, OF_CONTAINERS].map(Path::new), name, value)
}

/// Writes to what does something when it is written to, such as `ipv4/route/flush`, and cannot be read.
///
/// # Errors
/// The kernel's.
pub fn trigger(name: &str) -> io::Result<()> {
    match std::fs::write(Path::new(USUAL).join(name), "0") {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            std::fs::write(Path::new(OF_CONTAINERS).join(name), "0")
        }
        result => result,
    }
}

fn set_below(folders: [&Path; 2], name: &str, value: &str) -> io::Result<()> {
    let [usual, other] = folders.map(|folder| folder.join(name));
    let named = |path: &PathBuf, error: io::Error| match is_shortage(&error) {
        true => error,
        false => io::Error::new(error.kind(), format!("{}: {error}", path.display())),
    };
    if std::fs::read_to_string(&usual).map_err(|error| named(&usual, error))?.trim() == value {
        return Ok(());
    }
    match std::fs::write(&usual, value) {
        // The mount is missing where nobody thought of it: then it is the first refusal that says what is wrong.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem && other.exists() => {
            std::fs::write(&other, value).map_err(|error| named(&other, error))
        }
        result => result.map_err(|error| named(&usual, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_already_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("accept_dad");
        std::fs::write(&path, "0\n").unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        let folders = [folder.path(), Path::new("/nowhere")];
        set_below(folders, "accept_dad", "0").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "0\n", "as it was, newline and all");
        let error = set_below(folders, "no_such", "0").unwrap_err();
        assert!(error.to_string().contains("no_such"), "{error}");
    }
}
