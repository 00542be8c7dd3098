//! What was sent to take late writes back, so that its effects are known for what they are.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};
use crate::dynamo::digest::Digest;
use crate::dynamo::value::Item;

/// What stands for a key that holds nothing.
const ABSENT: &str = "absent";
/// What stands for an item with a value of a type that this version does not know.
const UNKNOWN: &str = "unknown";

/// Stands for what a key holds: no item content in the state table.
pub fn print_of(held: Option<&Item>) -> String {
    match held {
        None => ABSENT.to_owned(),
        Some(item) => {
            Digest::of_item(item).map_or_else(|| UNKNOWN.to_owned(), |digest| digest.to_string())
        }
    }
}

/// Writes that take the same late write back to the same item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SentUndo {
    /// Digest of what the key must still hold: the late write.
    pub late: String,
    /// Digest of what the key is made.
    pub right: String,
    /// When the first of them was about to leave, by the clock of the region of the state table, in
    /// milliseconds.
    pub first_ms: i64,
    /// How many were about to leave. Each may have taken effect once, or never.
    pub times: u32,
}

/// `undo#<epoch>#<table>#<digest of the key>`: what was about to be sent to take late writes of one key
/// back. Stored before it leaves; gone when the next epoch's watch begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UndoRow {
    /// Hash key.
    pub lease_key: String,
    /// `undo`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The epoch whose failover took them back.
    pub epoch: u64,
    /// The table, by its name in the configuration.
    pub table: String,
    /// What was sent.
    pub sent: Vec<SentUndo>,
    /// Grows with every update.
    pub lease_counter: u64,
}

impl UndoRow {
    /// A key of which nothing was taken back yet.
    pub fn new(epoch: u64, table: &str, key: Digest) -> Self {
        Self {
            lease_key: Self::key_of(epoch, table, key),
            entity_type: "undo".to_owned(),
            format_version: FORMAT_VERSION,
            epoch,
            table: table.to_owned(),
            sent: Vec::new(),
            lease_counter: 0,
        }
    }

    /// Key of the row of one key of `table`.
    pub fn key_of(epoch: u64, table: &str, key: Digest) -> String {
        format!("undo#{epoch}#{table}#{key}")
    }

    /// The same, with one more write that is about to leave.
    #[must_use]
    pub fn with(&self, late: String, right: String, now_ms: i64) -> Self {
        let mut row = self.clone();
        row.lease_counter += 1;
        let known = row
            .sent
            .iter_mut()
            .find(|sent| sent.late == late && sent.right == right);
        match known {
            Some(sent) => sent.times += 1,
            None => row.sent.push(SentUndo {
                late,
                right,
                first_ms: now_ms,
                times: 1,
            }),
        }
        row
    }
}

impl Counted for UndoRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
