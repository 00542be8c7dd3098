//! The row of a one-shot job that writes to a replica.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};
use crate::lease::hold::Holdable;

/// `job#<kind>#<id>`: a job at work, which holds its row like a lease. One that died stays in its row
/// until `until`: its last writes may take effect so late.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobRow {
    /// Hash key.
    pub lease_key: String,
    /// `job`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Epoch it belongs to.
    pub epoch: u64,
    /// `redrive`.
    pub kind: String,
    /// Label of the region it reads.
    pub source: String,
    /// Label of the region it writes.
    pub target: String,
    /// Who is at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// Grows with every update.
    pub lease_counter: u64,
    /// No write of it takes effect later, by the replica region's clock, in milliseconds.
    pub until: i64,
    /// When it began, RFC 3339.
    pub at: String,
}

impl JobRow {
    /// A job of `kind`, not begun yet.
    pub fn new(kind: &str, id: &str, epoch: u64, source: &str, target: &str, at: String) -> Self {
        Self {
            lease_key: format!("job#{kind}#{id}"),
            entity_type: "job".to_owned(),
            format_version: FORMAT_VERSION,
            epoch,
            kind: kind.to_owned(),
            source: source.to_owned(),
            target: target.to_owned(),
            lease_owner: None,
            lease_counter: 0,
            until: 0,
            at,
        }
    }
}

impl Counted for JobRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}

impl Holdable for JobRow {
    fn count(&mut self) {
        self.lease_counter += 1;
    }

    fn set_holder(&mut self, holder: Option<String>) {
        self.lease_owner = holder;
    }

    fn until_mut(&mut self) -> &mut i64 {
        &mut self.until
    }
}
