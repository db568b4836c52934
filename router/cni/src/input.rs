//! Standard input, read with a limit in bytes and in time.
//!
//! A network configuration has a few kilobytes; one that never ends must not fill the node's memory, and a
//! runtime that never closes the pipe must not leave a plugin behind for each pod.

use std::io::{Read, stdin};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use weft_api::{Failure, code};

/// The largest network configuration that is read, in bytes. A GC lists every container of the node.
const MAX_INPUT: usize = 1024 * 1024;

/// How long the runtime may take to write it.
const PATIENCE: Duration = Duration::from_secs(10);

/// And how long for VERSION, which can be answered without.
const VERSION_PATIENCE: Duration = Duration::from_secs(1);

/// How much of a value of unknown length an error message repeats, in characters.
const QUOTED: usize = 64;

/// All of standard input.
pub fn read() -> Result<Vec<u8>, Failure> {
    let mut input = Vec::new();
    if read_within(PATIENCE, &mut input)? {
        return Ok(input);
    }
    let what = format!("standard input was not closed within {} s", PATIENCE.as_secs());
    Err(Failure::new(code::IO, what)
        .with_details("the runtime must write the network configuration to standard input and close it"))
}

/// What VERSION has for input: whatever has come after a moment, for a runtime or a person may leave standard input open.
pub fn read_for_version() -> Result<Vec<u8>, Failure> {
    let mut input = Vec::new();
    read_within(VERSION_PATIENCE, &mut input)?;
    Ok(input)
}

/// Appends to `input` what comes. False if standard input was not closed in time.
fn read_within(patience: Duration, input: &mut Vec<u8>) -> Result<bool, Failure> {
    let failed = |error: std::io::Error| Failure::new(code::IO, format!("standard input cannot be read: {error}"));
    let deadline = Instant::now() + patience;
    let mut chunk = vec![0; 64 * 1024];
    loop {
        if !readable(deadline).map_err(|errno| failed(errno.into()))? {
            return Ok(false);
        }
        match stdin().read(&mut chunk) {
            Ok(0) => return Ok(true),
            Ok(count) => input.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
        if input.len() > MAX_INPUT {
            return Err(Failure::new(
                code::CONFIG,
                format!("the network configuration on standard input is larger than {} KiB", MAX_INPUT / 1024),
            ));
        }
    }
}

fn readable(deadline: Instant) -> Result<bool, rustix::io::Errno> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout =
        Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(left.subsec_nanos()) };
    let stdin = stdin();
    let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(count) => Ok(count > 0),
        // An interrupted wait is an early wake-up: the read that follows waits by itself.
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// The beginning of `text`, in quotes and escaped: what a message may repeat of a value that someone else chose.
pub fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_message_repeats_is_short_and_escaped() {
        assert_eq!(quoted("a\n\0b"), r#""a\n\0b""#);
        assert_eq!(quoted(&"ä".repeat(64)), format!("{:?}", "ä".repeat(64)));
        assert_eq!(quoted(&"ä".repeat(100_000)), format!("{:?}… (200000 bytes)", "ä".repeat(64)));
    }
}
