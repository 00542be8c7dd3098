//! Which change of an item in the new active region is a write of the old epoch that took effect late.
//! Pure.
//!
//! A late write looks like any other: nothing in the stream says who made it. What tells it is that its
//! image equals a record of the old active region that was in flight. So for each key that was, the
//! records of the old region stand beside the changes in the new one, and each change is laid upon them:
//!
//! ```text
//!   old region:   r1   r2   r3              new region:   r1 ─▶ r3 │fence│ app ─▶ r2
//!                                                                                 └ late: older than
//!                                                                                   r3, and over app's
//!   before the fence   a record after the last one laid: right (changes between may have been coalesced)
//!                      a record before it that was in flight: late, what was there before is restored
//!   after the fence    the same; and a record after the last one laid is right only while the
//!                      application has not written the key: then it came late, and is what it would have
//!                      been in time
//!                      no record at all: the application
//! ```
//!
//! *Why a newer record that comes late is left*: the application wrote it before the fence, it replaces
//! what is older, and nobody has written the key since. To take it back would lose a write that
//! otherwise nothing threatens; and an application that repeats its last write in the new region, as it
//! should, makes a change that looks the same.
//!
//! *What this cannot tell*: an application that, while something may still be late and after it has written
//! something else, writes an item that equals a record in flight in every attribute, or deletes a key of which a
//! delete was in flight. That is taken for late, undone and reported. What is written later than anything can be
//! late is the application's, whatever it equals.

/// A record of the old region: what it made of the key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Old<V> {
    /// What the key held after it, absence included.
    pub image: V,
    /// Whether its write may take effect late.
    pub in_flight: bool,
}

/// What a change in the new region is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Judged<V> {
    /// The old flow in time, the application, or nothing that concerns anybody.
    Right,
    /// A record of the old region that came after the fence and is right.
    Arrived,
    /// A write that took effect late: the key is to hold this again.
    Late(V),
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct History<V> {
    old: Vec<Old<V>>,
    /// Records before this one are laid, or were replaced by one that is.
    next: usize,
    /// What the key held when it was last right.
    right: Option<V>,
    /// The application has written it since the fence.
    is_written: bool,
}

impl<V: PartialEq + Clone> History<V> {
    /// A key with these records of the old region, in their order, from the first one in flight on.
    pub fn new(old: Vec<Old<V>>) -> Self {
        Self {
            old,
            next: 0,
            right: None,
            is_written: false,
        }
    }

    /// A late write was taken back, and the key holds `after` by that. That says nothing of what it held in
    /// between, for the same write may come late twice: where the application wrote between the two, it is
    /// the application's that is right.
    pub fn taken_back(&self, after: &V) -> Judged<V> {
        match &self.right {
            Some(right) if right != after => Judged::Late(right.clone()),
            _ => Judged::Right,
        }
    }

    /// The application changed the key to `after`: whatever that equals, nothing can be late any more.
    pub fn written(&mut self, after: &V) -> Judged<V> {
        self.is_written = true;
        self.right = Some(after.clone());
        Judged::Right
    }

    /// Whether no change was laid on it yet.
    pub fn is_new(&self) -> bool {
        self.right.is_none()
    }

    /// One more record of the old region.
    pub fn push(&mut self, old: Old<V>) {
        self.old.push(old);
    }

    /// Any of its records may take effect late: a repair of the key was at work, and writes what the source
    /// holds then.
    pub fn all_in_flight(&mut self) {
        for old in &mut self.old {
            old.in_flight = true;
        }
    }

    /// The key was changed in the new region from `before` to `after`, after the fence or before it.
    pub fn change(&mut self, before: &V, after: &V, fenced: bool) -> Judged<V> {
        let right = self.right.get_or_insert_with(|| before.clone()).clone();
        // What was restored, by this or by an earlier look; or nothing has changed.
        if right == *after {
            return Judged::Right;
        }
        let is_same = |old: &Old<V>| old.image == *after;
        let newer = self.old.iter().skip(self.next).position(is_same);
        let older = self.old.iter().take(self.next);
        let is_older = older.clone().any(|old| is_same(old) && old.in_flight);
        match newer.map(|ahead| self.next + ahead) {
            Some(index) if !fenced || !self.is_written => {
                self.next = index + 1;
                self.right = Some(after.clone());
                match fenced {
                    true => Judged::Arrived,
                    false => Judged::Right,
                }
            }
            Some(index) if self.old[index].in_flight => Judged::Late(right),
            _ if is_older => Judged::Late(right),
            _ => {
                self.is_written |= fenced;
                self.right = Some(after.clone());
                Judged::Right
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn history(images: &[u32]) -> History<u32> {
        let old = images.iter().map(|image| Old {
            image: *image,
            in_flight: true,
        });
        History::new(old.collect())
    }

    #[test]
    fn what_was_taken_back_over_a_write_that_had_not_been_seen_is_taken_back_itself() {
        let mut key = history(&[1, 2]);
        assert_eq!(key.change(&0, &2, false), Judged::Right);
        assert_eq!(key.change(&2, &8, true), Judged::Right, "the application");
        assert_eq!(key.change(&8, &1, true), Judged::Late(8));
        // Meanwhile: the application writes 9, and the same late write comes once more.
        assert_eq!(key.change(&1, &9, true), Judged::Right);
        assert_eq!(key.change(&9, &1, true), Judged::Late(9));
        assert_eq!(key.taken_back(&8), Judged::Late(9), "that was us");
        assert_eq!(key.taken_back(&9), Judged::Right);
        assert_eq!(key.change(&9, &8, true), Judged::Right, "the application");
    }

    #[test]
    fn an_older_record_over_a_newer_one_is_late_before_and_after_the_fence() {
        for fenced in [false, true] {
            let mut key = history(&[1, 2, 3]);
            assert_eq!(key.change(&0, &1, false), Judged::Right);
            assert_eq!(key.change(&1, &3, false), Judged::Right, "2 was coalesced");
            assert_eq!(key.change(&3, &1, fenced), Judged::Late(3));
            assert_eq!(key.change(&1, &2, fenced), Judged::Late(3));
            assert_eq!(key.change(&2, &3, fenced), Judged::Right, "restored");
        }
    }

    #[test]
    fn what_the_application_wrote_is_never_replaced_by_a_late_write() {
        let mut key = history(&[1, 2]);
        assert_eq!(key.change(&1, &9, true), Judged::Right);
        assert_eq!(key.change(&9, &2, true), Judged::Late(9));
        assert_eq!(key.change(&2, &9, true), Judged::Right);
        // It wrote once more while the late one stood.
        assert_eq!(key.change(&9, &1, true), Judged::Late(9));
        assert_eq!(key.change(&1, &8, true), Judged::Right);
        assert_eq!(key.change(&8, &1, true), Judged::Late(8));
    }

    #[test]
    fn a_newer_record_that_comes_late_over_nothing_else_is_left() {
        let mut key = history(&[1, 2]);
        assert_eq!(key.change(&0, &1, true), Judged::Arrived);
        assert_eq!(key.change(&1, &2, true), Judged::Arrived);
        assert_eq!(key.change(&2, &1, true), Judged::Late(2));
    }

    #[test]
    fn once_nothing_can_be_late_whatever_is_written_is_the_applications() {
        let mut key = history(&[1, 2]);
        assert_eq!(key.change(&1, &9, true), Judged::Right);
        assert_eq!(key.written(&2), Judged::Right);
        assert_eq!(key.change(&2, &1, true), Judged::Late(2), "before that");
    }

    #[test]
    fn a_record_that_was_not_in_flight_is_the_applications() {
        let mut key = history(&[1]);
        key.push(Old {
            image: 2,
            in_flight: false,
        });
        assert_eq!(key.change(&1, &2, false), Judged::Right);
        assert_eq!(key.change(&2, &9, true), Judged::Right);
        assert_eq!(key.change(&9, &2, true), Judged::Right);
    }

    /// What happens to one key: records of the old region applied in order, some of them once more and
    /// late, the application's writes after the fence; and after each late write what it is judged.
    #[derive(Debug, Clone)]
    enum Act {
        /// The old flow goes on to the record this many further on.
        Flow(usize),
        /// The fence.
        Fence,
        /// The application.
        App,
        /// An earlier record once more.
        Late(usize),
        /// A record that the flow had not come to, after the fence.
        Ahead(usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            3 => (1usize..3).prop_map(Act::Flow),
            1 => Just(Act::Fence),
            2 => Just(Act::App),
            3 => (0usize..8).prop_map(Act::Late),
            1 => (0usize..3).prop_map(Act::Ahead),
        ]
    }

    proptest! {
        /// Whatever the order: undone wherever it is called late, the key ends with the application's last
        /// write, or with the newest record that ever arrived.
        #[test]
        fn whatever_takes_effect_late_the_key_ends_right(acts in prop::collection::vec(act(), 1..24)) {
            // Images of records are 1..=8, the application's from 100 on, all different.
            let mut key = history(&[1, 2, 3, 4, 5, 6, 7, 8]);
            let (mut held, mut flow, mut fenced, mut app) = (0u32, 0usize, false, 0u32);
            let mut expected = 0u32;
            for act in acts {
                let write = match act {
                    Act::Flow(by) if !fenced && flow + by <= 8 => {
                        flow += by;
                        expected = flow as u32;
                        Some(flow as u32)
                    }
                    Act::Fence => {
                        fenced = true;
                        None
                    }
                    Act::App if fenced => {
                        app += 1;
                        expected = 100 + app;
                        Some(100 + app)
                    }
                    Act::Late(of) if of < flow => Some(of as u32 + 1),
                    Act::Ahead(by) if fenced && flow + by < 8 => {
                        let image = (flow + by + 1) as u32;
                        if app == 0 {
                            flow += by + 1;
                            expected = image;
                        }
                        Some(image)
                    }
                    _ => None,
                };
                let Some(write) = write.filter(|write| *write != held) else { continue };
                if let Judged::Late(restore) = key.change(&held, &write, fenced) {
                    prop_assert_eq!(key.change(&write, &restore, fenced), Judged::Right);
                    held = restore;
                } else {
                    held = write;
                }
                prop_assert_eq!(held, expected);
            }
        }
    }
}
