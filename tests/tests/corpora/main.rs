//! Replays the corpora of the fuzz targets, without a fuzzer: what was found once stays found.

// Modules of other programs, of which not all is used here; and all of this is test code, its helpers included.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use weft_tests::fuzz_entries::{ALL, Entry};
use weft_tests::random::Random;

#[path = "../../../router/cni/src/config.rs"]
mod config;
#[path = "../../../router/daemon/src/control"]
mod control {
    pub mod config;
    pub mod derive;
    pub mod host;
}
#[path = "../../fuzz/entries/cni.rs"]
mod entry_cni;
#[path = "../../fuzz/entries/config.rs"]
mod entry_config;
#[path = "../../../router/cni/src/environment.rs"]
mod environment;
#[path = "../../../router/cni/src/input.rs"]
mod input;
#[path = "../../../router/cni/src/version.rs"]
mod version;
#[path = "../../../router/cni/src/wanted.rs"]
mod wanted;

fn entries() -> Vec<(&'static str, Entry)> {
    let binaries: [(&str, Entry); 2] = [("cni", entry_cni::cni), ("config", entry_config::config)];
    ALL.into_iter().chain(binaries).collect()
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = folder("corpus").join(name);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn every_target_has_an_entry_and_a_corpus() {
    let mut targets: Vec<String> = std::fs::read_dir(folder("targets"))
        .unwrap()
        .map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    targets.sort();
    let mut names: Vec<&str> = entries().iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    assert_eq!(targets, names);
    for name in names {
        assert!(!corpus(name).is_empty(), "the corpus of {name} is empty");
    }
}

#[test]
fn every_input_of_every_corpus_passes() {
    for (name, entry) in entries() {
        for (path, bytes) in corpus(name) {
            // The name of the file is in the output if its replay panics.
            println!("{}", path.display());
            entry(&bytes);
        }
    }
}

#[test]
fn damaged_inputs_of_every_corpus_pass() {
    let mut random = Random::new(0x5eed_0020);
    for (_, entry) in entries() {
        for _ in 0..300 {
            entry(&{
                let len = random.below(300);
                random.bytes(len)
            });
        }
    }
    for (name, entry) in entries() {
        let corpus = corpus(name);
        for _ in 0..2_000 {
            let mut bytes = corpus[random.below(corpus.len())].1.clone();
            for _ in 0..=random.below(4) {
                if bytes.is_empty() {
                    break;
                }
                let at = random.below(bytes.len());
                match random.below(4) {
                    0 => bytes.truncate(at),
                    1 => bytes[at] = random.byte(),
                    2 => bytes[at] ^= 1 << random.below(8),
                    _ => bytes.insert(at, random.byte()),
                }
            }
            entry(&bytes);
        }
    }
}
