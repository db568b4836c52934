//! `weft install-cni`: puts the plugin where the container runtime looks for it.
//!
//! Runtimes may execute the plugin at any moment, also while it is being replaced: so it is written beside the old one and then takes its
//! place. Repeating it is harmless, which makes it fit for an init container. Where the runtime's folder has no `loopback`, which every
//! sandbox needs before anything else, the plugin is put there by that name, too, and does its job.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use weft_api::folders::{CONTAINERD, Folders};

/// The plugin, and the name by which it does loopback's job.
const PLUGIN: &str = "weft-cni";
const LOOPBACK: &str = "loopback";

/// What `weft install-cni` takes.
#[derive(Args)]
pub struct Install {
    /// The plugin's file; without it, weft-cni beside this program.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// The runtime's folder of plugins; without it, what containerd's configuration says, or else /opt/cni/bin.
    #[arg(long, value_name = "FOLDER")]
    bin_dir: Option<PathBuf>,
}

/// Installs it.
pub fn install(args: &Install) -> anyhow::Result<()> {
    let from = match &args.from {
        Some(from) => from.clone(),
        None => {
            std::env::current_exe().context("cannot tell where this program is: use --from")?.with_file_name(PLUGIN)
        }
    };
    let plugin =
        fs::read(&from).with_context(|| format!("cannot read {}: name the plugin with --from", from.display()))?;
    if !plugin.starts_with(b"\x7fELF") {
        bail!("{} is not a program: name weft-cni with --from", from.display());
    }
    let folder = args.bin_dir.clone().unwrap_or_else(|| Folders::of(Path::new(CONTAINERD)).plugins);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    // A loopback that is our own of an earlier release is replaced like the plugin itself.
    let loopback = folder.join(LOOPBACK);
    let is_ours = match (fs::read(&loopback), fs::read(folder.join(PLUGIN))) {
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => true,
        (Ok(there), Ok(old)) => there == old || there == plugin,
        (Ok(there), Err(_)) => there == plugin,
        (Err(error), _) => bail!("cannot read {}: {error}", loopback.display()),
    };
    let mut names = vec![PLUGIN];
    names.extend(is_ours.then_some(LOOPBACK));
    // loopback first: as long as the old plugin is there, it can be told from another's.
    for name in names.into_iter().rev() {
        let path = folder.join(name);
        let told = if place(&path, &plugin).with_context(|| format!("cannot install {}", path.display()))? {
            "installed"
        } else {
            "is up to date:"
        };
        println!("{told} {}", path.display());
    }
    Ok(())
}

/// Whether it had to be written.
fn place(path: &Path, content: &[u8]) -> io::Result<bool> {
    let executable = |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o777 == 0o755);
    if fs::read(path).is_ok_and(|there| there == content) && executable(path) {
        return Ok(false);
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut unfinished = tempfile::Builder::new().prefix(".weft-").tempfile_in(folder)?;
    io::Write::write_all(&mut unfinished, content)?;
    unfinished.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
    unfinished.as_file().sync_all()?;
    unfinished.persist(path)?;
    File::open(folder)?.sync_all()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(folder: &Path, plugin: &[u8]) -> anyhow::Result<()> {
        let from = folder.join("from");
        fs::write(&from, plugin)?;
        install(&Install { from: Some(from), bin_dir: Some(folder.join("bin")) })
    }

    #[test]
    fn it_can_be_repeated_and_leaves_a_foreign_loopback_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| fs::read(folder.path().join("bin").join(name)).unwrap();
        run(folder.path(), b"\x7fELF one").unwrap();
        run(folder.path(), b"\x7fELF one").unwrap();
        assert_eq!((file(PLUGIN), file(LOOPBACK)), (b"\x7fELF one".to_vec(), b"\x7fELF one".to_vec()));
        run(folder.path(), b"\x7fELF two").unwrap();
        assert_eq!((file(PLUGIN), file(LOOPBACK)), (b"\x7fELF two".to_vec(), b"\x7fELF two".to_vec()));
        fs::write(folder.path().join("bin/loopback"), "theirs").unwrap();
        run(folder.path(), b"\x7fELF three").unwrap();
        assert_eq!((file(PLUGIN), file(LOOPBACK)), (b"\x7fELF three".to_vec(), b"theirs".to_vec()));
        let mode = fs::metadata(folder.path().join("bin/weft-cni")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let left = fs::read_dir(folder.path().join("bin")).unwrap().count();
        assert_eq!(left, 2, "nothing unfinished is left");
    }

    #[test]
    fn what_is_no_program_is_not_installed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(run(folder.path(), b"#!/bin/sh").unwrap_err().to_string().contains("not a program"));
        assert!(!folder.path().join("bin").exists());
    }
}
