//! The plugin's own code as modules of this program: it is a binary, and nothing is a library only to be fuzzed.
#![no_main]
#![allow(dead_code)]

#[path = "../../../router/cni/src/config.rs"]
mod config;
#[path = "../entries/cni.rs"]
mod entry;
#[path = "../../../router/cni/src/environment.rs"]
mod environment;
#[path = "../../../router/cni/src/input.rs"]
mod input;
#[path = "../../../router/cni/src/version.rs"]
mod version;
#[path = "../../../router/cni/src/wanted.rs"]
mod wanted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| entry::cni(bytes));
