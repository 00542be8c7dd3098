//! Failback: home again, with the writes that never left.
//!
//! ```text
//!   quarantine: what is stranded is captured ─┐
//!   active region: a ledger of what it wrote ─┴▶ judged key by key ─▶ applied, kept or reported ─▶ the flow turns
//!                                                ([`judge`], pure)                                  round
//! ```

pub mod judge;
pub mod ledger;
