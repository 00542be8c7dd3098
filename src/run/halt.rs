//! A flood of refusals halts its table: the tap is closed for the whole fleet, by a pause row that a
//! person takes away.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::context::Shared;
use crate::apply::flood::{Flood, Flooding};
use crate::backoff::Backoff;
use crate::config::Config;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::Fault;
use crate::lease::row::PauseRow;
use crate::lease::table::Written;
use crate::observe::health::Scope;
use crate::observe::metrics;

/// Who closes the tap, where it is no person.
const BY: &str = "farshore";
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What was refused of each table, and which tables are halted.
#[derive(Debug)]
pub struct Halts {
    tables: BTreeMap<String, Mutex<Table>>,
}

#[derive(Debug)]
struct Table {
    flood: Flood,
    halt: Halt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halt {
    No,
    /// The pause is not stored yet.
    Wanted,
    /// Stored at this moment.
    Stored(Instant),
}

impl Halts {
    /// For the tables of a configuration.
    pub fn new(config: &Config) -> Self {
        let halt_after = config.dead_letters.halt_after;
        let fresh = || Table {
            flood: Flood::new(halt_after),
            halt: Halt::No,
        };
        let tables = config.tables.iter();
        Self {
            tables: tables
                .map(|table| (table.name.clone(), Mutex::new(fresh())))
                .collect(),
        }
    }

    fn table(&self, name: &str) -> Option<MutexGuard<'_, Table>> {
        let table = self.tables.get(name)?;
        Some(table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// `records` of `table` were applied.
    pub fn applied(&self, table: &str, records: u64) {
        if let Some(mut table) = self.table(table) {
            table.flood.applied(Instant::now(), records);
        }
    }
}

impl Shared {
    /// Whether a record of `table` that was refused for good may be dead-lettered. If not, the tap
    /// of the table is being closed, and the record has to wait for a person like all others.
    pub fn may_dead_letter(self: &Arc<Self>, table: &str) -> bool {
        let Some(mut state) = self.halts.table(table) else {
            return true;
        };
        if state.halt != Halt::No {
            return false;
        }
        let Err(flooding) = state.flood.refused(Instant::now()) else {
            return true;
        };
        state.halt = Halt::Wanted;
        drop(state);
        tokio::spawn(halt(Arc::clone(self), table.to_owned(), flooding));
        false
    }

    /// Waits until a record of `table` that no write can be made of may be dead-lettered.
    pub async fn until_dead_letter(self: &Arc<Self>, table: &str) {
        while !self.may_dead_letter(table) {
            tokio::time::sleep(LONGEST_PAUSE / 5).await;
            self.until_open(table).await;
        }
    }

    /// Begins anew with tables that a person has opened again. Call it every second or so.
    pub fn look_at_halts(&self) {
        let rows = self.rows.borrow().clone();
        for (name, table) in &self.halts.tables {
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            if let Halt::Stored(at) = table.halt
                && rows.begun.is_some_and(|begun| begun > at)
                && self.tap(name).is_open()
            {
                table.halt = Halt::No;
                table.flood.reset();
            }
        }
    }
}

/// Closes the tap of `table`, however long it takes.
async fn halt(shared: Arc<Shared>, table: String, flooding: Flooding) {
    let Flooding { refused, applied } = flooding;
    metrics::halted(&table);
    tracing::error!(
        table,
        refused,
        applied,
        "a flood of refusals: nothing more of the table is dead-lettered, and its tap is closed"
    );
    let reason = format!(
        "the replica refused {refused} records within a minute and took {applied}: the schemas have \
         probably diverged; compare them with `farshore provision`, mend the replica, then resume"
    );
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while let Err(fault) = store(&shared, &table, &reason).await {
        shared.health.failed(Scope::State, &table, "halt", &fault);
        tokio::time::sleep(backoff.pause()).await;
    }
    shared.health.succeeded(Scope::State, &table, "halt");
    if let Some(mut state) = shared.halts.table(&table) {
        state.halt = Halt::Stored(Instant::now());
    }
    shared.rescan.notify_one();
}

/// Stores the pause unless there is one that stands.
async fn store(shared: &Shared, table: &str, reason: &str) -> Result<(), Fault> {
    loop {
        let known = shared.state.pause(Some(table)).await?;
        if known.as_ref().is_some_and(PauseRow::is_closed) {
            return Ok(());
        }
        let mut row = PauseRow::new(Some(table), BY, reason, rfc3339(host_ms()));
        let written = match known {
            None => shared.state.create(&row).await?,
            Some(known) => {
                row.lease_counter = known.lease_counter + 1;
                shared.state.replace(&row, known.lease_counter).await?
            }
        };
        // Refused: somebody else turned the tap at this moment.
        if written == Written::Yes {
            return Ok(());
        }
    }
}
