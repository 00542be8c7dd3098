//! That nothing was overlooked: a listing may lack a shard for a while, so only one that began long
//! enough after the end of a parent, or after the first listing, says that there are no others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{ROWS_A_STEP, Stream};
use crate::dynamo::clock::uptime;
use crate::error::Fault;
use crate::lease::row::{ShardRow, StreamRow};
use crate::observe::recovery::LISTED_LATE_MS;
use crate::run::discovery::Listed;
use crate::run::rows::Snapshot;
use crate::stream::ShardId;
use crate::stream::lineage::Plan;

/// The children of an ended shard: those it names, and those that name it.
fn children_of(parent: &ShardRow, rows: &BTreeMap<ShardId, &ShardRow>) -> Vec<String> {
    let named = parent.child_shard_ids.iter().cloned();
    let naming = rows
        .values()
        .filter(|row| row.parent_shard_id.contains(&parent.shard_id))
        .map(|row| row.shard_id.clone());
    let all: BTreeSet<String> = named.chain(naming).collect();
    all.into_iter().collect()
}

impl Stream {
    /// Stores of which ended shards no child is without a row, and whether no shard of the first listing
    /// is: until then they hold the proven recovery point of the table back.
    pub(super) async fn confirm(
        &self,
        snapshot: &Snapshot,
        rows: &BTreeMap<ShardId, &ShardRow>,
        stream: &StreamRow,
        plan: &Plan,
        listed: &Listed,
    ) -> Result<(), Fault> {
        if !plan.create.is_empty() || stream.finished || !stream.initialised {
            return Ok(());
        }
        let context = Arc::clone(&self.context);
        let shared = &context.shared;
        let now_ms = shared.source.clock.now_ms();
        let age = uptime().saturating_sub(listed.began_uptime).as_millis();
        let listed_ms = now_ms - i64::try_from(age).unwrap_or(i64::MAX);
        let is_due = |since_ms: Option<i64>| since_ms.unwrap_or(0) + LISTED_LATE_MS <= now_ms;
        let is_said = |since_ms: Option<i64>| since_ms.unwrap_or(0) + LISTED_LATE_MS <= listed_ms;
        let ended = rows.values().filter(|row| row.is_finished());
        let unsure = ended.filter(|row| !row.children_listed && is_due(row.finished_at));
        let mut confirmed = 0;
        let mut wanted = !stream.settled && is_due(stream.begun_at) && !is_said(stream.begun_at);
        for row in unsure {
            if is_said(row.finished_at) {
                if confirmed < ROWS_A_STEP {
                    confirmed += 1;
                    let mut sure = (*row).clone();
                    sure.children_listed = true;
                    // Named, so that whoever reads the rows torn misses those that came later.
                    sure.child_shard_ids = children_of(row, rows);
                    sure.lease_counter += 1;
                    // Refused where another worker was faster.
                    shared.state.replace(&sure, row.lease_counter).await?;
                    self.pulse.beat();
                }
            } else {
                // One worker asks, and not each of the fleet: who reads a child.
                wanted |= self.reads_child_of(row, snapshot);
            }
        }
        if wanted {
            context.discovery.list_soon();
        }
        // Nobody reads the state table for longer than a lease: who does not see the last of the first shards
        // yet does not see this either.
        let lease_ms = shared.config.leases.duration.as_millis();
        let lease_ms = i64::try_from(lease_ms).unwrap_or(i64::MAX);
        let is_old = |row: &&ShardRow| row.created_at.saturating_add(lease_ms) <= now_ms;
        let is_root = |row: &&ShardRow| {
            !(row.parent_shard_id.iter()).any(|id| rows.contains_key(&ShardId(id.clone())))
        };
        let mut roots = rows.values().copied().filter(is_root);
        let is_settled =
            !stream.settled && is_said(stream.begun_at) && roots.all(|row| is_old(&row));
        if is_settled && context.is_current() {
            let mut settled = stream.clone();
            settled.settled = true;
            shared.state.replace_stream(&settled).await?;
        }
        if confirmed > 0 || is_settled {
            shared.rescan.notify_one();
        }
        Ok(())
    }

    fn reads_child_of(&self, parent: &ShardRow, snapshot: &Snapshot) -> bool {
        let is_ours = |row: &&ShardRow| self.running.values().any(|key| *key == row.lease_key);
        let of_stream = |row: &&ShardRow| {
            row.stream_arn == parent.stream_arn && row.parent_shard_id.contains(&parent.shard_id)
        };
        snapshot
            .shards
            .iter()
            .filter(of_stream)
            .any(|row| is_ours(&row))
    }
}
