//! `weft ipam`: the lease store, with weftd or without it.
//!
//! Looking reads the journal itself, which weftd may be writing meanwhile. Changing asks weftd if it runs; if it does not, the store is opened
//! here. What needs the store for itself (`fsck --repair`, `import`) is refused while weftd has it, by its process id.

mod foreign;
mod fsck;
mod leases;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use weft_ipam::Store;

/// Folder of the lease store below the state folder.
const LEASES: &str = "leases";
/// Where the kernel tells one boot from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// `weft ipam …`.
#[derive(Subcommand)]
pub enum Command {
    /// Every lease and reservation.
    Ls(View),
    /// One lease, with all that is known of it.
    Show {
        /// An address, a container id or its beginning, or the name of a pod.
        what: String,
        #[command(flatten)]
        view: View,
    },
    /// How full the ranges are. Asks weftd.
    Ranges {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Look for damage in the lease store. Changes nothing without --repair. Exits with 3 if there is any.
    Fsck {
        /// Write a journal of what can be saved; the damaged one is kept beside it. weftd must not run.
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        view: View,
    },
    /// Take over a folder of the host-local plugin, e.g. /var/lib/cni/networks/NAME: its pods keep their addresses. weftd must not run.
    Import {
        /// The network's folder; or the one above, with a folder for each network.
        folder: PathBuf,
        /// The network's name; the folder's if absent.
        #[arg(long)]
        network: Option<String>,
        /// Where this boot is told from others: what is imported ends with it.
        #[arg(long, value_name = "FILE", default_value = BOOT_ID)]
        boot_id: PathBuf,
        #[command(flatten)]
        view: View,
    },
    /// Write leases as the host-local plugin has them.
    Export {
        /// The network's folder, which is made.
        folder: PathBuf,
        /// The network; the folder's name if absent, or the only network there is.
        #[arg(long)]
        network: Option<String>,
        #[command(flatten)]
        view: View,
    },
    /// Keep an address from being given. (Whole prefixes: `leases.reserved` in weftd's configuration.)
    Reserve {
        /// The address.
        address: std::net::IpAddr,
        /// What for.
        #[arg(long, default_value = "")]
        note: String,
        #[command(flatten)]
        store: Place,
    },
    /// Free a lease or a reservation by hand. Its pod, if it still runs, is cut off.
    Release {
        /// An address, or a container id.
        what: String,
        #[command(flatten)]
        store: Place,
    },
}

/// Which store.
#[derive(Args)]
pub struct Place {
    /// weftd's state_dir.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/weft")]
    state_dir: PathBuf,
}

/// Which store, and how to show it.
#[derive(Args)]
pub struct View {
    #[command(flatten)]
    store: Place,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Place {
    fn folder(&self) -> PathBuf {
        self.state_dir.join(LEASES)
    }

    /// The store, for writing.
    fn open(&self) -> anyhow::Result<Store> {
        let folder = self.folder();
        if !folder.is_dir() {
            anyhow::bail!(
                "there is no lease store in {}: name weftd's state_dir with --state-dir",
                self.state_dir.display()
            );
        }
        open(&folder)
    }
}

/// Does what the command says; the exit code.
pub fn run(command: Command, socket: &Path) -> anyhow::Result<u8> {
    match command {
        Command::Ls(view) => leases::list(&view),
        Command::Show { what, view } => leases::show(&what, &view),
        Command::Ranges { json } => leases::ranges(socket, json),
        Command::Fsck { repair, view } => return fsck::run(repair, &view),
        Command::Import { folder, network, boot_id, view } => foreign::import(&folder, network, &boot_id, &view),
        Command::Export { folder, network, view } => foreign::export(&folder, network, &view),
        Command::Reserve { address, note, store } => leases::reserve(address, note, &store, socket),
        Command::Release { what, store } => leases::release(&what, &store, socket),
    }?;
    Ok(0)
}

fn open(folder: &Path) -> anyhow::Result<Store> {
    let store = Store::open(folder).map_err(explained)?;
    Ok(store)
}

/// What to do about a store that somebody else has.
fn explained(error: weft_ipam::OpenError) -> anyhow::Error {
    let locked = matches!(error, weft_ipam::OpenError::Locked { .. });
    let error = anyhow::Error::new(error);
    if locked { error.context("stop weftd first, for this needs the lease store for itself") } else { error }
}

fn read(view: &Place) -> anyhow::Result<weft_ipam::Leases> {
    let folder = view.folder();
    let (leases, _) = Store::read_only(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(leases)
}
