//! Listing the shards of a stream: paged, and paced below the service's limit.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_sdk_dynamodbstreams::Client;
use aws_sdk_dynamodbstreams::types::{
    ShardFilter, ShardFilterType, ShardIteratorType, StreamStatus, StreamViewType,
};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

use super::{Shard, ShardId};
use crate::error::{Class, Fault, Operation, classify};

/// DescribeStream takes ten calls a second over all streams of an account; others call it, too.
/// The fleet makes one every 125 ms: eight a second.
const PAUSE_OF_FLEET: Duration = Duration::from_millis(125);
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

/// Lists shards for all tables of a process at one shared pace: the process's share of the fleet's.
#[derive(Clone)]
pub struct Lister {
    client: Client,
    pace: Arc<Mutex<Pace>>,
}

/// How fast this process may list.
struct Pace {
    workers: u32,
    limiter: Arc<DefaultDirectRateLimiter>,
}

impl Pace {
    /// One worker's share among `workers`.
    fn among(workers: u32) -> Self {
        let one = NonZeroU32::MIN;
        let quota = Quota::with_period(PAUSE_OF_FLEET * workers)
            // Only a period of zero gives none, and there is one worker at least.
            .unwrap_or(Quota::per_second(one));
        Self {
            workers,
            limiter: Arc::new(RateLimiter::direct(quota.allow_burst(one))),
        }
    }
}

impl Lister {
    /// A lister over `client`, for a fleet of one. Clones share its pace.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            pace: Arc::new(Mutex::new(Pace::among(1))),
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        // A poisoned lock still holds a whole pace.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how many workers live in the fleet, this one included: the service's limit is one for
    /// all of them. Calls that wait for their turn already keep it.
    pub fn set_workers(&self, workers: usize) {
        let workers = u32::try_from(workers).unwrap_or(u32::MAX).max(1);
        let mut pace = self.pace();
        if pace.workers != workers {
            *pace = Pace::among(workers);
        }
    }

    /// How many workers share the service's limit; 1 at least.
    pub fn workers(&self) -> u32 {
        self.pace().workers
    }

    /// Lists all shards of the stream `arn`. The result is complete as far as the service says
    /// so: it may still lack a shard. `on_page` hears of every page that came.
    ///
    /// # Errors
    /// The fault of the first call that failed.
    pub async fn all(&self, arn: &str, on_page: impl Fn()) -> Result<Listing, Fault> {
        self.list(arn, None, on_page).await
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
        let listing = self.list(arn, Some(filter), || {}).await?;
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

    async fn list(
        &self,
        arn: &str,
        filter: Option<ShardFilter>,
        on_page: impl Fn(),
    ) -> Result<Listing, Fault> {
        let mut shards = Vec::new();
        let mut after: Option<String> = None;
        for _ in 0..PAGES_MAX {
            let limiter = Arc::clone(&self.pace().limiter);
            limiter.until_ready().await;
            let answer = self
                .client
                .describe_stream()
                .stream_arn(arn)
                .set_exclusive_start_shard_id(after.take())
                .set_shard_filter(filter.clone())
                .send()
                .await
                .map_err(|error| classify(Operation::DescribeStream, &error))?;
            on_page();
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[tokio::test]
    async fn a_fleet_of_four_lists_at_a_quarter_of_the_pace_each() {
        for workers in [1, 4] {
            let pace = Pace::among(workers);
            let start = Instant::now();
            for _ in 0..3 {
                pace.limiter.until_ready().await;
            }
            let least = PAUSE_OF_FLEET * workers * 2;
            assert!(
                start.elapsed() >= least.mul_f64(0.95),
                "{workers}: {:?}",
                start.elapsed()
            );
        }
    }
}
