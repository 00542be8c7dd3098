//! What the service forgets: parents that are nowhere, shards gone before their end, rows that
//! nobody needs, old streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::future::try_join_all;

use super::{ROWS_A_STEP, ROWS_AT_ONCE, Stream};
use crate::error::{Class, Fault, Operation};
use crate::lease::row::{GapReason, ShardRow, StreamRow, shard_key};
use crate::observe::health::Scope;
use crate::run::discovery::Listed;
use crate::run::rows::Snapshot;
use crate::stream::lineage::{Plan, Tracked, deletable};
use crate::stream::{ShardId, stream_label};

/// A shard that so many complete listings lack, and that the service knows all the same, is trouble.
const UNLISTED_TIMES_MAX: u32 = 3;

impl Stream {
    /// Has the service asked about shards that it may have forgotten, and acts on what it said
    /// before:
    ///
    /// * A parent that is nowhere: once it is gone its children may start.
    /// * An unfinished shard that nobody can read now: if it is gone, its records are lost.
    /// * A finished shard that two listings lack: if it is gone, its row is deleted. One listing
    ///   may be wrong, and so may one reading of the rows. Not at once: somebody may be at work on a
    ///   listing that still shows it, and would make its row anew, unread.
    pub(super) async fn look_for_gone(
        &mut self,
        snapshot: &Snapshot,
        rows: &BTreeMap<ShardId, &ShardRow>,
        tracked: &BTreeMap<ShardId, Tracked>,
        plan: &Plan,
        listed: &Listed,
    ) -> Result<(), Fault> {
        let context = Arc::clone(&self.context);
        let mut about = self.settled_parents(tracked, plan, listed);
        // One that is about to be taken, or is being read, is its reader's business.
        let unread: BTreeSet<&ShardId> = plan
            .vanished
            .iter()
            .filter(|id| !plan.startable.contains(id))
            .filter(|id| {
                rows.get(id)
                    .is_some_and(|row| snapshot.takeable.contains(&row.lease_key))
            })
            .collect();
        about.extend(unread.iter().copied().cloned());
        let deletable = deletable(&listed.shards, tracked);
        self.lacking.retain(|id, _| deletable.contains(id));
        for id in &deletable {
            let first = *self.lacking.entry(id.clone()).or_insert(listed.number);
            let in_doubt = |id: &ShardId| {
                let doubts = snapshot.doubts.iter();
                doubts
                    .filter(|doubt| doubt.stream_arn == context.stream_arn)
                    .any(|doubt| doubt.shard_id == id.0)
            };
            if listed.number > first && !in_doubt(id) {
                about.insert(id.clone());
            }
        }
        let lister = &context.shared.lister;
        self.gone
            .ask(lister, &context.stream_arn, &about, listed.number);
        self.judge_parents(plan).await?;
        for id in unread {
            if self.gone.confirmed().contains(id) {
                self.vanished(id).await?;
            }
        }
        let leases = &context.shared.config.leases;
        // As long as a listing makes rows, and what is sent by it may take effect.
        let long = leases.duration + 2 * leases.late_effect;
        let finished = deletable
            .intersection(self.gone.confirmed())
            .filter(|id| self.gone.known_for(id) >= long);
        let finished: Vec<&ShardRow> = finished.filter_map(|id| rows.get(id).copied()).collect();
        self.delete_rows(&finished).await
    }

    /// The missing parents that the last listing decides on: only one that began after a child was
    /// seen does. For the others it is made again.
    fn settled_parents(
        &self,
        tracked: &BTreeMap<ShardId, Tracked>,
        plan: &Plan,
        listed: &Listed,
    ) -> BTreeSet<ShardId> {
        let children_seen = tracked
            .iter()
            .filter(|(id, _)| {
                self.first_seen
                    .get(id)
                    .is_some_and(|seen| *seen < listed.began)
            })
            .filter_map(|(_, row)| row.parent.as_ref())
            .filter(|parent| plan.missing_parents.contains(parent));
        let settled: BTreeSet<ShardId> = children_seen.cloned().collect();
        if settled.len() < plan.missing_parents.len() {
            self.context.discovery.list_soon();
        }
        settled
    }

    /// A parent that no listing shows and that the service still knows holds its children back: a
    /// person should hear of it. Gone after all, it was never read.
    async fn judge_parents(&mut self, plan: &Plan) -> Result<(), Fault> {
        let part = format!("{}, unlisted", self.answers());
        let mut unlisted = false;
        for parent in &plan.missing_parents {
            let gone = self.gone.confirmed().contains(parent);
            let times_there = self.gone.times_there(parent);
            if gone && times_there > 0 {
                self.vanished(parent).await?;
            }
            unlisted |= !gone && times_there >= UNLISTED_TIMES_MAX;
        }
        let health = &self.context.shared.health;
        let table = &self.context.table.name;
        if unlisted {
            let fault = Fault::own(
                Operation::DescribeStream,
                Class::Unknown,
                "shard not listed",
                "the service gives out positions in a shard that its listings lack, and the shard's children wait for it",
            );
            health.failed(Scope::Source, table, &part, &fault);
        } else {
            health.succeeded(Scope::Source, table, &part);
        }
        Ok(())
    }

    async fn delete_rows(&self, rows: &[&ShardRow]) -> Result<(), Fault> {
        if rows.is_empty() {
            return Ok(());
        }
        let shared = &self.context.shared;
        let rows = &rows[..rows.len().min(ROWS_A_STEP)];
        for some in rows.chunks(ROWS_AT_ONCE) {
            // One that is refused was changed by somebody: it is looked at when read again.
            try_join_all(some.iter().map(|row| shared.state.delete(*row))).await?;
            self.pulse.beat();
        }
        tracing::info!(
            table = self.context.table.name,
            stream = stream_label(&self.context.stream_arn),
            rows = rows.len(),
            "rows of finished shards deleted: the service has forgotten them"
        );
        shared.rescan.notify_one();
        Ok(())
    }

    /// Whether an old stream's shards are all finished, and no more can come: two listings made
    /// since show none without a row, or the service has forgotten it.
    pub(super) fn is_finished(
        &mut self,
        tracked: &BTreeMap<ShardId, Tracked>,
        plan: &Plan,
        listed: &Listed,
    ) -> bool {
        if self.context.is_current()
            || !self.running.is_empty()
            || !plan.create.is_empty()
            || tracked.values().any(|row| !row.finished)
        {
            self.finished_at = None;
            return false;
        }
        let since = *self.finished_at.get_or_insert(listed.number);
        let decided = listed.forgotten || listed.number >= since + 2;
        if !decided {
            self.context.discovery.list_soon();
        }
        decided
    }

    /// Stores that this old stream is finished: newer ones may be read.
    pub(super) async fn finish(&self, stream: &StreamRow) -> Result<(), Fault> {
        let shared = &self.context.shared;
        let mut done = stream.clone();
        done.initialised = true;
        done.finished = true;
        shared.state.replace_stream(&done).await?;
        tracing::info!(
            table = self.context.table.name,
            stream = stream_label(&self.context.stream_arn),
            "an old stream is finished"
        );
        shared.rescan.notify_one();
        Ok(())
    }

    /// Records, once, that a shard is gone before its end.
    async fn vanished(&mut self, shard: &ShardId) -> Result<(), Fault> {
        if self.gaps.contains(shard) {
            return Ok(());
        }
        let detail = format!("{}/{shard}", stream_label(&self.context.stream_arn));
        // Not repaired before its turn has come and it is found to hold nothing: what its parents hold is
        // older, and may still be on its way.
        let shared = &self.context.shared;
        let (table, arn) = (&self.context.table.name, &self.context.stream_arn);
        let applied_until = shared.proven_of_shard(&shard_key(shared.epoch, table, arn, shard));
        self.gap(
            GapReason::ShardVanished,
            &detail,
            Some(shard),
            applied_until,
        )
        .await?;
        self.gaps.insert(shard.clone());
        Ok(())
    }
}
