//! How it was over the last hour, in bounded memory, and how long it takes to catch up at that pace. Pure
//! but for its lock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::recovery::Age;
use super::view::{History as Shown, Point};
use crate::dynamo::clock::rfc3339;

/// Seconds between two points.
pub const STEP_S: u64 = 10;
/// Points kept: an hour.
const POINTS_MAX: usize = 360;
/// Steps that a table's lag is the largest of: a minute.
const LAG_STEPS: usize = 6;

/// What was seen since the last point.
#[derive(Debug, Default)]
struct Step {
    began: Option<Instant>,
    /// Records applied when it began.
    records: u64,
    lag_ms: Option<i64>,
}

#[derive(Debug, Default)]
struct Kept {
    step: Step,
    points: VecDeque<Point>,
    /// The largest lag of each table, by step; the last one is under way.
    lags: BTreeMap<String, VecDeque<Option<i64>>>,
}

/// The last hour of this process.
#[derive(Debug, Default)]
pub struct History {
    kept: Mutex<Kept>,
}

/// What is there to be seen once a second.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// When.
    pub now: Instant,
    /// The same by the source's clock, in milliseconds.
    pub at_ms: i64,
    /// Records applied since the start.
    pub records: u64,
    /// The recovery point of the group.
    pub age: Age,
}

impl History {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a look in. `lags` are the largest lags of each table since the last look, in milliseconds.
    pub fn look<'a>(&self, look: Look, lags: impl Iterator<Item = (&'a str, Option<i64>)>) {
        let mut kept = self.kept();
        for (table, lag_ms) in lags {
            kept.step.lag_ms = kept.step.lag_ms.max(lag_ms);
            if !kept.lags.contains_key(table) {
                kept.lags.insert(table.to_owned(), VecDeque::from([None]));
            }
            if let Some(last) = kept.lags.get_mut(table).and_then(VecDeque::back_mut) {
                *last = (*last).max(lag_ms);
            }
        }
        let began = *kept.step.began.get_or_insert(look.now);
        let took = look.now.saturating_duration_since(began);
        if took < Duration::from_secs(STEP_S) {
            return;
        }
        let records = look.records.saturating_sub(kept.step.records);
        let point = Point {
            at: rfc3339(look.at_ms),
            lag_seconds: kept.step.lag_ms.map(|ms| ms as f64 / 1_000.0),
            records_per_second: rounded(records as f64 / took.as_secs_f64()),
            proven_seconds: look.age.proven_s.map(rounded),
            estimated_seconds: look.age.estimated_s.map(rounded),
        };
        if kept.points.len() == POINTS_MAX {
            kept.points.pop_front();
        }
        kept.points.push_back(point);
        kept.step = Step {
            began: Some(look.now),
            records: look.records,
            lag_ms: None,
        };
        for steps in kept.lags.values_mut() {
            if steps.len() == LAG_STEPS {
                steps.pop_front();
            }
            steps.push_back(None);
        }
    }

    /// The largest lag of `table` within the last minute, in seconds; `None` where no record was applied.
    pub fn lag_s(&self, table: &str) -> Option<f64> {
        let kept = self.kept();
        let lag_ms = kept.lags.get(table)?.iter().flatten().max()?;
        Some(*lag_ms as f64 / 1_000.0)
    }

    /// The points, oldest first.
    pub fn shown(&self) -> Shown {
        Shown {
            step_seconds: STEP_S,
            points: self.kept().points.iter().cloned().collect(),
        }
    }
}

/// To the millisecond.
pub fn rounded(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// Seconds until it has caught up, at its pace over the last minute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// About so many.
    Left(f64),
    /// It falls further behind, or stands.
    Behind,
    /// Not known yet.
    Unknown,
}

/// The pace at which the estimated recovery point, now `age_s` old, becomes younger.
pub fn pace(history: Option<&Shown>, age_s: f64) -> Pace {
    let Some(history) = history else {
        return Pace::Unknown;
    };
    let recent = history.points.iter().rev().take(LAG_STEPS);
    let ages: Vec<f64> = recent.map_while(|point| point.estimated_seconds).collect();
    let (Some(last), Some(first)) = (ages.first(), ages.last()) else {
        return Pace::Unknown;
    };
    if ages.len() < 2 {
        return Pace::Unknown;
    }
    let took_s = (ages.len() - 1) as f64 * history.step_seconds as f64;
    let gained = (first - last) / took_s;
    match gained > 0.02 {
        true => Pace::Left(age_s / gained),
        false => Pace::Behind,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(estimated_s: f64) -> Age {
        Age {
            proven_s: None,
            estimated_s: Some(estimated_s),
        }
    }

    #[test]
    fn an_hour_is_kept_and_not_more() {
        let history = History::default();
        let start = Instant::now();
        for second in 0..2 * 3_600_u64 {
            let look = Look {
                now: start + Duration::from_secs(second),
                at_ms: second as i64 * 1_000,
                records: second * 5,
                age: age(1.0),
            };
            let lag = (second % 10 == 3).then_some(700);
            history.look(look, [("t", lag)].into_iter());
        }
        let shown = history.shown();
        assert_eq!(shown.points.len(), POINTS_MAX);
        let last = shown.points.last().unwrap();
        assert_eq!(last.records_per_second, 5.0);
        assert_eq!(last.lag_seconds, Some(0.7));
        assert_eq!(last.proven_seconds, None);
        assert_eq!(history.lag_s("t"), Some(0.7));
        assert_eq!(history.lag_s("other"), None);
    }

    #[test]
    fn what_is_left_is_told_by_the_pace_of_the_last_minute() {
        let shown = |ages: &[f64]| Shown {
            step_seconds: STEP_S,
            points: ages
                .iter()
                .map(|age| Point {
                    at: String::new(),
                    lag_seconds: None,
                    records_per_second: 0.0,
                    proven_seconds: None,
                    estimated_seconds: Some(*age),
                })
                .collect(),
        };
        assert_eq!(
            pace(Some(&shown(&[400.0, 380.0, 360.0])), 360.0),
            Pace::Left(180.0)
        );
        assert_eq!(
            pace(Some(&shown(&[360.0, 365.0, 370.0])), 370.0),
            Pace::Behind
        );
        assert_eq!(pace(Some(&shown(&[360.0])), 360.0), Pace::Unknown);
        assert_eq!(pace(None, 360.0), Pace::Unknown);
    }
}
