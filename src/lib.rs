//! Farshore keeps DynamoDB tables alive in a second region.
pub mod apply;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod dead_letter;
pub mod dynamo;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod error;
pub mod jobs;
pub mod lease;
pub mod observe;
pub mod run;
pub mod stream;
