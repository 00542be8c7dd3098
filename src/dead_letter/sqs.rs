//! Dead letters in SQS, standard or FIFO: the queue itself, and what is known of it.

mod receive;
mod send;

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName as Name;

use super::message::{LETTER_BYTES_MIN, MESSAGE_BYTES_MAX};
use crate::dynamo::RegionClients;
use crate::error::{Class, Failure, Fault, Operation, classify};

/// What SQS keeps messages where nobody has said otherwise.
const RETENTION_DEFAULT: Duration = Duration::from_secs(4 * 24 * 3_600);
/// The attributes of a letter's message at their longest: five names, a table's name of 255 bytes,
/// an event, a code and a class.
const ATTRIBUTES_BYTES_MAX: usize = 1_024;

/// A queue.
#[derive(Clone)]
pub struct Queue {
    client: Client,
    url: String,
    /// The longest message that this queue takes, attributes included.
    message_bytes_max: usize,
    sender: send::Sender,
}

/// What a queue says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// The longest message that it takes, attributes included.
    pub message_bytes_max: usize,
    /// How long it keeps a message.
    pub retention: Duration,
    /// Messages to be received, about.
    pub waiting: u64,
    /// Messages that somebody has received and not deleted, about.
    pub in_flight: u64,
    /// After how many receives it moves a message to a queue of its own dead letters.
    pub receives_max: Option<u64>,
}

impl Queue {
    /// The queue at `url`, reached in `region` at the origin of its URL unless `endpoint_url` says
    /// otherwise.
    pub fn new(region: &RegionClients, url: &str, endpoint_url: Option<&str>) -> Self {
        let endpoint = endpoint_url.map_or_else(|| origin(url), str::to_owned);
        let client = region.sqs(&endpoint);
        Self {
            sender: send::Sender::new(client.clone(), url.to_owned()),
            client,
            url: url.to_owned(),
            message_bytes_max: MESSAGE_BYTES_MAX,
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
        Ok(self.attributes().await?.is_some())
    }

    /// What the queue says of itself; `None` if it is not there.
    ///
    /// # Errors
    /// Any other fault than "not found".
    pub async fn attributes(&self) -> Result<Option<Attributes>, Fault> {
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .attribute_names(Name::All)
            .send()
            .await;
        match answer {
            Ok(answer) => Ok(Some(attributes(&answer.attributes.unwrap_or_default()))),
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
        let attributes = match self.attributes().await {
            Ok(Some(attributes)) => attributes,
            Ok(None) => {
                return Err(Failure::new(
                    what,
                    "There is no such queue",
                    "Create it with `farshore provision --apply`, or correct dead_letters.queue_url",
                ));
            }
            Err(fault) => return Err(Failure::from_fault(what, &fault)),
        };
        let bytes_max = attributes.message_bytes_max;
        self.message_bytes_max = bytes_max.min(MESSAGE_BYTES_MAX);
        let least = LETTER_BYTES_MIN + ATTRIBUTES_BYTES_MAX;
        if self.message_bytes_max < least {
            return Err(Failure::new(
                format!("The dead-letter queue {} takes too little", self.url),
                format!(
                    "Its messages may hold {bytes_max} bytes, and a letter may need {least} even without its images",
                ),
                format!(
                    "Set the queue's MaximumMessageSize, best to {MESSAGE_BYTES_MAX}, so that the images fit too"
                ),
            ));
        }
        Ok(self)
    }
}

fn attributes(all: &HashMap<Name, String>) -> Attributes {
    let number = |name: Name| all.get(&name).and_then(|text| text.parse::<u64>().ok());
    let receives_max = all.get(&Name::RedrivePolicy).and_then(|policy| {
        let policy: serde_json::Value = serde_json::from_str(policy).ok()?;
        let receives = policy.get("maxReceiveCount")?;
        // Some say it as a number and some as a text.
        receives
            .as_u64()
            .or_else(|| receives.as_str()?.parse().ok())
    });
    Attributes {
        message_bytes_max: number(Name::MaximumMessageSize)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .unwrap_or(MESSAGE_BYTES_MAX),
        retention: number(Name::MessageRetentionPeriod)
            .map_or(RETENTION_DEFAULT, Duration::from_secs),
        waiting: number(Name::ApproximateNumberOfMessages).unwrap_or(0)
            + number(Name::ApproximateNumberOfMessagesDelayed).unwrap_or(0),
        in_flight: number(Name::ApproximateNumberOfMessagesNotVisible).unwrap_or(0),
        receives_max,
    }
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
    fn what_a_queue_says_of_itself_is_read_and_what_it_does_not_say_is_the_default() {
        let said = HashMap::from([
            (Name::MaximumMessageSize, "262144".to_owned()),
            (Name::MessageRetentionPeriod, "60".to_owned()),
            (Name::ApproximateNumberOfMessages, "3".to_owned()),
            (Name::ApproximateNumberOfMessagesNotVisible, "2".to_owned()),
            (
                Name::RedrivePolicy,
                r#"{"deadLetterTargetArn":"arn","maxReceiveCount":"5"}"#.to_owned(),
            ),
        ]);
        assert_eq!(
            attributes(&said),
            Attributes {
                message_bytes_max: 262_144,
                retention: Duration::from_secs(60),
                waiting: 3,
                in_flight: 2,
                receives_max: Some(5),
            }
        );
        let silent = attributes(&HashMap::new());
        assert_eq!(silent.message_bytes_max, MESSAGE_BYTES_MAX);
        assert_eq!(silent.retention, RETENTION_DEFAULT);
        assert_eq!(silent.receives_max, None);
    }
}
