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
use crate::error::{Fault, Policy};
use crate::lease::hold::Hold;
use crate::lease::row::{Mark, SegmentRow};

/// Bytes of keys that a row keeps for their deletion. What is beyond stays with the process that found
/// it, and the row's marks before it.
const EXTRA_BYTES_MAX: usize = 32 << 10;

/// Bytes of keys that a row keeps while they are repaired. With counts and marks it stays below what the
/// service takes.
const MENDING_BYTES_MAX: usize = 96 << 10;

/// What is known of a segment.
pub(super) struct Book {
    ledger: Mutex<Ledger<Item>>,
    extra: Mutex<Extra>,
    /// Keys that are being repaired, and are not known to be right.
    mending: Mutex<BTreeSet<String>>,
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
            mending: Mutex::new(
                row.into_iter()
                    .flat_map(|row| row.mending.clone())
                    .collect(),
            ),
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
        let key = encode(key);
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

    fn mending(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.mending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keys that somebody was repairing when the row was taken.
    pub(super) fn was_mending(&self) -> Vec<ItemKey> {
        keys_of(self.mending().iter())
    }

    /// `keys` are to be repaired: to be stored before the first write. False if they are too many.
    pub(super) fn mends(&self, keys: &[ItemKey]) -> bool {
        let mut mending = self.mending();
        let keys = keys.iter().map(encode);
        let more: Vec<String> = keys.filter(|key| !mending.contains(key)).collect();
        let bytes: usize = mending.iter().chain(&more).map(String::len).sum();
        let fits = bytes <= MENDING_BYTES_MAX;
        if fits {
            mending.extend(more);
        }
        fits
    }

    /// A key that was to be repaired is known to be right, or was not touched.
    pub(super) fn mended(&self, key: &ItemKey) {
        self.mending().remove(&encode(key));
    }

    /// What changes in the row: everything that is settled and counted, and in the report.
    ///
    /// # Errors
    /// The report could not be written: what stands in it only must not count.
    pub(super) fn state(&self) -> std::io::Result<impl FnOnce(&mut SegmentRow) + use<>> {
        let cut = self.ledger().cut();
        // A line that is not on the disk yet is written again by whoever goes on from there.
        if let Some(lines) = &self.lines {
            lines.finish()?;
        }
        let extra = self.extra().keys.iter().cloned().collect();
        let mending = self.mending().iter().cloned().collect();
        Ok(move |row: &mut SegmentRow| {
            to_row(cut, row);
            row.extra = extra;
            row.mending = mending;
        })
    }
}

/// The keys that `row` keeps to be deleted.
pub(super) fn extra_of(row: &SegmentRow) -> Vec<ItemKey> {
    keys_of(row.extra.iter())
}

fn encode(key: &ItemKey) -> String {
    BASE64_STANDARD.encode(key.as_bytes())
}

fn keys_of<'a>(keys: impl Iterator<Item = &'a String>) -> Vec<ItemKey> {
    let bytes = keys.filter_map(|key| BASE64_STANDARD.decode(key).ok());
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

/// Why a row does not say how far its segment is.
pub(super) enum Unstored {
    /// It is lost, or nobody knows whether it was written.
    Lost,
    /// The state table could not be written for good.
    Failed(Fault),
    /// The report could not be written.
    File(std::io::Error),
}

impl Unstored {
    fn of(written: Result<bool, Fault>) -> Result<(), Self> {
        match written {
            Ok(true) => Ok(()),
            Ok(false) => Err(Unstored::Lost),
            Err(fault) if fault.policy() == Policy::Retry => Err(Unstored::Lost),
            Err(fault) => Err(Unstored::Failed(fault)),
        }
    }
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
            tokio::spawn(async move {
                // What is known when it is written, not before: an older state must not overwrite the
                // keys that a repair has stored meanwhile.
                let change = || {
                    let book = Arc::clone(&book);
                    move |row: &mut SegmentRow| {
                        if let Ok(state) = book.state() {
                            state(row);
                        }
                    }
                };
                hold.keep_until(&done, change).await;
            })
        };
        Self {
            hold,
            book,
            done: done.drop_guard(),
            task,
        }
    }

    /// Whether somebody else has it now, or its row is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.task.is_finished()
    }

    /// Stores how far it is, and `change`; it stays in hand.
    pub(super) async fn store(&self, change: impl FnOnce(&mut SegmentRow)) -> Result<(), Unstored> {
        let mut failed = None;
        let both = |row: &mut SegmentRow| match self.book.state() {
            Ok(state) => {
                state(row);
                change(row);
            }
            Err(error) => failed = Some(error),
        };
        let written = self.hold.renew(both).await;
        failed.map_or_else(|| Unstored::of(written), |error| Err(Unstored::File(error)))
    }

    /// Stores how far it is, and `change`, and lets go of it: whoever comes next need not wait.
    pub(super) async fn release(
        self,
        change: impl FnOnce(&mut SegmentRow),
    ) -> Result<(), Unstored> {
        let (hold, book) = (Arc::clone(&self.hold), Arc::clone(&self.book));
        self.leave().await;
        let state = book.state().map_err(Unstored::File)?;
        let both = move |row: &mut SegmentRow| {
            state(row);
            change(row);
        };
        Unstored::of(hold.release(both).await)
    }

    /// Renews it no longer: it ends by itself, when its writes are dead.
    pub(super) async fn leave(self) {
        drop(self.done);
        // It ends after the renewal that is on its way.
        let _ = self.task.await;
    }
}
