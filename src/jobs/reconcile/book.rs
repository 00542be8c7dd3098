//! What one process knows of a segment in its hands, and the row that it keeps.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::ledger::{Cut, Ledger, Position};
use super::report::{Counts, Lines};
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::json::{item_from_json, item_to_json};
use crate::dynamo::value::Item;
use crate::error::Fault;
use crate::lease::hold::Hold;
use crate::lease::row::{Mark, SegmentRow};

/// Bytes of keys that a row keeps for their deletion. What is beyond stays with the process that found
/// it, and the row's marks before it.
const EXTRA_BYTES_MAX: usize = 32 << 10;

/// What is known of a segment.
pub(super) struct Book {
    ledger: Mutex<Ledger<Item>>,
    extra: Mutex<Extra>,
    lines: Option<Arc<Lines>>,
}

/// Keys to delete at the end, in base64.
#[derive(Default)]
struct Extra {
    keys: BTreeSet<String>,
    bytes: usize,
}

impl Book {
    /// Goes on from `row`, or from the beginning.
    pub(super) fn open(row: Option<&SegmentRow>, lines: Option<Arc<Lines>>) -> Self {
        let cut = row.map_or_else(empty, from_row);
        let keys: BTreeSet<String> = row.into_iter().flat_map(|row| row.extra.clone()).collect();
        Self {
            ledger: Mutex::new(Ledger::resume(cut)),
            extra: Mutex::new(Extra {
                bytes: keys.iter().map(String::len).sum(),
                keys,
            }),
            lines,
        }
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger<Item>> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extra(&self) -> MutexGuard<'_, Extra> {
        self.extra.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a key in the row, to be deleted at the end. False if no more fit there.
    pub(super) fn keep_extra(&self, key: &ItemKey) -> bool {
        let key = BASE64_STANDARD.encode(key.as_bytes());
        let mut extra = self.extra();
        if extra.keys.contains(&key) {
            return true;
        }
        let fits = extra.bytes + key.len() <= EXTRA_BYTES_MAX;
        if fits {
            extra.bytes += key.len();
            extra.keys.insert(key);
        }
        fits
    }

    /// What changes in the row: everything that is settled and counted, and in the report.
    pub(super) fn state(&self) -> impl FnOnce(&mut SegmentRow) + use<> {
        let cut = self.ledger().cut();
        // A line that is not on the disk yet is written again by whoever goes on from there.
        let written = self
            .lines
            .as_ref()
            .is_none_or(|lines| match lines.finish() {
                Ok(()) => true,
                Err(error) => {
                    tracing::debug!(%error, "the report could not be written");
                    false
                }
            });
        let extra = self.extra().keys.iter().cloned().collect();
        move |row| {
            if written {
                to_row(cut, row);
                row.extra = extra;
            }
        }
    }
}

/// The keys that `row` keeps to be deleted.
pub(super) fn extra_of(row: &SegmentRow) -> Vec<ItemKey> {
    let bytes = row
        .extra
        .iter()
        .filter_map(|key| BASE64_STANDARD.decode(key).ok());
    bytes.map(|bytes| ItemKey::from_bytes(&bytes)).collect()
}

fn empty() -> Cut<Item> {
    Cut {
        positions: [Position::Start, Position::Start],
        counts: Counts::default(),
        counted: HashSet::new(),
    }
}

fn from_row(row: &SegmentRow) -> Cut<Item> {
    let position = |mark: &Mark| match mark {
        Mark::Start => Position::Start,
        Mark::End => Position::End,
        Mark::After(key) => {
            let value = serde_json::from_str(key).ok();
            value
                .and_then(|value| item_from_json(&value))
                .map_or(Position::Start, Position::After)
        }
    };
    let bytes = BASE64_STANDARD.decode(&row.counted).unwrap_or_default();
    let digests = bytes.as_chunks::<16>().0.iter();
    Cut {
        positions: [position(&row.source), position(&row.target)],
        counts: row.counts.clone(),
        counted: digests.map(|bytes| Digest::from_bytes(*bytes)).collect(),
    }
}

fn to_row(cut: Cut<Item>, row: &mut SegmentRow) {
    let mark = |position: Position<Item>| match position {
        Position::Start => Mark::Start,
        Position::After(key) => Mark::After(item_to_json(&key).to_string()),
        Position::End => Mark::End,
    };
    let [source, target] = cut.positions;
    row.source = mark(source);
    row.target = mark(target);
    row.counts = cut.counts;
    // At the end nothing is met again.
    let counted = cut.counted.iter().filter(|_| !row.is_whole());
    let digests: Vec<u8> = counted.flat_map(Digest::to_bytes).collect();
    row.counted = BASE64_STANDARD.encode(digests);
}

/// A segment that this process holds: its row is renewed, and says how far it is.
pub(super) struct Kept {
    pub(super) hold: Arc<Hold<SegmentRow>>,
    book: Arc<Book>,
    done: DropGuard,
    task: JoinHandle<()>,
}

impl Kept {
    pub(super) fn new(hold: Arc<Hold<SegmentRow>>, book: Arc<Book>) -> Self {
        let done = CancellationToken::new();
        let task = {
            let (hold, book, done) = (Arc::clone(&hold), Arc::clone(&book), done.clone());
            tokio::spawn(async move { hold.keep_until(&done, || book.state()).await })
        };
        Self {
            hold,
            book,
            done: done.drop_guard(),
            task,
        }
    }

    /// Stores how far it is, and `change`; it stays in hand. False if it is lost.
    pub(super) async fn store(&self, change: impl FnOnce(&mut SegmentRow)) -> Result<bool, Fault> {
        let state = self.book.state();
        let both = move |row: &mut SegmentRow| {
            state(row);
            change(row);
        };
        self.hold.renew(both).await
    }

    /// Stores how far it is, and `change`, and lets go of it: whoever comes next need not wait. False
    /// if it is lost.
    pub(super) async fn release(self, change: impl FnOnce(&mut SegmentRow)) -> Result<bool, Fault> {
        let (hold, book) = (Arc::clone(&self.hold), Arc::clone(&self.book));
        self.leave().await;
        let state = book.state();
        let both = move |row: &mut SegmentRow| {
            state(row);
            change(row);
        };
        hold.release(both).await
    }

    /// Renews it no longer: it ends by itself, when its writes are dead.
    pub(super) async fn leave(self) {
        drop(self.done);
        // It ends after the renewal that is on its way.
        let _ = self.task.await;
    }
}
