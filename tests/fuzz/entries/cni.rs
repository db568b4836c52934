//! What a container runtime tells the plugin: `CNI_ARGS` up to the first newline, then standard input.
//!
//! Whatever it is, it is understood or refused with one of CNI's codes; what was understood holds what it promises.

use weft_api::{Failure, code};

use crate::config::Config;
use crate::environment;
use crate::version::Version;

/// See the module.
pub fn cni(bytes: &[u8]) {
    let at = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (arguments, input) = bytes.split_at(at);
    let arguments = std::str::from_utf8(arguments).ok().and_then(|text| check(environment::parse_arguments(text)));
    let Ok(document) = serde_json::from_slice::<serde_json::Value>(input) else { return };
    let _ = check(Version::of(&document));
    let Some(config) = check(Config::parse(document)) else { return };
    assert!(environment::is_name(&config.network));
    assert!(config.socket.is_absolute() && config.state_dir.is_absolute());
    let Some(wanted) = check(config.wanted(&arguments.unwrap_or_default())) else { return };
    assert!(wanted.ranges.iter().all(|set| !set.is_empty()));
}

fn check<T>(result: Result<T, Failure>) -> Option<T> {
    result
        .inspect_err(|failure| {
            let known =
                [code::VERSION, code::UNSUPPORTED_FIELD, code::ENVIRONMENT, code::DECODE, code::CONFIG, code::ADDRESS];
            assert!(known.contains(&failure.code), "{failure:?}");
            assert!(!failure.msg.is_empty() && failure.msg.len() < 2000, "{failure:?}");
        })
        .ok()
}
