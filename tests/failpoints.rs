//! The program can be stopped just before it transmits a request, and continued.

mod common;

use std::time::Duration;

use common::binary::{Worker, provision};
use common::eventually;
use common::stand::{Stand, put};
use farshore::embedded::gateway::Options;
use rustix::process::Signal;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_stops_before_its_second_write_and_goes_on_when_continued() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let worker = Worker::start_with(&config, &[("FARSHORE_TEST_FAILPOINT", "BatchWriteItem@2")]);
    let writes = || stand.gateways[1].calls_of("BatchWriteItem").len();
    let until_written = async || writes() == 1;
    put(&stand.source, &table, "first", 1).await;
    eventually(
        "the first write arrives",
        Duration::from_secs(15),
        until_written,
    )
    .await;
    stand.converge(&table, 1).await;
    put(&stand.source, &table, "second", 2).await;
    let stopped = async || worker.is_stopped();
    eventually(
        "it stops before the second",
        Duration::from_secs(15),
        stopped,
    )
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        writes(),
        1,
        "the request left although the process is stopped"
    );
    worker.signal(Signal::CONT);
    stand.converge(&table, 2).await;
    assert!(worker.stop().await.success());
}

/// What `cargo build` makes has no failpoints: only `cargo test` asks for them.
#[test]
fn failpoints_are_no_default_feature() {
    let manifest: toml::Table = include_str!("../Cargo.toml").parse().unwrap();
    let defaults = manifest["features"]["default"].as_array().unwrap();
    assert!(
        !defaults
            .iter()
            .any(|feature| feature.as_str() == Some("failpoints"))
    );
    for (name, enables) in manifest["features"].as_table().unwrap() {
        let enables = enables.as_array().unwrap();
        assert!(
            !enables
                .iter()
                .any(|feature| feature.as_str() == Some("failpoints")),
            "{name} turns failpoints on"
        );
    }
}
