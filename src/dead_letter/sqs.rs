//! Dead letters in SQS, standard or FIFO.

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName};

use super::message::{ATTRIBUTES_BYTES_MAX, DeadLetter, LETTER_BYTES_MIN, MESSAGE_BYTES_MAX};
use crate::dynamo::RegionClients;
use crate::error::{Class, Failure, Fault, Operation, classify};

/// A queue.
#[derive(Clone)]
pub struct Queue {
    client: Client,
    url: String,
    /// The longest body of a letter that this queue takes.
    body_bytes_max: usize,
}

impl Queue {
    /// The queue at `url`, reached in `region` at the origin of its URL unless `endpoint_url` says
    /// otherwise.
    pub fn new(region: &RegionClients, url: &str, endpoint_url: Option<&str>) -> Self {
        let endpoint = endpoint_url.map_or_else(|| origin(url), str::to_owned);
        Self {
            client: region.sqs(&endpoint),
            url: url.to_owned(),
            body_bytes_max: MESSAGE_BYTES_MAX - ATTRIBUTES_BYTES_MAX,
        }
    }

    /// The SDK client, for creating the queue.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The queue's name: the last part of its URL.
    pub fn name(&self) -> &str {
        self.url.rsplit('/').next().unwrap_or(&self.url)
    }

    /// The queue's URL as configured.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn is_fifo(&self) -> bool {
        self.url.ends_with(".fifo")
    }

    /// Whether the queue is there.
    ///
    /// # Errors
    /// Any other fault than "not found".
    pub async fn exists(&self) -> Result<bool, Fault> {
        Ok(self.bytes_max().await?.is_some())
    }

    /// The longest message that the queue takes, attributes included; `None` if it is not there.
    async fn bytes_max(&self) -> Result<Option<usize>, Fault> {
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .attribute_names(QueueAttributeName::MaximumMessageSize)
            .send()
            .await;
        match answer {
            Ok(answer) => Ok(Some(
                answer
                    .attributes()
                    .and_then(|all| all.get(&QueueAttributeName::MaximumMessageSize))
                    .and_then(|bytes| bytes.parse().ok())
                    .unwrap_or(MESSAGE_BYTES_MAX),
            )),
            Err(error) => match classify(Operation::Queue, &error) {
                fault if fault.class == Class::NotFound => Ok(None),
                fault => Err(fault),
            },
        }
    }

    /// Checks that the queue answers, and learns how much it takes: queues made before SQS took
    /// 1 MiB, and those a person made so, take less.
    ///
    /// # Errors
    /// A failure that names the queue.
    pub async fn check(mut self) -> Result<Self, Failure> {
        let what = format!("The dead-letter queue {} could not be reached", self.url);
        let bytes_max = match self.bytes_max().await {
            Ok(Some(bytes_max)) => bytes_max,
            Ok(None) => {
                return Err(Failure::new(
                    what,
                    "There is no such queue",
                    "Create it with `farshore provision --apply`, or correct dead_letters.queue_url",
                ));
            }
            Err(fault) => return Err(Failure::from_fault(what, &fault)),
        };
        self.body_bytes_max = bytes_max
            .min(MESSAGE_BYTES_MAX)
            .saturating_sub(ATTRIBUTES_BYTES_MAX);
        if self.body_bytes_max < LETTER_BYTES_MIN {
            return Err(Failure::new(
                format!("The dead-letter queue {} takes too little", self.url),
                format!(
                    "Its messages may hold {bytes_max} bytes, and a letter may need {} even without its images",
                    LETTER_BYTES_MIN + ATTRIBUTES_BYTES_MAX
                ),
                format!(
                    "Set the queue's MaximumMessageSize, best to {MESSAGE_BYTES_MAX}, so that the images fit too"
                ),
            ));
        }
        Ok(self)
    }

    /// Sends a letter; done when SQS has stored it.
    ///
    /// # Errors
    /// The fault of the call, or a letter that is too long even without its images.
    pub async fn send(&self, letter: &DeadLetter) -> Result<(), Fault> {
        let body = letter.to_line(self.body_bytes_max).map_err(|message| {
            Fault::own(Operation::Queue, Class::Unknown, "letter too long", message)
        })?;
        let mut request = self
            .client
            .send_message()
            .queue_url(&self.url)
            .message_body(body);
        for (name, value) in [
            ("group", letter.group.as_str()),
            ("table", letter.table.as_str()),
            ("event", letter.event.as_deref().unwrap_or("UNKNOWN")),
            ("code", letter.error.code.as_str()),
            ("class", letter.error.class.as_str()),
        ] {
            let value = MessageAttributeValue::builder()
                .data_type("String")
                .string_value(value)
                .build()
                .map_err(|error| {
                    Fault::own(
                        Operation::Queue,
                        Class::Unknown,
                        "message not built",
                        error.to_string(),
                    )
                })?;
            request = request.message_attributes(name, value);
        }
        if self.is_fifo() {
            // One group per table: its letters are received one after the other, though not in the
            // order of the stream, since several may be on their way at once. The position makes a
            // second delivery after a lost answer the same message.
            request = request
                .message_group_id(group_id(&letter.table))
                .message_deduplication_id(deduplication_id(letter));
        }
        request
            .send()
            .await
            .map(|_| ())
            .map_err(|error| classify(Operation::Queue, &error))
    }
}

/// Group ids take letters, digits and punctuation, and table names hold nothing else.
fn group_id(table: &str) -> String {
    table.chars().take(128).collect()
}

/// The same for a second delivery of a letter and different for any other letter, since a FIFO queue
/// silently drops what it takes for a repetition. Shard and position alone do not tell letters
/// apart: several groups may copy one table and share a queue. At most 128 characters.
fn deduplication_id(letter: &DeadLetter) -> String {
    let sequence = letter.sequence_number.as_deref().unwrap_or("none");
    let digest = digest(&[
        &letter.group,
        &letter.table,
        &letter.target.region,
        &letter.target.table,
        &letter.stream_arn,
        &letter.shard_id,
        sequence,
    ]);
    // The position is there for people; the digest holds it already.
    let position: String = sequence.chars().take(64).collect();
    format!("{digest:032x}-{position}")
}

/// FNV-1a of 128 bits: the same in every version and on every machine, which the standard library's
/// hashers do not promise.
fn digest(parts: &[&str]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    // 0xff is in no UTF-8 text: it ends each part, so that no two lists read alike.
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(BASIS, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    })
}

/// Scheme and authority of a URL.
fn origin(url: &str) -> String {
    match url.parse::<hyper::Uri>() {
        Ok(uri) => match (uri.scheme_str(), uri.authority()) {
            (Some(scheme), Some(authority)) => format!("{scheme}://{authority}"),
            _ => url.to_owned(),
        },
        Err(_) => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqs_is_reached_at_its_queues_origin() {
        assert_eq!(
            origin("https://sqs.us-west-2.amazonaws.com/1/q"),
            "https://sqs.us-west-2.amazonaws.com"
        );
        assert_eq!(
            origin("http://127.0.0.1:8104/000000000000/q.fifo"),
            "http://127.0.0.1:8104"
        );
    }

    #[test]
    fn a_deduplication_id_is_short_and_tells_letters_apart() {
        let mut letter = super::super::message::tests::letter("x");
        letter.sequence_number = Some("4".repeat(100));
        let id = deduplication_id(&letter);
        assert!(id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic()));
        // A second delivery of the same letter is the same message.
        let mut again = letter.clone();
        again.failed_at = "2026-01-02T00:00:00Z".into();
        again.attempts += 1;
        assert_eq!(deduplication_id(&again), id);
        // Long positions and shards that differ only at their end; other groups, tables, targets.
        let others: [fn(&mut DeadLetter); 7] = [
            |letter| letter.sequence_number = Some(format!("{}5", "4".repeat(99))),
            |letter| letter.shard_id.push('2'),
            |letter| letter.stream_arn.push('2'),
            |letter| letter.group.push('2'),
            |letter| letter.table.push('2'),
            |letter| letter.target.region.push('2'),
            |letter| letter.target.table.push('2'),
        ];
        for change in others {
            let mut other = letter.clone();
            change(&mut other);
            assert_ne!(deduplication_id(&other), id);
        }
    }

    #[test]
    fn the_digest_is_the_same_in_every_version() {
        assert_eq!(digest(&["a"]), 0x0880_9545_50ab_1be9_5aa0_7330_55b7_51b9);
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
    }
}
