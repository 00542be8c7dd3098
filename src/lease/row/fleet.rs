//! Rows of the fleet: its processes, and the tap that a person closes.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};

/// `worker#<id>`: a process of the fleet. It shows that it lives by moving its counter; the others
/// watch that by their own clocks, as they do with leases.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerRow {
    /// Hash key.
    pub lease_key: String,
    /// `worker`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The process start, as `leaseOwner` names it before the nonce of the take.
    pub worker: String,
    /// Grows with every heartbeat.
    pub lease_counter: u64,
    /// Epoch it works in.
    pub epoch: u64,
    /// Version of Farshore it runs.
    pub version: String,
    /// When it started, RFC 3339.
    pub since: String,
    /// When the row was last written, in milliseconds; for people, never for rules.
    pub updated_at: i64,
    /// Whether it was asked to stop: it drains, and takes nothing any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// A later epoch that it has acknowledged: nothing of its own is sent any more, and its leases are
    /// given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<u64>,
    /// Keys of the leases it asks their owners to hand over.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub wants: Vec<String>,
}

impl WorkerRow {
    /// Key of the row of `worker`.
    pub fn key(worker: &str) -> String {
        format!("worker#{worker}")
    }

    /// The row of a process that has just started.
    pub fn new(worker: &str, epoch: u64, since: String) -> Self {
        Self {
            lease_key: Self::key(worker),
            entity_type: "worker".to_owned(),
            format_version: FORMAT_VERSION,
            worker: worker.to_owned(),
            lease_counter: 0,
            epoch,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since,
            updated_at: 0,
            leaving: false,
            acknowledged: None,
            wants: Vec::new(),
        }
    }
}

impl Counted for WorkerRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}

/// `pause#<table>` (or `pause#*` for all tables): a tap, closed until it is opened again. The row stays
/// afterwards and says who opened it and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PauseRow {
    /// Hash key.
    pub lease_key: String,
    /// `pause`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Grows with every update.
    #[serde(default)]
    pub lease_counter: u64,
    /// The table, by its name in the configuration; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    /// Who closed the tap.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When, RFC 3339.
    pub at: String,
    /// Who opened it again; absent while it is closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Resumed>,
}

/// Who opened a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resumed {
    /// Who.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When, RFC 3339.
    pub at: String,
}

impl PauseRow {
    /// Key of the pause of `table`, or of all tables.
    pub fn key(table: Option<&str>) -> String {
        format!("pause#{}", table.unwrap_or("*"))
    }

    /// A pause of `table`, or of all tables.
    pub fn new(table: Option<&str>, by: &str, reason: &str, at: String) -> Self {
        Self {
            lease_key: Self::key(table),
            entity_type: "pause".to_owned(),
            format_version: FORMAT_VERSION,
            lease_counter: 0,
            table: table.map(str::to_owned),
            by: by.to_owned(),
            reason: reason.to_owned(),
            at,
            resumed: None,
        }
    }

    /// Whether the tap is closed.
    pub fn is_closed(&self) -> bool {
        self.resumed.is_none()
    }

    /// Whether the row is about `table`.
    pub fn is_about(&self, table: &str) -> bool {
        self.table.as_deref().is_none_or(|paused| paused == table)
    }

    /// Whether it stops the writes of `table`.
    pub fn covers(&self, table: &str) -> bool {
        self.is_closed() && self.is_about(table)
    }
}

impl Counted for PauseRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
