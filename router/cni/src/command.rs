//! The commands: what each sends to the daemon, and what it does when there is none.
//!
//! | command | without the daemon |
//! |---|---|
//! | ADD, CHECK | waits, then code 11 |
//! | DEL, GC | succeeds; a tombstone says what is left to do |
//! | STATUS | waits, then code 50 |
//!
//! Where another plugin gives the addresses, it is asked before the daemon when something is made, so that the daemon knows
//! them, and after it when something is freed, so that nobody gets an address while it is in use. The plugin `dhcp` is different: it
//! speaks from inside the pod, so the daemon makes the interface before it is asked, and takes it away after.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use weft_api::{
    Attach, Attached, AttachmentKey, Check, ClientError, Collected, Empty, Failure, Found, Gc, Request, code,
};

use crate::config::{Config, Role, invalid};
use crate::delegate::{Delegate, Given};
use crate::environment::{self, Arguments};
use crate::input::quoted;
use crate::version::Version;
use crate::{daemon, ipam, netns, outcome, tombstone};

/// How long an ADD waits for a daemon that is being restarted.
pub const WAIT: Duration = Duration::from_secs(5);

/// How long a CHECK waits for it.
pub const CHECK_WAIT: Duration = Duration::from_secs(5);

/// How long STATUS waits: runtimes ask it at boot, before anything is attached.
const STATUS_WAIT: Duration = Duration::from_secs(10);

/// How long a DEL or a GC waits for its answer, each of the two times it asks.
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
    let delegate = match config.role()? {
        Role::Ipam => return ipam::add(version, config),
        Role::Network => None,
        Role::Delegating(name) => Some(name),
    };
    let key = environment::attachment(&config.network)?;
    let netns = environment::required("CNI_NETNS")?;
    let arguments = environment::arguments()?;
    let wanted = config.wanted(&arguments)?;
    // A result that could not be written is found before anything is made.
    outcome::added(version, config, &netns, &blank(&key), None)?;
    let descriptor = netns::open_pod(&netns)?;
    let request = Attach {
        key,
        netns: netns.clone(),
        requested: wanted.requested,
        ranges: wanted.ranges,
        mac: wanted.mac,
        mtu: wanted.mtu,
        port: wanted.port,
        bandwidth: wanted.bandwidth,
        given: Vec::new(),
        routes: wanted.routes,
        trusted: wanted.trusted,
        labels: arguments.labels,
    };
    let make = |request: Request| -> Result<Attached, Failure> {
        let wait = config.wait.unwrap_or(WAIT);
        daemon::ask(&config.socket, wait, daemon::ANSWER, &request, Some(descriptor.as_fd())).map_err(daemon::failure)
    };
    let Some(delegate) = delegate else {
        let attached =
            make(Request::Add(request.clone())).and_then(|attached| as_trusted(config, &request, attached))?;
        return outcome::added(version, config, &netns, &attached, None);
    };
    let is_by_the_interface = Delegate::is_by_the_interface(&delegate);
    let delegate = Delegate::find(&delegate)?;
    if is_by_the_interface {
        make(Request::Prepare(request.clone())).map_err(unless_old)?;
    } else {
        refuse_known(config, &request.key)?;
    }
    let undo = |made: bool| {
        if made {
            delegate.undo(&config.document);
        }
        if is_by_the_interface && let Err(failure) = free(config, &request.key, None) {
            eprintln!("weft-cni: the interface could not be taken away, which is left to the runtime's DEL: {failure}");
        }
    };
    let Given { addresses, routes, dns } = delegate.add(&config.document).inspect_err(|_| undo(false))?;
    let request = Attach { given: addresses, routes, ..request.clone() };
    let complete = if is_by_the_interface { Request::Complete } else { Request::Add };
    let made = make(complete(request.clone()));
    let made = made.and_then(|attached| as_given(config, &request, attached));
    let made = made.and_then(|attached| as_trusted(config, &request, attached));
    made.and_then(|attached| outcome::added(version, config, &netns, &attached, dns.as_ref()))
        .inspect_err(|_| undo(true))
}

/// A daemon of an older release does not know what it was asked for.
fn unless_old(failure: Failure) -> Failure {
    if failure.code != code::REQUEST {
        return failure;
    }
    Failure::new(
        code::UNSUPPORTED_FIELD,
        "this weftd cannot make an interface before its addresses are known, as dhcp needs it",
    )
    .with_details("install weftd and weft-cni of the same release")
}

/// A daemon of an older release knows nothing of trust, and would leave a server without its voice.
fn as_trusted(config: &Config, request: &Attach, attached: Attached) -> Result<Attached, Failure> {
    if request.trusted.iter().all(|word| attached.trusted.contains(word)) {
        return Ok(attached);
    }
    free(config, &request.key, None)?;
    Err(Failure::new(code::UNSUPPORTED_FIELD, "this weftd knows nothing of trusted pods")
        .with_details("install weftd and weft-cni of the same release"))
}

/// A second ADD fails. It must do so before another plugin is asked, whose undoing would take away what the first was given.
fn refuse_known(config: &Config, key: &AttachmentKey) -> Result<(), Failure> {
    let wait = config.wait.unwrap_or(WAIT);
    match daemon::ask(&config.socket, wait, daemon::ANSWER, &Request::Find(key.clone()), None) {
        Ok(Found { attached: false }) => Ok(()),
        Ok(Found { attached: true }) => {
            let what = format!("container {} is attached by {} already", quoted(&key.container), key.ifname);
            Err(Failure::new(code::EXISTS, what).with_details("DEL comes before another ADD"))
        }
        Err(error) => Err(daemon::failure(error)),
    }
}

/// A daemon of an older release gives addresses of its own, whatever it is asked.
fn as_given(config: &Config, request: &Attach, attached: Attached) -> Result<Attached, Failure> {
    let same = |(given, made): (&weft_api::AttachedAddress, &weft_api::AttachedAddress)| {
        let [given, made] = [given, made].map(|address| environment::address(&address.address));
        given.is_some() && given == made
    };
    if attached.addresses.len() == request.given.len() && request.given.iter().zip(&attached.addresses).all(same) {
        return Ok(attached);
    }
    free(config, &request.key, None)?;
    Err(Failure::new(code::UNSUPPORTED_FIELD, "this weftd does not take the addresses of an IPAM plugin")
        .with_details("install weftd and weft-cni of the same release"))
}

/// Frees the attachment. The namespace may be gone, and `CNI_NETNS` with it; the attachment's name is what counts.
fn del(config: &Config) -> Result<(), Failure> {
    let key = environment::attachment(&config.network)?;
    let netns = environment::variable("CNI_NETNS").ok().flatten();
    let descriptor = netns.and_then(|path| netns::open_pod(&path).ok());
    let free = || free(config, &key, descriptor.as_ref().map(AsFd::as_fd));
    // What an ADD would be refused for is not in a DEL's way.
    let Ok(Role::Delegating(name)) = config.role() else { return free() };
    let delegate = Delegate::find(&name);
    if Delegate::is_by_the_interface(&name) {
        // What nobody gives back ends by itself, in time; so that is no reason to fail (the specification's own example).
        if let Err(failure) = delegate.and_then(|delegate| delegate.run("DEL", &config.document)) {
            eprintln!("weft-cni: the lease ends when its time is over, for it could not be given back: {failure}");
        }
        return free();
    }
    free()?;
    delegate?.run("DEL", &config.document).map(drop)
}

fn free(config: &Config, key: &AttachmentKey, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
    let request = Request::Del(key.clone());
    let ask = || daemon::ask::<Empty>(&config.socket, Duration::ZERO, DEL_ANSWER, &request, descriptor);
    let done = now_or_later(config, ask, || tombstone::write(&config.state_dir, key))?;
    if done.is_none() {
        eprintln!("weft-cni: weftd is away; it will free the attachment when it is back");
    }
    Ok(())
}

/// Has the daemon do what `ask` asks for, or leaves a tombstone for it. `None`: it is left.
fn now_or_later<T>(
    config: &Config,
    ask: impl Fn() -> Result<T, ClientError>,
    leave: impl Fn() -> std::io::Result<PathBuf>,
) -> Result<Option<T>, Failure> {
    let away = match ask() {
        Ok(done) => return Ok(Some(done)),
        Err(error) if is_away(&error) => error,
        Err(error) => return Err(daemon::failure(error)),
    };
    let path = leave().map_err(|error| {
        let mut failure = daemon::failure(away);
        let folder = config.state_dir.display();
        failure.msg.push_str(&format!(", and a note for its start cannot be left in {folder}: {error}"));
        failure
    })?;
    // The daemon may have started, and have read the tombstones, just before this one was written.
    match ask() {
        Ok(done) => {
            tombstone::remove(&path);
            Ok(Some(done))
        }
        Err(error) if is_away(&error) => Ok(None),
        Err(error) => {
            tombstone::remove(&path);
            Err(daemon::failure(error))
        }
    }
}

/// A daemon that hangs, or that cannot do it now, is as good as one that is not there: a pod must not be kept from going. Should it
/// come round and serve the DEL after all, the tombstone finds nothing left to do.
fn is_away(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { .. } | ClientError::TimedOut { .. } | ClientError::Protocol(_) => true,
        ClientError::Refused(failure) => failure.code == code::TRY_AGAIN,
    }
}

fn check(config: &Config) -> Result<(), Failure> {
    let role = config.role()?;
    if role == Role::Ipam {
        return ipam::check(config);
    }
    let key = environment::attachment(&config.network)?;
    let netns = environment::required("CNI_NETNS")?;
    environment::arguments()?;
    let previous =
        config.previous_result()?.ok_or_else(|| invalid("CHECK without prevResult: nothing says what to check"))?;
    let expected = Some(outcome::expected(previous, &key.ifname)?);
    let descriptor = netns::open_pod(&netns)?;
    if let Role::Delegating(name) = role {
        match Delegate::find(&name)?.run("CHECK", &config.document) {
            // It is older than the command.
            Err(failure) if failure.code == code::VERSION => {}
            outcome => drop(outcome?),
        }
    }
    let request = Request::Check(Check { key, expected });
    let wait = config.wait.unwrap_or(CHECK_WAIT);
    let Empty {} = daemon::ask(&config.socket, wait, daemon::ANSWER, &request, Some(descriptor.as_fd()))
        .map_err(daemon::failure)?;
    Ok(())
}

fn gc(config: &Config) -> Result<(), Failure> {
    let gc = Gc { network: config.network.clone(), valid: config.valid_attachments()? };
    let request = Request::Gc(gc.clone());
    let ask = || daemon::ask::<Collected>(&config.socket, Duration::ZERO, DEL_ANSWER, &request, None);
    let done = now_or_later(config, ask, || tombstone::write_gc(&config.state_dir, &gc))?;
    if done.is_none() {
        eprintln!("weft-cni: weftd is away; it will collect what is stale when it is back");
    }
    let Ok(Role::Delegating(name)) = config.role() else { return Ok(()) };
    let delegate = Delegate::find(&name)?;
    if delegate.knows(&config.document, Version::V1_1_0) {
        return delegate.run("GC", &config.document).map(drop);
    }
    // An older plugin knows no GC, but it knows DEL. All are tried before a failure is told.
    let freed = done.map(|done| done.freed).unwrap_or_default();
    let outcomes: Vec<_> = freed.into_iter().map(|key| delegate.of(key).run("DEL", &config.document)).collect();
    outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))
}

/// Says whether an ADD would be served: with this configuration, by a daemon that is ready, and by the plugin that gives addresses.
fn status(config: &Config) -> Result<(), Failure> {
    let role = config.role()?;
    config.wanted(&Arguments::default())?;
    let wait = config.wait.unwrap_or(STATUS_WAIT);
    let Empty {} = daemon::ask(&config.socket, wait, STATUS_ANSWER, &Request::Ready, None)
        .map_err(|error| not_available(daemon::failure(error)))?;
    let Role::Delegating(name) = role else { return Ok(()) };
    let delegate = Delegate::find(&name).map_err(not_available)?;
    if delegate.knows(&config.document, Version::V1_1_0) {
        delegate.run("STATUS", &config.document).map_err(not_available)?;
    }
    Ok(())
}

fn not_available(failure: Failure) -> Failure {
    let is_status = matches!(failure.code, code::NOT_AVAILABLE | code::LIMITED);
    if is_status { failure } else { Failure { code: code::NOT_AVAILABLE, ..failure } }
}

/// An attachment without addresses, to try whether a result can be written.
fn blank(key: &AttachmentKey) -> Attached {
    let (mac, addresses, routes, trusted) = (String::new(), Vec::new(), Vec::new(), Vec::new());
    Attached { ifname: key.ifname.clone(), mac, mtu: 0, addresses, routes, trusted }
}
