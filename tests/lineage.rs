//! Shards that turn over, vanish and are forgotten, and streams made anew, through the gateway.

mod common;
mod suite;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{AttributeValue, StreamSpecification, StreamViewType};
use common::binary::{Worker, provision};
use common::eventually;
use common::stand::{Stand, put, s, state_rows};
use farshore::embedded::gateway::{Fault, Gateway, Options};
use farshore::run::discovery::{Discovery, Surroundings, discovery};
use farshore::stream::ShardId;
use farshore::stream::listing::Lister;

type Row = HashMap<String, AttributeValue>;

async fn stand(source: Options) -> Stand {
    Stand::gateways(source, Options::new(1)).await
}

async fn shard_rows(stand: &Stand) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut after = None;
    loop {
        let page = stand
            .target
            .scan()
            .table_name(stand.state_table())
            .consistent_read(true)
            .set_exclusive_start_key(after)
            .send()
            .await
            .unwrap();
        rows.extend(page.items.unwrap_or_default());
        after = page.last_evaluated_key;
        if after.is_none() {
            break;
        }
    }
    rows.retain(|row| row["entityType"] == s("shard"));
    rows
}

fn text<'a>(row: &'a Row, name: &str) -> &'a str {
    row.get(name)
        .and_then(|value| value.as_s().ok())
        .map_or("", String::as_str)
}

fn is_finished(row: &Row) -> bool {
    text(row, "checkpoint") == "SHARD_END"
}

async fn set_stream(stand: &Stand, table: &str, on: bool) {
    let specification = StreamSpecification::builder()
        .stream_enabled(on)
        .set_stream_view_type(on.then_some(StreamViewType::NewAndOldImages))
        .build()
        .unwrap();
    stand
        .source
        .update_table()
        .table_name(table)
        .stream_specification(specification)
        .send()
        .await
        .unwrap();
}

async fn readiness_shows(worker: &Worker, code: &str) {
    let red = async || {
        worker
            .get("/readyz")
            .await
            .is_some_and(|(status, body)| status == 503 && body.contains(code))
    };
    eventually(code, Duration::from_secs(30), red).await;
}

/// Surroundings that only count, and panic once if asked to.
#[derive(Default)]
struct Counting {
    panics: AtomicBool,
    pages: AtomicU64,
    listings: AtomicU64,
    failures: AtomicU64,
    deaths: AtomicU64,
}

impl Surroundings for Counting {
    fn paged(&self) {
        assert!(!self.panics.swap(false, Ordering::Relaxed), "as asked");
        self.pages.fetch_add(1, Ordering::Relaxed);
    }
    fn listed(&self, _began: Instant) {
        self.listings.fetch_add(1, Ordering::Relaxed);
    }
    fn succeeded(&self) {}
    fn failed(&self, _fault: &farshore::error::Fault) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
    fn died(&self) {
        self.deaths.fetch_add(1, Ordering::Relaxed);
    }
    fn is_replaced(&self) -> bool {
        true
    }
}

/// A gateway with a table `orders`, and a running discovery of its stream.
async fn discovering(options: Options) -> (Gateway, Discovery, Arc<Counting>, String) {
    let gateway = Gateway::start(options).await.unwrap();
    let source = common::stand::client(&gateway.endpoint_url(), "us-east-1");
    let view = StreamViewType::NewAndOldImages;
    common::stand::create_table(&source, "orders", Some(view)).await;
    let arn = gateway.stream_arn("orders").unwrap();
    let credentials =
        aws_sdk_dynamodbstreams::config::Credentials::new("test", "test", None, None, "test");
    let config = aws_sdk_dynamodbstreams::Config::builder()
        .behavior_version(aws_sdk_dynamodbstreams::config::BehaviorVersion::latest())
        .region(aws_sdk_dynamodbstreams::config::Region::new("us-east-1"))
        .endpoint_url(gateway.endpoint_url())
        // As the worker's own client: who retries is decided in one place.
        .retry_config(aws_sdk_dynamodbstreams::config::retry::RetryConfig::disabled())
        .credentials_provider(credentials)
        .build();
    let lister = Lister::new(aws_sdk_dynamodbstreams::Client::from_conf(config));
    let (discovery, duty) = discovery();
    let counting = Arc::new(Counting::default());
    // Ends with the runtime of the test.
    tokio::spawn(duty.run(
        lister,
        arn.clone(),
        Duration::from_secs(3600),
        Arc::clone(&counting) as _,
    ));
    (gateway, discovery, counting, arn)
}

/// Two thousand shards that end together cost a few listings and not two thousand calls, and each
/// hears of its children.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_ends_are_answered_by_a_few_listings() {
    const SHARDS: usize = 2_000;
    let (gateway, discovery, counting, _) =
        discovering(Options::new(common::seed()).shards(SHARDS)).await;
    // A first listing tells what one costs.
    discovery.listing().await;
    let parents = gateway.shards("orders");
    gateway.rotate_all("orders").unwrap();
    let mark = gateway.next_call();
    let start = Instant::now();
    let asking: Vec<_> = parents
        .into_iter()
        .map(|parent| {
            let discovery = discovery.clone();
            tokio::spawn(async move {
                let parent = ShardId(parent.id);
                let children = discovery.children(&parent, false).await;
                assert_eq!(children.len(), 1);
                assert_eq!(children[0].parent.as_ref(), Some(&parent));
            })
        })
        .collect();
    for asked in asking {
        asked.await.unwrap();
    }
    let calls =
        gateway.calls_where(|call| call.operation == "DescribeStream" && call.number >= mark);
    println!(
        "{SHARDS} ends: {} calls of DescribeStream, {:.1} s",
        calls.len(),
        start.elapsed().as_secs_f64()
    );
    // A listing has 40 pages. The first question may be asked by itself, and those that come while
    // a listing is under way need another.
    assert!(calls.len() <= 200, "{} calls", calls.len());
    let pages = counting.pages.load(Ordering::Relaxed);
    assert!(pages >= 40, "{pages} pages were noted");
    assert!(counting.listings.load(Ordering::Relaxed) >= 2);
}

/// Children that are listed late are found, and a stream that was disabled has none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_children_are_waited_for_and_missing_ones_are_not_for_ever() {
    let late = Fault::late_children(Duration::from_secs(2));
    let (gateway, discovery, _, arn) = discovering(Options::new(common::seed()).fault(late)).await;
    let parent = ShardId(gateway.shards("orders")[0].id.clone());
    let children = gateway.split("orders", &parent.0).unwrap();
    let found = discovery.children(&parent, false).await;
    assert!(!found.is_empty());
    assert!(found.iter().all(|child| children.contains(&child.id.0)));
    // An open leaf has no children: the answer takes patience, and then it is given.
    let leaf = ShardId(children[0].clone());
    assert!(discovery.children(&leaf, false).await.is_empty());
    // Where some are known already one answer is enough.
    let start = Instant::now();
    assert!(discovery.children(&leaf, true).await.is_empty());
    assert!(start.elapsed() < Duration::from_secs(4));
    // Whoever gives up leaves nothing behind.
    let given_up = discovery.children(&leaf, false);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), given_up)
            .await
            .is_err()
    );
    assert!(discovery.listing().await.shards.len() >= 2);
    assert!(!arn.is_empty());
}

/// A throttled or failing service delays answers; it gives no wrong ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_survives_a_service_that_fails() {
    let (gateway, discovery, counting, _) =
        discovering(Options::new(common::seed()).shards(3)).await;
    discovery.listing().await;
    let failing = gateway.inject(Fault::unavailable().on("DescribeStream"));
    let parent = ShardId(gateway.shards("orders")[0].id.clone());
    gateway.rotate("orders", &parent.0).unwrap();
    let asking = discovery.children(&parent, false);
    tokio::pin!(asking);
    let soon = tokio::time::timeout(Duration::from_secs(1), &mut asking).await;
    assert!(soon.is_err(), "an answer without a service");
    assert!(counting.failures.load(Ordering::Relaxed) > 0);
    failing.off();
    let found = tokio::time::timeout(Duration::from_secs(20), asking)
        .await
        .unwrap();
    assert_eq!(found.len(), 1);
    // Disabled, and then forgotten: an empty listing that says so.
    gateway.advance(Duration::from_secs(1));
    let source = common::stand::client(&gateway.endpoint_url(), "us-east-1");
    source
        .delete_table()
        .table_name("orders")
        .send()
        .await
        .unwrap();
    gateway.advance(Duration::from_secs(25 * 3600));
    let last = discovery.listing().await;
    assert!(last.forgotten && last.shards.is_empty());
}

/// A discovery task that dies is started again, and what it was asked is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_that_dies_is_started_again() {
    let (gateway, discovery, counting, _) = discovering(Options::new(common::seed())).await;
    discovery.listing().await;
    counting.panics.store(true, Ordering::Relaxed);
    let parent = ShardId(gateway.shards("orders")[0].id.clone());
    gateway.rotate("orders", &parent.0).unwrap();
    let (listed, children) = tokio::join!(
        tokio::time::timeout(Duration::from_secs(20), discovery.listing()),
        tokio::time::timeout(Duration::from_secs(20), discovery.children(&parent, false)),
    );
    assert!(!counting.panics.load(Ordering::Relaxed), "it never died");
    assert_eq!(listed.unwrap().shards.len(), 2);
    assert_eq!(children.unwrap().len(), 1);
}

/// Shards that roll over together: few calls of DescribeStream, and every child is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_shards_rolling_over_do_not_slow_the_rest() {
    // The embedded database of a debug build answers some hundred calls a second.
    let shards = common::long(200, 60) as usize;
    let stand = stand(Options::new(common::seed()).shards(shards)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    let calmer = common::stand::text_of(&config)
        .replace("duration = \"1s\"", "duration = \"10s\"")
        .replace("poll_interval = \"20ms\"", "poll_interval = \"200ms\"")
        .replace("idle_interval = \"50ms\"", "idle_interval = \"2s\"")
        .replace("discover_every = \"1s\"", "discover_every = \"5s\"");
    std::fs::write(&config, calmer).unwrap();
    provision(&config);
    let worker = Worker::following(&config).await;
    let within = Duration::from_secs(120);
    let all = async || worker.metric("farshore_leases_held").await >= shards as f64;
    eventually("all shards are read", within, all).await;
    let mark = stand.gateways[0].next_call();
    let start = Instant::now();
    stand.gateways[0].rotate_all(&table).unwrap();
    let all_children = async || {
        let rows = shard_rows(&stand).await;
        let children = rows.iter().filter(|row| row.contains_key("parentShardId"));
        let read = children
            .filter(|row| row.contains_key("leaseOwner"))
            .count();
        read == shards
    };
    eventually("all children are read", within, all_children).await;
    let took = start.elapsed();
    let listings = stand.gateways[0]
        .calls_where(|call| call.operation == "DescribeStream" && call.number >= mark);
    println!(
        "{shards} shards rolled over in {:.1} s, {} calls of DescribeStream",
        took.as_secs_f64(),
        listings.len()
    );
    // Never faster than the pace.
    let allowed = 8.0 * took.as_secs_f64() + 2.0;
    assert!(listings.len() as f64 <= allowed, "{}", listings.len());
    for id in 0..50 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    stand.converge(&table, 50).await;
    assert_eq!(worker.metric("farshore_gaps_open").await, 0.0);
    assert!(worker.stop().await.success());
}

/// From the end of a parent to the first record of its child; and `start = "latest"` is for the
/// first listing only: nothing written while shards turn over is left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn children_start_at_their_beginning_whatever_start_says() {
    let stand = stand(Options::new(common::seed())).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let settings = format!("name = \"{table}\"\nstart = \"latest\"");
    let config = stand.config(&[&settings], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let rotations = common::long(100, 20);
    let mut waits = Vec::new();
    for id in 0..rotations {
        // Written into the child before anybody can know of it.
        let rotated = Instant::now();
        stand.gateways[0].rotate_all(&table).unwrap();
        let key = format!("k{id}");
        put(&stand.source, &table, &key, id).await;
        loop {
            let found = stand
                .target
                .get_item()
                .table_name(&table)
                .key("id", s(&key));
            if found.send().await.unwrap().item.is_some() {
                break;
            }
            assert!(
                rotated.elapsed() < Duration::from_secs(20),
                "{key} did not arrive"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        waits.push(rotated.elapsed());
    }
    waits.sort_unstable();
    println!(
        "end of parent to child's first record in the replica, {} rotations: p50 {:?}, p99 {:?}",
        waits.len(),
        waits[waits.len() / 2],
        waits[(waits.len() * 99).div_ceil(100) - 1]
    );
    stand.converge(&table, rotations as usize).await;
    for row in shard_rows(&stand).await {
        let is_child = row.contains_key("parentShardId");
        assert!(!is_child || !row.contains_key("startTimestamp"), "{row:?}");
    }
    assert!(worker.stop().await.success());
}

/// Rows of shards that the service has forgotten disappear, also across a restart; those of shards
/// it still has stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_forgotten_shards_disappear() {
    let stand = stand(Options::new(common::seed()).shards(2)).await;
    let table = stand.table("orders");
    let (config, mut worker) = suite::replicated(&stand, &table, "").await;
    for round in 0..3 {
        for id in 0..20 {
            put(&stand.source, &table, &format!("r{round}k{id}"), id).await;
        }
        stand.converge(&table, 20 * (round + 1)).await;
        stand.gateways[0].rotate_all(&table).unwrap();
        let turned = async || {
            let rows = shard_rows(&stand).await;
            rows.iter().filter(|row| is_finished(row)).count() >= 2
                && rows.iter().filter(|row| !is_finished(row)).count() == 2
        };
        eventually("the shards turn over", Duration::from_secs(20), turned).await;
    }
    // Listed, they stay: three listings pass.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(shard_rows(&stand).await.len(), 8);
    // The last ones move past their start, so that nobody waits for their parents any more.
    for id in 0..20 {
        put(&stand.source, &table, &format!("r3k{id}"), id).await;
    }
    stand.converge(&table, 80).await;
    assert!(worker.stop().await.success());
    stand.gateways[0].advance(Duration::from_secs(25 * 3600));
    worker = Worker::following(&config).await;
    let gone = async || shard_rows(&stand).await.len() == 2;
    eventually("the rows go", Duration::from_secs(20), gone).await;
    for id in 0..20 {
        put(&stand.source, &table, &format!("r4k{id}"), id).await;
    }
    stand.converge(&table, 100).await;
    let rows = shard_rows(&stand).await;
    assert!(rows.len() == 2 && !rows.iter().any(is_finished), "{rows:?}");
    assert!(worker.stop().await.success());
}

/// A shard that is forgotten before its end, its iterator expired: a gap, no endless retry, and its
/// child is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_iterator_of_a_vanished_shard_is_not_tried_for_ever() {
    let stand = stand(Options::new(common::seed())).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, suite::whole::SHOWN_ONLY).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    let unreadable = stand.gateways[0].inject(Fault::unavailable().on("GetRecords"));
    put(&stand.source, &table, "lost", 2).await;
    stand.gateways[0].rotate_all(&table).unwrap();
    stand.gateways[0].advance(Duration::from_secs(25 * 3600));
    unreadable.off();
    put(&stand.source, &table, "after", 3).await;
    readiness_shows(&worker, "gap-shard-vanished").await;
    let arrived = async || stand.differences(&table).await.len() == 1;
    eventually("the child is read", Duration::from_secs(30), arrived).await;
    let mark = stand.gateways[0].next_call();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let asked = stand.gateways[0]
        .calls_where(|call| call.operation == "GetShardIterator" && call.number >= mark);
    assert!(
        asked.len() <= 4,
        "{} calls of GetShardIterator",
        asked.len()
    );
    assert!(worker.stop().await.success());
}

/// A shard that is forgotten while it waits for its parent is a gap at once, although nobody can
/// read it yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_vanishes_while_it_waits_is_a_gap_at_once() {
    let stand = stand(Options::new(common::seed())).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, suite::whole::SHOWN_ONLY).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    // The parent is read to its end and cannot be applied, so its child waits.
    let refused = stand.gateways[1].inject(Fault::access_denied().on("BatchWriteItem"));
    put(&stand.source, &table, "b", 2).await;
    readiness_shows(&worker, "outage-replica").await;
    stand.gateways[0].rotate_all(&table).unwrap();
    put(&stand.source, &table, "lost", 3).await;
    stand.gateways[0].rotate_all(&table).unwrap();
    let all_have_rows = async || shard_rows(&stand).await.len() == 3;
    eventually("all have rows", Duration::from_secs(20), all_have_rows).await;
    stand.gateways[0].advance(Duration::from_secs(25 * 3600));
    readiness_shows(&worker, "gap-shard-vanished").await;
    assert!(!shard_rows(&stand).await.iter().any(is_finished));
    refused.off();
    put(&stand.source, &table, "after", 4).await;
    let arrived = async || stand.differences(&table).await.len() == 1;
    eventually("what is left arrives", Duration::from_secs(30), arrived).await;
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    let gaps = rows
        .iter()
        .filter(|row| text(row, "reason") == "shard-vanished");
    assert_eq!(gaps.count(), 1, "what was read of the parent was not lost");
    assert!(worker.stop().await.success());
}

/// A stream made anew is not read before the old one is finished, also when the worker was killed
/// in between: the last value is the new stream's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_stream_is_finished_before_the_new_one_is_read() {
    let stand = stand(Options::new(common::seed()).shards(2)).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "first", 0).await;
    stand.converge(&table, 1).await;
    // Nothing can be written: the old stream cannot be finished.
    let refused = stand.gateways[1].inject(Fault::access_denied().on("BatchWriteItem"));
    for id in 0..40 {
        put(&stand.source, &table, &format!("k{id}"), "1").await;
    }
    let old = stand.gateways[0].stream_arn(&table).unwrap();
    set_stream(&stand, &table, false).await;
    set_stream(&stand, &table, true).await;
    for id in 0..40 {
        put(&stand.source, &table, &format!("k{id}"), "2").await;
    }
    // The new stream's rows are there at once, so that nothing of it is forgotten unseen.
    let new = stand.gateways[0].stream_arn(&table).unwrap();
    assert_ne!(old, new);
    let has_rows = async || {
        let rows = shard_rows(&stand).await;
        rows.iter()
            .filter(|row| text(row, "streamArn") == new)
            .count()
            == 2
    };
    eventually("the new stream has rows", Duration::from_secs(20), has_rows).await;
    worker.kill();
    let worker = Worker::following(&config).await;
    readiness_shows(&worker, "gap-stream-recreated").await;
    refused.off();
    // While anything of the old stream is unfinished, nobody owns a shard of the new one.
    let start = Instant::now();
    loop {
        let rows = shard_rows(&stand).await;
        let (olds, news): (Vec<_>, Vec<_>) =
            rows.iter().partition(|row| text(row, "streamArn") == old);
        let finished = olds.iter().all(|row| is_finished(row));
        let begun = news.iter().any(|row| row.contains_key("leaseOwner"));
        assert!(
            finished || !begun,
            "the new stream is read before the old one is finished"
        );
        if begun {
            break;
        }
        assert!(
            start.elapsed() < Duration::from_secs(40),
            "the new stream is never read"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stand.converge(&table, 41).await;
    // Once the service has forgotten the old stream, so does the state table.
    stand.gateways[0].advance(Duration::from_secs(25 * 3600));
    let gone = async || {
        let rows = shard_rows(&stand).await;
        !rows.iter().any(|row| text(row, "streamArn") == old)
    };
    eventually("the old stream's rows go", Duration::from_secs(30), gone).await;
    let over = async || worker.logged("nothing of an old stream is left") == 1;
    eventually("the old stream is let go", Duration::from_secs(10), over).await;
    assert!(worker.stop().await.success());
}

/// An old stream that the service has forgotten before it was read ends with a gap, and no longer
/// holds the new one back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_old_stream_ends_with_a_gap_and_lets_the_new_one_go() {
    let stand = stand(Options::new(common::seed())).await;
    let table = stand.table("orders");
    let (config, worker) = suite::replicated(&stand, &table, suite::whole::SHOWN_ONLY).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    assert!(worker.stop().await.success());
    put(&stand.source, &table, "lost", 2).await;
    set_stream(&stand, &table, false).await;
    stand.gateways[0].advance(Duration::from_secs(25 * 3600));
    set_stream(&stand, &table, true).await;
    put(&stand.source, &table, "after", 3).await;
    let worker = Worker::following(&config).await;
    let arrived = async || stand.differences(&table).await.len() == 1;
    eventually("the new stream is read", Duration::from_secs(40), arrived).await;
    readiness_shows(&worker, "gap-shard-vanished").await;
    readiness_shows(&worker, "gap-stream-recreated").await;
    assert!(worker.stop().await.success());
}

/// A parent that neither a listing nor a row knows is looked for, and found gone; its child is
/// read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_parent_does_not_hold_its_child_for_ever() {
    let stand = stand(Options::new(common::seed())).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    // The first shard is gone before anybody looks; its child still names it.
    stand.gateways[0].rotate_all(&table).unwrap();
    stand.gateways[0].advance(Duration::from_secs(25 * 3600));
    let shards = stand.gateways[0].shards(&table);
    assert!(shards.len() == 1 && shards[0].parent.is_some());
    put(&stand.source, &table, "a", 1).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    stand.converge(&table, 1).await;
    let gaps = state_rows(&stand.target, &stand.state_table()).await;
    let vanished = gaps
        .iter()
        .filter(|row| text(row, "reason") == "shard-vanished");
    assert_eq!(vanished.count(), 0);
    assert!(worker.stop().await.success());
}
