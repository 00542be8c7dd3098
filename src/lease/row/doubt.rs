//! The row of a doubt (tenet 7): records whose writes may still take effect.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};
use crate::lease::hold::Holdable;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;
use crate::stream::{ShardId, stream_label};

/// Why a range is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DoubtCause {
    /// A write left and got no complete answer in time.
    Unanswered,
    /// The lease was taken from an owner that had not released it.
    NotReleased,
}

impl DoubtCause {
    /// The name in rows, metrics and messages.
    pub const fn label(self) -> &'static str {
        match self {
            DoubtCause::Unanswered => "unanswered",
            DoubtCause::NotReleased => "not-released",
        }
    }
}

/// `doubt#<epoch>#<table>#<stream label>#<shard id>#<nonce>`: a range of a shard whose writes may
/// take effect until `until`. Every key of it is repaired once that has passed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DoubtRow {
    /// Hash key.
    pub lease_key: String,
    /// `doubt`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Epoch it belongs to.
    pub epoch: u64,
    /// The table, by its name in the configuration.
    pub table: String,
    /// The stream.
    pub stream_arn: String,
    /// The shard.
    pub shard_id: String,
    /// Why.
    pub cause: DoubtCause,
    /// The range begins after this sequence number, or at this sentinel.
    pub from: String,
    /// Where `AT_TIMESTAMP` begins, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<i64>,
    /// The last sequence number of the range; absent where only a time is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Records made later than this, by the source's clock in milliseconds, are outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_time: Option<i64>,
    /// From when on it may be repaired, by the replica region's clock, in milliseconds: no write in
    /// doubt takes effect after it, and no earlier repair's does.
    pub until: i64,
    /// When it first came due, by the same clock. Claims move `until` and never this, so that a
    /// doubt nobody can repair shows as overdue.
    pub due: i64,
    /// Who repairs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// Grows with every update.
    pub lease_counter: u64,
    /// When it was noticed, RFC 3339.
    pub at: String,
    /// Before which moment of the source all of the shard was applied when it was noticed, in milliseconds;
    /// absent where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_until: Option<i64>,
}

impl DoubtRow {
    /// Where the range begins. `None` where this version cannot read it.
    pub fn position(&self) -> Option<Position> {
        match self.from.as_str() {
            super::TRIM_HORIZON => Some(Position::TrimHorizon),
            super::AT_TIMESTAMP => self.start_timestamp.map(Position::AtTimestamp),
            number => SequenceNumber::parse(number).map(Position::After),
        }
    }

    /// The shard's id.
    pub fn shard(&self) -> ShardId {
        ShardId(self.shard_id.clone())
    }

    /// Sets where the range begins.
    pub fn set_position(&mut self, position: &Position) {
        match position {
            Position::TrimHorizon => super::TRIM_HORIZON.clone_into(&mut self.from),
            Position::AtTimestamp(ms) => {
                super::AT_TIMESTAMP.clone_into(&mut self.from);
                self.start_timestamp = Some(*ms);
            }
            Position::After(sequence) => sequence.as_str().clone_into(&mut self.from),
        }
    }

    /// A doubt about the range of `shard` that begins at `from`. Its end is still to be set.
    #[allow(clippy::too_many_arguments, reason = "a row has this many parts")]
    pub fn new(
        epoch: u64,
        table: &str,
        stream_arn: &str,
        shard: &ShardId,
        cause: DoubtCause,
        from: &Position,
        until: i64,
        at: String,
    ) -> Self {
        let nonce: u64 = rand::random();
        let label = stream_label(stream_arn);
        let mut row = Self {
            lease_key: format!("doubt#{epoch}#{table}#{label}#{shard}#{nonce:016x}"),
            entity_type: "doubt".to_owned(),
            format_version: FORMAT_VERSION,
            epoch,
            table: table.to_owned(),
            stream_arn: stream_arn.to_owned(),
            shard_id: shard.0.clone(),
            cause,
            from: String::new(),
            start_timestamp: None,
            to: None,
            to_time: None,
            until,
            due: until,
            lease_owner: None,
            lease_counter: 0,
            at,
            applied_until: None,
        };
        row.set_position(from);
        row
    }
}

impl Holdable for DoubtRow {
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

impl Counted for DoubtRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
