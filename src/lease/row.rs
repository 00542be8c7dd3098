//! The rows of the state table (DESIGN section 4), read and written through `serde_dynamo`.

mod budget;
mod control;
mod doubt;
mod fleet;
mod gap;
mod job;
mod reconcile;
mod track;
mod ttl;
mod undo;

use serde::{Deserialize, Serialize};

pub use budget::{BUDGET_KEY, BudgetRow, Holding, Share};
pub use control::{ActionRun, ControlRow, PAST_MAX, Previous, StepDone, state};
pub use doubt::{DoubtCause, DoubtRow};
pub use fleet::{PauseRow, Resumed, WorkerRow};
pub use gap::{GapReason, GapRow};
pub use job::JobRow;
pub use reconcile::{
    Closes, HowFar, JobKind, Mark, Mending, Progress, ReconcileRow, SegmentRow, audited,
    comparison_rows, comparisons,
};
pub use track::{Places, Track, TrackRow, past_doubt};
pub use ttl::TtlRow;
pub use undo::{SentUndo, UndoRow, print_of};

use crate::stream::ShardId;
use crate::stream::lineage::Tracked;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

/// Version of the rows this binary writes. It refuses rows of a higher one.
pub const FORMAT_VERSION: u32 = 1;
/// Hash key of the state table.
pub const KEY_ATTRIBUTE: &str = "leaseKey";
/// Key of the control record.
pub const CONTROL_KEY: &str = "control";

/// KCL's sentinel for the oldest record.
pub const TRIM_HORIZON: &str = "TRIM_HORIZON";
/// KCL's sentinel for a start by time.
pub const AT_TIMESTAMP: &str = "AT_TIMESTAMP";
/// KCL's sentinel for a shard that was applied to its end.
pub const SHARD_END: &str = "SHARD_END";

/// What every row has. Read first, to tell what it is and whether it may be read at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// Hash key.
    pub lease_key: String,
    /// What kind of row it is.
    pub entity_type: String,
    /// Version of its form.
    pub format_version: u32,
}

/// A row that is only ever replaced on condition of its counter.
pub trait Counted: Serialize {
    /// The hash key.
    fn key(&self) -> &str;
    /// The counter, which only grows.
    fn counter(&self) -> u64;
}

impl Counted for ShardRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}

/// A row of the state table.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// A shard's lease and checkpoint.
    Shard(ShardRow),
    /// Where the first run of a stream started.
    Stream(StreamRow),
    /// Which region is active.
    Control(ControlRow),
    /// Records that were never applied.
    Gap(GapRow),
    /// A process of the fleet.
    Worker(WorkerRow),
    /// Records whose writes may still take effect.
    Doubt(DoubtRow),
    /// A closed tap.
    Pause(PauseRow),
    /// A one-shot job at work.
    Job(JobRow),
    /// A comparison of two tables.
    Reconcile(ReconcileRow),
    /// A part of one.
    Segment(SegmentRow),
    /// Who may spend how much of the write budgets.
    Budget(BudgetRow),
    /// What a source table expires.
    Ttl(TtlRow),
    /// A doubt of an epoch that is over.
    PastDoubt(DoubtRow),
    /// How far what is stranded in this region was captured.
    Capture(TrackRow),
    /// How far the ledger of what this region wrote was read.
    Ledger(TrackRow),
    /// What was sent to take late writes of a key back.
    Undo(UndoRow),
    /// A kind this version does not use.
    Other(Head),
}

/// `shard#<epoch>#<table>#<stream label>#<shard id>`: one shard's lease, with KCL's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShardRow {
    /// Hash key.
    pub lease_key: String,
    /// `shard`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// Epoch the lease belongs to.
    pub epoch: u64,
    /// The table, by its name in the configuration.
    pub table: String,
    /// The stream the shard belongs to.
    pub stream_arn: String,
    /// The shard.
    pub shard_id: String,
    /// Owner with the nonce of its process start; absent after a release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// Grows with every update and never falls: all updates are conditional on it.
    pub lease_counter: u64,
    /// Last sequence number that is durable, with all before it, or a sentinel.
    pub checkpoint: String,
    /// Where `AT_TIMESTAMP` starts, in milliseconds since the epoch; kept afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<i64>,
    /// The shard it came from.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub parent_shard_id: Vec<String>,
    /// The shards that came from it, known once it has ended.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub child_shard_ids: Vec<String>,
    /// How often the owner changed since the checkpoint moved.
    pub owner_switches_since_checkpoint: u64,
    /// Up to which moment of the source everything in the shard is applied, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watermark: Option<i64>,
    /// Before which moment of the source every change of the shard is proven to be applied, in milliseconds.
    /// By records alone, and none after the checkpoint: it stays true whoever dies. It only grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven_until: Option<i64>,
    /// Seconds until the stream forgets the oldest record not applied, when last written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headroom: Option<i64>,
    /// When the row was last written by its owner, in milliseconds; for people, never for rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<i64>,
    /// When the row was made, by the source's clock, in milliseconds since the epoch.
    #[serde(default)]
    pub created_at: i64,
    /// Its position was lost, and it is read anew from the oldest record: what was read before is
    /// durable. The `foundAt` of the gap that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarted_at: Option<i64>,
    /// The last owner who got a page of it: its position was still there then, or a gap says that it was
    /// not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_by: Option<String>,
    /// When it was found to have ended, by the source's clock, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<i64>,
    /// Whether a complete listing that began long enough after its end showed no child without a row.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub children_listed: bool,
    /// The epoch that ended this lease's: nobody takes it any more, and the row stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<u64>,
    /// Who owned it then without having given it back: what it sent last may still take effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced_owner: Option<String>,
}

/// The id of the table that is followed, as the rows of its streams know it.
pub fn known_table_id<'a>(streams: &'a [StreamRow], epoch: u64, table: &str) -> Option<&'a str> {
    streams
        .iter()
        .filter(|row| row.is_of(epoch, table))
        .find_map(|row| row.table_id.as_deref())
}

/// A start that was never read for this long may have been trimmed in part: an hour less than the
/// 24 h that a stream remembers.
pub const UNREAD_LIMIT_MS: i64 = 23 * 60 * 60 * 1_000;

impl ShardRow {
    /// A row for a shard that nobody has read yet. `start` is where it begins.
    pub fn new(
        epoch: u64,
        table: &str,
        stream_arn: &str,
        shard: &ShardId,
        parent: Option<&ShardId>,
        start: &Position,
        now_ms: i64,
    ) -> Self {
        let (checkpoint, start_timestamp) = match start {
            Position::TrimHorizon => (TRIM_HORIZON.to_owned(), None),
            Position::AtTimestamp(ms) => (AT_TIMESTAMP.to_owned(), Some(*ms)),
            Position::After(sequence) => (sequence.as_str().to_owned(), None),
        };
        Self {
            lease_key: shard_key(epoch, table, stream_arn, shard),
            entity_type: "shard".to_owned(),
            format_version: FORMAT_VERSION,
            epoch,
            table: table.to_owned(),
            stream_arn: stream_arn.to_owned(),
            shard_id: shard.0.clone(),
            lease_owner: None,
            lease_counter: 0,
            checkpoint,
            start_timestamp,
            parent_shard_id: parent.map(|parent| parent.0.clone()).into_iter().collect(),
            child_shard_ids: Vec::new(),
            owner_switches_since_checkpoint: 0,
            watermark: None,
            proven_until: None,
            headroom: None,
            updated_at: None,
            created_at: now_ms,
            restarted_at: None,
            read_by: None,
            finished_at: None,
            children_listed: false,
            fenced: None,
            fenced_owner: None,
        }
    }

    /// The last moment of the source, in milliseconds, at which nothing of the shard can have been
    /// trimmed unread without a gap that says so: its watermark, or when the row was made, or when
    /// it was read anew.
    pub fn proven_ms(&self) -> i64 {
        let known = [self.watermark, self.restarted_at];
        let last = known.into_iter().flatten().max();
        last.unwrap_or(self.created_at).max(self.created_at)
    }

    /// Who may have sent something under it that is not known to be durable: its owner, or who owned it
    /// when its epoch ended.
    pub fn holder(&self) -> Option<&str> {
        let holder = self.lease_owner.as_ref().or(self.fenced_owner.as_ref());
        holder.map(String::as_str)
    }

    /// The same row once the epoch `by` has ended its own: its counter moves, so that no renewal of its
    /// owner succeeds, and nobody takes it any more.
    #[must_use]
    pub fn fenced_by(&self, by: u64) -> Self {
        let mut row = self.clone();
        row.fenced = Some(by);
        row.fenced_owner = row.lease_owner.take().or(row.fenced_owner);
        row.lease_counter += 1;
        row
    }

    /// The shard's id.
    pub fn shard(&self) -> ShardId {
        ShardId(self.shard_id.clone())
    }

    /// Whether its owner has got a page of it.
    pub fn is_read(&self) -> bool {
        self.lease_owner.is_some() && self.read_by == self.lease_owner
    }

    /// Whether the shard was applied to its end.
    pub fn is_finished(&self) -> bool {
        self.checkpoint == SHARD_END
    }

    /// Where to read on. `None` when finished or when the checkpoint is nothing this version
    /// understands.
    pub fn position(&self) -> Option<Position> {
        match self.checkpoint.as_str() {
            TRIM_HORIZON => Some(Position::TrimHorizon),
            AT_TIMESTAMP => self.start_timestamp.map(Position::AtTimestamp),
            SHARD_END => None,
            number => SequenceNumber::parse(number).map(Position::After),
        }
    }

    /// Everything up to `sequence` is durable. A row that says SHARD_END keeps saying so: the update
    /// that made it finished may have taken effect without an answer, and children may have started.
    pub fn checkpoint_at(&mut self, sequence: &SequenceNumber) {
        if self.is_finished() {
            return;
        }
        sequence.as_str().clone_into(&mut self.checkpoint);
        self.owner_switches_since_checkpoint = 0;
    }

    /// The position is lost, as the gap found at `found_ms` says: it is read anew from the oldest
    /// record. Everything read before is durable or in doubt.
    pub fn restart(&mut self, found_ms: i64) {
        if self.is_finished() {
            return;
        }
        TRIM_HORIZON.clone_into(&mut self.checkpoint);
        self.restarted_at = Some(found_ms);
        self.owner_switches_since_checkpoint = 0;
    }

    /// What the lineage rules need to know of it.
    pub fn tracked(&self) -> Tracked {
        Tracked {
            parent: self.parent_shard_id.first().cloned().map(ShardId),
            children: self.child_shard_ids.iter().cloned().map(ShardId).collect(),
            // Read anew after a gap, it was read before.
            started: self.restarted_at.is_some()
                || !matches!(self.checkpoint.as_str(), TRIM_HORIZON | AT_TIMESTAMP),
            finished: self.is_finished(),
        }
    }
}

/// Key of a shard's row.
pub fn shard_key(epoch: u64, table: &str, stream_arn: &str, shard: &ShardId) -> String {
    let label = crate::stream::stream_label(stream_arn);
    format!("shard#{epoch}#{table}#{label}#{shard}")
}

/// `stream#<epoch>#<table>#<stream label>`: where the first run of a stream started, resolved
/// once, so that a crash between its leases cannot make some of them start elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamRow {
    /// Hash key.
    pub lease_key: String,
    /// `stream`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The table, by its name in the configuration.
    pub table: String,
    /// The stream.
    pub stream_arn: String,
    /// Id of the source table: a re-created table has another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table_id: Option<String>,
    /// Start of the shards of the first listing, in milliseconds; absent for the oldest record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<i64>,
    /// Whether the shards of the first listing all have their rows. A shard found later starts
    /// at its beginning.
    pub initialised: bool,
    /// Whether a newer stream has taken its place and all its shards are finished: no row of it is
    /// made any more, and the newer stream's shards may be read.
    #[serde(default)]
    pub finished: bool,
    /// A moment of the source before anybody looked at what the table holds, in milliseconds: what was
    /// there until then is copied, or there was nothing, or a gap says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begun_at: Option<i64>,
    /// Whether a complete listing that began long enough after the first one showed no shard without a row.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub settled: bool,
}

impl StreamRow {
    /// Key of a stream's row.
    pub fn key(epoch: u64, table: &str, stream_arn: &str) -> String {
        let label = crate::stream::stream_label(stream_arn);
        format!("stream#{epoch}#{table}#{label}")
    }

    /// Whether it is a row of `table` in this epoch.
    pub fn is_of(&self, epoch: u64, table: &str) -> bool {
        self.table == table && self.lease_key == Self::key(epoch, table, &self.stream_arn)
    }

    /// Where the shards of the first listing start.
    pub fn start(&self) -> Position {
        match self.start_timestamp {
            Some(ms) => Position::AtTimestamp(ms),
            None => Position::TrimHorizon,
        }
    }
}
