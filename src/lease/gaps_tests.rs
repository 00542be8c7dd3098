use super::*;
use crate::jobs::reconcile::report::Counts;
use crate::lease::row::{Closes, DoubtCause, FORMAT_VERSION, SHARD_END, SegmentRow, comparisons};
use crate::stream::ShardId;
use crate::stream::reader::Position;

fn arn(label: &str) -> String {
    format!("arn:aws:dynamodb:r:1:table/t/stream/{label}")
}

fn shard(epoch: u64, label: &str) -> ShardRow {
    let (id, start) = (ShardId("s".to_owned()), Position::TrimHorizon);
    ShardRow::new(epoch, "t", &arn(label), &id, None, &start, 0)
}

fn stream(epoch: u64, label: &str) -> StreamRow {
    StreamRow {
        lease_key: StreamRow::key(epoch, "t", &arn(label)),
        entity_type: "stream".to_owned(),
        format_version: FORMAT_VERSION,
        table: "t".to_owned(),
        stream_arn: arn(label),
        table_id: None,
        start_timestamp: None,
        initialised: true,
        finished: false,
        begun_at: None,
        settled: true,
    }
}

fn gap(reason: GapReason) -> GapRow {
    GapRow::new(2, "t", reason, "d", String::new())
}

fn may(gap: &GapRow, shards: &[ShardRow], streams: &[StreamRow], dead: bool) -> bool {
    let ground = Ground {
        epoch: 2,
        shards,
        streams,
        doubts: &[],
        jobs: &[],
        now_ms: 0,
    };
    ground.is_repairable(gap, |_| dead)
}

#[test]
fn a_lost_position_is_repaired_once_what_was_read_before_is_durable() {
    let mut row = shard(2, "1");
    let gap = gap(GapReason::Trimmed)
        .found(1_000)
        .awaiting(row.lease_key.clone());
    let streams = [stream(2, "1")];
    let with = |row: &ShardRow, gap: &GapRow| may(gap, std::slice::from_ref(row), &streams, false);
    assert!(!with(&row, &gap), "it may still be in flight");
    row.restart(1_000);
    assert!(with(&row, &gap));
    let again = gap.found_again(&gap);
    assert!(!with(&row, &again), "lost once more since");
    assert_eq!(again.lease_counter, gap.lease_counter + 1);
    row.restart(again.found_at);
    assert!(with(&row, &again));
    row.restarted_at = None;
    row.checkpoint = SHARD_END.to_owned();
    assert!(with(&row, &again), "it ended");
    assert!(may(&again, &[], &streams, false), "and is gone");
}

#[test]
fn a_stream_made_anew_waits_for_the_old_one_and_for_its_own_leases() {
    let gap = gap(GapReason::StreamRecreated);
    let (mut old, mut new) = (stream(2, "1"), stream(2, "2"));
    let may = |old: &StreamRow, new: &StreamRow| may(&gap, &[], &[old.clone(), new.clone()], false);
    assert!(!may(&old, &new), "older records are still to be applied");
    old.finished = true;
    assert!(may(&old, &new));
    new.initialised = false;
    assert!(!may(&old, &new), "its start is not stored yet");
}

#[test]
fn another_source_waits_until_nobody_writes_what_the_one_before_held() {
    let gap = gap(GapReason::SourceSwitched);
    let streams = [stream(2, "2")];
    let mut old = shard(1, "1");
    assert!(
        may(&gap, std::slice::from_ref(&old), &streams, false),
        "released"
    );
    old.lease_owner = Some("w.1".to_owned());
    assert!(!may(&gap, std::slice::from_ref(&old), &streams, false));
    assert!(may(&gap, &[old], &streams, true), "dead");
    assert!(
        !may(&gap, &[], &[stream(1, "1")], true),
        "nothing is read yet"
    );
}

#[test]
fn a_moment_is_passed_once_every_open_shard_has_applied_it() {
    let streams = [stream(2, "1")];
    let mut row = shard(2, "1");
    let passed = |row: &ShardRow| {
        let ground = Ground {
            epoch: 2,
            shards: std::slice::from_ref(row),
            streams: &streams,
            doubts: &[],
            jobs: &[],
            now_ms: 0,
        };
        ground.has_passed("t", 1_000)
    };
    assert!(!passed(&row), "nothing is known of it");
    row.watermark = Some(999);
    assert!(!passed(&row));
    row.watermark = Some(1_000);
    assert!(passed(&row));
    row.watermark = None;
    row.checkpoint = SHARD_END.to_owned();
    assert!(passed(&row));
}

fn plan(kind: JobKind, epoch: u64) -> ReconcileRow {
    let job = kind.job(epoch);
    ReconcileRow {
        lease_key: ReconcileRow::key(&job, "t"),
        entity_type: "reconcile".to_owned(),
        format_version: FORMAT_VERSION,
        epoch,
        job,
        table: "t".to_owned(),
        order: 0,
        source: "a".to_owned(),
        target: "b".to_owned(),
        apply: true,
        strategy: "mirror".to_owned(),
        max_deletes: "1%".to_owned(),
        segments: 1,
        items: 1,
        at: String::new(),
        at_ms: 5,
        lease_counter: 0,
        until: 0,
        joined: 2,
        ended: None,
        ended_at_ms: None,
        verified_at_ms: None,
        too_many_deletes: None,
        closes: Vec::new(),
        expected_s: None,
    }
}

fn ended(plan: ReconcileRow, counts: Counts) -> ReconcileRow {
    ReconcileRow {
        ended: Some(counts),
        ended_at_ms: Some(1_000),
        ..plan
    }
}

/// What is next, in one word and with what it is about.
fn next(
    gaps: &[GapRow],
    plans: &[ReconcileRow],
    on_gap: OnGap,
    watermark: Option<i64>,
) -> (&'static str, String, Vec<String>) {
    let streams = [stream(2, "1")];
    let mut row = shard(2, "1");
    row.watermark = watermark;
    let ground = Ground {
        epoch: 2,
        shards: &[row],
        streams: &streams,
        doubts: &[],
        jobs: &comparisons(plans, &[]),
        now_ms: 10_000,
    };
    match ground.next("t", gaps, on_gap, |_| false) {
        Next::Nothing => ("nothing", String::new(), Vec::new()),
        Next::Begin(number, gaps) => {
            let reasons = gaps.iter().map(|gap| gap.reason.label().to_owned());
            ("begin", number.to_string(), reasons.collect())
        }
        Next::Work(plan) => ("work", plan.job.clone(), Vec::new()),
        Next::Again(job) => ("again", job.plan.job.clone(), Vec::new()),
        Next::Remove(job) => ("remove", job.plan.job.clone(), Vec::new()),
    }
}

fn what(gaps: &[GapRow], plans: &[ReconcileRow]) -> &'static str {
    next(gaps, plans, OnGap::Repair, None).0
}

#[test]
fn a_copy_is_gone_only_once_the_stream_has_passed_its_end() {
    let copy = plan(JobKind::Bootstrap, 2);
    assert_eq!(what(&[], std::slice::from_ref(&copy)), "work");
    let whole = ended(copy.clone(), Counts::default());
    let at = |watermark| next(&[], std::slice::from_ref(&whole), OnGap::Off, watermark).0;
    assert_eq!(at(None), "nothing");
    assert_eq!(at(Some(1_000 + PASS_MARGIN_MS - 1)), "nothing");
    assert_eq!(at(Some(1_000 + PASS_MARGIN_MS)), "remove");
    let open = Counts {
        unsettled: 1,
        ..Counts::default()
    };
    assert_eq!(what(&[], &[ended(copy.clone(), open)]), "again");
    // A dead letter speaks for what the replica refused.
    let lettered = Counts {
        missing: 2,
        repaired: 1,
        refused: 1,
        ..Counts::default()
    };
    assert!(ended(copy.clone(), lettered.clone()).is_whole());
    let too_many = ReconcileRow {
        too_many_deletes: Some((20, 10)),
        ..ended(copy, lettered)
    };
    assert_eq!(what(&[], &[too_many]), "nothing", "a person has to say");
}

#[test]
fn a_repair_begins_for_what_nobody_repaired_and_closes_all_that_it_may() {
    let never = gap(GapReason::NeverCopied).found(1);
    let trimmed = gap(GapReason::Trimmed).found(2);
    assert_eq!(
        what(std::slice::from_ref(&never), &[]),
        "nothing",
        "nobody wanted it"
    );
    let (what_next, number, closes) =
        next(&[never.clone(), trimmed.clone()], &[], OnGap::Repair, None);
    assert_eq!((what_next, number.as_str()), ("begin", "1"));
    assert_eq!(closes, ["never-copied", "trimmed"]);
    let first = ReconcileRow {
        closes: vec![Closes::of(&never), Closes::of(&trimmed)],
        ..plan(JobKind::GapRepair(1), 2)
    };
    let gaps = [never, trimmed.clone()];
    assert_eq!(what(&gaps, std::slice::from_ref(&first)), "work");
    let whole = ended(first.clone(), Counts::default());
    assert_eq!(what(&gaps, std::slice::from_ref(&whole)), "remove");
    let too_many = ReconcileRow {
        too_many_deletes: Some((20, 10)),
        ..whole
    };
    assert_eq!(
        what(&gaps, std::slice::from_ref(&too_many)),
        "nothing",
        "a person has to say"
    );
    // A person's repair has closed them.
    assert_eq!(what(&[], std::slice::from_ref(&too_many)), "remove");
    let again = [trimmed.found_again(&trimmed)];
    let (what_next, number, _) = next(&again, std::slice::from_ref(&first), OnGap::Repair, None);
    assert_eq!((what_next, number.as_str()), ("work", "gap-repair-2-1"));
    let other = [gaps[0].clone(), again[0].clone()];
    let (what_next, number, _) = next(&other, &[too_many], OnGap::Repair, None);
    assert_eq!(
        (what_next, number.as_str()),
        ("begin", "2"),
        "found again since"
    );
}

#[test]
fn what_is_asked_for_now_counts_and_not_what_was() {
    let trimmed = gap(GapReason::Trimmed).found(2);
    let gaps = [trimmed.clone()];
    let repairs = ReconcileRow {
        closes: vec![Closes::of(&trimmed)],
        ..plan(JobKind::GapRepair(1), 2)
    };
    let reports = ReconcileRow {
        apply: false,
        ..repairs.clone()
    };
    let differs = Counts {
        missing: 3,
        ..Counts::default()
    };
    let reported = ended(reports.clone(), differs);
    for (plan, on_gap, wanted) in [
        (&repairs, OnGap::Off, "nothing"),
        (&repairs, OnGap::Report, "nothing"),
        (&reports, OnGap::Report, "work"),
        (&reported, OnGap::Report, "nothing"),
        (&reports, OnGap::Repair, "remove"),
        (&reported, OnGap::Repair, "remove"),
        (&reported, OnGap::Off, "remove"),
    ] {
        let found = next(&gaps, std::slice::from_ref(plan), on_gap, None).0;
        assert_eq!(found, wanted, "{on_gap:?} {}", plan.apply);
    }
    assert_eq!(next(&gaps, &[], OnGap::Off, None).0, "nothing");
}

#[test]
fn what_an_epoch_before_may_still_write_holds_the_repair_back() {
    let gap = gap(GapReason::SourceSwitched);
    let streams = [stream(2, "2")];
    let (id, start) = (ShardId("s".to_owned()), Position::TrimHorizon);
    let doubt = |until| {
        let cause = DoubtCause::Unanswered;
        DoubtRow::new(1, "t", &arn("1"), &id, cause, &start, until, String::new())
    };
    let old = plan(JobKind::Bootstrap, 1);
    let mut segment = SegmentRow::new(&old, 0, 0);
    segment.until = 500;
    let plans = [old];
    let segments = [segment];
    let may = |doubts: &[DoubtRow], with_job: bool, now_ms: i64| {
        let plans = if with_job { &plans[..] } else { &[] };
        let ground = Ground {
            epoch: 2,
            shards: &[],
            streams: &streams,
            doubts,
            jobs: &comparisons(plans, &segments),
            now_ms,
        };
        ground.is_repairable(&gap, |_| false)
    };
    assert!(may(&[], false, 0));
    assert!(!may(&[doubt(500)], false, 500), "its write may come yet");
    assert!(may(&[doubt(500)], false, 501));
    assert!(!may(&[], true, 500), "so may that of a copy");
    assert!(may(&[], true, 501));
}
