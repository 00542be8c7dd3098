//! Where records go that a replica can never take. A record counts as delivered only when it is
//! durable there; until then the checkpoint waits.

pub mod directory;
pub mod message;
pub mod sqs;

use crate::config::DeadLetters;
use crate::dynamo::RegionClients;
use crate::error::{Failure, Fault};
use directory::Directory;
use message::DeadLetter;
use sqs::Queue;

/// The place for dead letters that a configuration names.
#[derive(Clone)]
pub enum Store {
    /// An SQS queue.
    Queue(Queue),
    /// A directory of JSON lines.
    Directory(Directory),
}

impl Store {
    /// Finds the place and checks that it can be used. Nothing is sent.
    ///
    /// # Errors
    /// A queue that does not answer, or a directory that cannot be written.
    pub async fn open(config: &DeadLetters, region: &RegionClients) -> Result<Self, Failure> {
        if let Some(url) = &config.queue_url {
            let queue = Queue::new(region, url, config.endpoint_url.as_deref());
            return queue.check().await.map(|()| Store::Queue(queue));
        }
        // Validation has seen to it that one of the two is set.
        let path = config.directory.clone().unwrap_or_default();
        Directory::open(&path).map(Store::Directory)
    }

    /// Delivers a letter durably.
    ///
    /// # Errors
    /// Why it could not be delivered; it may be delivered twice after a lost answer.
    pub async fn deliver(&self, letter: &DeadLetter) -> Result<(), Fault> {
        match self {
            Store::Queue(queue) => queue.send(letter).await,
            Store::Directory(directory) => directory.append(letter).await,
        }
    }
}
