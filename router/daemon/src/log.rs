//! Logs go to standard error, as text or as JSON lines. Nothing is logged per frame.

use std::io;

use tracing::Level;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::control::config::Log;

/// Changes the level of a running log.
#[derive(Debug, Clone)]
pub struct LogLevel(reload::Handle<LevelFilter, Registry>);

impl LogLevel {
    /// Logs from `level` on.
    pub fn set(&self, level: Level) {
        // It fails only when the subscriber is gone, and then nothing is logged anyway.
        let _ = self.0.modify(|filter| *filter = LevelFilter::from_level(level));
    }
}

/// Starts logging. A panic is logged as well, whatever thread it is on.
pub fn start(log: Log) -> LogLevel {
    let (filter, handle) = reload::Layer::new(LevelFilter::from_level(log.level));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false);
    let layer = if log.json { lines.json().boxed() } else { lines.with_ansi(false).boxed() };
    // A second start, as in tests, keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed").to_owned();
        tracing::error!(thread = name, "panic: {info}; please report this as a bug");
    }));
    LogLevel(handle)
}
