//! The configuration: types, defaults with their reasons, validation.
//!
//! One file describes a group of tables and is deployed unchanged in every region (DESIGN
//! section 2). [`keys`] lists every key once; [`read`] turns a file plus `FARSHORE_…` variables
//! into a [`Config`], or into an error that names the dotted field and its line.

pub mod actions;
pub mod keys;
pub mod read;
mod reconcile;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use aws_smithy_types::DateTime;
use aws_smithy_types::date_time::Format;
use bytesize::ByteSize;
use serde::{Deserialize, Deserializer};

pub use actions::Action;
pub use reconcile::{Audit, MaxDeletes, OnGap, Reconcile};

/// The value of `endpoint_url` that asks for a DynamoDB inside this process.
pub const EMBEDDED: &str = "embedded";

/// A group of tables that fail over together, and how its worker behaves.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Config {
    /// Names the group; part of the state table's name.
    pub group: String,
    /// Label of the active region until a control record exists.
    pub active: String,
    /// Label (or region name) of the region this process feeds; the default is `AWS_REGION`.
    pub here: Option<String>,
    /// The regions of the group, by label.
    #[serde(default)]
    pub regions: BTreeMap<String, Region>,
    /// The tables of the group.
    #[serde(default)]
    pub tables: Vec<Table>,
    /// The worker process.
    #[serde(default)]
    pub worker: Worker,
    /// Ownership of shards.
    #[serde(default)]
    pub leases: Leases,
    /// Writing to replicas.
    #[serde(default)]
    pub writes: Writes,
    /// Where records go that a replica can never take.
    #[serde(default)]
    pub dead_letters: DeadLetters,
    /// Comparing tables.
    #[serde(default)]
    pub reconcile: Reconcile,
    /// Comparing them all the time.
    #[serde(default)]
    pub audit: Audit,
    /// What happens after the fence of a failover, in order.
    #[serde(default, deserialize_with = "actions::deserialize")]
    pub actions: Vec<Action>,
}

/// How a region is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Region {
    /// AWS region name; the label by default.
    pub region: Option<String>,
    /// Endpoint of DynamoDB and its streams; `embedded` starts one in this process.
    pub endpoint_url: Option<String>,
    /// Endpoint of the streams where it differs (PrivateLink has no private DNS for them).
    pub streams_endpoint_url: Option<String>,
    /// Profile of the shared credentials file.
    pub profile: Option<String>,
    /// Role to assume for this region (another account).
    pub role_arn: Option<String>,
    /// External id to present when assuming the role.
    pub external_id: Option<String>,
}

impl Region {
    /// Whether this region is served from inside the process.
    pub fn is_embedded(&self) -> bool {
        self.endpoint_url.as_deref() == Some(EMBEDDED)
    }
}

/// A replicated table.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Table {
    /// Its name, in every region that `names` does not list.
    pub name: String,
    /// Its name in single regions, by label.
    #[serde(default)]
    pub names: BTreeMap<String, String>,
    /// Where the first run starts reading. Later runs go on from their checkpoints.
    #[serde(default)]
    pub start: Start,
    /// Whether the first run copies what the source already holds.
    #[serde(default = "yes")]
    pub bootstrap: bool,
    /// What happens to deletes made by TTL.
    #[serde(default)]
    pub ttl_deletes: TtlDeletes,
    /// Overrides `writes.units_per_second` for this table.
    pub units_per_second: Option<u32>,
    /// Overrides `writes.coalesce` for this table.
    pub coalesce: Option<bool>,
}

impl Table {
    /// The table's name in the region `label`.
    pub fn name_in(&self, label: &str) -> &str {
        self.names.get(label).unwrap_or(&self.name)
    }
}

/// Where the first run of a table starts in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Start {
    /// The oldest record the stream still holds.
    #[default]
    TrimHorizon,
    /// The moment of the first run, resolved once by the source's clock and stored.
    Latest,
    /// Records created at or after this time.
    At(DateTime),
}

impl<'de> Deserialize<'de> for Start {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.as_str() {
            "trim-horizon" => Ok(Start::TrimHorizon),
            "latest" => Ok(Start::Latest),
            time => DateTime::from_str(time, Format::DateTimeWithOffset)
                .map(Start::At)
                .map_err(|_| {
                    serde::de::Error::custom(format!(
                        "`{time}` is neither \"trim-horizon\", \"latest\" nor a time like \"2026-11-20T12:00:00Z\""
                    ))
                }),
        }
    }
}

/// What happens to deletes that TTL made in the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TtlDeletes {
    /// They are applied like any delete.
    #[default]
    Replicate,
    /// They are left out; the replica keeps expired items.
    Skip,
}

/// The worker process.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Worker {
    /// Address of metrics and health.
    pub listen: SocketAddr,
    /// Pause between reads of a shard while records come.
    #[serde(deserialize_with = "duration")]
    pub poll_interval: Duration,
    /// Longest pause between reads of an idle shard.
    #[serde(deserialize_with = "duration")]
    pub idle_interval: Duration,
    /// Batches in flight per shard, at most.
    pub concurrency: usize,
    /// Bytes of records that the worker holds ahead of what is durable.
    pub read_ahead: ByteSize,
    /// Least time between checkpoints of a shard.
    #[serde(deserialize_with = "duration")]
    pub checkpoint_every: Duration,
    /// Time between complete listings of a stream's shards.
    #[serde(deserialize_with = "duration")]
    pub discover_every: Duration,
    /// Time to drain after SIGTERM or Ctrl-C.
    #[serde(deserialize_with = "duration")]
    pub shutdown_grace: Duration,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            // Loopback: metrics name tables; who wants them outside says so.
            listen: SocketAddr::from(([127, 0, 0, 1], 9464)),
            // Lambda polls four times a second; no reader is known to be refused at that rate.
            poll_interval: Duration::from_millis(250),
            // An idle shard costs one call a second; GetRecords is billed by the call.
            idle_interval: Duration::from_secs(1),
            // Thirty-two calls of 25 write 8,000 items a second over 100 ms of distance.
            concurrency: 32,
            // A hundred shards at work hold pages of 250 small items each; the process stays below 256 MB.
            read_ahead: ByteSize::mib(64),
            // What a crash replays; each checkpoint is a conditional write.
            checkpoint_every: Duration::from_secs(1),
            // Children are asked for when their parent ends; this finds only what that missed.
            discover_every: Duration::from_secs(30),
            // ECS and Kubernetes kill 30 s after SIGTERM.
            shutdown_grace: Duration::from_secs(25),
        }
    }
}

/// Ownership of shards.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Leases {
    /// Name of the state table; `farshore-<group>` by default.
    pub table: Option<String>,
    /// How long a lease outlives its last renewal.
    #[serde(deserialize_with = "duration")]
    pub duration: Duration,
    /// How long a write that got no answer may still take effect.
    #[serde(deserialize_with = "duration")]
    pub late_effect: Duration,
}

impl Default for Leases {
    fn default() -> Self {
        Self {
            table: None,
            // A dead worker's shards wait this long; a renewal (a third of it) may fail twice.
            duration: Duration::from_secs(10),
            // AWS refuses a request some five minutes after the date it was signed with; one more
            // for clocks that differ.
            late_effect: Duration::from_secs(6 * 60),
        }
    }
}

/// Writing to replicas.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Writes {
    /// Write units per second and table, for the whole fleet; 0 means no limit.
    pub units_per_second: u32,
    /// Whether throttling slows the writes.
    pub adaptive: bool,
    /// Whether of several changes of one item only the last is written.
    pub coalesce: bool,
}

impl Default for Writes {
    fn default() -> Self {
        Self {
            // What a new on-demand table takes without throttling.
            units_per_second: 4_000,
            // What is refused was sent in vain, and costs the replica a call all the same.
            adaptive: true,
            coalesce: true,
        }
    }
}

/// Where records go that a replica can never take.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct DeadLetters {
    /// URL of an SQS queue in the replica region.
    pub queue_url: Option<String>,
    /// Endpoint of SQS where it is not the origin of `queue_url`.
    pub endpoint_url: Option<String>,
    /// A directory of JSON lines on this host.
    pub directory: Option<PathBuf>,
    /// How often a record is tried alone before it counts as poison.
    pub max_attempts: u32,
    /// More records refused in a minute halt their table; 0 halts none.
    pub halt_after: u32,
}

impl Default for DeadLetters {
    fn default() -> Self {
        Self {
            queue_url: None,
            endpoint_url: None,
            directory: None,
            // A refusal of the data does not pass by itself; two more tries rule out a schema
            // change under way.
            max_attempts: 3,
            // A thousand letters can still be looked at; more in a minute are a schema.
            halt_after: 1_000,
        }
    }
}

impl Config {
    /// Name of the group's state table.
    pub fn state_table(&self) -> String {
        self.leases
            .table
            .clone()
            .unwrap_or_else(|| format!("farshore-{}", self.group))
    }

    /// Name of the table in which a region keeps what the way home needs.
    pub fn failback_table(&self) -> String {
        format!("{}-failback", self.state_table())
    }

    /// The write limit of `table` in units per second; `None` means no limit.
    pub fn units_per_second(&self, table: &Table) -> Option<u32> {
        match table
            .units_per_second
            .unwrap_or(self.writes.units_per_second)
        {
            0 => None,
            units => Some(units),
        }
    }

    /// Whether changes of `table` are coalesced.
    pub fn coalesces(&self, table: &Table) -> bool {
        table.coalesce.unwrap_or(self.writes.coalesce)
    }

    /// The AWS region name of the region `label`.
    pub fn region_name<'a>(&'a self, label: &'a str) -> &'a str {
        self.regions
            .get(label)
            .and_then(|region| region.region.as_deref())
            .unwrap_or(label)
    }

    /// Whether any region lives inside this process.
    pub fn has_embedded_region(&self) -> bool {
        self.regions.values().any(Region::is_embedded)
    }
}

const fn yes() -> bool {
    true
}

/// Reads `"250ms"`, `"10s"`, `"6m"`: a number without a unit is refused.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        serde::de::Error::custom(format!(
            "`{text}` is no duration like \"250ms\", \"10s\" or \"6m\": {error}"
        ))
    })
}
