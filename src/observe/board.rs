//! Where every shard of this process stands, and the totals that a person follows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::history::{History, Look};
use super::recovery::{Age, Live, Moments};
use crate::error::Class;

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

/// What one table did since the start of the process.
#[derive(Debug, Default)]
pub struct TableTotals {
    /// Records finished.
    pub records: AtomicU64,
    /// When a record was last finished, by the source's clock, in milliseconds; 0 before the first.
    pub last_record_ms: AtomicI64,
    /// One more than the largest lag of a record since the last look, in milliseconds; 0 where none was
    /// applied.
    lag_more_ms: AtomicI64,
}

impl TableTotals {
    /// So many records were finished at `now_ms`, of which the oldest was made `lag_ms` before.
    pub fn finished(&self, records: u64, now_ms: i64, lag_ms: Option<i64>) {
        self.records.fetch_add(records, Ordering::Relaxed);
        self.last_record_ms.fetch_max(now_ms, Ordering::Relaxed);
        if let Some(lag_ms) = lag_ms {
            self.lag_more_ms.fetch_max(lag_ms + 1, Ordering::Relaxed);
        }
    }

    /// The largest lag since it was last asked.
    fn take_lag(&self) -> Option<i64> {
        let more_ms = self.lag_more_ms.swap(0, Ordering::Relaxed);
        (more_ms > 0).then_some(more_ms - 1)
    }
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
    tables: Mutex<BTreeMap<String, Arc<TableTotals>>>,
    /// Dead letters since the start, by table and class.
    letters: Mutex<BTreeMap<(String, &'static str), u64>>,
    /// The last hour.
    pub history: History,
    /// The recovery point of each table, as last looked.
    points: Mutex<BTreeMap<String, Moments>>,
}

impl Board {
    /// A new role begins: what stood here does so no longer. Totals and the last hour stay.
    pub fn begin_role(&self) {
        self.shards().clear();
        self.discoveries().clear();
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.clear();
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        points.clear();
    }

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

    /// What `table` did since the start.
    pub fn table(&self, table: &str) -> Arc<TableTotals> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(tables.entry(table.to_owned()).or_default())
    }

    /// What every table did since the start.
    pub fn tables(&self) -> BTreeMap<String, Arc<TableTotals>> {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.clone()
    }

    /// A record or repair of `table` became a dead letter.
    pub fn dead_lettered(&self, table: &str, class: Class) {
        super::metrics::dead_lettered(table, class);
        Self::add(&self.totals.dead_letters, 1);
        let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        *letters
            .entry((table.to_owned(), class.label()))
            .or_default() += 1;
    }

    /// Dead letters since the start, by table and class.
    pub fn letters(&self) -> BTreeMap<(String, &'static str), u64> {
        let letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        letters.clone()
    }

    /// The recovery points are these now, and the group's is `age` old.
    pub fn set_points(&self, points: BTreeMap<String, Moments>, age: Age, at_ms: i64) {
        let tables = self.tables();
        let look = Look {
            now: Instant::now(),
            at_ms,
            records: self.totals.records.load(Ordering::Relaxed),
            age,
        };
        let lags = tables
            .iter()
            .map(|(table, totals)| (table.as_str(), totals.take_lag()));
        self.history.look(look, lags);
        *self.points.lock().unwrap_or_else(PoisonError::into_inner) = points;
    }

    /// The recovery point of each table, as last looked: what was true then is true now.
    pub fn points(&self) -> BTreeMap<String, Moments> {
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        points.clone()
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
