//! What was sent to take late writes back, stored before it leaves.
//!
//! Such a write says only "where the key still holds the late write". Where the same write comes late twice
//! with the application's between, the first write that takes it back may take effect after the second, without
//! an answer or after the death of the command that sent it, and puts an older item over the application's. In
//! the stream that looks like the application's own. So whoever judges a change that replaced a late write
//! asks first whether it is one of these.

use std::collections::{HashMap, HashSet};

use super::{Failover, Held, MARGIN_MS};
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::error::Fault;
use crate::lease::row::{SentUndo, UndoRow, print_of};
use crate::lease::table::Written;

/// Which of the writes that were sent for one key were seen in the stream.
#[derive(Debug, Clone, Default)]
pub(super) struct Accounted {
    seen: HashMap<(String, String), u32>,
    /// What the key held that was right, as far as the stream was read. Nobody puts back what was not there
    /// yet: a process that reads behind another, or all over again, would take the application's own write
    /// for one that was sent only after it.
    right: HashSet<String>,
}

impl Accounted {
    /// Whether the change from `before` to `after` at `at_ms` is one of those that were `sent`, and not one
    /// of those seen before.
    pub(super) fn is_ours(
        &mut self,
        sent: &[SentUndo],
        (before, after): (String, String),
        at_ms: i64,
    ) -> bool {
        let is_it = |sent: &&SentUndo| sent.late == before && sent.right == after;
        // Stream times are cut to the second.
        let left_by = |sent: &&SentUndo| sent.first_ms <= at_ms + 1_000 + MARGIN_MS;
        let was_right = self.right.contains(&after);
        let sent = sent.iter().find(is_it).filter(left_by);
        let Some(sent) = sent.filter(|_| was_right) else {
            return false;
        };
        let seen = self.seen.entry((before, after)).or_default();
        let is_ours = *seen < sent.times;
        *seen += u32::from(is_ours);
        is_ours
    }

    /// The key was right as it was read: it held this, and may be made so again.
    pub(super) fn was_right(&mut self, held: String) {
        self.right.insert(held);
    }
}

impl Failover<'_> {
    fn undo_row(&self, table: &str, key: &ItemKey) -> UndoRow {
        UndoRow::new(self.record.epoch, table, Digest::of_key(key))
    }

    /// What was sent for this key by whomever, in this epoch.
    pub(super) async fn sent(&self, table: &str, key: &ItemKey) -> Result<Vec<SentUndo>, Fault> {
        let lease_key = self.undo_row(table, key).lease_key;
        let row = self.state.undo(&lease_key).await?;
        Ok(row.map(|row| row.sent).unwrap_or_default())
    }

    /// Takes note that the key is about to be made `right` where it still holds `late`.
    pub(super) async fn note_sent(
        &self,
        table: &str,
        key: &ItemKey,
        (late, right): (&Held, &Held),
    ) -> Result<(), Fault> {
        let none = self.undo_row(table, key);
        let print = |held: &Held| print_of(held.0.as_ref());
        // Another process of the command may note its own between the two.
        loop {
            let known = self.state.undo(&none.lease_key).await?;
            let row = known.as_ref().unwrap_or(&none);
            let next = row.with(print(late), print(right), self.now_ms());
            let written = match &known {
                Some(known) => self.state.replace(&next, known.lease_counter).await?,
                None => self.state.create(&next).await?,
            };
            if written == Written::Yes {
                return Ok(());
            }
        }
    }

    /// Forgets what was sent in epochs that are over: nobody watches for them any more.
    pub(super) async fn forget_sent(&self) -> Result<(), Fault> {
        for row in self.state.rows().await? {
            if let crate::lease::row::Row::Undo(row) = row
                && row.epoch < self.record.epoch
            {
                self.state.delete(&row).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::{History, Judged, Old};
    use super::*;
    use proptest::prelude::*;

    fn sent(times: u32) -> Vec<SentUndo> {
        vec![SentUndo {
            late: "l".into(),
            right: "r".into(),
            first_ms: 10_000,
            times,
        }]
    }

    fn pair(before: &str, after: &str) -> (String, String) {
        (before.to_owned(), after.to_owned())
    }

    #[test]
    fn what_takes_a_late_write_back_is_known_as_often_as_it_was_sent() {
        let mut accounted = Accounted::default();
        let told = accounted.is_ours(&sent(2), pair("l", "r"), 9_500);
        assert!(!told, "it was never right");
        accounted.was_right("r".into());
        assert!(!accounted.is_ours(&sent(2), pair("l", "x"), 10_000));
        assert!(
            !accounted.is_ours(&sent(2), pair("l", "r"), 5_000),
            "before it was sent"
        );
        assert!(accounted.is_ours(&sent(2), pair("l", "r"), 9_500));
        assert!(accounted.is_ours(&sent(2), pair("l", "r"), 11_000));
        assert!(
            !accounted.is_ours(&sent(2), pair("l", "r"), 11_000),
            "the application's"
        );
        assert!(
            accounted.is_ours(&sent(3), pair("l", "r"), 11_000),
            "sent since"
        );
    }

    #[derive(Debug, Clone)]
    enum Act {
        /// The application writes.
        App,
        /// This record of the old flow takes effect once more.
        Late(u32),
        /// A process reads so many more records and takes back what is due; its write is held back, or takes
        /// effect at once.
        Look {
            process: usize,
            records: usize,
            held: bool,
        },
        /// A write that was held back arrives.
        Arrive(usize),
        /// A process dies, and another begins anew.
        Dies(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            2 => Just(Act::App),
            4 => (1u32..4).prop_map(Act::Late),
            6 => (0usize..2, 1usize..6, any::<bool>())
                .prop_map(|(process, records, held)| Act::Look { process, records, held }),
            3 => (0usize..8).prop_map(Act::Arrive),
            1 => (0usize..2).prop_map(Act::Dies),
        ]
    }

    /// One key, its stream, and what two processes know of it.
    struct World {
        holds: u32,
        stream: Vec<(u32, u32)>,
        sent: Vec<SentUndo>,
        held_back: Vec<(u32, u32)>,
        processes: [Process; 2],
    }

    struct Process {
        history: History<u32>,
        accounted: Accounted,
        read: usize,
        late: bool,
        due: Option<(u32, u32)>,
    }

    impl Process {
        fn new() -> Self {
            // The old flow came to the third of three records.
            let old = (1..=3).map(|image| Old {
                image,
                in_flight: true,
            });
            Self {
                history: History::new(old.collect()),
                accounted: Accounted::default(),
                read: 0,
                late: false,
                due: None,
            }
        }
    }

    impl World {
        fn new() -> Self {
            let stream = vec![(0, 1), (1, 2), (2, 3)];
            Self {
                holds: 3,
                stream,
                sent: Vec::new(),
                held_back: Vec::new(),
                processes: [Process::new(), Process::new()],
            }
        }

        fn write(&mut self, value: u32) {
            if value != self.holds {
                self.stream.push((self.holds, value));
                self.holds = value;
            }
        }

        fn arrive(&mut self, (late, right): (u32, u32)) {
            if self.holds == late {
                self.write(right);
            }
        }

        fn look(&mut self, process: usize, records: usize, held: bool) {
            let one = &mut self.processes[process];
            for _ in 0..records {
                let Some((before, after)) = self.stream.get(one.read).copied() else {
                    break;
                };
                let fenced = one.read >= 3;
                if one.read == 0 {
                    one.accounted.was_right(before.to_string());
                }
                one.read += 1;
                one.due = None;
                let ours = one.late && {
                    let prints = (before.to_string(), after.to_string());
                    one.accounted.is_ours(&self.sent, prints, 0)
                };
                let judged = match ours {
                    true => one.history.taken_back(&after),
                    false => one.history.change(&before, &after, fenced),
                };
                one.late = matches!(judged, Judged::Late(_));
                if !one.late {
                    one.accounted.was_right(after.to_string());
                }
                if let Judged::Late(right) = judged {
                    one.due = Some((after, right));
                }
            }
            let read_out = one.read == self.stream.len();
            if let Some(due) = one.due.filter(|(late, _)| read_out || *late == self.holds)
                && self.holds == due.0
            {
                let (late, right) = (due.0.to_string(), due.1.to_string());
                let row = UndoRow::new(1, "t", Digest::from_bytes([0; 16]));
                let row = UndoRow {
                    sent: self.sent.clone(),
                    ..row
                };
                self.sent = row.with(late, right, 0).sent;
                match held {
                    true => self.held_back.push(due),
                    false => self.arrive(due),
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        /// Whatever comes late, however often, and whatever becomes of what takes it back: once nothing comes
        /// any more, the key holds the application's last write.
        #[test]
        fn whatever_becomes_of_what_takes_late_writes_back_the_applications_last_write_stands(
            acts in prop::collection::vec(act(), 1..40),
        ) {
            let mut world = World::new();
            let mut expected = 3;
            let mut app = 100;
            for act in acts {
                match act {
                    Act::App => {
                        app += 1;
                        expected = app;
                        world.write(app);
                    }
                    Act::Late(image) => world.write(image),
                    Act::Look { process, records, held } => world.look(process, records, held),
                    Act::Arrive(index) if index < world.held_back.len() => {
                        let write = world.held_back.remove(index);
                        world.arrive(write);
                    }
                    Act::Arrive(_) => {}
                    Act::Dies(process) => world.processes[process] = Process::new(),
                }
            }
            // What is still on its way arrives, and both look on.
            for _ in 0..40 {
                while let Some(write) = world.held_back.pop() {
                    world.arrive(write);
                }
                world.look(0, usize::MAX, false);
                world.look(1, usize::MAX, false);
            }
            prop_assert_eq!(world.holds, expected);
        }
    }
}
