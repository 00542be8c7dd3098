//! Who owns which shard, and how far each is applied.
//!
//! [`row`] is what is stored, [`rules`] are the pure rules of ownership, [`table`] reads and
//! writes the state table, [`held`] is a lease this process owns, [`doubts`] (pure) says what may
//! still take effect, [`orphans`] (pure) which shards could be read, [`control`] which region is
//! active.

pub mod control;
pub mod doubts;
pub mod held;
pub mod orphans;
pub mod row;
pub mod rules;
pub mod table;
