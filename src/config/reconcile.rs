//! How `reconcile` goes about it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer};

/// Deletes that a part of the target always allows: a part of a small table is nothing.
pub const DELETES_ALWAYS: u64 = 10;

/// Comparing tables.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Reconcile {
    /// Read units per second on each side; 0 means no limit.
    pub read_units_per_second: u32,
    /// Parts that each table is read in; 0 chooses by its size.
    pub segments: u32,
    /// Memory for items that wait for their partners.
    pub memory: ByteSize,
    /// How long a suspect is looked at before it counts as a difference, where changes flow.
    #[serde(deserialize_with = "super::duration")]
    pub settle: Duration,
    /// How many items of the target may be deleted.
    pub max_deletes: MaxDeletes,
    /// What the worker does about gaps.
    pub on_gap: OnGap,
}

impl Default for Reconcile {
    fn default() -> Self {
        Self {
            // A sixth of what one partition gives: the application keeps the rest.
            read_units_per_second: 500,
            segments: 0,
            // Seven hundred thousand items that wait.
            memory: ByteSize::mb(256),
            // Some seconds more than a healthy worker is behind.
            settle: Duration::from_secs(5),
            max_deletes: MaxDeletes::Percent(1.0),
            on_gap: OnGap::Repair,
        }
    }
}

/// What the worker does about a gap. It shows it in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnGap {
    /// It compares the table and makes it as the source is.
    #[default]
    Repair,
    /// It compares the table and says how many items differ.
    Report,
    /// Nothing.
    Off,
}

/// Comparing tables all the time.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Audit {
    /// Read units per second on each side; 0 turns it off.
    pub read_units_per_second: u32,
}

/// How many items may be deleted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxDeletes {
    /// So many.
    Count(u64),
    /// This part of the target, in percent; at least [`DELETES_ALWAYS`].
    Percent(f64),
}

impl MaxDeletes {
    /// How many of `items`.
    pub fn of(self, items: u64) -> u64 {
        match self {
            MaxDeletes::Count(count) => count,
            MaxDeletes::Percent(percent) => {
                let part = (items as f64 * percent / 100.0).floor() as u64;
                part.max(DELETES_ALWAYS)
            }
        }
    }
}

impl FromStr for MaxDeletes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused =
            || format!("`{text}` is neither a number like \"500\" nor a part like \"1%\"");
        match text.trim().strip_suffix('%') {
            None => text
                .trim()
                .parse()
                .map(MaxDeletes::Count)
                .map_err(|_| refused()),
            Some(percent) => match percent.trim().parse::<f64>() {
                Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(MaxDeletes::Percent(percent)),
                _ => Err(refused()),
            },
        }
    }
}

impl fmt::Display for MaxDeletes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MaxDeletes::Count(count) => write!(f, "{count}"),
            MaxDeletes::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl<'de> Deserialize<'de> for MaxDeletes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletes_are_a_number_or_a_part_of_the_target() {
        let parse = |text: &str| text.parse::<MaxDeletes>();
        assert_eq!(parse("500"), Ok(MaxDeletes::Count(500)));
        assert_eq!(parse("0").unwrap().of(1_000_000), 0);
        assert_eq!(parse("1%").unwrap().of(100_000), 1_000);
        // A part of a small table is nothing.
        assert_eq!(parse("1%").unwrap().of(50), DELETES_ALWAYS);
        assert_eq!(parse("2.5 %").unwrap().of(10_000), 250);
        for wrong in ["", "-1", "101%", "many", "1e9%", "nan%"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            MaxDeletes::Percent(1.0).to_string().parse(),
            Ok(MaxDeletes::Percent(1.0))
        );
    }
}
