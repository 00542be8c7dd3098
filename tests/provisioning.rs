//! `farshore provision`: makes what is missing, changes nothing that exists, and never leaves a
//! half without saying so.

mod common;

use aws_sdk_dynamodb::types::{
    BillingMode, GlobalSecondaryIndex, KeyType, LocalSecondaryIndex, Projection, ProjectionType,
    ProvisionedThroughput, ScalarAttributeType, StreamSpecification, StreamViewType,
};
use common::binary::{run, stderr, stdout};
use common::stand::{Stand, attribute, key, s, state_rows};
use farshore::embedded::gateway::{Fault, Options};

async fn rich_source(stand: &Stand, name: &str) {
    let throughput = |read: i64, write: i64| {
        ProvisionedThroughput::builder()
            .read_capacity_units(read)
            .write_capacity_units(write)
            .build()
            .unwrap()
    };
    let projection = || {
        Projection::builder()
            .projection_type(ProjectionType::All)
            .build()
    };
    let by_kind = GlobalSecondaryIndex::builder()
        .index_name("by-kind")
        .key_schema(key("kind", KeyType::Hash))
        .key_schema(key("at", KeyType::Range))
        .projection(projection())
        .provisioned_throughput(throughput(7, 3))
        .build()
        .unwrap();
    let by_size = LocalSecondaryIndex::builder()
        .index_name("by-size")
        .key_schema(key("id", KeyType::Hash))
        .key_schema(key("size", KeyType::Range))
        .projection(
            Projection::builder()
                .projection_type(ProjectionType::Include)
                .non_key_attributes("note")
                .build(),
        )
        .build()
        .unwrap();
    stand
        .source
        .create_table()
        .table_name(name)
        .attribute_definitions(attribute("id", ScalarAttributeType::S))
        .attribute_definitions(attribute("at", ScalarAttributeType::N))
        .attribute_definitions(attribute("kind", ScalarAttributeType::B))
        .attribute_definitions(attribute("size", ScalarAttributeType::N))
        .key_schema(key("id", KeyType::Hash))
        .key_schema(key("at", KeyType::Range))
        .global_secondary_indexes(by_kind)
        .local_secondary_indexes(by_size)
        .billing_mode(BillingMode::Provisioned)
        .provisioned_throughput(throughput(11, 5))
        .stream_specification(
            StreamSpecification::builder()
                .stream_enabled(true)
                .stream_view_type(StreamViewType::NewAndOldImages)
                .build()
                .unwrap(),
        )
        .send()
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_made_like_its_source() {
    let stand = Stand::new().await;
    let table = stand.table("rich");
    rich_source(&stand, &table).await;
    let config = stand.config(&[&table], "");
    let path = config.to_str().unwrap();
    // The plan changes nothing.
    let plan = run(&["provision", "--config", path]);
    assert_eq!(plan.status.code(), Some(1), "{}", stderr(&plan));
    let text = stdout(&plan);
    for part in [
        "create table",
        "id (S, HASH), at (N, RANGE)",
        "1 GSI, 1 LSI",
        "create state table",
        "control record",
        "--apply",
    ] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    let tables = stand.target.list_tables().send().await.unwrap();
    assert!(!tables.table_names().contains(&table));
    let applied = run(&["provision", "--apply", "--json", "--config", path]);
    assert_eq!(applied.status.code(), Some(0), "{}", stderr(&applied));
    let answer: serde_json::Value = serde_json::from_slice(&applied.stdout).unwrap();
    assert_eq!(answer["version"], 1);
    assert_eq!(answer["done"].as_array().unwrap().len(), 6);
    let describe = async |client: &aws_sdk_dynamodb::Client| {
        client
            .describe_table()
            .table_name(&table)
            .send()
            .await
            .unwrap()
            .table
            .unwrap()
    };
    let (from, to) = (describe(&stand.source).await, describe(&stand.target).await);
    assert_eq!(from.key_schema(), to.key_schema());
    let sorted = |table: &aws_sdk_dynamodb::types::TableDescription| {
        let mut names: Vec<String> = table
            .attribute_definitions()
            .iter()
            .map(|d| format!("{} {}", d.attribute_name(), d.attribute_type()))
            .collect();
        names.sort();
        names
    };
    assert_eq!(sorted(&from), sorted(&to));
    let (gsi, lsi) = (
        &to.global_secondary_indexes()[0],
        &to.local_secondary_indexes()[0],
    );
    assert_eq!(
        gsi.key_schema(),
        from.global_secondary_indexes()[0].key_schema()
    );
    assert_eq!(
        gsi.projection(),
        from.global_secondary_indexes()[0].projection()
    );
    assert_eq!(
        lsi.key_schema(),
        from.local_secondary_indexes()[0].key_schema()
    );
    assert_eq!(
        lsi.projection(),
        from.local_secondary_indexes()[0].projection()
    );
    let capacity = to.provisioned_throughput().unwrap();
    assert_eq!(
        (
            capacity.read_capacity_units(),
            capacity.write_capacity_units()
        ),
        (Some(11), Some(5))
    );
    let stream = to.stream_specification().unwrap();
    assert_eq!(
        stream.stream_view_type(),
        Some(&StreamViewType::NewAndOldImages)
    );
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["leaseKey"], s("control"));
    assert_eq!(rows[0]["active"], s("us-east-1"));
    // A second time there is nothing to do, and nothing changes.
    let again = run(&["provision", "--apply", "--config", path]);
    assert_eq!(again.status.code(), Some(0));
    assert!(
        stdout(&again).contains("Done: 0 created"),
        "{}",
        stdout(&again)
    );
    assert_eq!(state_rows(&stand.target, &stand.state_table()).await, rows);
    let plan = run(&["provision", "--config", path]);
    assert_eq!(plan.status.code(), Some(0), "nothing is missing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_half_way_it_says_what_exists_now() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    let path = config.to_str().unwrap();
    let state = stand.state_table();
    stand.gateways[1].inject(Fault::access_denied().on("CreateTable").table(&state));
    let stopped = run(&["provision", "--apply", "--config", path]);
    assert_eq!(stopped.status.code(), Some(2));
    let (out, err) = (stdout(&stopped), stderr(&stopped));
    assert!(out.contains(&format!("✓ create table {table}")), "{out}");
    assert!(
        out.contains(&format!("✗ not done: create state table {state}")),
        "{out}"
    );
    assert!(
        out.contains("✗ not done: write the control record"),
        "{out}"
    );
    assert!(out.contains("1 of 6"), "{out}");
    assert!(
        err.contains("Provisioning stopped") && err.contains("AccessDeniedException"),
        "{err}"
    );
    assert!(err.contains("run the command again"), "{err}");
    let tables = stand.target.list_tables().send().await.unwrap();
    assert_eq!(tables.table_names(), [table]);
    // The cause mended, the same command goes on with what is missing.
    stand.gateways[1].clear_faults();
    let done = run(&["provision", "--apply", "--config", path]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert!(
        stdout(&done).contains("Done: 5 created"),
        "{}",
        stdout(&done)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedded_regions_are_provisioned_by_run_alone() {
    let stand = Stand::embedded().await;
    let config = stand.config_at(
        "embedded",
        "embedded",
        &["orders"],
        &format!("[dead_letters]\ndirectory = {:?}\n", stand.letters()),
    );
    let refused = run(&["provision", "--config", config.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        stderr(&refused).contains("farshore run"),
        "{}",
        stderr(&refused)
    );
    // `run` is a real two-region set-up: what is written to the one arrives in the other.
    let worker = common::binary::Worker::following(&config).await;
    let log = common::stand::text_of(&worker.log);
    let url = |region: &str| {
        let line = log
            .lines()
            .find(|l| l.contains("embedded region") && l.contains(region))
            .unwrap();
        line.split("endpoint=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .to_owned()
    };
    let source = common::stand::client(&url("us-east-1"), "us-east-1");
    let target = common::stand::client(&url("us-west-2"), "us-west-2");
    common::stand::put(&source, "orders", "a", 1).await;
    let arrived = async || common::checker::items(&target, "orders").await.len() == 1;
    common::eventually(
        "the item arrives",
        std::time::Duration::from_secs(10),
        arrived,
    )
    .await;
    assert_eq!(worker.get("/readyz").await.unwrap().0, 200);
    assert!(worker.stop().await.success());
}
