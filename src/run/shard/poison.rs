//! What the replica can never take: into the dead letters, unless it comes as a flood.

use std::time::Instant;

use super::{Consumer, Delivered};
use crate::apply::coalesce::{Op, SlotId};
use crate::dynamo::item::ItemKey;
use crate::error::{Class, Fault};
use crate::observe::board::Board;
use crate::observe::metrics;
use crate::run::letter::Letter;
use crate::stream::change::Event;

impl Consumer<'_> {
    pub(super) fn on_refused(&mut self, op: &Op, fault: Fault, attempts: u32) {
        let shared = &self.context.shared;
        if !shared.may_dead_letter(&self.context.table.name) {
            // One of a flood is not to blame: it is tried again once a person has opened the tap.
            self.window.returned(op);
            self.not_before = Instant::now() + self.backoff.pause();
            return;
        }
        self.window.refused(op);
        let change = &op.change;
        let letter = Letter::refused(self.context, &self.shard, change, &fault, attempts);
        self.deliver(
            op.slot,
            Some(change.key.clone()),
            Some(change.event),
            fault.class,
            letter,
        );
    }

    /// Delivers a dead letter, however long it takes: the checkpoint waits for it.
    pub(super) fn deliver(
        &mut self,
        slot: SlotId,
        key: Option<ItemKey>,
        event: Option<Event>,
        class: Class,
        letter: Letter,
    ) {
        let context = self.context;
        let part = self.shard.clone();
        let unasked = class == Class::Undecodable;
        self.letters.push(Box::pin(async move {
            if unasked {
                let shared = &context.shared;
                shared.until_dead_letter(&context.table.name).await;
            }
            letter.deliver(context, &part).await;
            Delivered {
                slot,
                key,
                event,
                class,
            }
        }));
    }

    pub(super) fn on_delivered(&mut self, delivered: &Delivered) {
        self.window
            .dead_lettered(delivered.slot, delivered.key.as_ref());
        let shared = &self.context.shared;
        let table = &self.context.table.name;
        shared.board.dead_lettered(table, delivered.class);
        if let Some(event) = delivered.event {
            metrics::record(table, event);
            Board::add(&shared.board.totals.records, 1);
            let now_ms = shared.source.clock.now_ms();
            shared.board.table(table).finished(1, now_ms, None);
        }
        self.note_durable();
    }
}
