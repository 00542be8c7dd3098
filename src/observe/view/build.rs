//! The view of a group, made of rows of the state table and of what a worker knows besides. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::home::homeward;
use super::{
    Answering, ClockOf, Closed, Copying, DeadLetters, Doubts, Event, Flow, Gap, Headline, History,
    Job, Level, Outage, Pause, RecoveryPoint, Refused, Region, RegionRole, RegionState, Shard,
    ShardCounts, ShardState, Table, VERSION, View, Worker,
};
use crate::config::Config;
use crate::dynamo::clock::{Reading, rfc3339};
use crate::error::{Class, Fault};
use crate::lease::control::{Part, part};
use crate::lease::orphans::readable;
use crate::lease::row::{
    ControlRow, DoubtRow, GapReason, GapRow, JobKind, Mending, PauseRow, Progress, ReconcileRow,
    SegmentRow, ShardRow, StreamRow, TrackRow, WorkerRow, audited, comparisons,
};
use crate::lease::rules::worker_of;
use crate::observe::board::RETENTION_MS;
use crate::observe::headline::headline;
use crate::observe::health::{IDLE_CODES, Reason};
use crate::observe::history::rounded;
use crate::observe::liveness::Limits;
use crate::observe::recovery::{Age, Ground, Live, Moments, of_group, of_shards, of_tables};
use crate::stream::stream_label;

/// A doubt that is due for longer than this should have been repaired: ten minutes.
pub const DOUBT_PATIENCE_MS: i64 = 10 * 60 * 1_000;
/// Shards that were finished so lately are shown.
const FINISHED_SHOWN_MS: i64 = 60 * 60 * 1_000;

/// The rows of the state table.
#[derive(Clone, Copy, Default)]
pub struct Rows<'a> {
    /// Which region is active.
    pub control: Option<&'a ControlRow>,
    /// Leases.
    pub shards: &'a [ShardRow],
    /// Streams.
    pub streams: &'a [StreamRow],
    /// Gaps.
    pub gaps: &'a [GapRow],
    /// Doubts.
    pub doubts: &'a [DoubtRow],
    /// Processes.
    pub workers: &'a [WorkerRow],
    /// Taps, closed or opened again.
    pub pauses: &'a [PauseRow],
    /// Comparisons.
    pub plans: &'a [ReconcileRow],
    /// Their segments.
    pub segments: &'a [SegmentRow],
    /// How far streams of a region that is not fed are read.
    pub tracks: &'a [TrackRow],
}

/// A region that was asked something.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Its label.
    pub label: String,
    /// Why it does not do what it was asked, and since when, RFC 3339, where that is known.
    pub trouble: Option<(Fault, Option<String>)>,
}

/// What a worker knows of a table besides.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TableFacts {
    /// Records applied since it started.
    pub records: u64,
    /// The largest lag of the last minute, in seconds.
    pub lag_s: Option<f64>,
}

/// What is known besides the rows.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The worker that answers; none where nobody but the state table does. Its own reasons then stand
    /// for those that the rows show.
    pub answering: Option<Answering>,
    /// Why it is not ready.
    pub reasons: Vec<Reason>,
    /// What it cannot reach.
    pub outages: Vec<Outage>,
    /// The regions that were asked something.
    pub asked: Vec<Asked>,
    /// Dead letters in the queue, and the seconds left for the oldest.
    pub letters: Option<(u64, Option<f64>)>,
    /// Dead letters it sent, by table and class.
    pub lettered: BTreeMap<(String, &'static str), u64>,
    /// Of each table.
    pub tables: BTreeMap<String, TableFacts>,
    /// What changed lately.
    pub events: Vec<Event>,
    /// The last hour.
    pub history: Option<History>,
}

/// All that there is to be seen.
pub struct Seen<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// Label of the region this is seen from.
    pub here: &'a str,
    /// Label of the active region, as the worker has found it, where a worker answers.
    pub active: Option<&'a str>,
    /// The time, and how far it may be off.
    pub clock: Reading,
    /// Whose.
    pub clock_of: ClockOf,
    /// The time in the region of the state table, in milliseconds.
    pub replica_ms: i64,
    /// This host's time: owners tell theirs, for people. In milliseconds.
    pub host_ms: i64,
    /// The state table.
    pub rows: Rows<'a>,
    /// The shards of the worker that answers.
    pub live: &'a Live,
    /// What is known besides.
    pub facts: Facts,
}

/// The view.
pub fn build(seen: Seen<'_>) -> View {
    let jobs = comparisons(seen.rows.plans, seen.rows.segments);
    let control = seen.rows.control;
    // Without a control record the configuration decides, and that is the first epoch.
    let epoch = control.map_or(1, |control| control.epoch);
    let active = seen
        .active
        .or(control.map(|control| control.active.as_str()));
    let source = active.unwrap_or(&seen.config.active).to_owned();
    let reasons = &seen.facts.reasons;
    let is_idle = |reason: &Reason| IDLE_CODES.contains(&reason.code.as_str());
    // A worker that feeds nothing reads no rows, and says so itself.
    let told = reasons.iter().any(|reason| reason.code == "quarantined");
    let waits =
        |own: &ControlRow| part(seen.here, (&source, epoch), Some(own), [own]) == Part::Quarantined;
    let quarantined = told || control.is_some_and(waits);
    let mut builder = Builder {
        feeds: source != seen.here && !quarantined && !reasons.iter().any(is_idle),
        quarantined,
        active: active.map(str::to_owned),
        source,
        epoch,
        jobs: &jobs,
        seen: &seen,
        current: Vec::new(),
        unowned: Vec::new(),
        gaps: Vec::new(),
    };
    builder.current = builder.current();
    builder.unowned = builder.unowned().collect();
    builder.gaps = builder.all_gaps();
    let mut view = builder.view();
    view.headline = headline(&view);
    view
}

pub(super) struct Builder<'a> {
    pub(super) seen: &'a Seen<'a>,
    jobs: &'a [Progress<'a>],
    active: Option<String>,
    pub(super) source: String,
    pub(super) epoch: u64,
    pub(super) feeds: bool,
    pub(super) quarantined: bool,
    /// The shards that are followed, in the order of their keys.
    current: Vec<&'a ShardRow>,
    /// Those that nobody living owns.
    unowned: Vec<&'a ShardRow>,
    gaps: Vec<GapRow>,
}

impl<'a> Builder<'a> {
    fn view(&self) -> View {
        let seen = self.seen;
        let moments = self.moments();
        let tables: Vec<Table> = seen
            .config
            .tables
            .iter()
            .map(|table| {
                let moments = moments.get(table.name.as_str()).copied();
                self.table(table, moments.unwrap_or_default())
            })
            .collect();
        let group = of_group(moments.values()).age(seen.clock);
        let mut view = View {
            version: VERSION,
            group: seen.config.group.clone(),
            here: seen.here.to_owned(),
            active: self.active.clone(),
            epoch: seen.rows.control.map(|control| control.epoch),
            at: rfc3339(seen.clock.now_ms),
            clock: seen.clock_of,
            clock_error_seconds: seen.clock.error_ms as f64 / 1_000.0,
            worker: seen.facts.answering.clone(),
            headline: Headline {
                level: Level::Ok,
                code: String::new(),
                text: String::new(),
                next: None,
            },
            recovery_point: shown(group),
            headroom_seconds: least(tables.iter().map(|table| table.headroom_seconds)),
            regions: self.regions(),
            home: homeward(seen.here, seen.rows.control, seen.rows.tracks),
            flow: self.feeds.then(|| Flow {
                source: self.source.clone(),
                target: seen.here.to_owned(),
            }),
            shards: self.shards(),
            workers: self.workers(),
            gaps: self.gaps(),
            doubts: self.doubts(),
            dead_letters: self.dead_letters(),
            jobs: self.shown_jobs(),
            pauses: self.pauses(),
            outages: seen.facts.outages.clone(),
            reasons: seen.facts.reasons.clone(),
            events: seen.facts.events.clone(),
            history: seen.facts.history.clone(),
            tables,
        };
        if seen.facts.answering.is_none() {
            let mut reasons = self.reasons(&view);
            view.reasons.append(&mut reasons);
        }
        view
    }

    fn moments(&self) -> BTreeMap<&str, Moments> {
        let tables = self
            .seen
            .config
            .tables
            .iter()
            .map(|table| table.name.as_str());
        if !self.feeds {
            return BTreeMap::new();
        }
        of_tables(self.ground(), tables)
    }

    fn ground(&self) -> Ground<'_> {
        let (seen, rows) = (self.seen, &self.seen.rows);
        let limit = Limits::of(seen.config).listing.as_millis();
        Ground {
            epoch: self.epoch,
            shards: rows.shards,
            streams: rows.streams,
            gaps: rows.gaps,
            doubts: rows.doubts,
            jobs: self.jobs,
            live: seen.live,
            source_ms: seen.clock.now_ms,
            replica_ms: seen.replica_ms,
            listing_limit_ms: i64::try_from(limit).unwrap_or(i64::MAX),
        }
    }

    /// The shards of tables in the file and of this epoch, without those finished of streams that were
    /// made anew. What is not finished of them comes before the new stream. Stream labels are times, so
    /// the highest is the newest.
    fn current(&self) -> Vec<&'a ShardRow> {
        let follows = |table: &str| self.seen.config.tables.iter().any(|t| t.name == table);
        let rows = self.seen.rows.shards.iter();
        let mut rows: Vec<&ShardRow> = rows
            .filter(|row| row.epoch == self.epoch && follows(&row.table))
            .collect();
        let mut newest: BTreeMap<&str, &str> = BTreeMap::new();
        for row in &rows {
            let label = stream_label(&row.stream_arn);
            let known = newest.entry(&row.table).or_default();
            *known = (*known).max(label);
        }
        rows.retain(|row| {
            !row.is_finished()
                || newest.get(row.table.as_str()).copied() == Some(stream_label(&row.stream_arn))
        });
        rows.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        rows
    }

    /// A row that its owner has not written for this long has no living owner: three leases.
    pub(super) fn silent_after_ms(&self) -> i64 {
        i64::try_from(self.seen.config.leases.duration.as_millis())
            .unwrap_or(i64::MAX)
            .saturating_mul(3)
    }

    /// For how many seconds the owner of `row` has been silent, if that is too long.
    fn silence_s(&self, row: &ShardRow) -> Option<i64> {
        let silent_ms = self.seen.host_ms - row.updated_at?;
        (row.lease_owner.is_some() && silent_ms > self.silent_after_ms())
            .then_some(silent_ms / 1_000)
    }

    /// Seconds until the stream forgets the oldest position of `row` that is not known to be applied.
    fn headroom_s(&self, row: &ShardRow) -> Option<f64> {
        if row.is_finished() {
            return None;
        }
        let now_ms = self.seen.clock.now_ms;
        let live = self.seen.live.get(&row.table);
        let live = live.and_then(|shards| shards.get(&row.shard_id));
        let by_row = (row.proven_ms() + RETENTION_MS - now_ms).max(0) as f64 / 1_000.0;
        Some(
            live.and_then(|standing| standing.headroom_s(now_ms))
                .unwrap_or(by_row),
        )
    }

    /// Open shards that nobody living owns although nothing holds them back. A child waits for its
    /// parent, and a new stream for the old one, without an owner, and rightly so; at a rotation or
    /// a deploy nobody owns a shard for a moment.
    fn unowned(&self) -> impl Iterator<Item = &'a ShardRow> + '_ {
        let follows = |table: &str| self.seen.config.tables.iter().any(|t| t.name == table);
        readable(self.seen.rows.shards, self.epoch)
            .filter(move |row| follows(&row.table))
            .filter(move |row| {
                let since_ms = row.updated_at.unwrap_or(row.created_at);
                let is_long = self.seen.host_ms - since_ms > self.silent_after_ms();
                self.silence_s(row).is_some() || (row.lease_owner.is_none() && is_long)
            })
    }

    fn table(&self, table: &crate::config::Table, moments: Moments) -> Table {
        let name = &table.name;
        let of_table = self.current.iter().filter(|row| row.table == *name);
        let open = of_table.clone().filter(|row| !row.is_finished());
        let audit = audited(self.jobs, self.epoch, name);
        let mending = Mending::of(self.jobs, self.epoch, name, self.seen.replica_ms);
        let facts = self.seen.facts.tables.get(name);
        let live = self.seen.live.get(name);
        let ages = live.into_iter().flat_map(BTreeMap::values);
        let ages = ages.map(|standing| standing.iterator_age_s(self.seen.clock.now_ms));
        let answers = self.seen.facts.answering.is_some();
        let letters = self.seen.facts.lettered.iter();
        let letters = letters.filter(|((of, _), _)| of == name);
        let pauses = self.seen.rows.pauses;
        let paused = pauses
            .iter()
            .filter(|row| row.covers(name))
            .min_by_key(|row| row.table.is_some());
        Table {
            name: name.clone(),
            source: table.name_in(&self.source).to_owned(),
            target: table.name_in(self.seen.here).to_owned(),
            recovery_point: shown(moments.age(self.seen.clock)),
            headroom_seconds: least(open.clone().map(|row| self.headroom_s(row))),
            iterator_age_seconds: answers.then(|| ages.fold(0.0, f64::max)),
            lag_seconds: facts.and_then(|facts| facts.lag_s),
            shards: ShardCounts {
                open: open.count(),
                finished: of_table.filter(|row| row.is_finished()).count(),
                unowned: self.unowned.iter().filter(|row| row.table == *name).count(),
            },
            paused: paused.map(|row| Closed {
                by: row.by.clone(),
                reason: row.reason.clone(),
                at: row.at.clone(),
            }),
            copying: mending.copying.map(|how_far| Copying {
                percent: how_far.percent,
                left_seconds: how_far.left_s,
            }),
            doubts: self.doubts_of(name).count(),
            gaps: self.gaps.iter().filter(|gap| gap.table == *name).count(),
            audited: audit.is_some(),
            verified_at: audit.and_then(|(verified_ms, _)| verified_ms).map(rfc3339),
            drift: audit.map_or(0, |(_, different)| different),
            records_total: facts.map(|facts| facts.records),
            dead_letters_total: answers.then(|| letters.map(|(_, count)| count).sum()),
        }
    }

    fn shards(&self) -> Vec<Shard> {
        let now_ms = self.seen.clock.now_ms;
        let is_shown = |row: &&ShardRow| {
            let ended = row.finished_at;
            !row.is_finished() || ended.is_some_and(|at| now_ms - at < FINISHED_SHOWN_MS)
        };
        let may_be_read: BTreeSet<&str> = readable(self.seen.rows.shards, self.epoch)
            .map(|row| row.lease_key.as_str())
            .collect();
        let shown = self.current.iter().copied().filter(is_shown);
        of_shards(self.ground(), shown)
            .into_iter()
            .map(|(row, moments)| {
                let state = match row {
                    row if row.is_finished() => ShardState::Finished,
                    row if may_be_read.contains(row.lease_key.as_str()) => ShardState::Open,
                    _ => ShardState::WaitsForParent,
                };
                let silence_s = self.silence_s(row);
                Shard {
                    table: row.table.clone(),
                    shard: row.shard_id.clone(),
                    stream: stream_label(&row.stream_arn).to_owned(),
                    owner: row.lease_owner.clone(),
                    alive: row.lease_owner.is_some() && silence_s.is_none(),
                    owner_silent_seconds: silence_s.filter(|_| !row.is_finished()),
                    position: row.checkpoint.clone(),
                    applied_until: moments.estimated_ms.map(rfc3339),
                    proven_until: moments.proven_ms.map(rfc3339),
                    age_seconds: moments.age(self.seen.clock).proven_s.map(rounded),
                    headroom_seconds: self.headroom_s(row).map(rounded),
                    state,
                }
            })
            .collect()
    }

    fn workers(&self) -> Vec<Worker> {
        // Those of an epoch that is over have stopped, or died in it.
        let of_epoch = |row: &&WorkerRow| row.epoch == self.epoch;
        let rows = self.seen.rows.workers.iter().filter(of_epoch);
        let mut rows: Vec<&WorkerRow> = rows.collect();
        rows.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        let held_by = |worker: &str| {
            let open = self.current.iter().filter(|row| !row.is_finished());
            let owners = open.filter_map(|row| row.lease_owner.as_deref());
            owners.filter(|owner| worker_of(owner) == worker).count()
        };
        rows.into_iter()
            .map(|row| Worker {
                id: row.worker.clone(),
                version: row.version.clone(),
                epoch: row.epoch,
                since: row.since.clone(),
                shards: held_by(&row.worker),
                alive: self.is_alive(row),
                leaving: row.leaving,
                updated_at: rfc3339(row.updated_at),
            })
            .collect()
    }

    /// Whether a worker has written its row lately, as far as its clock and this host's agree.
    pub(super) fn is_alive(&self, row: &WorkerRow) -> bool {
        self.seen.host_ms - row.updated_at <= self.silent_after_ms()
    }

    /// The gaps that are stored, and those that comparisons tell of.
    fn all_gaps(&self) -> Vec<GapRow> {
        let mut gaps = self.seen.rows.gaps.to_vec();
        for table in &self.seen.config.tables {
            if let Some((_, different)) = audited(self.jobs, self.epoch, &table.name)
                && different > 0
            {
                let detail = format!("{different} item(s)");
                let at = rfc3339(self.seen.replica_ms);
                let reason = GapReason::Drift;
                gaps.push(GapRow::new(self.epoch, &table.name, reason, &detail, at));
            }
        }
        for job in self.jobs {
            let plan = job.plan;
            // What the worker began it goes on with.
            let is_asked = !plan.kind().is_the_workers();
            if is_asked && job.is_unfinished(self.epoch, self.seen.replica_ms) {
                let reason = GapReason::ReconcileUnfinished;
                let at = plan.at.clone();
                gaps.push(GapRow::new(plan.epoch, &plan.table, reason, &plan.job, at));
            }
        }
        gaps.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        gaps
    }

    fn gaps(&self) -> Vec<Gap> {
        let gap = |gap: &GapRow| Gap {
            reason: gap.reason.label().to_owned(),
            next: gap.reason.next_step().to_owned(),
            applied_until: gap.applied_until.map(rfc3339),
            table: gap.table.clone(),
            detail: gap.detail.clone(),
            at: gap.at.clone(),
        };
        self.gaps.iter().map(gap).collect()
    }

    fn doubts_of<'t>(&self, table: &'t str) -> impl Iterator<Item = &'a DoubtRow> + use<'a, 't> {
        let epoch = self.epoch;
        let rows = self.seen.rows.doubts.iter();
        rows.filter(move |row| row.epoch == epoch && row.table == table)
    }

    fn doubts(&self) -> Vec<Doubts> {
        let tables = self.seen.config.tables.iter();
        let of_table = |table: &crate::config::Table| {
            let until_ms = self.doubts_of(&table.name).map(|row| row.until).max()?;
            let is_overdue = |row: &&DoubtRow| row.due + DOUBT_PATIENCE_MS < self.seen.replica_ms;
            Some(Doubts {
                table: table.name.clone(),
                open: self.doubts_of(&table.name).count(),
                until: rfc3339(until_ms),
                overdue: self.doubts_of(&table.name).filter(is_overdue).count(),
            })
        };
        tables.filter_map(of_table).collect()
    }

    fn dead_letters(&self) -> DeadLetters {
        let facts = &self.seen.facts;
        let by_reason = facts
            .lettered
            .iter()
            .map(|((table, class), count)| Refused {
                table: table.clone(),
                class: (*class).to_owned(),
                count: *count,
            });
        DeadLetters {
            waiting: facts.letters.map(|(waiting, _)| waiting),
            oldest_seconds_left: facts.letters.and_then(|(_, left)| left),
            since: facts.answering.as_ref().map(|worker| worker.since.clone()),
            by_reason: by_reason.collect(),
        }
    }

    /// Comparisons that people see: those that were asked for and have not ended, and the fleet's own until
    /// the stream has passed their end, or a person has said what is to be deleted.
    fn shown_jobs(&self) -> Vec<Job> {
        let is_followed = |table: &str| self.seen.config.tables.iter().any(|t| t.name == table);
        let is_shown = |job: &&Progress<'_>| match job.plan.kind() {
            // It has its own line, and nobody goes on with it by hand.
            JobKind::Audit(_) => false,
            JobKind::Asked => job.plan.ended.is_none(),
            JobKind::Bootstrap | JobKind::GapRepair(_) => {
                job.plan.epoch == self.epoch && is_followed(&job.plan.table)
            }
        };
        let jobs = self.jobs.iter().filter(is_shown);
        jobs.map(|job| self.job(job)).collect()
    }

    fn job(&self, job: &Progress<'_>) -> Job {
        let (plan, now_ms) = (job.plan, self.seen.replica_ms);
        let at_work = job.segments.iter().filter(|row| row.until >= now_ms);
        let owners = at_work.filter_map(|row| row.lease_owner.as_deref().map(worker_of));
        let alive = job.is_alive(now_ms);
        Job {
            kind: plan.kind().label().to_owned(),
            id: plan.job.clone(),
            table: plan.table.clone(),
            source: plan.source.clone(),
            target: plan.target.clone(),
            applies: plan.apply,
            percent: (job.part() * 100.0) as u32,
            seconds_left: job.left_s(now_ms).filter(|_| alive),
            processes: owners.collect::<BTreeSet<_>>().len(),
            different: job.counts().different(),
            alive,
            ended: plan.ended.is_some(),
            deletes_outstanding: plan.too_many_deletes.map(|(extra, _)| extra),
            deletes_allowed: plan.too_many_deletes.map(|(_, allowed)| allowed),
        }
    }

    fn pauses(&self) -> Vec<Pause> {
        let follows = |table: &str| self.seen.config.tables.iter().any(|t| t.name == table);
        let mut rows: Vec<&PauseRow> = self
            .seen
            .rows
            .pauses
            .iter()
            .filter(|row| row.is_closed() && row.table.as_deref().is_none_or(follows))
            .collect();
        rows.sort_by(|a, b| a.lease_key.cmp(&b.lease_key));
        let pause = |row: &PauseRow| Pause {
            table: row.table.clone(),
            by: row.by.clone(),
            reason: row.reason.clone(),
            at: row.at.clone(),
        };
        rows.into_iter().map(pause).collect()
    }

    fn regions(&self) -> Vec<Region> {
        let labels = self.seen.config.regions.keys();
        labels.map(|label| self.region(label)).collect()
    }

    fn region(&self, label: &str) -> Region {
        let listed = (self.seen.rows.control)
            .is_some_and(|control| control.quarantined.iter().any(|waiting| waiting == label));
        let role = match label {
            label if label == self.source => RegionRole::Active,
            label if listed || (self.quarantined && label == self.seen.here) => {
                RegionRole::Quarantined
            }
            label if label == self.seen.here => RegionRole::Replica,
            _ => RegionRole::Other,
        };
        let asked = self.seen.facts.asked.iter().filter(|of| of.label == label);
        let troubles = asked.clone().filter_map(|asked| asked.trouble.as_ref());
        let trouble = troubles.min_by(|a, b| a.1.cmp(&b.1));
        let state = match trouble {
            Some((fault, _)) => state_of(fault.class),
            None if asked.count() > 0 => RegionState::Ok,
            None => RegionState::Unknown,
        };
        Region {
            label: label.to_owned(),
            role,
            state,
            since: trouble.and_then(|(_, since)| since.clone()),
            text: trouble
                .map(|(fault, _)| format!("{} ({})", fault.summary(), fault.class.label())),
        }
    }
}

/// What a failure says of a region.
fn state_of(class: Class) -> RegionState {
    match class {
        Class::Throttled => RegionState::Throttled,
        Class::Network | Class::Service | Class::Unknown | Class::Undecodable => {
            RegionState::Unreachable
        }
        _ => RegionState::Refused,
    }
}

fn least(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    values.flatten().reduce(f64::min).map(rounded)
}

fn shown(age: Age) -> RecoveryPoint {
    RecoveryPoint {
        // Never rounded down.
        proven_seconds: age.proven_s.map(|s| (s * 1_000.0).ceil() / 1_000.0),
        estimated_seconds: age.estimated_s.map(rounded),
    }
}

#[cfg(test)]
#[path = "build_tests.rs"]
mod tests;
