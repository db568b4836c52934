//! What the machine and single processes have used: `/proc`, read before and after.
//!
//! The machine's time is that of all its processors, whoever used it: interrupts and the two ends' programs included.
//! Time that a hypervisor gave to others is nobody's here.

use std::fs;

use anyhow::{Context, Result};

/// CPU time so far, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Of the whole machine.
    pub machine: f64,
    /// Of the processes that were asked for.
    pub processes: f64,
}

impl Usage {
    /// As of now.
    pub fn now(pids: &[u32]) -> Result<Usage> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let machine = busy_ticks(&text).context("/proc/stat has no line `cpu`")?;
        let mut processes = 0;
        for pid in pids {
            let path = format!("/proc/{pid}/stat");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}: did it end?"))?;
            processes += process_ticks(&text).with_context(|| format!("{path} makes no sense"))?;
        }
        let second = rustix::param::clock_ticks_per_second() as f64;
        Ok(Usage { machine: machine as f64 / second, processes: processes as f64 / second })
    }

    /// What was used between then and now.
    pub fn since(self, then: Usage) -> Usage {
        Usage { machine: self.machine - then.machine, processes: self.processes - then.processes }
    }
}

/// Resident memory of a process in bytes.
pub fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/statm");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}: did it end?"))?;
    let pages: Option<u64> = text.split_whitespace().nth(1).and_then(|field| field.parse().ok());
    Ok(pages.with_context(|| format!("{path} makes no sense"))? * rustix::param::page_size() as u64)
}

/// user, nice, system, irq and softirq of proc_stat(5); neither idle, iowait nor what a hypervisor took. Time of guests
/// is in user already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some([0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum())
}

/// utime and stime, fields 14 and 15 of proc_pid_stat(5): all threads of the process.
fn process_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_stolen_time_are_not_use() {
        let stat = "cpu  1 2 4 1000 1000 8 16 1000 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nctxt 5\n";
        assert_eq!(busy_ticks(stat), Some(31));
        assert_eq!(busy_ticks("nothing"), None);
    }

    #[test]
    fn a_processs_time_is_found_behind_any_name() {
        let stat = "42 (a) b (c) S 1 1 1 0 -1 4194304 1 0 0 0 70 7 0 0 20 0 1 0 99 1 1";
        assert_eq!(process_ticks(stat), Some(77));
        assert_eq!(process_ticks("42 (a) S 1"), None);
        assert_eq!(process_ticks(""), None);
    }

    #[test]
    fn this_process_uses_time_and_memory() {
        let own = [std::process::id()];
        let before = Usage::now(&own).unwrap();
        let mut sum = 0_u64;
        while Usage::now(&own).unwrap().since(before).processes < 0.05 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
        }
        assert!(Usage::now(&own).unwrap().since(before).machine > 0.0);
        assert!(resident(own[0]).unwrap() > 1 << 16);
        assert!(Usage::now(&[u32::MAX]).is_err());
    }
}
