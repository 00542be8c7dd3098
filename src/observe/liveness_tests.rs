//! What each missing sign of life means, and when.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits() -> Limits {
    Limits {
        unread: 3 * SECOND,
        unowned: 3 * SECOND,
        pulse: 5 * SECOND,
        restart: 12 * SECOND,
        stalled: 15 * SECOND,
        listing: 8 * SECOND,
        shown: 30 * SECOND,
    }
}

fn codes(ledger: &Ledger, now: Instant) -> Vec<&'static str> {
    let findings = ledger.findings(|_| Excuses::default(), now);
    findings.into_iter().map(|finding| finding.code).collect()
}

/// A ledger in which nothing else than the state table's reading is expected, and that is fresh.
fn read_at(start: Instant, now: Instant) -> Ledger {
    let mut ledger = Ledger::new(limits(), start);
    ledger.rows_read(now);
    ledger
}

#[test]
fn limits_are_half_a_minute_and_a_minute_as_configured_by_default() {
    let text = include_str!("../../config/default.toml");
    let config: Config = toml::from_str(text).unwrap();
    let limits = Limits::of(&config);
    assert_eq!(limits.pulse, 30 * SECOND);
    assert_eq!(limits.restart, 60 * SECOND);
    assert_eq!(limits.unread, 30 * SECOND);
    assert_eq!(limits.listing, 120 * SECOND);
}

#[test]
fn an_unread_state_table_is_seen_after_three_leases() {
    let start = Instant::now();
    let mut ledger = Ledger::new(limits(), start);
    assert!(codes(&ledger, start + 3 * SECOND).is_empty());
    assert_eq!(codes(&ledger, start + 4 * SECOND), ["state-unread"]);
    ledger.rows_read(start + 4 * SECOND);
    assert!(codes(&ledger, start + 5 * SECOND).is_empty());
}

#[test]
fn a_loop_that_stands_still_is_seen_and_then_started_again() {
    let start = Instant::now();
    let mut ledger = read_at(start, start + 13 * SECOND);
    ledger.pulse(1, "t", "table", start);
    assert!(codes(&ledger, start + 5 * SECOND).is_empty());
    assert_eq!(codes(&ledger, start + 6 * SECOND), ["loop-stalled"]);
    let none = Excuses::default();
    assert_eq!(ledger.stuck("t", none, start + 12 * SECOND), None);
    assert!(ledger.stuck("t", none, start + 13 * SECOND).is_some());
    assert_eq!(ledger.stuck("other", none, start + 13 * SECOND), None);
    ledger.restarted("t", start + 13 * SECOND);
    assert_eq!(ledger.stuck("t", none, start + 14 * SECOND), None);
    assert!(codes(&ledger, start + 14 * SECOND).is_empty());
}

#[test]
fn a_listing_that_stopped_is_seen_unless_the_source_is_away() {
    let start = Instant::now();
    let mut ledger = read_at(start, start + 20 * SECOND);
    ledger.listed("t", start);
    assert!(codes(&ledger, start + 8 * SECOND).is_empty());
    assert_eq!(codes(&ledger, start + 9 * SECOND), ["discovery-stalled"]);
    let away = Excuses {
        reading: true,
        moving: false,
    };
    assert!(ledger.findings(|_| away, start + 9 * SECOND).is_empty());
    assert_eq!(ledger.stuck("t", away, start + 17 * SECOND), None);
    let here = Excuses::default();
    assert_eq!(ledger.stuck("t", here, start + 16 * SECOND), None);
    assert!(ledger.stuck("t", here, start + 17 * SECOND).is_some());
}

#[test]
fn a_shard_that_does_not_move_is_seen_and_given_up_much_later() {
    let start = Instant::now();
    let mut ledger = read_at(start, start + 100 * SECOND);
    let at = |seconds: u32| start + seconds * SECOND;
    let signs = |now: Instant| Signs {
        moved: start,
        ..Signs::fresh(now)
    };
    ledger.shard("t", "s", signs(at(15)));
    assert!(codes(&ledger, at(15)).is_empty());
    ledger.shard("t", "s", signs(at(16)));
    assert_eq!(codes(&ledger, at(16)), ["shard-stalled"]);
    assert!(!ledger.is_beyond_repair("t", "s", at(16)));
    ledger.shard("t", "s", signs(at(76)));
    assert!(ledger.is_beyond_repair("t", "s", at(76)));
    ledger.shard_left("t", "s");
    assert!(codes(&ledger, at(76)).is_empty());
}

#[test]
fn a_small_write_budget_is_no_stall() {
    let start = Instant::now();
    let mut signs = Signs::fresh(start);
    signs.allowance = 100 * SECOND;
    assert_eq!(signs.stall(&limits(), start + 100 * SECOND), None);
    assert!(signs.stall(&limits(), start + 116 * SECOND).is_some());
}

#[test]
fn a_task_that_hangs_or_reads_nothing_is_ended() {
    let start = Instant::now();
    let now = start + 31 * SECOND;
    let hung = Signs {
        turned: start + 15 * SECOND,
        ..Signs::fresh(now)
    };
    assert!(hung.is_beyond_repair(&limits(), now));
    let deaf = Signs {
        read: start,
        ..Signs::fresh(now)
    };
    assert_eq!(
        deaf.stall(&limits(), now).map(|(stall, _)| stall),
        Some(Stall::NotReading)
    );
    assert!(deaf.is_beyond_repair(&limits(), now));
    assert!(!deaf.is_beyond_repair(&limits(), start + 30 * SECOND));
}

#[test]
fn an_outage_does_not_count_against_a_shard_once_it_has_ended() {
    let start = Instant::now();
    let mut ledger = read_at(start, start + 106 * SECOND);
    let old = Signs {
        turned: start + 90 * SECOND,
        ..Signs::fresh(start)
    };
    ledger.shard("t", "s", old);
    let outage = Excuses {
        reading: true,
        moving: true,
    };
    ledger.excuse(|_| outage, start + 90 * SECOND);
    // The task itself has seen no progress yet.
    ledger.shard("t", "s", old);
    assert!(codes(&ledger, start + 91 * SECOND).is_empty());
    assert_eq!(codes(&ledger, start + 106 * SECOND), ["shard-stalled"]);
}

#[test]
fn a_shard_without_an_owner_is_seen_after_three_leases_of_looking() {
    let start = Instant::now();
    let mut ledger = read_at(start, start + 20 * SECOND);
    let shard = || [("t".to_owned(), "s".to_owned())].into_iter();
    ledger.unowned(shard(), start);
    // The state table was not read meanwhile: nobody knows.
    assert!(codes(&ledger, start + 10 * SECOND).is_empty());
    ledger.unowned(shard(), start + 3 * SECOND);
    assert!(codes(&ledger, start + 10 * SECOND).is_empty());
    ledger.unowned(shard(), start + 4 * SECOND);
    assert_eq!(codes(&ledger, start + 10 * SECOND), ["shard-unowned"]);
    ledger.unowned(std::iter::empty(), start + 5 * SECOND);
    ledger.unowned(shard(), start + 6 * SECOND);
    assert!(
        codes(&ledger, start + 10 * SECOND).is_empty(),
        "owned between"
    );
}

#[test]
fn a_task_that_died_is_shown_for_a_while() {
    let start = Instant::now();
    let mut ledger = read_at(start, start + 40 * SECOND);
    ledger.died("shard", "t", start);
    assert_eq!(codes(&ledger, start + 30 * SECOND), ["task-died"]);
    assert!(codes(&ledger, start + 31 * SECOND).is_empty());
}
