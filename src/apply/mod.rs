//! The replica side: what is written, in which order, and how fast.
//!
//! [`coalesce`] is pure: it keeps order per key and knows how far everything is durable.
//! [`batch`] sends, and isolates what the replica refuses; [`request`] is what it sends; [`conditional`] writes only where it may; [`flood`] tells when that is too much to be
//! the records' own fault; [`budget`] limits write units, by [`pace`] (pure), and [`payment`] is what a call is paid with.

pub mod batch;
pub mod budget;
pub mod coalesce;
pub mod conditional;
pub mod flood;
pub mod pace;
pub mod payment;
pub mod request;
