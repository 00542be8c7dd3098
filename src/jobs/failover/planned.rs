//! A planned switchover: everything is applied, and seen to be, before the epoch changes.
//!
//! ```text
//!   caught up ─▶ closing: writes should wait ─▶ quiet: every shard read to its end, a while after
//!      │                     │                          the last change ─▶ the epoch changes
//!      └─ not within the time └─ not within the time: steady again, nothing has changed
//! ```
//!
//! An application that heeds the record (through `/active`, or by itself) loses no write: what it wrote
//! before it was asked to wait is applied, and it writes again where the new active region is. One that
//! writes on is never quiet, and the switchover is given up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::survey::{failed, losses_of};
use super::{Ended, Survey, Watcher, step};
use crate::config::Config;
use crate::dynamo::RegionClients;
use crate::dynamo::clock::rfc3339;
use crate::error::{Failure, Fault, Policy};
use crate::lease::doubts::until_ms;
use crate::lease::row::{ControlRow, ShardRow, state};
use crate::lease::table::Written;
use crate::mutation::crash;
use crate::observe::liveness::Limits;
use crate::observe::recovery::{Ground, Live, of_tables};
use crate::run::rows::Snapshot;
use crate::stream::reader::{PAGE_RECORDS_MAX, ShardReader};

/// Applied so far behind, it counts as caught up: the rest comes while writes wait.
const CAUGHT_UP_MS: i64 = 10_000;
/// How long after the last change everything has to be read once more without finding any: the clocks of
/// this host and of a worker's are known to two seconds, and a write that was answered may be shown a
/// little later. What came later still is looked for after the fence.
const QUIET_MS: i64 = 2_000;
/// Consecutive empty pages after which a shard counts as holding nothing more.
const EMPTY_PAGES_PROVE: u32 = 5;
const EMPTY_PAUSE: Duration = Duration::from_millis(100);
/// Between two looks at the state table, which is read whole.
const PLAN_EVERY: Duration = Duration::from_millis(200);
/// How often it is tried to let writes go on again.
const REOPEN_ATTEMPTS: u32 = 10;
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// More records than this are not counted.
const LEFT_MAX: usize = 10_000;
/// The record asks writes to wait for so much longer than the switchover may take, and for a lease: clocks
/// are known to two seconds.
const CLOSING_SLACK: Duration = Duration::from_secs(4);

/// Where the shards of a group stand. Pure: rows in, decisions out.
#[derive(Debug, Default)]
pub struct Standings {
    checkpoints: BTreeMap<String, String>,
    /// When a checkpoint was last seen to move, or a shard to come or go, by the source's clock.
    changed_ms: i64,
}

/// How near everything is to being applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Near {
    /// Some shard is behind by this much, in milliseconds, or by nobody knows how much.
    Behind(Option<i64>),
    /// Nothing is left but what changes now.
    CaughtUp,
    /// Every shard was read to its end a while after the last change.
    Quiet,
}

impl Standings {
    /// Looks at the shards of `tables` on this ground. `since_ms` is when writes were asked to wait, by the
    /// source's clock.
    pub fn look(&mut self, ground: Ground<'_>, tables: &[&str], since_ms: i64) -> Near {
        let now_ms = ground.source_ms;
        let of_epoch = ground.shards.iter().filter(|row| row.epoch == ground.epoch);
        let checkpoints: BTreeMap<String, String> = of_epoch
            .clone()
            .map(|row| (row.lease_key.clone(), row.checkpoint.clone()))
            .collect();
        if checkpoints != self.checkpoints {
            self.checkpoints = checkpoints;
            self.changed_ms = now_ms;
        }
        let mut open = of_epoch.filter(|row| !row.is_finished());
        if open.any(|row| row.lease_owner.is_none()) {
            return Near::Behind(None);
        }
        // The recovery point knows of ended shards whose children have no row yet, and of doubts.
        let moments = of_tables(ground, tables.iter().copied());
        let estimated: Option<Vec<i64>> = moments
            .values()
            .map(|moments| moments.estimated_ms)
            .collect();
        let Some(least) = estimated.and_then(|all| all.into_iter().min()) else {
            return Near::Behind(None);
        };
        match now_ms - least {
            _ if least >= self.changed_ms.max(since_ms) + QUIET_MS => Near::Quiet,
            behind if behind <= CAUGHT_UP_MS => Near::CaughtUp,
            behind => Near::Behind(Some(behind)),
        }
    }
}

/// Waits until everything is applied and proven; gives the record that asked writes to wait.
///
/// # Errors
/// [`Ended::GivenUp`] where that takes longer than `within`: then everything is as it was.
pub async fn prepare(
    config: &Config,
    survey: &Survey,
    (by, reason): (&str, &str),
    within: Duration,
    watcher: &mut dyn Watcher,
    stop: &CancellationToken,
) -> Result<ControlRow, Ended> {
    let mut planned = Planned {
        config,
        survey,
        standings: Standings::default(),
        deadline: Instant::now() + within,
        lost: None,
        stop,
    };
    planned.catch_up(watcher).await?;
    let now_ms = survey.target.clock.now_ms();
    let at = rfc3339(now_ms);
    let closing = async {
        let closed = planned.close((by, reason), within, now_ms).await?;
        crash("failover-closed");
        planned.settle(&closed, watcher).await
    };
    match closing.await {
        Ok(applied) => Ok(applied),
        Err(ended) => {
            reopen(survey, (by, &at)).await;
            Err(ended)
        }
    }
}

/// Makes the record steady again that `by` made ask writes to wait at `at`, should it say so still: a write without
/// an answer may have taken effect. If that cannot be done its time runs out: from then on it counts for
/// nothing, and a worker writes it.
pub async fn reopen(survey: &Survey, (by, at): (&str, &str)) {
    for _ in 0..REOPEN_ATTEMPTS {
        let done = match survey.state().control().await {
            Ok(Some(now))
                if now.state == state::CLOSING
                    && now.epoch == survey.epoch
                    && (now.by.as_str(), now.at.as_str()) == (by, at) =>
            {
                let next = now.reopened();
                let written = survey.state().replace_control(&next, Some(&now)).await;
                written.map(|_| false)
            }
            Ok(_) => Ok(true),
            Err(fault) => Err(fault),
        };
        match done {
            Ok(true) => return,
            Ok(false) => {}
            Err(_) => tokio::time::sleep(REOPEN_PAUSE).await,
        }
    }
}

struct Planned<'a> {
    config: &'a Config,
    survey: &'a Survey,
    standings: Standings,
    deadline: Instant,
    /// What the last look found missing that was not when it was asked for.
    lost: Option<String>,
    stop: &'a CancellationToken,
}

impl Planned<'_> {
    fn failed(&self, fault: &Fault) -> Ended {
        let survey = self.survey;
        Ended::Failed(failed(&survey.target, survey.state(), fault))
    }

    /// What is missing in the target that was not when it was asked for, and that nobody has accepted
    /// therefore.
    fn lost_since(&self, rows: &Snapshot) -> Option<String> {
        let (epoch, now_ms) = (self.survey.epoch, self.survey.target.clock.now_ms());
        let known = self.survey.all_losses();
        let tables = self.config.tables.iter();
        let losses = tables.flat_map(|table| losses_of(rows, &table.name, epoch, now_ms));
        let mut new = losses.filter(|(name, _)| !known.iter().any(|(known, _)| known == name));
        new.next().map(|(name, why)| format!("{name} ({why})"))
    }

    async fn look(&mut self, since_ms: i64) -> Result<Near, Fault> {
        // The clocks of both regions are the same to two seconds, and quiet is told by the source's own
        // time in the watermarks.
        let now_ms = self.survey.target.clock.now_ms();
        let rows = Snapshot::of(self.survey.state().rows().await?);
        let limit = Limits::of(self.config).listing.as_millis();
        let ground = Ground {
            epoch: self.survey.epoch,
            shards: &rows.shards,
            streams: &rows.streams,
            // Whoever comes this far has accepted gaps and copies that are not done.
            gaps: &[],
            jobs: &[],
            doubts: &rows.doubts,
            live: &Live::new(),
            source_ms: now_ms,
            replica_ms: now_ms,
            listing_limit_ms: i64::try_from(limit).unwrap_or(i64::MAX),
        };
        let tables = self.config.tables.iter().map(|table| table.name.as_str());
        let tables: Vec<&str> = tables.collect();
        let near = self.standings.look(ground, &tables, since_ms);
        self.lost = self.lost_since(&rows);
        Ok(near)
    }

    /// As [`look`](Self::look); a failure that may pass by itself is no answer, until the time is over.
    async fn look_again(&mut self, since_ms: i64) -> Result<Near, Ended> {
        match self.look(since_ms).await {
            Ok(near) => Ok(near),
            Err(fault) if fault.policy() == Policy::Retry && Instant::now() < self.deadline => {
                Ok(Near::Behind(None))
            }
            Err(fault) => Err(self.failed(&fault)),
        }
    }

    async fn wait(&self) -> Result<(), Ended> {
        tokio::select! {
            () = self.stop.cancelled() => Err(Ended::Stopped),
            () = tokio::time::sleep(PLAN_EVERY) => Ok(()),
        }
    }

    async fn catch_up(&mut self, watcher: &mut dyn Watcher) -> Result<(), Ended> {
        loop {
            match self.look_again(i64::MAX - QUIET_MS).await? {
                Near::CaughtUp | Near::Quiet => return Ok(()),
                Near::Behind(_) if Instant::now() >= self.deadline => {
                    return Err(Ended::GivenUp(format!(
                        "not everything was applied to {} within the time: look at `farshore status` there",
                        self.survey.to
                    )));
                }
                Near::Behind(Some(ms)) => {
                    watcher.under_way(&format!("catching up, {} s behind", ms / 1_000));
                }
                Near::Behind(None) => {
                    watcher.under_way("waiting for every shard to be read");
                }
            }
            self.wait().await?;
        }
    }

    /// Asks writes to wait.
    async fn close(
        &self,
        (by, reason): (&str, &str),
        within: Duration,
        now_ms: i64,
    ) -> Result<ControlRow, Ended> {
        let survey = self.survey;
        let known = survey.own.as_ref();
        let mut row = known.cloned().unwrap_or_else(|| {
            ControlRow::first(&self.config.group, &survey.active, by, rfc3339(now_ms))
        });
        let longest = within + self.config.leases.duration + CLOSING_SLACK;
        state::CLOSING.clone_into(&mut row.state);
        row.epoch = survey.epoch;
        row.active.clone_from(&survey.active);
        by.clone_into(&mut row.by);
        reason.clone_into(&mut row.reason);
        row.at = rfc3339(now_ms);
        row.closing_until = Some(until_ms(now_ms, longest));
        row.steps.clear();
        row.note(step::CLOSED, now_ms, "");
        row.lease_counter += 1;
        match survey.state().replace_control(&row, known).await {
            Ok(Written::Yes) => Ok(row),
            Ok(Written::Refused) => Err(Ended::Overtaken(Failure::new(
                "The control record was written by somebody else at the same moment",
                "Another failover or switchover is at work, or was",
                "Look at `farshore status`, and ask again if it is still needed",
            ))),
            Err(fault) => Err(self.failed(&fault)),
        }
    }

    /// Waits until everything is quiet, and notes that.
    async fn settle(
        &mut self,
        closed: &ControlRow,
        watcher: &mut dyn Watcher,
    ) -> Result<ControlRow, Ended> {
        // Whoever asks `/active` or `/region` may go by the answer for a lease.
        let lease_ms = until_ms(0, self.config.leases.duration);
        let since_ms = closed.done_ms(step::CLOSED).unwrap_or_default() + lease_ms;
        loop {
            let near = self.look_again(since_ms).await?;
            if let Some(lost) = &self.lost {
                return Err(Ended::GivenUp(format!(
                    "{lost} is missing there since it began"
                )));
            }
            match near {
                Near::Quiet => break,
                Near::Behind(_) if Instant::now() >= self.deadline => {
                    return Err(Ended::GivenUp(format!(
                        "not everything was applied to {} within the time, though writes were asked to wait: look at `farshore status` there",
                        self.survey.to
                    )));
                }
                _ if Instant::now() >= self.deadline => {
                    return Err(Ended::GivenUp(format!(
                        "the tables in {} were written to on and on, although writes were asked to wait: stop the application there first",
                        self.survey.active
                    )));
                }
                _ => watcher.under_way(&format!(
                    "writes should wait; waiting until the tables in {} are quiet and everything is applied",
                    self.survey.active
                )),
            }
            self.wait().await?;
        }
        let now_ms = self.survey.target.clock.now_ms();
        let mut applied = closed.clone();
        applied.note(step::APPLIED, now_ms, "");
        applied.lease_counter += 1;
        let written = self
            .survey
            .state()
            .replace_control(&applied, Some(closed))
            .await;
        match written.map_err(|fault| self.failed(&fault))? {
            Written::Yes => Ok(applied),
            Written::Refused => Err(Ended::GivenUp(
                "the control record was written by somebody else meanwhile".to_owned(),
            )),
        }
    }
}

/// How many records the old active region's streams hold after the positions at which the epoch ended:
/// writes that came later than everything was seen to be quiet, and that are stranded there now.
///
/// # Errors
/// The fault of the call: then nobody knows.
pub async fn left_behind<'r>(
    source: &RegionClients,
    shards: impl Iterator<Item = &'r ShardRow>,
) -> Result<usize, Fault> {
    let mut left = 0;
    for row in shards.filter(|row| !row.is_finished()) {
        let Some(position) = row.position() else {
            continue;
        };
        let streams = source.streams.clone();
        let mut reader = ShardReader::new(streams, &row.stream_arn, &row.shard(), position);
        let mut empty = 0;
        while empty < EMPTY_PAGES_PROVE && left < LEFT_MAX {
            let page = reader.next(PAGE_RECORDS_MAX).await?;
            left += page.records.len();
            if page.end {
                break;
            }
            match page.records.is_empty() {
                true => {
                    empty += 1;
                    tokio::time::sleep(EMPTY_PAUSE).await;
                }
                false => empty = 0,
            }
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::row::{DoubtCause, DoubtRow, FORMAT_VERSION, SHARD_END, StreamRow};
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    const ARN: &str = "arn/stream/l";

    fn stream() -> StreamRow {
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
            begun_at: Some(0),
            settled: true,
        }
    }

    fn shard(id: &str, checkpoint: &str, watermark: Option<i64>) -> ShardRow {
        let start = Position::TrimHorizon;
        let mut row = ShardRow::new(1, "t", ARN, &ShardId(id.into()), None, &start, 0);
        checkpoint.clone_into(&mut row.checkpoint);
        row.watermark = watermark;
        row.lease_owner = Some("w.1".into());
        row
    }

    fn look(
        standings: &mut Standings,
        (shards, doubts): (&[ShardRow], &[DoubtRow]),
        now_ms: i64,
        since_ms: i64,
    ) -> Near {
        let ground = Ground {
            epoch: 1,
            shards,
            streams: &[stream()],
            gaps: &[],
            doubts,
            jobs: &[],
            live: &Live::new(),
            source_ms: now_ms,
            replica_ms: now_ms,
            listing_limit_ms: 30_000,
        };
        standings.look(ground, &["t"], since_ms)
    }

    #[test]
    fn quiet_is_a_while_after_the_last_change_and_after_writes_were_asked_to_wait() {
        let mut standings = Standings::default();
        let mut at = |checkpoint: &str, watermark, now_ms| {
            let row = shard("s", checkpoint, Some(watermark));
            look(&mut standings, (&[row], &[]), now_ms, 50_000)
        };
        // The first look is a change.
        assert_eq!(at("7", 59_000, 60_000), Near::CaughtUp);
        assert_eq!(at("7", 61_999, 62_000), Near::CaughtUp);
        assert_eq!(at("7", 62_000, 62_500), Near::Quiet);
        // It moves once more.
        assert_eq!(at("8", 62_000, 63_000), Near::CaughtUp);
        assert_eq!(at("8", 65_000, 65_500), Near::Quiet);
    }

    #[test]
    fn a_shard_that_nobody_reads_is_behind_and_so_is_a_group_without_any() {
        let mut standings = Standings::default();
        let mut at = |shards: &[ShardRow], now_ms| look(&mut standings, (shards, &[]), now_ms, 0);
        assert_eq!(at(&[], 0), Near::Behind(None));
        assert_eq!(at(&[shard("s", "7", None)], 0), Near::Behind(None));
        let mut unowned = shard("s", "7", Some(0));
        unowned.lease_owner = None;
        assert_eq!(at(&[unowned], 0), Near::Behind(None));
        let old = shard("s", "7", Some(0));
        assert_eq!(at(&[old], 60_000), Near::Behind(Some(60_000)));
    }

    #[test]
    fn an_ended_shard_whose_child_has_no_row_and_a_doubt_are_never_quiet() {
        let mut standings = Standings::default();
        let open = shard("s", "7", Some(62_000));
        let mut ended = shard("p", SHARD_END, Some(1_000));
        ended.finished_at = Some(60_000);
        let both = [open.clone(), ended.clone()];
        assert_ne!(look(&mut standings, (&both, &[]), 60_000, 0), Near::Quiet);
        let behind = look(&mut standings, (&both, &[]), 63_000, 0);
        assert_eq!(behind, Near::Behind(Some(62_000)));
        // Its child is the open one.
        ended.child_shard_ids = vec!["s".into()];
        ended.children_listed = true;
        let both = [open, ended];
        assert_eq!(look(&mut standings, (&both, &[]), 63_000, 0), Near::Quiet);
        let (id, start) = (ShardId("s".into()), Position::TrimHorizon);
        let cause = DoubtCause::Unanswered;
        let mut doubt = DoubtRow::new(1, "t", ARN, &id, cause, &start, 0, String::new());
        doubt.applied_until = Some(5_000);
        let doubted = look(&mut standings, (&both, &[doubt]), 63_000, 0);
        assert_eq!(doubted, Near::Behind(Some(58_000)));
    }
}
