//! Sending: batches of up to ten letters, each answered by itself.

use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{MessageAttributeValue, SendMessageBatchRequestEntry};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::Queue;
use crate::dead_letter::message::{DeadLetter, MESSAGE_BYTES_MAX};
use crate::dynamo::item::ItemKey;
use crate::dynamo::json::item_from_json;
use crate::error::{Class, Fault, Operation, class_of_code, classify};

/// Entries of one `SendMessageBatch`; SQS takes no more.
const BATCH_MAX: usize = 10;
/// Batches on their way at once.
const BATCHES_AT_ONCE: usize = 4;
/// The data type of all attributes.
const STRING: &str = "String";

/// A letter to be sent, and who waits for its answer.
struct Entry {
    body: String,
    attributes: Vec<(&'static str, String)>,
    /// FIFO: message group and deduplication id.
    order: Option<(String, String)>,
    answer: oneshot::Sender<Result<(), Fault>>,
}

impl Entry {
    /// What SQS counts.
    fn bytes(&self) -> usize {
        self.body.len() + attribute_bytes(&self.attributes)
    }
}

/// Collects letters of all shards into batches.
#[derive(Clone)]
pub(super) struct Sender {
    client: Client,
    url: String,
    /// To the task that sends; begun with the first letter, so that who only reads has none.
    entries: Arc<Mutex<Option<mpsc::Sender<Entry>>>>,
}

impl Sender {
    pub(super) fn new(client: Client, url: String) -> Self {
        Self {
            client,
            url,
            entries: Arc::default(),
        }
    }

    fn entries(&self) -> mpsc::Sender<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        match &*entries {
            Some(open) if !open.is_closed() => open.clone(),
            // Never begun, or the runtime that ran it is gone.
            _ => {
                let (sender, receiver) = mpsc::channel(BATCH_MAX * BATCHES_AT_ONCE);
                tokio::spawn(send_all(self.client.clone(), self.url.clone(), receiver));
                *entries = Some(sender.clone());
                sender
            }
        }
    }
}

impl Queue {
    /// Sends a letter; done when SQS has stored it.
    ///
    /// # Errors
    /// The fault of the call or of this letter's entry in it, or a letter that is too long even
    /// without its images.
    pub async fn send(&self, letter: &DeadLetter) -> Result<(), Fault> {
        let attributes = attributes_of(letter);
        let bytes_max = self.message_bytes_max - attribute_bytes(&attributes);
        let body = letter.to_line(bytes_max).map_err(|message| {
            Fault::own(Operation::Queue, Class::Unknown, "letter too long", message)
        })?;
        let (answer, answered) = oneshot::channel();
        let entry = Entry {
            body,
            attributes,
            order: self
                .is_fifo()
                .then(|| (group_id(letter), deduplication_id(letter))),
            answer,
        };
        let lost = || {
            Fault::own(
                Operation::Queue,
                Class::Network,
                "not sent",
                "the task that sends letters ended",
            )
        };
        let sent = self.sender.entries().send(entry).await;
        sent.map_err(|_| lost())?;
        answered.await.map_err(|_| lost())?
    }
}

/// Sends what comes, a few batches at once: a batch is what has gathered while others were on
/// their way, so that a single letter does not wait for company.
async fn send_all(client: Client, url: String, mut entries: mpsc::Receiver<Entry>) {
    let mut batches = JoinSet::new();
    let mut next: Option<Entry> = None;
    loop {
        while batches.len() >= BATCHES_AT_ONCE {
            batches.join_next().await;
        }
        let first = match next.take() {
            Some(entry) => entry,
            None => match entries.recv().await {
                Some(entry) => entry,
                None => return,
            },
        };
        let mut bytes = first.bytes();
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX
            && let Ok(entry) = entries.try_recv()
        {
            bytes += entry.bytes();
            // The whole batch is bounded like a single message.
            if bytes > MESSAGE_BYTES_MAX {
                next = Some(entry);
                break;
            }
            batch.push(entry);
        }
        while batches.try_join_next().is_some() {}
        batches.spawn(send_batch(client.clone(), url.clone(), batch));
    }
}

/// Sends one batch and tells each who waits.
async fn send_batch(client: Client, url: String, batch: Vec<Entry>) {
    let mut request = client.send_message_batch().queue_url(url);
    let mut answers = Vec::with_capacity(batch.len());
    for (index, entry) in batch.into_iter().enumerate() {
        match built(index, &entry) {
            Ok(built) => {
                request = request.entries(built);
                answers.push(Some(entry.answer));
            }
            Err(fault) => {
                // Nobody waits any more: the shard is drained.
                let _ = entry.answer.send(Err(fault));
                answers.push(None);
            }
        }
    }
    if answers.iter().all(Option::is_none) {
        return;
    }
    let mut tell = |id: &str, result: Result<(), Fault>| {
        let waiting = id.parse::<usize>().ok().and_then(|id| answers.get_mut(id));
        if let Some(answer) = waiting.and_then(Option::take) {
            let _ = answer.send(result);
        }
    };
    let fault = match request.send().await {
        Ok(output) => {
            for entry in &output.failed {
                tell(&entry.id, Err(entry_fault(entry)));
            }
            for entry in &output.successful {
                tell(&entry.id, Ok(()));
            }
            Fault::own(
                Operation::Queue,
                Class::Network,
                "entry not answered",
                "the queue's answer does not mention this entry",
            )
        }
        Err(error) => classify(Operation::Queue, &error),
    };
    for answer in answers.into_iter().flatten() {
        let _ = answer.send(Err(fault.clone()));
    }
}

/// Why one entry of a batch was not taken although the call was answered with 200.
fn entry_fault(entry: &aws_sdk_sqs::types::BatchResultErrorEntry) -> Fault {
    let message = entry.message.clone().unwrap_or_default();
    let status = if entry.sender_fault { 400 } else { 500 };
    let class = class_of_code(&entry.code, status);
    Fault::own(Operation::Queue, class, &entry.code, message)
}

fn built(index: usize, entry: &Entry) -> Result<SendMessageBatchRequestEntry, Fault> {
    let unbuilt = |error: aws_sdk_sqs::error::BuildError| {
        Fault::own(
            Operation::Queue,
            Class::Unknown,
            "message not built",
            error.to_string(),
        )
    };
    let mut request = SendMessageBatchRequestEntry::builder()
        .id(index.to_string())
        .message_body(&entry.body);
    for (name, value) in &entry.attributes {
        let value = MessageAttributeValue::builder()
            .data_type(STRING)
            .string_value(value)
            .build()
            .map_err(unbuilt)?;
        request = request.message_attributes(*name, value);
    }
    if let Some((group, id)) = &entry.order {
        request = request.message_group_id(group).message_deduplication_id(id);
    }
    request.build().map_err(unbuilt)
}

/// What consumers can filter by without reading the body.
fn attributes_of(letter: &DeadLetter) -> Vec<(&'static str, String)> {
    vec![
        ("group", letter.group.clone()),
        ("table", letter.table.clone()),
        (
            "event",
            letter.event.clone().unwrap_or_else(|| "UNKNOWN".to_owned()),
        ),
        ("code", letter.error.code.clone()),
        ("class", letter.error.class.clone()),
    ]
}

fn attribute_bytes(attributes: &[(&'static str, String)]) -> usize {
    attributes
        .iter()
        .map(|(name, value)| name.len() + STRING.len() + value.len())
        .sum()
}

/// One group for each item: what happened to it stays in order, and a letter being brought home holds
/// up those of no other item. At most 128 characters; table names hold only such as SQS takes.
fn group_id(letter: &DeadLetter) -> String {
    let keys = letter.keys.as_ref().and_then(item_from_json);
    let key = keys.map(|keys| ItemKey::new(&keys));
    let digest = digest(&[
        letter.target.region.as_bytes(),
        letter.table.as_bytes(),
        key.as_ref().map_or(&[], ItemKey::as_bytes),
    ]);
    let table: String = letter.table.chars().take(64).collect();
    format!("{table}-{digest:032x}")
}

/// The same for a second delivery of a letter and different for any other letter, since a FIFO queue
/// silently drops what it takes for a repetition. Shard and position alone do not tell letters
/// apart: several groups may copy one table and share a queue, and a redrive gives letters back. At
/// most 128 characters.
fn deduplication_id(letter: &DeadLetter) -> String {
    let sequence = letter.sequence_number.as_deref().unwrap_or("none");
    let redriven = letter.redriven.to_string();
    let key = letter.item_key().as_ref().map(ItemKey::new);
    let mut parts = vec![
        letter.group.as_str(),
        &letter.table,
        &letter.target.region,
        &letter.target.table,
        &letter.stream_arn,
        &letter.shard_id,
        sequence,
    ];
    if letter.redriven > 0 {
        parts.push(&redriven);
    }
    // Without a position of its own, as of a refused repair, a letter is its item's of that moment.
    if letter.redriven > 0 || letter.sequence_number.is_none() {
        parts.push(&letter.failed_at);
    }
    let mut parts: Vec<&[u8]> = parts.into_iter().map(str::as_bytes).collect();
    if letter.sequence_number.is_none() {
        parts.push(key.as_ref().map_or(&[], ItemKey::as_bytes));
    }
    let digest = digest(&parts);
    // The position is there for people; the digest holds it already.
    let position: String = sequence.chars().take(64).collect();
    format!("{digest:032x}-{position}")
}

/// FNV-1a of 128 bits: the same in every version and on every machine, which the standard library's
/// hashers do not promise.
fn digest(parts: &[&[u8]]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    // 0xff is in no UTF-8 text: it ends each part, so that no two lists read alike.
    let bytes = parts.iter().flat_map(|part| part.iter().chain(&[0xff]));
    bytes.fold(BASIS, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deduplication_id_is_short_and_tells_letters_apart() {
        let mut letter = crate::dead_letter::message::tests::letter("x");
        letter.sequence_number = Some("4".repeat(100));
        let id = deduplication_id(&letter);
        assert!(id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic()));
        // A second delivery of the same letter is the same message.
        let mut again = letter.clone();
        again.failed_at = "2026-01-02T00:00:00Z".into();
        again.attempts += 1;
        assert_eq!(deduplication_id(&again), id);
        // Long positions and shards that differ only at their end; other groups, tables, targets.
        let others: [fn(&mut DeadLetter); 8] = [
            |letter| letter.redriven += 1,
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
        // Letters of refused repairs have no position: two items are two letters.
        letter.sequence_number = None;
        let mut other = letter.clone();
        assert_eq!(deduplication_id(&other), deduplication_id(&letter));
        other.keys = Some(serde_json::json!({ "id": { "S": "other" } }));
        assert_ne!(deduplication_id(&other), deduplication_id(&letter));
    }

    #[test]
    fn the_digest_is_the_same_in_every_version() {
        assert_eq!(digest(&[b"a"]), 0x0880_9545_50ab_1be9_5aa0_7330_55b7_51b9);
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
    }

    #[test]
    fn letters_of_one_item_are_one_group_whatever_the_spelling_of_its_key() {
        let with = |id: serde_json::Value| {
            let mut letter = crate::dead_letter::message::tests::letter("x");
            letter.table = "t".repeat(255);
            letter.keys = Some(serde_json::json!({ "id": id }));
            group_id(&letter)
        };
        let one = with(serde_json::json!({ "N": "1" }));
        assert!(one.len() <= 128);
        assert_eq!(with(serde_json::json!({ "N": "1.0" })), one);
        assert_ne!(with(serde_json::json!({ "N": "2" })), one);
        assert_ne!(with(serde_json::json!({ "S": "1" })), one);
    }

    #[test]
    fn a_message_is_measured_as_sqs_measures_it() {
        let mut letter = crate::dead_letter::message::tests::letter("x");
        let attributes = attributes_of(&letter);
        // group g, table t, event INSERT, code ValidationException, class validation.
        let names = "grouptableeventcodeclass".len() + 5 * "String".len();
        let values = "gtINSERTValidationExceptionvalidation".len();
        assert_eq!(attribute_bytes(&attributes), names + values);
        letter.event = None;
        assert!(attributes_of(&letter).contains(&("event", "UNKNOWN".to_owned())));
    }
}
