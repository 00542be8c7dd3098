//! Dead letters in SQS, standard or FIFO.

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{MessageAttributeValue, QueueAttributeName};

use super::message::{DeadLetter, MESSAGE_BYTES_MAX};
use crate::dynamo::RegionClients;
use crate::error::{Class, Failure, Fault, Operation, classify};

/// A queue.
#[derive(Clone)]
pub struct Queue {
    client: Client,
    url: String,
}

impl Queue {
    /// The queue at `url`, reached in `region` at the origin of its URL unless `endpoint_url` says
    /// otherwise.
    pub fn new(region: &RegionClients, url: &str, endpoint_url: Option<&str>) -> Self {
        let endpoint = endpoint_url.map_or_else(|| origin(url), str::to_owned);
        Self {
            client: region.sqs(&endpoint),
            url: url.to_owned(),
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
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .attribute_names(QueueAttributeName::QueueArn)
            .send()
            .await;
        match answer {
            Ok(_) => Ok(true),
            Err(error) => match classify(Operation::Queue, &error) {
                fault if fault.class == Class::NotFound => Ok(false),
                fault => Err(fault),
            },
        }
    }

    /// Checks that the queue answers.
    ///
    /// # Errors
    /// A failure that names the queue.
    pub async fn check(&self) -> Result<(), Failure> {
        let what = format!("The dead-letter queue {} could not be reached", self.url);
        match self.exists().await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::new(
                what,
                "There is no such queue",
                "Create it with `farshore provision --apply`, or correct dead_letters.queue_url",
            )),
            Err(fault) => Err(Failure::from_fault(what, &fault)),
        }
    }

    /// Sends a letter; done when SQS has stored it.
    ///
    /// # Errors
    /// The fault of the call, or a letter that is too long even without its images.
    pub async fn send(&self, letter: &DeadLetter) -> Result<(), Fault> {
        let body = letter.to_line(MESSAGE_BYTES_MAX).map_err(|message| {
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
            // One group per table keeps the table's letters in order; the position makes a second
            // delivery after a lost answer the same message.
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

/// At most 128 characters; the end of shard id and sequence number tells letters apart.
fn deduplication_id(letter: &DeadLetter) -> String {
    let sequence = letter.sequence_number.as_deref().unwrap_or("none");
    let id = format!("{}-{sequence}", letter.shard_id);
    let skip = id.chars().count().saturating_sub(128);
    id.chars().skip(skip).collect()
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
    fn a_deduplication_id_is_short_and_keeps_the_position() {
        let mut letter = super::super::message::tests::letter("x");
        letter.shard_id = "s".repeat(200);
        letter.sequence_number = Some("42".into());
        let id = deduplication_id(&letter);
        assert_eq!(id.len(), 128);
        assert!(id.ends_with("-42"));
    }
}
