//! The replica side: what is written, in which order, and how fast.
//!
//! [`coalesce`] is pure: it keeps order per key and knows how far everything is durable.
//! [`batch`] sends, and isolates what the replica refuses; [`budget`] limits write units.

pub mod batch;
pub mod budget;
pub mod coalesce;
