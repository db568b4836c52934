//! A disk that forgets: what the journal wrote, as a file system and a drive may leave it after a crash.
//!
//! A file is sectors of 512 bytes and a length. A write changes the cache and logs each sector it touches, whole, and
//! the new length; `sync` makes the log durable. A crash keeps any subset of the log: so writes are lost, torn at 512
//! bytes, and reordered, and the length may be kept without the bytes (which then are zeros, or rubbish) or the bytes
//! without the length. Renames and other changes of the folder survive up to any point, in order, until `sync_folder`.
//!
//! A failed `sync` behaves as the worst kernels do: each dirty sector is written or *forgotten*, and the next `sync`
//! succeeds without having written the forgotten ones.

#![allow(dead_code, reason = "each test uses a part")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use weft_ipam::{Disk, Which};

const SECTOR: u64 = 512;
type Sector = [u8; SECTOR as usize];

/// SplitMix64: a seed says everything about a run.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Default)]
struct Content {
    sectors: BTreeMap<u64, Sector>,
    len: u64,
}

#[derive(Clone)]
enum Change {
    Sector(u64, Box<Sector>),
    Len(u64),
}

impl Content {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Sector(at, bytes) => drop(self.sectors.insert(*at, **bytes)),
            Change::Len(len) => {
                if *len <= self.len {
                    self.sectors.retain(|at, _| at * SECTOR < *len);
                    if let Some(last) = self.sectors.get_mut(&(len / SECTOR)) {
                        last[(len % SECTOR) as usize..].fill(0);
                    }
                }
                self.len = *len;
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.len as usize];
        for (at, sector) in &self.sectors {
            let start = (at * SECTOR) as usize;
            if start < out.len() {
                let n = (out.len() - start).min(sector.len());
                out[start..start + n].copy_from_slice(&sector[..n]);
            }
        }
        out
    }
}

#[derive(Clone, Default)]
struct File {
    durable: Content,
    cached: Content,
    log: Vec<Change>,
}

impl File {
    fn change(&mut self, change: Change) {
        self.cached.apply(&change);
        self.log.push(change);
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let (at, within) = ((offset + done as u64) / SECTOR, ((offset + done as u64) % SECTOR) as usize);
            let n = (SECTOR as usize - within).min(bytes.len() - done);
            let mut sector = self.cached.sectors.get(&at).copied().unwrap_or([0; SECTOR as usize]);
            sector[within..within + n].copy_from_slice(&bytes[done..done + n]);
            self.change(Change::Sector(at, Box::new(sector)));
            done += n;
        }
        if offset + bytes.len() as u64 > self.cached.len {
            self.change(Change::Len(offset + bytes.len() as u64));
        }
    }

    fn truncate(&mut self, len: u64) {
        self.change(Change::Len(len));
        if let Some(last) = self.cached.sectors.get(&(len / SECTOR)) {
            self.log.push(Change::Sector(len / SECTOR, Box::new(*last)));
        }
    }

    fn sync(&mut self) {
        for change in std::mem::take(&mut self.log) {
            self.durable.apply(&change);
        }
    }

    /// Keeps a random part of what is not durable; the rest is gone.
    fn lose(&mut self, rng: &mut Rng) {
        let keep = [0, 25, 50, 75, 100][rng.below(5) as usize];
        let before = self.durable.len;
        let mut lost = Vec::new();
        for change in std::mem::take(&mut self.log) {
            if rng.below(100) < keep {
                self.durable.apply(&change);
            } else if let Change::Sector(at, _) = change {
                lost.push(at);
            }
        }
        if rng.one_in(4) {
            let fresh = |at: &u64| at * SECTOR >= before;
            for at in lost.into_iter().filter(fresh).filter(|at| at * SECTOR < self.durable.len) {
                let rubbish = std::array::from_fn(|_| rng.next() as u8);
                self.durable.sectors.entry(at).or_insert(rubbish);
            }
        }
        // Nothing behind the end of a file can come to light by making it longer.
        self.durable.apply(&Change::Len(self.durable.len));
    }
}

/// What is to go wrong.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    /// The call, counted from here, in whose middle the machine or the process dies.
    pub die_at: Option<u64>,
    /// One in so many calls fails; 0 is none.
    pub fail_one_in: u64,
    /// Whether every write fails, as on a full disk.
    pub full: bool,
    /// Whether every sync fails.
    pub broken: bool,
}

#[derive(Clone, Default)]
struct State {
    files: Vec<File>,
    /// Which file bears which name, by [`slot`]: as seen now, and as durable.
    names: [Option<usize>; 2],
    durable_names: [Option<usize>; 2],
    name_log: Vec<[Option<usize>; 2]>,
    open: [Option<usize>; 2],
    faults: Faults,
    calls: u64,
    dead: bool,
    rng: Option<Rng>,
    /// What a sync takes.
    delay: Duration,
    /// Whether syncs wait, and whether one does.
    held: bool,
    waits: bool,
}

fn slot(which: Which) -> usize {
    match which {
        Which::Journal => 0,
        Which::Next => 1,
    }
}

/// A handle; all clones are the same disk.
#[derive(Clone, Default)]
pub struct Sim(Arc<Mutex<State>>);

impl Sim {
    /// A disk whose journal is `bytes`, durable.
    pub fn with_journal(bytes: &[u8]) -> Self {
        let sim = Self::default();
        let mut file = File::default();
        file.write(0, bytes);
        file.sync();
        {
            let mut state = sim.state();
            state.files.push(file);
            state.names[0] = Some(0);
            state.durable_names[0] = Some(0);
        }
        sim
    }

    /// An empty disk whose syncs take a while.
    pub fn slow(delay: Duration) -> Self {
        let sim = Self::default();
        sim.state().delay = delay;
        sim
    }

    /// Lets syncs wait, or go on.
    pub fn hold_syncs(&self, hold: bool) {
        self.state().held = hold;
    }

    /// Whether a sync waits.
    pub fn syncs_are_held(&self) -> bool {
        self.state().waits
    }

    fn wait_if_held(&self) -> bool {
        let mut state = self.state();
        state.waits = state.held;
        state.held
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn boxed(&self) -> Box<dyn Disk> {
        Box::new(self.clone())
    }

    pub fn set_faults(&self, faults: Faults, seed: u64) {
        let mut state = self.state();
        (state.faults, state.calls, state.rng) = (faults, 0, Some(Rng(seed)));
    }

    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// Calls since the faults were set.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// The journal as a reader sees it.
    pub fn journal(&self) -> Option<Vec<u8>> {
        let state = self.state();
        state.names[0].map(|i| state.files[i].cached.bytes())
    }

    /// The disk as the next boot finds it.
    pub fn after_power_loss(&self, rng: &mut Rng) -> Self {
        let mut state = self.state().clone();
        let survived = rng.below(state.name_log.len() as u64 + 1) as usize;
        let names = if survived == 0 { state.durable_names } else { state.name_log[survived - 1] };
        for file in &mut state.files {
            file.lose(rng);
            file.cached = file.durable.clone();
        }
        let state = State { files: state.files, names, durable_names: names, ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The disk as the next process finds it: nothing is lost, and nothing became durable.
    pub fn after_kill(&self) -> Self {
        let state = self.state().clone();
        let state = State { open: [None; 2], faults: Faults::default(), calls: 0, dead: false, rng: None, ..state };
        Self(Arc::new(Mutex::new(state)))
    }
}

/// What is to become of a call.
enum Fate {
    Works,
    Fails(io::Error),
    /// The machine dies in the middle of it.
    Dies,
}

impl State {
    fn fate(&mut self, writes: bool, syncs: bool) -> Fate {
        self.calls += 1;
        let fails = self.faults.fail_one_in > 0 && self.chance(self.faults.fail_one_in);
        if self.dead {
            return Fate::Fails(dead());
        }
        if self.faults.die_at == Some(self.calls) {
            self.dead = true;
            return Fate::Dies;
        }
        if writes && (fails || self.faults.full) {
            return Fate::Fails(io::ErrorKind::StorageFull.into());
        }
        if fails || (syncs && self.faults.broken) {
            return Fate::Fails(io::Error::other("input/output error"));
        }
        Fate::Works
    }

    fn random(&mut self) -> Rng {
        Rng(self.rng.get_or_insert(Rng(0)).next())
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.random().one_in(one_in)
    }

    fn file(&mut self, which: Which) -> io::Result<&mut File> {
        let index = self.open[slot(which)].ok_or(io::ErrorKind::NotFound)?;
        Ok(&mut self.files[index])
    }

    fn rename_to(&mut self, names: [Option<usize>; 2]) {
        self.names = names;
        self.name_log.push(names);
    }
}

fn dead() -> io::Error {
    io::Error::other("the machine is dead")
}

impl Sim {
    /// A call that is done as a whole or not at all.
    fn whole<T>(&self, writes: bool, syncs: bool, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state();
        match state.fate(writes, syncs) {
            Fate::Works => act(&mut state),
            Fate::Fails(e) => Err(e),
            Fate::Dies => {
                if state.chance(2) {
                    act(&mut state)?;
                }
                Err(dead())
            }
        }
    }
}

impl Disk for Sim {
    fn load(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.whole(false, false, |state| {
            state.open[0] = state.names[0];
            Ok(state.names[0].map(|i| state.files[i].cached.bytes()))
        })
    }

    fn create_next(&mut self) -> io::Result<()> {
        self.whole(true, false, |state| {
            state.files.push(File::default());
            let index = state.files.len() - 1;
            state.open[1] = Some(index);
            state.rename_to([state.names[0], Some(index)]);
            Ok(())
        })
    }

    fn write(&mut self, which: Which, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        let error = match state.fate(true, false) {
            Fate::Works => {
                state.file(which)?.write(offset, bytes);
                return Ok(());
            }
            Fate::Fails(_) if state.dead => return Err(dead()),
            Fate::Fails(e) => e,
            Fate::Dies => dead(),
        };
        let part = state.random().below(bytes.len() as u64 + 1) as usize;
        state.file(which)?.write(offset, &bytes[..part]);
        Err(error)
    }

    fn sync(&mut self, which: Which) -> io::Result<()> {
        while self.wait_if_held() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let delay = self.state().delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let mut state = self.state();
        match state.fate(false, true) {
            Fate::Works => {
                state.file(which)?.sync();
                Ok(())
            }
            // What is dirty is left to the crash.
            Fate::Dies => Err(dead()),
            Fate::Fails(e) => {
                let mut rng = state.random();
                if !state.dead {
                    state.file(which)?.lose(&mut rng);
                }
                Err(e)
            }
        }
    }

    fn truncate(&mut self, length: u64) -> io::Result<()> {
        self.whole(false, false, |state| {
            state.file(Which::Journal)?.truncate(length);
            Ok(())
        })
    }

    fn rename(&mut self) -> io::Result<()> {
        self.whole(false, false, |state| {
            state.rename_to([state.names[1], None]);
            state.open[0] = state.open[1].take();
            Ok(())
        })
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        self.whole(false, true, |state| {
            state.durable_names = state.names;
            state.name_log.clear();
            Ok(())
        })
    }

    fn remove_next(&mut self) -> io::Result<()> {
        self.whole(false, false, |state| {
            state.open[1] = None;
            state.rename_to([state.names[0], None]);
            Ok(())
        })
    }
}
