//! What is known of the time to live of a source table, for when that region does not answer.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};

/// `ttl#<table>`: by which attribute the source table expires its items. Turned on in the new active region
/// by a failover, which cannot ask the old one then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TtlRow {
    /// Hash key.
    pub lease_key: String,
    /// `ttl`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The table, by its name in the configuration.
    pub table: String,
    /// Label of the region that was asked.
    pub source: String,
    /// The attribute; absent where nothing expires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribute: Option<String>,
    /// When it was found so, RFC 3339.
    pub at: String,
    /// Grows with every update.
    pub lease_counter: u64,
}

impl TtlRow {
    /// What was found at `at` of `table` in the region `source`.
    pub fn new(table: &str, source: &str, attribute: Option<String>, at: String) -> Self {
        Self {
            lease_key: Self::key_of(table),
            entity_type: "ttl".to_owned(),
            format_version: FORMAT_VERSION,
            table: table.to_owned(),
            source: source.to_owned(),
            attribute,
            at,
            lease_counter: 0,
        }
    }

    /// Key of the row of `table`.
    pub fn key_of(table: &str) -> String {
        format!("ttl#{table}")
    }
}

impl Counted for TtlRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
