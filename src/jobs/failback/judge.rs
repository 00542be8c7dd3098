//! What becomes of a write that never left the old region. Pure.
//!
//! ```text
//!   the last write of a key in the old region ─┐
//!   what the active region holds now ──────────┼─▶ equal, free, conflicting, unknown ─▶ by policy: applied,
//!   whether that was written since the fence ──┘                                        kept, or only reported
//! ```
//!
//! *Why a key that the active region did not touch is free*: everything that the old region had sent before
//! the fence was applied or is among what is stranded, so the active region holds an earlier version of the
//! same history, and nobody has made another one of it.
//!
//! *Why one that was applied already, and deleted in the active region afterwards, does not come back to life*:
//! what is stranded is a superset. Its delete is a change since the fence, so the key is conflicting and the
//! active region keeps it, unless a person says otherwise.
//!
//! *Why nothing unknown is applied*: without a ledger from the fence on, "not written" cannot be told from "the
//! record of it is gone".

use std::cmp::Ordering;

/// Whether the active region has written a key since the fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// The ledger is complete, and does not hold it.
    Untouched,
    /// The ledger holds it.
    Changed,
    /// The ledger is not complete, and does not hold it.
    Unknown,
}

/// How a stranded write stands to what the active region holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The same: it had been applied, or was made there, too.
    Equal,
    /// Nobody has written the key in the active region since.
    Free,
    /// Both have.
    Conflicting,
    /// Nobody can say.
    Unknown,
}

impl Class {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Equal, Self::Free, Self::Conflicting, Self::Unknown];

    /// The name in plans and reports.
    pub const fn label(self) -> &'static str {
        match self {
            Class::Equal => "equal",
            Class::Free => "free",
            Class::Conflicting => "conflicting",
            Class::Unknown => "unknown",
        }
    }
}

/// What is done with writes of keys that are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StrandedPolicy {
    /// They are applied to the active region.
    Apply,
    /// They stay in the store.
    Keep,
    /// They are reported, and dropped.
    Discard,
}

/// What is done with writes that conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConflictPolicy {
    /// The active region's counts.
    Active,
    /// The item counts whose attribute of this name is greater.
    Newest(String),
    /// They stay in the store.
    Keep,
}

/// What becomes of a stranded write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fate {
    /// Nothing has to be done.
    Nothing,
    /// It is applied, on condition that the active region still holds what it was compared with.
    Apply,
    /// It stays in the store until a person decides.
    Keep,
    /// It is written to the report, and the active region's value stands.
    Report,
}

impl Fate {
    /// The name in plans and reports.
    pub const fn label(self) -> &'static str {
        match self {
            Fate::Nothing => "nothing",
            Fate::Apply => "applied",
            Fate::Keep => "kept",
            Fate::Report => "reported",
        }
    }
}

/// How a write that left `stranded` stands to the `active` region's value; `None` is no item. `same` says whether
/// two items are the same.
pub fn classify<V>(
    stranded: Option<&V>,
    active: Option<&V>,
    since: Since,
    same: impl Fn(&V, &V) -> bool,
) -> Class {
    let is_equal = match (stranded, active) {
        (None, None) => true,
        (Some(one), Some(other)) => same(one, other),
        _ => false,
    };
    match since {
        _ if is_equal => Class::Equal,
        Since::Untouched => Class::Free,
        Since::Changed => Class::Conflicting,
        Since::Unknown => Class::Unknown,
    }
}

/// What becomes of a write of this class. `ages` compares the attribute that tells the newer of both, the stranded
/// item's with the active one's: `None` where one of them has none, or was deleted, and a delete has no age.
pub fn fate(
    class: Class,
    stranded: StrandedPolicy,
    conflicts: &ConflictPolicy,
    ages: impl FnOnce(&str) -> Option<Ordering>,
) -> Fate {
    match (class, stranded, conflicts) {
        (Class::Equal, _, _) => Fate::Nothing,
        // Whatever is asked for: a person looks at each of them.
        (Class::Unknown, _, _) => Fate::Keep,
        (Class::Free, StrandedPolicy::Apply, _) => Fate::Apply,
        (Class::Free, StrandedPolicy::Keep, _) => Fate::Keep,
        (Class::Free, StrandedPolicy::Discard, _) => Fate::Report,
        // What is not applied where it is free is not applied where it is not.
        (Class::Conflicting, StrandedPolicy::Keep, ConflictPolicy::Newest(_)) => Fate::Keep,
        (Class::Conflicting, StrandedPolicy::Discard, ConflictPolicy::Newest(_)) => Fate::Report,
        (Class::Conflicting, StrandedPolicy::Apply, ConflictPolicy::Newest(attribute)) => {
            match ages(attribute) {
                Some(Ordering::Greater) => Fate::Apply,
                Some(Ordering::Less | Ordering::Equal) => Fate::Report,
                None => Fate::Keep,
            }
        }
        (Class::Conflicting, _, ConflictPolicy::Active) => Fate::Report,
        (Class::Conflicting, _, ConflictPolicy::Keep) => Fate::Keep,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the active region is seen to hold, written or not since.
    fn class(stranded: Option<u8>, active: Option<u8>, since: Since) -> Class {
        classify(stranded.as_ref(), active.as_ref(), since, |a, b| a == b)
    }

    #[test]
    fn what_was_applied_and_deleted_in_the_active_region_afterwards_stays_deleted() {
        let class = class(Some(1), None, Since::Changed);
        assert_eq!(class, Class::Conflicting);
        let active = ConflictPolicy::Active;
        assert_eq!(
            fate(class, StrandedPolicy::Apply, &active, |_| None),
            Fate::Report
        );
        // A delete has no age: not even the newest counts against it.
        let newest = ConflictPolicy::Newest("at".into());
        assert_eq!(
            fate(class, StrandedPolicy::Apply, &newest, |_| None),
            Fate::Keep
        );
    }

    fn any_policy() -> impl Strategy<Value = (StrandedPolicy, ConflictPolicy)> {
        let stranded = proptest::sample::select(vec![
            StrandedPolicy::Apply,
            StrandedPolicy::Keep,
            StrandedPolicy::Discard,
        ]);
        let conflicts = proptest::sample::select(vec![
            ConflictPolicy::Active,
            ConflictPolicy::Newest("at".into()),
            ConflictPolicy::Keep,
        ]);
        (stranded, conflicts)
    }

    fn any_since() -> impl Strategy<Value = Since> {
        proptest::sample::select(vec![Since::Untouched, Since::Changed, Since::Unknown])
    }

    proptest! {
        /// Whatever is asked for: nothing of which nobody can say is applied, nothing is applied that is there
        /// already, and nothing that differs is forgotten.
        #[test]
        fn nothing_unknown_is_applied_and_nothing_that_differs_is_forgotten(
            stranded in proptest::option::of(0..3_u8),
            active in proptest::option::of(0..3_u8),
            since in any_since(),
            (policy, conflicts) in any_policy(),
            ages in proptest::sample::select(vec![None, Some(Ordering::Less), Some(Ordering::Greater)]),
        ) {
            let class = class(stranded, active, since);
            let fate = fate(class, policy, &conflicts, |_| ages);
            prop_assert_eq!(fate == Fate::Nothing, stranded == active);
            if since == Since::Unknown {
                prop_assert!(matches!(fate, Fate::Nothing | Fate::Keep));
            }
            if fate == Fate::Apply {
                prop_assert_eq!(policy, StrandedPolicy::Apply);
                let is_newer = ages == Some(Ordering::Greater);
                prop_assert!(since == Since::Untouched || is_newer);
            }
        }
    }
}
