//! What is looked at once a second, or when somebody asks, and moves with no record.

use metrics::{counter, gauge};

use super::{
    BUDGET, CLOCK_ERROR, DOUBTS, DRIFT, GROUP_POINT, HEADROOM, ITERATOR_AGE, LAST_RECORD, LEASES,
    LIMIT, LOST, OPEN, OUTAGE, PAUSED, POINT, STANDBY, TAKEN, UNOWNED, VERIFIED_AGE,
};
use crate::observe::health::Scope;
use crate::observe::recovery::Age;

/// The recovery point of `table` is so old.
pub fn recovery_point(table: &str, age: Age) {
    for (kind, seconds) in kinds(age) {
        gauge!(POINT, "table" => table.to_owned(), "kind" => kind).set(seconds);
    }
}

/// That of the group is so old, by a clock with this error, in seconds.
pub fn group_recovery_point(age: Age, clock_error_s: f64) {
    for (kind, seconds) in kinds(age) {
        gauge!(GROUP_POINT, "kind" => kind).set(seconds);
    }
    gauge!(CLOCK_ERROR).set(clock_error_s);
}

fn kinds(age: Age) -> [(&'static str, f64); 2] {
    [
        ("proven", age.proven_s.unwrap_or(f64::INFINITY)),
        ("estimated", age.estimated_s.unwrap_or(f64::INFINITY)),
    ]
}

/// Whether this region is the active one.
pub fn standby(is_active: bool) {
    gauge!(STANDBY).set(f64::from(u8::from(is_active)));
}

/// This worker feeds none of `tables` any more: what grew older by itself is no number from now on, and
/// nothing is held.
pub fn feeds_no_more<'a>(tables: impl Iterator<Item = &'a str> + Clone) {
    for kind in ["proven", "estimated"] {
        gauge!(GROUP_POINT, "kind" => kind).set(f64::NAN);
    }
    for table in tables.clone() {
        for kind in ["proven", "estimated"] {
            gauge!(POINT, "table" => table.to_owned(), "kind" => kind).set(f64::NAN);
        }
        for name in [ITERATOR_AGE, HEADROOM, VERIFIED_AGE, DRIFT] {
            gauge!(name, "table" => table.to_owned()).set(f64::NAN);
        }
        for name in [LEASES, OPEN, UNOWNED, PAUSED, DOUBTS, BUDGET, LIMIT] {
            gauge!(name, "table" => table.to_owned()).set(0.0);
        }
    }
    for table in tables.chain([""]) {
        for scope in Scope::ALL {
            outage(table, scope, false);
        }
    }
}

/// When a record of `table` was last finished, in milliseconds; 0 before the first.
pub fn last_record(table: &str, at_ms: i64) {
    gauge!(LAST_RECORD, "table" => table.to_owned()).set(at_ms as f64 / 1_000.0);
}

/// Whether an outage is open.
pub fn outage(table: &str, scope: Scope, is_open: bool) {
    let flag = f64::from(u8::from(is_open));
    gauge!(OUTAGE, "table" => table.to_owned(), "scope" => scope.label()).set(flag);
}

/// A lease was taken; `expired` says that its owner had not given it back.
pub fn lease_taken(table: &str, expired: bool) {
    let how = if expired { "expired" } else { "free" };
    counter!(TAKEN, "table" => table.to_owned(), "how" => how).increment(1);
}

/// A lease was lost.
pub fn lease_lost(table: &str) {
    counter!(LOST, "table" => table.to_owned()).increment(1);
}

/// Open shards of `table`, and those of them that nobody owns.
pub fn shards(table: &str, open: usize, unowned: usize) {
    gauge!(OPEN, "table" => table.to_owned()).set(open as f64);
    gauge!(UNOWNED, "table" => table.to_owned()).set(unowned as f64);
}
