//! What a shard's owner may say to be proven (see [`crate::observe::recovery`]).

use std::time::Instant;

use super::Consumer;
use crate::lease::doubts::Range;
use crate::lease::row::DoubtRow;

impl Consumer<'_> {
    /// The shard was found to hold nothing at `at_ms`. If nothing of it was ever taken in, nothing is left of
    /// what was made before its stream was begun: what the table held then came otherwise.
    pub(super) fn note_nothing(&mut self, at_ms: i64) {
        if !self.is_untouched || self.proof.said_ms().is_some() {
            return;
        }
        let Some(begun_ms) = self.begun_ms().filter(|begun_ms| *begun_ms <= at_ms) else {
            return;
        };
        // Once is enough: what an ancestor has is more, and does not change any more.
        self.is_untouched = false;
        if self.context.shared.proven_of_shard(&self.key).is_none() {
            let begun_ms = Some(begun_ms);
            self.proof.checkpointed(begun_ms, self.may_say(begun_ms));
        }
    }

    /// When the stream was begun.
    fn begun_ms(&self) -> Option<i64> {
        let context = self.context;
        let (epoch, table) = (context.shared.epoch, &context.table.name);
        let rows = context.shared.rows.borrow();
        let mut streams = rows.streams.iter();
        let stream =
            streams.find(|row| row.stream_arn == context.stream_arn && row.is_of(epoch, table));
        stream.and_then(|row| row.begun_at)
    }

    /// What the row may say to be proven once a checkpoint that proves `by_ms` is stored.
    pub(super) fn may_say(&self, by_ms: Option<i64>) -> Option<i64> {
        let rows = self.context.shared.rows.borrow();
        let table = &self.context.table.name;
        let let_pass = |ms| rows.holds.let_pass(&self.key, table, ms);
        self.proof.may_say(by_ms, rows.begun, let_pass)
    }

    /// A doubt was stored, if there was one.
    pub(super) fn doubts_stored(&mut self, doubt: Option<(Range, DoubtRow)>) {
        let any = doubt.is_some();
        self.doubts.stored(doubt);
        if any {
            self.proof.held(self.doubts.is_stored(), Instant::now());
        }
    }
}
