//! What weftd itself costs, out of `/proc/self`.

use std::fs;

/// Resources of this process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// Seconds of CPU time, user and system.
    pub cpu: f64,
    /// Bytes of memory that are resident.
    pub resident: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Most descriptors.
    pub descriptor_limit: u64,
}

impl Usage {
    /// Now. What `/proc` does not tell is 0.
    pub fn take() -> Usage {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let page = rustix::param::page_size() as u64;
        let (ticks, pages) = parse(&stat).unwrap_or_default();
        Usage {
            cpu: ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
            resident: pages * page,
            // One of them is the folder's own.
            descriptors: fs::read_dir("/proc/self/fd").map_or(0, |all| (all.count() as u64).saturating_sub(1)),
            descriptor_limit: rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX),
        }
    }
}

/// Ticks of CPU time and resident pages: fields 14, 15 and 24 of `/proc/PID/stat` (proc(5)). The second, the program's name in parentheses, may
/// contain anything.
fn parse(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some((field(14)? + field(15)?, field(24)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_name_may_contain_anything() {
        let stat = "7 (a) 9 (b) S 1 2 3 4 5 6 7 8 9 10 100 20 0 0 20 0 3 0 5000 123456 77 18446744073709551615";
        assert_eq!(parse(stat), Some((120, 77)));
        assert_eq!(parse("7 (cut"), None);
    }

    #[test]
    fn this_process_uses_something() {
        let usage = Usage::take();
        assert!(usage.resident > 1 << 16 && usage.descriptors >= 3 && usage.descriptor_limit >= usage.descriptors);
    }
}
