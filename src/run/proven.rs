//! The recovery point as this worker knows it, from its last reading of the state table and its own shards.

use std::collections::BTreeMap;

use super::context::Shared;
use super::rows::Snapshot;
use crate::dynamo::clock::{REGIONS_APART_MS, Reading, host_ms};
use crate::observe::liveness::Limits;
use crate::observe::recovery::{Ground, Moments, of_shards, of_tables};
use crate::observe::view::ClockOf;

impl Shared {
    /// Does something with all that decides about the recovery point.
    pub fn on_recovery_ground<T>(&self, rows: &Snapshot, act: impl FnOnce(Ground<'_>) -> T) -> T {
        let (jobs, live) = (rows.jobs(), self.board.live());
        let limit = Limits::of(&self.config).listing;
        act(Ground {
            epoch: self.epoch,
            shards: &rows.shards,
            streams: &rows.streams,
            gaps: &rows.gaps,
            doubts: &rows.doubts,
            jobs: &jobs,
            live: &live,
            source_ms: self.source.clock.now_ms(),
            replica_ms: self.target.clock.now_ms(),
            listing_limit_ms: i64::try_from(limit.as_millis()).unwrap_or(i64::MAX),
        })
    }

    /// The source's clock; before it was heard that of the replica's region, and its error is that much
    /// greater.
    pub fn clock(&self) -> Reading {
        self.clock_and_whose().0
    }

    /// The same, and whose it is.
    pub fn clock_and_whose(&self) -> (Reading, ClockOf) {
        heard(self.source.clock.reading(), self.target.clock.reading())
    }

    /// The recovery point of every table. Unknown before the state table was read.
    pub fn recovery_points(&self, rows: &Snapshot) -> BTreeMap<String, Moments> {
        let tables = || self.config.tables.iter().map(|table| table.name.as_str());
        self.on_recovery_ground(rows, |ground| {
            let moments = of_tables(ground, tables());
            moments
                .into_iter()
                .map(|(table, moments)| (table.to_owned(), moments))
                .collect()
        })
    }

    /// Before which moment of the source everything is proven to be applied in the shard whose row has
    /// this key, in milliseconds; `None` where nobody knows.
    pub fn proven_of_shard(&self, key: &str) -> Option<i64> {
        let rows = self.rows.borrow().clone();
        let row = rows.shards.iter().find(|row| row.lease_key == key)?;
        self.on_recovery_ground(&rows, |ground| {
            let shard = of_shards(ground, std::iter::once(row));
            shard.first().and_then(|(_, moments)| moments.proven_ms)
        })
    }

    /// The same for a table.
    pub fn proven_of_table(&self, table: &str) -> Option<i64> {
        let rows = self.rows.borrow().clone();
        self.on_recovery_ground(&rows, |ground| {
            let tables = of_tables(ground, std::iter::once(table));
            tables.get(table).and_then(|moments| moments.proven_ms)
        })
    }
}

/// Nobody was heard: this host's clock may be off by as much as that, in milliseconds.
const HOST_ERROR_MS: i64 = 5 * 60 * 1_000;

/// The best clock there is, of those of both regions.
pub fn heard(source: Option<Reading>, replica: Option<Reading>) -> (Reading, ClockOf) {
    match (source, replica) {
        (Some(source), _) => (source, ClockOf::Source),
        (None, Some(replica)) => {
            let error_ms = replica.error_ms + REGIONS_APART_MS;
            (
                Reading {
                    error_ms,
                    ..replica
                },
                ClockOf::Replica,
            )
        }
        (None, None) => {
            let reading = Reading {
                now_ms: host_ms(),
                error_ms: HOST_ERROR_MS,
            };
            (reading, ClockOf::Host)
        }
    }
}
