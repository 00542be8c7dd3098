use super::*;
use proptest::prelude::*;

const LEASE: Duration = Duration::from_secs(10);

/// A fleet in which `has[0]` belongs to the worker that looks, and `free` shards to nobody.
struct Case {
    start: Instant,
    keys: Vec<(String, Option<String>)>,
    wants: Vec<(String, Vec<String>)>,
}

fn worker(at: usize) -> String {
    format!("w{at}")
}

impl Case {
    fn new(has: &[usize], free: usize) -> Self {
        let mut keys = Vec::new();
        for (at, has) in has.iter().enumerate() {
            keys.extend((0..*has).map(|n| (format!("k{at}-{n}"), Some(worker(at)))));
        }
        keys.extend((0..free).map(|n| (format!("free-{n}"), None)));
        Self {
            start: Instant::now(),
            keys,
            wants: (1..has.len()).map(|at| (worker(at), Vec::new())).collect(),
        }
    }

    fn wants(mut self, at: usize, keys: &[&str]) -> Self {
        self.wants[at - 1].1 = keys.iter().map(|key| (*key).to_owned()).collect();
        self
    }

    /// What the first worker does that many seconds after the start.
    fn at(&self, sharing: &mut Sharing, seconds: u64) -> Decision {
        let peers = self.wants.iter().map(|(id, wants)| Peer { id, wants });
        let shards = self.keys.iter().map(|(key, owner)| Open {
            key,
            holder: owner.as_deref().map_or(Holder::Nobody, Holder::Worker),
            running: owner.as_deref() == Some("w0"),
            readable: true,
        });
        sharing.decide(&View {
            me: "w0",
            duration: LEASE,
            now: self.start + Duration::from_secs(seconds),
            peers: peers.collect(),
            shards: shards.collect(),
        })
    }

    fn first(&self) -> Decision {
        self.at(&mut Sharing::default(), 0)
    }
}

#[test]
fn free_shards_are_taken_up_to_a_share() {
    assert_eq!(Case::new(&[0], 5).first().take.len(), 5, "alone");
    assert_eq!(Case::new(&[0, 0], 5).first().take.len(), 3);
    assert_eq!(Case::new(&[3, 1], 1).first().take.len(), 0, "the other's");
}

#[test]
fn one_that_is_short_asks_in_the_second_view_and_from_the_fullest() {
    let case = Case::new(&[0, 2, 6], 0);
    let mut sharing = Sharing::default();
    assert!(
        case.at(&mut sharing, 0).ask.is_empty(),
        "one view may mislead"
    );
    let ask = case.at(&mut sharing, 1).ask;
    assert_eq!(ask.len(), 2);
    assert!(ask.iter().all(|key| key.starts_with("k2")), "{ask:?}");
    assert_eq!(
        case.at(&mut sharing, 2).ask,
        ask,
        "and goes on asking for the same"
    );
}

#[test]
fn one_asks_as_well_when_only_another_is_too_full() {
    let case = Case::new(&[1, 1, 3], 0);
    let mut sharing = Sharing::default();
    case.at(&mut sharing, 0);
    assert_eq!(case.at(&mut sharing, 1).ask.len(), 1);
}

#[test]
fn shards_are_given_only_to_one_with_less_by_two_or_more() {
    let asked = ["k0-0", "k0-1", "k0-2", "k0-3"];
    let give = Case::new(&[5, 1], 0).wants(1, &asked).first().give;
    assert_eq!(give.len(), 2, "{give:?}");
    assert!(
        Case::new(&[3, 2], 0)
            .wants(1, &asked[..2])
            .first()
            .give
            .is_empty()
    );
}

#[test]
fn a_shard_that_another_asked_for_is_left_to_it_for_a_while() {
    let case = Case::new(&[1, 0, 1], 1).wants(1, &["free-0"]);
    let mut sharing = Sharing::default();
    for seconds in [0, 5, 10] {
        assert!(case.at(&mut sharing, seconds).take.is_empty());
    }
    let case = Case::new(&[0, 1, 1], 1).wants(1, &["free-0"]);
    let mut sharing = Sharing::default();
    assert!(case.at(&mut sharing, 0).take.is_empty());
    assert_eq!(case.at(&mut sharing, 15).take.len(), 1);
}

#[test]
fn a_shard_that_others_leave_lying_is_taken_beyond_the_share() {
    let case = Case::new(&[3, 0], 3);
    let mut sharing = Sharing::default();
    assert!(case.at(&mut sharing, 0).take.is_empty());
    assert!(case.at(&mut sharing, 19).take.is_empty());
    assert_eq!(case.at(&mut sharing, 20).take.len(), 3);
}

proptest! {
    /// Whatever it sees, a worker takes no more than its share, gives only what it reads and was asked
    /// for, keeps its own share, and never leaves another with more than itself.
    #[test]
    fn one_view_never_leads_past_an_even_share(
        has in prop::collection::vec(0usize..8, 1..8),
        free in 0usize..8,
        picks in prop::collection::vec((1usize..8, 0usize..8), 0..12),
    ) {
        let mut case = Case::new(&has, free);
        for (at, n) in picks {
            let wanted = format!("k0-{n}");
            if at < has.len() && n < has[0] && !case.wants[at - 1].1.contains(&wanted) {
                case.wants[at - 1].1.push(wanted);
            }
        }
        let shards = has.iter().sum::<usize>() + free;
        let decision = case.first();
        prop_assert!(decision.take.len() <= shards.div_ceil(has.len()).saturating_sub(has[0]));
        prop_assert!(decision.take.iter().all(|key| key.starts_with("free")));
        let left = has[0] - decision.give.len();
        prop_assert!(decision.give.is_empty() || left >= shards / has.len());
        for (at, had) in has.iter().enumerate().skip(1) {
            let gets: Vec<_> = decision.give.iter().filter(|(_, to)| *to == worker(at)).collect();
            prop_assert!(gets.is_empty() || had + gets.len() <= left);
            for (key, _) in gets {
                prop_assert!(case.wants[at - 1].1.contains(key));
            }
        }
    }

    /// In an even fleet nothing is taken, asked for or given, however often one looks.
    #[test]
    fn an_even_fleet_rests(workers in 1usize..50, shards in 0usize..300) {
        let has: Vec<usize> = (0..workers)
            .map(|at| shards / workers + usize::from(at < shards % workers))
            .collect();
        for turn in [0, shards % workers, workers - 1] {
            let mut has = has.clone();
            has.rotate_left(turn);
            let case = Case::new(&has, 0);
            let mut sharing = Sharing::default();
            for seconds in [0, 2, 4, 100] {
                prop_assert_eq!(case.at(&mut sharing, seconds), Decision::default());
            }
        }
    }
}
