//! Who owns which shard, and how far each is applied.
//!
//! [`row`] is what is stored, [`rules`] are the pure rules of ownership, [`share`] those of sharing
//! among workers, [`table`] reads and writes the state table, [`held`] is a lease this process owns,
//! [`hold`] the right to a piece of work, [`budget`] (pure) the rule of who may write how much, [`budget_keeper`] what
//! keeps it,
//! [`doubts`] (pure) says what may still take effect, [`gaps`] (pure) when a gap may be repaired,
//! [`orphans`] (pure) which shards could be read,
//! [`control`] (pure) which region is active and who may write where, [`term`] is the right to write in
//! an epoch.

pub mod budget;
pub mod budget_keeper;
pub mod control;
pub mod doubts;
pub mod gaps;
pub mod held;
pub mod hold;
pub mod orphans;
pub mod row;
pub mod rules;
pub mod share;
pub mod table;
pub mod term;
