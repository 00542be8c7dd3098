//! How the shards of all tables are shared among the workers of a fleet. Pure: what one worker sees
//! in, what it does out.
//!
//! ```text
//!   free ──take, while my share is not full──▶ held ──give, to one that asks and has less──▶ free
//! ```
//!
//! Every worker decides for itself, from a view that may be a little old. Nobody takes away what
//! another holds: who has less than a share asks, and who has more gives. `S` shards among `W`
//! workers make shares of `floor(S/W)` to `ceil(S/W)`; once all have that, nobody asks, so nothing
//! moves.
//!
//! A worker that lives but takes nothing is found out by the shards it leaves lying. It is not
//! counted until it is seen to take one, so that its share is read by the others, and at once, not
//! after a pause each time.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

/// After how many lease durations a worker that has not taken what it asked for is not heard.
const REFUSED_AFTER_LEASES: u32 = 1;
/// For how many half lease durations a free shard is left to the worker that asked for it. Longer than
/// the above: all must have seen it refused before one of them takes it.
const RESERVED_HALF_LEASES: u32 = 3;
/// After how many lease durations a free shard shows that those with room do not take.
const LYING_LEASES: u32 = 2;
/// For how many lease durations a worker that did not take what it asked for gets nothing; doubled
/// each time. Short at first: it may only have been busy.
const REFUSED_LEASES: u32 = 3;
const REFUSED_DOUBLINGS_MAX: u32 = 8;

/// Who has a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder<'a> {
    /// Nobody: its lease was released or has expired.
    Nobody,
    /// A worker, living or not.
    Worker(&'a str),
    /// This worker drains it for another.
    Promised(&'a str),
}

/// A shard that may be read now, as far as its lineage goes.
#[derive(Debug, Clone, Copy)]
pub struct Open<'a> {
    /// Key of its lease.
    pub key: &'a str,
    /// Who has it.
    pub holder: Holder<'a>,
    /// Whether a task of this worker reads it. A lease may be in this worker's name without one: for
    /// a moment after it ended, or until it expires.
    pub running: bool,
    /// Whether this worker could read it.
    pub readable: bool,
}

/// Another worker that lives and stays.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    /// Its process start.
    pub id: &'a str,
    /// Keys of the leases it asks for.
    pub wants: &'a [String],
}

/// What a worker sees.
#[derive(Debug)]
pub struct View<'a> {
    /// The worker itself, which always counts.
    pub me: &'a str,
    /// Lease duration.
    pub duration: Duration,
    /// When the state table was read.
    pub now: Instant,
    /// The others.
    pub peers: Vec<Peer<'a>>,
    /// The open shards of all tables.
    pub shards: Vec<Open<'a>>,
}

/// What a worker does.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Keys of the leases to take.
    pub take: HashSet<String>,
    /// Keys of the leases to ask for, and those being taken that were asked for, sorted.
    pub ask: Vec<String>,
    /// Keys of the leases to drain and release, each with the worker that asked for it.
    pub give: Vec<(String, String)>,
}

/// A worker that did not take although it could have.
#[derive(Debug)]
struct Idle {
    /// The shards it had then.
    had: usize,
    /// When it was last found.
    found: Instant,
    /// How often it did not take what it asked for.
    refused: u32,
    /// Until then it gets nothing.
    until: Instant,
}

/// What a worker remembers between its decisions.
#[derive(Debug, Default)]
pub struct Sharing {
    /// Since when each free shard was seen to be free.
    free: HashMap<String, Instant>,
    /// Since when this worker has less than its share. One view may be between two states of the
    /// fleet, so it asks only when the next says so as well.
    short_since: Option<Instant>,
    asked: HashSet<String>,
    idle: HashMap<String, Idle>,
    /// When a worker was last found idle: the others get their time to take before more are.
    found_idle: Option<Instant>,
}

/// How many shards each worker has.
struct Loads<'a> {
    /// By the rows.
    has: HashMap<&'a str, usize>,
    /// With what is promised to it, and what is free and waits for it.
    will_have: HashMap<&'a str, usize>,
}

impl Loads<'_> {
    fn has(&self, worker: &str) -> usize {
        self.has.get(worker).copied().unwrap_or(0)
    }

    fn will_have(&self, worker: &str) -> usize {
        self.will_have.get(worker).copied().unwrap_or(0)
    }
}

/// The least and the most that an even share is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    low: usize,
    high: usize,
}

impl Sharing {
    /// Decides from one view of the fleet.
    pub fn decide(&mut self, view: &View<'_>) -> Decision {
        self.note_free(view);
        let wanted = wanted(view);
        let loads = self.loads(view, &wanted);
        self.forgive(view, &loads);
        self.find_refusers(view, &wanted, &loads);
        // What is in this worker's name, with or without a task.
        let mine = loads.has(view.me);
        let mut share = self.share(view, &loads);
        if mine >= share.high && self.find_idle(view, &loads, share) {
            share = self.share(view, &loads);
        }
        let take = self.take(view, &wanted, self.room(view, share, mine));
        let ask = self.ask(view, &loads, share, mine + take.len());
        let give = self.give(view, &loads, share);
        let mut ask: Vec<String> = ask
            .into_iter()
            .chain(take.iter().filter(|key| self.asked.contains(*key)).cloned())
            .collect();
        ask.sort();
        self.asked = ask.iter().cloned().collect();
        Decision { take, ask, give }
    }

    fn note_free(&mut self, view: &View<'_>) {
        let mut free = HashMap::new();
        for shard in free_shards(view) {
            let since = self.free.get(shard.key).copied().unwrap_or(view.now);
            free.insert(shard.key.to_owned(), since);
        }
        self.free = free;
    }

    fn free_for(&self, key: &str, now: Instant) -> Duration {
        self.free.get(key).map_or(Duration::ZERO, |since| {
            now.saturating_duration_since(*since)
        })
    }

    fn loads<'a>(&self, view: &View<'a>, wanted: &HashMap<&str, Vec<&'a str>>) -> Loads<'a> {
        let mut has: HashMap<&str, usize> = HashMap::new();
        let mut waits: HashMap<&str, usize> = HashMap::new();
        for shard in &view.shards {
            match shard.holder {
                Holder::Worker(worker) => *has.entry(worker).or_default() += 1,
                Holder::Promised(worker) => *waits.entry(worker).or_default() += 1,
                // Waits for all that ask for it: too many rather than too few.
                Holder::Nobody => {
                    for worker in wanted.get(shard.key).into_iter().flatten() {
                        *waits.entry(worker).or_default() += 1;
                    }
                }
            }
        }
        let mut will_have = has.clone();
        for (worker, more) in waits {
            *will_have.entry(worker).or_default() += more;
        }
        Loads { has, will_have }
    }

    /// A worker that took something, or is gone, is idle no more.
    fn forgive(&mut self, view: &View<'_>, loads: &Loads<'_>) {
        let peers: HashSet<&str> = view.peers.iter().map(|peer| peer.id).collect();
        self.idle.retain(|id, idle| {
            let has = loads.has(id);
            let took = has > idle.had;
            idle.had = idle.had.min(has);
            peers.contains(id.as_str()) && !took
        });
    }

    /// Whether `worker` is given what it asks for.
    fn is_heard(&self, worker: &str, now: Instant) -> bool {
        self.idle.get(worker).is_none_or(|idle| now >= idle.until)
    }

    /// Whether a free shard is kept for one of `askers` a while longer. One that refused an earlier shard is
    /// not waited for; one that refuses this very shard is, until the others have seen it as well.
    fn is_reserved(&self, key: &str, askers: &[&str], view: &View<'_>) -> bool {
        let Some(since) = self.free.get(key) else {
            return false;
        };
        let lies = view.now.saturating_duration_since(*since);
        lies < view.duration * RESERVED_HALF_LEASES / 2
            && askers.iter().any(|asker| {
                self.is_heard(asker, view.now)
                    || self
                        .idle
                        .get(*asker)
                        .is_some_and(|idle| idle.found > *since)
            })
    }

    /// Finds workers that asked for a shard and then left it lying.
    fn find_refusers(
        &mut self,
        view: &View<'_>,
        wanted: &HashMap<&str, Vec<&str>>,
        loads: &Loads<'_>,
    ) {
        for shard in free_shards(view) {
            if self.free_for(shard.key, view.now) < view.duration * REFUSED_AFTER_LEASES {
                continue;
            }
            for worker in wanted.get(shard.key).into_iter().flatten() {
                if !self.is_heard(worker, view.now) {
                    continue;
                }
                let had = loads.has(worker);
                let idle = self.idle.entry((*worker).to_owned()).or_insert(Idle {
                    had,
                    found: view.now,
                    refused: 0,
                    until: view.now,
                });
                idle.found = view.now;
                let doublings = idle.refused.min(REFUSED_DOUBLINGS_MAX);
                idle.until = view.now + view.duration * (REFUSED_LEASES << doublings);
                idle.refused += 1;
            }
        }
    }

    /// Finds workers with room while shards have been lying too long. Whether there are any.
    fn find_idle(&mut self, view: &View<'_>, loads: &Loads<'_>, share: Share) -> bool {
        let long = view.duration * LYING_LEASES;
        let rested = self
            .found_idle
            .is_none_or(|at| view.now.saturating_duration_since(at) >= long);
        let lies = free_shards(view).any(|shard| self.free_for(shard.key, view.now) >= long);
        if !rested || !lies {
            return false;
        }
        let mut found = false;
        for peer in &view.peers {
            let had = loads.has(peer.id);
            if had < share.high && !self.idle.contains_key(peer.id) {
                found = true;
                let idle = Idle {
                    had,
                    found: view.now,
                    refused: 0,
                    until: view.now,
                };
                self.idle.insert(peer.id.to_owned(), idle);
            }
        }
        if found {
            self.found_idle = Some(view.now);
        }
        found
    }

    /// The share of a worker that counts: idle ones, and what they have, are left out.
    fn share(&self, view: &View<'_>, loads: &Loads<'_>) -> Share {
        let workers = 1 + view
            .peers
            .iter()
            .filter(|peer| !self.idle.contains_key(peer.id))
            .count();
        let idle: usize = self.idle.keys().map(|id| loads.has(id)).sum();
        let shards = view.shards.len().saturating_sub(idle);
        Share {
            low: shards / workers,
            high: shards.div_ceil(workers),
        }
    }

    /// How many shards to take. One that it asked for is taken though its share is full: it asked
    /// because somebody has more than that, which others know to be right who have found an idle
    /// worker. Left lying, it would make this worker look idle, too.
    fn room(&self, view: &View<'_>, share: Share, mine: usize) -> usize {
        let asked = free_shards(view).any(|shard| self.asked.contains(shard.key));
        match share.high.checked_sub(mine) {
            Some(0) if asked => 1,
            room => room.unwrap_or(0),
        }
    }

    /// Up to `room` free shards. Workers that see the same begin with different ones.
    fn take(
        &self,
        view: &View<'_>,
        wanted: &HashMap<&str, Vec<&str>>,
        room: usize,
    ) -> HashSet<String> {
        let mut free: Vec<(usize, u64, &str)> = free_shards(view)
            .filter(|shard| {
                let askers = wanted.get(shard.key).map_or(&[][..], Vec::as_slice);
                self.asked.contains(shard.key) || !self.is_reserved(shard.key, askers, view)
            })
            .map(|shard| {
                let ours = weight(view.me, shard.key);
                let rank = view
                    .peers
                    .iter()
                    .filter(|peer| weight(peer.id, shard.key) > ours)
                    .count();
                (rank, ours, shard.key)
            })
            .collect();
        // What it asked for comes first: others wait for it to be taken.
        free.sort_by_key(|(rank, weight, key)| (!self.asked.contains(*key), *rank, *weight));
        free.into_iter()
            .take(room)
            .map(|(_, _, key)| key.to_owned())
            .collect()
    }

    /// What to ask for, with `mine` shards in hand.
    fn ask(
        &mut self,
        view: &View<'_>,
        loads: &Loads<'_>,
        share: Share,
        mine: usize,
    ) -> Vec<String> {
        let overfull = |peer: &Peer<'_>| {
            let has = loads.will_have(peer.id);
            has > share.high && has >= mine + 2
        };
        let short = if mine < share.low {
            share.low - mine
        } else if view.peers.iter().any(overfull) {
            1
        } else {
            self.short_since = None;
            return Vec::new();
        };
        let since = *self.short_since.get_or_insert(view.now);
        if since >= view.now {
            return Vec::new();
        }
        let mut held: HashMap<&str, Vec<&str>> = HashMap::new();
        for shard in view.shards.iter().filter(|shard| shard.readable) {
            if let Holder::Worker(owner) = shard.holder {
                held.entry(owner).or_default().push(shard.key);
            }
        }
        let mut donors: Vec<(usize, &str, Vec<&str>)> = view
            .peers
            .iter()
            .filter_map(|peer| {
                let mut keys = held.remove(peer.id)?;
                keys.sort_by_key(|key| std::cmp::Reverse(weight(view.me, key)));
                Some((loads.will_have(peer.id), peer.id, keys))
            })
            .collect();
        let mut ask = Vec::new();
        for got in 0..short {
            // From the fullest; of equals, each asker begins with another.
            let fullest = donors
                .iter_mut()
                .filter(|(has, _, keys)| !keys.is_empty() && *has >= mine + got + 2)
                .max_by_key(|(has, id, _)| (*has, weight(view.me, id)));
            let Some((has, _, keys)) = fullest else {
                break;
            };
            *has -= 1;
            ask.extend(keys.pop().map(str::to_owned));
        }
        ask
    }

    /// What to give, and to whom: to the emptiest first, while it has less by two or more.
    fn give(&self, view: &View<'_>, loads: &Loads<'_>, share: Share) -> Vec<(String, String)> {
        let mut mine: HashSet<&str> = view
            .shards
            .iter()
            .filter(|shard| shard.running && shard.holder == Holder::Worker(view.me))
            .map(|shard| shard.key)
            .collect();
        let mut askers: Vec<(usize, &Peer<'_>)> = view
            .peers
            .iter()
            .filter(|peer| self.is_heard(peer.id, view.now))
            .map(|peer| (loads.will_have(peer.id), peer))
            .collect();
        let mut give = Vec::new();
        loop {
            askers.retain(|(has, peer)| {
                // One that was idle gets one at a time until it has taken one.
                let may = match self.idle.contains_key(peer.id) {
                    true => *has == loads.has(peer.id),
                    false => mine.len() > share.low,
                };
                may && has + 2 <= mine.len()
                    && peer.wants.iter().any(|key| mine.contains(key.as_str()))
            });
            let emptiest = askers.iter_mut().min_by_key(|(has, peer)| (*has, peer.id));
            let Some((has, peer)) = emptiest else {
                return give;
            };
            let Some(key) = peer.wants.iter().find(|key| mine.remove(key.as_str())) else {
                return give;
            };
            *has += 1;
            give.push((key.clone(), peer.id.to_owned()));
        }
    }
}

/// Shards that nobody has and this worker could read.
fn free_shards<'v, 'a>(view: &'v View<'a>) -> impl Iterator<Item = &'v Open<'a>> {
    view.shards
        .iter()
        .filter(|shard| shard.readable && shard.holder == Holder::Nobody)
}

/// Who else asks for each shard.
fn wanted<'a>(view: &View<'a>) -> HashMap<&'a str, Vec<&'a str>> {
    let mut wanted: HashMap<&str, Vec<&str>> = HashMap::new();
    for peer in &view.peers {
        for key in peer.wants {
            wanted.entry(key).or_default().push(peer.id);
        }
    }
    wanted
}

/// How much `worker` would like to have `key`: the same for all that compute it, and different for
/// every worker.
fn weight(worker: &str, key: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (worker, key).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
