//! Finds what differs between two tables while both are scanned once, in bounded memory. Pure.
//!
//! Each item is met twice, once on each side; the first to come waits for its partner, as two
//! digests and its key. Where both sides are scanned in the same order, as two DynamoDB tables are
//! with the same number of segments, only a few pages ever wait. Where they are not, those that have
//! waited longest are looked up on the other side once the bound is reached.
//!
//! What comes out are *suspects*: tables that are written to differ all the time, by what is in
//! flight. [`crate::jobs::reconcile`] reads each again before it calls it a difference.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::dynamo::digest::Digest;

/// One of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one that is right.
    Source,
    /// The one that is compared with it.
    Target,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Side::Source => Side::Target,
            Side::Target => Side::Source,
        }
    }
}

/// What an item waits under, and what it is looked up by.
pub trait Key: Clone {
    /// What stands for it.
    fn digest(&self) -> Digest;
    /// Bytes it holds in memory, about.
    fn bytes(&self) -> usize;
}

/// What came of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Met<K> {
    /// It waits for its partner.
    Waits,
    /// It equals its partner, or was judged before.
    Settled,
    /// It differs from its partner, or has none.
    Suspect(K),
}

/// An item that has waited longest: to be looked up on the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look<K> {
    /// The side it was seen on.
    pub seen_on: Side,
    /// Its key.
    pub key: K,
    digest: Option<Digest>,
}

struct Waiting<K> {
    side: Side,
    key: K,
    /// `None` is equal to nothing.
    digest: Option<Digest>,
    /// Tells its place in the order from an earlier one of the same key.
    turn: u64,
}

/// Memory of an entry beyond its key: two digests, the maps' slots with their slack, its turn.
const ENTRY_BYTES: usize = 160;
/// Memory of a key that was looked up.
const SETTLED_BYTES: usize = 40;

/// The join.
pub struct Join<K> {
    waiting: HashMap<Digest, Waiting<K>>,
    /// Who came first; those that are gone are passed over.
    order: VecDeque<(Digest, u64)>,
    /// Looked up and judged: their partners, once they come, are not waited for.
    settled: HashSet<Digest>,
    turn: u64,
    bytes: usize,
    bytes_max: usize,
}

impl<K: Key> Join<K> {
    /// A join that holds `bytes_max` bytes, about.
    pub fn new(bytes_max: usize) -> Self {
        Self {
            waiting: HashMap::new(),
            order: VecDeque::new(),
            settled: HashSet::new(),
            turn: 0,
            bytes: 0,
            bytes_max,
        }
    }

    /// Bytes held, about.
    pub fn bytes(&self) -> usize {
        self.bytes + self.settled.len() * SETTLED_BYTES
    }

    /// Items that wait for their partners.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// An item was read on `side`. `digest` is `None` where nobody can say what it equals. Ask
    /// [`overflow`](Self::overflow) afterwards.
    pub fn meet(&mut self, side: Side, key: K, digest: Option<Digest>) -> Met<K> {
        let id = key.digest();
        // Its partner was looked up, and this one seen then.
        if self.settled.remove(&id) {
            return Met::Settled;
        }
        match self.waiting.get_mut(&id) {
            // A page that is read again after an interruption.
            Some(waiting) if waiting.side == side => {
                waiting.digest = digest;
                Met::Waits
            }
            Some(_) => {
                let partner = self.take(id);
                judge(key, digest, partner.and_then(|partner| partner.digest))
            }
            None => {
                self.turn += 1;
                self.bytes += ENTRY_BYTES + key.bytes();
                self.order.push_back((id, self.turn));
                let waiting = Waiting {
                    side,
                    key,
                    digest,
                    turn: self.turn,
                };
                self.waiting.insert(id, waiting);
                Met::Waits
            }
        }
    }

    /// The one that has waited longest, once more is held than may be. It no longer waits: tell
    /// [`looked_up`](Self::looked_up).
    pub fn overflow(&mut self) -> Option<Look<K>> {
        if self.bytes() <= self.bytes_max {
            return None;
        }
        // Without them a partner waits in vain and is looked up as well: more reads, the same answer.
        if self.settled.len() * SETTLED_BYTES > self.bytes_max / 2 {
            self.settled = HashSet::new();
            if self.bytes() <= self.bytes_max {
                return None;
            }
        }
        self.oldest()
    }

    /// What the other side holds under the key of `look`: nothing, or an item with its digest.
    pub fn looked_up(&mut self, look: Look<K>, found: Option<Option<Digest>>) -> Met<K> {
        match found {
            // Its partner does not come any more, unless it is made only now.
            None => Met::Suspect(look.key),
            Some(found) => {
                self.settled.insert(look.key.digest());
                judge(look.key, look.digest, found)
            }
        }
    }

    /// Both sides were read to their ends: those that still wait have no partner, or one that was
    /// looked up so long ago that it is forgotten.
    pub fn finish(&mut self) -> impl Iterator<Item = K> {
        self.order.clear();
        self.settled.clear();
        self.bytes = 0;
        self.waiting.drain().map(|(_, waiting)| waiting.key)
    }

    fn oldest(&mut self) -> Option<Look<K>> {
        while let Some((id, turn)) = self.order.pop_front() {
            let is_there = self.waiting.get(&id).is_some_and(|w| w.turn == turn);
            if !is_there {
                continue;
            }
            if let Some(waiting) = self.take(id) {
                return Some(Look {
                    seen_on: waiting.side,
                    key: waiting.key,
                    digest: waiting.digest,
                });
            }
        }
        None
    }

    fn take(&mut self, id: Digest) -> Option<Waiting<K>> {
        let waiting = self.waiting.remove(&id)?;
        self.bytes -= ENTRY_BYTES + waiting.key.bytes();
        // Places of those that are gone are kept until they are passed over, or are too many.
        if self.order.len() > 64 + 2 * self.waiting.len() {
            let alive =
                |(id, turn): &(Digest, u64)| self.waiting.get(id).is_some_and(|w| w.turn == *turn);
            self.order.retain(alive);
        }
        Some(waiting)
    }
}

fn judge<K>(key: K, one: Option<Digest>, other: Option<Digest>) -> Met<K> {
    match (one, other) {
        (Some(one), Some(other)) if one == other => Met::Settled,
        _ => Met::Suspect(key),
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
