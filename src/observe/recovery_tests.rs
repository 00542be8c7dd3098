use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::lease::row::{DoubtCause, FORMAT_VERSION, GapReason, SHARD_END};
use crate::stream::ShardId;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

const ARN: &str = "arn:aws:dynamodb:r:1:table/t/stream/2026-11-27T00:00:00.000";

fn shard(id: &str, parent: Option<&str>) -> ShardRow {
    let parent = parent.map(|parent| ShardId(parent.to_owned()));
    let (id, start) = (ShardId(id.to_owned()), Position::TrimHorizon);
    ShardRow::new(1, "t", ARN, &id, parent.as_ref(), &start, 0)
}

fn stream(begun_at: Option<i64>) -> StreamRow {
    StreamRow {
        lease_key: StreamRow::key(1, "t", ARN),
        entity_type: "stream".to_owned(),
        format_version: FORMAT_VERSION,
        table: "t".to_owned(),
        stream_arn: ARN.to_owned(),
        table_id: None,
        start_timestamp: None,
        initialised: true,
        finished: false,
        begun_at,
        settled: true,
    }
}

fn doubt(id: &str, applied_until: Option<i64>) -> DoubtRow {
    let (id, start) = (ShardId(id.to_owned()), Position::TrimHorizon);
    let cause = DoubtCause::Unanswered;
    let mut row = DoubtRow::new(1, "t", ARN, &id, cause, &start, 0, String::new());
    row.applied_until = applied_until;
    row
}

/// All that decides, and nothing of it yet.
#[derive(Default)]
struct Rows {
    shards: Vec<ShardRow>,
    streams: Vec<StreamRow>,
    gaps: Vec<GapRow>,
    doubts: Vec<DoubtRow>,
    live: Live,
    source_ms: i64,
}

impl Rows {
    fn of(shards: Vec<ShardRow>) -> Self {
        Self {
            shards,
            streams: vec![stream(Some(1_000))],
            ..Self::default()
        }
    }

    fn moments(&self) -> Moments {
        let ground = Ground {
            epoch: 1,
            shards: &self.shards,
            streams: &self.streams,
            gaps: &self.gaps,
            doubts: &self.doubts,
            jobs: &[],
            live: &self.live,
            source_ms: self.source_ms,
            replica_ms: self.source_ms,
            listing_limit_ms: 95_000,
        };
        of_tables(ground, std::iter::once("t"))["t"]
    }

    fn proven(&self) -> Option<i64> {
        self.moments().proven_ms
    }
}

fn proven(mut row: ShardRow, ms: i64) -> ShardRow {
    row.proven_until = Some(ms);
    row
}

fn finished(mut row: ShardRow, children: &[&str], listed: bool) -> ShardRow {
    row.checkpoint = SHARD_END.to_owned();
    row.child_shard_ids = children.iter().map(|id| (*id).to_owned()).collect();
    row.finished_at = Some(0);
    row.children_listed = listed;
    row
}

#[test]
fn a_table_is_as_old_as_its_oldest_shard() {
    let rows = Rows::of(vec![
        proven(shard("a", None), 5_000),
        proven(shard("b", None), 3_000),
    ]);
    assert_eq!(rows.proven(), Some(3_000));
}

#[test]
fn a_child_has_its_parents_moment_until_it_has_its_own() {
    let mut rows = Rows::of(vec![
        finished(proven(shard("p", None), 5_000), &["c"], true),
        shard("c", Some("p")),
    ]);
    assert_eq!(rows.proven(), Some(5_000));
    rows.shards[1].proven_until = Some(9_000);
    assert_eq!(rows.proven(), Some(9_000));
    // Two generations without a record.
    rows.shards[1] = finished(shard("c", Some("p")), &["g"], true);
    rows.shards.push(shard("g", Some("c")));
    assert_eq!(rows.proven(), Some(5_000));
}

#[test]
fn an_ended_shard_holds_until_every_child_of_it_has_a_row() {
    let parent =
        |children: &[&str], listed| finished(proven(shard("p", None), 5_000), children, listed);
    let child = || proven(shard("c", Some("p")), 9_000);
    assert_eq!(Rows::of(vec![parent(&[], true)]).proven(), Some(5_000));
    let one_lacks = Rows::of(vec![parent(&["c", "d"], true), child()]);
    assert_eq!(one_lacks.proven(), Some(5_000));
    assert_eq!(one_lacks.moments().estimated_ms, Some(5_000));
    // A sibling may still be listed.
    let mut unsure = Rows::of(vec![parent(&["c"], false), child()]);
    assert_eq!(unsure.proven(), Some(5_000));
    assert_eq!(unsure.moments().estimated_ms, Some(9_000));
    unsure.source_ms = 95_001;
    assert_eq!(
        unsure.moments().estimated_ms,
        Some(5_000),
        "no listing came"
    );
    assert_eq!(
        Rows::of(vec![parent(&["c"], true), child()]).proven(),
        Some(9_000)
    );
}

#[test]
fn nothing_is_known_before_the_stream_is_and_before_its_shards_are_settled() {
    let mut rows = Rows::of(vec![proven(shard("a", None), 5_000)]);
    rows.streams[0].settled = false;
    assert_eq!(
        (rows.proven(), rows.moments().estimated_ms),
        (None, Some(5_000))
    );
    rows.streams[0].initialised = false;
    assert_eq!(rows.moments(), Moments::UNKNOWN);
    rows.streams.clear();
    assert_eq!(rows.moments(), Moments::UNKNOWN);
    assert_eq!(Rows::of(Vec::new()).moments(), Moments::UNKNOWN);
}

#[test]
fn a_shard_of_which_nothing_is_known_has_no_moment() {
    let mut rows = Rows::of(vec![shard("a", Some("trimmed"))]);
    assert_eq!(rows.moments(), Moments::UNKNOWN, "a day's backlog may wait");
    rows.shards[0].watermark = Some(1_001);
    assert_eq!(rows.proven(), None, "empty pages prove nothing");
    assert_eq!(rows.moments().estimated_ms, Some(1_001));
}

#[test]
fn gaps_and_doubts_hold_both_kinds_back() {
    let mut rows = Rows::of(vec![proven(shard("a", None), 5_000)]);
    rows.doubts = vec![doubt("a", Some(4_000))];
    assert_eq!(rows.moments(), Moments::both(Some(4_000)));
    rows.doubts.push(doubt("b", None));
    assert_eq!(rows.moments(), Moments::UNKNOWN);
    rows.doubts.clear();
    let gap = GapRow::new(1, "t", GapReason::Trimmed, "d", String::new());
    rows.gaps = vec![gap.clone().applied_until(Some(3_000))];
    assert_eq!(rows.moments(), Moments::both(Some(3_000)));
    rows.gaps = vec![gap];
    assert_eq!(rows.moments(), Moments::UNKNOWN);
    rows.gaps[0].table = "other".to_owned();
    assert_eq!(rows.proven(), Some(5_000));
}

#[test]
fn an_old_stream_holds_the_new_one_back_until_it_is_finished() {
    let mut rows = Rows::of(vec![proven(shard("a", None), 5_000)]);
    let newer = ARN.replace("11-27", "11-28");
    let mut stream = stream(Some(8_000));
    stream.stream_arn.clone_from(&newer);
    stream.lease_key = StreamRow::key(1, "t", &newer);
    rows.streams.push(stream);
    let mut new = proven(shard("n", None), 9_000);
    new.stream_arn = newer;
    rows.shards.push(new);
    assert_eq!(rows.proven(), Some(5_000));
    rows.streams[0].finished = true;
    assert_eq!(rows.proven(), Some(9_000));
}

#[test]
fn what_is_in_memory_moves_the_estimate_alone() {
    let mut rows = Rows::of(vec![proven(shard("a", None), 5_000)]);
    let standing = Standing {
        oldest_open_ms: Some(8_000),
        applied_until_ms: Some(9_500),
        proven_ms: Some(6_000),
    };
    let shards = BTreeMap::from([("a".to_owned(), standing)]);
    rows.live = BTreeMap::from([("t".to_owned(), shards)]);
    let moments = rows.moments();
    assert_eq!(
        moments.proven_ms,
        Some(6_000),
        "stored since the rows were read"
    );
    assert_eq!(moments.estimated_ms, Some(8_000));
}

#[test]
fn the_age_includes_the_error_of_the_clock_and_unknown_stays_unknown() {
    let clock = Reading {
        now_ms: 10_000,
        error_ms: 1_000,
    };
    let moments = Moments {
        proven_ms: Some(4_000),
        estimated_ms: Some(9_000),
    };
    let age = moments.age(clock);
    assert_eq!((age.proven_s, age.estimated_s), (Some(7.0), Some(1.0)));
    assert_eq!(Moments::UNKNOWN.age(clock), Age::default());
    let group = of_group([moments, Moments::both(Some(5_000))].iter());
    assert_eq!(
        (group.proven_ms, group.estimated_ms),
        (Some(4_000), Some(5_000))
    );
    assert_eq!(
        of_group([moments, Moments::UNKNOWN].iter()),
        Moments::UNKNOWN
    );
}

#[test]
fn an_owner_says_nothing_before_it_has_read_what_holds_it_and_never_takes_back() {
    let start = Instant::now();
    let later = |s: u64| Some(start + Duration::from_secs(s));
    let all = |ms| ms;
    let mut proof = Proof::new(Some(3), later(5).unwrap());
    assert_eq!(
        proof.may_say(Some(9), later(5), all),
        Some(3),
        "read before"
    );
    assert_eq!(proof.may_say(Some(9), None, all), Some(3));
    assert_eq!(proof.may_say(Some(9), later(6), all), Some(9));
    proof.doubted(Some(7));
    assert_eq!(proof.may_say(Some(9), later(6), all), Some(7));
    proof.held(true, later(8).unwrap());
    assert_eq!(
        proof.may_say(Some(9), later(7), all),
        Some(3),
        "not read since"
    );
    let holds = Holds::of(&[doubt("a", Some(7))], &[]);
    let key = shard("a", None).lease_key;
    let let_pass = |ms| holds.let_pass(&key, "t", ms);
    assert_eq!(proof.may_say(Some(9), later(9), let_pass), Some(7));
    proof.checkpointed(Some(9), Some(7));
    assert_eq!(proof.may_say(proof.stored_ms(), later(10), all), Some(9));
    proof.said(Some(2));
    assert_eq!(proof.said_ms(), Some(7));
    let unknown = Holds::of(&[doubt("a", Some(7)), doubt("a", None)], &[]);
    assert_eq!(unknown.let_pass(&key, "t", Some(9)), None);
    assert_eq!(unknown.let_pass("other", "t", Some(9)), Some(9));
}

/// A shard of the source and what became of it.
#[derive(Debug, Clone)]
struct Real {
    id: String,
    parent: Option<usize>,
    created_ms: i64,
    closed: bool,
    /// When each record was made, in milliseconds.
    records: Vec<i64>,
    /// How many of them are in the replica, and how many are checkpointed.
    applied: usize,
    checkpointed: usize,
    finished: bool,
}

/// A source, a replica, and the rows between them.
struct World {
    now_ms: i64,
    real: Vec<Real>,
    rows: Vec<ShardRow>,
    doubts: Vec<DoubtRow>,
    /// Rows as somebody reads them, partition by partition, while they change.
    torn: Option<Torn>,
    forwards: bool,
}

#[derive(Debug, Clone)]
enum Step {
    Tick(u16),
    Write(u8),
    Rotate(u8),
    Split(u8),
    Apply(u8, u8),
    Checkpoint(u8),
    /// The owner dies; who takes over reads on from the checkpoint.
    Crash(u8),
    /// Every write of a range in doubt is dead, and its keys are repaired.
    Settle,
    /// `bool`: whether the answer leaves a child out.
    Finish(u8, bool),
    List,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u16..3_000).prop_map(Step::Tick),
        any::<u8>().prop_map(Step::Write),
        any::<u8>().prop_map(Step::Write),
        any::<u8>().prop_map(Step::Rotate),
        any::<u8>().prop_map(Step::Split),
        (any::<u8>(), 1u8..5).prop_map(|(shard, n)| Step::Apply(shard, n)),
        (any::<u8>(), 1u8..5).prop_map(|(shard, n)| Step::Apply(shard, n)),
        any::<u8>().prop_map(Step::Checkpoint),
        any::<u8>().prop_map(Step::Checkpoint),
        any::<u8>().prop_map(Step::Crash),
        Just(Step::Settle),
        (any::<u8>(), any::<bool>()).prop_map(|(shard, less)| Step::Finish(shard, less)),
        (any::<u8>(), any::<bool>()).prop_map(|(shard, less)| Step::Finish(shard, less)),
        Just(Step::List),
    ]
}

impl World {
    fn new() -> Self {
        let root = |id: &str| Real {
            id: id.to_owned(),
            parent: None,
            created_ms: 0,
            closed: false,
            records: Vec::new(),
            applied: 0,
            checkpointed: 0,
            finished: false,
        };
        Self {
            now_ms: 1_000,
            real: vec![root("0"), root("1")],
            rows: vec![shard("0", None), shard("1", None)],
            doubts: Vec::new(),
            torn: None,
            forwards: true,
        }
    }

    /// One of the shards that `wanted` holds for.
    fn pick(&self, which: u8, wanted: impl Fn(&Self, &Real) -> bool) -> Option<usize> {
        let found = (0..self.real.len()).filter(|i| wanted(self, &self.real[*i]));
        let found: Vec<usize> = found.collect();
        (!found.is_empty()).then(|| found[usize::from(which) % found.len()])
    }

    fn row(&mut self, index: usize) -> Option<&mut ShardRow> {
        let id = self.real[index].id.clone();
        self.rows.iter_mut().find(|row| row.shard_id == id)
    }

    fn is_read(&self, real: &Real) -> bool {
        let has_row = self.rows.iter().any(|row| row.shard_id == real.id);
        let parent_done = real.parent.is_none_or(|parent| self.real[parent].finished);
        has_row && parent_done && !real.finished
    }

    fn open(&mut self, parent: usize) {
        self.real.push(Real {
            id: self.real.len().to_string(),
            parent: Some(parent),
            created_ms: self.now_ms,
            closed: false,
            records: Vec::new(),
            applied: 0,
            checkpointed: 0,
            finished: false,
        });
    }

    fn children(&self, parent: usize) -> Vec<String> {
        let children = self.real.iter().filter(|real| real.parent == Some(parent));
        children.map(|real| real.id.clone()).collect()
    }

    fn make_row(&mut self, id: &str, parent: usize) {
        if !self.rows.iter().any(|row| row.shard_id == id) {
            let parent = self.real[parent].id.clone();
            self.rows.push(shard(id, Some(&parent)));
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Tick(ms) => self.now_ms += i64::from(ms),
            Step::Write(which) => {
                let now_ms = self.now_ms;
                if let Some(index) = self.pick(which, |_, real| !real.closed) {
                    self.real[index].records.push(now_ms);
                }
            }
            Step::Rotate(which) | Step::Split(which) if self.real.len() < 24 => {
                if let Some(index) = self.pick(which, |_, real| !real.closed) {
                    self.real[index].closed = true;
                    self.open(index);
                    if matches!(step, Step::Split(_)) {
                        self.open(index);
                    }
                }
            }
            Step::Rotate(_) | Step::Split(_) => {}
            Step::Apply(which, n) => {
                if let Some(index) = self.pick(which, Self::is_read) {
                    let real = &mut self.real[index];
                    real.applied = (real.applied + usize::from(n)).min(real.records.len());
                }
            }
            Step::Checkpoint(which) => {
                if let Some(index) = self.pick(which, Self::is_read) {
                    self.checkpoint(index);
                }
            }
            Step::Crash(which) => self.crash(which),
            Step::Settle => self.doubts.clear(),
            Step::Finish(which, less) => self.finish(which, less),
            Step::List => self.list(),
        }
    }

    fn checkpoint(&mut self, index: usize) {
        let real = &mut self.real[index];
        real.checkpointed = real.applied;
        let Some(last) = real.checkpointed.checked_sub(1) else {
            return;
        };
        // As the stream stamps it.
        let by = Some(real.records[last] / 1_000 * 1_000);
        let holds = Holds::of(&self.doubts, &[]);
        let Some(row) = self.row(index) else {
            return;
        };
        let said = holds.let_pass(&row.lease_key, "t", by);
        row.proven_until = row.proven_until.max(said);
        row.watermark = row.watermark.max(by);
        if let Some(sequence) = SequenceNumber::parse(&(last + 1).to_string()) {
            row.checkpoint_at(&sequence);
        }
    }

    /// What was applied after the checkpoint is applied again, older values first: until it has come so
    /// far, the replica lacks the newer ones.
    fn crash(&mut self, which: u8) {
        let Some(index) = self.pick(which, Self::is_read) else {
            return;
        };
        let real = &mut self.real[index];
        real.applied = real.checkpointed;
        let Some(row) = self.row(index) else {
            return;
        };
        let (id, said) = (row.shard_id.clone(), row.proven_until);
        self.doubts.push(doubt(&id, said));
    }

    fn finish(&mut self, which: u8, less: bool) {
        let is_done = |world: &Self, real: &Real| {
            world.is_read(real) && real.closed && real.applied == real.records.len()
        };
        let Some(index) = self.pick(which, is_done) else {
            return;
        };
        let mut children = self.children(index);
        if less && children.len() > 1 {
            children.pop();
        }
        for child in &children {
            self.make_row(child, index);
        }
        self.checkpoint(index);
        let now_ms = self.now_ms;
        self.real[index].finished = true;
        if let Some(row) = self.row(index) {
            row.checkpoint = SHARD_END.to_owned();
            row.child_shard_ids = children;
            row.finished_at = Some(now_ms);
        }
    }

    /// A complete listing, which may lack what is young.
    fn list(&mut self) {
        let now_ms = self.now_ms;
        let old_enough = |real: &Real| now_ms - real.created_ms >= LISTED_LATE_MS;
        let listed: Vec<(String, usize)> = self
            .real
            .iter()
            .filter(|real| old_enough(real))
            .filter_map(|real| Some((real.id.clone(), real.parent?)))
            .collect();
        for (id, parent) in listed {
            self.make_row(&id, parent);
        }
        let named: Vec<(String, String)> = (self.rows.iter())
            .flat_map(|row| {
                row.parent_shard_id
                    .iter()
                    .map(|p| (p.clone(), row.shard_id.clone()))
            })
            .collect();
        for row in &mut self.rows {
            let ended = row.finished_at.filter(|_| row.is_finished());
            if ended.is_some_and(|at| at + LISTED_LATE_MS <= now_ms) {
                row.children_listed = true;
                let children = named.iter().filter(|(parent, _)| *parent == row.shard_id);
                row.child_shard_ids = children.map(|(_, child)| child.clone()).collect();
            }
        }
    }

    /// The moment at which the oldest change was made that is not in the replica.
    fn truth(&self) -> Option<i64> {
        let lacking = self
            .real
            .iter()
            .flat_map(|real| real.records[real.applied..].iter());
        lacking.copied().min()
    }

    fn shown(&self, shards: Vec<ShardRow>) -> Option<i64> {
        let mut rows = Rows::of(shards);
        rows.streams[0].begun_at = Some(500);
        rows.doubts.clone_from(&self.doubts);
        rows.source_ms = self.now_ms;
        rows.proven()
    }

    /// Reads one more row of a reading that goes on meanwhile; what it shows once it is complete. Rows come
    /// in any order: those made meanwhile are seen by every other reading.
    fn read_one_more(&mut self) -> Option<Vec<ShardRow>> {
        let last = self.rows.len().saturating_sub(1);
        let torn = self.torn.get_or_insert_with(|| Torn {
            read: Vec::new(),
            next: if self.forwards { 0 } else { last },
            left: true,
        });
        if torn.left {
            torn.read.extend(self.rows.get(torn.next).cloned());
            (torn.next, torn.left) = match self.forwards {
                true => (torn.next + 1, torn.next < last),
                false => (torn.next.saturating_sub(1), torn.next > 0),
            };
            return None;
        }
        self.forwards = !self.forwards;
        self.torn.take().map(|torn| torn.read)
    }
}

/// A reading under way.
struct Torn {
    read: Vec<ShardRow>,
    next: usize,
    left: bool,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever the source and the fleet do: no change made before the proven moment is ever missing in
    /// the replica, and a reading of the rows that took a while shows no younger one.
    #[test]
    fn nothing_before_the_proven_moment_is_ever_missing(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.take(step);
            let complete = world.read_one_more();
            let Some(truth) = world.truth() else {
                continue;
            };
            if let Some(shown) = world.shown(world.rows.clone()) {
                prop_assert!(shown <= truth, "{shown} is shown, {truth} is missing after {step:?}");
            }
            if let Some(shown) = complete.and_then(|rows| world.shown(rows)) {
                prop_assert!(shown <= truth, "{shown} is shown by a torn reading, {truth} is missing");
            }
        }
    }
}

/// A thousand shards are looked at once a second; a look must cost next to nothing. The bound is wide, for
/// builds without optimisation on a busy machine; `--nocapture` shows what it takes.
#[test]
fn a_thousand_shards_take_no_time() {
    let mut shards = Vec::new();
    for number in 0..1_000 {
        let parent = format!("p{number}");
        let child = format!("c{number}");
        shards.push(finished(
            proven(shard(&parent, None), 5_000),
            &[&child],
            true,
        ));
        shards.push(shard(&child, Some(&parent)));
    }
    let rows = Rows::of(shards);
    let start = Instant::now();
    assert_eq!(rows.proven(), Some(5_000));
    let took = start.elapsed();
    println!("1,000 open shards, 1,000 finished: {took:?}");
    assert!(took < Duration::from_millis(250), "{took:?}");
}
