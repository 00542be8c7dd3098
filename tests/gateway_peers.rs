//! The gateway's streams as another language's official SDK sees them.

mod gateway_support;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use farshore::embedded::gateway::{Gateway, Options};
use gateway_support::*;

/// A python with boto3: `FARSHORE_PEER_PYTHON`, or that of the environment in `target/peers`.
fn python() -> PathBuf {
    let named = std::env::var_os("FARSHORE_PEER_PYTHON").map(PathBuf::from);
    named.unwrap_or_else(|| PathBuf::from("target/peers/bin/python"))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs boto3: FARSHORE_PEER_PYTHON names a python that has it"]
async fn boto3_gets_every_record_once_in_order_per_key_through_splits_and_rotations() {
    let options = Options::new(50).shards(8).describe_page(5);
    let options = options.rotate_every(Duration::from_millis(500));
    let options = options.split_every(Duration::from_millis(400));
    let gateway = Gateway::start(options).await.unwrap();
    let (dynamo, _) = clients(&gateway).await;
    table(&dynamo, "orders").await;
    let expected = tidy(write(&dynamo, "orders", "k", 60, 40).await);
    gateway.stop_resharding();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("expected.json");
    std::fs::write(&file, serde_json::to_vec(&expected).unwrap()).unwrap();
    let mut peer = Command::new(python());
    peer.arg("tests/peers/gateway_walk.py");
    peer.arg(gateway.endpoint_url()).arg("orders").arg(file);
    let done = tokio::task::spawn_blocking(move || peer.output())
        .await
        .unwrap()
        .unwrap();
    let (told, faults) = (
        String::from_utf8_lossy(&done.stdout).into_owned(),
        String::from_utf8_lossy(&done.stderr).into_owned(),
    );
    assert!(done.status.success(), "{told}{faults}");
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["records"], changes(&expected));
    assert!(told["finished"].as_u64().unwrap() > 8, "{told}");
}
