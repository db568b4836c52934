//! Nothing ends early, or stays, because somebody sets the clock: the date is for people alone.
//!
//! What rests, ages, waits or is limited goes by clocks that count from the boot, which a date cannot move. Whether that is so shows in the
//! sources: who asks for the date is listed here, with what for.

use std::fs;
use std::path::{Path, PathBuf};

/// What tells the date.
const TELL: [&str; 5] =
    ["SystemTime::now", "ClockId::Realtime", "CLOCK_REALTIME", "ClockId::Tai", "OffsetDateTime::now"];

/// Who asks, how often, and what for.
const ASK: [(&str, usize, &str); 3] = [
    ("router/ctl/src/bench/machine.rs", 1, "the day of a measurement"),
    ("router/daemon/src/attach/mod.rs", 1, "when a lease was given, for whoever reads the list"),
    ("router/daemon/src/control/kubernetes/mod.rs", 2, "a seed; and a condition's time, which the API wants as a date"),
];

fn sources(folder: &Path, all: &mut Vec<PathBuf>) {
    for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|end| end == "rs") {
            all.push(path);
        }
    }
}

#[test]
fn the_date_is_asked_for_by_nobody_but_for_people() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut all = Vec::new();
    for folder in [
        "encap/src",
        "ipam/src",
        "router/src",
        "router/api/src",
        "router/cni/src",
        "router/ctl/src",
        "router/daemon/src",
    ] {
        sources(&root.join(folder), &mut all);
    }
    assert!(all.len() > 150, "{} files", all.len());
    let mut asking: Vec<(String, usize)> = Vec::new();
    for path in all {
        let text = fs::read_to_string(&path).unwrap();
        let count = TELL.iter().map(|word| text.matches(word).count()).sum();
        if count > 0 {
            asking.push((path.strip_prefix(&root).unwrap().to_string_lossy().into_owned(), count));
        }
    }
    asking.sort();
    let expected: Vec<(String, usize)> = ASK.iter().map(|(path, count, _)| ((*path).to_owned(), *count)).collect();
    assert_eq!(asking, expected, "whoever lets something end by the date lets it end when the date is set");
}
