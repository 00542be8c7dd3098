//! The parts of a failover, each with its tests.

mod after;
mod answers;
mod late;
mod planned;
