//! The machine that the figures are of.

use std::fs;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde::Serialize;

use super::usage::Usage;

/// How long the machine is watched before anything is built.
const WATCH: Duration = Duration::from_millis(500);
/// The share of it that may be busy with other things.
const QUIET: f64 = 0.05;

/// What the machine is, and what it was doing at the start.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model of its processors.
    pub cpu: String,
    /// Their number.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Load average of the last minute.
    pub load: f64,
    /// The share of all processors that was busy before anything was built, 0 to 1.
    pub busy: f64,
    /// Date and time of the start, UTC.
    pub date: String,
}

impl Machine {
    /// Looks at it. Takes half a second.
    pub fn look() -> Result<Machine> {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let before = Usage::now(&[])?;
        thread::sleep(WATCH);
        let used = Usage::now(&[])?.since(before).machine;
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(Machine {
            cpu: cpu_model(&cpuinfo).unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            load: load.split_whitespace().next().and_then(|field| field.parse().ok()).unwrap_or(0.0),
            busy: (used / WATCH.as_secs_f64() / cpus as f64).clamp(0.0, 1.0),
            date: date(SystemTime::now()),
        })
    }

    /// One line about it.
    pub fn line(&self) -> String {
        let plural = if self.cpus == 1 { "" } else { "s" };
        let busy = self.busy * 100.0;
        format!(
            "{} CPU{plural}, {}, Linux {}, load {:.2} ({busy:.0} % busy) at {}",
            self.cpus, self.cpu, self.kernel, self.load, self.date
        )
    }

    /// What to tell somebody who measures on a machine that does other things.
    pub fn warning(&self) -> Option<String> {
        let busy = self.busy * 100.0;
        (self.busy > QUIET).then(|| {
            format!(
                "the machine is {busy:.0} % busy with other things: take the ratios with a grain of salt, and no other figure at all"
            )
        })
    }
}

/// x86 and some others name the model in /proc/cpuinfo.
fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// RFC 3339, in UTC, to the second.
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Day of the Gregorian calendar, by days since 1970-01-01: years are counted from March, so that the leap day is the
/// last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_ends_of_years() {
        let at = |seconds| date(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_200), "2024-03-01T00:00:00Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn the_model_is_what_the_kernel_calls_it() {
        assert_eq!(cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n").unwrap(), "Some CPU @ 2 GHz");
        assert_eq!(cpu_model("Processor : x"), None);
    }

    #[test]
    fn a_busy_machine_is_warned_about() {
        let machine =
            |busy| Machine { cpu: "x".into(), cpus: 2, kernel: "6.18".into(), load: 0.0, busy, date: "d".into() };
        assert!(machine(0.01).warning().is_none());
        assert!(machine(0.5).warning().unwrap().contains("50 % busy"));
        assert_eq!(machine(0.01).line(), "2 CPUs, x, Linux 6.18, load 0.00 (1 % busy) at d");
    }
}
