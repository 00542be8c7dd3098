//! Asks the service about shards that a complete listing lacks: only its own word makes a shard
//! gone. A few at a time, and out of the way of whoever takes leases.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::dynamo::clock::uptime;
use crate::error::Fault;
use crate::stream::ShardId;
use crate::stream::listing::Lister;

/// Questions on their way at once, for one stream.
const AT_ONCE: usize = 8;

/// What the service said of shards it was asked about.
#[derive(Default)]
pub struct Gone {
    gone: BTreeSet<ShardId>,
    /// When each of those was said to be gone, by [`uptime`].
    since: BTreeMap<ShardId, Duration>,
    /// The listing after which each shard was asked about last, and how often it was still there.
    asked: BTreeMap<ShardId, (u64, u32)>,
    queue: VecDeque<ShardId>,
    asking: JoinSet<(ShardId, Result<bool, Fault>)>,
}

impl Gone {
    /// Shards that the service does not know any more.
    pub fn confirmed(&self) -> &BTreeSet<ShardId> {
        &self.gone
    }

    /// For how long `shard` has been known to be gone.
    pub fn known_for(&self, shard: &ShardId) -> Duration {
        let since = self.since.get(shard);
        since.map_or(Duration::ZERO, |since| uptime().saturating_sub(*since))
    }

    /// How often the service still knew `shard` although a complete listing lacked it.
    pub fn times_there(&self, shard: &ShardId) -> u32 {
        self.asked.get(shard).map_or(0, |(_, times)| *times)
    }

    /// Asks about `shards`, which the listing of this `number` lacks: once a listing each. Forgets
    /// what it knew of others.
    pub fn ask(&mut self, lister: &Lister, arn: &str, shards: &BTreeSet<ShardId>, number: u64) {
        self.gone.retain(|shard| shards.contains(shard));
        self.since.retain(|shard, _| shards.contains(shard));
        self.asked.retain(|shard, _| shards.contains(shard));
        self.queue.retain(|shard| shards.contains(shard));
        for shard in shards {
            let (last, _) = self.asked.entry(shard.clone()).or_default();
            if *last < number && !self.gone.contains(shard) {
                *last = number;
                if !self.queue.contains(shard) {
                    self.queue.push_back(shard.clone());
                }
            }
        }
        self.fill(lister, arn);
    }

    fn fill(&mut self, lister: &Lister, arn: &str) {
        while self.asking.len() < AT_ONCE
            && let Some(shard) = self.queue.pop_front()
        {
            let (lister, arn) = (lister.clone(), arn.to_owned());
            self.asking.spawn(async move {
                let answer = lister.is_gone(&arn, &shard).await;
                (shard, answer)
            });
        }
    }

    /// The next answer taken in: whether it confirmed a shard as gone. `None` if nothing is asked.
    ///
    /// # Errors
    /// The fault of the call; the shard is asked about again after the next listing.
    pub async fn next(&mut self, lister: &Lister, arn: &str) -> Option<Result<bool, Fault>> {
        let answer = self.asking.join_next().await?;
        self.fill(lister, arn);
        Some(match answer {
            Ok((shard, Ok(true))) => {
                // One that nobody asks about any more is of no use.
                if self.asked.contains_key(&shard) {
                    self.since.entry(shard.clone()).or_insert_with(uptime);
                    self.gone.insert(shard);
                }
                Ok(true)
            }
            Ok((shard, Ok(false))) => {
                if let Some((_, times)) = self.asked.get_mut(&shard) {
                    *times += 1;
                }
                Ok(false)
            }
            Ok((_, Err(fault))) => Err(fault),
            // It died: asked again after the next listing.
            Err(_) => Ok(false),
        })
    }
}
