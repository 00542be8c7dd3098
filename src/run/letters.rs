//! How many dead letters wait, and the alarm before a queue forgets: its oldest letter's time is looked at
//! again and again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::Shared;
use crate::dead_letter::Store;
use crate::dead_letter::sqs::Queue;
use crate::dead_letter::survey::survey;
use crate::dynamo::clock::host_ms;
use crate::error::Fault;
use crate::observe::health::{LettersLeft, Scope};
use crate::observe::metrics;

/// How often the queue is asked with the default lease of ten seconds.
const LOOK_LEASES: u32 = 6;
/// A queue shows a few of its messages at a time: the oldest of these looks counts.
const LOOKS_REMEMBERED: usize = 30;
/// A look takes one part in so many of the time at most: a directory is read whole.
const LOOK_PARTS: u32 = 50;
/// The alarm comes this long before the queue forgets a letter, or when a quarter of the time it
/// keeps letters is left.
const ALARM_BEFORE: Duration = Duration::from_secs(24 * 3_600);

/// The oldest letters that lately were seen.
#[derive(Debug, Default)]
struct Oldest {
    /// What the last looks saw.
    seen: VecDeque<Option<i64>>,
    /// Since when any waits, where nothing may be looked at.
    first_ms: Option<i64>,
}

impl Oldest {
    /// A look found that its oldest letter was sent at `sent_ms`, or none at all.
    fn saw(&mut self, sent_ms: Option<i64>) {
        if self.seen.len() == LOOKS_REMEMBERED {
            self.seen.pop_front();
        }
        self.seen.push_back(sent_ms);
    }

    /// Nothing waits any more: what was seen is home.
    fn clear(&mut self) {
        *self = Self::default();
    }

    /// When the oldest of them was sent, in milliseconds.
    fn sent_ms(&self) -> Option<i64> {
        let seen = self.seen.iter().flatten().min().copied();
        seen.or(self.first_ms)
    }
}

/// What is left for the oldest letter, sent at `sent_ms` where any waits, and whether somebody has to know.
fn left(sent_ms: Option<i64>, now_ms: i64, retention: Duration, waiting: u64) -> LettersLeft {
    let kept_ms = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
    let left = sent_ms.map(|sent_ms| {
        let left_ms = u64::try_from(sent_ms.saturating_add(kept_ms) - now_ms).unwrap_or(0);
        Duration::from_millis(left_ms)
    });
    LettersLeft {
        waiting,
        left,
        is_urgent: left.is_some_and(|left| left < ALARM_BEFORE.min(retention / 4)),
    }
}

/// Looks at the dead letters for as long as the worker lives.
pub async fn watch_letters(shared: Arc<Shared>) {
    let every = shared.config.leases.duration * LOOK_LEASES;
    let mut oldest = Oldest::default();
    loop {
        let begun = Instant::now();
        match look(&shared, &mut oldest).await {
            Ok(letters) => {
                shared.health.succeeded(Scope::DeadLetters, "", "alarm");
                metrics::letters_waiting(letters.waiting, letters.left);
                shared.health.set_letters(letters);
            }
            Err(fault) => {
                let health = &shared.health;
                health.failed(Scope::DeadLetters, "", "alarm", &fault);
            }
        }
        let pause = every.max(begun.elapsed() * LOOK_PARTS);
        tokio::time::sleep_until((begun + pause).into()).await;
    }
}

/// One look: how many letters wait, and how long for.
async fn look(shared: &Shared, oldest: &mut Oldest) -> Result<LettersLeft, Fault> {
    match &shared.dead_letters {
        Store::Queue(queue) => {
            let (waiting, retention) = look_at_queue(queue, oldest).await?;
            let now_ms = shared.target.clock.now_ms();
            Ok(left(oldest.sent_ms(), now_ms, retention, waiting))
        }
        // It forgets nothing.
        directory @ Store::Directory(_) => {
            let waiting = survey(directory, 0).await?.waiting;
            Ok(left(None, 0, Duration::ZERO, waiting))
        }
    }
}

/// How many letters wait in a queue, and how long it keeps them.
async fn look_at_queue(queue: &Queue, oldest: &mut Oldest) -> Result<(u64, Duration), Fault> {
    let Some(said) = queue.attributes().await? else {
        oldest.clear();
        return Ok((0, Duration::ZERO));
    };
    let waiting = said.waiting + said.in_flight;
    if waiting == 0 {
        oldest.clear();
    } else if said.receives_max.is_none() {
        oldest.saw(queue.oldest_shown_ms().await?);
    } else if oldest.sent_ms().is_none() {
        // Where receives are counted, looking would use them up: since when any waits has to do.
        oldest.first_ms = Some(host_ms());
    }
    Ok((waiting, said.retention))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_the_last_looks_counts() {
        let mut oldest = Oldest::default();
        assert_eq!(oldest.sent_ms(), None);
        oldest.saw(Some(5_000));
        oldest.saw(None);
        oldest.saw(Some(9_000));
        assert_eq!(oldest.sent_ms(), Some(5_000));
        for _ in 0..LOOKS_REMEMBERED {
            oldest.saw(Some(9_000));
        }
        assert_eq!(oldest.sent_ms(), Some(9_000));
        oldest.clear();
        assert_eq!(oldest.sent_ms(), None);
    }

    #[test]
    fn the_alarm_comes_a_day_before_or_with_the_last_quarter() {
        let day = Duration::from_secs(24 * 3_600);
        let urgent = |retention: Duration, age: Duration| {
            let letters = left(Some(0), age.as_millis() as i64, retention, 1);
            (letters.is_urgent, letters.left.unwrap())
        };
        let second = Duration::from_secs(1);
        assert_eq!(urgent(14 * day, 13 * day), (false, day));
        assert_eq!(urgent(14 * day, 13 * day + second), (true, day - second));
        assert!(!urgent(2 * day, 36 * day / 24).0);
        assert!(urgent(2 * day, 37 * day / 24).0);
        assert_eq!(urgent(day, 2 * day), (true, Duration::ZERO));
        // None waits, and that is known.
        let none = left(None, 0, day, 0);
        assert_eq!((none.waiting, none.left, none.is_urgent), (0, None, false));
    }
}
