//! What the tests share: two regions, the real binary, a proxy that can be cut, and a checker
//! that shares no code with Farshore.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod binary;
pub mod checker;
pub mod ministack;
pub mod proxy;
pub mod stand;

use std::future::Future;
use std::time::{Duration, Instant};

/// Waits until `ready` says so, or panics with `what` after `within`.
pub async fn eventually<F, Fut>(what: &str, within: Duration, mut ready: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let start = Instant::now();
    while !ready().await {
        assert!(start.elapsed() < within, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `long` in the long lane (`FARSHORE_LONG=1`), else `short`.
pub fn long(long: u64, short: u64) -> u64 {
    match std::env::var_os("FARSHORE_LONG") {
        Some(_) => long,
        None => short,
    }
}

/// The seed of a random test: `FARSHORE_TEST_SEED`, or a new one, printed so that a failure can
/// be repeated.
pub fn seed() -> u64 {
    let seed = std::env::var("FARSHORE_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::random::<u32>().into());
    println!("repeat with FARSHORE_TEST_SEED={seed}");
    seed
}
