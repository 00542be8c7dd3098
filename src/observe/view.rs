//! What `/status` and `farshore status --json` answer: one shape, documented in `docs/SEEING.md` and held
//! by a snapshot.
//!
//! Times are RFC 3339 in UTC with milliseconds, durations are seconds. What is absent is not known; of a
//! recovery point that means infinitely old, unless it says otherwise.

pub mod build;
mod home;
pub mod merge;
pub mod reasons;

pub(crate) use home::homeward;

use serde::{Deserialize, Serialize};

use super::health::Reason;

/// Version of the shape. Fields may be added to it; a change of meaning makes another version.
pub const VERSION: u32 = 1;

/// All that there is to see of a group from one region.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// [`VERSION`].
    pub version: u32,
    /// The group.
    pub group: String,
    /// Label of the region that this is seen from.
    pub here: String,
    /// Label of the active region.
    pub active: Option<String>,
    /// Number of the epoch.
    pub epoch: Option<u64>,
    /// Now, by the clock of the source where it was heard of, else by that of the replica's region.
    pub at: String,
    /// Whose clock that is.
    pub clock: ClockOf,
    /// How far that clock may be off, in seconds. The proven ages below include it.
    pub clock_error_seconds: f64,
    /// The worker that answers; absent where only the state table does.
    pub worker: Option<Answering>,
    /// The worst that there is, in one sentence.
    pub headline: Headline,
    /// Of the group: that of its worst table.
    pub recovery_point: RecoveryPoint,
    /// Seconds until the first stream forgets a record that may not be applied.
    pub headroom_seconds: Option<f64>,
    /// The regions of the configuration.
    pub regions: Vec<Region>,
    /// Regions that were active and are no whole replicas yet.
    #[serde(default)]
    pub home: Vec<Homeward>,
    /// Which way the data flows; absent where nothing is fed from here.
    pub flow: Option<Flow>,
    /// The tables of the configuration.
    pub tables: Vec<Table>,
    /// Shards that are open, and those that were finished within the last hour.
    pub shards: Vec<Shard>,
    /// Processes of the fleet, dead ones for a while as well.
    pub workers: Vec<Worker>,
    /// Records that were never applied.
    pub gaps: Vec<Gap>,
    /// Ranges whose writes may still take effect, by table.
    pub doubts: Vec<Doubts>,
    /// What the replica refused.
    pub dead_letters: DeadLetters,
    /// Copies, repairs and comparisons.
    pub jobs: Vec<Job>,
    /// Closed taps.
    pub pauses: Vec<Pause>,
    /// What does not answer, or refuses.
    pub outages: Vec<Outage>,
    /// Why the worker is not ready: those of `/readyz`, or what the state table alone shows of them.
    pub reasons: Vec<Reason>,
    /// What changed, newest first, as this process saw it.
    pub events: Vec<Event>,
    /// The last hour, as this process saw it.
    pub history: Option<History>,
}

/// Whose clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockOf {
    /// The source's.
    Source,
    /// That of the replica's region: the source was not heard.
    Replica,
    /// This host's: no region was heard.
    Host,
}

/// The worker that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answering {
    /// Its process start.
    pub id: String,
    /// Version of Farshore it runs.
    pub version: String,
    /// When it started.
    pub since: String,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing is the matter.
    Ok,
    /// Something goes on that ends by itself.
    Busy,
    /// A person should know.
    Warn,
    /// A person has to act, or the replica falls behind.
    Bad,
}

/// One sentence for a person who has just woken up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Headline {
    /// How bad it is.
    pub level: Level,
    /// What it is, for machines.
    pub code: String,
    /// What it is, for people.
    pub text: String,
    /// What to do, where there is something to do.
    pub next: Option<String>,
}

/// How old the moment is up to which every change is known to be in the replica.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryPoint {
    /// By records and shard ends alone. Absent: infinitely old.
    pub proven_seconds: Option<f64>,
    /// Also by empty pages. Absent: infinitely old.
    pub estimated_seconds: Option<f64>,
}

/// What a region is to this one's replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionRole {
    /// The application writes there.
    Active,
    /// It is fed from the active one, and this is it.
    Replica,
    /// It was active, and may hold writes that never left it: nobody writes there.
    Quarantined,
    /// Any other.
    Other,
}

/// Whether a region answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionState {
    /// It does.
    Ok,
    /// It does not.
    Unreachable,
    /// It answers that it is asked too much.
    Throttled,
    /// It refuses what it is asked: a permission, a key, a missing table.
    Refused,
    /// Nobody asked.
    Unknown,
}

/// A region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Region {
    /// Its label.
    pub label: String,
    /// What it is to the replicas here.
    pub role: RegionRole,
    /// Whether it answers.
    pub state: RegionState,
    /// Since when not.
    pub since: Option<String>,
    /// What it answers.
    pub text: Option<String>,
}

/// Which way the data flows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// Label of the active region.
    pub source: String,
    /// Label of the region fed.
    pub target: String,
}

/// A table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Table {
    /// Its name in the configuration.
    pub name: String,
    /// Its name in the active region.
    pub source: String,
    /// Its name in the region fed.
    pub target: String,
    /// Of this table.
    pub recovery_point: RecoveryPoint,
    /// Seconds until its stream forgets a record that may not be applied.
    pub headroom_seconds: Option<f64>,
    /// Seconds that the oldest record has waited that was read and is not applied, in this process.
    pub iterator_age_seconds: Option<f64>,
    /// The largest lag of a record applied within the last minute, in seconds.
    pub lag_seconds: Option<f64>,
    /// Its shards.
    pub shards: ShardCounts,
    /// Its tap, where that is closed.
    pub paused: Option<Closed>,
    /// Its first copy, while that goes on.
    pub copying: Option<Copying>,
    /// Its ranges in doubt.
    pub doubts: usize,
    /// Its gaps.
    pub gaps: usize,
    /// Whether an audit compares it.
    pub audited: bool,
    /// When that last found it equal.
    pub verified_at: Option<String>,
    /// Items that the audit finds to differ.
    pub drift: u64,
    /// Records of it applied by this process since it started.
    pub records_total: Option<u64>,
    /// Records of it sent to the dead letters by this process since it started: they are not in the replica.
    pub dead_letters_total: Option<u64>,
}

/// How many shards a table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShardCounts {
    /// Not applied to their end.
    pub open: usize,
    /// Applied to their end, and still in the state table.
    pub finished: usize,
    /// Open ones that could be read and have no living owner.
    pub unowned: usize,
}

/// A closed tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Closed {
    /// Who closed it.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When.
    pub at: String,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Copying {
    /// Percent of the items, about.
    pub percent: u32,
    /// Seconds left, about, at its pace so far.
    pub left_seconds: Option<u64>,
}

/// What a shard waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShardState {
    /// Nothing: it is read, or could be.
    Open,
    /// Its parent, or an older stream, is not applied to its end yet.
    WaitsForParent,
    /// It is applied to its end.
    Finished,
}

/// A shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shard {
    /// Its table.
    pub table: String,
    /// Its id.
    pub shard: String,
    /// Label of its stream.
    pub stream: String,
    /// Who owns it.
    pub owner: Option<String>,
    /// Whether the owner has written its row lately.
    pub alive: bool,
    /// Seconds since it has, if that is too long.
    pub owner_silent_seconds: Option<i64>,
    /// Its checkpoint: a sequence number or a sentinel.
    pub position: String,
    /// The moment of the source before which all is applied, empty pages counted.
    pub applied_until: Option<String>,
    /// The same, by records and shard ends alone.
    pub proven_until: Option<String>,
    /// Seconds since `provenUntil`, the clock's error included.
    pub age_seconds: Option<f64>,
    /// Seconds until the stream forgets its oldest record that may not be applied.
    pub headroom_seconds: Option<f64>,
    /// What it waits for.
    pub state: ShardState,
}

/// A process of the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Its process start.
    pub id: String,
    /// Version of Farshore it runs.
    pub version: String,
    /// The epoch it works in.
    pub epoch: u64,
    /// When it started.
    pub since: String,
    /// Open shards it owns.
    pub shards: usize,
    /// Whether it has written its row lately.
    pub alive: bool,
    /// Whether it was asked to stop.
    pub leaving: bool,
    /// When it last wrote its row.
    pub updated_at: String,
}

/// What does not answer, or refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outage {
    /// `source`, `replica`, `state`, `dead-letters`.
    pub scope: String,
    /// The table, where it is one table's.
    pub table: Option<String>,
    /// Label of the region.
    pub region: String,
    /// Since when.
    pub since: String,
    /// The class of the failure.
    pub class: String,
    /// What the failure is.
    pub text: String,
    /// What to do.
    pub next: String,
}

/// Records that were never applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gap {
    /// The table.
    pub table: String,
    /// Why.
    pub reason: String,
    /// Where: stream and shard, where it is one shard's.
    pub detail: String,
    /// When it was noticed.
    pub at: String,
    /// The moment of the source before which all was applied; absent where nobody knows.
    pub applied_until: Option<String>,
    /// What to do.
    pub next: String,
}

/// The doubts of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Doubts {
    /// The table.
    pub table: String,
    /// How many.
    pub open: usize,
    /// When the last of them is due.
    pub until: String,
    /// How many should have been repaired ten minutes ago.
    pub overdue: usize,
}

/// What the replica refused.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetters {
    /// How many wait in the queue.
    pub waiting: Option<u64>,
    /// Seconds until the queue forgets the oldest; absent while none waits.
    pub oldest_seconds_left: Option<f64>,
    /// From when on `byReason` counts: the start of this process.
    pub since: Option<String>,
    /// Letters that this process sent.
    pub by_reason: Vec<Refused>,
}

/// Letters of one table and one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// The table.
    pub table: String,
    /// The class of the refusal.
    pub class: String,
    /// How many.
    pub count: u64,
}

/// A comparison, copy or repair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    /// `reconcile`, `bootstrap`, `gap-repair`.
    pub kind: String,
    /// Its name.
    pub id: String,
    /// The table.
    pub table: String,
    /// Label of the region that is right.
    pub source: String,
    /// Label of the region that is made so.
    pub target: String,
    /// Whether it repairs.
    pub applies: bool,
    /// Percent of the items read, about.
    pub percent: u32,
    /// Seconds left, about, at its pace so far.
    pub seconds_left: Option<u64>,
    /// Processes at work.
    pub processes: usize,
    /// Differences found so far.
    pub different: u64,
    /// Whether somebody is at it.
    pub alive: bool,
    /// Whether its own work is done.
    pub ended: bool,
    /// Items only in the target, more than it may delete by itself.
    pub deletes_outstanding: Option<u64>,
    /// How many it may delete by itself, where that is not enough.
    pub deletes_allowed: Option<u64>,
}

/// A closed tap, and whose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pause {
    /// The table; absent for all.
    pub table: Option<String>,
    /// Who closed it.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When.
    pub at: String,
}

/// How bad an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventLevel {
    /// Not at all.
    Info,
    /// A person should know.
    Warn,
    /// A person has to act.
    Error,
}

/// A change of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When, by this host's clock.
    pub at: String,
    /// How bad it is.
    pub level: EventLevel,
    /// The table, where it is one table's.
    pub table: Option<String>,
    /// What: the line of the log.
    pub text: String,
}

/// How it was, at even steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct History {
    /// Seconds between two points.
    pub step_seconds: u64,
    /// Oldest first.
    pub points: Vec<Point>,
}

/// How it was over one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Point {
    /// When the step ended.
    pub at: String,
    /// The largest lag of a record applied within it, in seconds; absent where none was.
    pub lag_seconds: Option<f64>,
    /// Records applied a second.
    pub records_per_second: f64,
    /// The proven recovery point of the group at its end; absent: infinitely old.
    pub proven_seconds: Option<f64>,
    /// The estimated one.
    pub estimated_seconds: Option<f64>,
}

/// A region on its way home.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Homeward {
    /// Its label.
    pub region: String,
    /// `quarantined`, `judged`, `turned` or `equal`.
    pub stage: String,
    /// When the last step was done, RFC 3339; absent where none is.
    pub since: Option<String>,
    /// Up to when what is stranded there is captured, RFC 3339; seen from that region alone.
    pub captured_until: Option<String>,
    /// Records that were captured, about; seen from that region alone.
    pub captured_records: Option<u64>,
    /// One sentence.
    pub text: String,
    /// What to do.
    pub next: String,
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod tests;
