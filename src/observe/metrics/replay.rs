//! The meters that every replayed record moves: found once for a table, and moved once for an answer.

use std::sync::Arc;

use metrics::{Counter, Histogram, counter, histogram};

use super::{COALESCED, LAG, RECORDS};
use crate::observe::board::{Board, TableTotals};
use crate::stream::change::Event;

/// The meters of one table's replay.
pub struct Replay {
    records: [Counter; Event::ALL.len()],
    lag: Histogram,
    coalesced: Counter,
    totals: Arc<TableTotals>,
}

/// What one answer made durable.
#[derive(Debug, Default)]
pub struct Tally {
    events: [u64; Event::ALL.len()],
    /// How many changes were made at each moment, in milliseconds: mostly one, for the source tells whole
    /// seconds.
    made: Vec<(i64, u64)>,
    coalesced: u64,
}

impl Tally {
    /// Counts a change that the source made at `created_ms`.
    pub fn add(&mut self, event: Event, created_ms: i64) {
        self.events[event as usize] += 1;
        match self.made.iter_mut().find(|(at, _)| *at == created_ms) {
            Some((_, changes)) => *changes += 1,
            None => self.made.push((created_ms, 1)),
        }
    }

    /// Counts changes that were not written because a later one was.
    pub fn add_coalesced(&mut self, changes: u64) {
        self.coalesced += changes;
    }

    /// Changes that became durable.
    pub fn records(&self) -> u64 {
        self.events.iter().sum()
    }

    /// Those of them that were not written.
    pub fn coalesced(&self) -> u64 {
        self.coalesced
    }
}

impl Replay {
    /// The meters of `table`, of the recorder that is installed now.
    pub fn of(table: &str, board: &Board) -> Self {
        Self {
            totals: board.table(table),
            records: Event::ALL.map(
                |event| counter!(RECORDS, "table" => table.to_owned(), "event" => event.name()),
            ),
            lag: histogram!(LAG, "table" => table.to_owned()),
            coalesced: counter!(COALESCED, "table" => table.to_owned()),
        }
    }

    /// What `tally` counted became durable at `now_ms`, by the source's clock.
    pub fn applied(&self, tally: &Tally, now_ms: i64) {
        for (counter, records) in self.records.iter().zip(tally.events) {
            if records > 0 {
                counter.increment(records);
            }
        }
        let mut lag_ms = None;
        for (created_ms, changes) in &tally.made {
            let late_ms = (now_ms - created_ms).max(0);
            lag_ms = lag_ms.max(Some(late_ms));
            let seconds = late_ms as f64 / 1_000.0;
            self.lag
                .record_many(seconds, usize::try_from(*changes).unwrap_or(usize::MAX));
        }
        self.totals.finished(tally.records(), now_ms, lag_ms);
        if tally.coalesced > 0 {
            self.coalesced.increment(tally.coalesced);
        }
    }
}
