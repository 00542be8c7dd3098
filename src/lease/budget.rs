//! Shares of a write budget: the sum of those that may be used never exceeds it, at any moment. Pure: rows
//! and moments in, a row to be written out.
//!
//! ```text
//!   none ──written──▶ held until a lease after the write was sent ──not renewed──▶ none
//!                        │ ▲
//!                lower:  ▼ │ raise: the row is written first, then it is used
//!             used less at once, then the row is written
//! ```
//!
//! All shares of a group stand in one row, replaced only on condition of its counter. So:
//!
//! * What a holder uses is never more than what the row says of it, whatever became of its last write.
//! * The row never says more than the budget: who raises its share takes what the others leave in the very
//!   row that it replaces.
//! * A share is taken from the row in its holder's stead only when the holder's beat stood still for a lease
//!   after it was seen. Its hold is over by then: that counts from before the beat was *sent*. A beat on its way
//!   is refused, for the row is another one.
//! * A process that stood still, or could not write, uses nothing once its hold is over.
//!
//! Everybody works out the same shares from what the row says is wanted: each gets what it wants, as far as that
//! is no more than an even part of what is left, and what nobody wants is dealt out evenly. Who has more lowers it
//! by itself at its next beat, who has less takes what is free.

use std::collections::BTreeMap;
use std::time::Duration;

use super::row::{BudgetRow, Holding, Share};

/// Everybody who holds anything has at least one part in so many, shared evenly: it can begin at once, and
/// 95 % are left to those who have something to write.
const FLOOR_PARTS: u64 = 20;
/// Less of a budget than one part in so many is not worth a write of the row before it is due.
const TRIFLE_PARTS: u64 = 50;

/// What a holder has to say of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// What the fleet may spend, in thousandths of a unit per second.
    pub budget: u64,
    /// What this holder could spend.
    pub wanted: u64,
}

/// The part of one process.
#[derive(Debug, Clone)]
pub struct Party {
    me: String,
    lease: Duration,
    /// The row as last read or written; `None` when that is not known.
    known: Option<Option<BudgetRow>>,
    /// The beats of the others, and since when they stand still.
    seen: BTreeMap<String, (u64, Duration)>,
    beat: u64,
    /// What may be used, until the moment `until`.
    usable: BTreeMap<String, u64>,
    until: Duration,
    /// When the last write of the row was sent that took effect.
    written: Option<Duration>,
    gone: bool,
}

/// A row to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The row.
    pub row: BudgetRow,
    /// The counter that it replaces; `None` where there is no row yet.
    pub replaces: Option<u64>,
    /// Whether it should be written before it is due: shares change, or a dead holder's come back.
    pub matters: bool,
    /// Whether this holder is to have more than there is for it now.
    pub is_short: bool,
    /// When it was made: the hold counts from here.
    made: Duration,
}

impl Party {
    /// The part of the process start `me`, with nothing yet. A hold is good for `lease` after each write.
    pub fn new(me: &str, lease: Duration) -> Self {
        Self {
            me: me.to_owned(),
            lease,
            known: None,
            seen: BTreeMap::new(),
            beat: 0,
            usable: BTreeMap::new(),
            until: Duration::ZERO,
            written: None,
            gone: false,
        }
    }

    /// Whether the row has to be read before anything is proposed: others write it, too.
    pub fn must_read(&self) -> bool {
        match &self.known {
            None => true,
            Some(None) => false,
            Some(Some(row)) => row.holders.keys().any(|holder| *holder != self.me),
        }
    }

    /// The row was read; its answer had come at `now`.
    pub fn saw(&mut self, row: Option<BudgetRow>, now: Duration) {
        let mut seen = BTreeMap::new();
        for (holder, holding) in row.iter().flat_map(|row| &row.holders) {
            let known = self.seen.get(holder);
            let since = known.filter(|(beat, _)| *beat == holding.beat);
            let since = since.map_or(now, |(_, since)| *since);
            seen.insert(holder.clone(), (holding.beat, since));
        }
        self.seen = seen;
        self.known = Some(row);
    }

    /// What is to be written at `now`. What becomes less may not be used from this moment on. `None` when
    /// the row is not known, or this holder has left.
    pub fn propose(&mut self, wants: &BTreeMap<String, Want>, now: Duration) -> Option<Proposal> {
        let known = self.known.clone()?;
        if self.gone {
            return None;
        }
        let replaces = known.as_ref().map(|row| row.lease_counter);
        let mut row = known.unwrap_or_default();
        let before = row.holders.len();
        row.holders
            .retain(|holder, _| *holder == self.me || !self.is_dead(holder, now));
        let mut matters = row.holders.len() < before;
        let mut is_short = false;
        let held = row.holders.remove(&self.me).unwrap_or_default();
        let mut tables = BTreeMap::new();
        for (table, want) in wants {
            let has = held.tables.get(table).copied().unwrap_or_default();
            let others = row.holders.values().filter_map(|h| h.tables.get(table));
            let (used, wanted): (Vec<u64>, Vec<u64>) =
                others.map(|share| (share.milliunits, share.wanted)).unzip();
            let fair = fair(want.budget, want.wanted, &wanted);
            let others = used
                .iter()
                .fold(0u64, |sum, used| sum.saturating_add(*used));
            let most = want.budget.saturating_sub(others);
            // Never more than the others leave, not even what it has: the budget may have become less.
            let next = fair.min(most);
            let trifle = want.budget / TRIFLE_PARTS;
            let is_new = !held.tables.contains_key(table);
            let moved = next.abs_diff(has.milliunits) > trifle;
            let asks = want.wanted.min(want.budget) > has.wanted.saturating_add(trifle);
            matters |= is_new || moved || asks;
            is_short |= fair > next.saturating_add(trifle);
            let share = Share {
                milliunits: next,
                wanted: want.wanted.min(want.budget),
            };
            tables.insert(table.clone(), share);
        }
        self.lower(&tables);
        self.beat += 1;
        let holding = Holding {
            beat: self.beat,
            tables,
        };
        row.holders.insert(self.me.clone(), holding);
        row.lease_counter += 1;
        Some(Proposal {
            row,
            replaces,
            matters,
            is_short,
            made: now,
        })
    }

    /// A row without this holder. Nothing may be used from now on.
    pub fn leave(&mut self) -> Option<Proposal> {
        self.usable.clear();
        self.gone = true;
        let mut row = self.known.clone()??;
        let replaces = Some(row.lease_counter);
        row.holders.remove(&self.me)?;
        row.lease_counter += 1;
        Some(Proposal {
            row,
            replaces,
            matters: true,
            is_short: false,
            made: Duration::ZERO,
        })
    }

    fn lower(&mut self, tables: &BTreeMap<String, Share>) {
        self.usable.retain(|table, units| {
            let share = tables.get(table).map_or(0, |share| share.milliunits);
            *units = share.min(*units);
            share > 0
        });
    }

    /// `proposal` was written: what it says may be used.
    pub fn written(&mut self, proposal: Proposal) {
        if !self.gone {
            let held = proposal.row.holders.get(&self.me);
            self.usable = held
                .into_iter()
                .flat_map(|held| &held.tables)
                .map(|(table, share)| (table.clone(), share.milliunits))
                .collect();
            self.until = self.until.max(proposal.made + self.lease);
            self.written = Some(proposal.made);
        }
        self.known = Some(Some(proposal.row));
    }

    /// The last proposal was refused, or whether it was written is not known.
    pub fn not_written(&mut self) {
        self.known = None;
    }

    fn is_dead(&self, holder: &str, now: Duration) -> bool {
        let since = self.seen.get(holder).map(|(_, since)| *since);
        since.is_some_and(|since| now.saturating_sub(since) >= self.lease)
    }

    /// What may be used of the budget of `table` at `now`.
    pub fn usable(&self, table: &str, now: Duration) -> u64 {
        match now < self.until {
            true => self.usable.get(table).copied().unwrap_or(0),
            false => 0,
        }
    }

    /// Until when what it has may be used.
    pub fn until(&self) -> Duration {
        self.until
    }

    /// When a write is due that keeps the hold.
    pub fn due(&self) -> Duration {
        self.written
            .map_or(Duration::ZERO, |written| written + self.lease / 3)
    }
}

/// The fair share of one who wants `mine` of `budget`, beside others who want `others`.
fn fair(budget: u64, mine: u64, others: &[u64]) -> u64 {
    let count = others.len() as u64 + 1;
    let floor = budget / FLOOR_PARTS / count;
    let wants = |wanted: u64| wanted.clamp(floor, budget.max(floor));
    let mut all: Vec<u64> = others.iter().map(|wanted| wants(*wanted)).collect();
    all.push(wants(mine));
    all.sort_unstable();
    let mut left = budget;
    let mut waiting = count;
    let mut level = 0;
    for wanted in all {
        // The modest first: what they leave goes to those who want more.
        level = wanted.min(left / waiting);
        left -= level;
        waiting -= 1;
    }
    // The highest level is what the most demanding one gets, and nobody gets more than it wants.
    wants(mine).min(level) + left / count
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
