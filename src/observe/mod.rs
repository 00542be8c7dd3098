//! What the outside sees: metrics, health, and the small HTTP server that shows them.

pub mod active;
pub mod board;
pub mod health;
pub mod liveness;
pub mod metrics;
pub mod pulse;
pub mod server;
pub mod whereabouts;
