//! Poison and outages: the one never blocks, the others never dead-letter.

use std::time::Duration;

use aws_sdk_dynamodb::types::{
    BillingMode, GlobalSecondaryIndex, KeyType, Projection, ProjectionType, ScalarAttributeType,
};

use crate::common::binary::{Worker, provision};
use crate::common::eventually;
use crate::common::stand::{Stand, attribute, key, n, put, s, state_rows};

/// A replica that refuses items whose `kind` is no string: it has an index that the source lacks.
pub async fn picky_replica(stand: &Stand, table: &str) {
    stand.create_source(table).await;
    picky_table(stand, table).await;
}

/// The replica of it alone.
pub async fn picky_table(stand: &Stand, table: &str) {
    let index = GlobalSecondaryIndex::builder()
        .index_name("by-kind")
        .key_schema(key("kind", KeyType::Hash))
        .projection(
            Projection::builder()
                .projection_type(ProjectionType::KeysOnly)
                .build(),
        )
        .build()
        .unwrap();
    stand
        .target
        .create_table()
        .table_name(table)
        .attribute_definitions(attribute("id", ScalarAttributeType::S))
        .attribute_definitions(attribute("kind", ScalarAttributeType::S))
        .key_schema(key("id", KeyType::Hash))
        .global_secondary_indexes(index)
        .billing_mode(BillingMode::PayPerRequest)
        .send()
        .await
        .unwrap();
}

/// Puts an item that a picky replica takes, or refuses as poison.
pub async fn put_kind(stand: &Stand, table: &str, id: &str, poison: bool) {
    let kind = if poison { n(7) } else { s("good") };
    stand
        .source
        .put_item()
        .table_name(table)
        .item("id", s(id))
        .item("kind", kind)
        .send()
        .await
        .unwrap();
}

/// The checkpoint of the table's only started shard.
pub async fn checkpoint(stand: &Stand) -> String {
    checkpoints(stand)
        .await
        .into_iter()
        .next()
        .unwrap_or_default()
}

/// The checkpoints of all shards that have a number.
async fn checkpoints(stand: &Stand) -> Vec<String> {
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    rows.iter()
        .filter(|row| row["entityType"] == s("shard"))
        .filter_map(|row| row["checkpoint"].as_s().ok())
        .filter(|at| at.bytes().all(|byte| byte.is_ascii_digit()))
        .cloned()
        .collect()
}

/// One record that the replica refuses goes to the dead letters; its 25 neighbours are applied,
/// and the checkpoint passes it only then.
pub async fn poison_is_isolated(stand: &Stand) {
    let table = stand.table("picky");
    picky_replica(stand, &table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    for id in 0..26 {
        put_kind(stand, &table, &format!("k{id}"), id == 13).await;
    }
    let applied = async || stand.differences(&table).await.len() == 1;
    eventually(
        "the good neighbours arrive",
        Duration::from_secs(20),
        applied,
    )
    .await;
    let lettered = async || stand.dead_letters().len() == 1;
    eventually(
        "the poison is dead-lettered",
        Duration::from_secs(20),
        lettered,
    )
    .await;
    let letter = stand.dead_letters().remove(0);
    assert_eq!(letter["version"], 1);
    assert_eq!(letter["table"], table.as_str());
    assert_eq!(letter["source"]["region"], "us-east-1");
    assert_eq!(letter["target"]["region"], "us-west-2");
    assert_eq!(letter["event"], "INSERT");
    assert_eq!(letter["keys"]["id"]["S"], "k13");
    assert_eq!(letter["newImage"]["kind"]["N"], "7");
    assert_eq!(letter["error"]["class"], "validation");
    assert_eq!(letter["attempts"], 3);
    let position = letter["sequenceNumber"].as_str().unwrap().to_owned();
    let passed = async || {
        // Its shard may have ended, and one without records has no number to show.
        put_kind(stand, &table, "k0", false).await;
        let at = checkpoints(stand).await;
        // Numbers get wider as a stream ages.
        at.iter()
            .any(|at| (at.len(), at) > (position.len(), &position))
    };
    eventually(
        "the checkpoint passes the poison",
        Duration::from_secs(30),
        passed,
    )
    .await;
    assert_eq!(worker.metric("farshore_dead_letters_total").await, 1.0);
    // A later, acceptable change of the same item is applied as always.
    put_kind(stand, &table, "k13", false).await;
    stand.converge(&table, 26).await;
    assert!(worker.stop().await.success());
}

/// The dead letters cannot be stored: the checkpoint waits before the poison, other keys go on,
/// and nothing is lost.
pub async fn a_queue_that_refuses_holds_the_checkpoint(stand: &Stand) {
    let table = stand.table("picky");
    picky_replica(stand, &table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    put_kind(stand, &table, "first", false).await;
    stand.converge(&table, 1).await;
    let moved = async || !checkpoint(stand).await.is_empty();
    eventually("the first checkpoint", Duration::from_secs(5), moved).await;
    std::fs::remove_dir_all(stand.letters()).unwrap();
    // A file where the directory was: not even root can write there.
    std::fs::write(stand.letters(), "in the way").unwrap();
    let before = checkpoint(stand).await;
    put_kind(stand, &table, "poison", true).await;
    for id in 0..30 {
        put_kind(stand, &table, &format!("k{id}"), false).await;
    }
    let applied = async || stand.differences(&table).await.len() == 1;
    eventually("other keys go on", Duration::from_secs(20), applied).await;
    let red = async || {
        let (status, body) = worker.get("/readyz").await.unwrap();
        status == 503 && body.contains("outage-dead-letters")
    };
    eventually("readiness tells why", Duration::from_secs(10), red).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        checkpoint(stand).await,
        before,
        "the checkpoint passed an undelivered dead letter"
    );
    std::fs::remove_file(stand.letters()).unwrap();
    std::fs::create_dir(stand.letters()).unwrap();
    let lettered = async || stand.dead_letters().len() == 1;
    eventually("the letter is delivered", Duration::from_secs(20), lettered).await;
    let moved = async || checkpoint(stand).await > before;
    eventually("the checkpoint moves on", Duration::from_secs(10), moved).await;
    assert_eq!(worker.logged("outage begins"), 1);
    assert_eq!(worker.logged("outage ends"), 1);
    assert!(worker.stop().await.success());
}

/// An outage of the source region.
pub async fn an_outage_of_the_source(stand: &Stand) {
    an_outage_is_waited_out(stand, true).await;
}

/// An outage of the replica region.
pub async fn an_outage_of_the_replica(stand: &Stand) {
    an_outage_is_waited_out(stand, false).await;
}

/// An outage of 5 s, of the source or of the replica region, is waited out: one line when it
/// begins, one when it ends, no dead letter, nothing lost.
async fn an_outage_is_waited_out(stand: &Stand, of_source: bool) {
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let source = stand.proxy(&stand.source_url).await;
    let target = stand.proxy(&stand.target_url).await;
    let letters = format!("[dead_letters]\ndirectory = {:?}\n", stand.letters());
    let config = stand.config_at(&source.url(), &target.url(), &[&table], &letters);
    provision(&config);
    let worker = Worker::following(&config).await;
    for id in 0..50 {
        put(&stand.source, &table, &format!("a{id}"), id).await;
    }
    stand.converge(&table, 50).await;
    let (cut, code) = if of_source {
        (&source, "outage-source")
    } else {
        (&target, "outage-")
    };
    cut.cut();
    let start = std::time::Instant::now();
    for id in 0..50 {
        put(&stand.source, &table, &format!("b{id}"), id).await;
    }
    let red = async || {
        let (status, body) = worker.get("/readyz").await.unwrap();
        status == 503 && body.contains(code)
    };
    eventually("readiness turns red", Duration::from_secs(20), red).await;
    assert_eq!(
        worker.get("/livez").await.unwrap().0,
        200,
        "an outage elsewhere is no reason to be restarted"
    );
    tokio::time::sleep(Duration::from_secs(5).saturating_sub(start.elapsed())).await;
    cut.heal();
    stand.converge(&table, 100).await;
    let green = async || worker.get("/readyz").await.unwrap().0 == 200;
    eventually("readiness turns green", Duration::from_secs(20), green).await;
    assert!(stand.dead_letters().is_empty());
    for scope in ["scope=\"source\"", "scope=\"replica\"", "scope=\"state\""] {
        let count = |text: &str| {
            crate::common::stand::text_of(&worker.log)
                .lines()
                .filter(|line| line.contains(text) && line.contains(scope) && line.contains(&table))
                .count()
        };
        let (begun, ended) = (count("outage begins"), count("outage ends"));
        assert!(begun <= 1, "{scope} began {begun} times");
        assert_eq!(begun, ended, "{scope}");
    }
    assert!(worker.logged("outage begins") >= 1);
    assert!(worker.stop().await.success());
}
