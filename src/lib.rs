//! Farshore keeps DynamoDB tables alive in a second region.
pub mod apply;
pub mod config;
pub mod dynamo;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod error;
pub mod lease;
pub mod observe;
pub mod stream;
