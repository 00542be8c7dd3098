//! One segment: both parts are scanned side by side, and what differs is handed on.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::book::{Book, Kept, Unstored};
use super::desk::Desk;
use super::join::{self, Join, Look, Met, Side, index};
use super::ledger::{Origin, Position};
use super::mend::{Fate, mend};
use super::place::Place;
use super::report::Counts;
use super::settle::{Rest, Settler};
use super::{Ended, InHand, Reconcile, VERIFY_ROUNDS, key_of};
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::BATCH_KEYS_MAX;
use crate::dynamo::value::{Item, item_bytes};
use crate::lease::hold::Hold;
use crate::lease::row::SegmentRow;
use crate::mutation::crash;

/// Suspects that wait to be looked at.
const SUSPECTS_MAX: usize = 2_500;
/// KiB of items that wait to be written.
const ITEMS_KIB_MAX: u32 = 8 << 10;
/// Pages by which one side of a part may be ahead of the other.
const AHEAD_MAX: u64 = 2;

/// What has waited for so many pages of its side is looked up.
const AGED_PAGES: u64 = 8;
/// Lookups that have to be in vain before the two sides count as coming in other orders.
const IN_VAIN_MIN: u64 = 200;

/// A key that differs, and where it was read.
#[derive(Debug, Clone)]
pub(super) struct Suspect {
    pub(super) key: ItemKey,
    pub(super) origins: Vec<Origin>,
    /// Its item in the source, where an eager job has it in hand.
    pub(super) read: Option<InMemory>,
}

/// An item in memory, and the right to hold it there.
#[derive(Debug, Clone)]
pub(super) struct InMemory {
    pub(super) item: Arc<Item>,
    _room: Option<Arc<OwnedSemaphorePermit>>,
}

impl InMemory {
    /// An item that is held for a moment only.
    pub(super) fn of(item: Item) -> Self {
        Self {
            item: Arc::new(item),
            _room: None,
        }
    }
}

/// A segment that is read.
pub(super) struct Segment<'a> {
    pub(super) job: &'a Reconcile,
    pub(super) number: u32,
    pub(super) book: Arc<Book>,
    /// The right to write, where its row is held.
    pub(super) kept: Option<Kept>,
    /// Keys that were written and are not verified.
    unverified: AtomicU64,
    /// What was put on condition, or may have been, by its key.
    puts: Mutex<HashMap<ItemKey, Option<Digest>>>,
    /// Room for items that wait to be written, in KiB.
    room: Arc<Semaphore>,
}

impl<'a> Segment<'a> {
    /// One that nobody else reads.
    pub(super) fn alone(job: &'a Reconcile, number: u32) -> Self {
        Self {
            job,
            number,
            book: Arc::new(Book::open(None, job.lines.clone())),
            kept: None,
            unverified: AtomicU64::new(0),
            puts: Mutex::default(),
            room: Arc::new(Semaphore::new(ITEMS_KIB_MAX as usize)),
        }
    }

    /// One that this process holds now, and goes on with where its row says.
    pub(super) fn held(job: &'a Reconcile, hold: Arc<Hold<SegmentRow>>) -> Self {
        job.found.add(&hold.row().counts);
        Self::again(job, hold)
    }

    /// As [`held`](Self::held), for one whose counts were told before.
    pub(super) fn again(job: &'a Reconcile, hold: Arc<Hold<SegmentRow>>) -> Self {
        let row = hold.row();
        let book = Arc::new(Book::open(Some(&row), job.lines.clone()));
        Self {
            job,
            number: row.number,
            kept: Some(Kept::new(hold, Arc::clone(&book))),
            book,
            unverified: AtomicU64::new(0),
            puts: Mutex::default(),
            room: Arc::new(Semaphore::new(ITEMS_KIB_MAX as usize)),
        }
    }

    /// Reads it to its end. `None`: it is read, and nothing of it is left in this process.
    pub(super) async fn read(self) -> Result<Option<InHand<'a>>, Ended> {
        let rest = match self.go_on().await {
            Ok(rest) => rest,
            Err(ended) => {
                self.let_go().await;
                return Err(ended);
            }
        };
        if rest.later.is_some() {
            return Ok(Some(InHand::new(self, rest)));
        }
        self.ends_read(rest).await
    }

    /// Judges what was put off, and ends as [`read`](Self::read) does.
    pub(super) async fn read_later(self, mut rest: Rest) -> Result<Option<InHand<'a>>, Ended> {
        if let Some(later) = rest.later.take() {
            match Settler::new(&self).run_later(later).await {
                Ok(more) => {
                    rest.extra = more.extra;
                    rest.unverified.extend(more.unverified);
                }
                Err(ended) => {
                    self.let_go().await;
                    return Err(ended);
                }
            }
        }
        self.ends_read(rest).await
    }

    /// All of it is read and judged.
    async fn ends_read(self, rest: Rest) -> Result<Option<InHand<'a>>, Ended> {
        if rest.is_empty() {
            self.reading_ends(&Counts::default()).await?;
            return Ok(None);
        }
        if let Some(kept) = &self.kept {
            let scanned = self.scanned();
            let stored = kept.store(|row| row.scanned = Some(scanned)).await;
            if let Err(unstored) = stored {
                let ended = self.unstored(unstored);
                self.let_go().await;
                return Err(ended);
            }
        }
        Ok(Some(InHand::new(self, rest)))
    }

    /// Items of the target, and those that only it has.
    fn scanned(&self) -> (u64, u64) {
        let total = self.book.ledger().total();
        (total.target_items, total.extra)
    }

    fn unstored(&self, unstored: Unstored) -> Ended {
        match (unstored, &self.job.desk) {
            (Unstored::File(error), _) => Ended::File(error),
            (Unstored::Failed(fault), Desk::Shared(shared)) => shared.failed(fault),
            (Unstored::Lost | Unstored::Failed(_), _) => Ended::Lost,
        }
    }

    /// Everything of it was read and settled: its row says so, and anybody may delete what is to be
    /// deleted. `mended`: what was repaired since and is not counted yet.
    pub(super) async fn reading_ends(mut self, mended: &Counts) -> Result<(), Ended> {
        crash("segment-read");
        self.settled(mended);
        let scanned = self.scanned();
        let deletes = self.job.repairs.is_some();
        let Some(kept) = self.kept.take() else {
            return Ok(());
        };
        let stored = kept.release(|row| {
            row.scanned = Some(scanned);
            row.dirty = false;
            row.done = !deletes || row.extra.is_empty();
        });
        let stored = stored.await;
        stored.map_err(|unstored| self.unstored(unstored))
    }

    fn settled(&self, mended: &Counts) {
        let mut ledger = self.book.ledger();
        ledger.add(mended);
        ledger.finish();
    }

    /// Nothing of it is left to do. `mended`: as above.
    pub(super) async fn done(mut self, mended: &Counts) -> Result<(), Ended> {
        self.settled(mended);
        let Some(kept) = self.kept.take() else {
            return Ok(());
        };
        let stored = kept.release(|row| {
            row.done = true;
            row.dirty = false;
            row.extra.clear();
        });
        let stored = stored.await;
        stored.map_err(|unstored| self.unstored(unstored))
    }

    /// Stores that `keys` are being repaired: what is written for them last may be wrong, until it is
    /// verified.
    pub(super) async fn mends(&self, keys: &[ItemKey]) -> Result<(), Ended> {
        let Some(kept) = &self.kept else {
            return Err(Ended::Lost);
        };
        if !self.book.mends(keys) {
            // So many writes without an answer: somebody should look why.
            return Err(Ended::Unverified);
        }
        let stored = kept.store(|_| ()).await;
        stored.map_err(|unstored| self.unstored(unstored))
    }

    /// This process goes: who comes next need not wait, unless a write may take effect yet.
    pub(super) async fn let_go(mut self) {
        let Some(kept) = self.kept.take() else {
            return;
        };
        match self.unverified.load(Ordering::Relaxed) {
            // If it cannot be written it ends by itself.
            // Keys that its last owner had in hand may be in its row yet: then it stays an alarm.
            0 => drop(
                kept.release(|row| row.dirty &= !row.mending.is_empty())
                    .await,
            ),
            _ => kept.leave().await,
        }
    }

    /// What was put under `key` is gone.
    pub(super) fn is_taken_back(&self, key: &ItemKey) {
        let mut puts = self.puts.lock().unwrap_or_else(PoisonError::into_inner);
        puts.remove(key);
    }

    /// `item` is put.
    pub(super) fn may_be_put(&self, key: &ItemKey, item: &Item) {
        let mut puts = self.puts.lock().unwrap_or_else(PoisonError::into_inner);
        puts.insert(key.clone(), Digest::of_item(item));
    }

    /// What may have been put under `key`.
    pub(super) fn was_put(&self, key: &ItemKey) -> Option<Digest> {
        let puts = self.puts.lock().unwrap_or_else(PoisonError::into_inner);
        puts.get(key).copied().flatten()
    }

    /// So many keys more were written and are not verified.
    pub(super) fn unverified(&self, keys: usize) {
        self.unverified.fetch_add(keys as u64, Ordering::Relaxed);
        self.job.found.unverified(keys as i64);
    }

    /// So many are repaired again.
    pub(super) fn verified(&self, keys: usize) {
        self.unverified.fetch_sub(keys as u64, Ordering::Relaxed);
        self.job.found.unverified(-(keys as i64));
    }

    /// Goes on where the row stands. What its last owner repaired when it died comes first.
    async fn go_on(&self) -> Result<Rest, Ended> {
        self.mend_inherited().await?;
        self.run().await
    }

    /// As [`mend_inherited`](Self::mend_inherited), of a segment that was taken only to be ended.
    pub(super) async fn mend_inherited_of(&self, rest: &Rest) -> Result<(), Ended> {
        // What this process has in hand itself it knows, and verifies in its own time.
        match rest.unverified.is_empty() {
            true => self.mend_inherited().await,
            false => Ok(()),
        }
    }

    /// Repairs what somebody had in hand when the row was taken, until all of it is verified.
    pub(super) async fn mend_inherited(&self) -> Result<(), Ended> {
        let Some(repairs) = &self.job.repairs else {
            return Ok(());
        };
        let mut open: BTreeSet<ItemKey> = self.book.was_mending().into_iter().collect();
        for round in 0..=VERIFY_ROUNDS {
            if open.is_empty() {
                return Ok(());
            }
            if round > 0 {
                tokio::select! {
                    () = tokio::time::sleep(repairs.late_effect) => {}
                    () = self.job.stop.cancelled() => {
                        self.unverified(open.len());
                        return Err(Ended::Stopped);
                    }
                }
            }
            let mended = mend(self, open.iter().cloned().collect()).await;
            for (key, fate) in mended.fates {
                if fate != Fate::Unverified {
                    self.book.mended(&key);
                    open.remove(&key);
                }
            }
            if let Some(ended) = mended.ended {
                self.unverified(open.len());
                return Err(ended);
            }
        }
        self.unverified(open.len());
        match open.is_empty() {
            true => Ok(()),
            false => Err(Ended::Unverified),
        }
    }

    /// Reads it to its end, and settles what differs. Returns what is left to do then.
    async fn run(&self) -> Result<Rest, Ended> {
        let (suspects, found) = mpsc::channel(SUSPECTS_MAX);
        let in_vain = CancellationToken::new();
        let scan = async {
            let scanned = tokio::select! {
                scanned = self.scan(&suspects) => scanned,
                () = in_vain.cancelled() => Err(Ended::Stopped),
            };
            // The settler ends when nobody can send any more.
            drop(suspects);
            scanned
        };
        let settle = async {
            let settled = Settler::new(self).run(found).await;
            if settled.is_err() {
                in_vain.cancel();
            }
            settled
        };
        let (scanned, settled) = tokio::join!(scan, settle);
        // What ended the settler is why the scan could not go on.
        let rest = settled?;
        scanned?;
        Ok(rest)
    }

    fn place(&self, side: Side) -> &Arc<Place> {
        match side {
            Side::Source => &self.job.source,
            Side::Target => &self.job.target,
        }
    }

    async fn scan(&self, suspects: &mpsc::Sender<Suspect>) -> Result<(), Ended> {
        let segments = self.job.segments.max(1);
        let at_once = self.job.at_once.min(segments as usize).max(1);
        let mut scan = Scan {
            join: Join::new(self.job.memory / at_once),
            pages: [0; 2],
            in_vain: 0,
            in_time: 0,
        };
        for side in [Side::Source, Side::Target] {
            if self.next(side).is_none() {
                scan.join.end(side);
            }
        }
        let mut ahead = [self.begin(Side::Source), self.begin(Side::Target)];
        loop {
            let mut pages = Vec::with_capacity(2);
            for (reading, side) in ahead.iter_mut().zip([Side::Source, Side::Target]) {
                let Some(task) = reading.take() else { continue };
                // Cut off only where the whole process ends.
                let page = task.await.map_err(|_| Ended::Stopped)??;
                scan.pages[index(side)] += 1;
                pages.push((self.note(side, &page), page.entries));
            }
            if pages.is_empty() {
                return Ok(());
            }
            // The next ones come in while these are met. Not where the other side is far behind.
            for side in [Side::Source, Side::Target] {
                let other = self.next(side.other()).is_none();
                let far = scan.pages[index(side)] >= scan.pages[index(side.other())] + AHEAD_MAX;
                if other || !far {
                    ahead[index(side)] = self.begin(side);
                }
            }
            // The target first: what differs is known when the source's item comes, which is in hand then.
            for (origin, entries) in pages.into_iter().rev() {
                self.meet(&mut scan.join, origin, entries, suspects).await?;
            }
            self.look_up(&mut scan, suspects).await?;
            if self.kept.as_ref().is_some_and(Kept::is_lost) {
                return Err(Ended::Lost);
            }
            if self.kept.is_none() {
                // Nobody stores it: what is settled is forgotten here.
                self.book.ledger().cut();
            }
        }
    }

    /// Begins to read the next page of `side`; `None` at its end.
    fn begin(&self, side: Side) -> Option<AbortOnDropHandle<Result<Page, Ended>>> {
        let after = self.next(side)?;
        let place = Arc::clone(self.place(side));
        let segment = (self.number as i32, self.job.segments.max(1) as i32);
        let key_names = Arc::clone(&self.job.key_names);
        let keeps = self.job.eager && side == Side::Source;
        Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let page = place.scan(segment, after).await?;
            let entries = page.items.into_iter().map(|item| Entry {
                digest: Digest::of_item(&item),
                key: Carried {
                    key: key_of(&key_names, &item),
                    item: keeps.then(|| Arc::new(item)),
                },
            });
            Ok(Page {
                entries: entries.collect(),
                next: page.next,
                units: page.units,
            })
        })))
    }

    /// Takes note of a page that was read.
    fn note(&self, side: Side, page: &Page) -> Origin {
        let items = page.entries.len() as u64;
        let counts = match side {
            Side::Source => Counts {
                source_items: items,
                source_units: page.units,
                ..Counts::default()
            },
            Side::Target => Counts {
                target_items: items,
                target_units: page.units,
                ..Counts::default()
            },
        };
        self.job.found.add(&counts);
        let next = page.next.clone().map_or(Position::End, Position::After);
        let mut ledger = self.book.ledger();
        ledger.page(side, page.entries.len(), counts, next)
    }

    /// Meets the items of a page with those of the other side.
    async fn meet(
        &self,
        join: &mut Join<Carried>,
        origin: Origin,
        entries: Vec<Entry>,
        suspects: &mpsc::Sender<Suspect>,
    ) -> Result<(), Ended> {
        for Entry { key, digest } in entries {
            let met = join.meet(origin, key, digest);
            self.met(met, origin, suspects).await?;
        }
        if self.next(origin.side).is_none() {
            for (key, origin) in join.end(origin.side) {
                self.met(Met::Suspect(key, None), origin, suspects).await?;
            }
        }
        Ok(())
    }

    /// Where `side` is read on; `None` at its end. The outer `None` of a key is the beginning.
    #[allow(clippy::option_option)] // No name would say it shorter.
    fn next(&self, side: Side) -> Option<Option<Item>> {
        match self.book.ledger().next(side) {
            Position::Start => Some(None),
            Position::After(key) => Some(Some(key.clone())),
            Position::End => None,
        }
    }

    /// What came of an item that was read at `origin`.
    async fn met(
        &self,
        met: Met<Carried>,
        origin: Origin,
        suspects: &mpsc::Sender<Suspect>,
    ) -> Result<(), Ended> {
        let both = |partner: Option<Origin>| [Some(origin), partner].into_iter().flatten();
        match met {
            Met::Waits => Ok(()),
            Met::Settled(partner) => {
                let origins: Vec<Origin> = both(partner).collect();
                self.book.ledger().settle(&origins);
                Ok(())
            }
            Met::Suspect(carried, partner) => {
                let suspect = Suspect {
                    key: carried.key,
                    origins: both(partner).collect(),
                    read: match carried.item {
                        Some(item) => Some(self.hold(item).await),
                        None => None,
                    },
                };
                let one = Counts {
                    suspects: 1,
                    ..Counts::default()
                };
                self.job.found.add(&one);
                self.book.ledger().add(&one);
                // Refused only when the settler has ended, and then its reason is told.
                suspects.send(suspect).await.map_err(|_| Ended::Stopped)
            }
        }
    }

    /// Holds an item in memory, once there is room for it.
    async fn hold(&self, item: Arc<Item>) -> InMemory {
        let kib = u32::try_from(item_bytes(&item) >> 10).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room);
        // It is never closed.
        let room = room.acquire_many_owned(kib.saturating_add(1).min(ITEMS_KIB_MAX));
        InMemory {
            item,
            _room: room.await.ok().map(Arc::new),
        }
    }

    /// Counts units spent on reads by key.
    pub(super) fn spent(&self, side: Side, units: f64) {
        let counts = match side {
            Side::Source => Counts {
                source_units: units,
                ..Counts::default()
            },
            Side::Target => Counts {
                target_units: units,
                ..Counts::default()
            },
        };
        self.job.found.add(&counts);
        self.book.ledger().add(&counts);
    }

    /// The items under `keys`, read consistently.
    pub(super) async fn get(&self, side: Side, keys: &[ItemKey]) -> Result<Vec<Item>, Ended> {
        let (items, units) = self.place(side).get(keys).await?;
        self.spent(side, units);
        Ok(items)
    }

    /// Looks up on the other side what has waited longest: where more waits than may, and what has waited
    /// so long that it has no partner, as the two sides come alike. Whatever waits holds the marks.
    async fn look_up(
        &self,
        scan: &mut Scan,
        suspects: &mpsc::Sender<Suspect>,
    ) -> Result<(), Ended> {
        let mut looks: [Vec<Look<Carried>>; 2] = [Vec::new(), Vec::new()];
        while let Some(look) = scan.join.overflow() {
            looks[index(look.origin.side)].push(look);
        }
        let aged = scan.pages.map(|pages| pages.saturating_sub(AGED_PAGES));
        while scan.comes_alike()
            && let Some(look) = scan.join.aged(aged)
        {
            looks[index(look.origin.side)].push(look);
        }
        let [on_source, on_target] = looks;
        for (looks, other) in [(on_source, Side::Target), (on_target, Side::Source)] {
            let mut looks = looks.into_iter().peekable();
            while looks.peek().is_some() {
                let batch: Vec<_> = looks.by_ref().take(BATCH_KEYS_MAX).collect();
                let keys: Vec<ItemKey> = batch.iter().map(|look| look.key.key.clone()).collect();
                let mut found: HashMap<ItemKey, Option<Digest>> = HashMap::new();
                for item in self.get(other, &keys).await? {
                    found.insert(self.job.key_of(&item), Digest::of_item(&item));
                }
                for look in batch {
                    let origin = look.origin;
                    let there = found.remove(&look.key.key);
                    match there.is_some() {
                        true => scan.in_vain += 1,
                        false => scan.in_time += 1,
                    }
                    let met = scan.join.looked_up(look, there);
                    self.met(met, origin, suspects).await?;
                }
            }
        }
        Ok(())
    }
}

/// An item as it is met.
struct Entry {
    key: Carried,
    digest: Option<Digest>,
}

/// What waits for its partner: a key and, where it may be written at once, its item in the source.
#[derive(Debug, Clone)]
struct Carried {
    key: ItemKey,
    item: Option<Arc<Item>>,
}

/// A page as it is met: what stands for its items.
struct Page {
    entries: Vec<Entry>,
    next: Option<Item>,
    units: f64,
}

/// How far the scan of a segment is in this process.
struct Scan {
    join: Join<Carried>,
    /// Pages read of each side.
    pages: [u64; 2],
    /// Items that were looked up and would have met their partners by waiting.
    in_vain: u64,
    /// Those that would have waited in vain.
    in_time: u64,
}

impl Scan {
    /// Whether the two sides seem to come in the same order: what waits long has no partner then.
    fn comes_alike(&self) -> bool {
        self.in_vain < IN_VAIN_MIN || self.in_vain <= self.in_time
    }
}

impl join::Key for Carried {
    fn digest(&self) -> Digest {
        Digest::of_key(&self.key)
    }

    fn bytes(&self) -> usize {
        let item = self.item.as_ref().map_or(0, |item| item_bytes(item));
        self.key.as_bytes().len() + item
    }

    fn with(self, partner: Self) -> Self {
        Self {
            item: self.item.or(partner.item),
            ..self
        }
    }
}
