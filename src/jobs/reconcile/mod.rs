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
//! Each side is scanned once, in parts that both tables are asked for alike; where both come in the
//! same order, as two DynamoDB tables do, the join holds a few pages. What is found while the job
//! dies is found again by the next one: the tables themselves are the intent of its repairs.

pub mod join;
pub mod judge;
pub mod place;
pub mod report;
mod settle;
mod spill;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::stream::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::apply::batch::Writer;
use crate::config::MaxDeletes;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::BATCH_KEYS_MAX;
use crate::dynamo::value::Item;
use crate::error::Fault;
use crate::lease::hold::Hold;
use crate::lease::row::JobRow;
use crate::lease::table::StateTable;
use crate::repair::KeepExpired;
use join::{Join, Look, Met, Side};
use place::Place;
use report::{Counts, Lines};
use settle::Settler;

/// Parts of a table read at once.
const SEGMENTS_AT_ONCE: usize = 4;
/// Suspects that wait to be looked at.
const SUSPECTS_MAX: usize = 10_000;
/// Pages by which one side of a part may be ahead of the other.
const AHEAD_MAX: u64 = 2;

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
    /// A file could not be written.
    File(std::io::Error),
}

/// What repairs need.
pub struct Repairs {
    /// Writes to the target.
    pub writer: Writer,
    /// The right to do so.
    pub hold: Arc<Hold<JobRow>>,
    /// How many items may be deleted.
    pub max_deletes: MaxDeletes,
    /// How long a write without an answer may still take effect.
    pub late_effect: Duration,
}

/// How the flow from source to target is asked after.
pub struct FlowSource {
    /// The state table in the target's region.
    pub state: StateTable,
    /// Number of the epoch.
    pub epoch: u64,
    /// A worker whose rows stand still for so long is dead.
    pub patience: Duration,
}

/// One table to compare.
pub struct Reconcile {
    /// Its name in the configuration.
    pub table: String,
    /// The side that is right.
    pub source: Place,
    /// The side that is compared with it, and repaired.
    pub target: Place,
    /// Attributes of the primary key.
    pub key_names: Vec<String>,
    /// Items that stay in the target although the source lacks them.
    pub keep_expired: Option<KeepExpired>,
    /// Parts that each table is read in.
    pub segments: u32,
    /// Bytes that the join may hold.
    pub memory: usize,
    /// How long a suspect is looked at, at least, where somebody applies changes.
    pub settle: Duration,
    /// Who applies changes, if anybody does.
    pub flow: Option<FlowSource>,
    /// Without them nothing is changed.
    pub repairs: Option<Repairs>,
    /// Where differences are written one by one.
    pub lines: Option<Arc<Lines>>,
    /// Ends it.
    pub stop: CancellationToken,
    /// What was found so far.
    pub found: Arc<Found>,
}

/// What was found so far, for whoever watches.
#[derive(Default)]
pub struct Found {
    counts: Mutex<Counts>,
    suspects: AtomicU64,
}

impl Found {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reconcile {
    /// What was found and done so far.
    pub fn counts(&self) -> Counts {
        Counts {
            source_items: self.source.items(),
            target_items: self.target.items(),
            source_units: self.source.units(),
            target_units: self.target.units(),
            suspects: self.found.suspects.load(Ordering::Relaxed),
            ..self.found.counts().clone()
        }
    }

    /// Compares, and repairs where it may. What was found until then stands in
    /// [`counts`](Self::counts), however it ends.
    ///
    /// # Errors
    /// Why it ended before its end.
    pub async fn run(&self) -> Result<(), Ended> {
        let (suspects, found) = mpsc::channel(SUSPECTS_MAX);
        let in_vain = CancellationToken::new();
        let scan = async {
            let parts = futures::stream::iter(0..self.segments.max(1)).map(Ok);
            let scan_all = parts.try_for_each_concurrent(SEGMENTS_AT_ONCE, |part| {
                self.scan_part(part, suspects.clone())
            });
            let scanned = tokio::select! {
                scanned = scan_all => scanned,
                () = in_vain.cancelled() => Err(Ended::Stopped),
            };
            // The settler ends when nobody can send any more.
            drop(suspects);
            scanned
        };
        let settle = async {
            let settled = Settler::new(self)?.run(found).await;
            if settled.is_err() {
                in_vain.cancel();
            }
            settled
        };
        let (scanned, settled) = tokio::join!(scan, settle);
        // What ended the settler is why the scan could not go on.
        let rest = settled?;
        scanned?;
        rest.finish().await
    }

    /// Reads one part of both tables, side by side.
    async fn scan_part(&self, part: u32, suspects: mpsc::Sender<ItemKey>) -> Result<(), Ended> {
        let segments = self.segments.max(1);
        let at_once = SEGMENTS_AT_ONCE.min(segments as usize);
        let segment = (part as i32, segments as i32);
        let mut join = Join::new(self.memory / at_once);
        let mut sides = [Scan::default(), Scan::default()];
        while sides.iter().any(|side| !side.ended) {
            let [first, second] = &sides;
            let (source, target) = (first.is_next(second), second.is_next(first));
            let read = async |wanted: bool, place: &Place, scan: &Scan| match wanted {
                true => place.scan(segment, scan.after.clone()).await.map(Some),
                false => Ok(None),
            };
            let (source, target) = tokio::try_join!(
                read(source, &self.source, first),
                read(target, &self.target, second)
            )?;
            for (side, page) in [(Side::Source, source), (Side::Target, target)] {
                let Some(page) = page else { continue };
                let scan = &mut sides[usize::from(side == Side::Target)];
                scan.pages += 1;
                scan.ended = page.next.is_none();
                scan.after = page.next;
                for item in page.items {
                    let key = self.key_of(&item);
                    let digest = Digest::of_item(&item);
                    if let Met::Suspect(key) = join.meet(side, key, digest) {
                        self.suspect(key, &suspects).await?;
                    }
                }
            }
            self.look_up(&mut join, &suspects).await?;
        }
        for key in join.finish() {
            self.suspect(key, &suspects).await?;
        }
        Ok(())
    }

    fn key_of(&self, item: &Item) -> ItemKey {
        let parts = self.key_names.iter();
        let keys = parts.filter_map(|name| Some((name.clone(), item.get(name)?.clone())));
        ItemKey::new(&keys.collect())
    }

    async fn suspect(&self, key: ItemKey, suspects: &mpsc::Sender<ItemKey>) -> Result<(), Ended> {
        self.found.suspects.fetch_add(1, Ordering::Relaxed);
        // Refused only when the settler has ended, and then its reason is told.
        suspects.send(key).await.map_err(|_| Ended::Stopped)
    }

    /// Looks up on the other side what has waited longest, where more waits than may.
    async fn look_up(
        &self,
        join: &mut Join<ItemKey>,
        suspects: &mpsc::Sender<ItemKey>,
    ) -> Result<(), Ended> {
        let mut looks: [Vec<Look<ItemKey>>; 2] = [Vec::new(), Vec::new()];
        while let Some(look) = join.overflow() {
            looks[usize::from(look.seen_on == Side::Target)].push(look);
        }
        let [on_source, on_target] = looks;
        for (looks, other) in [(on_source, &self.target), (on_target, &self.source)] {
            let mut looks = looks.into_iter().peekable();
            while looks.peek().is_some() {
                let batch: Vec<_> = looks.by_ref().take(BATCH_KEYS_MAX).collect();
                let keys: Vec<ItemKey> = batch.iter().map(|look| look.key.clone()).collect();
                let mut found: HashMap<ItemKey, Option<Digest>> = HashMap::new();
                for item in other.get(&keys).await? {
                    found.insert(self.key_of(&item), Digest::of_item(&item));
                }
                for look in batch {
                    let there = found.remove(&look.key);
                    if let Met::Suspect(key) = join.looked_up(look, there) {
                        self.suspect(key, suspects).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl join::Key for ItemKey {
    fn digest(&self) -> Digest {
        Digest::of_key(self)
    }

    fn bytes(&self) -> usize {
        self.as_bytes().len()
    }
}

/// How far one side of a part is read.
#[derive(Default)]
struct Scan {
    after: Option<Item>,
    pages: u64,
    ended: bool,
}

impl Scan {
    /// Whether its next page is read now: not where the other side is far behind.
    fn is_next(&self, other: &Self) -> bool {
        !self.ended && (other.ended || self.pages < other.pages + AHEAD_MAX)
    }
}
