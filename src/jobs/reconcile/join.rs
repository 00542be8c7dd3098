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

use super::ledger::Origin;
use crate::dynamo::digest::Digest;

/// One of the two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
    /// This one, with what its partner brought along.
    #[must_use]
    fn with(self, _partner: Self) -> Self {
        self
    }
}

/// What came of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Met<K> {
    /// It waits for its partner.
    Waits,
    /// It equals its partner, which was read there, or was judged before.
    Settled(Option<Origin>),
    /// It differs from its partner, which was read there, or has none.
    Suspect(K, Option<Origin>),
}

/// An item that has waited longest: to be looked up on the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look<K> {
    /// Where it was read.
    pub origin: Origin,
    /// Its key.
    pub key: K,
    digest: Option<Digest>,
}

struct Waiting<K> {
    origin: Origin,
    key: K,
    /// `None` is equal to nothing.
    digest: Option<Digest>,
    /// Tells its place in the order from an earlier one of the same key.
    turn: u64,
}

/// Memory of an entry beyond its key: two digests, its origin and turn, in a map and a queue that double
/// when they are full, and hold the old half meanwhile.
const ENTRY_BYTES: usize = 300;
/// Memory of a key that was looked up.
const SETTLED_BYTES: usize = 40;

/// The join.
pub struct Join<K> {
    waiting: HashMap<Digest, Waiting<K>>,
    /// Who came first; those that are gone are passed over.
    order: VecDeque<(Digest, u64)>,
    /// Looked up and judged: their partners, once they come, are not waited for.
    settled: HashSet<Digest>,
    /// Sides that were read to their ends.
    ended: [bool; 2],
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
            ended: [false; 2],
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

    /// An item was read at `origin`. `digest` is `None` where nobody can say what it equals. Ask
    /// [`overflow`](Self::overflow) afterwards.
    pub fn meet(&mut self, origin: Origin, key: K, digest: Option<Digest>) -> Met<K> {
        let id = key.digest();
        // Its partner was looked up, and this one seen then.
        if self.settled.remove(&id) {
            return Met::Settled(None);
        }
        match self.waiting.get_mut(&id) {
            // Seen twice on one side: one of them waits.
            Some(waiting) if waiting.origin.side == origin.side => {
                waiting.digest = digest;
                Met::Settled(None)
            }
            Some(_) => {
                let Some(partner) = self.take(id) else {
                    return Met::Suspect(key, None);
                };
                let there = Some(partner.origin);
                judge(key.with(partner.key), there, digest, partner.digest)
            }
            // Nobody comes any more.
            None if self.ended[index(origin.side.other())] => Met::Suspect(key, None),
            None => {
                self.turn += 1;
                self.bytes += ENTRY_BYTES + key.bytes();
                self.order.push_back((id, self.turn));
                let waiting = Waiting {
                    origin,
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
            None => Met::Suspect(look.key, None),
            Some(found) => {
                self.settled.insert(look.key.digest());
                judge(look.key, None, look.digest, found)
            }
        }
    }

    /// The one that has waited longest, if it was read on a page before that of its side in `pages`: tell
    /// [`looked_up`](Self::looked_up).
    pub fn aged(&mut self, pages: [u64; 2]) -> Option<Look<K>> {
        while let Some((id, turn)) = self.order.front() {
            match self.waiting.get(id) {
                Some(waiting) if waiting.turn == *turn => {
                    let origin = waiting.origin;
                    return match origin.page < pages[index(origin.side)] {
                        true => self.oldest(),
                        false => None,
                    };
                }
                _ => self.order.pop_front(),
            };
        }
        None
    }

    /// `side` was read to its end: those of the other one that wait have no partner, or one that was
    /// looked up so long ago that it is forgotten. Whoever comes there later has none, either.
    pub fn end(&mut self, side: Side) -> Vec<(K, Origin)> {
        self.ended[index(side)] = true;
        let alone: Vec<Digest> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.origin.side != side)
            .map(|(id, _)| *id)
            .collect();
        let alone = alone.into_iter().filter_map(|id| self.take(id));
        alone.map(|waiting| (waiting.key, waiting.origin)).collect()
    }

    fn oldest(&mut self) -> Option<Look<K>> {
        while let Some((id, turn)) = self.order.pop_front() {
            let is_there = self.waiting.get(&id).is_some_and(|w| w.turn == turn);
            if !is_there {
                continue;
            }
            if let Some(waiting) = self.take(id) {
                return Some(Look {
                    origin: waiting.origin,
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

/// Where what belongs to `side` stands in a pair.
pub(super) fn index(side: Side) -> usize {
    usize::from(side == Side::Target)
}

fn judge<K>(key: K, partner: Option<Origin>, one: Option<Digest>, other: Option<Digest>) -> Met<K> {
    match (one, other) {
        (Some(one), Some(other)) if one == other => Met::Settled(partner),
        _ => Met::Suspect(key, partner),
    }
}

#[cfg(test)]
#[path = "join_tests.rs"]
mod tests;
