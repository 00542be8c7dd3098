//! Farshore keeps DynamoDB tables alive in a second region.
#[cfg(feature = "embedded")]
pub mod embedded;
