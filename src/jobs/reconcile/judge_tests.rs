use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::lease::row::{DoubtCause, DoubtRow};
use crate::stream::ShardId;
use crate::stream::reader::Position;

fn held(value: Option<u8>) -> Held {
    let item = |value: u8| {
        let number = aws_sdk_dynamodb::types::AttributeValue::N(value.to_string());
        Held::Item(Digest::of_item(&[("v".to_owned(), number)].into()))
    };
    value.map_or(Held::Nothing, item)
}

#[test]
fn what_nobody_will_mend_is_a_difference_at_once() {
    for (source, target, kind) in [
        (Some(1), None, Kind::Missing),
        (Some(1), Some(2), Kind::Changed),
        (None, Some(1), Kind::Extra),
    ] {
        let mut suspicion = Suspicion::default();
        let verdict = suspicion.look(held(source), held(target), 0, Flow::Still, 60_000);
        assert_eq!(verdict, Some(Verdict::Differs(kind)));
    }
    let unknown = Held::Item(None);
    let mut suspicion = Suspicion::default();
    let verdict = suspicion.look(unknown, unknown, 0, Flow::Still, 60_000);
    assert_eq!(verdict, Some(Verdict::Differs(Kind::Changed)));
}

#[test]
fn what_is_not_applied_yet_is_unsettled_and_no_difference() {
    for flow in [Flow::Unknown, Flow::Until(1_000)] {
        let mut suspicion = Suspicion::default();
        for at_ms in (1_000..61_000).step_by(2_500) {
            let verdict = suspicion.look(held(Some(1)), held(None), at_ms, flow, 60_000);
            assert_eq!(verdict, None, "{at_ms}");
        }
        let verdict = suspicion.look(held(Some(1)), held(None), 61_000, flow, 60_000);
        assert_eq!(verdict, Some(Verdict::Unsettled));
    }
}

/// A source whose item goes through `values`, and a worker `lag` steps behind it.
fn never_drift(values: &[Option<u8>], lag: usize, gaps: &[usize]) -> Result<(), TestCaseError> {
    let at = |step: usize| values[step.min(values.len() - 1)];
    let mut suspicion = Suspicion::default();
    let mut step = 0;
    let mut gaps: VecDeque<usize> = gaps.iter().copied().collect();
    loop {
        // Between reading source and target the worker goes on.
        let flow = Flow::Until(step as i64 * 10_000 - lag as i64 * 10_000);
        let at_ms = step as i64 * 10_000;
        let source = at(step);
        let target = at((step + 1).saturating_sub(lag));
        let verdict = suspicion.look(held(source), held(target), at_ms, flow, 200_000);
        match verdict {
            Some(Verdict::Differs(_)) => {
                prop_assert!(false, "what is in flight was called a difference at {step}");
            }
            Some(_) => return Ok(()),
            None => step += gaps.pop_front().unwrap_or(1),
        }
    }
}

proptest! {
    /// Each change makes another item: then no lag and no rhythm makes a difference out of what is
    /// in flight.
    #[test]
    fn what_is_in_flight_is_never_a_difference(
        deleted in prop::collection::vec(any::<bool>(), 1..60),
        lag in 0usize..20,
        gaps in prop::collection::vec(0usize..6, 0..30),
    ) {
        let version = |(step, deleted): (usize, &bool)| (!deleted).then_some(step as u8);
        let mut values: Vec<Option<u8>> = deleted.iter().enumerate().map(version).collect();
        // Two deletes in a row are no change; a value after a delete is another one.
        values.dedup();
        never_drift(&values, lag, &gaps)?;
    }

    /// What is different and stays so is found, whatever went before.
    #[test]
    fn what_stays_different_is_found(
        before in prop::collection::vec((prop::option::of(0u8..3), prop::option::of(0u8..3)), 0..8),
        source in prop::option::of(0u8..3),
        target in prop::option::of(0u8..3),
    ) {
        let Some(kind) = Kind::of(held(source), held(target)) else { return Ok(()) };
        let mut suspicion = Suspicion::default();
        let mut at_ms = 0;
        for (source, target) in before {
            at_ms += 2_500;
            let flow = Flow::Until(at_ms - 300);
            if suspicion.look(held(source), held(target), at_ms, flow, 200_000).is_some() {
                return Ok(());
            }
        }
        for _ in 0..LOOKS_THAT_AGREE + 2 {
            at_ms += 2_500;
            let flow = Flow::Until(at_ms - 300);
            if let Some(verdict) = suspicion.look(held(source), held(target), at_ms, flow, 200_000) {
                prop_assert_eq!(verdict, Verdict::Differs(kind));
                return Ok(());
            }
        }
        prop_assert!(false, "no verdict");
    }
}

#[test]
fn the_flow_is_as_far_as_its_slowest_shard() {
    let row = |id: &str, owner: Option<&str>, watermark: Option<i64>| {
        let shard = ShardId(id.to_owned());
        let start = Position::TrimHorizon;
        let mut row = ShardRow::new(1, "orders", "arn/stream/1", &shard, None, &start, 0);
        row.lease_owner = owner.map(str::to_owned);
        row.watermark = watermark;
        row
    };
    let patience = Duration::from_secs(10);
    let begin = Instant::now();
    let mut watch = FlowWatch::default();
    let mut see = |rows: &[Row], seconds: u64| {
        let now = begin + Duration::from_secs(seconds);
        watch.see(rows, 1, "orders", now, patience)
    };
    assert_eq!(see(&[], 0), Flow::Still, "nobody ever followed it");
    let owned = |id: &str, at: Option<i64>| Row::Shard(row(id, Some("me"), at));
    let both = [owned("a", Some(7)), owned("b", Some(5))];
    assert_eq!(see(&both, 0), Flow::Until(5));
    let begun = [owned("a", Some(7)), owned("b", None)];
    assert_eq!(see(&begun, 1), Flow::Unknown);
    // One that nobody owns holds the flow back, too: it may be on its way to another worker.
    let left = [owned("a", Some(7)), Row::Shard(row("b", None, Some(3)))];
    assert_eq!(see(&left, 2), Flow::Until(3));
    let mut finished = row("b", None, None);
    finished.checkpoint = crate::lease::row::SHARD_END.to_owned();
    let ended = [owned("a", Some(7)), Row::Shard(finished)];
    assert_eq!(see(&ended, 3), Flow::Until(7));
    // A restart: for a moment nobody owns anything.
    let none = [Row::Shard(row("a", None, Some(7)))];
    assert_eq!(see(&none, 4), Flow::Until(7));
    assert_eq!(see(&none, 9), Flow::Until(7));
    assert_eq!(see(&none, 10), Flow::Still, "nothing has moved for so long");
    // An owner whose row stands still is dead.
    let mut taken = row("a", Some("me"), Some(8));
    taken.lease_counter = 1;
    let held = [Row::Shard(taken.clone())];
    assert_eq!(see(&held, 20), Flow::Until(8));
    assert_eq!(see(&held, 29), Flow::Until(8));
    assert_eq!(see(&held, 30), Flow::Still);
    taken.lease_counter = 2;
    let from = Position::TrimHorizon;
    let shard = ShardId("a".to_owned());
    let (cause, at) = (DoubtCause::Unanswered, String::new());
    let doubt = DoubtRow::new(1, "orders", "arn/stream/1", &shard, cause, &from, 0, at);
    let in_doubt = [Row::Shard(taken), Row::Doubt(doubt)];
    assert_eq!(see(&in_doubt, 31), Flow::Unknown);
    // Of another epoch: whoever follows this one has not begun.
    let mut old = row("c", None, Some(9));
    old.epoch = 0;
    assert_eq!(see(&[Row::Shard(old)], 32), Flow::Unknown);
}
