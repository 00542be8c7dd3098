//! Where every shard of this process stands, and the totals that a person follows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::recovery::Live;

/// A stream keeps its records for 24 hours. Source: the developer guide.
pub const RETENTION_MS: i64 = 24 * 60 * 60 * 1_000;

/// Where one shard stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// When the source made the oldest change read and not durable, in milliseconds.
    pub oldest_open_ms: Option<i64>,
    /// The moment of the source up to which everything is known to be applied, in milliseconds:
    /// the last durable change, or the last time the shard was seen to hold nothing more. `None`
    /// while nobody knows: a shard never read may hold a day's backlog.
    pub applied_until_ms: Option<i64>,
    /// Before which moment all is proven to be applied, as the shard's row says it, in milliseconds.
    pub proven_ms: Option<i64>,
}

impl Standing {
    /// Seconds the oldest change not durable has waited.
    pub fn iterator_age_s(&self, now_ms: i64) -> f64 {
        self.oldest_open_ms
            .map_or(0.0, |oldest| (now_ms - oldest).max(0) as f64 / 1_000.0)
    }

    /// Seconds until the stream forgets the oldest position not known to be applied; `None` while
    /// that position is not known.
    pub fn headroom_s(&self, now_ms: i64) -> Option<f64> {
        let position = self.oldest_open_ms.or(self.applied_until_ms)?;
        Some((position + RETENTION_MS - now_ms).max(0) as f64 / 1_000.0)
    }

    /// The moment before which all is taken to be applied: what is open was made no earlier.
    pub fn estimated_ms(&self) -> Option<i64> {
        let until = self.applied_until_ms?;
        Some(self.oldest_open_ms.map_or(until, |open| open.min(until)))
    }

    /// Everything up to `ms` is known to be applied.
    pub fn applied_until(&mut self, ms: i64) {
        self.applied_until_ms = Some(self.applied_until_ms.map_or(ms, |until| until.max(ms)));
    }
}

/// Totals since the start of the process, over all tables.
#[derive(Debug, Default)]
pub struct Totals {
    /// Records finished.
    pub records: AtomicU64,
    /// Records coalesced into a later change.
    pub coalesced: AtomicU64,
    /// Records sent to the dead letters.
    pub dead_letters: AtomicU64,
}

/// How the listing of one stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listings {
    /// When its task began, or the last page of a listing came.
    pub progress: Instant,
    /// When the last complete listing began.
    pub complete: Option<Instant>,
}

/// Where all shards of this process stand.
#[derive(Debug, Default)]
pub struct Board {
    shards: Mutex<BTreeMap<String, BTreeMap<String, Standing>>>,
    /// The stream that each table has now.
    streams: Mutex<BTreeMap<String, String>>,
    /// How the listing of each stream goes, by table and stream.
    listings: Mutex<BTreeMap<(String, String), Listings>>,
    /// Totals since the start.
    pub totals: Totals,
}

impl Board {
    fn shards(&self) -> MutexGuard<'_, BTreeMap<String, BTreeMap<String, Standing>>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `table` is fed from the stream `arn` from now on.
    pub fn set_stream(&self, table: &str, arn: &str) {
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(table.to_owned(), arn.to_owned());
    }

    /// Whether `arn` is the stream that `table` is fed from now.
    pub fn is_current_stream(&self, table: &str, arn: &str) -> bool {
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(table)
            .is_some_and(|current| current == arn)
    }

    fn discoveries(&self) -> MutexGuard<'_, BTreeMap<(String, String), Listings>> {
        self.listings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A page of a listing of the stream `arn` came, or its listing begins; `complete` is when the
    /// last complete one began, if it is a new one.
    pub fn note_listing(&self, table: &str, arn: &str, complete: Option<Instant>) {
        let now = Instant::now();
        let mut listings = self.discoveries();
        let key = (table.to_owned(), arn.to_owned());
        let noted = listings.entry(key).or_insert(Listings {
            progress: now,
            complete: None,
        });
        noted.progress = now;
        noted.complete = complete.or(noted.complete);
    }

    /// The stream `arn` is no longer listed here.
    pub fn forget_listing(&self, table: &str, arn: &str) {
        self.discoveries()
            .remove(&(table.to_owned(), arn.to_owned()));
    }

    /// How the listing of each stream goes, by table and stream ARN.
    pub fn listings(&self) -> BTreeMap<(String, String), Listings> {
        self.discoveries().clone()
    }

    /// A shard of `table` stands here now.
    pub fn set(&self, table: &str, shard: &str, standing: Standing) {
        self.shards()
            .entry(table.to_owned())
            .or_default()
            .insert(shard.to_owned(), standing);
    }

    /// A shard is no longer this process's.
    pub fn remove(&self, table: &str, shard: &str) {
        if let Some(shards) = self.shards().get_mut(table) {
            shards.remove(shard);
        }
    }

    /// Where the shards of this process stand.
    pub fn live(&self) -> Live {
        self.shards().clone()
    }

    /// Sets the gauges of every table from its worst shard. `open` are all unfinished shards of the
    /// state table, with the moment up to which each is proven: one that nobody here owns counts
    /// as well. `now_ms` is the source's clock. Returns the headroom of every table, in seconds.
    pub fn publish<'a>(
        &self,
        open: impl Iterator<Item = (&'a str, &'a str, i64)>,
        now_ms: i64,
    ) -> BTreeMap<String, f64> {
        let mut headrooms = BTreeMap::new();
        let ours = self.shards();
        let mut all = ours.clone();
        for (table, shard, proven_ms) in open {
            let shards = all.entry(table.to_owned()).or_default();
            shards.entry(shard.to_owned()).or_insert(Standing {
                oldest_open_ms: None,
                applied_until_ms: Some(proven_ms),
                proven_ms: None,
            });
        }
        for (table, shards) in &all {
            super::metrics::leases_held(table, ours.get(table).map_or(0, BTreeMap::len));
            let age = shards.values().map(|s| s.iterator_age_s(now_ms));
            let headroom = shards.values().filter_map(|s| s.headroom_s(now_ms));
            if let (Some(age), Some(headroom)) = (age.reduce(f64::max), headroom.reduce(f64::min)) {
                super::metrics::position(table, age, headroom);
                headrooms.insert(table.clone(), headroom);
            }
        }
        headrooms
    }

    /// Adds to a total.
    pub fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headroom_runs_down_from_what_is_not_applied() {
        let standing = Standing {
            oldest_open_ms: Some(1_000),
            ..Standing::default()
        };
        assert_eq!(standing.iterator_age_s(61_000), 60.0);
        assert_eq!(standing.headroom_s(61_000), Some(86_400.0 - 60.0));
        let idle = Standing {
            applied_until_ms: Some(61_000),
            ..Standing::default()
        };
        assert_eq!(idle.iterator_age_s(61_000), 0.0);
        assert_eq!(idle.headroom_s(61_000), Some(86_400.0));
        assert_eq!(idle.headroom_s(i64::MAX / 2), Some(0.0));
        assert_eq!(Standing::default().headroom_s(61_000), None);
    }
}
