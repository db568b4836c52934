//! `weft-cni`: the CNI plugin that a container runtime executes.
//!
//! Standard input becomes one request to weftd, weftd's answer becomes standard output: what a pod needs is decided
//! and made in the daemon. What stays here is what the daemon cannot do from its place: read the runtime's
//! environment and configuration as a hostile input, open the pod's network namespace (the descriptor goes with the
//! request), speak the version of CNI that the runtime asked for, and wait for a daemon that is being restarted.
//!
//! Rules that hold for every command: exit code 0, or 1 and an error object on standard output; nothing else is
//! ever written there. VERSION does not touch the daemon. DEL and GC succeed without the daemon, by a tombstone
//! ([`tombstone`]).
//!
//! It is asked in one of four roles: as the plugin that makes the interface, with weftd's addresses ([`command`]) or with those of
//! another IPAM plugin ([`delegate`]); as the IPAM plugin of another ([`ipam`]); and, by that name, as [`loopback`].
//!
//! Read first: the CNI specification 1.1.0, sections 2 (execution protocol) and 5 (result types).

mod command;
mod config;
mod daemon;
mod delegate;
mod environment;
mod input;
mod ipam;
mod loopback;
mod netns;
mod outcome;
mod sys;
mod tombstone;
mod version;
mod wanted;

use std::io::Write;
use std::process::ExitCode;

use serde_json::{Value, json};
use weft_api::{Failure, code};

use command::Command;
use config::Config;
use version::Version;

fn main() -> ExitCode {
    let mut version = Version::NEWEST;
    let (document, exit) = match run(&mut version) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(document)) => (document, ExitCode::SUCCESS),
        Err(failure) => (outcome::error(version, &failure), ExitCode::FAILURE),
    };
    let mut text = document.to_string();
    text.push('\n');
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => exit,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Runs the command of the environment. `version` becomes the one that errors are to be written in.
fn run(version: &mut Version) -> Result<Option<Value>, Failure> {
    let command = Command::from_environment()?;
    if command == Command::Version {
        return versions(&input::read_for_version()?).map(Some);
    }
    let input = input::read()?;
    let document: Value = serde_json::from_slice(&input).map_err(|error| undecodable(&error))?;
    *version = Version::of(&document)?;
    command.must_exist_in(*version)?;
    let config = Config::parse(document)?;
    if is_called(loopback::NAME) {
        return loopback::run(command, *version, &config);
    }
    command.run(*version, &config)
}

/// Whether this program was executed by that name.
fn is_called(name: &str) -> bool {
    let called = std::env::args_os().next().map(std::path::PathBuf::from);
    called.is_some_and(|path| path.file_name().is_some_and(|file| file == name))
}

/// What VERSION answers. In CNI before 1.0.0 it has no input, so that none is needed, and whoever asks with a version
/// that is not supported asks for just this list.
fn versions(input: &[u8]) -> Result<Value, Failure> {
    let mut asked = Version::NEWEST;
    if !input.trim_ascii().is_empty() {
        let document: Value = serde_json::from_slice(input).map_err(|error| undecodable(&error))?;
        asked = Version::of(&document).unwrap_or(Version::NEWEST);
    }
    let supported: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
    Ok(json!({ "cniVersion": asked.as_str(), "supportedVersions": supported }))
}

fn undecodable(error: &serde_json::Error) -> Failure {
    Failure::new(code::DECODE, format!("the network configuration on standard input is not JSON: {error}"))
        .with_details("the runtime must write one JSON object, the network configuration, to standard input")
}
