use super::*;
use proptest::prelude::*;

fn row(epoch: u64, active: &str) -> ControlRow {
    let mut row = ControlRow::first("g", active, "test", "now".into());
    row.epoch = epoch;
    row
}

fn record(epoch: u64, active: &str) -> Answer {
    Answer::Record(Box::new(row(epoch, active)))
}

fn decided(active: &str, epoch: u64) -> Verdict {
    Verdict::Decided {
        active: active.to_owned(),
        epoch,
    }
}

#[test]
fn the_highest_epoch_wins_wherever_seen() {
    assert_eq!(decide(&[record(1, "a"), record(2, "b")]), decided("b", 2));
    assert_eq!(decide(&[record(2, "b"), record(1, "a")]), decided("b", 2));
    assert_eq!(
        decide(&[record(1, "a"), Answer::Unreachable]),
        decided("a", 1)
    );
    assert_eq!(decide(&[record(1, "a"), record(1, "a")]), decided("a", 1));
}

#[test]
fn one_epoch_with_two_targets_is_a_conflict_unless_a_higher_one_exists() {
    assert_eq!(
        decide(&[record(2, "b"), record(2, "a"), Answer::None]),
        Verdict::Conflict {
            epoch: 2,
            actives: vec!["a".into(), "b".into()]
        }
    );
    assert_eq!(
        decide(&[record(2, "b"), record(2, "a"), record(3, "a")]),
        decided("a", 3)
    );
}

#[test]
fn unreachable_is_not_absent() {
    assert_eq!(decide(&[Answer::None, Answer::None]), Verdict::FromFile);
    assert_eq!(
        decide(&[Answer::None, Answer::Unreachable]),
        Verdict::Unknown
    );
}

#[test]
fn a_conflict_outlasts_the_regions_that_made_it() {
    let actives = ["b".to_owned(), "c".to_owned()];
    let own = row(1, "a");
    let copy = conflict_copy("g", "a", (2, &actives), Some(&own), "now".into()).unwrap();
    assert_eq!(
        decide(&[Answer::Record(Box::new(copy.clone())), Answer::Unreachable]),
        Verdict::Conflict {
            epoch: 2,
            actives: actives.to_vec()
        }
    );
    assert_eq!(
        decide(&[Answer::Record(Box::new(copy.clone())), record(3, "b")]),
        decided("b", 3)
    );
    let in_place_of = |here: &str, own: &ControlRow| {
        conflict_copy("g", here, (2, &actives), Some(own), "now".into())
    };
    assert!(
        in_place_of("b", &row(2, "b")).is_none(),
        "it is the only one there is"
    );
    assert_eq!(
        copy.quarantined,
        ["a"],
        "it was active, and nothing else says so any more"
    );
    let told =
        in_place_of("a", &row(2, "b")).expect("a copy of one of them says nothing of the other");
    assert!(in_place_of("a", &told).is_none());
}

#[test]
fn a_record_that_contradicts_is_not_overwritten_by_a_copy_of_the_other() {
    let record = row(2, "b");
    let quarantined = |own: &ControlRow| copy_for("c", Part::Quarantined, &record, Some(own));
    assert!(quarantined(&row(1, "c")).is_some());
    assert!(
        quarantined(&row(2, "c")).is_none(),
        "another failover's own record"
    );
    let mut told = row(2, "b");
    told.rivals = vec!["b".into(), "c".into()];
    assert!(
        quarantined(&told).is_none(),
        "the copy that tells of the conflict"
    );
}

fn over(epoch: u64, active: &str) -> Heed {
    Heed::Over {
        epoch,
        active: active.to_owned(),
    }
}

#[test]
fn a_writer_stops_at_a_later_epoch_and_at_a_rival_of_its_own() {
    let flow = Flow {
        epoch: 2,
        active: "a",
    };
    assert_eq!(heed(flow, &[]), Heed::GoOn);
    assert_eq!(heed(flow, &[row(1, "b"), row(2, "a")]), Heed::GoOn);
    assert_eq!(heed(flow, &[row(2, "a"), row(3, "b")]), over(3, "b"));
    assert_eq!(heed(flow, &[row(3, "a")]), over(3, "a"));
    let rival = Heed::Conflict {
        epoch: 2,
        actives: vec!["a".into(), "b".into()],
    };
    assert_eq!(heed(flow, &[row(2, "b")]), rival);
    assert_eq!(heed(flow, &[row(2, "a"), row(2, "b")]), rival);
    assert_eq!(rival.epoch(), Some(2));
}

#[test]
fn a_region_that_was_active_is_in_quarantine_by_any_sign_of_it() {
    let now = ("b", 2);
    let own = row(1, "a");
    assert_eq!(part("b", now, None, []), Part::Active);
    assert_eq!(part("c", now, Some(&own), [&own]), Part::Fed);
    assert_eq!(part("a", now, Some(&own), [&own]), Part::Quarantined);
    // Without a state table of its own the active region's record tells.
    let mut told = row(2, "b");
    told.quarantined = vec!["a".into()];
    assert_eq!(part("a", now, None, [&told]), Part::Quarantined);
    // And the copy, when nobody else answers.
    let copy = copy_for("a", Part::Quarantined, &told, Some(&own)).unwrap();
    assert_eq!(copy.state, state::QUARANTINED);
    assert_eq!(part("a", now, Some(&copy), [&copy]), Part::Quarantined);
    assert!(copy_for("a", Part::Quarantined, &told, Some(&copy)).is_none());
}

#[test]
fn a_copy_is_made_once_and_never_of_an_older_record() {
    let record = row(3, "b");
    let copy = copy_for("c", Part::Fed, &record, Some(&row(2, "a"))).unwrap();
    assert_eq!(
        (copy.epoch, copy.active.as_str(), copy.state.as_str()),
        (3, "b", state::STEADY)
    );
    assert!(copy_for("c", Part::Fed, &record, Some(&copy)).is_none());
    assert!(copy_for("c", Part::Fed, &record, Some(&row(4, "a"))).is_none());
    assert!(
        copy_for("b", Part::Active, &record, None).is_none(),
        "it is the record itself"
    );
}

#[test]
fn who_was_active_and_never_came_home_stays_in_quarantine_over_further_failovers() {
    let first = |to| ControlRow::first("g", to, "test", "now".into());
    let second = successor("b", ("a", 1), &[], &[row(1, "a")], first("b"));
    assert_eq!(second.quarantined, ["a"]);
    assert_eq!((second.epoch, second.active.as_str()), (2, "b"));
    let third = successor(
        "c",
        ("b", 2),
        &[],
        &[row(1, "a"), second.clone()],
        first("c"),
    );
    assert_eq!(third.quarantined, ["a", "b"]);
    let back = successor("a", ("c", 3), &[], &[second, third], first("a"));
    assert_eq!(back.quarantined, ["b", "c"], "the active one is not");
    let rivals = ["b".to_owned(), "c".to_owned()];
    let settled = successor("b", ("b", 2), &rivals, &[], first("b"));
    assert_eq!(settled.quarantined, ["c"]);
}

/// A record of few epochs and regions, so that they meet.
fn any_record() -> impl Strategy<Value = ControlRow> {
    (1u64..5, 0usize..3).prop_map(|(epoch, region)| row(epoch, ["a", "b", "c"][region]))
}

proptest! {
    /// What a writer does depends on what was seen, never on the order in which it was.
    #[test]
    fn records_are_heeded_in_any_order(
        mut seen in prop::collection::vec(any_record(), 0..6),
        epoch in 1u64..5,
    ) {
        let flow = Flow { epoch, active: "a" };
        let one = heed(flow, &seen);
        seen.reverse();
        prop_assert_eq!(&one, &heed(flow, &seen));
        // More records never bring a writer back to life.
        if one != Heed::GoOn {
            seen.push(row(epoch, "a"));
            prop_assert_ne!(heed(flow, &seen), Heed::GoOn);
        }
    }

    /// Whoever goes on agrees with everybody else who goes on, of what both have seen: never two flows
    /// of one epoch from different regions, and none of an older epoch.
    #[test]
    fn two_writers_that_have_seen_the_same_never_go_on_with_different_flows(
        seen in prop::collection::vec(any_record(), 1..6),
        epochs in (1u64..5, 1u64..5),
        actives in (0usize..3, 0usize..3),
    ) {
        let label = |region: usize| ["a", "b", "c"][region];
        let one = Flow { epoch: epochs.0, active: label(actives.0) };
        let two = Flow { epoch: epochs.1, active: label(actives.1) };
        let highest = seen.iter().map(|row| row.epoch).max().unwrap_or(0);
        for flow in [one, two] {
            if heed(flow, &seen) == Heed::GoOn {
                prop_assert!(flow.epoch >= highest);
            }
        }
        if one.epoch == highest && two.epoch == highest && heed(one, &seen) == Heed::GoOn && heed(two, &seen) == Heed::GoOn {
            prop_assert_eq!(one.active, two.active);
        }
    }

    /// A region that was ever active, and was never made active again, is fed by nobody.
    #[test]
    fn nobody_feeds_a_region_that_was_active(moves in prop::collection::vec(0usize..3, 1..6)) {
        let label = |region: usize| ["a", "b", "c"][region];
        let mut tables: std::collections::BTreeMap<&str, ControlRow> =
            [("a", row(1, "a"))].into_iter().collect();
        let (mut active, mut epoch) = ("a", 1u64);
        let mut was_active = vec!["a"];
        for to in moves.into_iter().map(label) {
            if to == active {
                continue;
            }
            let seen: Vec<ControlRow> = tables.values().cloned().collect();
            let first = ControlRow::first("g", to, "test", "now".into());
            let next = successor(to, (active, epoch), &[], &seen, first);
            tables.insert(to, next);
            (active, epoch) = (to, epoch + 1);
            was_active.push(to);
            for here in ["a", "b", "c"] {
                let seen: Vec<ControlRow> = tables.values().cloned().collect();
                let now = part(here, (active, epoch), tables.get(here), &seen);
                prop_assert_eq!(now == Part::Active, here == active);
                if was_active.contains(&here) && here != active {
                    prop_assert_eq!(now, Part::Quarantined);
                }
            }
        }
    }
}
