//! Which shards may be read when. Pure: listings and lease rows in, decisions out.
//!
//! ```text
//!   unseen ──create──▶ waiting ──all parents finished──▶ startable ──▶ reading ──▶ SHARD_END
//! ```
//!
//! A listing may be incomplete, late or inconsistent. What it lacks delays a shard; it never
//! makes one be skipped, and never lets a child start beside its parent.

use std::collections::{BTreeMap, BTreeSet};

use super::{Shard, ShardId};
use crate::mutation::{self, Mutation};

/// What is known of a shard from its lease row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    /// The parent recorded in the row.
    pub parent: Option<ShardId>,
    /// Whether its checkpoint has moved past its start.
    pub started: bool,
    /// Whether the row says SHARD_END.
    pub finished: bool,
}

/// What to do next with the shards of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Shards that need a lease row.
    pub create: Vec<Shard>,
    /// Shards with a row whose parents are finished; they may be read once leased.
    pub startable: BTreeSet<ShardId>,
    /// Parents that neither a complete listing nor any row knows. They hold their children back
    /// until the service itself says that they are gone.
    pub missing_parents: BTreeSet<ShardId>,
    /// Tracked, unfinished shards that a complete listing lacks.
    pub vanished: BTreeSet<ShardId>,
}

/// Decides what to do.
///
/// * `listing`: the shards listed last; `complete` says that the listing reached its end.
/// * `rows`: the lease rows of this stream.
/// * `gone`: shards for which the service refused an iterator as not found after they were
///   missing from a complete listing.
pub fn plan(
    listing: &[Shard],
    complete: bool,
    rows: &BTreeMap<ShardId, Tracked>,
    gone: &BTreeSet<ShardId>,
) -> Plan {
    let listed: BTreeSet<&ShardId> = listing.iter().map(|shard| &shard.id).collect();
    // A parent without a row whose child is past its start was finished before: reading it
    // again would put old values over the child's newer ones.
    let outlived: BTreeSet<&ShardId> = rows
        .values()
        .filter(|row| row.started || row.finished)
        .filter_map(|row| row.parent.as_ref())
        .filter(|parent| !rows.contains_key(*parent))
        .collect();
    let mut plan = Plan::default();
    for shard in listing {
        if !rows.contains_key(&shard.id) && !outlived.contains(&shard.id) {
            plan.create.push(shard.clone());
        }
    }
    for (id, row) in rows.iter().filter(|(_, row)| !row.finished) {
        if complete && !listed.contains(id) {
            plan.vanished.insert(id.clone());
        }
        let parent_done = match &row.parent {
            None => true,
            Some(parent) => match rows.get(parent) {
                Some(parent) => parent.finished,
                None if outlived.contains(parent) || gone.contains(parent) => true,
                // Its row is about to be created.
                None if listed.contains(parent) => false,
                None => {
                    if complete {
                        plan.missing_parents.insert(parent.clone());
                    }
                    false
                }
            },
        };
        if parent_done || row.started || mutation::is_off(Mutation::Parents) {
            plan.startable.insert(id.clone());
        }
    }
    plan
}

#[cfg(test)]
#[path = "lineage_tests.rs"]
mod tests;
