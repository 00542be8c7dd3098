//! The gateway's streams are right: an official SDK client walks them through splits, rotations
//! and trims and gets every record once, in order per key.

mod gateway_support;

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, SystemTime};

use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodb::types::{StreamViewType, TimeToLiveSpecification};
use aws_sdk_dynamodbstreams::primitives::DateTime;
use aws_sdk_dynamodbstreams::types::{ShardFilter, ShardFilterType, ShardIteratorType};
use farshore::embedded::EmbeddedServer;
use farshore::embedded::gateway::{Gateway, Options};
use gateway_support::*;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn every_write_is_one_record_in_order_per_key_through_splits_and_rotations() {
    let options = Options::new(1).shards(8).describe_page(5);
    let options = options.rotate_every(Duration::from_millis(400));
    let options = options.split_every(Duration::from_millis(300));
    let gateway = Gateway::start(options).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    let writers = (0..4).map(|writer| {
        let dynamo = dynamo.clone();
        async move { write(&dynamo, "orders", &format!("w{writer}"), 20, 30).await }
    });
    let histories = futures::future::join_all(writers).await;
    gateway.stop_resharding();
    let expected = tidy(histories.into_iter().flatten().collect());
    let walk = walk(&streams, &arn, &expected).await;
    assert_eq!(walk.history(), expected);
    assert!(walk.shards.len() > 16, "{} shards", walk.shards.len());
    assert!(walk.last_pages_with_records > 0);

    let mut last = BTreeMap::new();
    for record in &walk.records {
        let number = sequence(record);
        assert!((21..=40).contains(&number.len()), "{number}");
        let number = as_integer(&number);
        if let Some(before) = last.insert(pk(record), number.clone()) {
            assert!(before < number, "numbers grow over the lineage of a key");
        }
    }
    let widths: HashSet<usize> = walk.records.iter().map(|r| sequence(r).len()).collect();
    assert!(widths.len() > 1, "numbers of one width only: {widths:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walk_that_keeps_up_loses_nothing_to_trimming() {
    let options = Options::new(2).shards(4).retention(MINUTE);
    let gateway = Gateway::start(options).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    let (mut expected, mut walk) = (History::new(), Walk::default());
    for phase in 0..4 {
        expected.extend(write(&dynamo, "orders", &format!("p{phase}"), 30, 3).await);
        gateway.rotate_all("orders").unwrap();
        let mut open = gateway.shards("orders").into_iter().filter(|s| s.open);
        let one = open.next_back().unwrap();
        gateway.split("orders", &one.id).unwrap();
        walk.reach(&streams, &arn, changes(&expected)).await;
        gateway.advance(MINUTE + Duration::from_secs(1));
    }
    assert_eq!(walk.history(), tidy(expected));
    let left = listing(&streams, &arn).await;
    assert!(left.iter().all(|s| {
        s.sequence_number_range()
            .unwrap()
            .ending_sequence_number
            .is_none()
    }));
    assert!(
        left.iter().all(|s| s.parent_shard_id().is_some()),
        "parents are named when trimmed"
    );
    assert!(walk.shards.len() > left.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_changes_nothing_makes_no_record_whatever_the_view() {
    let gateway = Gateway::start(Options::new(3)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    for (name, view, old, new) in [
        ("both", StreamViewType::NewAndOldImages, true, true),
        ("keys", StreamViewType::KeysOnly, false, false),
        ("new", StreamViewType::NewImage, false, true),
        ("old", StreamViewType::OldImage, true, false),
    ] {
        table(&dynamo, name).await;
        let disable = aws_sdk_dynamodb::types::StreamSpecification::builder();
        let disable = disable.stream_enabled(false).build().unwrap();
        for specification in [disable, streaming(view.clone())] {
            let update = dynamo.update_table().table_name(name);
            update
                .stream_specification(specification)
                .send()
                .await
                .unwrap();
        }
        let described = dynamo
            .describe_table()
            .table_name(name)
            .send()
            .await
            .unwrap();
        let described = described.table.unwrap();
        let specification = described.stream_specification.unwrap();
        assert_eq!(specification.stream_view_type, Some(view.clone()));
        let arn = described.latest_stream_arn.unwrap();
        for version in [1, 1, 2, 2, 1] {
            put(&dynamo, name, "a", version).await;
        }
        let mut walk = Walk::default();
        walk.reach(&streams, &arn, 3).await;
        assert_eq!(walk.records.len(), 3, "{name}");
        for record in &walk.records[1..] {
            let data = record.dynamodb().unwrap();
            assert_eq!(data.stream_view_type().unwrap().as_str(), view.as_str());
            assert_eq!(data.old_image().is_some(), old, "{name}");
            assert_eq!(data.new_image().is_some(), new, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_holds_a_thousand_records_or_a_megabyte() {
    let gateway = Gateway::start(Options::new(4)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "small").await;
    for batch in 0..44 {
        let keys = (0..25)
            .map(|n| put_request(&format!("{batch}-{n}"), 1))
            .collect::<Vec<_>>();
        dynamo
            .batch_write_item()
            .request_items("small", keys)
            .send()
            .await
            .unwrap();
    }
    let shard = &gateway.shards("small")[0].id;
    let at = iterator(&streams, &arn, shard, ShardIteratorType::TrimHorizon).await;
    let page = streams
        .get_records()
        .shard_iterator(&at)
        .send()
        .await
        .unwrap();
    assert_eq!(page.records().len(), 1_000);
    let next = page.next_shard_iterator.unwrap();
    let page = streams
        .get_records()
        .shard_iterator(next)
        .send()
        .await
        .unwrap();
    assert_eq!(page.records().len(), 100);
    let page = streams
        .get_records()
        .shard_iterator(at)
        .limit(7)
        .send()
        .await
        .unwrap();
    assert_eq!(page.records().len(), 7);

    let arn = table(&dynamo, "large").await;
    for key in 0..7 {
        let put = dynamo
            .put_item()
            .table_name("large")
            .item("pk", s(&key.to_string()));
        put.item("v", n(1))
            .item("text", s(&"x".repeat(300_000)))
            .send()
            .await
            .unwrap();
    }
    let shard = &gateway.shards("large")[0].id;
    let at = iterator(&streams, &arn, shard, ShardIteratorType::TrimHorizon).await;
    let page = streams
        .get_records()
        .shard_iterator(at)
        .send()
        .await
        .unwrap();
    assert_eq!(page.records().len(), 3);
    let mut walk = Walk::default();
    walk.reach(&streams, &arn, 7).await;
    assert_eq!(walk.history().len(), 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_iterator_starts_where_it_says() {
    let gateway = Gateway::start(Options::new(5)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    put(&dynamo, "orders", "a", 1).await;
    put(&dynamo, "orders", "a", 2).await;
    let shard = gateway.shards("orders")[0].id.clone();
    gateway.advance(MINUTE);
    let later = SystemTime::now() + MINUTE - Duration::from_secs(30);
    let latest = iterator(&streams, &arn, &shard, ShardIteratorType::Latest).await;
    put(&dynamo, "orders", "a", 3).await;

    let read = async |iterator: String| -> Vec<String> {
        let page = streams
            .get_records()
            .shard_iterator(iterator)
            .send()
            .await
            .unwrap();
        page.records().iter().map(sequence).collect()
    };
    let at = |kind: ShardIteratorType| {
        let asked = streams
            .get_shard_iterator()
            .stream_arn(&arn)
            .shard_id(&shard);
        asked.shard_iterator_type(kind)
    };
    let oldest = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    let all = read(oldest).await;
    assert_eq!(all.len(), 3);
    assert_eq!(read(latest).await, all[2..]);
    for (kind, from) in [
        (ShardIteratorType::AtSequenceNumber, 1),
        (ShardIteratorType::AfterSequenceNumber, 2),
    ] {
        let asked = at(kind).sequence_number(&all[1]).send().await.unwrap();
        assert_eq!(read(asked.shard_iterator.unwrap()).await, all[from..]);
    }
    let timed =
        |time: SystemTime| at(ShardIteratorType::AtTimestamp).timestamp(DateTime::from(time));
    for (time, from) in [(later, 2), (SystemTime::UNIX_EPOCH, 0)] {
        let asked = timed(time).send().await.unwrap();
        assert_eq!(read(asked.shard_iterator.unwrap()).await, all[from..]);
    }
    let future = timed(SystemTime::now() + 2 * MINUTE)
        .send()
        .await
        .unwrap_err();
    assert_eq!(future.code(), Some("ValidationException"));
    for wrong in ["7".repeat(20), "9".repeat(40)] {
        let asked = at(ShardIteratorType::AfterSequenceNumber).sequence_number(&wrong);
        assert_eq!(
            asked.send().await.unwrap_err().code(),
            Some("ValidationException")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_iterator_expires_after_a_quarter_of_an_hour_and_a_new_one_goes_on() {
    let gateway = Gateway::start(Options::new(6)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    put(&dynamo, "orders", "a", 1).await;
    let shard = gateway.shards("orders")[0].id.clone();
    let at = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    gateway.advance(14 * MINUTE);
    let page = streams
        .get_records()
        .shard_iterator(&at)
        .send()
        .await
        .unwrap();
    let last = sequence(&page.records()[0]);
    gateway.advance(2 * MINUTE);
    let expired = streams
        .get_records()
        .shard_iterator(at)
        .send()
        .await
        .unwrap_err();
    assert!(expired.into_service_error().is_expired_iterator_exception());
    put(&dynamo, "orders", "a", 2).await;
    let renewed = streams
        .get_shard_iterator()
        .stream_arn(&arn)
        .shard_id(&shard);
    let renewed = renewed.shard_iterator_type(ShardIteratorType::AfterSequenceNumber);
    let renewed = renewed.sequence_number(last).send().await.unwrap();
    let page = streams
        .get_records()
        .set_shard_iterator(renewed.shard_iterator);
    assert_eq!(page.send().await.unwrap().records().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_older_than_a_day_is_trimmed_and_the_oldest_record_is_not() {
    let gateway = Gateway::start(Options::new(7)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    put(&dynamo, "orders", "a", 1).await;
    let shard = gateway.shards("orders")[0].id.clone();
    let oldest = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    let page = streams
        .get_records()
        .shard_iterator(&oldest)
        .send()
        .await
        .unwrap();
    let number = sequence(&page.records()[0]);
    gateway.advance(14 * MINUTE);
    let unread = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    gateway.trim("orders");
    put(&dynamo, "orders", "a", 2).await;

    let trimmed = streams
        .get_records()
        .shard_iterator(unread)
        .send()
        .await
        .unwrap_err();
    assert!(
        trimmed
            .into_service_error()
            .is_trimmed_data_access_exception()
    );
    let after = streams
        .get_shard_iterator()
        .stream_arn(&arn)
        .shard_id(&shard);
    let after = after.shard_iterator_type(ShardIteratorType::AfterSequenceNumber);
    let trimmed = after.sequence_number(number).send().await.unwrap_err();
    assert!(
        trimmed
            .into_service_error()
            .is_trimmed_data_access_exception()
    );
    let long_ago = streams
        .get_shard_iterator()
        .stream_arn(&arn)
        .shard_id(&shard);
    let long_ago = long_ago.shard_iterator_type(ShardIteratorType::AtTimestamp);
    let long_ago = long_ago
        .timestamp(DateTime::from_secs(0))
        .send()
        .await
        .unwrap();
    let page = streams
        .get_records()
        .set_shard_iterator(long_ago.shard_iterator);
    assert_eq!(page.send().await.unwrap().records().len(), 1);
    let horizon = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    let page = streams
        .get_records()
        .shard_iterator(horizon)
        .send()
        .await
        .unwrap();
    assert_eq!(page.records().len(), 1);

    gateway.rotate("orders", &shard).unwrap();
    gateway.advance(DAY + MINUTE);
    let gone = streams
        .get_shard_iterator()
        .stream_arn(&arn)
        .shard_id(&shard);
    let gone = gone
        .shard_iterator_type(ShardIteratorType::TrimHorizon)
        .send()
        .await
        .unwrap_err();
    assert!(gone.into_service_error().is_resource_not_found_exception());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_time_to_live_deletes_is_deleted_by_the_service() {
    let gateway = Gateway::start(Options::new(8)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    let ttl = TimeToLiveSpecification::builder()
        .attribute_name("until")
        .enabled(true);
    let update = dynamo.update_time_to_live().table_name("orders");
    update
        .time_to_live_specification(ttl.build().unwrap())
        .send()
        .await
        .unwrap();
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    for (pk, until) in [("old", since - MINUTE), ("new", since + MINUTE)] {
        let put = dynamo.put_item().table_name("orders").item("pk", s(pk));
        put.item("v", n(1))
            .item("until", n(until.as_secs()))
            .send()
            .await
            .unwrap();
    }
    assert_eq!(gateway.sweep_ttl(), Ok(1));
    let mut walk = Walk::default();
    walk.reach(&streams, &arn, 3).await;
    let (by_user, by_service) = walk.records.split_at(2);
    assert!(
        by_user
            .iter()
            .all(|record| record.user_identity().is_none())
    );
    let identity = by_service[0].user_identity().unwrap();
    assert_eq!(identity.r#type(), Some("Service"));
    assert_eq!(identity.principal_id(), Some("dynamodb.amazonaws.com"));
    assert_eq!(pk(&by_service[0]), "old");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_enabled_again_is_another_one_and_the_old_stays_readable() {
    let gateway = Gateway::start(Options::new(9).shards(2)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let old = table(&dynamo, "orders").await;
    put(&dynamo, "orders", "a", 1).await;
    let update = |on: bool| {
        let specification = if on {
            streaming(StreamViewType::NewAndOldImages)
        } else {
            let off = aws_sdk_dynamodb::types::StreamSpecification::builder();
            off.stream_enabled(false).build().unwrap()
        };
        let update = dynamo.update_table().table_name("orders");
        update.stream_specification(specification).send()
    };
    assert_eq!(
        update(true).await.unwrap_err().code(),
        Some("ValidationException")
    );
    update(false).await.unwrap();
    assert_eq!(
        update(false).await.unwrap_err().code(),
        Some("ValidationException")
    );
    put(&dynamo, "orders", "a", 2).await;
    let new = update(true).await.unwrap().table_description.unwrap();
    let new = new.latest_stream_arn.unwrap();
    put(&dynamo, "orders", "a", 3).await;

    assert_ne!(old, new);
    assert_eq!(gateway.stream_arn("orders").as_deref(), Some(&*new));
    let described = streams
        .describe_stream()
        .stream_arn(&old)
        .send()
        .await
        .unwrap();
    let described = described.stream_description.unwrap();
    assert_eq!(described.stream_status.unwrap().as_str(), "DISABLED");
    let closed = |shard: &aws_sdk_dynamodbstreams::types::Shard| {
        shard
            .sequence_number_range()
            .unwrap()
            .ending_sequence_number()
            .is_some()
    };
    assert!(described.shards.unwrap().iter().all(closed));
    let (mut before, mut after) = (Walk::default(), Walk::default());
    before.reach(&streams, &old, 1).await;
    after.reach(&streams, &new, 1).await;
    assert_eq!((before.records.len(), before.finished.len()), (1, 2));
    assert_eq!((after.records.len(), after.finished.len()), (1, 0));
    let listed = streams
        .list_streams()
        .table_name("orders")
        .send()
        .await
        .unwrap();
    let listed: Vec<_> = listed
        .streams()
        .iter()
        .map(|s| s.stream_arn().unwrap())
        .collect();
    assert_eq!(listed, [&old, &new]);
    gateway.advance(DAY + MINUTE);
    let gone = streams
        .describe_stream()
        .stream_arn(&old)
        .send()
        .await
        .unwrap_err();
    assert!(gone.into_service_error().is_resource_not_found_exception());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_made_again_is_another_table_with_another_stream() {
    let gateway = Gateway::start(Options::new(10)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let id = async || {
        let described = dynamo
            .describe_table()
            .table_name("orders")
            .send()
            .await
            .unwrap();
        described.table.unwrap().table_id.unwrap()
    };
    let old = table(&dynamo, "orders").await;
    let old_id = id().await;
    put(&dynamo, "orders", "a", 1).await;
    dynamo
        .delete_table()
        .table_name("orders")
        .send()
        .await
        .unwrap();
    let new = table(&dynamo, "orders").await;
    put(&dynamo, "orders", "b", 1).await;
    assert_ne!(old, new);
    assert_ne!(old_id, id().await);
    for (arn, pk_expected, finished) in [(&old, "a", 1), (&new, "b", 0)] {
        let mut walk = Walk::default();
        walk.reach(&streams, arn, 1).await;
        let pks: Vec<String> = walk.records.iter().map(pk).collect();
        assert_eq!(pks, [pk_expected]);
        assert_eq!(walk.finished.len(), finished);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_children_of_a_shard_are_found_by_a_filter() {
    let gateway = Gateway::start(Options::new(11).shards(3)).await.unwrap();
    let (dynamo, streams) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    let shards = gateway.shards("orders");
    let rotated = gateway.rotate("orders", &shards[0].id).unwrap();
    let split = gateway.split("orders", &shards[1].id).unwrap();
    for (parent, children) in [
        (&shards[0].id, vec![rotated]),
        (&shards[1].id, split.to_vec()),
        (&shards[2].id, vec![]),
    ] {
        let filter = ShardFilter::builder().r#type(ShardFilterType::ChildShards);
        let filter = filter.shard_id(parent).build();
        let asked = streams
            .describe_stream()
            .stream_arn(&arn)
            .shard_filter(filter);
        let found = asked.send().await.unwrap().stream_description.unwrap();
        let found = found.shards.unwrap_or_default();
        let ids: HashSet<_> = found
            .iter()
            .map(|s| s.shard_id().unwrap().to_owned())
            .collect();
        assert_eq!(ids, children.into_iter().collect());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn table_calls_pass_through_as_if_there_were_no_gateway() {
    let options = Options::new(12).region("us-west-2").account("123456789012");
    let gateway = Gateway::start(options).await.unwrap();
    let (dynamo, _) = clients(&gateway).await;
    let arn = table(&dynamo, "orders").await;
    let prefix = "arn:aws:dynamodb:us-west-2:123456789012:table/orders";
    assert!(arn.starts_with(&format!("{prefix}/stream/")), "{arn}");
    let described = dynamo
        .describe_table()
        .table_name("orders")
        .send()
        .await
        .unwrap();
    let described = described.table.unwrap();
    assert_eq!(described.table_arn(), Some(prefix));
    assert_eq!(described.latest_stream_arn(), Some(&*arn));
    assert_eq!(described.latest_stream_label(), arn.rsplit('/').next());
    for key in ["a", "b", "c"] {
        put(&dynamo, "orders", key, 1).await;
    }
    let conditional = dynamo.put_item().table_name("orders").item("pk", s("a"));
    let conditional = conditional.condition_expression("attribute_not_exists(pk)");
    let refused = conditional.send().await.unwrap_err().into_service_error();
    assert!(refused.is_conditional_check_failed_exception());
    let scanned = dynamo.scan().table_name("orders").send().await.unwrap();
    assert_eq!(scanned.count(), 3);
    let missing = dynamo.get_item().table_name("missing").key("pk", s("a"));
    let missing = missing.send().await.unwrap_err().into_service_error();
    assert!(missing.is_resource_not_found_exception());
    let got = dynamo.get_item().table_name("orders").key("pk", s("a"));
    assert_eq!(got.send().await.unwrap().item().unwrap()["v"], n(1));
    let unprocessed = dynamo
        .batch_write_item()
        .request_items("orders", vec![put_request("d", 1)]);
    assert!(
        unprocessed
            .send()
            .await
            .unwrap()
            .unprocessed_items()
            .unwrap()
            .is_empty()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tables_of_a_server_that_ran_before_keep_their_records() {
    let embedded = EmbeddedServer::start().await.unwrap();
    let first = Gateway::in_front_of(embedded, Options::new(13))
        .await
        .unwrap();
    let (dynamo, _) = clients(&first).await;
    table(&dynamo, "orders").await;
    put(&dynamo, "orders", "a", 1).await;
    // A second gateway has its own streams of the same tables.
    let database = first.embedded().database().clone();
    let embedded = EmbeddedServer::around(database).await.unwrap();
    let second = Gateway::in_front_of(embedded, Options::new(13).shards(4))
        .await
        .unwrap();
    let (dynamo, streams) = clients(&second).await;
    put(&dynamo, "orders", "a", 2).await;
    let mut walk = Walk::default();
    let arn = second.stream_arn("orders").unwrap();
    walk.reach(&streams, &arn, 2).await;
    assert_eq!(walk.history()["a"], [Some(1), Some(2)]);
}

#[tokio::test]
async fn an_embedded_server_is_cut_and_serves_the_same_data_again() {
    let mut gateway = Gateway::start(Options::new(14)).await.unwrap();
    let (dynamo, _) = clients(&gateway).await;
    table(&dynamo, "orders").await;
    put(&dynamo, "orders", "a", 1).await;
    gateway.embedded_mut().cut().await;
    let put_again = dynamo.put_item().table_name("orders").item("pk", s("a"));
    let refused = put_again.send().await.unwrap_err();
    assert_eq!(refused.code(), Some("InternalServerError"));
    gateway.embedded_mut().resume().await.unwrap();
    let got = dynamo.get_item().table_name("orders").key("pk", s("a"));
    assert_eq!(got.send().await.unwrap().item().unwrap()["v"], n(1));
}
