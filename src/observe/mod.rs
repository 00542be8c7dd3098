//! What the outside sees: metrics, health, and the small HTTP server that shows them.

pub mod active;
pub mod board;
pub mod events;
pub mod headline;
pub mod health;
pub mod history;
pub mod liveness;
pub mod metrics;
pub mod page;
pub mod pulse;
pub mod recovery;
pub mod server;
pub mod view;
pub mod whereabouts;
