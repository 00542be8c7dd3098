//! One-shot work. Every job that changes something makes a plan first and applies it only when
//! told to.

pub mod compare;
mod exact;
pub mod failback;
pub mod failover;
#[cfg(feature = "embedded")]
pub mod local;
pub mod provision;
pub mod reconcile;
pub mod redrive;
mod tail;
