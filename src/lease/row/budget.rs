//! The row of the write budget: who may spend how much of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};

/// Key of the row of the write budgets.
pub const BUDGET_KEY: &str = "budget";

/// `budget`: the shares of the write budgets of all tables of the group. One row, so that one condition holds
/// every sum, and one renewal every share of a holder. A holder takes some 40 bytes for each table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BudgetRow {
    /// Hash key.
    pub lease_key: String,
    /// `budget`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Grows with every update: all are conditional on it.
    pub lease_counter: u64,
    /// Workers and jobs, by their process starts.
    #[serde(default)]
    pub holders: BTreeMap<String, Holding>,
}

/// What one process holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holding {
    /// Grows with every update of this holder: who stands still for a lease is dead.
    pub beat: u64,
    /// Its shares, by the tables' names in the configuration.
    #[serde(default)]
    pub tables: BTreeMap<String, Share>,
}

/// A share of one table's budget, in thousandths of a write unit per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Share {
    /// What it may spend.
    pub milliunits: u64,
    /// What it could spend.
    pub wanted: u64,
}

impl Default for BudgetRow {
    fn default() -> Self {
        Self {
            lease_key: BUDGET_KEY.to_owned(),
            entity_type: BUDGET_KEY.to_owned(),
            format_version: FORMAT_VERSION,
            lease_counter: 0,
            holders: BTreeMap::new(),
        }
    }
}

impl Counted for BudgetRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
