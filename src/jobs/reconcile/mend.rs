//! Repairs keys that differ, under the right to write that a segment's row gives.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::stream::StreamExt;

use super::join::Side;
use super::report::Counts;
use super::segment::Segment;
use super::strategy::{Strategy, is_newer};
use super::{Ended, Repairs};
use crate::apply::batch::BATCH_OPS_MAX;
use crate::apply::conditional::Put;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::transmit::Bound;
use crate::dynamo::value::{Item, item_bytes, same_item};
use crate::error::{Fault, Operation};
use crate::lease::hold::Hold;
use crate::lease::row::SegmentRow;
use crate::repair::{self, Repairer, Unfinished};

/// Batches repaired at once.
const REPAIRS_AT_ONCE: usize = 4;
/// A consistent read unit.
const UNIT_BYTES: usize = 4_096;
/// How often an item of a source that changes all the time is put.
const PUTS_MAX: usize = 10;

/// What became of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is as it is to be, and that was verified.
    Repaired,
    /// The target refuses the item for good.
    Refused,
    /// The target holds what is not to be touched.
    Left,
    /// It was written, or may be yet, and nobody knows that that is right.
    Unverified,
    /// It changes all the time, and nothing was written.
    Untouched,
}

impl Fate {
    pub(super) fn counts(self) -> Counts {
        let mut counts = Counts::default();
        match self {
            Fate::Repaired => counts.repaired = 1,
            Fate::Refused => counts.refused = 1,
            Fate::Left => counts.left = 1,
            // Counted as what it becomes in the end.
            Fate::Unverified | Fate::Untouched => {}
        }
        counts
    }
}

/// How repairs ended. A key without a fate was not begun.
#[derive(Default)]
pub(super) struct Mended {
    pub(super) fates: Vec<(ItemKey, Fate)>,
    pub(super) ended: Option<Ended>,
}

/// Repairs `keys`.
pub(super) async fn mend(segment: &Segment<'_>, keys: Vec<ItemKey>) -> Mended {
    mend_read(segment, keys.into_iter().map(|key| (key, None)).collect()).await
}

/// A key, and its item in the source where that was read before.
pub(super) type Read = (ItemKey, Option<Arc<Item>>);

/// As [`mend`], of keys whose items may have been read before.
pub(super) async fn mend_read(segment: &Segment<'_>, keys: Vec<Read>) -> Mended {
    let (Some(repairs), Some(kept)) = (&segment.job.repairs, &segment.kept) else {
        return Mended::default();
    };
    let mender = Mender {
        segment,
        repairs,
        hold: &kept.hold,
    };
    // All that began come to their ends, whatever becomes of one: what was written is verified.
    let failed = AtomicBool::new(false);
    let mut work = Vec::new();
    for chunk in keys.chunks(BATCH_OPS_MAX) {
        work.push(mender.mend(chunk, &failed));
    }
    let chunks: Vec<Mended> = futures::stream::iter(work)
        .buffer_unordered(REPAIRS_AT_ONCE)
        .collect()
        .await;
    let mut all = Mended::default();
    for chunk in chunks {
        all.fates.extend(chunk.fates);
        all.ended = all.ended.or(chunk.ended);
    }
    all
}

struct Mender<'a> {
    segment: &'a Segment<'a>,
    repairs: &'a Repairs,
    hold: &'a Arc<Hold<SegmentRow>>,
}

impl Mender<'_> {
    async fn mend(&self, read: &[Read], failed: &AtomicBool) -> Mended {
        if failed.load(Ordering::Relaxed) {
            return Mended::default();
        }
        let keys = || read.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
        let mended = match &self.segment.job.strategy {
            Strategy::Mirror => self.mirror(read).await,
            Strategy::Fill => self.put(&keys(), None).await,
            Strategy::Newest(attribute) => self.put(&keys(), Some(attribute)).await,
        };
        failed.fetch_or(mended.ended.is_some(), Ordering::Relaxed);
        mended
    }

    /// Makes items as the source has them.
    async fn mirror(&self, read: &[Read]) -> Mended {
        let keys: Vec<ItemKey> = read.iter().map(|(key, _)| key.clone()).collect();
        match self.mirror_once(read).await {
            // One hot key must not keep its neighbours.
            (Err(Unfinished::Unsettled), _) if keys.len() > 1 => {
                let mut all = Mended::default();
                for key in keys {
                    let (repaired, _) = self.mirror_once(&[(key.clone(), None)]).await;
                    // Whatever was written above is verified by this one, or is not.
                    let mended = self.note(&[key], repaired, true).await;
                    all.fates.extend(mended.fates);
                    all.ended = all.ended.or(mended.ended);
                }
                all
            }
            (repaired, wrote) => self.note(&keys, repaired, wrote).await,
        }
    }

    /// Repairs a few keys, and says whether anything was written, or may have been.
    async fn mirror_once(&self, keys: &[Read]) -> (Result<repair::Repaired, Unfinished>, bool) {
        let job = self.segment.job;
        let (on_source, on_target) = units_of(keys);
        tokio::join!(job.source.pace(on_source), job.target.pace(on_target));
        let wrote = AtomicBool::new(false);
        let repairer = Repairer {
            source: (&job.source.region().tables, job.source.table()),
            replica: (&job.target.region().tables, job.target.table()),
            writer: &self.repairs.writer,
            bound: Arc::clone(self.hold) as _,
            stop: &job.stop,
            keep_expired: job.keep_expired.clone(),
            flows: job.eager,
            wrote: Some(&wrote),
        };
        let keys = keys.iter();
        let keys: Vec<(Item, Option<Arc<Item>>)> = keys
            .map(|(key, item)| (key.to_keys(), item.clone()))
            .collect();
        let repaired = repairer.repair_read(keys).await;
        (repaired, wrote.into_inner())
    }

    async fn note(
        &self,
        keys: &[ItemKey],
        repaired: Result<repair::Repaired, Unfinished>,
        wrote: bool,
    ) -> Mended {
        let all = |fate: Fate| keys.iter().map(|key| (key.clone(), fate)).collect();
        let ended = match repaired {
            Ok(repaired) => {
                let mut refused: HashSet<ItemKey> = HashSet::new();
                if let Some(hears) = &self.repairs.heard_by {
                    hears.applied(repaired.written);
                }
                for one in &repaired.refused {
                    self.refuses(&one.fault);
                    if let Some(hears) = &self.repairs.heard_by {
                        let heard = hears.refused(one, &self.segment.job.stop).await;
                        if let Err(unfinished) = heard {
                            // The others are right; all of them are met again.
                            return Mended {
                                fates: Vec::new(),
                                ended: Some(match unfinished {
                                    Unfinished::Failed(fault) | Unfinished::Unanswered(fault) => {
                                        self.failed(fault)
                                    }
                                    Unfinished::Unsettled | Unfinished::Stopped => self.stopped(),
                                }),
                            };
                        }
                    }
                    refused.insert(one.change.key.clone());
                }
                let fate = |key: &ItemKey| match refused.contains(key) {
                    true => Fate::Refused,
                    false => Fate::Repaired,
                };
                return Mended {
                    fates: keys.iter().map(|key| (key.clone(), fate(key))).collect(),
                    ended: None,
                };
            }
            Err(Unfinished::Unsettled) => None,
            Err(Unfinished::Unanswered(fault)) => {
                self.is_unanswered(&fault, keys.len());
                None
            }
            Err(Unfinished::Failed(fault)) => Some(self.failed(fault)),
            Err(Unfinished::Stopped) => Some(self.stopped()),
        };
        Mended {
            fates: match (wrote, &ended) {
                (true, _) => all(Fate::Unverified),
                (false, None) => all(Fate::Untouched),
                (false, Some(_)) => Vec::new(),
            },
            ended,
        }
    }

    fn refuses(&self, fault: &Fault) {
        tracing::warn!(
            table = self.segment.job.table,
            class = fault.class.label(),
            code = fault.code,
            "the target refuses an item of the source"
        );
    }

    fn is_unanswered(&self, fault: &Fault, keys: usize) {
        tracing::warn!(
            table = self.segment.job.table,
            keys,
            code = fault.code,
            "a write was not answered: its keys are repaired again once it is dead"
        );
    }

    fn failed(&self, fault: Fault) -> Ended {
        let job = self.segment.job;
        Ended::Failed {
            subject: match fault.operation {
                Operation::ReadSource => job.source.name(),
                _ => job.target.name(),
            },
            fault,
        }
    }

    fn stopped(&self) -> Ended {
        match self.segment.job.stop.is_cancelled() {
            true => Ended::Stopped,
            false => Ended::Lost,
        }
    }

    /// Puts items where there is none, or (`newer`) where this attribute is less.
    async fn put(&self, keys: &[ItemKey], newer: Option<&str>) -> Mended {
        let mut mended = Mended::default();
        let mut open: Vec<ItemKey> = keys.to_vec();
        // What was put last, until it is verified.
        let mut put: HashMap<ItemKey, Item> = HashMap::new();
        for _ in 0..PUTS_MAX {
            let found = match self.segment.get(Side::Source, &open).await {
                Ok(items) => items,
                Err(ended) => {
                    mended.ended = Some(ended);
                    break;
                }
            };
            let job = self.segment.job;
            let items = found.into_iter().map(|item| (job.key_of(&item), item));
            let mut items: HashMap<ItemKey, Item> = items.collect();
            for key in std::mem::take(&mut open) {
                let (item, before) = (items.remove(&key), put.remove(&key));
                let was_put = before.is_some();
                let next = match (item, before) {
                    // A delete has no age: what is there stays.
                    (None, None) if newer.is_some() => Next::Ends(Fate::Left),
                    (None, None) => self.gone(&key).await,
                    (None, Some(before)) if newer.is_none() => self.take_back(&before).await,
                    // A delete has no age: what is there stays.
                    (None, Some(_)) => Next::Ends(Fate::Left),
                    (Some(item), Some(before)) if same_item(&item, &before) => {
                        Next::Ends(Fate::Repaired)
                    }
                    // It was changed since: the target holds it as it was.
                    (Some(_), Some(_)) if newer.is_none() => Next::Ends(Fate::Untouched),
                    (Some(item), Some(before)) => {
                        let is_newer =
                            newer.is_some_and(|name| is_newer(item.get(name), before.get(name)));
                        match is_newer {
                            true => self.put_once(item, newer).await,
                            false => Next::Ends(Fate::Left),
                        }
                    }
                    (Some(item), None) => self.put_once(item, newer).await,
                };
                match next {
                    Next::Ends(fate) => mended.fates.push((key, fate)),
                    Next::Verify(item) => {
                        put.insert(key.clone(), item);
                        open.push(key);
                    }
                    Next::Again => open.push(key),
                    Next::Stops(ended) => {
                        if was_put {
                            mended.fates.push((key, Fate::Unverified));
                        }
                        mended.ended = mended.ended.take().or(Some(ended));
                    }
                }
            }
            if open.is_empty() || mended.ended.is_some() {
                break;
            }
        }
        // Put or taken back, and not verified.
        let never = mended.ended.is_none();
        for key in open {
            match self.segment.was_put(&key) {
                Some(_) => mended.fates.push((key, Fate::Unverified)),
                // The source has it by turns, and the target as little as before.
                None if never => mended.fates.push((key, Fate::Untouched)),
                None => {}
            }
        }
        mended
    }

    /// The source has nothing under `key`. What an earlier attempt of this job put there late is taken
    /// back.
    async fn gone(&self, key: &ItemKey) -> Next {
        let put = self.segment.was_put(key);
        let there = match self
            .segment
            .get(Side::Target, std::slice::from_ref(key))
            .await
        {
            Ok(items) => items.into_iter().next(),
            Err(ended) => return Next::Stops(ended),
        };
        match there {
            None => Next::Ends(Fate::Repaired),
            Some(item) if put.is_some() && Digest::of_item(&item) == put => {
                self.take_back(&item).await
            }
            Some(_) => Next::Ends(Fate::Left),
        }
    }

    async fn put_once(&self, item: Item, newer: Option<&str>) -> Next {
        let bound: Arc<dyn Bound> = Arc::clone(self.hold) as _;
        let stop = &self.segment.job.stop;
        // Before it leaves: whatever becomes of it, it may be there.
        let key = self.segment.job.key_of(&item);
        self.segment.may_be_put(&key, &item);
        match self
            .repairs
            .conditional
            .put(&bound, stop, &item, newer)
            .await
        {
            Put::Done => Next::Verify(item),
            Put::Held => self.found_there(&item).await,
            other => self.not_put(other),
        }
    }

    /// Somebody else has put something there, or an earlier attempt of this job took effect late.
    async fn found_there(&self, item: &Item) -> Next {
        let key = self.segment.job.key_of(item);
        match self.segment.get(Side::Target, &[key]).await {
            Ok(items) if items.iter().any(|there| same_item(there, item)) => {
                Next::Ends(Fate::Repaired)
            }
            Ok(_) => Next::Ends(Fate::Left),
            Err(ended) => Next::Stops(ended),
        }
    }

    /// The source lost what was put a moment ago.
    async fn take_back(&self, item: &Item) -> Next {
        let bound: Arc<dyn Bound> = Arc::clone(self.hold) as _;
        let stop = &self.segment.job.stop;
        match self.repairs.conditional.take_back(&bound, stop, item).await {
            // The source may have it again by now.
            Put::Done => {
                self.segment.is_taken_back(&self.segment.job.key_of(item));
                Next::Again
            }
            // Gone again, or somebody has put something else there since.
            Put::Held => Next::Ends(Fate::Left),
            // An item with more attributes than a condition may name.
            Put::Refused(_) => Next::Ends(Fate::Unverified),
            other => self.not_put(other),
        }
    }

    fn not_put(&self, put: Put) -> Next {
        match put {
            Put::Refused(fault) => {
                self.refuses(&fault);
                Next::Ends(Fate::Refused)
            }
            Put::Unanswered(fault) => {
                self.is_unanswered(&fault, 1);
                Next::Ends(Fate::Unverified)
            }
            Put::Failed(fault) => Next::Stops(self.failed(fault)),
            Put::Done | Put::Held | Put::Stopped => Next::Stops(self.stopped()),
        }
    }
}

/// Read units that a repair of `keys` takes on either side, about: each is read on both sides, and in the
/// source once more; one whose item is in hand, once in the source.
fn units_of(keys: &[Read]) -> (u32, u32) {
    let mut units = (0, 0);
    for (_, item) in keys {
        match item {
            Some(item) => units.0 += (item_bytes(item) / UNIT_BYTES + 1) as u32,
            None => {
                units.0 += 2;
                units.1 += 1;
            }
        }
    }
    units
}

/// What is next for a key that is put.
enum Next {
    Ends(Fate),
    /// It was put: is it still what the source holds?
    Verify(Item),
    /// The source is read once more.
    Again,
    Stops(Ended),
}
