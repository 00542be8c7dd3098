//! What changed lately, as this process saw it: the last lines of its log, kept in memory for `/status`.
//!
//! The log has one line for each change of state and none for a record, so it *is* the list of what
//! changed. Lines below `info` and those of other crates are left out.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{LazyLock, Mutex, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::view::{Event, EventLevel};
use crate::dynamo::clock::{host_ms, rfc3339};

/// How many are kept.
pub const EVENTS_MAX: usize = 100;
/// Longer lines are cut: they are for a person's eye.
const TEXT_MAX: usize = 400;

/// One for the process, as the log is.
static EVENTS: LazyLock<Mutex<VecDeque<Event>>> = LazyLock::new(Mutex::default);

/// The last events, newest first.
pub fn recent() -> Vec<Event> {
    let events = EVENTS.lock().unwrap_or_else(PoisonError::into_inner);
    events.iter().rev().cloned().collect()
}

/// Keeps the events of the log.
#[derive(Debug, Default)]
pub struct Recent;

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if !is_kept(metadata) {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        let event = Event {
            at: rfc3339(host_ms()),
            level: match *metadata.level() {
                Level::ERROR => EventLevel::Error,
                Level::WARN => EventLevel::Warn,
                _ => EventLevel::Info,
            },
            table: line.table.take(),
            text: line.text(),
        };
        let mut events = EVENTS.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
    }
}

/// Whether an event of this kind is kept.
pub fn is_kept(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO && metadata.target().starts_with("farshore")
}

/// A line of the log: its message, and what it is about.
#[derive(Default)]
struct Line {
    message: String,
    table: Option<String>,
    fields: String,
}

impl Line {
    fn text(self) -> String {
        let mut text = match self.fields.is_empty() {
            true => self.message,
            false => format!("{} ({})", self.message, self.fields),
        };
        if let Some((cut, _)) = text.char_indices().nth(TEXT_MAX) {
            text.truncate(cut);
            text.push('…');
        }
        text
    }

    fn take(&mut self, name: &str, value: String) {
        match name {
            "message" => self.message = value,
            "table" => self.table = Some(value).filter(|table| !table.is_empty()),
            // It stands in the reason for what is open, and is long.
            "next" => {}
            _ => {
                let comma = if self.fields.is_empty() { "" } else { ", " };
                // Writing to a string cannot fail.
                let _ = write!(self.fields, "{comma}{name} {value}");
            }
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let text = format!("{value:?}");
        // An optional text shows without the quotes and the option around it.
        let inner = text
            .strip_prefix("Some(")
            .and_then(|text| text.strip_suffix(')'));
        let text = inner.unwrap_or(&text).trim_matches('"').to_owned();
        self.take(field.name(), text);
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::prelude::*;

    use super::*;

    #[test]
    fn the_last_lines_are_kept_newest_first_with_their_table_and_no_more_than_so_many() {
        let layered = tracing_subscriber::registry().with(Recent);
        tracing::subscriber::with_default(layered, || {
            for number in 0..EVENTS_MAX + 20 {
                tracing::info!(table = "ring", number, "line");
            }
            tracing::debug!(table = "ring", "not kept");
            tracing::info!(target: "other", table = "ring", "not kept");
            tracing::warn!(
                table = "ring",
                shard = "s",
                next = "do this",
                "in doubt: {}",
                "text"
            );
        });
        let events: Vec<Event> = recent()
            .into_iter()
            .filter(|event| event.table.as_deref() == Some("ring"))
            .collect();
        assert_eq!(events[0].text, "in doubt: text (shard s)");
        assert_eq!(events[0].level, EventLevel::Warn);
        assert_eq!(events[1].text, format!("line (number {})", EVENTS_MAX + 19));
        assert!(recent().len() <= EVENTS_MAX);
    }
}
