//! Receiving for a redrive, and looking without consuming.

use std::time::Duration;

use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry, Message,
    MessageSystemAttributeName as System,
};

use super::Queue;
use crate::dead_letter::message::DeadLetter;
use crate::dead_letter::{Receipt, Waiting};
use crate::error::{Class, Fault, Operation, class_of_code, classify};

/// Messages of one call; SQS takes no more.
const RECEIVE_MAX: i32 = 10;
/// How long an answer without a message is waited for: with a wait all of the queue's servers are
/// asked, and without one a message may be overlooked.
const WAIT_SECONDS: i32 = 1;
/// The longest a message can be kept from others.
pub const VISIBILITY_MAX: Duration = Duration::from_secs(12 * 3_600);

impl Queue {
    /// Receives up to ten letters and keeps them from everybody else for `hidden`.
    ///
    /// # Errors
    /// The fault of the call. Messages may then be hidden all the same.
    pub async fn receive(&self, hidden: Duration) -> Result<Vec<Waiting>, Fault> {
        let hidden = hidden.min(VISIBILITY_MAX).as_secs_f64().ceil() as i32;
        let answer = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(RECEIVE_MAX)
            .visibility_timeout(hidden)
            .wait_time_seconds(WAIT_SECONDS)
            .message_system_attribute_names(System::SentTimestamp)
            .send()
            .await
            .map_err(|error| classify(Operation::Queue, &error))?;
        let messages = answer.messages.unwrap_or_default();
        Ok(messages.into_iter().map(waiting).collect())
    }

    /// When the oldest of a few letters that the queue shows was sent, in milliseconds. None is taken
    /// from anybody.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn oldest_shown_ms(&self) -> Result<Option<i64>, Fault> {
        let shown = self.receive(Duration::ZERO).await?;
        Ok(shown.iter().filter_map(|waiting| waiting.sent_ms).min())
    }

    /// Deletes received letters for good.
    ///
    /// # Errors
    /// The fault of the call, or of an entry of it: those are still there.
    pub async fn delete(&self, receipts: &[String]) -> Result<(), Fault> {
        let mut outcome = Ok(());
        for receipts in receipts.chunks(RECEIVE_MAX as usize) {
            let entry = |(index, receipt): (usize, &String)| {
                DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt)
                    .build()
            };
            let entries: Result<Vec<_>, _> = receipts.iter().enumerate().map(entry).collect();
            let answer = self
                .client
                .delete_message_batch()
                .queue_url(&self.url)
                .set_entries(Some(entries.map_err(unbuilt)?))
                .send()
                .await
                .map_err(|error| classify(Operation::Queue, &error))?;
            outcome = outcome.and(all_taken(&answer.failed));
        }
        outcome
    }

    /// Sets for how long received letters stay hidden from now on; zero gives them back at once.
    ///
    /// # Errors
    /// The fault of the call, or of an entry of it: those stay hidden as they were.
    pub async fn hide(&self, receipts: &[String], hidden: Duration) -> Result<(), Fault> {
        let mut outcome = Ok(());
        let hidden = hidden.min(VISIBILITY_MAX).as_secs_f64().ceil() as i32;
        for receipts in receipts.chunks(RECEIVE_MAX as usize) {
            let entry = |(index, receipt): (usize, &String)| {
                ChangeMessageVisibilityBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(receipt)
                    .visibility_timeout(hidden)
                    .build()
            };
            let entries: Result<Vec<_>, _> = receipts.iter().enumerate().map(entry).collect();
            let answer = self
                .client
                .change_message_visibility_batch()
                .queue_url(&self.url)
                .set_entries(Some(entries.map_err(unbuilt)?))
                .send()
                .await
                .map_err(|error| classify(Operation::Queue, &error))?;
            outcome = outcome.and(all_taken(&answer.failed));
        }
        outcome
    }
}

fn unbuilt(error: aws_sdk_sqs::error::BuildError) -> Fault {
    Fault::own(
        Operation::Queue,
        Class::Unknown,
        "request not built",
        error.to_string(),
    )
}

fn all_taken(failed: &[aws_sdk_sqs::types::BatchResultErrorEntry]) -> Result<(), Fault> {
    let Some(entry) = failed.first() else {
        return Ok(());
    };
    let status = if entry.sender_fault { 400 } else { 500 };
    Err(Fault::own(
        Operation::Queue,
        class_of_code(&entry.code, status),
        &entry.code,
        entry.message.clone().unwrap_or_default(),
    ))
}

fn waiting(message: Message) -> Waiting {
    let sent_ms = message
        .attributes
        .as_ref()
        .and_then(|all| all.get(&System::SentTimestamp))
        .and_then(|text| text.parse().ok());
    let body = message.body.unwrap_or_default();
    Waiting {
        letter: DeadLetter::read(&body),
        id: message.message_id.unwrap_or_default(),
        sent_ms,
        receipt: Receipt::Message(message.receipt_handle.unwrap_or_default()),
    }
}
