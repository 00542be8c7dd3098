//! Each fault of the gateway happens: seen by an official SDK client that never retries.

mod gateway_support;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodb::operation::batch_write_item::BatchWriteItemOutput;
use aws_sdk_dynamodb::operation::get_item::GetItemError;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{KeysAndAttributes, Put, TransactWriteItem};
use aws_sdk_dynamodbstreams::types::ShardIteratorType;
use farshore::embedded::gateway::{Fault, Gateway, Limit, Options, Outage, Outcome};
use gateway_support::*;

const SOON: Duration = Duration::from_secs(5);

/// The version of a key, read past all faults.
fn version(gateway: &Gateway, pk: &str) -> Option<u64> {
    let request = serde_json::json!({ "TableName": "orders", "Key": { "pk": { "S": pk } } });
    let request = serde_json::from_value(request).unwrap();
    let item = gateway
        .embedded()
        .database()
        .get_item(request)
        .unwrap()
        .item?;
    let value = serde_json::to_value(&item["v"]).unwrap();
    value["N"].as_str().unwrap().parse().ok()
}

async fn try_put(dynamo: &Dynamo, pk: &str, version: u64) -> Result<(), Option<String>> {
    let put = dynamo
        .put_item()
        .table_name("orders")
        .item("pk", s(pk))
        .item("v", n(version));
    match put.send().await {
        Ok(_) => Ok(()),
        Err(error) => Err(error.code().map(str::to_owned)),
    }
}

async fn batch(dynamo: &Dynamo, keys: std::ops::Range<u64>) -> BatchWriteItemOutput {
    let requests: Vec<_> = keys.map(|key| put_request(&format!("k{key}"), 1)).collect();
    dynamo
        .batch_write_item()
        .request_items("orders", requests)
        .send()
        .await
        .unwrap()
}

fn code(text: &str) -> Result<(), Option<String>> {
    Err(Some(text.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_write_names_the_limit_in_its_reasons() {
    let (gateway, dynamo, _, _) = started(Options::new(20)).await;
    for (limit, reason) in [
        (
            Limit::Provisioned,
            "TableWriteProvisionedThroughputExceeded",
        ),
        (Limit::KeyRange, "TableWriteKeyRangeThroughputExceeded"),
        (Limit::Account, "TableWriteAccountLimitExceeded"),
        (
            Limit::MaxOnDemand,
            "TableWriteMaxOnDemandThroughputExceeded",
        ),
    ] {
        gateway.inject(Fault::throttle(limit).once());
        let put = dynamo.put_item().table_name("orders").item("pk", s("a"));
        let error = put.send().await.unwrap_err().into_service_error();
        let PutItemError::ProvisionedThroughputExceededException(error) = error else {
            panic!("{error:?}");
        };
        let reasons = error.throttling_reasons();
        assert_eq!(reasons[0].reason(), Some(reason));
        assert!(reasons[0].resource().unwrap().ends_with(":table/orders"));
    }
    gateway.inject(
        Fault::throttling_exception(Limit::KeyRange)
            .on("GetItem")
            .once(),
    );
    let get = dynamo.get_item().table_name("orders").key("pk", s("a"));
    let error = get.send().await.unwrap_err().into_service_error();
    let GetItemError::ThrottlingException(error) = error else {
        panic!("{error:?}");
    };
    let reason = error.throttling_reasons()[0].reason();
    assert_eq!(reason, Some("TableReadKeyRangeThroughputExceeded"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_gives_no_more_write_units_than_it_has() {
    let rate = 100.0;
    let options = Options::new(21).fault(Fault::capacity(rate).reserve(0.1));
    let (gateway, dynamo, _, _) = started(options).await;
    let (start, mut written, mut key, mut parts, mut refused) = (Instant::now(), 0, 0, 0, 0);
    while start.elapsed() < Duration::from_secs(2) {
        let keys = (key..key + 25).map(|key| {
            let item = aws_sdk_dynamodb::types::PutRequest::builder();
            // Two units each: a little more than a kilobyte.
            let item = item
                .item("pk", s(&format!("k{key}")))
                .item("v", s(&"x".repeat(1_100)));
            let put = item.build().unwrap();
            aws_sdk_dynamodb::types::WriteRequest::builder()
                .put_request(put)
                .build()
        });
        key += 25;
        match dynamo
            .batch_write_item()
            .request_items("orders", keys.collect())
            .send()
            .await
        {
            Ok(answer) => {
                let left = answer.unprocessed_items.unwrap_or_default();
                let left = left.get("orders").map_or(0, Vec::len);
                parts += usize::from(left > 0);
                written += 25 - left;
            }
            Err(error) => {
                assert_eq!(error.code(), Some("ProvisionedThroughputExceededException"));
                refused += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let seconds = start.elapsed().as_secs_f64();
    let units = 2.0 * written as f64;
    let allowed = rate * seconds + rate * 0.1;
    assert!(units <= allowed, "{units} units of {allowed}");
    assert!(units > allowed * 0.7, "{units} units of {allowed}");
    // Whole refusals need calls closer together than a busy machine makes them.
    assert!(parts > 0, "{parts} in part, {refused} whole");
    let logged: f64 = gateway
        .calls_of("BatchWriteItem")
        .iter()
        .map(|call| call.units)
        .sum();
    assert_eq!(logged, units);
    let stored = dynamo.scan().table_name("orders").send().await.unwrap();
    assert_eq!(stored.count(), written as i32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_key_range_is_throttled_by_itself() {
    let fault = Fault::capacity(80.0).per_key_range(4).reserve(1.0);
    let (gateway, dynamo, _, _) = started(Options::new(22).fault(fault)).await;
    let mut refusal = None;
    for version in 1..100 {
        let put = dynamo.put_item().table_name("orders").item("pk", s("hot"));
        if let Err(error) = put.item("v", n(version)).send().await {
            refusal = Some(error.into_service_error());
            break;
        }
    }
    let PutItemError::ProvisionedThroughputExceededException(refusal) = refusal.unwrap() else {
        panic!("another error");
    };
    let reason = refusal.throttling_reasons()[0].reason().unwrap();
    assert_eq!(reason, "TableWriteKeyRangeThroughputExceeded");
    let quarter = |pk: &str| {
        let call = gateway.calls_where(|call| call.keys.iter().any(|k| k.json.contains(pk)));
        (call[0].keys[0].place() * 4.0) as usize
    };
    let mut elsewhere = 0;
    for key in 0..12 {
        let pk = format!("cold{key}");
        let written = try_put(&dynamo, &pk, 1).await;
        if quarter(&pk) != quarter("hot") {
            elsewhere += 1;
            assert_eq!(written, Ok(()));
        }
    }
    assert!(elsewhere > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_charged_by_the_larger_item_and_twice_in_a_transaction() {
    let (gateway, dynamo, _, _) = started(Options::new(23).metered()).await;
    let large = s(&"x".repeat(3_000));
    let put = dynamo.put_item().table_name("orders").item("pk", s("a"));
    put.item("v", large).send().await.unwrap();
    try_put(&dynamo, "a", 1).await.unwrap();
    try_put(&dynamo, "a", 2).await.unwrap();
    dynamo
        .delete_item()
        .table_name("orders")
        .key("pk", s("z"))
        .send()
        .await
        .unwrap();
    let put = Put::builder()
        .table_name("orders")
        .item("pk", s("t"))
        .item("v", n(1));
    let put = TransactWriteItem::builder()
        .put(put.build().unwrap())
        .build();
    dynamo
        .transact_write_items()
        .transact_items(put)
        .send()
        .await
        .unwrap();
    let calls = gateway.calls_where(|c| !c.keys.is_empty());
    let units: Vec<f64> = calls.iter().map(|c| c.units).collect();
    assert_eq!(units, [3.0, 3.0, 1.0, 1.0, 2.0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_beyond_the_capacity_is_cancelled_with_its_reasons() {
    let fault = Fault::capacity(0.001).reserve(2_000.0);
    let (gateway, dynamo, _, _) = started(Options::new(43).fault(fault)).await;
    let puts = ["t1", "t2"].map(|pk| {
        let put = Put::builder()
            .table_name("orders")
            .item("pk", s(pk))
            .item("v", n(1));
        TransactWriteItem::builder()
            .put(put.build().unwrap())
            .build()
    });
    let write = dynamo
        .transact_write_items()
        .set_transact_items(Some(puts.to_vec()));
    let error = write.send().await.unwrap_err().into_service_error();
    let TransactWriteItemsError::TransactionCanceledException(error) = error else {
        panic!("{error:?}");
    };
    let codes = error
        .cancellation_reasons()
        .iter()
        .map(|reason| reason.code().unwrap());
    assert_eq!(codes.collect::<Vec<_>>(), ["None", "ThrottlingError"]);
    assert!(error.message().unwrap().contains("ThrottlingError"));
    assert_eq!(version(&gateway, "t1"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_of_a_batch_comes_back_unprocessed() {
    let (gateway, dynamo, _, _) = started(Options::new(24)).await;
    gateway.inject(Fault::unprocessed(0.4));
    let answer = batch(&dynamo, 0..25).await;
    let left = &answer.unprocessed_items().unwrap()["orders"];
    assert_eq!(left.len(), 10);
    let left: HashSet<String> = left
        .iter()
        .map(|request| {
            request.put_request().unwrap().item()["pk"]
                .as_s()
                .unwrap()
                .clone()
        })
        .collect();
    for key in 0..25 {
        let key = format!("k{key}");
        assert_eq!(version(&gateway, &key).is_none(), left.contains(&key));
    }
    assert_eq!(gateway.calls_of("BatchWriteItem")[0].unprocessed, 10);

    gateway.inject(Fault::unprocessed(0.5).on("BatchGetItem"));
    let keys = (0..25).map(|key| [("pk".to_owned(), s(&format!("k{key}")))].into());
    let keys = KeysAndAttributes::builder().set_keys(Some(keys.collect()));
    let get = dynamo
        .batch_get_item()
        .request_items("orders", keys.build().unwrap());
    let answer = get.send().await.unwrap();
    assert_eq!(
        answer.unprocessed_keys().unwrap()["orders"].keys().len(),
        13
    );
    assert!(answer.responses().unwrap()["orders"].len() <= 12);
    assert_eq!(gateway.calls_of("BatchGetItem")[0].unprocessed, 13);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_500_comes_before_the_effect_or_after_it() {
    let (gateway, dynamo, _, _) = started(Options::new(25)).await;
    gateway.inject(Fault::error_before().on("PutItem").once());
    assert_eq!(try_put(&dynamo, "a", 1).await, code("InternalServerError"));
    assert_eq!(version(&gateway, "a"), None);
    gateway.inject(Fault::error_after().on("PutItem").once());
    assert_eq!(try_put(&dynamo, "a", 1).await, code("InternalServerError"));
    assert_eq!(version(&gateway, "a"), Some(1));
    let calls = gateway.calls_of("PutItem");
    assert_eq!(
        calls.iter().map(|c| c.effect.is_some()).collect::<Vec<_>>(),
        [false, true]
    );
    assert_eq!(calls[1].faults, ["500 after"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_write_takes_effect_after_its_timeout_and_after_newer_writes() {
    let (gateway, dynamo, _, _) = started(Options::new(26)).await;
    gateway.inject(Fault::hold_until_delivered().on("PutItem").once());
    let impatient = patient(&gateway, Duration::from_millis(300)).await;
    assert_eq!(
        try_put(&impatient, "a", 1).await,
        Err(None),
        "a timeout has no code"
    );
    try_put(&dynamo, "a", 2).await.unwrap();
    assert_eq!(version(&gateway, "a"), Some(2));
    let held = gateway.held();
    assert_eq!(held.len(), 1);
    assert_eq!(held[0].keys[0].json, r#"{"pk":{"S":"a"}}"#);
    gateway.deliver(held[0].call).await.unwrap();
    assert_eq!(version(&gateway, "a"), Some(1));
    assert!(gateway.held().is_empty());
    assert!(gateway.deliver(held[0].call).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_write_is_carried_out_by_itself_when_its_time_has_come() {
    let (gateway, dynamo, _, _) = started(Options::new(27)).await;
    let hold = Fault::hold(Duration::from_millis(400)).hanging_up();
    gateway.inject(hold.on("BatchWriteItem").once());
    let write = dynamo
        .batch_write_item()
        .request_items("orders", vec![put_request("a", 1)]);
    let start = Instant::now();
    write.send().await.unwrap_err();
    assert!(
        start.elapsed() < Duration::from_millis(300),
        "the client is hung up on at once"
    );
    assert!(gateway.wait_for_held(1, SOON).await);
    try_put(&dynamo, "a", 2).await.unwrap();
    while version(&gateway, "a") != Some(1) {
        assert!(start.elapsed() < SOON, "it was not carried out");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The log says so a moment after the item does.
    let call = loop {
        let call = gateway.calls_of("BatchWriteItem")[0].clone();
        if call.effect.is_some() {
            break call;
        }
        assert!(start.elapsed() < SOON, "the log does not say so");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(call.outcome, Outcome::Cut);
    assert!(call.effect.unwrap() - call.arrived >= Duration::from_millis(400));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_that_is_too_old_is_refused_even_if_it_grew_old_while_held() {
    let (gateway, dynamo, _, _) = started(Options::new(28)).await;
    gateway.inject(Fault::stale_signature(Duration::from_secs(1)));
    try_put(&dynamo, "a", 1).await.unwrap();
    gateway.inject(
        Fault::hold_until_delivered()
            .hanging_up()
            .on("PutItem")
            .once(),
    );
    assert_eq!(try_put(&dynamo, "a", 2).await, Err(None));
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let held = gateway.held()[0].call;
    let refused = gateway.deliver(held).await.unwrap_err();
    assert_eq!(refused, "InvalidSignatureException");
    assert_eq!(version(&gateway, "a"), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_that_grew_too_old_while_its_call_was_delayed_is_refused() {
    let (gateway, dynamo, _, _) = started(Options::new(28)).await;
    gateway.inject(Fault::stale_signature(Duration::from_secs(1)));
    let late = Fault::delay(Duration::from_millis(2_100));
    gateway.inject(late.on("PutItem").after(1).once());
    try_put(&dynamo, "a", 1).await.unwrap();
    let refused = try_put(&dynamo, "a", 2).await;
    assert_eq!(refused, code("InvalidSignatureException"));
    assert_eq!(version(&gateway, "a"), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_late_before_or_after_the_effect() {
    let (gateway, dynamo, _, _) = started(Options::new(29)).await;
    let late = Duration::from_millis(200);
    gateway.inject(Fault::delay(late).on("PutItem").once());
    gateway.inject(Fault::slow_answer(late).on("PutItem").after(1).once());
    let start = Instant::now();
    try_put(&dynamo, "a", 1).await.unwrap();
    assert!(start.elapsed() >= late);
    try_put(&dynamo, "a", 2).await.unwrap();
    let calls = gateway.calls_of("PutItem");
    let before = |n: usize| calls[n].effect.unwrap() - calls[n].arrived;
    let after = |n: usize| calls[n].ended.unwrap() - calls[n].effect.unwrap();
    assert!(before(0) >= late && after(0) < late);
    assert!(before(1) < late && after(1) >= late);
    gateway.set_round_trip(Duration::from_millis(100));
    try_put(&dynamo, "a", 3).await.unwrap();
    let call = gateway.calls_of("PutItem").pop().unwrap();
    assert!(call.effect.unwrap() - call.arrived >= Duration::from_millis(50));
    assert!(call.ended.unwrap() - call.arrived >= Duration::from_millis(100));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_cut_before_the_effect_after_it_or_within_the_answer() {
    let (gateway, dynamo, _, _) = started(Options::new(30)).await;
    for (version_put, fault, took_effect) in [
        (1, Fault::cut(), false),
        (2, Fault::cut_after(), true),
        (3, Fault::cut_within(), true),
    ] {
        gateway.inject(fault.on("PutItem").once());
        assert_eq!(try_put(&dynamo, "a", version_put).await, Err(None));
        assert_eq!(version(&gateway, "a") == Some(version_put), took_effect);
    }
    let cut = |call: &farshore::embedded::gateway::Call| call.outcome == Outcome::Cut;
    assert!(gateway.calls_of("PutItem").iter().all(cut));
    gateway.inject(Fault::cut_within().on("GetItem").once());
    let get = || {
        dynamo
            .get_item()
            .table_name("orders")
            .key("pk", s("a"))
            .send()
    };
    get().await.unwrap_err();
    get().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_goes_away_and_comes_back_with_its_data() {
    let (mut gateway, dynamo, _, _) = started(Options::new(31)).await;
    let url = gateway.endpoint_url();
    try_put(&dynamo, "a", 1).await.unwrap();
    for outage in [Outage::Refused, Outage::Silent] {
        gateway.go_away(outage).await;
        let impatient = patient(&gateway, Duration::from_millis(300)).await;
        let start = Instant::now();
        assert_eq!(try_put(&impatient, "a", 2).await, Err(None));
        let waited = start.elapsed() >= Duration::from_millis(300);
        assert_eq!(waited, outage == Outage::Silent);
        gateway.come_back().await;
        assert_eq!(gateway.endpoint_url(), url);
        let fresh = patient(&gateway, SOON).await;
        let got = fresh.get_item().table_name("orders").key("pk", s("a"));
        assert_eq!(got.send().await.unwrap().item().unwrap()["v"], n(1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_is_denied_and_codes_nobody_models_are_answered() {
    let (gateway, dynamo, streams, arn) = started(Options::new(32)).await;
    gateway.inject(Fault::access_denied().on("DescribeStream").on("DeleteItem"));
    let denied = streams
        .describe_stream()
        .stream_arn(&arn)
        .send()
        .await
        .unwrap_err();
    assert_eq!(denied.code(), Some("AccessDeniedException"));
    let denied = dynamo
        .delete_item()
        .table_name("orders")
        .key("pk", s("a"))
        .send()
        .await;
    assert_eq!(denied.unwrap_err().code(), Some("AccessDeniedException"));
    try_put(&dynamo, "a", 1).await.unwrap();
    gateway.clear_faults();
    gateway.inject(
        Fault::code(400, "BrandNewException", "nobody knows")
            .on("PutItem")
            .once(),
    );
    assert_eq!(try_put(&dynamo, "a", 1).await, code("BrandNewException"));
    gateway.inject(Fault::unavailable().on("PutItem").once());
    assert_eq!(try_put(&dynamo, "a", 1).await, code("ServiceUnavailable"));
    gateway.inject(
        Fault::throttling_exception(Limit::Account)
            .on("GetRecords")
            .once(),
    );
    let shard = gateway.shards("orders")[0].id.clone();
    let at = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    let records = streams
        .get_records()
        .shard_iterator(&at)
        .send()
        .await
        .unwrap_err();
    assert_eq!(records.code(), Some("ThrottlingException"));
    gateway.inject(Fault::expired_iterator().once());
    let records = streams
        .get_records()
        .shard_iterator(&at)
        .send()
        .await
        .unwrap_err();
    assert!(records.into_service_error().is_expired_iterator_exception());
    gateway.inject(Fault::trimmed().once());
    let records = streams
        .get_records()
        .shard_iterator(&at)
        .send()
        .await
        .unwrap_err();
    assert!(
        records
            .into_service_error()
            .is_trimmed_data_access_exception()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_are_switched_on_and_off_and_strike_what_they_name() {
    let (gateway, dynamo, _, _) = started(Options::new(39)).await;
    let fault = gateway.inject(
        Fault::error_before()
            .table("orders")
            .key("poison")
            .switched_off(),
    );
    assert_eq!(try_put(&dynamo, "poison-1", 1).await, Ok(()));
    fault.on();
    assert_eq!(
        try_put(&dynamo, "poison-1", 1).await,
        code("InternalServerError")
    );
    assert_eq!(try_put(&dynamo, "sound", 1).await, Ok(()));
    table(&dynamo, "others").await;
    put(&dynamo, "others", "poison-1", 1).await;
    fault.off();
    assert_eq!(try_put(&dynamo, "poison-1", 1).await, Ok(()));
    assert_eq!(fault.hits(), 1);
    gateway.inject(Fault::error_before().key_range(0.0..0.5));
    let (mut low, mut high) = (0, 0);
    for key in 0..20 {
        let struck = try_put(&dynamo, &format!("r{key}"), 1).await.is_err();
        let call = gateway.calls().pop().unwrap();
        assert_eq!(call.keys[0].place() < 0.5, struck);
        low += u32::from(struck);
        high += u32::from(!struck);
    }
    assert!(low > 0 && high > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_seed_strikes_the_same_calls_in_every_run() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let options = Options::new(40).fault(Fault::error_before().on("PutItem").chance(0.3));
        let (gateway, dynamo, _, _) = started(options).await;
        for key in 0..30 {
            let _ = try_put(&dynamo, &format!("k{key}"), 1).await;
        }
        let calls = gateway.calls_of("PutItem");
        runs.push(calls.iter().map(|c| c.succeeded()).collect::<Vec<_>>());
    }
    assert_eq!(runs[0], runs[1]);
    assert!(runs[0].contains(&true) && runs[0].contains(&false));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_tells_who_wrote_what_when_with_which_epoch() {
    let (gateway, dynamo, streams, arn) = started(Options::new(41)).await;
    let mark = gateway.next_call();
    let put = dynamo
        .put_item()
        .table_name("orders")
        .item("pk", s("a"))
        .item("v", n(1));
    let stamped = put.customize().mutate_request(|request| {
        request.headers_mut().insert("x-farshore-epoch", "7");
    });
    stamped.send().await.unwrap();
    batch(&dynamo, 0..3).await;
    let shard = gateway.shards("orders")[0].id.clone();
    let at = iterator(&streams, &arn, &shard, ShardIteratorType::TrimHorizon).await;
    streams
        .get_records()
        .shard_iterator(at)
        .send()
        .await
        .unwrap();
    let calls = gateway.calls_where(|call| call.number >= mark);
    let told: Vec<_> = calls
        .iter()
        .map(|call| {
            (
                call.operation.as_str(),
                call.keys.len(),
                call.epoch.as_deref(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("PutItem", 1, Some("7")),
            ("BatchWriteItem", 3, None),
            ("GetShardIterator", 0, None),
            ("GetRecords", 0, None),
        ]
    );
    assert!(
        calls
            .iter()
            .all(|call| call.tables == ["orders"] && call.succeeded())
    );
    assert!(
        calls[2..]
            .iter()
            .all(|call| call.shard.as_deref() == Some(&*shard))
    );
    assert!(
        calls
            .windows(2)
            .all(|pair| pair[0].arrived <= pair[1].arrived)
    );
    assert_eq!(gateway.calls_forgotten(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_regions_run_side_by_side_and_know_nothing_of_each_other() {
    let east = started(Options::new(42).region("us-east-1")).await;
    let west = started(Options::new(42).region("us-west-2")).await;
    try_put(&east.1, "a", 1).await.unwrap();
    assert_eq!(version(&west.0, "a"), None);
    assert!(east.3.contains(":us-east-1:") && west.3.contains(":us-west-2:"));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "fails on purpose: run by a_failing_test_prints_its_seed_and_the_variable_overrides_it"]
async fn fails_on_purpose() {
    let (_gateway, _, _, _) = started(Options::new(1)).await;
    panic!("on purpose");
}

#[test]
fn a_failing_test_prints_its_seed_and_the_variable_overrides_it() {
    let mut run = std::process::Command::new(std::env::current_exe().unwrap());
    run.args(["--exact", "fails_on_purpose", "--ignored", "--nocapture"]);
    let failed = run.env("FARSHORE_TEST_SEED", "77").output().unwrap();
    assert!(!failed.status.success());
    let told = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(told.contains("FARSHORE_TEST_SEED=77"), "{told}");
}

#[test]
fn every_fault_has_a_sentence_in_the_documentation_and_a_test() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let code = read("src/embedded/gateway/faults.rs");
    let (docs, tests) = (read("docs/GATEWAY.md"), read("tests/gateway_faults.rs"));
    let tests = tests + &read("tests/gateway_listing_faults.rs");
    let mut faults = 0;
    for line in code.lines().map(str::trim) {
        let Some(rest) = line.strip_prefix("pub fn ") else {
            continue;
        };
        let (name, arguments) = rest.split_once('(').unwrap();
        if arguments.contains("self") {
            assert!(
                docs.contains(&format!(".{name}(")),
                "{name} is not explained"
            );
        } else {
            faults += 1;
            assert!(
                docs.contains(&format!("| `{name}(")),
                "{name} has no sentence"
            );
            assert!(
                tests.contains(&format!("Fault::{name}(")),
                "{name} has no test"
            );
        }
    }
    assert!(faults > 20, "{faults}");
}
