//! When a suspect is a difference, and when it is only in flight. Pure.
//!
//! Both tables may be written to while they are compared, and what the source took a moment ago the
//! target takes a moment later. So a key is called different only after several looks at both sides,
//! consistent ones, that all saw the same two things, while whoever applies changes passed the
//! moment of the first look: what the target lacks then will not come by itself.
//!
//! One look that sees both sides equal settles a key. A key whose item turns to and fro between few
//! values, faster than they are applied, could look still; that is why there are three looks and not
//! two.

use std::time::{Duration, Instant};

use crate::dynamo::digest::Digest;
use crate::lease::row::{Row, ShardRow};
use crate::lease::rules::Observer;

/// Looks that have to agree.
const LOOKS_THAT_AGREE: u32 = 3;
/// Beyond a watermark: stream times are whole seconds, and clocks of hosts may differ by two more
/// without being corrected.
const MARGIN_MS: i64 = 3_000;

/// What one side holds under a key.
#[derive(Debug, Clone, Copy)]
pub enum Held {
    /// No item.
    Nothing,
    /// An item; `None` where nobody can say what it equals.
    Item(Option<Digest>),
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Held::Nothing, Held::Nothing) => true,
            (Held::Item(Some(one)), Held::Item(Some(other))) => one == other,
            _ => false,
        }
    }
}

/// How a key differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// In the source only.
    Missing,
    /// In both, and not the same.
    Changed,
    /// In the target only.
    Extra,
}

impl Kind {
    /// As it is named in reports.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Missing => "missing",
            Kind::Changed => "changed",
            Kind::Extra => "extra",
        }
    }

    /// How the two sides differ, if they do.
    pub fn of(source: Held, target: Held) -> Option<Self> {
        match (source, target) {
            _ if source == target => None,
            (Held::Item(_), Held::Nothing) => Some(Kind::Missing),
            (Held::Nothing, _) => Some(Kind::Extra),
            (Held::Item(_), Held::Item(_)) => Some(Kind::Changed),
        }
    }
}

/// How far the changes of the source are applied to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Nobody applies any: what differs will differ.
    Still,
    /// All that were made until then, in milliseconds by the source's clock.
    Until(i64),
    /// Somebody applies them, and nobody can say how far: something is in doubt.
    Unknown,
}

impl Flow {
    fn has_passed(self, at_ms: i64) -> bool {
        match self {
            Flow::Still => true,
            Flow::Until(until_ms) => until_ms > at_ms + MARGIN_MS,
            Flow::Unknown => false,
        }
    }
}

/// What is known of a suspect.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Both sides hold the same, or did when they were looked at.
    Equal,
    /// They differ.
    Differs(Kind),
    /// It changes all the time, or what would settle it is not applied.
    Unsettled,
}

/// A key that is being looked at.
#[derive(Debug, Clone, Default)]
pub struct Suspicion {
    /// What the looks that agree saw, and when the first of them began.
    seen: Option<(Held, Held, i64)>,
    agree: u32,
    /// When the first look of all began.
    since_ms: Option<i64>,
}

impl Suspicion {
    /// Both sides were read, the source first. `at_ms`: before that, by the source's clock. `flow`:
    /// how far changes were applied before the target was read. `patience_ms`: a key that is not settled
    /// so long after its first look never will be. `None`: look again.
    pub fn look(
        &mut self,
        source: Held,
        target: Held,
        at_ms: i64,
        flow: Flow,
        patience_ms: i64,
    ) -> Option<Verdict> {
        let Some(kind) = Kind::of(source, target) else {
            return Some(Verdict::Equal);
        };
        if flow == Flow::Still {
            return Some(Verdict::Differs(kind));
        }
        let since_ms = *self.since_ms.get_or_insert(at_ms);
        match &self.seen {
            Some((known_source, known_target, first_ms))
                if *known_source == source && *known_target == target =>
            {
                self.agree += 1;
                if self.agree >= LOOKS_THAT_AGREE && flow.has_passed(*first_ms) {
                    return Some(Verdict::Differs(kind));
                }
            }
            _ => {
                self.seen = Some((source, target, at_ms));
                self.agree = 1;
            }
        }
        (at_ms - since_ms >= patience_ms).then_some(Verdict::Unsettled)
    }
}

/// Tells from the rows of the state table how far a table's changes are applied.
#[derive(Debug, Default)]
pub struct FlowWatch {
    rows: Observer,
    /// When it began to look.
    begun: Option<Instant>,
}

impl FlowWatch {
    /// `rows` are all rows, as they were read at `now`. Nobody applies changes once no row has moved for
    /// `patience`, owned or not: a worker that is being replaced leaves its shards without an owner for
    /// a moment.
    pub fn see(
        &mut self,
        rows: &[Row],
        epoch: u64,
        table: &str,
        now: Instant,
        patience: Duration,
    ) -> Flow {
        let of_table: Vec<&ShardRow> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Shard(row) if row.table == table => Some(row),
                _ => None,
            })
            .collect();
        self.rows.observe(of_table.iter().copied(), now);
        let begun = *self.begun.get_or_insert(now);
        let is_old = |since: Instant| now.saturating_duration_since(since) >= patience;
        // Where nobody ever followed the table there is nobody to wait for.
        let is_still = of_table.is_empty()
            || (is_old(begun)
                && of_table
                    .iter()
                    .all(|row| self.rows.still_since(*row).is_some_and(is_old)));
        if is_still {
            return Flow::Still;
        }
        let in_doubt = rows
            .iter()
            .any(|row| matches!(row, Row::Doubt(row) if row.epoch == epoch && row.table == table));
        let open = of_table
            .iter()
            .filter(|row| row.epoch == epoch && !row.is_finished());
        // A shard without a watermark has not applied anything: `None` is before everything.
        match open.map(|row| row.watermark).min().flatten() {
            Some(until_ms) if !in_doubt => Flow::Until(until_ms),
            _ => Flow::Unknown,
        }
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
