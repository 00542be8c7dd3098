//! A DynamoDB inside the program (cargo feature `embedded`).
//!
//! `endpoint_url = "embedded"` in a configuration, the demo and the tests all use it: a real
//! HTTP server on a free loopback port that speaks DynamoDB and DynamoDB Streams, so the very
//! same SDK calls run against it as against AWS. Its data lives in memory and ends with the
//! process.

pub mod gateway;
mod server;

pub use server::{EmbeddedServer, StartError};
