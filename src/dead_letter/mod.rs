//! Where records go that a replica can never take. A record counts as delivered only when it is
//! durable there; until then the checkpoint waits. [`crate::jobs::redrive`] brings them home.

pub mod directory;
pub mod message;
pub mod sqs;
pub mod survey;

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::DeadLetters;
use crate::dynamo::RegionClients;
use crate::error::{Failure, Fault};
use directory::Directory;
use message::{DeadLetter, Unreadable};
use sqs::Queue;

/// Letters handed out at once; what a queue gives at most.
pub const TOGETHER: usize = 10;

/// The place for dead letters that a configuration names.
#[derive(Clone)]
pub enum Store {
    /// An SQS queue.
    Queue(Queue),
    /// A directory of JSON lines.
    Directory(Directory),
}

/// A letter that waits to be brought home.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// The letter, if this version can read it.
    pub letter: Result<DeadLetter, Unreadable>,
    /// What the place calls it.
    pub id: String,
    /// When the queue got it, in milliseconds by its clock.
    pub sent_ms: Option<i64>,
    /// What it is deleted by.
    pub receipt: Receipt,
}

/// What a letter is deleted or given back by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Receipt {
    /// The receipt handle of a message.
    Message(String),
    /// A file of a directory, and where in it the letter's line begins.
    Line(String, u64),
}

impl Store {
    /// Finds the place and checks that it can be used. Nothing is sent.
    ///
    /// # Errors
    /// A queue that does not answer, or a directory that cannot be written.
    pub async fn open(config: &DeadLetters, region: &RegionClients) -> Result<Self, Failure> {
        if let Some(url) = &config.queue_url {
            let queue = Queue::new(region, url, config.endpoint_url.as_deref());
            return queue.check().await.map(Store::Queue);
        }
        // Validation has seen to it that one of the two is set.
        let path = config.directory.clone().unwrap_or_default();
        Directory::open(&path).map(Store::Directory)
    }

    /// What people know it by.
    pub fn name(&self) -> String {
        match self {
            Store::Queue(queue) => queue.url().to_owned(),
            Store::Directory(directory) => directory.place().display().to_string(),
        }
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

    /// The letters that wait, to be handed out.
    pub fn inbox(&self) -> Inbox {
        Inbox {
            store: self.clone(),
            lines: None,
        }
    }
}

/// Hands out the letters of a place, and takes back or deletes what it has handed out.
pub struct Inbox {
    store: Store,
    /// The lines of a directory that are still to be handed out, once it has been read.
    lines: Option<VecDeque<Waiting>>,
}

impl Inbox {
    /// The next few letters; none when there is none now. A queue keeps them from everybody else for
    /// `hidden`.
    ///
    /// # Errors
    /// The fault of the place.
    pub async fn next(&mut self, hidden: Duration) -> Result<Vec<Waiting>, Fault> {
        match &self.store {
            Store::Queue(queue) => queue.receive(hidden).await,
            Store::Directory(directory) => {
                if self.lines.is_none() {
                    // Read once: what is given back later is not handed out again.
                    self.lines = Some(directory.letters().await?.letters.into());
                }
                let lines = self.lines.as_mut();
                Ok(lines.map_or_else(Vec::new, |lines| {
                    lines.drain(..lines.len().min(TOGETHER)).collect()
                }))
            }
        }
    }

    /// Deletes letters for good.
    ///
    /// # Errors
    /// The fault of the place; those not deleted are handed out again later.
    pub async fn delete(&self, receipts: &[Receipt]) -> Result<(), Fault> {
        match &self.store {
            Store::Queue(queue) => queue.delete(&messages(receipts)).await,
            Store::Directory(directory) => {
                let lines = receipts.iter().filter_map(|receipt| match receipt {
                    Receipt::Line(file, offset) => Some((file.clone(), *offset)),
                    Receipt::Message(_) => None,
                });
                directory.mark_home(lines.collect()).await
            }
        }
    }

    /// Gives letters back, to be received by others after `hidden`.
    ///
    /// # Errors
    /// The fault of the queue; it then hides them as long as was said before.
    pub async fn give_back(&self, receipts: &[Receipt], hidden: Duration) -> Result<(), Fault> {
        match &self.store {
            Store::Queue(queue) => queue.hide(&messages(receipts), hidden).await,
            Store::Directory(_) => Ok(()),
        }
    }
}

fn messages(receipts: &[Receipt]) -> Vec<String> {
    let message = |receipt: &Receipt| match receipt {
        Receipt::Message(handle) => Some(handle.clone()),
        Receipt::Line(..) => None,
    };
    receipts.iter().filter_map(message).collect()
}
