//! What a redrive is asked for, and what it says.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

/// What to bring home.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Only letters of this table.
    pub table: Option<String>,
    /// At most so many letters.
    pub limit: Option<u64>,
    /// At most so many letters a second.
    pub rate: Option<NonZeroU32>,
}

/// What was done.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Letters brought home and deleted, by table.
    pub home: BTreeMap<String, u64>,
    /// Letters that stay, by table and reason. The table is empty where the letter does not tell.
    pub left: BTreeMap<(String, String), u64>,
    /// Why it ended before all letters had been looked at, if it did.
    pub ended: Option<String>,
    /// Letters with a write that was not answered: they show again once it is dead.
    pub unanswered: u64,
}

impl Report {
    /// Letters that stay.
    pub fn left_count(&self) -> u64 {
        self.left.values().sum()
    }

    /// Letters brought home.
    pub fn home_count(&self) -> u64 {
        self.home.values().sum()
    }

    pub(super) fn leave(&mut self, table: &str, why: impl Into<String>, letters: u64) {
        *self.left.entry((table.to_owned(), why.into())).or_default() += letters;
    }
}

/// Who watches a redrive.
pub trait Watcher {
    /// So many letters are home, and so many stay.
    fn progressed(&mut self, home: u64, left: u64);
}
