//! `farshore status`: shards, owners, checkpoints, gaps, pauses and doubts, from the state table of
//! this region.

mod show;

use std::collections::{BTreeMap, BTreeSet};

use super::{answer, answer_json};
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Exit, Failure};
use crate::lease::orphans::readable;
use crate::lease::row::{
    ControlRow, DoubtRow, GapReason, GapRow, JobKind, PauseRow, Progress, Row, ShardRow, WorkerRow,
    audited, comparisons,
};
use crate::lease::rules::worker_of;
use crate::lease::table::StateTable;
use crate::observe::board::RETENTION_MS;
use crate::run::lookout::DOUBT_PATIENCE_MS;
use crate::run::start::unusable;
use crate::stream::stream_label;

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Answers as JSON
    #[arg(long)]
    json: bool,
}

/// What the state table says, sorted.
#[derive(Default)]
struct Found {
    control: Option<ControlRow>,
    shards: Vec<ShardRow>,
    gaps: Vec<GapRow>,
    workers: Vec<WorkerRow>,
    doubts: Vec<DoubtRow>,
    /// Those that stand.
    pauses: Vec<PauseRow>,
    /// When the audit last found a table equal, in milliseconds, by table.
    audits: BTreeMap<String, Option<i64>>,
    /// Comparisons that have not ended.
    jobs: Vec<Job>,
    /// The time in the region of the state table, in milliseconds.
    now_ms: i64,
}

/// The doubts of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Doubts {
    open: usize,
    /// When the last of them is due, in milliseconds.
    until_ms: i64,
    /// How many should have been repaired long ago.
    overdue: usize,
}

/// A comparison under way, or left.
#[derive(Debug, Clone, PartialEq)]
struct Job {
    kind: JobKind,
    id: String,
    table: String,
    source: String,
    target: String,
    applies: bool,
    /// Percent of the items that were read, about.
    percent: u32,
    /// Seconds until the end at the pace so far; `None` where nobody is at it, or it just began.
    left_s: Option<u64>,
    /// Processes at work.
    processes: usize,
    /// Differences found so far.
    different: u64,
    /// Whether somebody is at it.
    alive: bool,
    /// Its own work is done.
    ended: bool,
    /// So many items of the replica are not in the source, and so many may be deleted.
    outstanding: Option<(u64, u64)>,
}

impl Job {
    fn of(job: &Progress<'_>, now_ms: i64) -> Self {
        let plan = job.plan;
        let at_work = job.segments.iter().filter(|row| row.until >= now_ms);
        let owners = at_work.filter_map(|row| row.lease_owner.as_deref().map(worker_of));
        let alive = job.is_alive(now_ms);
        Self {
            kind: plan.kind(),
            id: plan.job.clone(),
            table: plan.table.clone(),
            source: plan.source.clone(),
            target: plan.target.clone(),
            applies: plan.apply,
            percent: (job.part() * 100.0) as u32,
            left_s: job.left_s(now_ms).filter(|_| alive),
            processes: owners.collect::<BTreeSet<_>>().len(),
            different: job.counts().different(),
            alive,
            ended: plan.ended.is_some(),
            outstanding: plan.too_many_deletes,
        }
    }
}

pub(super) async fn run(loaded: Loaded, args: &Args) -> Result<Exit, Failure> {
    super::provision::refuse_embedded(&loaded, "status")?;
    let regions = Regions::connect(&loaded.config).await?;
    let Some(region) = regions.get(&loaded.here) else {
        return Err(Failure::new(
            format!("Region {} is not known", loaded.here),
            "It is not in the configuration",
            "Set `here` to one of the regions",
        ));
    };
    let state = StateTable::new(region.tables.clone(), loaded.config.state_table());
    let rows = state
        .rows()
        .await
        .map_err(|fault| unusable(region, state.name(), &fault))?;
    let found = Found::new(rows, &loaded, region.clock.now_ms());
    if args.json {
        answer_json(&show::as_json(&loaded, &found))?;
    } else {
        answer(&show::as_text(&loaded, &found))?;
    }
    Ok(if found.needs_person(&loaded) {
        Exit::Remains
    } else {
        Exit::Done
    })
}

/// A row that its owner has not written for this long has no living owner: three leases.
fn silent_after_ms(loaded: &Loaded) -> i64 {
    i64::try_from(loaded.config.leases.duration.as_millis())
        .unwrap_or(i64::MAX)
        .saturating_mul(3)
}

/// For how many seconds the owner of `row` has been silent, if that is too long.
fn silence_s(row: &ShardRow, silent_after_ms: i64) -> Option<i64> {
    let silent_ms = host_ms() - row.updated_at?;
    (row.lease_owner.is_some() && silent_ms > silent_after_ms).then_some(silent_ms / 1_000)
}

/// Seconds until the stream forgets the oldest position not known to be applied, now; `None` for a
/// shard of which nothing is known yet.
fn headroom_s(row: &ShardRow) -> Option<i64> {
    Some((row.watermark? + RETENTION_MS - host_ms()).max(0) / 1_000)
}

/// The least headroom of the open shards of `table`, in seconds.
pub(super) fn headroom_of(open: &[ShardRow], table: &str) -> Option<i64> {
    open.iter()
        .filter(|row| row.table == table)
        .filter_map(headroom_s)
        .min()
}

impl Found {
    fn new(rows: Vec<Row>, loaded: &Loaded, now_ms: i64) -> Self {
        let mut found = Self {
            now_ms,
            ..Self::default()
        };
        let (mut plans, mut segments) = (Vec::new(), Vec::new());
        for row in rows {
            match row {
                Row::Control(row) => found.control = Some(row),
                Row::Shard(row) => found.shards.push(row),
                Row::Gap(row) => found.gaps.push(row),
                Row::Worker(row) => found.workers.push(row),
                Row::Doubt(row) => found.doubts.push(row),
                Row::Pause(row) if row.is_closed() => found.pauses.push(row),
                Row::Reconcile(row) => plans.push(row),
                Row::Segment(row) => segments.push(row),
                Row::Stream(_) | Row::Pause(_) | Row::Job(_) | Row::Budget(_) | Row::Other(_) => {}
            }
        }
        let jobs = comparisons(&plans, &segments);
        // Without a control record the configuration decides, and that is the first epoch.
        let epoch = found.control.as_ref().map_or(1, |control| control.epoch);
        for table in &loaded.config.tables {
            if let Some((verified_ms, different)) = audited(&jobs, epoch, &table.name) {
                found.audits.insert(table.name.clone(), verified_ms);
                if different > 0 {
                    let detail = format!("{different} item(s)");
                    let at = rfc3339(now_ms);
                    let gap = GapRow::new(epoch, &table.name, GapReason::Drift, &detail, at);
                    found.gaps.push(gap);
                }
            }
        }
        for job in jobs {
            let kind = job.plan.kind();
            // What the worker began it goes on with.
            if !kind.is_the_workers() && job.is_unfinished(epoch, now_ms) {
                let (epoch, at) = (job.plan.epoch, job.plan.at.clone());
                let reason = GapReason::ReconcileUnfinished;
                let gap = GapRow::new(epoch, &job.plan.table, reason, &job.plan.job, at);
                found.gaps.push(gap);
            }
            // An audit has its own line, and nobody goes on with it by hand.
            let is_shown = match kind {
                JobKind::Audit(_) => false,
                JobKind::Asked => job.plan.ended.is_none(),
                // Until the stream has passed its end, or a person has said what is to be deleted.
                JobKind::Bootstrap | JobKind::GapRepair(_) => {
                    let mut tables = loaded.config.tables.iter();
                    let is_followed = tables.any(|table| table.name == job.plan.table);
                    job.plan.epoch == epoch && is_followed
                }
            };
            if is_shown {
                found.jobs.push(Job::of(&job, now_ms));
            }
        }
        found.keep_current(loaded);
        found.shards.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        found.gaps.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        found.workers.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        found.pauses.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        found
    }

    /// Whether the exit code is 1.
    fn needs_person(&self, loaded: &Loaded) -> bool {
        let silent_after_ms = silent_after_ms(loaded);
        let tables = &loaded.config.tables;
        let unread = tables
            .iter()
            .any(|table| !self.open().any(|row| row.table == table.name));
        let feeds = self
            .control
            .as_ref()
            .is_none_or(|control| control.active != loaded.here);
        let is_the_workers = |job: &Job| job.kind.is_the_workers();
        !self.gaps.is_empty()
            || self.jobs.iter().any(is_the_workers)
            || !self.pauses.is_empty()
            || self.doubts_by_table().values().any(|d| d.overdue > 0)
            || self.orphans(silent_after_ms).next().is_some()
            || self
                .open()
                .any(|row| silence_s(row, silent_after_ms).is_some())
            || (unread && feeds)
    }

    /// Leaves out what nobody follows any more: tables no longer in the file, other epochs, and
    /// what is finished of streams that were re-created. What is not finished of them comes before
    /// the new stream. Stream labels are times, so the highest is the newest.
    fn keep_current(&mut self, loaded: &Loaded) {
        let epoch = self.control.as_ref().map(|control| control.epoch);
        let follows = |table: &str| loaded.config.tables.iter().any(|t| t.name == table);
        let current = |row_epoch: u64| epoch.is_none_or(|epoch| row_epoch == epoch);
        self.shards
            .retain(|row| current(row.epoch) && follows(&row.table));
        self.doubts
            .retain(|row| current(row.epoch) && follows(&row.table));
        let of_file = |row: &PauseRow| row.table.as_deref().is_none_or(follows);
        self.pauses.retain(of_file);
        let mut newest: BTreeMap<String, String> = BTreeMap::new();
        for row in &self.shards {
            let label = stream_label(&row.stream_arn);
            let known = newest.entry(row.table.clone()).or_default();
            if label > known.as_str() {
                label.clone_into(known);
            }
        }
        // What an old stream still has to say is applied before the new one's.
        self.shards.retain(|row| {
            !row.is_finished()
                || newest.get(&row.table).map(String::as_str) == Some(stream_label(&row.stream_arn))
        });
    }

    /// Shards that are not applied to their end.
    fn open(&self) -> impl Iterator<Item = &ShardRow> {
        self.shards.iter().filter(|row| !row.is_finished())
    }

    /// Open shards that nobody owns although nothing holds them back. A child waits for its
    /// parent, and a new stream for the old one, without an owner, and rightly so; at a rotation or
    /// a deploy nobody owns a shard for a moment.
    fn orphans(&self, after_ms: i64) -> impl Iterator<Item = &ShardRow> {
        let epoch = self.shards.first().map_or(0, |row| row.epoch);
        readable(&self.shards, epoch).filter(move |row| {
            let since_ms = row.updated_at.unwrap_or(row.created_at);
            row.lease_owner.is_none() && host_ms() - since_ms > after_ms
        })
    }

    fn doubts_by_table(&self) -> BTreeMap<&str, Doubts> {
        let mut tables = BTreeMap::new();
        for row in &self.doubts {
            let doubts = tables.entry(row.table.as_str()).or_insert(Doubts {
                open: 0,
                until_ms: i64::MIN,
                overdue: 0,
            });
            doubts.open += 1;
            doubts.until_ms = doubts.until_ms.max(row.until);
            doubts.overdue += usize::from(row.due + DOUBT_PATIENCE_MS < self.now_ms);
        }
        tables
    }

    /// How many open shards a worker owns.
    fn held_by(&self, worker: &str) -> usize {
        self.open()
            .filter(|row| row.lease_owner.as_deref().map(worker_of) == Some(worker))
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::read::parse;
    use crate::lease::row::DoubtCause;
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

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

    fn shard(label: &str, id: &str) -> ShardRow {
        let arn = format!("arn:aws:dynamodb:r:1:table/orders/stream/{label}");
        let shard = ShardId(id.to_owned());
        let start = Position::TrimHorizon;
        let mut row = ShardRow::new(1, "orders", &arn, &shard, None, &start, 0);
        row.lease_owner = Some("host-1#a.1".to_owned());
        row.updated_at = Some(host_ms());
        row
    }

    fn doubt(until: i64) -> DoubtRow {
        let (shard, start) = (ShardId("s".to_owned()), Position::TrimHorizon);
        let cause = DoubtCause::Unanswered;
        let at = String::new();
        DoubtRow::new(1, "orders", "arn/1", &shard, cause, &start, until, at)
    }

    /// Whether status exits with 1 given a healthy shard and `more`, at the time 0.
    fn needs_person(more: Vec<Row>) -> bool {
        let loaded = loaded();
        let mut rows = vec![Row::Shard(shard("1", "s"))];
        rows.extend(more);
        Found::new(rows, &loaded, 0).needs_person(&loaded)
    }

    #[test]
    fn a_doubt_needs_a_person_only_when_it_is_long_overdue() {
        let young = || Row::Doubt(doubt(1_000));
        let old = doubt(-DOUBT_PATIENCE_MS - 1);
        // Claimed and given back again and again: that is what nobody would see otherwise.
        let claimed = DoubtRow {
            until: 1_000,
            ..old.clone()
        };
        let due = Row::Doubt(doubt(-DOUBT_PATIENCE_MS));
        assert!(!needs_person(vec![young(), due]));
        assert!(needs_person(vec![young(), Row::Doubt(old)]));
        assert!(needs_person(vec![young(), Row::Doubt(claimed)]));
    }

    #[test]
    fn a_closed_tap_needs_a_person_and_one_opened_again_does_not() {
        let mut pause = PauseRow::new(Some("orders"), "a", "b", "c".to_owned());
        assert!(needs_person(vec![Row::Pause(pause.clone())]));
        pause.resumed = Some(crate::lease::row::Resumed {
            by: "a".to_owned(),
            reason: "b".to_owned(),
            at: "d".to_owned(),
        });
        assert!(!needs_person(vec![Row::Pause(pause)]));
    }

    #[test]
    fn an_older_stream_is_shown_until_it_is_finished() {
        let loaded = loaded();
        let old = |checkpoint: &str| {
            let mut row = shard("1", "old");
            checkpoint.clone_into(&mut row.checkpoint);
            row
        };
        let shown = |old: ShardRow| {
            let rows = vec![Row::Shard(old), Row::Shard(shard("2", "new"))];
            Found::new(rows, &loaded, 0).shards.len()
        };
        assert_eq!(shown(old("7")), 2);
        assert_eq!(shown(old(crate::lease::row::SHARD_END)), 1);
    }
}
