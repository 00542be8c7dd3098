//! Writes that take effect late (tenet 7): put in doubt, and repaired when they no longer can.

mod common;
mod suite;

use std::time::Duration;

use common::binary::{Worker, provision};
use common::stand::{Stand, put, s, state_rows};
use common::{eventually, long};
use farshore::embedded::gateway::{Fault, Options};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rustix::process::Signal;

/// Rows of the state table that are doubts.
async fn doubts(stand: &Stand) -> usize {
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    rows.iter()
        .filter(|row| row["entityType"] == s("doubt"))
        .count()
}

async fn until_settled(stand: &Stand) {
    let settled = async || doubts(stand).await == 0;
    eventually("every doubt is settled", Duration::from_secs(40), settled).await;
}

/// Writes held back beyond the client's patience and delivered after newer ones: every item is
/// right once the doubts are settled, and until then they show.
async fn held_back_writes_are_repaired(seed: u64) {
    let stand = Stand::gateways(Options::new(seed), Options::new(seed)).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    let held = stand.gateways[1].inject(
        Fault::hold(Duration::from_secs(4))
            .on("BatchWriteItem")
            .chance(0.1),
    );
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..10 {
        suite::random_changes(&stand, &table, &mut random, 60, 30).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(held.hits() > 0, "seed {seed}: nothing was held back");
    held.off();
    let shown = async || doubts(&stand).await > 0;
    eventually("a doubt is stored", Duration::from_secs(10), shown).await;
    until_settled(&stand).await;
    stand.converge(&table, 1).await;
    assert_eq!(stand.dead_letters(), Vec::<serde_json::Value>::new());
    assert!(worker.metric("farshore_doubts_repaired_total").await > 0.0);
    assert!(worker.stop().await.success(), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_held_back_and_delivered_late_are_repaired() {
    let seeds = 1..=long(10, 3);
    futures::future::join_all(seeds.map(held_back_writes_are_repaired)).await;
}
