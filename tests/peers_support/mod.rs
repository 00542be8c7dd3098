//! What the lane of real peers asks beyond the replication suite.

pub mod actions;
pub mod main_job;
pub mod queues;
pub mod sizes;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_sqs::types::Message;
use serde_json::Value;

use crate::common::ministack::{Ministack, Ministacks, script};
use crate::common::stand::{Stand, TARGET};

/// An SQS client that is not Farshore's, in the replica region.
pub fn sqs(peers: &Ministacks) -> Client {
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(TARGET))
        .endpoint_url(peers.target.url())
        .credentials_provider(Credentials::new("test", "test", None, None, "test"))
        .build();
    Client::from_conf(config)
}

/// A configuration whose dead letters go to the queue `name`, reached at `origin`.
pub fn config_with_queue(stand: &Stand, tables: &[&str], origin: &str, name: &str) -> PathBuf {
    let url = Ministack::queue_url(origin, name);
    let (source, target) = (&stand.source_url, &stand.target_url);
    let letters = format!("[dead_letters]\nqueue_url = \"{url}\"\n");
    stand.config_at(source, target, tables, &letters)
}

/// A dead letter as it lies in the queue.
pub struct Received {
    pub body: Value,
    pub attributes: BTreeMap<String, String>,
    pub message: Message,
}

impl Received {
    fn new(message: Message) -> Self {
        let attributes = message.message_attributes.iter().flatten();
        Self {
            body: serde_json::from_str(message.body().unwrap()).unwrap(),
            attributes: attributes
                .map(|(name, value)| (name.clone(), value.string_value().unwrap().to_owned()))
                .collect(),
            message,
        }
    }

    /// The size by which SQS limits a message: the body, and name, type and value of each attribute.
    pub fn bytes(&self) -> usize {
        let attributes = self.message.message_attributes.iter().flatten();
        let attributes: usize = attributes
            .map(|(name, value)| {
                name.len() + value.data_type().len() + value.string_value().unwrap_or("").len()
            })
            .sum();
        self.message.body().unwrap().len() + attributes
    }
}

/// Receives and deletes until there are `count` messages, at most 30 s; then makes sure that there
/// are no more.
pub async fn receive(
    client: &Client,
    peers: &Ministacks,
    name: &str,
    count: usize,
) -> Vec<Received> {
    let url = Ministack::queue_url(&peers.target.url(), name);
    let start = Instant::now();
    let mut received = Vec::new();
    loop {
        let missing = received.len() < count;
        let answer = client
            .receive_message()
            .queue_url(&url)
            .max_number_of_messages(10)
            .wait_time_seconds(i32::from(missing))
            .message_attribute_names("All")
            .send()
            .await
            .unwrap();
        let messages = answer.messages.unwrap_or_default();
        if messages.is_empty() && !missing {
            assert_eq!(received.len(), count);
            return received;
        }
        for message in messages {
            let handle = message.receipt_handle().unwrap().to_owned();
            let delete = client.delete_message().queue_url(&url);
            delete.receipt_handle(handle).send().await.unwrap();
            let letter = Received::new(message);
            // A worker that was killed leaves a range in doubt; where its repair comes before the cause
            // is mended, it makes letters of its own, which have no place in the stream.
            if letter.body.get("sequenceNumber").is_some() {
                received.push(letter);
            }
        }
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "{} of {count} dead letters arrived",
            received.len()
        );
    }
}

/// Has a reader that knows nothing of Farshore but the schema check letters.
pub fn check_against_schema(letters: &[Received]) {
    let bodies: Vec<&Value> = letters.iter().map(|letter| &letter.body).collect();
    let mut reader = script("letters.py")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let text = serde_json::to_vec(&bodies).unwrap();
    // Dropped at the end of the statement: the reader sees the end.
    reader.stdin.take().unwrap().write_all(&text).unwrap();
    let answer = reader.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&answer.stdout).into_owned();
    let faults = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert!(answer.status.success(), "{told}{faults}");
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["checked"], letters.len());
}
