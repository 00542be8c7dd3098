//! Compares two tables that may be live, and repairs one.

pub mod join;
