//! The commands: what each sends to the daemon, and what it does when there is none.
//!
//! | command | without the daemon |
//! |---|---|
//! | ADD, CHECK, GC | waits, then code 11 |
//! | DEL | succeeds; a tombstone says what is left to do |
//! | STATUS | waits, then code 50 |

use std::os::fd::AsFd;
use std::time::Duration;

use serde_json::Value;
use weft_api::{Attach, Attached, AttachmentKey, Check, ClientError, Collected, Empty, Failure, Gc, Request, code};

use crate::config::{Config, invalid};
use crate::environment::{self, Arguments};
use crate::input::quoted;
use crate::version::Version;
use crate::{daemon, netns, outcome, tombstone};

/// How long ADD, CHECK and GC wait for a daemon that is being restarted.
const WAIT: Duration = Duration::from_secs(5);

/// How long STATUS waits: runtimes ask it at boot, before anything is attached.
const STATUS_WAIT: Duration = Duration::from_secs(10);

/// How long a DEL waits for its answer, each of the two times it asks.
const DEL_ANSWER: Duration = Duration::from_secs(4);

/// How long STATUS waits for its answer; a daemon that takes longer is not one that serves an ADD.
const STATUS_ANSWER: Duration = Duration::from_secs(10);

/// `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    /// The command that the environment names.
    pub fn from_environment() -> Result<Command, Failure> {
        match environment::required("CNI_COMMAND")?.as_str() {
            "ADD" => Ok(Self::Add),
            "DEL" => Ok(Self::Del),
            "CHECK" => Ok(Self::Check),
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            other => {
                let why = format!("{} is not ADD, DEL, CHECK, GC, STATUS or VERSION", quoted(other));
                Err(environment::invalid("CNI_COMMAND", &why))
            }
        }
    }

    /// Refuses a command that the version of CNI does not have.
    pub fn must_exist_in(self, version: Version) -> Result<(), Failure> {
        let (name, since) = match self {
            Self::Add | Self::Del | Self::Version => return Ok(()),
            Self::Check => ("CHECK", Version::V0_4_0),
            Self::Gc => ("GC", Version::V1_1_0),
            Self::Status => ("STATUS", Version::V1_1_0),
        };
        if version >= since {
            return Ok(());
        }
        let what = format!("CNI {} has no command {name}", version.as_str());
        Err(Failure::new(code::VERSION, what).with_details(format!("set cniVersion to {} or later", since.as_str())))
    }

    /// Does it; returns what is to be written to standard output.
    pub fn run(self, version: Version, config: &Config) -> Result<Option<Value>, Failure> {
        match self {
            Self::Add => add(version, config).map(Some),
            Self::Del => del(config).map(|()| None),
            Self::Check => check(config).map(|()| None),
            Self::Gc => gc(config).map(|()| None),
            Self::Status => status(config).map(|()| None),
            Self::Version => unreachable!("VERSION needs no configuration and is answered before"),
        }
    }
}

fn add(version: Version, config: &Config) -> Result<Value, Failure> {
    let key = environment::attachment(&config.network)?;
    let netns = environment::required("CNI_NETNS")?;
    let arguments = environment::arguments()?;
    let wanted = config.wanted(&arguments)?;
    // A result that could not be written is found before anything is made.
    outcome::added(version, config, &netns, &blank(&key))?;
    let descriptor = netns::open_pod(&netns)?;
    let request = Request::Add(Attach {
        key,
        netns: netns.clone(),
        requested: wanted.requested,
        ranges: wanted.ranges,
        mac: wanted.mac,
        mtu: wanted.mtu,
        port: wanted.port,
        bandwidth: None,
        labels: arguments.labels,
    });
    let wait = config.wait.unwrap_or(WAIT);
    let attached = daemon::ask(&config.socket, wait, daemon::ANSWER, &request, Some(descriptor.as_fd()))
        .map_err(daemon::failure)?;
    outcome::added(version, config, &netns, &attached)
}

/// Frees the attachment. The namespace may be gone, and `CNI_NETNS` with it; the attachment's name is what counts.
fn del(config: &Config) -> Result<(), Failure> {
    let key = environment::attachment(&config.network)?;
    let netns = environment::variable("CNI_NETNS").ok().flatten();
    let descriptor = netns.and_then(|path| netns::open_pod(&path).ok());
    let request = Request::Del(key.clone());
    let descriptor = descriptor.as_ref().map(AsFd::as_fd);
    let ask = || daemon::ask::<Empty>(&config.socket, Duration::ZERO, DEL_ANSWER, &request, descriptor);

    let away = match ask() {
        Ok(Empty {}) => return Ok(()),
        Err(error) if is_away(&error) => error,
        Err(error) => return Err(daemon::failure(error)),
    };
    let path = tombstone::write(&config.state_dir, &key).map_err(|error| {
        let mut failure = daemon::failure(away);
        let folder = config.state_dir.display();
        failure.msg.push_str(&format!(", and a note for its start cannot be left in {folder}: {error}"));
        failure
    })?;
    // The daemon may have started, and have read the tombstones, just before this one was written.
    match ask() {
        Ok(Empty {}) => tombstone::remove(&path),
        Err(error) if is_away(&error) => {
            eprintln!("weft-cni: weftd is away; it will free the attachment when it is back ({})", path.display());
        }
        Err(error) => {
            tombstone::remove(&path);
            return Err(daemon::failure(error));
        }
    }
    Ok(())
}

/// A daemon that hangs is as good as one that is not there: a pod must not be kept from going. Should it come round and serve
/// the DEL after all, the tombstone finds nothing left to do.
fn is_away(error: &ClientError) -> bool {
    matches!(error, ClientError::Unreachable { .. } | ClientError::TimedOut { .. } | ClientError::Protocol(_))
}

fn check(config: &Config) -> Result<(), Failure> {
    let key = environment::attachment(&config.network)?;
    let netns = environment::required("CNI_NETNS")?;
    environment::arguments()?;
    let previous =
        config.previous_result()?.ok_or_else(|| invalid("CHECK without prevResult: nothing says what to check"))?;
    let expected = Some(outcome::expected(previous, &key.ifname)?);
    let descriptor = netns::open_pod(&netns)?;
    let request = Request::Check(Check { key, expected });
    let wait = config.wait.unwrap_or(WAIT);
    let Empty {} = daemon::ask(&config.socket, wait, daemon::ANSWER, &request, Some(descriptor.as_fd()))
        .map_err(daemon::failure)?;
    Ok(())
}

fn gc(config: &Config) -> Result<(), Failure> {
    let request = Request::Gc(Gc { network: config.network.clone(), valid: config.valid_attachments()? });
    let wait = config.wait.unwrap_or(WAIT);
    let Collected { .. } =
        daemon::ask(&config.socket, wait, daemon::ANSWER, &request, None).map_err(daemon::failure)?;
    Ok(())
}

/// Says whether an ADD would be served: with this configuration, by a daemon that is ready.
fn status(config: &Config) -> Result<(), Failure> {
    config.wanted(&Arguments::default())?;
    let wait = config.wait.unwrap_or(STATUS_WAIT);
    match daemon::ask(&config.socket, wait, STATUS_ANSWER, &Request::Ready, None) {
        Ok(Empty {}) => Ok(()),
        Err(error) => {
            let failure = daemon::failure(error);
            let is_status = matches!(failure.code, code::NOT_AVAILABLE | code::LIMITED);
            Err(if is_status { failure } else { Failure { code: code::NOT_AVAILABLE, ..failure } })
        }
    }
}

/// An attachment without addresses, to try whether a result can be written.
fn blank(key: &AttachmentKey) -> Attached {
    Attached { ifname: key.ifname.clone(), mac: String::new(), mtu: 0, addresses: Vec::new(), routes: Vec::new() }
}
