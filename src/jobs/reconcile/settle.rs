//! Looks at suspects until they are settled, and has those that differ repaired.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::join::{Side, index};
use super::judge::{Flow, Held, Kind, Suspicion, Verdict};
use super::ledger::Origin;
use super::mend::{Fate, mend_read};
use super::report::{Counts, Line};
use super::segment::{InMemory, Segment, Suspect};
use super::spill::{Spill, Spilled};
use super::strategy::Deed;
use super::{Ended, LOT_BYTES_MAX};
use crate::dynamo::clock::host_ms;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::BATCH_KEYS_MAX;
use crate::dynamo::value::Item;

/// Suspects looked at in turns.
const OPEN_MAX: usize = 5_000;
/// Calls of one turn on each side.
const CALLS_AT_ONCE: usize = 4;
/// Looks fit into the time to settle so often.
const LOOKS_IN_SETTLE: u32 = 2;
/// How long a key is looked at before it counts as unsettled: so many times to settle, and until a dead
/// worker is known to be dead.
const PATIENT_SETTLES: u32 = 12;
const PATIENT_FLOWS: u32 = 3;
/// Longer than anything takes.
const PATIENT_FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// How often the flow is asked after that has to pass.
const FLOW_ASKED_EVERY: Duration = Duration::from_secs(1);
/// Keys remembered as judged; with more, they are forgotten and may be reported twice.
const JUDGED_MAX: usize = 100_000;
/// Keys gathered before they are repaired.
const MENDED_MAX: usize = 500;

pub(super) struct Settler<'a> {
    segment: &'a Segment<'a>,
    fresh: VecDeque<Suspect>,
    /// Looked at before, in the order in which they are to be looked at again.
    waiting: VecDeque<Open>,
    differ: Vec<Differing>,
    /// Those that are being looked at: one look may not name a key twice. Where the two sides come in
    /// other orders a key may be a suspect twice, and holds more pages then.
    open: HashMap<Digest, Vec<super::ledger::Origin>>,
    /// Those that were called different.
    judged: HashSet<Digest>,
    /// Whether keys that the source lacks are judged now.
    is_scanned: bool,
    /// Such keys of an eager job: they are put off until the scan has ended and the changes of before are
    /// applied. Much of them is gone by then.
    later: Option<Spill>,
    /// Those that were put off, now that their time has come.
    now: Option<Spilled>,
    rest: Rest,
}

struct Open {
    key: ItemKey,
    suspicion: Suspicion,
    due: Instant,
}

/// A difference that is to be repaired.
struct Differing {
    suspect: Suspect,
    kind: Kind,
}

/// What one look saw.
struct Look {
    open: Open,
    source: Option<Item>,
    target: Option<Item>,
}

/// What is left to do for a segment once it is read.
#[derive(Default)]
pub(super) struct Rest {
    /// Keys that the source lacked, to be judged when the changes of before are applied.
    pub(super) later: Option<Spill>,
    /// Keys to delete at the end that do not fit into its row.
    pub(super) extra: Option<Spill>,
    /// Keys that were written and not verified: their last write may come to nothing good.
    pub(super) unverified: Vec<ItemKey>,
}

impl Rest {
    pub(super) fn is_empty(&self) -> bool {
        self.later.is_none() && self.extra.is_none() && self.unverified.is_empty()
    }
}

impl<'a> Settler<'a> {
    pub(super) fn new(segment: &'a Segment<'a>) -> Self {
        Self {
            segment,
            fresh: VecDeque::new(),
            waiting: VecDeque::new(),
            differ: Vec::new(),
            open: HashMap::new(),
            judged: HashSet::new(),
            is_scanned: false,
            later: None,
            now: None,
            rest: Rest::default(),
        }
    }

    /// Judges what was put off, once the changes of before are applied.
    pub(super) async fn run_later(mut self, later: Spill) -> Result<Rest, Ended> {
        self.until_passed().await?;
        self.is_scanned = true;
        self.now = Some(later.read().map_err(Ended::File)?);
        let (nobody, nothing) = mpsc::channel(1);
        drop(nobody);
        self.run(nothing).await
    }

    /// Settles what comes until nothing comes any more. Returns what is left to do then.
    pub(super) async fn run(
        mut self,
        mut suspects: mpsc::Receiver<Suspect>,
    ) -> Result<Rest, Ended> {
        loop {
            if self.segment.job.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            let mut is_over = false;
            while self.fresh.len() + self.waiting.len() < OPEN_MAX {
                match suspects.try_recv() {
                    Ok(suspect) => self.take_in(suspect),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        is_over = true;
                        break;
                    }
                }
            }
            if is_over {
                self.take_later()?;
            }
            let due = self.take_due();
            if !due.is_empty() {
                self.look(due).await?;
                continue;
            }
            if !self.differ.is_empty() {
                self.mend_differing().await?;
                continue;
            }
            if self.waiting.is_empty() && is_over {
                if self.now.is_some() {
                    continue;
                }
                self.rest.later = self.later;
                return Ok(self.rest);
            }
            let next = self.waiting.front().map(|open| open.due);
            let pause = next.map_or(Duration::from_secs(3_600), |due| {
                due.saturating_duration_since(Instant::now())
            });
            let wanted = !is_over && self.waiting.len() < OPEN_MAX;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.segment.job.stop.cancelled() => {}
                suspect = suspects.recv(), if wanted => if let Some(suspect) = suspect {
                    self.take_in(suspect);
                },
            }
        }
    }

    fn take_in(&mut self, suspect: Suspect) {
        let id = Digest::of_key(&suspect.key);
        if self.judged.contains(&id) {
            self.segment.book.ledger().settle(&suspect.origins);
        } else if let Some(origins) = self.open.get_mut(&id) {
            origins.extend(suspect.origins);
        } else {
            self.open.insert(id, suspect.origins.clone());
            let is_on = |side| suspect.origins.iter().any(|origin| origin.side == side);
            if self.segment.job.eager && is_on(Side::Source) {
                let kind = match is_on(Side::Target) {
                    true => Kind::Changed,
                    false => Kind::Missing,
                };
                self.mends(suspect, id, kind);
            } else {
                self.fresh.push_back(suspect);
            }
        }
    }

    /// Takes in what was put off, as it finds room.
    fn take_later(&mut self) -> Result<(), Ended> {
        while self.fresh.len() + self.waiting.len() < OPEN_MAX {
            let Some(spilled) = self.now.as_mut().and_then(Iterator::next) else {
                self.now = None;
                return Ok(());
            };
            let (key, place) = spilled.map_err(Ended::File)?;
            self.take_in_later(key, place);
        }
        Ok(())
    }

    /// A key that was put off, with the page that holds it.
    fn take_in_later(&mut self, key: ItemKey, place: u64) {
        let sides = [Side::Source, Side::Target];
        let side = sides[(place & 1) as usize];
        let page = place >> 1;
        let origins = vec![Origin { side, page }];
        let id = Digest::of_key(&key);
        if self.judged.contains(&id) {
            self.segment.book.ledger().settle(&origins);
        } else if let Some(known) = self.open.get_mut(&id) {
            known.extend(origins);
        } else {
            // Looked at once more, wherever it was read.
            self.open.insert(id, origins.clone());
            let read = None;
            self.fresh.push_back(Suspect { key, origins, read });
        }
    }

    /// Returns once the changes that the source has now are applied.
    async fn until_passed(&self) -> Result<(), Ended> {
        let job = self.segment.job;
        let Some(flow) = &job.flow else {
            return Ok(());
        };
        let now_ms = job.source.region().clock.now_ms();
        loop {
            match flow.ask(&job.table).await? {
                Flow::Still => return Ok(()),
                Flow::Until(until_ms) if until_ms >= now_ms => return Ok(()),
                Flow::Until(_) | Flow::Unknown => {}
            }
            tokio::select! {
                () = tokio::time::sleep(FLOW_ASKED_EVERY) => {}
                () = job.stop.cancelled() => return Err(Ended::Stopped),
            }
        }
    }

    fn take_due(&mut self) -> Vec<Open> {
        let now = Instant::now();
        let mut due = Vec::new();
        while due.len() < BATCH_KEYS_MAX * CALLS_AT_ONCE {
            if self.waiting.front().is_some_and(|open| open.due <= now) {
                due.extend(self.waiting.pop_front());
            } else if let Some(suspect) = self.fresh.pop_front() {
                due.push(Open {
                    key: suspect.key,
                    suspicion: Suspicion::default(),
                    due: now,
                });
            } else {
                break;
            }
        }
        due
    }

    async fn look(&mut self, due: Vec<Open>) -> Result<(), Ended> {
        let job = self.segment.job;
        let at_ms = job.source.region().clock.now_ms();
        // Before the target is read.
        let flow = match &job.flow {
            Some(flow) => flow.ask(&job.table).await?,
            None => Flow::Still,
        };
        let mut batches = Vec::new();
        let mut due = due.into_iter().peekable();
        while due.peek().is_some() {
            let batch = due.by_ref().take(BATCH_KEYS_MAX).collect::<Vec<Open>>();
            batches.push(self.read(batch));
        }
        let looks = try_join_all(batches).await?;
        for look in looks.into_iter().flatten() {
            self.judge(look, at_ms, flow)?;
        }
        if self.differ.len() >= MENDED_MAX {
            self.mend_differing().await?;
        }
        Ok(())
    }

    async fn read(&self, batch: Vec<Open>) -> Result<Vec<Look>, Ended> {
        let keys: Vec<ItemKey> = batch.iter().map(|open| open.key.clone()).collect();
        // The source first: what the target holds is at least as new then, where changes flow.
        let mut source = self.by_key(self.segment.get(Side::Source, &keys).await?);
        let mut target = self.by_key(self.segment.get(Side::Target, &keys).await?);
        let look = |open: Open| Look {
            source: source.remove(&open.key),
            target: target.remove(&open.key),
            open,
        };
        Ok(batch.into_iter().map(look).collect())
    }

    fn by_key(&self, items: Vec<Item>) -> HashMap<ItemKey, Item> {
        let job = self.segment.job;
        let items = items.into_iter();
        items.map(|item| (job.key_of(&item), item)).collect()
    }

    fn judge(&mut self, look: Look, at_ms: i64, flow: Flow) -> Result<(), Ended> {
        let Look {
            mut open,
            source,
            target,
        } = look;
        let job = self.segment.job;
        let id = Digest::of_key(&open.key);
        if let (None, Some(item), Some(keep)) = (&source, &target, &job.keep_expired)
            && keep.keeps(item, host_ms())
        {
            self.close(id);
            return Ok(());
        }
        let held = |item: &Option<Item>| match item {
            None => Held::Nothing,
            Some(item) => Held::Item(Digest::of_item(item)),
        };
        let (from, to) = (held(&source), held(&target));
        if job.eager && self.is_decided(&open.key, id, from, to, source.as_ref())? {
            return Ok(());
        }
        let patience_ms = self.patience().as_millis() as i64;
        let Some(verdict) = open.suspicion.look(from, to, at_ms, flow, patience_ms) else {
            // Not in step with anything that happens at even intervals.
            let pause = job.settle.mul_f64(rand::random_range(0.9..1.1));
            open.due = Instant::now() + pause / LOOKS_IN_SETTLE;
            self.waiting.push_back(open);
            return Ok(());
        };
        let kind = match verdict {
            Verdict::Equal => {
                self.close(id);
                return Ok(());
            }
            Verdict::Differs(kind) => Some(kind),
            Verdict::Unsettled => None,
        };
        if self.judged.len() >= JUDGED_MAX {
            self.judged.clear();
        }
        self.judged.insert(id);
        if !self.segment.book.ledger().is_known(id) {
            self.report(
                &open.key,
                kind,
                (from, source.as_ref()),
                (to, target.as_ref()),
            )?;
        }
        let Some(kind) = kind else {
            let unsettled = Counts {
                unsettled: 1,
                ..Counts::default()
            };
            self.count(id, &unsettled);
            self.close(id);
            return Ok(());
        };
        let deed = job.strategy.deed(kind, source.as_ref(), target.as_ref());
        self.differs(open.key, id, kind, deed)
    }

    /// An eager job judges nothing but what only the target holds, and that when the scan has ended.
    fn is_decided(
        &mut self,
        key: &ItemKey,
        id: Digest,
        from: Held,
        to: Held,
        source: Option<&Item>,
    ) -> Result<bool, Ended> {
        match (from, to) {
            (Held::Nothing, Held::Nothing) => self.close(id),
            (Held::Item(one), Held::Item(other)) if one.is_some() && one == other => self.close(id),
            (Held::Item(_), _) => {
                let kind = match to {
                    Held::Nothing => Kind::Missing,
                    Held::Item(_) => Kind::Changed,
                };
                let origins = self.open.get(&id).cloned().unwrap_or_default();
                let suspect = Suspect {
                    key: key.clone(),
                    origins,
                    read: source.cloned().map(InMemory::of),
                };
                self.mends(suspect, id, kind);
            }
            (Held::Nothing, Held::Item(_)) if self.is_scanned => return Ok(false),
            (Held::Nothing, Held::Item(_)) => {
                let later = match self.later.take() {
                    Some(spill) => Ok(spill),
                    None => Spill::new(),
                };
                let later = self.later.insert(later.map_err(Ended::File)?);
                for origin in self.open.remove(&id).unwrap_or_default() {
                    let place = origin.page << 1 | index(origin.side) as u64;
                    later.push(key, place).map_err(Ended::File)?;
                }
            }
        }
        Ok(true)
    }

    /// A key is to be made as in the source.
    fn mends(&mut self, suspect: Suspect, id: Digest, kind: Kind) {
        if !self.segment.book.ledger().is_known(id) {
            self.segment.job.found.add(&Counts::of(kind));
        }
        self.differ.push(Differing { suspect, kind });
    }

    /// A key differs: what becomes of it?
    fn differs(&mut self, key: ItemKey, id: Digest, kind: Kind, deed: Deed) -> Result<(), Ended> {
        let mut counts = Counts::of(kind);
        if deed == Deed::Leave {
            counts.left = 1;
        }
        match (deed, &self.segment.job.repairs) {
            (Deed::Leave, _) | (_, None) => {
                self.count(id, &counts);
                self.close(id);
            }
            (Deed::Delete, Some(_)) => {
                self.count(id, &counts);
                if self.segment.book.keep_extra(&key) {
                    self.close(id);
                } else {
                    // Its pages stay in hand.
                    self.open.remove(&id);
                    let spill = match self.rest.extra.take() {
                        Some(spill) => Ok(spill),
                        None => Spill::new(),
                    };
                    let spill = self.rest.extra.insert(spill.map_err(Ended::File)?);
                    spill.push(&key, 0).map_err(Ended::File)?;
                }
            }
            (Deed::Mirror | Deed::Put, Some(_)) => {
                let origins = self.open.get(&id).cloned().unwrap_or_default();
                let suspect = Suspect {
                    key,
                    origins,
                    read: None,
                };
                self.mends(suspect, id, kind);
            }
        }
        Ok(())
    }

    /// Counts what was found, once.
    fn count(&self, id: Digest, counts: &Counts) {
        let mut ledger = self.segment.book.ledger();
        if !ledger.is_known(id) {
            self.segment.job.found.add(counts);
        }
        let origins = self.open.get(&id).map_or(&[][..], Vec::as_slice);
        ledger.note(id, origins, counts.clone());
    }

    /// Nothing is left to do for a key.
    fn close(&mut self, id: Digest) {
        if let Some(origins) = self.open.remove(&id) {
            self.segment.book.ledger().settle(&origins);
        }
    }

    fn report(
        &self,
        key: &ItemKey,
        kind: Option<Kind>,
        source: (Held, Option<&Item>),
        target: (Held, Option<&Item>),
    ) -> Result<(), Ended> {
        let job = self.segment.job;
        let Some(lines) = &job.lines else {
            return Ok(());
        };
        let keys = key.to_keys();
        let of = |item: &Item| {
            let parts = item.iter().filter(|(name, _)| keys.contains_key(*name));
            parts.map(|(n, v)| (n.clone(), v.clone())).collect::<Item>()
        };
        // As the tables spell it.
        let spelled = source.1.or(target.1).map_or_else(|| keys.clone(), of);
        let line = Line {
            table: &job.table,
            key: &spelled,
            kind,
            source,
            target,
        };
        lines.write(&line).map_err(Ended::File)
    }

    async fn mend_differing(&mut self) -> Result<(), Ended> {
        let mut differing = std::mem::take(&mut self.differ).into_iter().peekable();
        while differing.peek().is_some() {
            let mut lot = Vec::new();
            let mut bytes = 0;
            while bytes < LOT_BYTES_MAX
                && let Some(one) = differing.next()
            {
                bytes += one.suspect.key.as_bytes().len();
                lot.push(one);
            }
            self.mend_lot(lot).await?;
        }
        Ok(())
    }

    async fn mend_lot(&mut self, differing: Vec<Differing>) -> Result<(), Ended> {
        let keys = differing.iter().map(|one| one.suspect.key.clone());
        let keys: Vec<ItemKey> = keys.collect();
        self.segment.mends(&keys).await?;
        let read = differing.iter().map(|one| {
            let read = one.suspect.read.as_ref();
            (
                one.suspect.key.clone(),
                read.map(|read| Arc::clone(&read.item)),
            )
        });
        let mended = mend_read(self.segment, read.collect()).await;
        let mut fates: HashMap<ItemKey, Fate> = mended.fates.into_iter().collect();
        for Differing { suspect, kind } in differing {
            let id = Digest::of_key(&suspect.key);
            let Some(fate) = fates.remove(&suspect.key) else {
                // Nobody got to it: its pages stay in hand.
                continue;
            };
            let mut counts = Counts::of(kind);
            counts += &fate.counts();
            {
                let mut ledger = self.segment.book.ledger();
                if !ledger.is_known(id) {
                    self.segment.job.found.add(&fate.counts());
                }
                let origins = self.open.get(&id).map_or(&[][..], Vec::as_slice);
                ledger.note(id, origins, counts);
            }
            match fate {
                Fate::Unverified => {
                    self.open.remove(&id);
                    self.segment.unverified(1);
                    self.rest.unverified.push(suspect.key);
                }
                Fate::Repaired | Fate::Refused | Fate::Left | Fate::Untouched => {
                    self.close(id);
                    self.segment.book.mended(&suspect.key);
                }
            }
        }
        mended.ended.map_or(Ok(()), Err)
    }

    fn patience(&self) -> Duration {
        let job = self.segment.job;
        if job.eager {
            return PATIENT_FOR_EVER;
        }
        let flow = job.flow.as_ref().map_or(Duration::ZERO, |f| f.patience());
        job.settle * PATIENT_SETTLES + flow * PATIENT_FLOWS
    }
}
