use super::*;

/// A path that is made up.
#[derive(Clone)]
struct Path {
    mtu: u32,
    delay: Duration,
    /// Of a hundred questions, so many are lost.
    loss: u64,
    cut: bool,
}

impl Path {
    fn good() -> Path {
        Path { mtu: 9000, delay: Duration::from_micros(200), loss: 0, cut: false }
    }
}

/// A way over such a path, and what happened to it.
struct Bed {
    peer: Peer,
    path: Path,
    now: Instant,
    again: Instant,
    flying: Vec<(Instant, u32, u32)>,
    changes: Vec<(Duration, Change)>,
    start: Instant,
    asked: usize,
    random: u64,
    traffic: bool,
}

const LEAST: u32 = 60;
const MOST: u32 = 1450;
const STEP: Duration = Duration::from_millis(1);

impl Bed {
    fn new(path: Path) -> Bed {
        let now = Instant(1_000_000_000_000);
        let peer = Peer::new(LEAST, MOST, 50, false, now);
        let (flying, changes) = (Vec::new(), Vec::new());
        Bed { peer, path, now, again: now, flying, changes, start: now, asked: 0, random: 7, traffic: true }
    }

    /// One that answers, without loss so far.
    fn up(path: Path) -> Bed {
        let mut bed = Bed::new(Path { mtu: 9000, loss: 0, cut: false, ..path.clone() });
        bed.run(3000);
        assert_eq!(bed.peer.state().0, State::Up);
        bed.mark();
        bed.path = path;
        bed
    }

    fn mark(&mut self) {
        self.changes.clear();
        (self.start, self.asked) = (self.now, 0);
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    fn run(&mut self, millis: u64) {
        for _ in 0..millis {
            self.step();
        }
    }

    fn step(&mut self) {
        self.now = self.now + STEP;
        if self.traffic {
            self.peer.traffic(self.now);
        }
        let mut look = Look::default();
        let (landed, flying) = std::mem::take(&mut self.flying).into_iter().partition(|(at, ..)| *at <= self.now);
        self.flying = flying;
        let landed: Vec<(Instant, u32, u32)> = landed;
        for (_, number, size) in &landed {
            self.peer.answered(*number, *size, self.now, &mut look);
        }
        if self.now >= self.again || !landed.is_empty() || self.traffic && !self.peer.was_active {
            self.peer.look(EACH, self.now, &mut look);
            self.again = look.again.unwrap_or(self.now + Duration::from_secs(3600));
            assert!(self.again > self.now, "it looks again and again");
        }
        for (number, size) in look.ask {
            self.asked += 1;
            assert!((LEAST..=self.peer.most()).contains(&size));
            // Lost on the way there, or back.
            let lost = self.random() % 100 < self.path.loss || self.random() % 100 < self.path.loss;
            if !self.path.cut && size <= self.path.mtu && !lost {
                self.flying.push((self.now + self.path.delay, number, size));
            }
        }
        let after = self.now.since(self.start);
        self.changes.extend(look.changes.into_iter().map(|change| (after, change)));
    }

    fn carries(&self) -> u32 {
        self.peer.narrow().unwrap_or(self.peer.most())
    }

    /// Milliseconds until that is so.
    fn until(&mut self, what: impl Fn(&Bed) -> bool) -> u64 {
        (0..60_000)
            .find(|_| {
                self.step();
                what(self)
            })
            .expect("it never is")
    }
}

#[test]
fn a_way_that_is_well_is_asked_ten_times_a_second_and_nothing_changes() {
    let mut bed = Bed::up(Path::good());
    bed.run(10_000);
    assert!(bed.changes.is_empty(), "{:?}", bed.changes);
    assert!((95..=105).contains(&bed.asked), "{}", bed.asked);
    assert_eq!((bed.peer.measured(), bed.peer.rtt().loss()), (Some(MOST), 0.0));
}

#[test]
fn without_traffic_nothing_is_asked() {
    let mut bed = Bed::up(Path::good());
    bed.traffic = false;
    bed.run(6000);
    bed.mark();
    bed.run(20_000);
    assert_eq!((bed.asked, bed.changes.len()), (0, 0));
    bed.path.mtu = 1300;
    bed.traffic = true;
    let millis = bed.until(|bed| bed.carries() == 1300);
    assert!(millis < 500, "{millis} ms");
}

#[test]
fn a_narrower_path_is_known_within_two_hundred_milliseconds_to_the_byte_soon_after() {
    for (mtu, offset) in (1..60).map(|number| (1450 - number * 19, number * 7)) {
        let mut bed = Bed::up(Path::good());
        bed.run(offset.into());
        bed.path.mtu = mtu;
        let safe = bed.until(|bed| bed.carries() <= mtu);
        let exact = safe + bed.until(|bed| bed.carries() == mtu);
        assert!(safe < 200 && exact < 600, "{mtu}: {safe} ms, {exact} ms");
        bed.run(5000);
        assert!(bed.carries() == mtu && bed.peer.state().0 == State::Up);
        assert!(bed.changes.iter().all(|(_, change)| matches!(change, Change::Carries { .. })), "{:?}", bed.changes);
    }
}

#[test]
fn a_path_that_is_narrow_and_becomes_narrower_is_noticed_as_fast() {
    for offset in (0..2000).step_by(61) {
        let mut bed = Bed::up(Path::good());
        bed.peer.set_most(8930, 70, bed.now);
        bed.path.mtu = 1430;
        bed.until(|bed| bed.carries() == 1430);
        bed.run(offset);
        bed.path.mtu = 1330;
        let safe = bed.until(|bed| bed.carries() <= 1330);
        // A search that was under way has to end first.
        assert!(safe < if offset == 0 { 400 } else { 250 }, "{offset}: {safe} ms");
    }
}

#[test]
fn a_path_that_becomes_wider_is_noticed_by_itself_and_at_once_if_something_changed_here() {
    let mut bed = Bed::up(Path { mtu: 1300, ..Path::good() });
    bed.run(30_000);
    assert_eq!(bed.carries(), 1300);
    bed.path.mtu = 9000;
    let millis = bed.until(|bed| bed.carries() == MOST);
    assert!(millis <= 10_200, "{millis} ms");
    bed.peer.set_most(8950, 50, bed.now);
    assert_eq!(bed.carries(), MOST, "what nobody has measured is not used");
    let millis = bed.until(|bed| bed.carries() == 8950);
    assert!(millis < 200, "{millis} ms");
    bed.peer.set_most(1450, 50, bed.now);
    assert_eq!(bed.carries(), 1450);
}

#[test]
fn another_encapsulation_alone_makes_no_way_narrow() {
    let mut bed = Bed::up(Path::good());
    for overhead in [20, 58, 50] {
        bed.peer.set_most(MOST, overhead, bed.now);
        assert_eq!(bed.carries(), MOST, "{overhead}");
    }
    let mut bed = Bed::up(Path { mtu: 1300, ..Path::good() });
    bed.run(30_000);
    bed.peer.set_most(MOST, 58, bed.now);
    assert_eq!(bed.carries(), 1292, "eight bytes less are left of what was measured");
}

#[test]
fn a_node_that_goes_away_is_noticed_within_three_hundred_milliseconds_and_when_it_comes_back() {
    for offset in (0..100).step_by(9) {
        let mut bed = Bed::up(Path::good());
        bed.run(offset);
        bed.path.cut = true;
        let millis = bed.until(|bed| bed.peer.state().0 == State::Away);
        assert!((150..=310).contains(&millis), "{millis} ms");
        assert_eq!(bed.carries(), MOST, "what the way carries is not known to have changed");
        bed.run(20_000);
        bed.path.cut = false;
        let millis = bed.until(|bed| bed.peer.state().0 == State::Up);
        assert!(millis < 150, "{millis} ms");
        assert!(matches!(bed.changes[..], [(_, Change::Away(_)), (_, Change::Up(Some(_)))]), "{:?}", bed.changes);
    }
}

#[test]
fn losses_are_not_taken_for_a_node_that_is_away() {
    let mut bed = Bed::up(Path { loss: 5, ..Path::good() });
    bed.run(120_000);
    assert!(!bed.changes.iter().any(|(_, change)| matches!(change, Change::Away(_))), "{:?}", bed.changes);
    assert!((0.03..0.25).contains(&bed.peer.rtt().loss()), "{}", bed.peer.rtt().loss());
    assert_eq!(bed.carries(), MOST);
    bed.path.loss = 30;
    bed.run(5000);
    bed.mark();
    bed.run(60_000);
    let away = bed.changes.iter().filter(|(_, change)| matches!(change, Change::Away(_))).count();
    assert!(away <= 2, "{:?}", bed.changes);
    bed.path.loss = 0;
    bed.run(12_000);
    assert_eq!((bed.carries(), bed.peer.state().0), (MOST, State::Up));
}

#[test]
fn losses_are_not_taken_for_a_way_that_is_narrow() {
    for random in 0..20 {
        let mut bed = Bed::up(Path { loss: 30, delay: Duration::from_millis(10), ..Path::good() });
        bed.random = random * 7919;
        bed.run(60_000);
        let narrow = bed.changes.iter().filter(|(_, change)| matches!(change, Change::Carries { .. })).count();
        assert!(narrow <= 2, "{random}: {narrow} of {:?}", bed.changes);
        bed.path.loss = 0;
        bed.run(12_000);
        assert_eq!(bed.carries(), MOST);
    }
}

#[test]
fn a_delay_of_two_seconds_is_got_used_to() {
    let mut bed = Bed::up(Path { delay: Duration::from_secs(2), ..Path::good() });
    bed.run(10_000);
    assert_eq!((bed.peer.state().0, bed.carries()), (State::Up, MOST));
    bed.mark();
    bed.run(20_000);
    assert!(bed.changes.is_empty(), "{:?}", bed.changes);
    bed.path.delay = Duration::from_micros(200);
    bed.run(3000);
    assert_eq!((bed.peer.state().0, bed.carries()), (State::Up, MOST));
}

#[test]
fn a_way_that_comes_and_goes_is_told_of_a_few_times_only() {
    let mut bed = Bed::up(Path::good());
    for _ in 0..100 {
        bed.path.cut = true;
        bed.run(2000);
        bed.path.cut = false;
        bed.run(500);
    }
    assert!(bed.changes.len() <= 6, "{:?}", bed.changes);
    assert!(bed.changes.iter().any(|(_, change)| *change == Change::Flaps));
    assert!(bed.peer.last().1 >= 100, "all are counted");
    assert_eq!(bed.carries(), MOST);
}

#[test]
fn who_is_no_weft_is_hardly_asked_until_it_asks() {
    let mut bed = Bed::new(Path { cut: true, ..Path::good() });
    bed.run(600_000);
    assert!(bed.asked <= 20, "{}", bed.asked);
    assert_eq!((bed.peer.state().0, bed.carries(), bed.peer.measured()), (State::Silent, MOST, None));
    bed.path.cut = false;
    bed.peer.asked(bed.now);
    bed.again = bed.now;
    assert!(bed.until(|bed| bed.peer.state().0 == State::Up) < 50);
    let mut foreign = Bed::new(Path::good());
    foreign.peer.is_foreign = true;
    foreign.run(60_000);
    assert_eq!(foreign.asked, 0);
}

#[test]
fn a_narrow_path_with_losses_is_measured_and_not_lost_sight_of() {
    let mut bed = Bed::up(Path { mtu: 1214, loss: 10, ..Path::good() });
    bed.run(20_000);
    assert!(bed.carries() <= 1214, "{}", bed.carries());
    bed.until(|bed| bed.carries() == 1214);
}
