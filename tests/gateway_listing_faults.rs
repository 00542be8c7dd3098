//! Faults of listings and pages: what is late, missing, empty or short, as an official SDK client
//! sees it.

mod gateway_support;

use std::time::Duration;

use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodbstreams::types::{Shard, ShardFilter, ShardFilterType};
use farshore::embedded::gateway::{Fault, Options};
use gateway_support::*;

#[tokio::test(flavor = "multi_thread")]
async fn describe_stream_is_limited_to_ten_a_second() {
    let (_gateway, _, streams, arn) = started(Options::new(33).fault(Fault::call_rate(10.0))).await;
    let mut refused = 0;
    for _ in 0..20 {
        if let Err(error) = streams.describe_stream().stream_arn(&arn).send().await {
            assert_eq!(error.code(), Some("LimitExceededException"));
            refused += 1;
        }
    }
    assert!((5..=10).contains(&refused), "{refused} of 20 refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_empty_or_short_in_mid_shard_and_last_ones_empty_on_demand() {
    let options = Options::new(34).shards(2);
    let options = options.fault(Fault::empty_page().chance(0.4));
    let options = options.fault(Fault::short_page().chance(0.5));
    let (gateway, dynamo, streams, arn) = started(options.fault(Fault::empty_last_page())).await;
    let expected = write(&dynamo, "orders", "k", 40, 10).await;
    gateway.rotate_all("orders").unwrap();
    let walk = walk(&streams, &arn, &expected).await;
    assert_eq!(walk.history(), tidy(expected));
    assert!(walk.empty_pages > 2, "{} empty pages", walk.empty_pages);
    assert!(walk.finished.len() >= 2);
    assert_eq!(walk.last_pages_with_records, 0);
}

async fn children(streams: &Streams, arn: &str, parent: &str) -> Vec<Shard> {
    let filter = ShardFilter::builder()
        .r#type(ShardFilterType::ChildShards)
        .shard_id(parent);
    let asked = streams
        .describe_stream()
        .stream_arn(arn)
        .shard_filter(filter.build());
    let found = asked.send().await.unwrap().stream_description.unwrap();
    found.shards.unwrap_or_default()
}

fn is_open(shard: &Shard) -> bool {
    shard
        .sequence_number_range()
        .unwrap()
        .ending_sequence_number()
        .is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answers_about_children_are_empty() {
    let (gateway, _, streams, arn) =
        started(Options::new(35).fault(Fault::empty_children(2))).await;
    let parent = gateway.shards("orders")[0].id.clone();
    gateway.split("orders", &parent).unwrap();
    let mut found = Vec::new();
    for _ in 0..4 {
        found.push(children(&streams, &arn, &parent).await.len());
    }
    assert_eq!(found, [0, 0, 2, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn children_are_listed_late_and_parents_open_beside_them() {
    let late = Duration::from_secs(100);
    let options = Options::new(36).fault(Fault::late_children(late));
    let options = options.fault(Fault::open_parents(2 * late));
    let (gateway, _, streams, arn) = started(options).await;
    let parent = gateway.shards("orders")[0].id.clone();
    gateway.rotate("orders", &parent).unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let shards = listing(&streams, &arn).await;
        seen.push(shards.iter().map(is_open).collect::<Vec<_>>());
        gateway.advance(late + Duration::from_secs(1));
    }
    assert_eq!(seen, [vec![true], vec![true, true], vec![false, true]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_misses_each_shard_once() {
    let mut firsts = Vec::new();
    for _ in 0..2 {
        let options = Options::new(37)
            .shards(10)
            .fault(Fault::missing_shard().chance(0.5));
        let (_gateway, _, streams, arn) = started(options).await;
        let suffix = |shard: &Shard| shard.shard_id().unwrap()[29..].to_owned();
        let first: Vec<String> = listing(&streams, &arn).await.iter().map(suffix).collect();
        assert!((1..10).contains(&first.len()), "{} of 10", first.len());
        assert_eq!(listing(&streams, &arn).await.len(), 10);
        firsts.push(first);
    }
    assert_eq!(firsts[0], firsts[1], "one seed, two draws");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walk_gets_every_record_once_through_inconsistent_listings() {
    let options = Options::new(38)
        .shards(4)
        .rotate_every(Duration::from_millis(300));
    let late = Duration::from_millis(200);
    let options = options
        .fault(Fault::late_children(late).chance(0.5))
        .fault(Fault::open_parents(late).chance(0.5))
        .fault(Fault::missing_shard().chance(0.2));
    let (gateway, dynamo, streams, arn) = started(options).await;
    let writing = dynamo.clone();
    let writer = tokio::spawn(async move { write(&writing, "orders", "k", 30, 40).await });
    let mut walk = Walk::default();
    while !writer.is_finished() {
        walk.round(&streams, &arn).await;
    }
    let expected = writer.await.unwrap();
    gateway.stop_resharding();
    walk.reach(&streams, &arn, changes(&expected)).await;
    assert_eq!(walk.history(), tidy(expected));
}
