//! What waits in a dead-letter place, without consuming any of it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::{Receipt, Store, Waiting};
use crate::dynamo::clock::host_ms;
use crate::error::Fault;

/// For how long a queue's letters are kept from others while they are looked at.
const LOOK: Duration = Duration::from_secs(60);
/// A queue that moves messages away after this many receives or fewer is not looked into: looking
/// is receiving.
const RECEIVES_MIN: u64 = 10;

/// What tells letters apart in a summary.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Kind {
    /// The table, by its name in the configuration.
    pub table: String,
    /// INSERT, MODIFY, REMOVE or UNKNOWN.
    pub event: String,
    /// The service's code.
    pub code: String,
    /// The class in the policy table.
    pub class: String,
}

/// Letters of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    /// How many were looked at.
    pub letters: u64,
    /// When the source made the oldest change of them, RFC 3339.
    pub oldest: String,
}

/// What waits.
#[derive(Debug, Default)]
pub struct Survey {
    /// Letters that wait: exact in a directory, about right in a queue.
    pub waiting: u64,
    /// Letters that somebody has received and not deleted: being brought home, or given up a short
    /// while ago.
    pub in_flight: u64,
    /// How many were looked at.
    pub looked_at: u64,
    /// Those, by kind.
    pub groups: BTreeMap<Kind, Group>,
    /// Those that this version cannot read, by reason.
    pub unreadable: BTreeMap<String, u64>,
    /// Half-written lines of a directory; no delivered letter stands in one.
    pub broken: usize,
    /// When the queue got the oldest that was looked at, in milliseconds.
    pub oldest_sent_ms: Option<i64>,
    /// How long the queue keeps a letter.
    pub retention: Option<Duration>,
    /// Why letters were not looked at, where they were not.
    pub not_looked: Option<String>,
}

impl Survey {
    /// Time until the queue forgets the oldest letter that was looked at.
    pub fn time_left(&self, now_ms: i64) -> Option<Duration> {
        let forgotten = self.oldest_sent_ms? + i64::try_from(self.retention?.as_millis()).ok()?;
        Some(Duration::from_millis(
            u64::try_from(forgotten - now_ms).unwrap_or(0),
        ))
    }

    /// Whether there is anything at all.
    pub fn is_empty(&self) -> bool {
        self.waiting + self.in_flight + self.looked_at == 0
    }

    fn take_in(&mut self, waiting: &Waiting) {
        self.looked_at += 1;
        self.oldest_sent_ms = match (self.oldest_sent_ms, waiting.sent_ms) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let letter = match &waiting.letter {
            Ok(letter) => letter,
            Err(unreadable) => {
                *self.unreadable.entry(unreadable.to_string()).or_default() += 1;
                return;
            }
        };
        let event = letter.event.clone();
        let kind = Kind {
            table: letter.table.clone(),
            event: match &letter.origin {
                Some(origin) => format!("{} ({origin})", event.as_deref().unwrap_or("UNKNOWN")),
                None => event.unwrap_or_else(|| "UNKNOWN".to_owned()),
            },
            code: letter.error.code.clone(),
            class: letter.error.class.clone(),
        };
        let group = self.groups.entry(kind).or_default();
        group.letters += 1;
        // RFC 3339 in UTC sorts as time does.
        if group.oldest.is_empty() || letter.created_at < group.oldest {
            group.oldest.clone_from(&letter.created_at);
        }
    }
}

/// Looks at up to `look_max` letters of `store`, and gives all of them back.
///
/// # Errors
/// The fault of the place. What was received from a queue comes back by itself within a minute.
pub async fn survey(store: &Store, look_max: u64) -> Result<Survey, Fault> {
    match store {
        Store::Directory(directory) => {
            let found = directory.letters().await?;
            let mut survey = Survey {
                waiting: found.letters.len() as u64,
                broken: found.broken,
                ..Survey::default()
            };
            for waiting in &found.letters {
                survey.take_in(waiting);
            }
            Ok(survey)
        }
        Store::Queue(queue) => {
            let said = queue.attributes().await?;
            let mut survey = Survey::default();
            let Some(said) = said else {
                survey.not_looked = Some("there is no such queue".to_owned());
                return Ok(survey);
            };
            survey.waiting = said.waiting;
            survey.in_flight = said.in_flight;
            survey.retention = Some(said.retention);
            if let Some(receives) = said.receives_max.filter(|max| *max <= RECEIVES_MIN) {
                survey.not_looked = Some(format!(
                    "the queue moves a message away after {receives} receives, and looking is receiving"
                ));
                return Ok(survey);
            }
            let mut seen = Vec::new();
            let looked = look(store, look_max, &mut survey, &mut seen).await;
            // Whatever went wrong: what was received goes back now and not in a minute.
            let inbox = store.inbox();
            let given_back = inbox.give_back(&seen, Duration::ZERO).await;
            looked.and(given_back)?;
            Ok(survey)
        }
    }
}

async fn look(
    store: &Store,
    look_max: u64,
    survey: &mut Survey,
    seen: &mut Vec<Receipt>,
) -> Result<(), Fault> {
    let mut inbox = store.inbox();
    let begun_ms = host_ms();
    // Before the first that was received comes back, and would be counted twice.
    let enough = LOOK.as_millis() as i64 / 2;
    while survey.looked_at < look_max && host_ms() - begun_ms < enough {
        let batch = inbox.next(LOOK).await?;
        if batch.is_empty() {
            return Ok(());
        }
        for waiting in &batch {
            survey.take_in(waiting);
            seen.push(waiting.receipt.clone());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::message::Unreadable;
    use super::super::message::tests::letter;
    use super::*;

    #[test]
    fn letters_are_counted_by_kind_with_their_oldest_change() {
        let waiting = |created_at: &str, code: &str| {
            let mut letter = letter("x");
            letter.created_at = created_at.to_owned();
            letter.error.code = code.to_owned();
            Waiting {
                letter: Ok(letter),
                id: String::new(),
                sent_ms: Some(5_000),
                receipt: Receipt::Message(String::new()),
            }
        };
        let mut survey = Survey {
            retention: Some(Duration::from_secs(60)),
            ..Survey::default()
        };
        survey.take_in(&waiting("2026-01-02T00:00:00Z", "a"));
        survey.take_in(&waiting("2026-01-01T00:00:00Z", "a"));
        survey.take_in(&Waiting {
            sent_ms: Some(3_000),
            ..waiting("2026-01-03T00:00:00Z", "b")
        });
        survey.take_in(&Waiting {
            letter: Err(Unreadable::Newer(9)),
            ..waiting("", "")
        });
        let counted: Vec<_> = survey.groups.iter().collect();
        assert_eq!(counted.len(), 2);
        assert_eq!(counted[0].1.letters, 2);
        assert_eq!(counted[0].1.oldest, "2026-01-01T00:00:00Z");
        assert_eq!(survey.unreadable.values().sum::<u64>(), 1);
        assert_eq!(survey.looked_at, 4);
        let left = |now_ms| survey.time_left(now_ms);
        assert_eq!(left(13_000), Some(Duration::from_secs(50)));
        assert_eq!(left(90_000), Some(Duration::ZERO));
    }
}
