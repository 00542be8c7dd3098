//! Compares two tables that may be live, and repairs one.
//!
//! ```text
//!   scan source ─┐                       look at both sides again,            equal: was in flight
//!                ├─▶ join of digests ──▶ consistently, until they agree ──▶  unsettled: reported
//!   scan target ─┘      suspects           and the flow has passed            different ─┐
//!                                                                                        ▼
//!                              repair by key ◀── missing, changed: at once ◀─────── with --apply
//!                                   ▲
//!                                   └── extra: counted to the end, then deleted, if not too many
//! ```
//!
//! Each side is scanned once, in segments that both tables are asked for alike; where both come in the
//! same order, as two DynamoDB tables do, the join holds a few pages. Several processes may share a job:
//! [`desk`] deals out the segments by their rows in the state table, [`ledger`] (pure) knows how far each is
//! settled, so that who takes one from a process that died goes on from there.

mod book;
pub mod desk;
pub mod flow;
pub mod join;
pub mod judge;
pub mod ledger;
mod mend;
pub mod place;
pub mod report;
mod segment;
mod settle;
mod spill;
pub mod strategy;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio_util::sync::CancellationToken;

use crate::apply::batch::Writer;
use crate::apply::conditional::Conditional;
use crate::config::MaxDeletes;
use crate::dynamo::item::ItemKey;
use crate::dynamo::value::Item;
use crate::error::{Fault, Policy};
use crate::repair::{KeepExpired, Refused, Unfinished};
use book::extra_of;
use desk::{Claim, Desk, Rows, Shared};
use flow::FlowSource;
use mend::{Fate, mend};
use place::Place;
use report::{Counts, Lines};
use segment::Segment;
use settle::Rest;
use strategy::Strategy;

/// Segments that a job reads at once.
pub const SEGMENTS_AT_ONCE: usize = 4;
/// Bytes of a table for each part that it is read in.
const SEGMENT_BYTES: i64 = 256 << 20;
/// More parts than this help no more.
const SEGMENTS_CHOSEN_MAX: u32 = 1_000;
/// Segments whose deletes wait to be judged, held by one process.
const PUT_OFF_MAX: usize = 16;
/// Keys deleted together.
const DELETED_MAX: usize = 100;
/// Bytes of the keys that are repaired together: they stand in the row meanwhile.
const LOT_BYTES_MAX: usize = 24 << 10;
/// Segments that may be lost before a job gives up: this machine is too slow, or the state table.
const LOST_MAX: u32 = 20;
/// How often keys that were written and not verified are repaired again.
const VERIFY_ROUNDS: u32 = 3;
/// How often the other processes of a job are looked after.
pub const WAIT_FOR_OTHERS: Duration = Duration::from_millis(500);

/// Why a comparison ended before its end.
#[derive(Debug)]
pub enum Ended {
    /// It was asked to.
    Stopped,
    /// A call failed in a way that does not pass by itself, or not soon.
    Failed {
        /// What was being read or written.
        subject: String,
        /// Why it failed.
        fault: Fault,
    },
    /// More would be deleted than may be; nothing was.
    TooManyDeletes {
        /// Items that only the target has.
        extra: u64,
        /// So many may be deleted.
        allowed: u64,
    },
    /// The right to write was lost, or was not renewed in time.
    Lost,
    /// Keys that were written could not be verified, however often it was tried.
    Unverified,
    /// Other processes have ended the job, and its rows are gone.
    Gone,
    /// A file could not be written.
    File(std::io::Error),
}

/// Who hears what becomes of the items that a job writes.
pub trait Hears: Send + Sync {
    /// The target took so many.
    fn applied(&self, items: usize);

    /// Whether what only the target holds may be deleted after all.
    fn before_deletes(&self) -> BoxFuture<'_, Result<(), Unfinished>>;

    /// The target refuses an item for good. It counts as refused only once this is done.
    fn refused<'a>(
        &'a self,
        refused: &'a Refused,
        stop: &'a CancellationToken,
    ) -> BoxFuture<'a, Result<(), Unfinished>>;
}

/// What repairs need.
pub struct Repairs {
    /// Writes to the target.
    pub writer: Arc<Writer>,
    /// Writes to the target on condition.
    pub conditional: Conditional,
    /// How many items may be deleted.
    pub max_deletes: MaxDeletes,
    /// Who hears of them; nobody where only counts matter.
    pub heard_by: Option<Arc<dyn Hears>>,
    /// How long a write without an answer may still take effect.
    pub late_effect: Duration,
}

/// One table to compare.
pub struct Reconcile {
    /// Its name in the configuration.
    pub table: String,
    /// The side that is right.
    pub source: Arc<Place>,
    /// The side that is compared with it, and repaired.
    pub target: Arc<Place>,
    /// Attributes of the primary key.
    pub key_names: Arc<[String]>,
    /// Items that stay in the target although the source lacks them.
    pub keep_expired: Option<KeepExpired>,
    /// Parts that each table is read in.
    pub segments: u32,
    /// Who reads which.
    pub desk: Desk,
    /// Segments that this process reads at once.
    pub at_once: usize,
    /// How often the other processes of the job are looked after.
    pub wait: Duration,
    /// Bytes that the join may hold.
    pub memory: usize,
    /// How long a suspect is looked at, at least, where somebody applies changes.
    pub settle: Duration,
    /// Who applies changes, if anybody does.
    pub flow: Option<FlowSource>,
    /// What becomes of differences.
    pub strategy: Strategy,
    /// What the scan of the source saw differ is repaired by key as it comes: nobody asks whether it
    /// differs or is in flight, as the result is the same. What only the target holds waits until the
    /// scan has ended and the changes of before are applied, however long that takes.
    pub eager: bool,
    /// Without them nothing is changed.
    pub repairs: Option<Repairs>,
    /// Where differences are written one by one.
    pub lines: Option<Arc<Lines>>,
    /// Ends it. Cancelled by the job itself, too, once a part of it has failed.
    pub stop: CancellationToken,
    /// What was found so far.
    pub found: Arc<Found>,
    /// Segments that were lost.
    pub lost: AtomicU32,
}

/// What this process found so far, for whoever watches.
#[derive(Default)]
pub struct Found(Mutex<Counts>);

impl Found {
    fn add(&self, counts: &Counts) {
        *self.lock() += counts;
    }

    fn unverified(&self, more: i64) {
        let mut counts = self.lock();
        counts.unverified = counts.unverified.saturating_add_signed(more);
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found so far.
    pub fn counts(&self) -> Counts {
        self.lock().clone()
    }
}

/// A segment that was read, and is not done.
struct InHand<'a> {
    segment: Segment<'a>,
    rest: Rest,
    /// What was repaired since, to be counted when the segment is done: whoever takes it before that
    /// repairs and counts it once more.
    mended: Counts,
    /// Whether what is to be deleted is.
    is_deleted: bool,
}

impl<'a> InHand<'a> {
    fn new(segment: Segment<'a>, rest: Rest) -> Self {
        Self {
            segment,
            rest,
            mended: Counts::default(),
            is_deleted: false,
        }
    }
}

impl Reconcile {
    /// Compares, and repairs where it may. Returns what was found, by all processes; when it ends early,
    /// [`Found::counts`] says what this one found.
    ///
    /// # Errors
    /// Why it ended before its end.
    pub async fn run(&self) -> Result<Counts, (Counts, Ended)> {
        let mut in_hand = Vec::new();
        let result = self.work(&mut in_hand).await;
        if result.is_err() {
            self.stop.cancel();
        }
        for left in in_hand {
            left.segment.let_go().await;
        }
        match result {
            Ok((counts, None)) => Ok(counts),
            Ok((counts, Some((extra, allowed)))) => {
                Err((counts, Ended::TooManyDeletes { extra, allowed }))
            }
            Err(ended) => Err((self.found.counts(), ended)),
        }
    }

    /// The counts, and what was too much to delete.
    async fn work<'a>(
        &'a self,
        in_hand: &mut Vec<InHand<'a>>,
    ) -> Result<(Counts, Option<(u64, u64)>), Ended> {
        let Desk::Shared(shared) = &self.desk else {
            self.read_all(in_hand).await?;
            return Ok((self.found.counts(), None));
        };
        let rows = self.read_until_whole(shared, in_hand).await?;
        let (rows, too_many) = self.delete(shared, rows, in_hand).await?;
        shared.end(rows, too_many).await
    }

    /// Reads what there is to read, until nothing is, or others have it in hand.
    async fn read_all<'a>(&'a self, in_hand: &mut Vec<InHand<'a>>) -> Result<bool, Ended> {
        let mut at_work = FuturesUnordered::new();
        let mut mine: Vec<u32> = in_hand.iter().map(|one| one.segment.number).collect();
        let mut others = false;
        let mut failed = None;
        loop {
            let put_off = in_hand.iter().filter(|one| one.rest.later.is_some());
            let has_room = put_off.count() + at_work.len() < PUT_OFF_MAX;
            while has_room && at_work.len() < self.at_once && failed.is_none() {
                let segment = match self.desk.claim(self.segments, &mine).await {
                    Ok(Claim::Alone(number)) => Segment::alone(self, number),
                    Ok(Claim::Held(hold)) => Segment::held(self, hold),
                    Ok(Claim::Nothing) => break,
                    Ok(Claim::Others) => {
                        others = true;
                        break;
                    }
                    Err(ended) => {
                        failed = Some(ended);
                        break;
                    }
                };
                mine.push(segment.number);
                at_work.push(segment.read());
            }
            match at_work.next().await {
                None => break,
                Some(Ok(None)) => {}
                Some(Ok(Some(left))) => in_hand.push(left),
                // Somebody else has it, or nobody for a while: what it was is read again then.
                Some(Err(Ended::Lost)) if self.lost.fetch_add(1, Ordering::Relaxed) < LOST_MAX => {
                    tracing::info!(table = self.table, "a segment was lost, and is read again");
                    others = true;
                }
                Some(Err(ended)) => {
                    // The others end by themselves: what they wrote last is verified.
                    self.stop.cancel();
                    failed = failed.or(Some(ended));
                }
            }
        }
        match failed {
            Some(ended) => Err(ended),
            None => self.read_later(in_hand).await.map(|()| others),
        }
    }

    /// Judges what was put off while it was read: nothing else waits for that.
    async fn read_later<'a>(&'a self, in_hand: &mut Vec<InHand<'a>>) -> Result<(), Ended> {
        let mut all = std::mem::take(in_hand).into_iter();
        while let Some(left) = all.next() {
            if left.rest.later.is_none() {
                in_hand.push(left);
                continue;
            }
            match left.segment.read_later(left.rest).await {
                Ok(None) => {}
                Ok(Some(read)) => in_hand.push(read),
                Err(ended) => {
                    in_hand.extend(all);
                    return match ended {
                        Ended::Lost if self.lost.fetch_add(1, Ordering::Relaxed) < LOST_MAX => {
                            Ok(())
                        }
                        ended => Err(ended),
                    };
                }
            }
        }
        Ok(())
    }

    /// Reads on, beside the other processes of the job, until all segments are read by somebody.
    async fn read_until_whole<'a>(
        &'a self,
        shared: &Shared,
        in_hand: &mut Vec<InHand<'a>>,
    ) -> Result<Rows, Ended> {
        loop {
            self.read_all(in_hand).await?;
            self.verify(in_hand).await?;
            let rows = shared.rows().await?;
            let is_over = rows.plan.as_ref().is_none_or(|plan| plan.ended.is_some());
            if is_over || rows.scanned(self.segments).is_some() {
                return Ok(rows);
            }
            self.wait().await?;
        }
    }

    async fn wait(&self) -> Result<(), Ended> {
        tokio::select! {
            () = tokio::time::sleep(self.wait) => Ok(()),
            () = self.stop.cancelled() => Err(Ended::Stopped),
        }
    }

    /// Deletes what only the target has, if that is not too much. Returns the rows once all is done, and
    /// what was too much.
    async fn delete<'a>(
        &'a self,
        shared: &Shared,
        mut rows: Rows,
        in_hand: &mut Vec<InHand<'a>>,
    ) -> Result<(Rows, Option<(u64, u64)>), Ended> {
        loop {
            let is_over = rows.plan.as_ref().is_none_or(|plan| plan.ended.is_some());
            let Some((items, extra)) = rows.scanned(self.segments).filter(|_| !is_over) else {
                if is_over {
                    return Ok((rows, None));
                }
                // Somebody died with keys that were in its hands only: they are looked for again.
                rows = self.read_until_whole(shared, in_hand).await?;
                continue;
            };
            let allowed = match (&self.repairs, &self.strategy) {
                (Some(repairs), Strategy::Mirror) => repairs.max_deletes.of(items),
                _ => u64::MAX,
            };
            // An empty source is a wrong one more often than it is right; a person is asked before.
            let is_empty = self.eager && rows.counts().source_items == 0;
            let allowed = if is_empty { 0 } else { allowed };
            let too_many = (extra > allowed).then_some((extra, allowed));
            if extra > 0 && too_many.is_none() {
                self.before_deletes().await?;
            }
            let mut mine = std::mem::take(in_hand).into_iter();
            while let Some(left) = mine.next() {
                let finished = self.finish(left, too_many.is_some(), in_hand).await;
                if finished.is_err() {
                    in_hand.extend(mine);
                    return Err(finished.err().unwrap_or(Ended::Lost));
                }
            }
            for row in rows.segments.values().filter(|row| !row.done) {
                if !row.is_whole() {
                    continue;
                }
                let held = match shared.take(row.clone()).await {
                    // Whether it was taken is not known: it is anybody's once it has ended.
                    Err(fault) if fault.policy() == Policy::Retry => None,
                    held => held.map_err(|fault| shared.failed(fault))?,
                };
                if let Some(hold) = held {
                    let left = InHand::new(Segment::again(self, hold), Rest::default());
                    self.finish(left, too_many.is_some(), in_hand).await?;
                }
            }
            self.verify(in_hand).await?;
            rows = shared.rows().await?;
            if rows.is_done(self.segments) || rows.plan.is_none() {
                return Ok((rows, too_many));
            }
            if in_hand.is_empty() {
                self.wait().await?;
                // What one had in hand that died meanwhile is looked for again.
                self.read_all(in_hand).await?;
                rows = shared.rows().await?;
            }
        }
    }

    async fn before_deletes(&self) -> Result<(), Ended> {
        let heard_by = self.repairs.as_ref().and_then(|r| r.heard_by.as_ref());
        let Some(hears) = heard_by else {
            return Ok(());
        };
        match hears.before_deletes().await {
            Ok(()) => Ok(()),
            Err(Unfinished::Failed(fault) | Unfinished::Unanswered(fault)) => Err(Ended::Failed {
                subject: self.source.name(),
                fault,
            }),
            Err(Unfinished::Unsettled | Unfinished::Stopped) => Err(Ended::Stopped),
        }
    }

    /// Deletes what is to be deleted of one segment; then it is done, unless something is not verified.
    async fn finish<'a>(
        &'a self,
        mut left: InHand<'a>,
        keeps: bool,
        in_hand: &mut Vec<InHand<'a>>,
    ) -> Result<(), Ended> {
        // Of one who died in the middle of its deletes.
        if let Err(ended) = left.segment.mend_inherited_of(&left.rest).await {
            in_hand.push(left);
            return Err(ended);
        }
        if !keeps && self.repairs.is_some() && !left.is_deleted {
            let in_row = left.segment.kept.as_ref().map(|kept| kept.hold.row());
            let in_row = in_row.map_or(Vec::new(), |row| extra_of(&row));
            let spilled = match left.rest.extra.take() {
                Some(spill) => Some(spill.read().map_err(Ended::File)?.map(without_number)),
                None => None,
            };
            let in_row = in_row.into_iter().map(Ok);
            let mut keys = in_row.chain(spilled.into_iter().flatten()).peekable();
            while keys.peek().is_some() {
                let ended = match lot(&mut keys) {
                    Ok(some) => self.mend_left(&mut left, some, false).await,
                    Err(error) => Some(Ended::File(error)),
                };
                if let Some(ended) = ended {
                    in_hand.push(left);
                    return Err(ended);
                }
            }
        }
        left.rest.extra = None;
        left.is_deleted = true;
        match left.rest.is_empty() {
            true => left.segment.done(&left.mended).await,
            false => {
                in_hand.push(left);
                Ok(())
            }
        }
    }

    /// Repairs keys of a segment that was read before. `again`: they were written once.
    async fn mend_left(
        &self,
        left: &mut InHand<'_>,
        keys: Vec<ItemKey>,
        again: bool,
    ) -> Option<Ended> {
        let mut open: HashSet<ItemKey> = match again {
            true => keys.iter().cloned().collect(),
            false => HashSet::new(),
        };
        if let Err(ended) = left.segment.mends(&keys).await {
            left.segment.unverified(open.len());
            left.rest.unverified.extend(open);
            return Some(ended);
        }
        let mended = mend(&left.segment, keys).await;
        for (key, fate) in mended.fates {
            self.found.add(&fate.counts());
            left.mended += &fate.counts();
            match fate {
                Fate::Unverified => {
                    open.insert(key);
                }
                _ => {
                    left.segment.book.mended(&key);
                    open.remove(&key);
                }
            }
        }
        left.segment.unverified(open.len());
        left.rest.unverified.extend(open);
        mended.ended
    }

    /// Repairs again what was written and not verified, once every write of before is dead. What is
    /// verified then is done, unless there is something to delete.
    async fn verify<'a>(&'a self, in_hand: &mut Vec<InHand<'a>>) -> Result<(), Ended> {
        let Some(repairs) = &self.repairs else {
            return Ok(());
        };
        for _ in 0..VERIFY_ROUNDS {
            if in_hand.iter().all(|left| left.rest.unverified.is_empty()) {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(repairs.late_effect) => {}
                () = self.stop.cancelled() => return Err(Ended::Stopped),
            }
            for left in in_hand.iter_mut() {
                let keys = std::mem::take(&mut left.rest.unverified);
                left.segment.verified(keys.len());
                if let Some(ended) = self.mend_left(left, keys, true).await {
                    return Err(ended);
                }
            }
        }
        if in_hand.iter().any(|left| !left.rest.unverified.is_empty()) {
            // Its rows stay, as an alarm.
            return Err(Ended::Unverified);
        }
        let mut all = std::mem::take(in_hand).into_iter();
        while let Some(left) = all.next() {
            let ended = match (left.rest.is_empty(), left.is_deleted) {
                (true, true) => left.segment.done(&left.mended).await,
                (true, false) => left.segment.reading_ends(&left.mended).await,
                (false, _) => {
                    in_hand.push(left);
                    Ok(())
                }
            };
            if ended.is_err() {
                in_hand.extend(all);
                return ended;
            }
        }
        Ok(())
    }

    fn key_of(&self, item: &Item) -> ItemKey {
        key_of(&self.key_names, item)
    }
}

/// How many parts a table of so many bytes is read in.
pub fn segments_of(bytes: i64) -> u32 {
    let parts = bytes / SEGMENT_BYTES + 1;
    u32::try_from(parts).map_or(SEGMENTS_CHOSEN_MAX, |n| n.min(SEGMENTS_CHOSEN_MAX))
}

fn without_number(spilled: std::io::Result<(ItemKey, u64)>) -> std::io::Result<ItemKey> {
    spilled.map(|(key, _)| key)
}

/// The next keys that are deleted together: they stand in the row meanwhile.
fn lot(keys: &mut impl Iterator<Item = std::io::Result<ItemKey>>) -> std::io::Result<Vec<ItemKey>> {
    let mut lot: Vec<ItemKey> = Vec::new();
    let mut bytes = 0;
    while lot.len() < DELETED_MAX
        && bytes < LOT_BYTES_MAX
        && let Some(key) = keys.next()
    {
        let key = key?;
        bytes += key.as_bytes().len();
        lot.push(key);
    }
    Ok(lot)
}

/// The key of `item`, by the attributes that make it.
fn key_of(names: &[String], item: &Item) -> ItemKey {
    let parts = names.iter();
    let keys = parts.filter_map(|name| Some((name.clone(), item.get(name)?.clone())));
    ItemKey::new(&keys.collect())
}
