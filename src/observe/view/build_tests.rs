use super::*;
use crate::config::read::{Loaded, parse};
use crate::lease::row::{DoubtCause, FORMAT_VERSION, Resumed, SHARD_END, state};
use crate::stream::ShardId;
use crate::stream::reader::Position;

/// A time within the day of the rows, in milliseconds.
const NOW_MS: i64 = 1_795_700_000_000;

fn loaded() -> Loaded {
    let text = r#"
        group = "g"
        active = "us-east-1"
        here = "us-west-2"
        regions.us-east-1 = {}
        regions.us-west-2 = {}
        tables = [{ name = "orders" }]
        dead_letters.directory = "letters"
    "#;
    parse("test", text, &[]).unwrap()
}

fn arn(label: &str) -> String {
    format!("arn:aws:dynamodb:r:1:table/orders/stream/{label}")
}

fn shard(label: &str, id: &str) -> ShardRow {
    let shard = ShardId(id.to_owned());
    let start = Position::TrimHorizon;
    let mut row = ShardRow::new(1, "orders", &arn(label), &shard, None, &start, NOW_MS);
    row.lease_owner = Some("host-1#a.1".to_owned());
    row.updated_at = Some(NOW_MS);
    row.watermark = Some(NOW_MS - 1_000);
    row.proven_until = Some(NOW_MS - 4_000);
    row
}

fn stream(label: &str) -> StreamRow {
    StreamRow {
        lease_key: StreamRow::key(1, "orders", &arn(label)),
        entity_type: "stream".to_owned(),
        format_version: FORMAT_VERSION,
        table: "orders".to_owned(),
        stream_arn: arn(label),
        table_id: None,
        start_timestamp: None,
        initialised: true,
        finished: false,
        begun_at: Some(0),
        settled: true,
    }
}

fn doubt(due: i64) -> DoubtRow {
    let (shard, start) = (ShardId("s".to_owned()), Position::TrimHorizon);
    let cause = DoubtCause::Unanswered;
    DoubtRow::new(
        1,
        "orders",
        &arn("1"),
        &shard,
        cause,
        &start,
        due,
        String::new(),
    )
}

/// A state table in which all is well, and more.
struct State {
    shards: Vec<ShardRow>,
    streams: Vec<StreamRow>,
    doubts: Vec<DoubtRow>,
    pauses: Vec<PauseRow>,
    gaps: Vec<GapRow>,
    workers: Vec<WorkerRow>,
    control: Option<ControlRow>,
}

impl State {
    fn calm() -> Self {
        let mut worker = WorkerRow::new("host-1#a", 1, "2026-11-27T00:00:00Z".to_owned());
        worker.updated_at = NOW_MS;
        Self {
            shards: vec![shard("1", "s")],
            streams: vec![stream("1")],
            doubts: Vec::new(),
            pauses: Vec::new(),
            gaps: Vec::new(),
            workers: vec![worker],
            control: None,
        }
    }

    fn view_at(&self, host_ms: i64, active: Option<&str>) -> View {
        let loaded = loaded();
        build(Seen {
            config: &loaded.config,
            here: &loaded.here,
            active,
            clock: Reading {
                now_ms: host_ms,
                error_ms: 1_000,
            },
            clock_of: ClockOf::Source,
            replica_ms: host_ms,
            host_ms,
            rows: Rows {
                control: self.control.as_ref(),
                shards: &self.shards,
                streams: &self.streams,
                gaps: &self.gaps,
                doubts: &self.doubts,
                workers: &self.workers,
                pauses: &self.pauses,
                plans: &[],
                segments: &[],
                tracks: &[],
            },
            live: &Live::new(),
            facts: Facts::default(),
        })
    }

    fn view(&self) -> View {
        self.view_at(NOW_MS, None)
    }

    fn codes(&self) -> Vec<String> {
        let reasons = self.view().reasons.into_iter();
        reasons.map(|reason| reason.code).collect()
    }
}

#[test]
fn all_is_well_and_its_ages_are_told() {
    let view = State::calm().view();
    assert_eq!(view.headline.code, "in-sync");
    assert!(view.reasons.is_empty(), "{:?}", view.reasons);
    let point = view.recovery_point;
    assert_eq!(
        point.proven_seconds,
        Some(5.0),
        "the clock's error is in it"
    );
    assert_eq!(point.estimated_seconds, Some(1.0));
    let table = &view.tables[0];
    assert_eq!((table.shards.open, table.shards.unowned), (1, 0));
    assert_eq!(view.shards[0].age_seconds, Some(5.0));
    assert_eq!(view.workers[0].shards, 1);
    assert_eq!(view.regions[0].role, RegionRole::Active);
}

#[test]
fn a_doubt_needs_a_person_only_when_it_is_long_overdue() {
    let mut state = State::calm();
    state.doubts = vec![doubt(NOW_MS + 1_000), doubt(NOW_MS - DOUBT_PATIENCE_MS)];
    assert!(state.codes().is_empty());
    assert_eq!(state.view().headline.code, "in-doubt");
    state.doubts.push(doubt(NOW_MS - DOUBT_PATIENCE_MS - 1));
    assert_eq!(state.codes(), ["doubt-overdue"]);
    // Claimed and given back again and again: that is what nobody would see otherwise.
    state.doubts[2].until = NOW_MS + 1_000;
    assert_eq!(state.codes(), ["doubt-overdue"]);
}

#[test]
fn a_closed_tap_needs_a_person_and_one_opened_again_does_not() {
    let mut state = State::calm();
    state.pauses = vec![PauseRow::new(Some("orders"), "a", "b", "c".to_owned())];
    assert_eq!(state.codes(), ["paused"]);
    assert_eq!(state.view().tables[0].paused.as_ref().unwrap().by, "a");
    state.pauses[0].resumed = Some(Resumed {
        by: "a".to_owned(),
        reason: "b".to_owned(),
        at: "d".to_owned(),
    });
    assert!(state.codes().is_empty());
}

#[test]
fn a_dead_worker_is_seen_by_its_silence_and_the_recovery_point_ages() {
    let state = State::calm();
    let view = state.view_at(NOW_MS + 60_000, None);
    let codes: Vec<&str> = view.reasons.iter().map(|r| r.code.as_str()).collect();
    assert_eq!(codes, ["nobody-feeds", "shard-unowned"]);
    assert_eq!(view.headline.code, "nobody-feeds");
    assert_eq!(view.recovery_point.proven_seconds, Some(65.0));
    assert_eq!(view.recovery_point.estimated_seconds, Some(61.0));
    assert_eq!(view.shards[0].owner_silent_seconds, Some(60));
    // In the active region nobody has to feed.
    let standby = state.view_at(NOW_MS + 60_000, Some("us-west-2"));
    assert_eq!(standby.headline.code, "standby");
}

#[test]
fn a_region_in_quarantine_is_shown_as_such_and_nobody_has_to_feed_it() {
    let mut state = State::calm();
    let mut control = ControlRow::first("g", "us-east-1", "me", String::new());
    control.epoch = 2;
    control.quarantined = vec!["us-west-2".to_owned()];
    control.state = state::QUARANTINED.to_owned();
    state.control = Some(control);
    let view = state.view_at(NOW_MS + 60_000, None);
    assert_eq!(view.headline.code, "quarantined");
    assert_eq!(view.headline.level, Level::Warn);
    assert!(view.flow.is_none() && !view.reasons.iter().any(|r| r.code == "nobody-feeds"));
    let role = |label: &str| {
        view.regions
            .iter()
            .find(|region| region.label == label)
            .map(|r| r.role)
    };
    assert_eq!(role("us-west-2"), Some(RegionRole::Quarantined));
    assert_eq!(role("us-east-1"), Some(RegionRole::Active));
}

#[test]
fn little_headroom_is_an_alarm() {
    let mut state = State::calm();
    let eighteen_h_ms = 18 * 3_600_000;
    state.shards[0].watermark = Some(NOW_MS - eighteen_h_ms);
    state.shards[0].created_at = 0;
    assert!(state.codes().is_empty());
    state.shards[0].watermark = Some(NOW_MS - eighteen_h_ms - 60_000);
    assert_eq!(state.codes(), ["headroom"]);
    let view = state.view();
    assert_eq!(view.headline.level, Level::Bad);
    assert!(
        view.reasons[0].text.ends_with("in 5 h 59 min"),
        "{:?}",
        view.reasons
    );
}

#[test]
fn an_older_stream_is_shown_until_it_is_finished() {
    let shown = |checkpoint: &str| {
        let mut state = State::calm();
        let mut old = shard("1", "old");
        checkpoint.clone_into(&mut old.checkpoint);
        state.shards = vec![old, shard("2", "new")];
        state.view().tables[0].shards
    };
    assert_eq!((shown("7").open, shown("7").finished), (2, 0));
    assert_eq!((shown(SHARD_END).open, shown(SHARD_END).finished), (1, 0));
}

#[test]
fn a_table_nobody_reads_is_said_so() {
    let mut state = State::calm();
    state.shards.clear();
    assert_eq!(state.codes(), ["starting"]);
}
