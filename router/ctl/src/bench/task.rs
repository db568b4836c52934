//! What is measured, how often and how long: the rows.
//!
//! A *task* is one thing that is done on a data path; what comes of it are one or more *figures*, each a row of the
//! result with a name of its own (`same-tcp-1`, `same-tcp-1-cpu`). Names are an interface: `--only` takes them, files
//! hold them.

use std::time::Duration;

use clap::ValueEnum;

use super::contender::{Contender, Kind};
use super::{attach, frames};

/// Why most tasks are not done on the paths that differ in their encapsulation alone.
pub const ONLY_STREAMS: &str = "only a stream between nodes is compared by encapsulation";

/// Why nothing else is done on the path that differs by its masquerade.
pub const ONLY_OUTSIDE: &str = "only what leaves the cluster is another with masquerade";
/// Why what leaves the cluster is measured on two paths.
pub const NOT_OUTSIDE: &str = "what leaves the cluster is compared by masquerade alone";

/// One thing to do on a data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// What.
    pub what: What,
    /// Between which pods.
    pub layout: Layout,
    /// Over what links.
    pub links: Links,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Bulk TCP.
    Tcp {
        /// Streams at a time.
        streams: u8,
        /// Towards the pod that opens the connection.
        reverse: bool,
    },
    /// Ping-pong of small datagrams.
    RoundTrip(Pace),
    /// TCP connections, one after the other.
    Connections,
    /// Frames a second, without loss and with little.
    Frames(Sizes),
    /// What the data path's own processes hold in memory.
    Memory,
    /// Pods that come and go.
    Attach,
}

/// How long frames are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sizes {
    /// 64 bytes.
    Small,
    /// A mix of small, middling and long ones.
    Imix,
}

/// When the next request of a ping-pong is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// As soon as the answer to the one before is there.
    ClosedLoop,
    /// After a pause in which everything goes to sleep.
    Paused,
    /// As in a closed loop, while a TCP stream runs between the same pods.
    UnderLoad,
}

/// Between which pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Two pods of a node.
    Same,
    /// Pods of two nodes.
    Two,
    /// A pod and a machine that is no pod: the other node.
    Out,
}

/// Over what links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// As namespaces have them: superframes pass whole.
    Whole,
    /// As a NIC without offloads: every frame fits the MTU.
    Plain,
}

/// What comes of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figure {
    /// What its name adds to the task's.
    pub suffix: &'static str,
    /// What it is, for people.
    pub label: &'static str,
    /// What it counts.
    pub unit: &'static str,
    /// Whether more of it is better.
    pub more_is_better: bool,
    /// Whether it is shown in the table; all are in the file.
    pub is_shown: bool,
    /// Whether the chart has it.
    pub is_charted: bool,
    /// Whether a ratio of it says anything.
    pub is_compared: bool,
}

/// How thorough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Each task once, as briefly as it can be: for tests of the benchmark itself.
    Smoke,
    /// Under three minutes.
    Short,
    /// Under twenty minutes.
    Full,
}

/// How much of each is done in one turn.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// A TCP run; whole seconds, for `iperf3` knows no others. Absent: as many bytes as make no sense but to a test.
    pub tcp_seconds: Option<u32>,
    /// A ping-pong or a round of connections.
    pub round: Duration,
    /// Requests of a paused ping-pong.
    pub paused_count: u32,
    /// The pause.
    pub pause: Duration,
    /// A search for a rate of frames.
    pub search: frames::Limits,
    /// Pods that come and go, one after the other.
    pub pods: u32,
}

impl Mode {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Smoke => "smoke",
            Mode::Short => "short",
            Mode::Full => "full",
        }
    }

    /// Between the requests of a ping-pong with pauses.
    pub fn pause(self) -> Duration {
        Duration::from_millis(match self {
            Mode::Smoke => 20,
            Mode::Short => 100,
            Mode::Full => 1000,
        })
    }

    /// How much is done in a turn.
    pub fn lengths(self, task: &Task) -> Lengths {
        let (millis, pause) = (Duration::from_millis, self.pause());
        match self {
            Mode::Smoke => Lengths {
                tcp_seconds: None,
                round: millis(50),
                paused_count: 3,
                pause,
                search: frames::Limits { trial: millis(20), trials: 3, ..frames::Limits::SHORT },
                pods: 1,
            },
            Mode::Short => Lengths {
                tcp_seconds: Some(1),
                round: millis(500),
                paused_count: 20,
                pause,
                search: frames::Limits { trial: millis(200), trials: 12, ..frames::Limits::SHORT },
                pods: 10,
            },
            Mode::Full => Lengths {
                tcp_seconds: Some(if task.is_judged() { 2 } else { 1 }),
                round: millis(1000),
                paused_count: 8,
                pause,
                search: frames::Limits { trial: millis(300), trials: 16, ..frames::Limits::FULL },
                pods: 20,
            },
        }
    }

    /// When no further turn is begun, counted from the very start. What is left of the promise is for taking down.
    pub fn budget(self) -> Duration {
        Duration::from_secs(match self {
            Mode::Smoke | Mode::Short => 160,
            Mode::Full => 19 * 60,
        })
    }

    /// In how many turns a task has its place on a data path. None: only a more thorough mode has it. Other
    /// userspace paths get fewer, for what they are far from is known after one.
    pub fn turns(self, task: &Task, contender: &Contender) -> usize {
        let is_guest = contender.is_guest();
        let is_frames = matches!(task.what, What::Frames(_));
        match self {
            Mode::Smoke => 1,
            Mode::Short if is_brief(task) => usize::from(task.is_judged()),
            Mode::Short if matches!(contender.kind, Kind::Wrapped(_) | Kind::Routes) => {
                usize::from(task.is_of_encapsulations())
            }
            Mode::Short if is_frames && task.is_held_against_guests() => 2,
            Mode::Short if is_guest && task.is_held_against_guests() => 3,
            Mode::Short if is_guest => usize::from(task.is_judged()),
            Mode::Short if task.is_judged() => 3,
            Mode::Short => usize::from(task.is_short()),
            Mode::Full if is_guest && !task.is_judged() => 1,
            Mode::Full if is_guest && !task.is_held_against_guests() => 3,
            Mode::Full if is_frames && !task.is_judged() => 3,
            Mode::Full => 5,
        }
    }
}

impl Task {
    /// Every task.
    pub fn all() -> Vec<Task> {
        let mut all = Vec::new();
        for layout in [Layout::Same, Layout::Two] {
            for links in [Links::Whole, Links::Plain] {
                for reverse in [false, true] {
                    let tcp = |streams| Task { what: What::Tcp { streams, reverse }, layout, links };
                    all.extend([1, 4, 16].map(tcp));
                }
            }
            let what = [Pace::ClosedLoop, Pace::Paused, Pace::UnderLoad].map(What::RoundTrip);
            let whole = |what| Task { what, layout, links: Links::Whole };
            all.extend(what.map(whole));
            all.push(whole(What::Connections));
            all.extend([Sizes::Small, Sizes::Imix].map(What::Frames).map(whole));
        }
        for reverse in [false, true] {
            let what = What::Tcp { streams: 1, reverse };
            all.push(Task { what, layout: Layout::Out, links: Links::Whole });
        }
        let node = |what| Task { what, layout: Layout::Same, links: Links::Whole };
        all.extend([What::Memory, What::Attach].map(node));
        all
    }

    /// Its name.
    pub fn name(&self) -> String {
        let what = match self.what {
            What::Tcp { streams, reverse } => format!("tcp-{streams}{}", if reverse { "-reverse" } else { "" }),
            What::RoundTrip(Pace::ClosedLoop) => "rtt".to_owned(),
            What::RoundTrip(Pace::Paused) => "rtt-paused".to_owned(),
            What::RoundTrip(Pace::UnderLoad) => "rtt-load".to_owned(),
            What::Connections => "connections".to_owned(),
            What::Frames(Sizes::Small) => "frames-64".to_owned(),
            What::Frames(Sizes::Imix) => "frames-imix".to_owned(),
            What::Memory => return "memory".to_owned(),
            What::Attach => return "attach".to_owned(),
        };
        let links = if self.links == Links::Plain { "-plain" } else { "" };
        format!("{}-{what}{links}", self.layout.name())
    }

    /// The names of its rows.
    pub fn rows(&self) -> impl Iterator<Item = String> {
        let name = self.name();
        self.figures().iter().map(move |figure| format!("{name}{}", figure.suffix))
    }

    /// What it is, for people.
    pub fn label(&self) -> String {
        let links = if self.links == Links::Plain { ", no offloads" } else { "" };
        match self.what {
            What::Tcp { streams, reverse } => {
                let plural = if streams == 1 { "" } else { "s" };
                let reverse = if reverse { ", reverse" } else { "" };
                format!("TCP, {streams} stream{plural}{reverse}{links}")
            }
            What::RoundTrip(Pace::ClosedLoop) => "round trip, closed loop".to_owned(),
            What::RoundTrip(Pace::Paused) => "round trip after a pause".to_owned(),
            What::RoundTrip(Pace::UnderLoad) => "round trip beside a stream".to_owned(),
            What::Connections => "TCP connections".to_owned(),
            What::Frames(Sizes::Small) => "frames of 64 bytes".to_owned(),
            What::Frames(Sizes::Imix) => "frames, IMIX".to_owned(),
            What::Memory => "memory of a node's router".to_owned(),
            What::Attach => "attaching a pod, CNI".to_owned(),
        }
    }

    /// What comes of it.
    pub fn figures(&self) -> &'static [Figure] {
        match self.what {
            What::Tcp { streams: 1, reverse: false } => &TCP_WITH_CPU,
            What::Tcp { .. } => &TCP,
            What::RoundTrip(_) => &ROUND_TRIP,
            What::Connections => &CONNECTIONS,
            What::Frames(_) => &FRAMES,
            What::Memory => &MEMORY,
            What::Attach => &ATTACH,
        }
    }

    /// Whether it has a meaning on a data path; else why it has none.
    pub fn applies_to(&self, contender: &Contender) -> Result<(), &'static str> {
        match contender.kind {
            Kind::Kernel if self.what == What::Memory => Err("it has no process of its own"),
            Kind::Kernel if self.what == What::Attach && attach::reference().is_none() => {
                Err("the reference plugins are missing: `apt-get install containernetworking-plugins`")
            }
            Kind::Ovs(_) if self.what == What::Attach => Err("it has no plugin"),
            Kind::Testpmd if !matches!(self.what, What::Frames(_)) || !contender.has(self.layout) => {
                Err("it is a yardstick for frames between two devices")
            }
            Kind::Wrapped(_) | Kind::Routes if !self.is_of_encapsulations() => Err(ONLY_STREAMS),
            Kind::Masquerading if self.layout != Layout::Out => Err(ONLY_OUTSIDE),
            Kind::Kernel if self.layout == Layout::Out && !super::is_installed("nft") => {
                Err("nft is missing: `apt-get install nftables`")
            }
            _ if !contender.has(self.layout) => Err(NOT_OUTSIDE),
            _ if contender.is_guest() && self.links == Links::Plain => Err("its ports take no superframes in any case"),
            _ => Ok(()),
        }
    }

    /// Whether it is among those by which the project is judged: they are measured longer and more often.
    fn is_judged(&self) -> bool {
        match self.what {
            What::Tcp { streams, reverse } => streams <= 4 && !reverse,
            What::RoundTrip(pace) => self.layout == Layout::Same && pace != Pace::UnderLoad,
            What::Frames(sizes) => self.layout == Layout::Same && sizes == Sizes::Small,
            What::Attach => true,
            What::Connections | What::Memory => false,
        }
    }

    /// Whether Weft is judged by what it is here beside another userspace path.
    fn is_held_against_guests(&self) -> bool {
        let tcp = What::Tcp { streams: 1, reverse: false };
        let frames = What::Frames(Sizes::Small);
        self.layout == Layout::Same && self.links == Links::Whole && (self.what == tcp || self.what == frames)
    }

    /// Whether encapsulations are held against each other by it.
    fn is_of_encapsulations(&self) -> bool {
        self.layout == Layout::Two
            && self.links == Links::Whole
            && self.what == What::Tcp { streams: 1, reverse: false }
    }

    /// Whether the short mode has it.
    fn is_short(&self) -> bool {
        let is_extreme = matches!(self.what, What::Tcp { streams: 16, reverse: true });
        self.is_judged() || (self.links == Links::Whole && !is_extreme && !matches!(self.what, What::Frames(_)))
    }
}

/// Whether the short mode has it once, if at all.
fn is_brief(task: &Task) -> bool {
    task.layout == Layout::Out
}

impl Layout {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Layout; 3] = [Layout::Same, Layout::Two, Layout::Out];

    /// Its name in those of tasks.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Same => "same",
            Layout::Two => "two",
            Layout::Out => "out",
        }
    }

    /// What it is, for people.
    pub fn label(self) -> &'static str {
        match self {
            Layout::Same => "two pods of a node",
            Layout::Two => "pods of two nodes",
            Layout::Out => "a pod and what is outside",
        }
    }
}

const fn figure(suffix: &'static str, label: &'static str, unit: &'static str, more_is_better: bool) -> Figure {
    Figure { suffix, label, unit, more_is_better, is_shown: true, is_charted: true, is_compared: true }
}

const GBPS: Figure = figure("", "", "Gb/s", true);
const CPU: Figure = figure("-cpu", "CPU of the machine", "s/GB", false);
const ROUTER_CPU: Figure = Figure { is_charted: false, ..figure("-router-cpu", "CPU of the routers", "s/GB", false) };

static TCP_WITH_CPU: [Figure; 3] = [GBPS, CPU, ROUTER_CPU];
static TCP: [Figure; 3] =
    [GBPS, Figure { is_shown: false, is_charted: false, ..CPU }, Figure { is_shown: false, ..ROUTER_CPU }];

static ROUND_TRIP: [Figure; 4] = [
    figure("-p50", "p50", "µs", false),
    Figure { is_charted: false, ..figure("-p99", "p99", "µs", false) },
    Figure { is_charted: false, ..figure("-p99.9", "p99.9", "µs", false) },
    Figure { is_charted: false, is_compared: false, ..figure("-one-cpu", "both ends on one CPU", "%", false) },
];

static CONNECTIONS: [Figure; 1] = [figure("", "", "/s", true)];

static FRAMES: [Figure; 4] = [
    figure("-ndr", "without loss", "Mpps", true),
    Figure { is_charted: false, ..figure("-pdr", "loss under 0.5 %", "Mpps", true) },
    Figure { is_charted: false, is_compared: false, ..figure("-offered", "offered at most", "Mpps", true) },
    Figure {
        is_shown: false,
        is_charted: false,
        is_compared: false,
        ..figure("-reordered", "out of order", "frames", false)
    },
];

static ATTACH: [Figure; 2] = [figure("-add", "ADD", "ms", false), figure("-del", "DEL", "ms", false)];
static MEMORY: [Figure; 1] = [Figure { is_charted: false, ..figure("", "", "MiB", false) }];

#[cfg(test)]
mod tests {
    use super::super::contender::CONTENDERS;
    use super::*;

    #[test]
    fn every_row_has_a_name_of_its_own() {
        let mut all: Vec<String> = Task::all().iter().flat_map(Task::rows).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        for name in ["same-tcp-1", "two-tcp-4-plain", "same-tcp-16-reverse", "same-rtt-p50", "two-frames-imix-ndr"] {
            assert!(all.iter().any(|one| one == name), "{name}: {all:?}");
        }
    }

    #[test]
    fn a_thorough_mode_has_everything_five_times_where_it_is_judged() {
        for contender in &CONTENDERS {
            for task in Task::all().iter().filter(|task| task.applies_to(contender).is_ok()) {
                let turns = [Mode::Smoke, Mode::Short, Mode::Full].map(|mode| mode.turns(task, contender));
                assert!(turns[0] == 1 && turns[2] >= 1 && turns[1] <= turns[2], "{}: {turns:?}", task.name());
                if !contender.is_guest() {
                    assert!(turns[2] >= 3, "{}: {turns:?}", task.name());
                }
                if task.is_held_against_guests() || task.is_judged() && !contender.is_guest() {
                    assert_eq!(turns[2], 5, "{}", task.name());
                }
            }
        }
    }

    /// What is sure to pass on one data path, without starting programs and looking for rates.
    fn least(mode: Mode, task: &Task) -> Duration {
        let lengths = mode.lengths(task);
        match task.what {
            What::Tcp { .. } => Duration::from_secs(u64::from(lengths.tcp_seconds.unwrap_or(0))),
            // Quiet paths share their pauses.
            What::RoundTrip(Pace::Paused) => lengths.pause * lengths.paused_count / 2,
            What::RoundTrip(_) | What::Connections => lengths.round,
            What::Frames(_) => lengths.search.trial * u32::try_from(lengths.search.trials).unwrap(),
            What::Memory => Duration::ZERO,
            // A tenth of a second for each pod.
            What::Attach => Duration::from_millis(100) * lengths.pods,
        }
    }

    #[test]
    fn what_is_planned_fits_the_time() {
        for mode in [Mode::Smoke, Mode::Short, Mode::Full] {
            let mut sum = Duration::ZERO;
            for contender in &CONTENDERS {
                for task in Task::all().iter().filter(|task| task.applies_to(contender).is_ok()) {
                    sum += least(mode, task) * u32::try_from(mode.turns(task, contender)).unwrap();
                }
            }
            assert!(sum < mode.budget() * 9 / 10, "{mode:?}: {sum:?} of {:?}", mode.budget());
        }
    }
}
