//! A fleet in memory, in virtual time. What decides is the crate's own pure code: ownership, doubts,
//! lineage, the window of a shard, repair by key. What the crate does around them is mirrored here
//! by small steps, each named after what it mirrors; services fail in every way they can.

pub mod counts;
pub mod doubts;
pub mod lease;
pub mod replica;
pub mod shard;
pub mod sim;
pub mod source;
pub mod state;
pub mod stream;
pub mod worker;
pub mod world;
