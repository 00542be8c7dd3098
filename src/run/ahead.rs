//! How much a shard may hold and have in flight: the shards at work share what the worker has.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::apply::batch::BATCH_OPS_MAX;
use crate::stream::reader::PAGE_RECORDS_MAX;

/// Batches that a worker has in flight, about: enough for its processors at any distance, and not a
/// connection for each batch of a hundred shards.
const CALLS_MAX: usize = 256;
/// So many every shard may have, so that one is built while another is on its way.
const CALLS_MIN: usize = 2;
/// What one shard gains nothing from exceeding: some pages of the largest.
const BYTES_MAX: usize = 8 << 20;
/// So much every shard may hold: a page of small items, or a few large ones.
const BYTES_MIN: usize = 256 << 10;
/// Records asked for first, before anything is known of them.
const FIRST_PAGE_RECORDS: usize = 100;

/// What a shard may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Bytes of changes read and not durable yet.
    pub bytes: usize,
    /// Batches in flight.
    pub calls: usize,
}

impl Share {
    /// The share of one among `busy` shards at work, of which `writing` may write, of `bytes`; no shard has
    /// more than `calls`.
    pub fn among(busy: usize, writing: usize, bytes: usize, calls: usize) -> Self {
        Self {
            bytes: (bytes / busy.max(1)).clamp(BYTES_MIN, BYTES_MAX),
            calls: (CALLS_MAX / writing.max(1)).max(CALLS_MIN).min(calls),
        }
    }

    /// How many records to ask for: a page is half of the share, so that one is read while another is
    /// written. `record_bytes` is what those before took; the first page is small, for many shards may
    /// begin at once.
    pub fn page_records(&self, record_bytes: Option<usize>) -> i32 {
        let most = usize::try_from(PAGE_RECORDS_MAX).unwrap_or(usize::MAX);
        let fit = record_bytes.map_or(FIRST_PAGE_RECORDS, |bytes| self.bytes / 2 / bytes.max(1));
        // Full batches, where all keys are distinct and small.
        let records = match fit / BATCH_OPS_MAX * BATCH_OPS_MAX {
            0 => fit.max(1),
            full => full.min(most),
        };
        i32::try_from(records).unwrap_or(PAGE_RECORDS_MAX)
    }
}

/// What all shards of a worker share.
#[derive(Debug)]
pub struct Ahead {
    bytes: usize,
    calls: usize,
    busy: AtomicUsize,
    waiting: AtomicUsize,
}

/// A shard at work, until this is dropped.
#[derive(Debug)]
pub struct AtWork {
    ahead: Arc<Ahead>,
    waits: bool,
}

impl Ahead {
    /// `bytes` for all shards together; up to `calls` batches in flight for each.
    pub fn new(bytes: u64, calls: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
            calls,
            busy: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        })
    }

    /// What one shard may have now.
    pub fn share(&self) -> Share {
        let busy = self.busy.load(Ordering::Relaxed);
        let waiting = self.waiting.load(Ordering::Relaxed);
        Share::among(busy, busy.saturating_sub(waiting), self.bytes, self.calls)
    }

    /// One more shard has something to do.
    pub fn begin(self: &Arc<Self>) -> AtWork {
        self.busy.fetch_add(1, Ordering::Relaxed);
        AtWork {
            ahead: Arc::clone(self),
            waits: false,
        }
    }
}

impl AtWork {
    /// Whether it waits, for a person who closed the tap or after a failure: what it holds it keeps, and its
    /// calls are others'.
    pub fn wait(&mut self, waits: bool) {
        match (self.waits, waits) {
            (false, true) => self.ahead.waiting.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.ahead.waiting.fetch_sub(1, Ordering::Relaxed),
            _ => return,
        };
        self.waits = waits;
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.wait(false);
        self.ahead.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_holds_does_not_grow_with_its_shards() {
        let bytes = 64 << 20;
        for busy in 0..2_000 {
            let share = Share::among(busy, busy, bytes, 32);
            assert!((BYTES_MIN..=BYTES_MAX).contains(&share.bytes));
            assert!((CALLS_MIN..=32).contains(&share.calls));
            assert!(share.bytes * busy <= bytes.max(BYTES_MIN * busy));
            assert!(share.calls * busy <= CALLS_MAX.max(CALLS_MIN * busy));
        }
        assert_eq!(Share::among(1, 1, bytes, 1).calls, 1, "as configured");
    }

    #[test]
    fn a_page_is_half_of_the_share() {
        let share = Share::among(100, 100, 64 << 20, 32);
        assert_eq!(share.page_records(Some(1_300)), 250);
        assert_eq!(share.page_records(None), 100);
        assert_eq!(share.page_records(Some(20 << 10)), 16);
        assert_eq!(share.page_records(Some(400 << 10)), 1);
        assert_eq!(
            Share::among(1, 1, 64 << 20, 32).page_records(Some(300)),
            1_000
        );
    }

    #[test]
    fn a_shard_is_at_work_until_it_says_otherwise() {
        let ahead = Ahead::new(8 << 20, 32);
        let alone = ahead.share();
        let work: Vec<AtWork> = (0..4).map(|_| ahead.begin()).collect();
        assert_eq!(ahead.share().bytes, 2 << 20);
        drop(work);
        assert_eq!(ahead.share(), alone);
    }

    #[test]
    fn who_waits_leaves_its_calls_to_others_and_keeps_what_it_holds() {
        let ahead = Ahead::new(64 << 20, 32);
        let mut paused: Vec<AtWork> = (0..100).map(|_| ahead.begin()).collect();
        assert_eq!(ahead.share().calls, 2);
        let bytes = ahead.share().bytes;
        paused.iter_mut().for_each(|work| work.wait(true));
        assert_eq!((ahead.share().calls, ahead.share().bytes), (32, bytes));
        paused[0].wait(false);
        drop(paused);
        assert_eq!(ahead.waiting.load(Ordering::Relaxed), 0);
    }
}
