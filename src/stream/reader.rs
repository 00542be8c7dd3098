//! Reading one shard: iterators, pages, and where the reader stands.

mod verbatim;

use aws_sdk_dynamodbstreams::Client;
use aws_sdk_dynamodbstreams::types::ShardIteratorType;
use aws_smithy_types::DateTime;

use super::ShardId;
use super::answer::Decoded;
use super::sequence::SequenceNumber;
use crate::error::{Class, Fault, Operation, Policy, classify};

/// Most records a page may hold; the service allows no more.
pub const PAGE_RECORDS_MAX: i32 = 1_000;

/// Where in a shard to read on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Position {
    /// The oldest record there is.
    TrimHorizon,
    /// The first record made at or after this time, in milliseconds since the epoch.
    AtTimestamp(i64),
    /// The record after this one.
    After(SequenceNumber),
}

/// One answer of the shard.
#[derive(Debug)]
pub struct Page {
    /// Its records, oldest first. Empty pages are normal in the middle of a shard.
    pub records: Vec<Decoded>,
    /// Whether the shard has ended. The page may still carry records.
    pub end: bool,
}

/// Reads a shard from a position to its end.
pub struct ShardReader {
    client: Client,
    stream_arn: String,
    shard: ShardId,
    position: Position,
    iterator: Option<String>,
    ended: bool,
}

impl ShardReader {
    /// A reader that begins at `position`. Nothing is called yet.
    pub fn new(client: Client, stream_arn: &str, shard: &ShardId, position: Position) -> Self {
        Self {
            client,
            stream_arn: stream_arn.to_owned(),
            shard: shard.clone(),
            position,
            iterator: None,
            ended: false,
        }
    }

    /// Where it stands: after the last record it gave out.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Goes back to the oldest record there is: after a gap.
    pub fn restart(&mut self) {
        self.position = Position::TrimHorizon;
        self.iterator = None;
    }

    /// The next page, of at most `limit` records. An expired iterator is replaced by a new one after the
    /// last record.
    ///
    /// # Errors
    /// The fault of the call that failed; calling again goes on where it stopped.
    pub async fn next(&mut self, limit: i32) -> Result<Page, Fault> {
        if self.ended {
            return Ok(Page {
                records: Vec::new(),
                end: true,
            });
        }
        let iterator = match self.iterator.take() {
            Some(iterator) => iterator,
            None => self.new_iterator().await?,
        };
        let call = self
            .client
            .get_records()
            .shard_iterator(&iterator)
            .limit(limit.clamp(1, PAGE_RECORDS_MAX));
        let answer = match verbatim::send(call).await {
            Ok(answer) => answer,
            Err(fault) => {
                // What passes by itself leaves the iterator as good as it was; after anything else
                // the position is worth more than an iterator that was refused.
                if fault.policy() == Policy::Retry {
                    self.iterator = Some(iterator);
                }
                return Err(fault);
            }
        };
        // The service always sends a list, be it empty. An answer with neither list nor iterator
        // came from something else, and must not pass for the end of a shard.
        if answer.records.is_none() && answer.next_iterator.is_none() {
            self.iterator = Some(iterator);
            return Err(incomplete(Operation::GetRecords));
        }
        let records = answer.records.unwrap_or_default();
        if let Some(last) = records.last() {
            let sequence = match last {
                Ok(change) => Some(change.sequence.clone()),
                Err(bad) => bad.sequence.clone(),
            };
            // Without a number there is no way to read on after it, and guessing could skip.
            let Some(sequence) = sequence else {
                return Err(Fault::own(
                    Operation::GetRecords,
                    Class::Unknown,
                    "record without a sequence number",
                    "the service sent a record without a sequence number",
                ));
            };
            self.position = Position::After(sequence);
        }
        self.ended = answer.next_iterator.is_none();
        self.iterator = answer.next_iterator;
        Ok(Page {
            records,
            end: self.ended,
        })
    }

    async fn new_iterator(&self) -> Result<String, Fault> {
        match &self.position {
            Position::TrimHorizon => self.iterator_of(ShardIteratorType::TrimHorizon).await,
            Position::After(_) => {
                self.iterator_of(ShardIteratorType::AfterSequenceNumber)
                    .await
            }
            Position::AtTimestamp(_) => {
                match self.iterator_of(ShardIteratorType::AtTimestamp).await {
                    // Servers that do not know this kind refuse it. From the oldest record on is
                    // right, too: who asked for a time leaves out what is older.
                    Err(fault) if matches!(fault.class, Class::Validation | Class::Unknown) => {
                        self.iterator_of(ShardIteratorType::TrimHorizon).await
                    }
                    answer => answer,
                }
            }
        }
    }

    async fn iterator_of(&self, kind: ShardIteratorType) -> Result<String, Fault> {
        let (sequence, timestamp) = match (&kind, &self.position) {
            (ShardIteratorType::AfterSequenceNumber, Position::After(sequence)) => {
                (Some(sequence.as_str().to_owned()), None)
            }
            (ShardIteratorType::AtTimestamp, Position::AtTimestamp(ms)) => {
                (None, Some(DateTime::from_millis(*ms)))
            }
            _ => (None, None),
        };
        self.client
            .get_shard_iterator()
            .stream_arn(&self.stream_arn)
            .shard_id(&self.shard.0)
            .shard_iterator_type(kind)
            .set_sequence_number(sequence)
            .set_timestamp(timestamp)
            .send()
            .await
            .map_err(|error| classify(Operation::GetShardIterator, &error))?
            .shard_iterator
            .ok_or_else(|| incomplete(Operation::GetShardIterator))
    }
}

/// An answer that lacks what the service always sends.
fn incomplete(operation: Operation) -> Fault {
    Fault::own(
        operation,
        Class::Network,
        "incomplete answer",
        "the answer lacks what DynamoDB Streams always sends: something else answers at this endpoint",
    )
}
