use super::*;
use crate::stream::ShardId;

const ARN: &str = "arn/stream/l";

fn number(text: &str) -> SequenceNumber {
    SequenceNumber::parse(text).unwrap()
}

fn after(text: &str) -> Position {
    Position::After(number(text))
}

fn shard(id: &str, parent: Option<&str>, owner: Option<&str>, checkpoint: &str) -> ShardRow {
    let parent = parent.map(|id| ShardId(id.into()));
    let id = ShardId(id.into());
    let mut row = ShardRow::new(1, "t", ARN, &id, parent.as_ref(), &Position::TrimHorizon, 0);
    row.lease_owner = owner.map(str::to_owned);
    row.checkpoint = checkpoint.to_owned();
    row
}

fn doubt(until: i64) -> DoubtRow {
    let id = ShardId("p".into());
    let at = "now".to_owned();
    DoubtRow::new(
        1,
        "t",
        ARN,
        &id,
        DoubtCause::Unanswered,
        &after("5"),
        until,
        at,
    )
}

#[test]
fn doubts_of_one_shard_become_one_range_until_they_are_stored() {
    let mut pending = Pending::default();
    assert!(pending.range().is_none());
    pending.add(&after("5"), &number("9"), 100);
    pending.add(&after("7"), &number("8"), 200);
    let range = pending.range().unwrap();
    assert_eq!(range.from, after("5"));
    assert_eq!(range.to, End::Record(number("9")));
    assert_eq!(range.until_ms, 200);
    pending.add(&after("7"), &number("12"), 300);
    pending.stored(&range);
    assert!(
        pending.range().is_some(),
        "what came meanwhile was forgotten"
    );
    let range = pending.range().unwrap();
    pending.stored(&range);
    assert!(pending.range().is_none());
}

#[test]
fn a_stored_doubt_grows_and_never_shrinks() {
    let range = |to: &str, until_ms| Range {
        from: after("7"),
        to: End::Record(number(to)),
        until_ms,
        cause: DoubtCause::Unanswered,
    };
    let mut row = doubt(100);
    assert!(!grow(&mut row, &range("9", 200)), "it ends with a time");
    row.to = Some("15".to_owned());
    assert!(grow(&mut row, &range("9", 200)));
    assert_eq!(
        (row.to.as_deref(), row.until, row.lease_counter),
        (Some("15"), 200, 1)
    );
    assert!(grow(&mut row, &range("16", 150)));
    assert_eq!(
        (row.to.as_deref(), row.until, row.lease_counter),
        (Some("16"), 200, 2)
    );
    assert_eq!(row.position(), Some(after("5")));
}

#[test]
fn a_lease_that_was_not_released_puts_everything_after_its_checkpoint_in_doubt() {
    let late = Duration::from_secs(360);
    let held = shard("s", None, Some("w#1.a"), "42");
    let range = on_take(&held, 1_000, 2_000, late).unwrap();
    assert_eq!(range.from, after("42"));
    assert_eq!(range.until_ms, 362_000);
    assert!(matches!(range.to, End::Time(ms) if ms > 1_000));
    assert_eq!(
        on_take(&shard("s", None, None, "42"), 1_000, 2_000, late),
        None
    );
}

#[test]
fn only_a_refusal_says_that_a_write_had_no_effect() {
    assert!(effect_unknown(Class::Network) && effect_unknown(Class::Service));
    assert!(effect_unknown(Class::Unknown));
    assert!(!effect_unknown(Class::Throttled) && !effect_unknown(Class::Validation));
}

#[test]
fn the_owner_of_the_shard_or_of_its_children_repairs_and_in_the_end_anybody() {
    let patience = Duration::from_secs(10);
    let row = doubt(1_000);
    let rows = [shard("p", None, Some("a#1.x"), "7")];
    assert!(!may_claim(&row, &rows, "a#1", 999, patience), "too early");
    assert!(may_claim(&row, &rows, "a#1", 1_000, patience));
    assert!(!may_claim(&row, &rows, "b#1", 1_000, patience));
    assert!(may_claim(&row, &rows, "b#1", 11_000, patience));
    let rows = [
        shard("p", None, None, "SHARD_END"),
        shard("c", Some("p"), None, "SHARD_END"),
        shard("g", Some("c"), Some("b#1.y"), "TRIM_HORIZON"),
    ];
    assert!(
        may_claim(&row, &rows, "b#1", 1_000, patience),
        "a grandchild"
    );
    assert!(!may_claim(&row, &rows, "a#1", 1_000, patience));
}
