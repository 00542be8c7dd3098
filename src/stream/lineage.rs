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
    /// The children recorded in the row when it was finished.
    pub children: Vec<ShardId>,
    /// Whether its checkpoint has moved past its start.
    pub started: bool,
    /// Whether the row says SHARD_END.
    pub finished: bool,
}

impl Tracked {
    fn is_past_its_start(&self) -> bool {
        self.started || self.finished
    }
}

/// What to do next with the shards of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Shards that need a lease row.
    pub create: Vec<Shard>,
    /// Shards with a row whose parents are finished; they may be read once leased.
    pub startable: BTreeSet<ShardId>,
    /// Parents that neither a complete listing nor any row knows. They hold their children back
    /// until they are among those that the service itself says are gone.
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
    let outlived = outlived(listing, rows);
    let mut plan = Plan::default();
    for shard in listing {
        if !rows.contains_key(&shard.id) && !outlived.contains(&shard.id) {
            plan.create.push(shard.clone());
        }
    }
    for (id, row) in rows.iter().filter(|(_, row)| !row.finished) {
        // A row that was never started and has a descendant that was: made anew by mistake.
        let read_before = !row.started && outlived.contains(id);
        if complete && !listed.contains(id) && !read_before {
            plan.vanished.insert(id.clone());
        }
        let parent_done = match &row.parent {
            None => true,
            Some(parent) => match rows.get(parent) {
                Some(row) => row.finished || (!row.started && outlived.contains(parent)),
                None if outlived.contains(parent) => true,
                // Its row is about to be created.
                None if listed.contains(parent) => gone.contains(parent),
                None => {
                    if complete {
                        plan.missing_parents.insert(parent.clone());
                    }
                    gone.contains(parent)
                }
            },
        };
        let may_start = (parent_done && !read_before) || row.started;
        if may_start || mutation::is_off(Mutation::Parents) {
            plan.startable.insert(id.clone());
        }
    }
    plan
}

/// Rows that nobody needs any more: of shards that were applied to their end, that a complete
/// listing lacks, and whose children have all moved past their start. Reading such a shard again
/// would put old values over its descendants' newer ones, and with its row gone only its absence
/// prevents that: the caller deletes the row only once the service itself says that the shard is
/// gone.
///
/// `listing` must be complete.
pub fn deletable(listing: &[Shard], rows: &BTreeMap<ShardId, Tracked>) -> BTreeSet<ShardId> {
    let listed: BTreeSet<&ShardId> = listing.iter().map(|shard| &shard.id).collect();
    let outlived = outlived(listing, rows);
    let mut waited_for: BTreeSet<&ShardId> = BTreeSet::new();
    for (id, row) in rows {
        if !row.is_past_its_start() && !outlived.contains(id) {
            waited_for.extend(row.parent.as_ref());
        }
    }
    let is_past = |child: &ShardId| {
        outlived.contains(child)
            || match rows.get(child) {
                Some(row) => row.is_past_its_start(),
                // Children have rows before their parent says SHARD_END, so this one's was deleted
                // as finished; unless the service still has it.
                None => !listed.contains(child),
            }
    };
    rows.iter()
        .filter(|(id, row)| row.finished || (!row.started && outlived.contains(id)))
        .filter(|(id, _)| !listed.contains(id) && !waited_for.contains(id))
        .filter(|(_, row)| row.children.iter().all(is_past))
        .map(|(id, _)| id.clone())
        .collect()
}

/// All ancestors of shards that are past their start: they were finished before, whether a row
/// still says so or not. Reading one again would put old values over its descendants' newer ones.
fn outlived(listing: &[Shard], rows: &BTreeMap<ShardId, Tracked>) -> BTreeSet<ShardId> {
    let mut parents: BTreeMap<&ShardId, &ShardId> = BTreeMap::new();
    for shard in listing {
        parents.extend(shard.parent.as_ref().map(|parent| (&shard.id, parent)));
    }
    for (id, row) in rows {
        parents.extend(row.parent.as_ref().map(|parent| (id, parent)));
        parents.extend(row.children.iter().map(|child| (child, id)));
    }
    let mut outlived = BTreeSet::new();
    for (id, _) in rows.iter().filter(|(_, row)| row.is_past_its_start()) {
        let mut next = parents.get(id);
        while let Some(parent) = next
            // What is known already has known ancestors.
            && outlived.insert((*parent).clone())
        {
            next = parents.get(parent);
        }
    }
    outlived
}

#[cfg(test)]
#[path = "lineage_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "lineage_model.rs"]
mod model;
