//! The daemon's own code as modules of this program: it is a binary, and nothing is a library only to be fuzzed.
#![no_main]
#![allow(dead_code)]

#[path = "../../../router/daemon/src/control"]
mod control {
    pub mod config;
    pub mod derive;
    pub mod host;
}
#[path = "../entries/config.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| entry::config(bytes));
