//! Listing the shards of a stream: paged, and paced below the service's limit.

use std::num::NonZeroU32;
use std::sync::Arc;

use aws_sdk_dynamodbstreams::Client;
use aws_sdk_dynamodbstreams::types::{
    ShardFilter, ShardFilterType, ShardIteratorType, StreamStatus, StreamViewType,
};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use super::{Shard, ShardId};
use crate::error::{Class, Fault, Operation, classify};

/// DescribeStream takes ten calls a second over all streams of an account; others call it, too.
/// The `unwrap` is evaluated by the compiler.
const CALLS_PER_SECOND: NonZeroU32 = NonZeroU32::new(8).unwrap();
/// A listing longer than this is not believed: 100,000 shards at 100 a page.
const PAGES_MAX: usize = 1_000;

/// A stream and its shards as one listing showed them.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The shards, in the order listed.
    pub shards: Vec<Shard>,
    /// What its records hold.
    pub view_type: Option<StreamViewType>,
    /// Whether it takes new records.
    pub enabled: bool,
}

/// Lists shards for all tables of a process at one shared pace.
#[derive(Clone)]
pub struct Lister {
    client: Client,
    pace: Arc<DefaultDirectRateLimiter>,
}

impl Lister {
    /// A lister over `client`. Clones share its pace.
    pub fn new(client: Client) -> Self {
        let quota = Quota::per_second(CALLS_PER_SECOND).allow_burst(NonZeroU32::MIN);
        Self {
            client,
            pace: Arc::new(RateLimiter::direct(quota)),
        }
    }

    /// Lists all shards of the stream `arn`. The result is complete as far as the service says
    /// so: it may still lack a shard.
    ///
    /// # Errors
    /// The fault of the first call that failed.
    pub async fn all(&self, arn: &str) -> Result<Listing, Fault> {
        self.list(arn, None).await
    }

    /// The children of the ended shard `parent`, as far as they are listed yet. Servers that do
    /// not know the filter list everything, so the answer is filtered here as well.
    ///
    /// # Errors
    /// The fault of the first call that failed.
    pub async fn children(&self, arn: &str, parent: &ShardId) -> Result<Vec<Shard>, Fault> {
        let filter = ShardFilter::builder()
            .r#type(ShardFilterType::ChildShards)
            .shard_id(&parent.0)
            .build();
        let listing = self.list(arn, Some(filter)).await?;
        Ok(listing
            .shards
            .into_iter()
            .filter(|shard| shard.parent.as_ref() == Some(parent))
            .collect())
    }

    /// Whether the service itself says that it does not know `shard` any more.
    ///
    /// # Errors
    /// Any other fault than "not found".
    pub async fn is_gone(&self, arn: &str, shard: &ShardId) -> Result<bool, Fault> {
        let answer = self
            .client
            .get_shard_iterator()
            .stream_arn(arn)
            .shard_id(&shard.0)
            .shard_iterator_type(ShardIteratorType::TrimHorizon)
            .send()
            .await;
        match answer {
            Ok(_) => Ok(false),
            Err(error) => match classify(Operation::GetShardIterator, &error) {
                fault if matches!(fault.class, Class::NotFound | Class::Trimmed) => Ok(true),
                fault => Err(fault),
            },
        }
    }

    async fn list(&self, arn: &str, filter: Option<ShardFilter>) -> Result<Listing, Fault> {
        let mut shards = Vec::new();
        let mut after: Option<String> = None;
        for _ in 0..PAGES_MAX {
            self.pace.until_ready().await;
            let answer = self
                .client
                .describe_stream()
                .stream_arn(arn)
                .set_exclusive_start_shard_id(after.take())
                .set_shard_filter(filter.clone())
                .send()
                .await
                .map_err(|error| classify(Operation::DescribeStream, &error))?;
            let Some(description) = answer.stream_description else {
                break;
            };
            shards.extend(
                description
                    .shards
                    .unwrap_or_default()
                    .into_iter()
                    .filter_map(|shard| {
                        Some(Shard {
                            id: ShardId(shard.shard_id?),
                            parent: shard
                                .parent_shard_id
                                .filter(|parent| !parent.is_empty())
                                .map(ShardId),
                        })
                    }),
            );
            after = description.last_evaluated_shard_id;
            if after.is_none() {
                return Ok(Listing {
                    shards,
                    view_type: description.stream_view_type,
                    enabled: matches!(
                        description.stream_status,
                        Some(StreamStatus::Enabled | StreamStatus::Enabling)
                    ),
                });
            }
        }
        Err(Fault::own(
            Operation::DescribeStream,
            Class::Unknown,
            "listing without end",
            format!("the listing did not end after {} shards", shards.len()),
        ))
    }
}
