//! Instructions and allocations per frame. Instructions are compared with the committed ones in `counts.toml`; allocations
//! there must be none.
//!
//! What can be counted does not depend on what else the machine does, so a change for the worse is seen at once, anywhere.
//! Allocations are counted by the allocator of this program. Instructions are counted by callgrind, under which the
//! program starts itself: only what [`counted_work`] calls, and a part of callgrind's output for each call of
//! [`kind_is_over`]. No clock is read there: valgrind does not know all that the kernel's code for it does.
//!
//! `--write` writes the values that are compared with.

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use toml::{Table, Value};
use weft_benches::cases;
use weft_benches::payload::{Cut, Merge};
use weft_benches::sys::{Counting, allocations};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Frames of each kind that are counted: a multiple of the flows among which they alternate.
const FRAMES: u64 = 2048;
/// Superframes whose payload is: each is the same.
const SUPERFRAMES: u64 = 16;
/// A greater change is a failure, or an invitation.
const TOLERANCE: f64 = 0.05;

const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/counts.toml");
const RENEW: &str = "cargo bench -p weft-benches --bench counts -- --write";
/// How the program is told to be what callgrind runs.
const UNDER_CALLGRIND: &str = "--under-callgrind";

/// The C library chooses by the processor how it copies memory. These let it choose the same everywhere; names that a
/// version of it does not know have no effect.
const TUNABLES: &str = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-ERMS,-FSRM,-SSSE3,-SSE4_1,-SSE4_2:\
    glibc.cpu.x86_non_temporal_threshold=0xc0000";

/// Something for each frame, by kind.
type Counts = BTreeMap<String, f64>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_asked = |option: &str| arguments.iter().any(|argument| argument == option);
    if is_asked(UNDER_CALLGRIND) {
        each_kind(|_, _, _| {});
        return ExitCode::SUCCESS;
    }
    match run(is_asked("--write")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(write: bool) -> Result<(), String> {
    assert_eq!(counted(&mut || drop(black_box(vec![0u8]))), 1, "allocations are counted");
    let (mut kinds, mut allocating) = (Vec::new(), Vec::new());
    each_kind(|kind, frames, allocations| {
        kinds.push((kind.to_owned(), frames));
        if allocations > 0 {
            allocating.push(format!("{kind} ({allocations} times for {frames} frames)"));
        }
    });
    if !allocating.is_empty() {
        return Err(format!("memory is allocated on the way of frames: {}", allocating.join(", ")));
    }
    println!("no allocation on the way of {} kinds of frames", kinds.len());
    let counts = count_instructions(&kinds)?;
    if write {
        return commit(&counts);
    }
    compare(&counts, &committed()?)
}

// What is counted.

/// Forwards frames of each kind; tells how many, and how often memory was allocated meanwhile.
fn each_kind(mut tell: impl FnMut(&str, u64, u64)) {
    for (kind, case) in cases::ALL {
        let (mut case, mut allocated) = (case(), 0);
        case.warm_up();
        case.forward(FRAMES, |work| allocated += counted(work));
        tell(kind, FRAMES, allocated);
        kind_is_over();
    }
    let (cut, merge) = (Cut::default(), Merge::default());
    let payload: [(&str, &dyn Fn()); 2] = [("payload/cut", &|| cut.run()), ("payload/merge", &|| _ = merge.run())];
    for (kind, work) in payload {
        let allocated = (0..SUPERFRAMES).map(|_| counted(&mut || work())).sum();
        tell(kind, SUPERFRAMES, allocated);
        kind_is_over();
    }
}

/// How often memory is allocated during some work.
fn counted(work: &mut dyn FnMut()) -> u64 {
    let before = allocations();
    counted_work(work);
    allocations() - before
}

/// What callgrind counts. It knows this function by its name, and by its return.
#[inline(never)]
fn counted_work(work: &mut dyn FnMut()) {
    work();
    black_box(());
}

/// Where callgrind begins to count anew.
#[inline(never)]
fn kind_is_over() {
    black_box(());
}

// Counting instructions.

fn count_instructions(kinds: &[(String, u64)]) -> Result<Counts, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("callgrind-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|error| format!("{} cannot be made: {error}", folder.display()))?;
    let counts = callgrind(&folder).and_then(|()| kinds_of(&folder, kinds));
    // What is left here does no harm and goes with `cargo clean`.
    let _ = fs::remove_dir_all(&folder);
    counts
}

fn callgrind(folder: &Path) -> Result<(), String> {
    let myself = std::env::current_exe().map_err(|error| format!("the program does not find itself: {error}"))?;
    let finished = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*counted_work*", "--dump-after=*kind_is_over*"])
        .arg(format!("--callgrind-out-file={}", folder.join("part").display()))
        .arg(myself)
        .arg(UNDER_CALLGRIND)
        .env("GLIBC_TUNABLES", TUNABLES)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            format!("valgrind cannot be started: {error}. On Debian and its kin: apt-get install valgrind")
        })?;
    if finished.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&finished.stderr);
    Err(format!("valgrind failed ({}):\n{said}", finished.status))
}

/// One part of callgrind's output for each kind.
fn kinds_of(folder: &Path, kinds: &[(String, u64)]) -> Result<Counts, String> {
    let mut counts = Counts::new();
    for (index, (kind, frames)) in kinds.iter().enumerate() {
        let total = total(&folder.join(format!("part.{}", index + 1)))?;
        if total == 0 {
            return Err(format!("callgrind counted nothing for {kind}: is the program stripped of its names?"));
        }
        counts.insert(kind.clone(), total as f64 / *frames as f64);
    }
    Ok(counts)
}

fn total(part: &PathBuf) -> Result<u64, String> {
    let text = fs::read_to_string(part).map_err(|error| format!("{} cannot be read: {error}", part.display()))?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: ")).and_then(|total| total.trim().parse().ok());
    total.ok_or_else(|| format!("{} has no line with totals", part.display()))
}

// Comparing.

fn compare(counts: &Counts, committed: &Counts) -> Result<(), String> {
    let (mut worse, mut better) = (0, 0);
    println!("{:<28} {:>10} {:>10} {:>8}", "instructions for each frame", "committed", "counted", "change");
    for (kind, count) in counts {
        let Some(before) = committed.get(kind) else {
            return Err(format!("{COMMITTED} has no value for {kind}. Renew it: {RENEW}"));
        };
        let change = count / before - 1.0;
        worse += u32::from(change > TOLERANCE);
        better += u32::from(change < -TOLERANCE);
        println!("{kind:<28} {before:>10.1} {count:>10.1} {:>+7.1}%", change * 100.0);
    }
    if let Some(kind) = committed.keys().find(|kind| !counts.contains_key(*kind)) {
        return Err(format!("{COMMITTED} has a value for {kind}, which is not counted. Renew it: {RENEW}"));
    }
    if worse > 0 {
        let percent = TOLERANCE * 100.0;
        return Err(format!(
            "{worse} of these counts grew by more than {percent} %. If that is the price of something, renew {COMMITTED} \
             and say of what: {RENEW}"
        ));
    }
    if better > 0 {
        println!("{better} of these counts became smaller by more than {} %: commit them. {RENEW}", TOLERANCE * 100.0);
    }
    Ok(())
}

fn committed() -> Result<Counts, String> {
    let values = table()?;
    let Some(Value::Table(values)) = values.get(std::env::consts::ARCH) else {
        return Err(format!("{COMMITTED} has nothing for {}. Write it: {RENEW}", std::env::consts::ARCH));
    };
    let compiler = compiler();
    if let Some(before) = values.get("compiler").and_then(Value::as_str)
        && before != compiler
    {
        println!(
            "note: the committed values are those of {before}, and this is {compiler}: that alone can change them"
        );
    }
    let counts = values.iter().filter_map(|(kind, value)| Some((kind.clone(), value.as_float()?)));
    Ok(counts.collect())
}

/// The committed values by kind, by architecture.
fn table() -> Result<Table, String> {
    let text = fs::read_to_string(COMMITTED).map_err(|error| format!("{COMMITTED} cannot be read: {error}"))?;
    text.parse().map_err(|error| format!("{COMMITTED} is not understood: {error}"))
}

fn commit(counts: &Counts) -> Result<(), String> {
    let mut values = if Path::new(COMMITTED).exists() { table()? } else { Table::new() };
    let mut mine = Table::from_iter([("compiler".to_owned(), Value::String(compiler()))]);
    mine.extend(counts.iter().map(|(kind, count)| (kind.clone(), Value::Float((count * 10.0).round() / 10.0))));
    values.insert(std::env::consts::ARCH.to_owned(), Value::Table(mine));
    let head = format!("# Instructions for each frame, with which `make check` compares. Renewed by:\n# {RENEW}\n\n");
    fs::write(COMMITTED, format!("{head}{values}"))
        .map_err(|error| format!("{COMMITTED} cannot be written: {error}"))?;
    println!("written: {COMMITTED}");
    Ok(())
}

fn compiler() -> String {
    let name = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let said = Command::new(name).arg("--version").output();
    said.map_or_else(|_| "unknown".to_owned(), |said| String::from_utf8_lossy(&said.stdout).trim().to_owned())
}
