//! The source side: which shards there are, in which order, and what they hold.
//!
//! [`lineage`] is pure and decides; [`listing`] and [`reader`] talk to the service; [`answer`] reads
//! what it answers, and [`change`] makes of a stream record a change of one item.

pub mod answer;
pub mod change;
pub mod lineage;
pub mod listing;
pub mod reader;
pub mod sequence;
pub mod succession;

use std::fmt;

/// The id of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub String);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A shard as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its id.
    pub id: ShardId,
    /// The shard it came from. It may name a shard that is already trimmed.
    pub parent: Option<ShardId>,
}

/// The label at the end of a stream ARN, which tells one stream of a table from another.
pub fn stream_label(arn: &str) -> &str {
    arn.rsplit('/').next().unwrap_or(arn)
}
