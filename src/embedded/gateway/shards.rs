//! The shards of one stream and their lineage, without clock or client: time is handed in.
//!
//! ```text
//!            split                      rotate                 trim
//!   open ───────────▶ closed, 2 children
//!   open ────────────────────────────▶ closed, 1 child
//!   closed and older than the retention ─────────────────────▶ gone
//! ```
//!
//! The open shards always share out the whole range of hashes between them.

use std::collections::BTreeMap;

use super::dice::Seed;
use super::hash::mix;
use super::sequence::Numbering;
use super::shard_log::{ShardLog, Stored};

/// More open shards than this are not made by splitting on schedule.
pub(crate) const OPEN_SHARDS_MAX: usize = 64;

/// Why a shard was not split or rotated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// No such shard, or it was trimmed.
    #[error("there is no shard {0}")]
    Unknown(String),
    /// Only open shards have a future.
    #[error("shard {0} is closed")]
    Closed(String),
    /// A range of one hash has no two halves.
    #[error("shard {0} is too narrow to split")]
    Narrow(String),
    /// The table has no stream that is enabled.
    #[error("table {0} has no enabled stream")]
    NoStream(String),
}

#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) id: String,
    pub(crate) parent: Option<String>,
    /// The first and the last hash of its range.
    pub(crate) range: (u64, u64),
    pub(crate) starting: Box<str>,
    /// Given when it was closed.
    pub(crate) ending: Option<Box<str>>,
    pub(crate) created_ms: i64,
    pub(crate) closed_ms: Option<i64>,
    pub(crate) log: ShardLog,
}

impl Shard {
    pub(crate) fn is_open(&self) -> bool {
        self.ending.is_none()
    }
}

#[derive(Debug)]
pub(crate) struct ShardTree {
    shards: BTreeMap<String, Shard>,
    /// The last hash of each open shard's range → its id.
    open: BTreeMap<u64, String>,
    numbering: Numbering,
    seed: u64,
    born: u64,
}

impl ShardTree {
    /// A tree of `count` open shards (at least one) of nearly equal ranges.
    pub(crate) fn new(seed: Seed, stream: &str, count: usize, now_ms: i64) -> Self {
        let seed = seed.bits(stream, 0);
        let mut tree = Self {
            shards: BTreeMap::new(),
            open: BTreeMap::new(),
            numbering: Numbering::new(seed),
            seed,
            born: 0,
        };
        let count = count.max(1) as u64;
        let width = u64::MAX / count;
        for n in 0..count {
            let last = if n + 1 == count {
                u64::MAX
            } else {
                (n + 1) * width - 1
            };
            tree.open_shard(None, (n * width, last), now_ms);
        }
        tree
    }

    pub(crate) fn get(&self, id: &str) -> Option<&Shard> {
        self.shards.get(id)
    }

    /// All shards, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Shard> {
        self.shards.values()
    }

    /// The ids of the open shards, by their place in the range of hashes.
    pub(crate) fn open_ids(&self) -> Vec<String> {
        self.open.values().cloned().collect()
    }

    /// Writes a record into the open shard that holds `hash`; `json` is given its number. False
    /// if all shards are closed.
    pub(crate) fn append(
        &mut self,
        hash: u64,
        created_us: i64,
        json: impl FnOnce(&str) -> Vec<u8>,
    ) -> bool {
        let Some(id) = self.open.range(hash..).next().map(|(_, id)| id) else {
            return false;
        };
        let Some(shard) = self.shards.get_mut(id) else {
            return false;
        };
        let sequence = self.numbering.next();
        let json = json(&sequence).into_boxed_slice();
        shard.log.append(Stored {
            sequence,
            created_us,
            json,
        });
        true
    }

    /// Closes a shard and opens two that share its range, at a seeded point near the middle.
    pub(crate) fn split(&mut self, id: &str, now_ms: i64) -> Result<[String; 2], ShardError> {
        let (first, last) = self.range_of_open(id)?;
        let width = last - first;
        if width == 0 {
            return Err(ShardError::Narrow(id.to_owned()));
        }
        // Between a quarter and three quarters of the range, and below its last hash.
        let offset = width / 4 + mix(self.seed ^ self.born) % (width / 2 + 1);
        let middle = first + offset.min(width - 1);
        self.close_shard(id, now_ms);
        self.numbering.widen();
        Ok([
            self.open_shard(Some(id), (first, middle), now_ms),
            self.open_shard(Some(id), (middle + 1, last), now_ms),
        ])
    }

    /// Closes a shard and opens one with the same range.
    pub(crate) fn rotate(&mut self, id: &str, now_ms: i64) -> Result<String, ShardError> {
        let range = self.range_of_open(id)?;
        self.close_shard(id, now_ms);
        self.numbering.widen();
        Ok(self.open_shard(Some(id), range, now_ms))
    }

    /// Closes all shards, for good: the stream was disabled or its table deleted.
    pub(crate) fn close(&mut self, now_ms: i64) {
        for id in self.open_ids() {
            self.close_shard(&id, now_ms);
        }
    }

    /// Forgets records older than `retention_ms`, and closed shards that closed as long ago.
    pub(crate) fn trim(&mut self, now_ms: i64, retention_ms: i64) {
        let horizon_ms = now_ms.saturating_sub(retention_ms);
        self.trim_records(horizon_ms.saturating_mul(1_000));
        self.shards.retain(|_, shard| {
            let gone = shard.closed_ms.is_some_and(|closed| closed < horizon_ms);
            !(gone && shard.log.is_empty())
        });
    }

    /// Forgets the records created before `before_us`; shards stay.
    pub(crate) fn trim_records(&mut self, before_us: i64) {
        for shard in self.shards.values_mut() {
            shard.log.trim(before_us);
        }
    }

    fn range_of_open(&self, id: &str) -> Result<(u64, u64), ShardError> {
        let unknown = || ShardError::Unknown(id.to_owned());
        let shard = self.shards.get(id).ok_or_else(unknown)?;
        if shard.is_open() {
            Ok(shard.range)
        } else {
            Err(ShardError::Closed(id.to_owned()))
        }
    }

    fn close_shard(&mut self, id: &str, now_ms: i64) {
        // A number of its own: the end of a shard need not be that of a record.
        let ending = self.numbering.next();
        if let Some(shard) = self.shards.get_mut(id) {
            self.open.remove(&shard.range.1);
            shard.ending = Some(ending);
            shard.closed_ms = Some(now_ms);
        }
    }

    fn open_shard(&mut self, parent: Option<&str>, range: (u64, u64), now_ms: i64) -> String {
        let parent_ms = parent
            .and_then(|p| self.shards.get(p))
            .map(|p| p.created_ms);
        // Ids sort by time, so a child's must be later than its parent's whatever the clock does.
        let created_ms = parent_ms.map_or(now_ms, |ms| now_ms.max(ms + 1));
        self.born += 1;
        let suffix = mix(self.seed ^ self.born) as u32;
        // The count keeps two shards of one millisecond apart even if their suffixes agree.
        let suffix = (suffix & 0xffff_0000) | (self.born as u32 & 0xffff);
        let id = format!("shardId-{created_ms:020}-{suffix:08x}");
        let shard = Shard {
            id: id.clone(),
            parent: parent.map(str::to_owned),
            range,
            starting: self.numbering.next(),
            ending: None,
            created_ms,
            closed_ms: None,
            log: ShardLog::default(),
        };
        self.open.insert(range.1, id.clone());
        self.shards.insert(id.clone(), shard);
        id
    }
}

#[cfg(test)]
#[path = "shards_tests.rs"]
mod tests;
