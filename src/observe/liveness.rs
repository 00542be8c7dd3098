//! Signs of life, and what it means when one is missing. Pure: instants in, findings out.
//!
//! | sign | missing for | finding | who heals it |
//! | --- | --- | --- | --- |
//! | the state table was read | three leases | `state-unread` | its reader is started again |
//! | a stream was listed to its end | [`Limits::listing`] | `discovery-stalled` | the table starts over |
//! | the loop of a table or stream came round | [`Limits::pulse`] | `loop-stalled` | the table starts over |
//! | a shard with records moved on | [`Limits::stalled`] | `shard-stalled` | its task is ended, the lease taken again |
//! | an open shard has a living owner | three leases | `shard-unowned` | whoever sees it first takes it |
//! | a task lives | at once | `task-died` | it is started again |

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::config::Config;

/// Every loop shows itself at least this often, even while it waits.
pub const PULSE_EVERY: Duration = Duration::from_secs(1);

/// How long each sign of life may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A complete reading of the state table.
    pub unread: Duration,
    /// A living owner of a shard that may be read.
    pub unowned: Duration,
    /// A turn of the loop of a table or stream: readiness turns red.
    pub pulse: Duration,
    /// The same: the task is started again.
    pub restart: Duration,
    /// Progress of a shard that has records.
    pub stalled: Duration,
    /// A complete listing of a table's stream.
    pub listing: Duration,
    /// How long a task that died is shown.
    pub shown: Duration,
}

impl Limits {
    /// The limits of a configuration. Short leases make them short, for tests, and never so short
    /// that a slow host counts as dead.
    pub fn of(config: &Config) -> Self {
        let second = Duration::from_secs(1);
        let lease = config.leases.duration;
        let discover = config.worker.discover_every;
        Self {
            unread: lease * 3,
            unowned: lease * 3,
            pulse: (lease * 3).clamp(5 * second, 30 * second),
            restart: (lease * 6).clamp(12 * second, 60 * second),
            stalled: (lease * 6).clamp(15 * second, 60 * second),
            listing: discover * 3 + discover.clamp(5 * second, 30 * second),
            shown: (lease * 30).clamp(30 * second, 300 * second),
        }
    }
}

/// When a shard's task last showed which sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signs {
    /// Its loop came round.
    pub turned: Instant,
    /// More became durable, or nothing waited to.
    pub moved: Instant,
    /// A page was read, or there was no room for one.
    pub read: Instant,
    /// What it may take longer than others: a small write budget, a slow end.
    pub allowance: Duration,
}

/// What a shard's task does not do any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// Its loop does not come round.
    NotTurning,
    /// Nothing is read although there is room.
    NotReading,
    /// Records wait and none becomes durable.
    NotMoving,
}

impl Signs {
    /// All signs seen at `now`.
    pub fn fresh(now: Instant) -> Self {
        Self {
            turned: now,
            moved: now,
            read: now,
            allowance: Duration::ZERO,
        }
    }

    /// What is missing, and for how long: the gravest first.
    pub fn stall(&self, limits: &Limits, now: Instant) -> Option<(Stall, Duration)> {
        let limit = limits.stalled + self.allowance;
        [
            (Stall::NotTurning, self.turned),
            (Stall::NotReading, self.read),
            (Stall::NotMoving, self.moved),
        ]
        .into_iter()
        .map(|(stall, seen)| (stall, now.saturating_duration_since(seen)))
        .find(|(_, missing)| *missing > limit)
    }

    /// Whether the task must be ended, so that somebody starts again from the checkpoint. What
    /// only moves slowly gets much longer than what stands still.
    pub fn is_beyond_repair(&self, limits: &Limits, now: Instant) -> bool {
        self.stall(limits, now).is_some_and(|(stall, missing)| {
            let limit = limits.stalled + self.allowance;
            match stall {
                Stall::NotTurning => missing > limit,
                Stall::NotReading => missing > limit * 2,
                Stall::NotMoving => missing > limit * 5,
            }
        })
    }
}

/// What excuses a shard that stands still: readiness is red already, and says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Excuses {
    /// The source cannot be read.
    pub reading: bool,
    /// The replica, the state table or the dead letters cannot be written.
    pub moving: bool,
}

/// One missing sign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its code in readiness.
    pub code: &'static str,
    /// The table, or nothing where it is the worker's.
    pub table: String,
    /// One sentence.
    pub text: String,
    /// What to do.
    pub next: &'static str,
}

const HEALS: &str =
    "Nothing at first: it is started again by itself; if it lasts or comes back, report the log";

/// The signs of life of a feeding worker.
#[derive(Debug)]
pub struct Ledger {
    limits: Limits,
    /// When the last complete reading of the state table began.
    read: Instant,
    /// Loops, by the number of their pulse: table, part, last turn.
    pulses: BTreeMap<u64, (String, String, Instant)>,
    /// When each table's stream was last listed to its end.
    listed: BTreeMap<String, Instant>,
    shards: BTreeMap<(String, String), Signs>,
    /// Shards without a living owner, by table and key: first and last seen so.
    unowned: BTreeMap<(String, String), (Instant, Instant)>,
    /// Tasks that died, by kind and table.
    deaths: BTreeMap<(&'static str, String), Instant>,
    /// Workers in the fleet: they share the listings, so each lists that much less often.
    workers: u32,
}

impl Ledger {
    /// A ledger of a worker that starts at `now`.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            workers: 1,
            read: now,
            pulses: BTreeMap::new(),
            listed: BTreeMap::new(),
            shards: BTreeMap::new(),
            unowned: BTreeMap::new(),
            deaths: BTreeMap::new(),
        }
    }

    /// The limits it judges by.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// So many workers share the listings.
    pub fn set_workers(&mut self, workers: usize) {
        self.workers = u32::try_from(workers).unwrap_or(u32::MAX).max(1);
    }

    /// How long a table may go without a complete listing.
    pub fn listing_limit(&self) -> Duration {
        self.limits.listing.saturating_mul(self.workers)
    }

    /// A complete reading of the state table began at `begun`.
    pub fn rows_read(&mut self, begun: Instant) {
        self.read = self.read.max(begun);
    }

    /// The loop with this pulse came round.
    pub fn pulse(&mut self, id: u64, table: &str, part: &str, now: Instant) {
        self.pulses
            .entry(id)
            .or_insert_with(|| (table.to_owned(), part.to_owned(), now))
            .2 = now;
    }

    /// A loop ended in order.
    pub fn pulse_ends(&mut self, id: u64) {
        self.pulses.remove(&id);
    }

    /// A table's stream was listed to its end, or begins to be.
    pub fn listed(&mut self, table: &str, now: Instant) {
        self.listed.insert(table.to_owned(), now);
    }

    /// A shard's task shows its signs.
    pub fn shard(&mut self, table: &str, shard: &str, signs: Signs) {
        let known = self
            .shards
            .entry((table.to_owned(), shard.to_owned()))
            .or_insert(signs);
        // What was excused meanwhile stays so.
        *known = Signs {
            moved: known.moved.max(signs.moved),
            read: known.read.max(signs.read),
            ..signs
        };
    }

    /// A shard is no longer this process's.
    pub fn shard_left(&mut self, table: &str, shard: &str) {
        self.shards.remove(&(table.to_owned(), shard.to_owned()));
    }

    /// Whether the task of a shard must be ended.
    pub fn is_beyond_repair(&self, table: &str, shard: &str, now: Instant) -> bool {
        self.shards
            .get(&(table.to_owned(), shard.to_owned()))
            .is_some_and(|signs| signs.is_beyond_repair(&self.limits, now))
    }

    /// Time during which a shard is excused does not count against it.
    pub fn excuse(&mut self, excuses: impl Fn(&str) -> Excuses, now: Instant) {
        for ((table, _), signs) in &mut self.shards {
            let excuses = excuses(table);
            if excuses.reading {
                signs.read = now;
            }
            if excuses.moving {
                signs.moved = now;
            }
        }
    }

    /// The shards, by table and key, that nobody living owned when the state table was read at
    /// `seen`. Replaces what was known.
    pub fn unowned(&mut self, shards: impl Iterator<Item = (String, String)>, seen: Instant) {
        self.unowned = shards
            .map(|shard| {
                let first = self.unowned.get(&shard).map_or(seen, |(first, _)| *first);
                (shard, (first, seen))
            })
            .collect();
    }

    /// A task of the kind `task` died.
    pub fn died(&mut self, task: &'static str, table: &str, now: Instant) {
        self.deaths.insert((task, table.to_owned()), now);
    }

    /// Why the tasks of `table` must be started again, if they must.
    pub fn stuck(&self, table: &str, excuses: Excuses, now: Instant) -> Option<&'static str> {
        let since = |seen: &Instant| now.saturating_duration_since(*seen);
        let pulse = self
            .pulses
            .values()
            .any(|(of, _, seen)| of == table && since(seen) > self.limits.restart);
        if pulse {
            return Some("its loop does not come round any more");
        }
        let listing = self
            .listed
            .get(table)
            .is_some_and(|seen| since(seen) > self.listing_limit() * 2);
        (listing && !excuses.reading).then_some("its stream is not listed any more")
    }

    /// The tasks of `table` are started again: what the old ones left behind says nothing.
    pub fn restarted(&mut self, table: &str, now: Instant) {
        self.pulses.retain(|_, (of, _, _)| of != table);
        self.shards.retain(|(of, _), _| of != table);
        if !table.is_empty() {
            self.listed(table, now);
        }
    }

    /// Everything that is missing at `now`. `excuses` are by table.
    pub fn findings(&self, excuses: impl Fn(&str) -> Excuses, now: Instant) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |code, table: &str, text: String, next| {
            findings.push(Finding {
                code,
                table: table.to_owned(),
                text,
                next,
            });
        };
        let unread = now.saturating_duration_since(self.read);
        if unread > self.limits.unread {
            let text = format!("the state table was not read for {} s", unread.as_secs());
            find(
                "state-unread",
                "",
                text,
                "Look at the reason outage-state; without one, report the log",
            );
        }
        for (table, part, seen) in self.pulses.values() {
            let still = now.saturating_duration_since(*seen);
            if still > self.limits.pulse {
                let text = format!("the loop `{part}` stands still for {} s", still.as_secs());
                find("loop-stalled", table, text, HEALS);
            }
        }
        for (table, seen) in &self.listed {
            let since = now.saturating_duration_since(*seen);
            if since > self.listing_limit() && !excuses(table).reading {
                let text = format!("its shards were not listed for {} s", since.as_secs());
                find("discovery-stalled", table, text, HEALS);
            }
        }
        for (table, text) in self.stalled(now) {
            find("shard-stalled", &table, text, HEALS);
        }
        for (table, text) in self.ownerless() {
            let next = "Look whether enough workers run and are ready; one of them takes the shard";
            find("shard-unowned", &table, text, next);
        }
        for ((task, table), at) in &self.deaths {
            let ago = now.saturating_duration_since(*at);
            if ago <= self.limits.shown {
                let text = format!("the task `{task}` died {} s ago", ago.as_secs());
                find("task-died", table, text, HEALS);
            }
        }
        findings
    }

    /// One sentence for each table with shards that stand still: the longest, and how many.
    fn stalled(&self, now: Instant) -> Vec<(String, String)> {
        let mut worst: BTreeMap<&str, (usize, Stall, Duration)> = BTreeMap::new();
        for ((table, _), signs) in &self.shards {
            if let Some((stall, missing)) = signs.stall(&self.limits, now) {
                let entry = worst.entry(table).or_insert((0, stall, missing));
                entry.0 += 1;
                if missing > entry.2 {
                    (entry.1, entry.2) = (stall, missing);
                }
            }
        }
        worst
            .into_iter()
            .map(|(table, (shards, stall, missing))| {
                let what = match stall {
                    Stall::NotTurning => "its task does not come round",
                    Stall::NotReading => "nothing is read",
                    Stall::NotMoving => "records wait and none is applied",
                };
                let text = format!(
                    "{shards} shard(s) stand still; of the longest: {what} for {} s",
                    missing.as_secs()
                );
                (table.to_owned(), text)
            })
            .collect()
    }

    fn ownerless(&self) -> Vec<(String, String)> {
        let mut longest: BTreeMap<&str, (usize, Duration)> = BTreeMap::new();
        for ((table, _), (first, last)) in &self.unowned {
            let time = last.saturating_duration_since(*first);
            if time > self.limits.unowned {
                let entry = longest.entry(table).or_default();
                entry.0 += 1;
                entry.1 = entry.1.max(time);
            }
        }
        longest
            .into_iter()
            .map(|(table, (shards, time))| {
                let text = format!(
                    "{shards} shard(s) that could be read have no living owner, for {} s",
                    time.as_secs()
                );
                (table.to_owned(), text)
            })
            .collect()
    }
}

#[cfg(test)]
#[path = "liveness_tests.rs"]
mod tests;
