//! The recovery point: before which moment of the source every change is known to be applied. Pure.
//!
//! ```text
//!             a shard's own moment: the last record that is durable, with all before it, and checkpointed
//!                 │ none yet
//!                 ▼
//!             its parent's moment
//!
//!   table  =  the oldest of:  shards not applied to their end
//!                             shards that are, while a child of theirs may lack a row
//!                             gaps and doubts that are open, what an audit or a dead repair left
//!   group  =  its oldest table
//! ```
//!
//! Two kinds of moment. *Proven* moves by records and by the ends of shards, and only with what is stored:
//! it stays true if every worker dies this instant, whatever is read again afterwards. It is therefore
//! never withdrawn, and a reading of the state table that is old, or was torn in the middle, shows an
//! older moment and never a younger one. *Estimated* also moves by five consecutive empty pages, and with
//! what is in memory.
//!
//! *Why a record proves what was made before its second, and nothing in it*: its time is cut to the second,
//! and another record of the same second may come after it. That inside a shard no record is stamped
//! earlier than one before it is how a shard works; nobody promises it. Where it is seen not to hold, the
//! moment goes back to the older stamp until that is applied.
//!
//! *A shard without a record* has the moment at which its stream was begun, once its owner has found that it
//! holds nothing: what the table held then was copied, or was nothing, and nothing older is left to be
//! applied, by whoever reads the shard again.
//!
//! `docs/RECOVERY_POINT.md` says it for operators.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::board::Standing;
use crate::dynamo::clock::Reading;
use crate::lease::gaps::PASS_MARGIN_MS;
use crate::lease::row::{
    DoubtRow, GapRow, JobKind, Progress, ShardRow, StreamRow, audited, shard_key,
};
use crate::stream::stream_label;

/// How much later than it exists a shard may be listed for the first time, in milliseconds: five seconds,
/// and what two clocks are apart.
pub const LISTED_LATE_MS: i64 = 8_000;

/// Where the shards of one process stand, by table and shard.
pub type Live = BTreeMap<String, BTreeMap<String, Standing>>;

/// Before which moment of the source all is applied, in milliseconds; `None` where nobody knows, which is
/// infinitely old.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moments {
    /// By what is stored of records and ends of shards.
    pub proven_ms: Option<i64>,
    /// Also by empty pages, and by what is in memory. Never older than the proven one.
    pub estimated_ms: Option<i64>,
}

impl Moments {
    const UNKNOWN: Self = Self {
        proven_ms: None,
        estimated_ms: None,
    };

    fn both(ms: Option<i64>) -> Self {
        Self {
            proven_ms: ms,
            estimated_ms: ms,
        }
    }

    /// The older of each.
    #[must_use]
    pub fn older(self, other: Self) -> Self {
        // Of options the one that is none is the lesser.
        Self {
            proven_ms: self.proven_ms.min(other.proven_ms),
            estimated_ms: self.estimated_ms.min(other.estimated_ms),
        }
    }

    /// How old they are. The proven age includes what the clock may be off, so that it is never less than
    /// the truth; the estimated one does not, and is never more than the proven one.
    pub fn age(self, clock: Reading) -> Age {
        let seconds = |ms: i64| ms.max(0) as f64 / 1_000.0;
        let proven_s = self
            .proven_ms
            .map(|ms| seconds(clock.now_ms + clock.error_ms - ms));
        let estimated_s = self.estimated_ms.map(|ms| seconds(clock.now_ms - ms));
        Age {
            proven_s,
            estimated_s: match (estimated_s, proven_s) {
                (Some(estimated), Some(proven)) => Some(estimated.min(proven)),
                (estimated, proven) => estimated.or(proven),
            },
        }
    }
}

/// How old a recovery point is, in seconds; `None`: infinitely.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Age {
    /// The proven one.
    pub proven_s: Option<f64>,
    /// The estimated one.
    pub estimated_s: Option<f64>,
}

/// What decides.
#[derive(Clone, Copy)]
pub struct Ground<'a> {
    /// The epoch now.
    pub epoch: u64,
    /// All leases.
    pub shards: &'a [ShardRow],
    /// All streams.
    pub streams: &'a [StreamRow],
    /// All gaps.
    pub gaps: &'a [GapRow],
    /// All doubts.
    pub doubts: &'a [DoubtRow],
    /// All comparisons.
    pub jobs: &'a [Progress<'a>],
    /// Where the shards of this process stand.
    pub live: &'a Live,
    /// The source's time, in milliseconds.
    pub source_ms: i64,
    /// The time in the region of the state table, in milliseconds.
    pub replica_ms: i64,
    /// A listing older than this is stale, in milliseconds.
    pub listing_limit_ms: i64,
}

/// The lineage of all shards of an epoch, by stream and shard.
struct Lineage<'a> {
    ground: Ground<'a>,
    shards: HashMap<(&'a str, &'a str), &'a ShardRow>,
    /// Shards that some row names as its parent.
    parents: HashSet<(&'a str, &'a str)>,
    streams: HashMap<&'a str, &'a StreamRow>,
}

/// Which kind of moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Proven,
    Estimated,
}

impl<'a> Lineage<'a> {
    fn of(ground: Ground<'a>) -> Self {
        let rows = ground.shards.iter().filter(|row| row.epoch == ground.epoch);
        let mut shards = HashMap::with_capacity(ground.shards.len());
        let mut parents = HashSet::new();
        for row in rows {
            let arn = row.stream_arn.as_str();
            shards.insert((arn, row.shard_id.as_str()), row);
            parents.extend(row.parent_shard_id.iter().map(|id| (arn, id.as_str())));
        }
        let streams = ground.streams.iter();
        let streams = streams.filter(|row| row.is_of(ground.epoch, &row.table));
        Self {
            ground,
            shards,
            parents,
            streams: streams.map(|row| (row.stream_arn.as_str(), row)).collect(),
        }
    }

    fn standing(&self, row: &ShardRow) -> Option<&'a Standing> {
        self.ground.live.get(&row.table)?.get(&row.shard_id)
    }

    /// The moment that a shard has by itself.
    fn own(&self, row: &ShardRow, kind: Kind) -> Option<i64> {
        let standing = self.standing(row);
        // What was stored once stays true, so the younger of two readings of it counts.
        let proven = row
            .proven_until
            .max(standing.and_then(|standing| standing.proven_ms));
        match kind {
            Kind::Proven => proven,
            Kind::Estimated => standing
                .and_then(Standing::estimated_ms)
                .or(row.watermark)
                .max(proven),
        }
    }

    /// The moment of a shard: its own, or the oldest of its nearest ancestors that have one.
    fn moment(&self, row: &'a ShardRow, kind: Kind) -> Option<i64> {
        let mut oldest: Option<i64> = None;
        let mut seen = HashSet::new();
        let mut next = vec![row];
        while let Some(row) = next.pop() {
            if !seen.insert(row.lease_key.as_str()) {
                continue;
            }
            let moment = match self.own(row, kind) {
                Some(own) => own,
                None => {
                    let arn = row.stream_arn.as_str();
                    let parents = row.parent_shard_id.iter();
                    let parents: Vec<_> = parents
                        .filter_map(|id| self.shards.get(&(arn, id.as_str())).copied())
                        .collect();
                    if parents.is_empty() {
                        return None;
                    }
                    next.extend(parents);
                    continue;
                }
            };
            oldest = Some(oldest.map_or(moment, |oldest| oldest.min(moment)));
        }
        oldest
    }

    /// Whether a shard that was applied to its end still holds its table back: a child of it may be there
    /// that has no row, and then nobody reads that yet.
    fn holds(&self, row: &ShardRow, kind: Kind) -> bool {
        let arn = row.stream_arn.as_str();
        let has_row = |child: &str| {
            self.shards.contains_key(&(arn, child)) || self.parents.contains(&(arn, child))
        };
        let mut children = row.child_shard_ids.iter();
        let any =
            !row.child_shard_ids.is_empty() || self.parents.contains(&(arn, row.shard_id.as_str()));
        if !any || !children.all(|child| has_row(child)) {
            return true;
        }
        match kind {
            _ if row.children_listed => false,
            Kind::Proven => true,
            // A listing is due now and then.
            Kind::Estimated => {
                let ended_ms = row.finished_at.unwrap_or(0);
                self.ground.source_ms - ended_ms > self.ground.listing_limit_ms
            }
        }
    }

    fn of_table(&self, table: &str) -> Moments {
        let of_table = self.streams.values().filter(|row| row.table == table);
        let newest = of_table.max_by_key(|row| stream_label(&row.stream_arn));
        let Some(newest) = newest.filter(|row| row.initialised) else {
            return Moments::UNKNOWN;
        };
        let is_over = |row: &ShardRow| {
            let stream = self.streams.get(row.stream_arn.as_str());
            stream.is_some_and(|stream| stream.finished)
        };
        let mut oldest = self.beside_shards(table);
        let mut any = false;
        let rows = self.shards.values().filter(|row| row.table == table);
        for row in rows.filter(|row| !is_over(row)) {
            any = true;
            for kind in [Kind::Proven, Kind::Estimated] {
                if row.is_finished() && !self.holds(row, kind) {
                    continue;
                }
                let moment = self.moment(row, kind);
                match kind {
                    Kind::Proven => oldest.proven_ms = oldest.proven_ms.min(moment),
                    Kind::Estimated => oldest.estimated_ms = oldest.estimated_ms.min(moment),
                }
            }
        }
        let known = |ms: Option<i64>| ms.filter(|ms| any && *ms < i64::MAX);
        let proven_ms = known(oldest.proven_ms).filter(|_| newest.settled);
        Moments {
            proven_ms,
            estimated_ms: known(oldest.estimated_ms).max(proven_ms),
        }
    }

    /// What holds a table back besides its shards. `i64::MAX` where nothing does.
    fn beside_shards(&self, table: &str) -> Moments {
        let ground = &self.ground;
        let is_gap = |row: &&GapRow| row.table == table && row.epoch <= ground.epoch;
        let is_doubt = |row: &&DoubtRow| row.table == table && row.epoch == ground.epoch;
        let gaps = ground.gaps.iter().filter(is_gap);
        let doubts = ground.doubts.iter().filter(is_doubt);
        let moments = gaps
            .map(|row| row.applied_until)
            .chain(doubts.map(|row| row.applied_until));
        let mut oldest = moments.fold(Some(i64::MAX), Option::min);
        let of_table =
            |job: &&Progress<'_>| job.plan.table == table && job.plan.epoch == ground.epoch;
        for job in ground.jobs.iter().filter(of_table) {
            // By the replica region's clock, which is known to two seconds.
            let began_ms = job.plan.at_ms - PASS_MARGIN_MS;
            match job.plan.kind() {
                // Until the copy is whole and passed there is no moment that the replica is a copy of.
                JobKind::Bootstrap => oldest = None,
                // What a dead repair wrote last may be older than what was there.
                JobKind::Asked if job.is_unfinished(ground.epoch, ground.replica_ms) => {
                    oldest = oldest.min(Some(began_ms));
                }
                _ => {}
            }
        }
        if let Some((verified_ms, different)) = audited(ground.jobs, ground.epoch, table)
            && different > 0
        {
            oldest = oldest.min(verified_ms.map(|ms| ms - PASS_MARGIN_MS));
        }
        Moments::both(oldest)
    }
}

/// The recovery point of each of `tables`.
pub fn of_tables<'t>(
    ground: Ground<'_>,
    tables: impl Iterator<Item = &'t str>,
) -> BTreeMap<&'t str, Moments> {
    let lineage = Lineage::of(ground);
    tables
        .map(|table| (table, lineage.of_table(table)))
        .collect()
}

/// The recovery point of a group: its oldest table's.
pub fn of_group<'a>(tables: impl Iterator<Item = &'a Moments>) -> Moments {
    let oldest = tables
        .copied()
        .reduce(|oldest, moments| oldest.older(moments));
    oldest.unwrap_or(Moments::UNKNOWN)
}

/// The moments of the shard of `row`, its ancestors' where it has none itself.
pub fn of_shards<'a>(
    ground: Ground<'a>,
    rows: impl Iterator<Item = &'a ShardRow>,
) -> Vec<(&'a ShardRow, Moments)> {
    let lineage = Lineage::of(ground);
    let moments = |row: &'a ShardRow| Moments {
        proven_ms: lineage.moment(row, Kind::Proven),
        estimated_ms: lineage.moment(row, Kind::Estimated),
    };
    rows.map(|row| (row, moments(row))).collect()
}

/// What keeps the rows of shards from saying more than is true: doubts and gaps that are open, whether or
/// not everybody has read their rows. By the key of a shard's row, and by table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holds {
    doubts: HashMap<String, Option<i64>>,
    gaps: HashMap<String, Option<i64>>,
}

impl Holds {
    /// What these rows hold back.
    pub fn of(doubts: &[DoubtRow], gaps: &[GapRow]) -> Self {
        let mut holds = Self::default();
        for row in doubts {
            let key = shard_key(row.epoch, &row.table, &row.stream_arn, &row.shard());
            let known = holds.doubts.entry(key).or_insert(row.applied_until);
            *known = (*known).min(row.applied_until);
        }
        for row in gaps {
            let known = holds.gaps.entry(row.table.clone());
            let known = known.or_insert(row.applied_until);
            *known = (*known).min(row.applied_until);
        }
        holds
    }

    /// What of `ms` the shard row with this key, of `table`, may say.
    pub fn let_pass(&self, key: &str, table: &str, ms: Option<i64>) -> Option<i64> {
        let holds = [self.doubts.get(key), self.gaps.get(table)];
        holds
            .into_iter()
            .flatten()
            .fold(ms, |ms, hold| ms.min(*hold))
    }
}

/// What one owner of a shard may say to be proven. What it said once it never takes back, because it
/// never has to.
#[derive(Debug)]
pub struct Proof {
    /// By the checkpoint last stored, whatever is in doubt.
    stored_ms: Option<i64>,
    /// What the row says.
    said_ms: Option<i64>,
    /// What a doubt that is not stored yet leaves of it; none where there is no such doubt.
    doubted_ms: Option<Option<i64>>,
    /// Until the state table was read since then, nothing more is said: it may hold a doubt or a gap.
    fresh_after: std::time::Instant,
}

impl Proof {
    /// Of an owner that took a lease at `now` whose row says `said_ms`.
    pub fn new(said_ms: Option<i64>, now: std::time::Instant) -> Self {
        Self {
            stored_ms: None,
            said_ms,
            doubted_ms: None,
            fresh_after: now,
        }
    }

    /// What the row says.
    pub fn said_ms(&self) -> Option<i64> {
        self.said_ms
    }

    /// A doubt begins at `ms`, and is not stored yet.
    pub fn doubted(&mut self, ms: Option<i64>) {
        self.doubted_ms = Some(self.doubted_ms.map_or(ms, |known| known.min(ms)));
    }

    /// A row that holds the shard back was stored at `now`. `all` says that no doubt is left that is not.
    pub fn held(&mut self, all: bool, now: std::time::Instant) {
        if all {
            self.doubted_ms = None;
        }
        self.fresh_after = now;
    }

    /// The shard is read anew: the checkpoint stored proves nothing any more.
    pub fn begin_anew(&mut self, now: std::time::Instant) {
        self.stored_ms = None;
        self.fresh_after = now;
    }

    /// What the row may say once a checkpoint that proves `by_ms` is stored. `let_pass` is what the state
    /// table lets pass of it, as read at `read`.
    pub fn may_say(
        &self,
        by_ms: Option<i64>,
        read: Option<std::time::Instant>,
        let_pass: impl Fn(Option<i64>) -> Option<i64>,
    ) -> Option<i64> {
        if read.is_none_or(|read| read <= self.fresh_after) {
            return self.said_ms;
        }
        let by_ms = self.doubted_ms.map_or(by_ms, |doubt| by_ms.min(doubt));
        let_pass(by_ms).max(self.said_ms)
    }

    /// A checkpoint that proves `by_ms` is stored, and the row says `said_ms` with it.
    pub fn checkpointed(&mut self, by_ms: Option<i64>, said_ms: Option<i64>) {
        self.stored_ms = by_ms;
        self.said(said_ms);
    }

    /// What the checkpoint last stored proves.
    pub fn stored_ms(&self) -> Option<i64> {
        self.stored_ms
    }

    /// The row says `said_ms`.
    pub fn said(&mut self, said_ms: Option<i64>) {
        self.said_ms = self.said_ms.max(said_ms);
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
