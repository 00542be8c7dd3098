//! The row of a gap (tenet 11): records that were never applied.

use serde::{Deserialize, Serialize};

use super::{Counted, FORMAT_VERSION};

/// Why records were never applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GapReason {
    /// The source held items before the first lease, and nobody copied them: `bootstrap = false`.
    NeverCopied,
    /// The stream forgot records before they were read.
    Trimmed,
    /// The table's stream was re-created.
    StreamRecreated,
    /// A shard that was being read is gone before its end.
    ShardVanished,
    /// Another region is the source now: what the replica holds was made of the one before.
    SourceSwitched,
    /// A repair of the table did not come to its end: what it wrote last may be older than what was
    /// there. Told by the job's own row, and never stored as a gap.
    ReconcileUnfinished,
    /// The audit found items that differ. Told by its own row, and never stored as a gap.
    Drift,
}

impl GapReason {
    /// Every one.
    pub const ALL: [Self; 7] = [
        Self::NeverCopied,
        Self::Trimmed,
        Self::StreamRecreated,
        Self::ShardVanished,
        Self::SourceSwitched,
        Self::ReconcileUnfinished,
        Self::Drift,
    ];

    /// The name in rows, metrics and messages.
    pub const fn label(self) -> &'static str {
        match self {
            GapReason::NeverCopied => "never-copied",
            GapReason::Trimmed => "trimmed",
            GapReason::StreamRecreated => "stream-recreated",
            GapReason::ShardVanished => "shard-vanished",
            GapReason::SourceSwitched => "source-switched",
            GapReason::ReconcileUnfinished => "reconcile-unfinished",
            GapReason::Drift => "drift",
        }
    }

    /// What a person does about it where nobody repairs it: one sentence, without its full stop.
    pub const fn next_step(self) -> &'static str {
        match self {
            GapReason::NeverCopied => {
                "Copy what the source table held before replication began with `farshore reconcile --apply`, which closes the gap"
            }
            GapReason::Trimmed
            | GapReason::StreamRecreated
            | GapReason::ShardVanished
            | GapReason::SourceSwitched => {
                "Mend what differs with `farshore reconcile --apply`, which closes the gap"
            }
            GapReason::ReconcileUnfinished => {
                "Run the same `farshore reconcile --apply` again, to its end"
            }
            GapReason::Drift => {
                "See what differs with `farshore reconcile --report FILE`, find out who writes to the replica, and mend it with `farshore reconcile --apply`"
            }
        }
    }

    /// Whether a worker may repair it by itself. What nobody wanted copied, nobody copies.
    pub const fn is_repaired_by_itself(self) -> bool {
        match self {
            GapReason::Trimmed
            | GapReason::StreamRecreated
            | GapReason::ShardVanished
            | GapReason::SourceSwitched => true,
            GapReason::NeverCopied | GapReason::ReconcileUnfinished | GapReason::Drift => false,
        }
    }
}

/// `gap#<epoch>#<table>#<reason>…`: records that were never applied, until a comparison that began
/// after them has found or made the tables equal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GapRow {
    /// Hash key.
    pub lease_key: String,
    /// `gap`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Epoch it belongs to.
    #[serde(default)]
    pub epoch: u64,
    /// The table, by its name in the configuration.
    pub table: String,
    /// Why.
    pub reason: GapReason,
    /// Stream and shard, where it is one shard's.
    pub detail: String,
    /// When it was noticed first, RFC 3339.
    pub at: String,
    /// When it was found last, by the source's clock, in milliseconds. Grows with each time.
    #[serde(default)]
    pub found_at: i64,
    /// Grows with each time that it is found: who repairs an earlier one does not close a later one.
    #[serde(default)]
    pub lease_counter: u64,
    /// Key of the shard row that has to be read anew (`restartedAt` no less than `foundAt`), or to be
    /// finished, before it may be repaired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaits: Option<String>,
    /// Before which moment of the source all was applied when it was found, in milliseconds; absent where
    /// nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_until: Option<i64>,
}

impl GapRow {
    /// A gap of `table`; `detail` names stream and shard and makes the key its own.
    pub fn new(epoch: u64, table: &str, reason: GapReason, detail: &str, at: String) -> Self {
        let label = reason.label();
        Self {
            lease_key: format!("gap#{epoch}#{table}#{label}#{detail}"),
            entity_type: "gap".to_owned(),
            format_version: FORMAT_VERSION,
            epoch,
            table: table.to_owned(),
            reason,
            detail: detail.to_owned(),
            at,
            found_at: 0,
            lease_counter: 0,
            awaits: None,
            applied_until: None,
        }
    }

    /// The same, found at `found_ms`. Its counter begins there, so that who repairs one of the same name
    /// that was closed before does not close this one.
    #[must_use]
    pub fn found(self, found_ms: i64) -> Self {
        Self {
            found_at: found_ms,
            lease_counter: u64::try_from(found_ms).unwrap_or_default(),
            ..self
        }
    }

    /// The same, where all made before `ms` of the source was applied when it was found.
    #[must_use]
    pub fn applied_until(self, ms: Option<i64>) -> Self {
        Self {
            applied_until: ms,
            ..self
        }
    }

    /// The same, in the shard whose row has this key.
    #[must_use]
    pub fn awaiting(self, shard: String) -> Self {
        Self {
            awaits: Some(shard),
            ..self
        }
    }

    /// The row once the gap `found` is found again where `self` stands already.
    #[must_use]
    pub fn found_again(&self, found: &Self) -> Self {
        Self {
            at: self.at.clone(),
            found_at: found.found_at.max(self.found_at + 1),
            lease_counter: self.lease_counter + 1,
            // The older of both, and nobody knows if one of them does not.
            applied_until: self.applied_until.min(found.applied_until),
            ..found.clone()
        }
    }
}

impl Counted for GapRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
