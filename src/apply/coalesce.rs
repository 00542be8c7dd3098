//! What of a shard is under way: order per key, coalescing, and the low watermark. Pure.
//!
//! A [`Window`] holds the changes of one shard between "read" and "durable", in stream order,
//! each in a *slot*. Of one key at most one write is outstanding. A change is done when
//!
//! * it was applied, or
//! * a later change of its key was applied (it was coalesced), or
//! * it is in the dead-letter queue.
//!
//! The watermark is the last slot before which everything is done: the checkpoint follows it.
//!
//! ```text
//!            push          take            applied
//!   record ───────▶ waiting ─────▶ in flight ──────▶ done
//!                     ▲              │    │
//!                     └── returned ──┘    └─ refused ─▶ poison ── dead_lettered ─▶ done
//! ```
//!
//! A newer change may replace one that waits or came back unprocessed, never one in flight. If
//! the newest turns out to be poison, the last acceptable one before it is written after all.

use std::collections::hash_map::{Entry as MapEntry, OccupiedEntry};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::dynamo::item::ItemKey;
use crate::mutation::{self, Mutation};
use crate::stream::change::Change;
use crate::stream::sequence::SequenceNumber;

/// What a slot costs by itself, so that records without a change are bounded, too.
const SLOT_BYTES: usize = 128;

/// Names a change within its window; grows in stream order.
pub type SlotId = u64;

/// One change handed out to be written.
#[derive(Debug, Clone)]
pub struct Op {
    /// Its slot, to answer with.
    pub slot: SlotId,
    /// What to write.
    pub change: Arc<Change>,
}

/// How far everything is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Durable {
    /// The last sequence number with nothing undone before it.
    pub sequence: SequenceNumber,
    /// When the source made it, in milliseconds since the epoch.
    pub created_ms: i64,
}

/// The changes of one shard between "read" and "durable".
#[derive(Debug)]
pub struct Window {
    coalesce: bool,
    slots: VecDeque<Slot>,
    /// Slot id of `slots[0]`.
    first: SlotId,
    keys: HashMap<ItemKey, KeyQueue>,
    /// Keys with something to send and nothing in flight, longest waiting first.
    ready: VecDeque<ItemKey>,
    durable: Option<Durable>,
    /// The latest moment at which a change was made that nothing undone stands before, in milliseconds.
    newest_durable_ms: Option<i64>,
    /// Slots that no later one was made before, the oldest first: their times grow. Mostly one for each
    /// second.
    oldest: VecDeque<(SlotId, i64)>,
    bytes: usize,
    /// Room for the slots that one answer finishes.
    finished: Vec<SlotId>,
}

#[derive(Debug)]
struct Slot {
    sequence: SequenceNumber,
    created_ms: i64,
    bytes: usize,
    done: bool,
}

#[derive(Debug)]
struct KeyQueue {
    /// In stream order. Mostly one, so room for more is made when more come.
    entries: Vec<Entry>,
    in_flight: Option<SlotId>,
    /// Whether the key stands in `ready`.
    listed: bool,
}

#[derive(Debug)]
struct Entry {
    slot: SlotId,
    change: Arc<Change>,
    /// Refused for good; done once it is dead-lettered.
    poison: bool,
}

impl KeyQueue {
    fn new() -> Self {
        Self {
            entries: Vec::with_capacity(1),
            in_flight: None,
            listed: false,
        }
    }

    fn candidate(&self, coalesce: bool) -> Option<&Entry> {
        let mut waiting = self.entries.iter().filter(|entry| !entry.poison);
        if coalesce {
            waiting.next_back()
        } else {
            waiting.next()
        }
    }

    /// Puts the key into the list of those with something to send, where it has.
    fn list(&mut self, key: &ItemKey, coalesce: bool, ready: &mut VecDeque<ItemKey>) {
        if !self.listed && self.in_flight.is_none() && self.candidate(coalesce).is_some() {
            self.listed = true;
            ready.push_back(key.clone());
        }
    }

    fn index_of(&self, slot: SlotId) -> Option<usize> {
        self.entries
            .binary_search_by_key(&slot, |entry| entry.slot)
            .ok()
    }
}

impl Window {
    /// An empty window.
    pub fn new(coalesce: bool) -> Self {
        Self {
            coalesce,
            slots: VecDeque::new(),
            first: 0,
            keys: HashMap::new(),
            ready: VecDeque::new(),
            durable: None,
            newest_durable_ms: None,
            oldest: VecDeque::new(),
            bytes: 0,
            finished: Vec::new(),
        }
    }

    /// Bytes of the changes held, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether everything pushed is done.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether something could be sent now.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// How many keys have something that could be sent now, about: one may be listed for what was sent since.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// When the source made the oldest change not done, in milliseconds since the epoch.
    pub fn oldest_open_ms(&self) -> Option<i64> {
        self.oldest.front().map(|(_, created_ms)| *created_ms)
    }

    /// Before which moment of the source every change that was pushed is durable, in milliseconds; `None`
    /// before the first one is. Times are whole seconds, so a change proves what was made before its own,
    /// and one that is open takes that back as far as its own.
    pub fn proven_ms(&self) -> Option<i64> {
        let durable = self.newest_durable_ms?;
        Some(
            self.oldest_open_ms()
                .map_or(durable, |open| open.min(durable)),
        )
    }

    /// How far everything is durable; `None` before the first change is.
    pub fn durable(&self) -> Option<&Durable> {
        self.durable.as_ref()
    }

    /// Takes in the next change of the stream.
    pub fn push(&mut self, change: Change) -> SlotId {
        let slot = self.open_slot(change.sequence.clone(), change.created_ms, change.bytes);
        let key = change.key.clone();
        let queue = self.keys.entry(key.clone()).or_insert_with(KeyQueue::new);
        queue.entries.push(Entry {
            slot,
            change: Arc::new(change),
            poison: false,
        });
        queue.list(&key, self.coalesce, &mut self.ready);
        slot
    }

    /// Takes in a record that needs no write: it is done at once, in its order.
    pub fn push_done(&mut self, sequence: SequenceNumber, created_ms: i64) {
        let slot = self.open_slot(sequence, created_ms, 0);
        self.done(slot);
    }

    /// Takes in a record that no write can be made of. It is done once [dead-lettered]
    /// (Self::dead_lettered).
    pub fn push_poison(&mut self, sequence: SequenceNumber, created_ms: i64) -> SlotId {
        self.open_slot(sequence, created_ms, 0)
    }

    /// Hands out up to `ops_max` changes of distinct keys, none of which has a write outstanding.
    /// Each must be answered by [`applied`](Self::applied), [`returned`](Self::returned) or
    /// [`refused`](Self::refused).
    ///
    /// Stops at `bytes_max` bytes, but hands out one change at least: a batch too large for the
    /// line would time out, and be sent the same for ever.
    pub fn take(&mut self, ops_max: usize, bytes_max: usize) -> Vec<Op> {
        let mut ops = Vec::with_capacity(ops_max.min(self.ready.len()));
        let mut bytes = 0;
        while ops.len() < ops_max && bytes < bytes_max {
            let Some(key) = self.ready.pop_front() else {
                break;
            };
            let Some(queue) = self.keys.get_mut(&key) else {
                continue;
            };
            queue.listed = false;
            if queue.in_flight.is_some() {
                continue;
            }
            let Some(entry) = queue.candidate(self.coalesce) else {
                continue;
            };
            let op = Op {
                slot: entry.slot,
                change: Arc::clone(&entry.change),
            };
            queue.in_flight = Some(op.slot);
            bytes += op.change.bytes;
            ops.push(op);
        }
        ops
    }

    /// The write of `op` is durable. `finished` hears of the changes that this finished: `op` itself last,
    /// and before it those of its key that it coalesced.
    pub fn applied(&mut self, op: &Op, mut finished: impl FnMut(&Change)) {
        let MapEntry::Occupied(mut entry) = self.keys.entry(op.change.key.clone()) else {
            return;
        };
        let queue = entry.get_mut();
        queue.in_flight = None;
        let mut slots = std::mem::take(&mut self.finished);
        queue.entries.retain(|entry| {
            // A poison change before it stays until it is dead-lettered.
            let is_finished = entry.slot <= op.slot && !entry.poison;
            if is_finished {
                slots.push(entry.slot);
                finished(&entry.change);
            }
            !is_finished
        });
        settle(entry, self.coalesce, &mut self.ready);
        for slot in slots.drain(..) {
            self.done(slot);
        }
        self.finished = slots;
    }

    /// The write of `op` did not happen, or nobody knows: it is sent again, or a newer change of
    /// its key in its place.
    pub fn returned(&mut self, op: &Op) {
        if let MapEntry::Occupied(mut entry) = self.keys.entry(op.change.key.clone()) {
            entry.get_mut().in_flight = None;
            settle(entry, self.coalesce, &mut self.ready);
        }
    }

    /// The replica can never take `op`. It is done once [dead-lettered](Self::dead_lettered);
    /// other changes of its key go on.
    pub fn refused(&mut self, op: &Op) {
        if let MapEntry::Occupied(mut entry) = self.keys.entry(op.change.key.clone()) {
            let queue = entry.get_mut();
            queue.in_flight = None;
            if let Some(index) = queue.index_of(op.slot) {
                queue.entries[index].poison = true;
            }
            settle(entry, self.coalesce, &mut self.ready);
        }
    }

    /// The change in `slot` is durable in the dead-letter queue. `key` is `None` for one that
    /// came by [`push_poison`](Self::push_poison).
    pub fn dead_lettered(&mut self, slot: SlotId, key: Option<&ItemKey>) {
        if let Some(key) = key
            && let MapEntry::Occupied(mut entry) = self.keys.entry(key.clone())
            && let Some(index) = entry.get().index_of(slot)
        {
            entry.get_mut().entries.remove(index);
            settle(entry, self.coalesce, &mut self.ready);
        }
        self.done(slot);
    }

    fn open_slot(&mut self, sequence: SequenceNumber, created_ms: i64, bytes: usize) -> SlotId {
        let slot = self.first + self.slots.len() as u64;
        self.bytes += SLOT_BYTES + bytes;
        while self
            .oldest
            .back()
            .is_some_and(|(_, later)| *later >= created_ms)
        {
            self.oldest.pop_back();
        }
        self.oldest.push_back((slot, created_ms));
        self.slots.push_back(Slot {
            sequence,
            created_ms,
            bytes,
            done: false,
        });
        slot
    }

    /// Marks a slot done and moves the watermark as far as everything before it is.
    fn done(&mut self, slot: SlotId) {
        let index = slot.checked_sub(self.first).map(|index| index as usize);
        if let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) {
            debug_assert!(!slot.done, "a slot is done once");
            slot.done = true;
            // What is done holds no change any more, whatever waits before it.
            self.bytes = self.bytes.saturating_sub(slot.bytes);
        }
        while self.slots.front().is_some_and(|slot| slot.done) {
            let Some(slot) = self.slots.pop_front() else {
                break;
            };
            if self.oldest.front().is_some_and(|(id, _)| *id == self.first) {
                self.oldest.pop_front();
            }
            self.first += 1;
            self.newest_durable_ms = self.newest_durable_ms.max(Some(slot.created_ms));
            self.bytes = self.bytes.saturating_sub(SLOT_BYTES);
            self.durable = Some(Durable {
                sequence: slot.sequence,
                created_ms: slot.created_ms,
            });
        }
        if mutation::is_off(Mutation::Checkpoint)
            && let Some(slot) = self.slots.front()
        {
            self.durable = Some(Durable {
                sequence: slot.sequence.clone(),
                created_ms: slot.created_ms,
            });
        }
    }
}

/// Puts a key with something to send into the ready list, and forgets one with nothing left.
fn settle(
    mut entry: OccupiedEntry<'_, ItemKey, KeyQueue>,
    coalesce: bool,
    ready: &mut VecDeque<ItemKey>,
) {
    let queue = entry.get();
    if queue.entries.is_empty() && queue.in_flight.is_none() {
        entry.remove();
        return;
    }
    let key = entry.key().clone();
    entry.get_mut().list(&key, coalesce, ready);
}

#[cfg(test)]
#[path = "coalesce_tests.rs"]
mod tests;
