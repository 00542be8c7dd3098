//! The write budget of a fleet, judged by what a gateway meters: never above it, used where there is
//! something to write, slowed where it is throttled, and no table waits for another.

mod common;

use std::collections::HashMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{DeleteRequest, PutRequest, StreamViewType, WriteRequest};
use common::binary::{Worker, farshore, provision, spawn};
use common::stand::{Stand, create_table, n, put, s};
use common::{checker, eventually, long};
use farshore::embedded::gateway::{Call, Fault, Gateway, Options};

/// What a busy host may add to what is saved up for a tenth of a second: calls that it lets wait arrive
/// together. A share too many would exceed it within a few seconds.
const JITTER_SECONDS: f64 = 0.4;
const PATIENCE: Duration = Duration::from_secs(30);

/// Puts items `first..last` into a table, by batches.
async fn fill(client: &Client, table: &str, ids: std::ops::Range<usize>, bytes: usize) {
    let ids: Vec<usize> = ids.collect();
    for batch in ids.chunks(25) {
        let requests = batch.iter().map(|id| {
            let item = PutRequest::builder()
                .item("id", s(format!("k{id}")))
                .item("v", n(id))
                .item("body", s("x".repeat(bytes)));
            WriteRequest::builder()
                .put_request(item.build().unwrap())
                .build()
        });
        let call = client.batch_write_item();
        let call = call.request_items(table, requests.collect());
        let answer = call.send().await.unwrap();
        assert!(answer.unprocessed_items.unwrap_or_default().is_empty());
    }
}

/// A table with a budget of so many units per second.
fn limited(table: &str, units: u32) -> String {
    format!("name = \"{table}\"\nunits_per_second = {units}")
}

/// What was written to one table.
struct Written {
    /// When, in seconds since the gateway began, and how many units.
    units: Vec<(f64, f64)>,
}

impl Written {
    fn of(gateway: &Gateway, table: &str, since: u64) -> Self {
        let is_write = |call: &Call| {
            call.number >= since && call.units > 0.0 && call.tables.iter().any(|name| name == table)
        };
        let calls = gateway.calls_where(is_write);
        let mut units: Vec<(f64, f64)> = calls
            .iter()
            .filter_map(|call| Some((call.effect?.as_secs_f64(), call.units)))
            .collect();
        units.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self { units }
    }

    /// By how many units the worst window of time exceeds `rate`.
    fn excess(&self, rate: f64) -> f64 {
        let mut worst = 0.0f64;
        // The window that ends here and is the worst: what came before it either adds to it or is left out.
        let (mut excess, mut last) = (0.0f64, 0.0);
        for (at, units) in &self.units {
            excess = (excess - (at - last) * rate).max(0.0) + units;
            last = *at;
            worst = worst.max(excess);
        }
        worst
    }

    /// Units a second between two moments.
    fn rate(&self, from: f64, to: f64) -> f64 {
        let within = self.units.iter().filter(|(at, _)| (from..to).contains(at));
        within.map(|(_, units)| units).sum::<f64>() / (to - from)
    }

    fn never_exceeds(&self, rate: f64, dearest: f64) {
        let excess = self.excess(rate);
        let allowed = rate * (0.1 + JITTER_SECONDS) + dearest;
        println!("{excess:.0} units above {rate}/s at the worst, {allowed:.0} allowed");
        assert!(
            excess <= allowed,
            "{excess} above {rate}/s, {allowed} allowed"
        );
    }
}

/// Workers of one table, and what they write.
struct Fleet {
    stand: Stand,
    table: String,
    units: f64,
    begun: Instant,
    since: u64,
    workers: Vec<Worker>,
}

impl Fleet {
    async fn new(shards: usize, units: u32) -> Self {
        let seed = common::seed();
        let begun = Instant::now();
        // The reserve of the gateway's own bucket is what a busy host may add.
        let bucket = Fault::capacity(f64::from(units)).reserve(0.1 + JITTER_SECONDS);
        let target = Options::new(seed).metered();
        let stand = Stand::gateways(Options::new(seed).shards(shards), target).await;
        let table = stand.table("orders");
        stand.create_source(&table).await;
        provision(&stand.config(&[&limited(&table, units)], ""));
        stand.gateways[1].inject(bucket.table(&table));
        Self {
            since: stand.gateways[1].next_call(),
            stand,
            table,
            units: f64::from(units),
            begun,
            workers: Vec::new(),
        }
    }

    fn gateway(&self) -> &Gateway {
        &self.stand.gateways[1]
    }

    fn written(&self) -> Written {
        Written::of(self.gateway(), &self.table, self.since)
    }

    fn join(&mut self) {
        let config = self
            .stand
            .config(&[&limited(&self.table, self.units as u32)], "");
        self.workers.push(Worker::start(&config));
    }

    /// Waits until the workers have even shares, as their metrics say.
    async fn even(&self, what: &str) {
        let fair = self.units / self.workers.len() as f64;
        let even = async || {
            for worker in &self.workers {
                let share = worker.metric("farshore_write_budget_units").await;
                if (share - fair).abs() > fair * 0.1 {
                    return false;
                }
            }
            true
        };
        let start = Instant::now();
        eventually(what, PATIENCE, even).await;
        println!("{what}: even after {:?}", start.elapsed());
    }

    /// How much of the budget is used from now on for a while.
    async fn is_used(&self, what: &str, seconds: f64) {
        // The gateway began a little later than this clock: that is nothing to the time it takes.
        let from = self.begun.elapsed().as_secs_f64();
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        let rate = self.written().rate(from, from + seconds);
        println!("{what}: {rate:.0} of {} units/s", self.units);
        assert!(rate >= 0.9 * self.units, "{what}: {rate} of {}", self.units);
    }

    /// Nothing was ever refused for want of units, and no window held too many.
    fn is_within(&self) {
        self.written().never_exceeds(self.units, 1.0);
        let table = self.table.clone();
        let refused = self
            .gateway()
            .calls_where(|call| call.unprocessed > 0 && call.tables.contains(&table));
        assert!(refused.is_empty(), "{} calls were refused", refused.len());
    }
}

/// One worker, three, two after a SIGKILL, one after a clean stop: what they write together is never more than
/// the budget, and nine tenths of it at least while there is a backlog.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changing_fleet_uses_its_budget_and_never_more() {
    let steady = long(20, 2) as f64;
    let mut fleet = Fleet::new(6, 400).await;
    fleet.join();
    fleet.even("one worker").await;
    let source = fleet.stand.source.clone();
    let items = long(40_000, 8_000) as usize;
    fill(&source, &fleet.table, 0..items, 100).await;
    fleet.is_used("one worker", steady).await;

    fleet.join();
    fleet.join();
    fleet.even("three workers").await;
    fleet.is_used("three workers", steady).await;

    fleet.workers.remove(0).kill();
    fleet.even("two workers after a SIGKILL").await;
    fleet.is_used("two workers", steady).await;

    let ended = fleet.workers.remove(0).stop().await;
    assert!(ended.success(), "{ended}");
    fleet.even("one worker after a clean stop").await;
    fleet.is_used("the last worker", steady).await;
    fleet.is_within();

    let looks = fleet.gateway().calls_where(|call| {
        let json = r#"{"leaseKey":{"S":"budget"}}"#;
        call.keys.iter().any(|key| key.json == json)
    });
    let seconds = fleet.begun.elapsed().as_secs_f64();
    println!("{} calls about the row in {seconds:.0} s", looks.len());
    // A lease is a second; six calls for each, and more only while shares move.
    assert!((looks.len() as f64) < 7.0 * 3.0 * seconds);
    for worker in fleet.workers {
        worker.kill();
    }
}

/// A job writes beside the workers, and both together no more than the budget.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_takes_its_share_beside_a_worker() {
    const FOREIGN: usize = 600;
    let mut fleet = Fleet::new(2, 300).await;
    fleet.join();
    fleet.even("one worker").await;
    // Past the gateway: these are nobody's writes.
    let target = common::stand::client(&fleet.gateway().embedded().endpoint_url(), "us-west-2");
    fill(&target, &fleet.table, 100_000..100_000 + FOREIGN, 100).await;
    let source = fleet.stand.source.clone();
    fill(&source, &fleet.table, 0..2_500, 100).await;
    let config = fleet
        .stand
        .config(&[&limited(&fleet.table, fleet.units as u32)], "");
    let mut job = farshore(&["reconcile", "--config", config.to_str().unwrap()]);
    job.args(["--apply", "--max-deletes", "100%", "--settle", "500ms"]);
    job.stdout(Stdio::null()).stderr(Stdio::null());
    let mut job = spawn(job).unwrap();
    let lowered = async || {
        let share = fleet.workers[0].metric("farshore_write_budget_units").await;
        share < fleet.units * 0.7
    };
    eventually("the job has a share", PATIENCE, lowered).await;
    let deleted = async || checker::items(&target, &fleet.table).await.len() == 2_500;
    eventually("all is as in the source", PATIENCE, deleted).await;
    fleet.is_within();
    let ended = async || job.try_wait().unwrap().is_some();
    let start = Instant::now();
    let mut ended = ended;
    while !ended().await {
        assert!(start.elapsed() < PATIENCE, "the job does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fleet.even("the job has given its share back").await;
    for worker in fleet.workers {
        assert!(worker.stop().await.success());
    }
}

/// While its share cannot be renewed a worker writes until its hold is over, and nothing after that, although
/// its leases are good; it says so once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_written_once_the_hold_of_a_share_is_over() {
    const LEASE: f64 = 1.0;
    let mut fleet = Fleet::new(1, 200).await;
    fleet.join();
    fleet.even("one worker").await;
    let source = fleet.stand.source.clone();
    fill(&source, &fleet.table, 0..1_600, 100).await;
    let flows = async || fleet.written().units.len() > 5;
    eventually("it flows", PATIENCE, flows).await;
    let denied = || Fault::access_denied().key(r#"{"leaseKey":{"S":"budget"}}"#);
    let denied = [
        fleet.gateway().inject(denied().on("GetItem")),
        fleet.gateway().inject(denied().on("PutItem")),
    ];
    let since = fleet.begun.elapsed().as_secs_f64();
    let worker = &fleet.workers[0];
    let told = async || worker.logged("could not be renewed for a lease") == 1;
    eventually("it says so", PATIENCE, told).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(worker.logged("could not be renewed for a lease"), 1);
    assert_eq!(worker.metric("farshore_write_budget_units").await, 0.0);
    assert_eq!(worker.metric("farshore_leases_held").await, 1.0);
    let last = fleet.written().units.last().unwrap().0;
    println!(
        "the last write {:.2} s after the last renewal that could succeed",
        last - since
    );
    assert!(last - since < LEASE + JITTER_SECONDS);
    for fault in denied {
        fault.off();
    }
    fleet.stand.converge(&fleet.table, 1_600).await;
    fleet.is_within();
    for worker in fleet.workers {
        assert!(worker.stop().await.success());
    }
}

/// Deletes of large items look like one unit each where the stream carries no old images. What the service tells
/// of the first makes up for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_service_tells_corrects_what_was_estimated() {
    const RATE: u32 = 400;
    const KB: usize = 4;
    let seed = common::seed();
    let stand = Stand::gateways(Options::new(seed), Options::new(seed).metered()).await;
    let table = stand.table("orders");
    create_table(&stand.source, &table, Some(StreamViewType::NewImage)).await;
    let config = stand.config(&[&limited(&table, RATE)], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let target = common::stand::client(&stand.gateways[1].embedded().endpoint_url(), "us-west-2");
    let items = long(2_000, 400) as usize;
    // The replica holds them already, so that the deletes come at once.
    fill(&target, &table, 0..items, (KB << 10) - 200).await;
    fill(&stand.source, &table, 0..items, 10).await;
    let puts = async || {
        let written = Written::of(&stand.gateways[1], &table, 0);
        let units: f64 = written.units.iter().map(|(_, units)| units).sum();
        units >= (items * KB) as f64
    };
    eventually("what was put is written", PATIENCE, puts).await;
    let written = Written::of(&stand.gateways[1], &table, 0);
    let (from, to) = (written.units[0].0, written.units.last().unwrap().0);
    // All of them replaced large items by small ones: estimated at a unit, each took four.
    written.never_exceeds(f64::from(RATE), (25 * KB) as f64);
    let rate = written.rate(from + 0.5, to);
    println!("{rate:.0} of {RATE} units/s");
    assert!(rate >= 0.9 * f64::from(RATE), "{rate}");
    let told = worker.metric("farshore_write_units_total").await;
    let metered: f64 = written.units.iter().map(|(_, units)| units).sum();
    assert!(
        (told - metered).abs() < 60.0,
        "{told} told, {metered} metered"
    );
    // And a batch of deletes is no surprise any more.
    let ids: Vec<usize> = (0..items).collect();
    for batch in ids.chunks(25) {
        let requests = batch.iter().map(|id| {
            let key = HashMap::from([("id".to_owned(), s(format!("k{id}")))]);
            let delete = DeleteRequest::builder().set_key(Some(key)).build().unwrap();
            WriteRequest::builder().delete_request(delete).build()
        });
        let call = stand.source.batch_write_item();
        let call = call.request_items(&table, requests.collect());
        call.send().await.unwrap();
    }
    stand.converge(&table, 0).await;
    assert!(worker.stop().await.success());
}

/// A range of keys that is throttled slows the shard whose writes hit it, little is sent there in vain, and the other
/// shards go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_range_slows_its_shard_alone() {
    const RANGES: usize = 4;
    const HOT: f64 = 100.0;
    let seed = common::seed();
    let stand = Stand::gateways(Options::new(seed).shards(RANGES), Options::new(seed)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&limited(&table, 0)], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let hot = Fault::capacity(HOT * RANGES as f64).per_key_range(RANGES);
    let end = 1.0 / RANGES as f64;
    let hot = hot.reserve(0.2).key_range(0.0..end).table(&table);
    stand.gateways[1].inject(hot);
    let begun = Instant::now();
    let items = 2_000;
    fill(&stand.source, &table, 0..items, 100).await;
    // What arrived of the hot range, and of the others.
    let arrived = || {
        let mut places: HashMap<String, f64> = HashMap::new();
        let writes = stand.gateways[1].calls_where(|call| {
            call.operation == "BatchWriteItem" && call.unprocessed == 0 && call.succeeded()
        });
        for key in writes.iter().flat_map(|call| &call.keys) {
            places.insert(key.json.clone(), key.place());
        }
        let hot = places.values().filter(|place| **place < end).count();
        (hot, places.len() - hot)
    };
    let cold = items - items / RANGES - items / 20;
    eventually("the others are there", PATIENCE, async || {
        arrived().1 >= cold
    })
    .await;
    let took = begun.elapsed();
    let (hot, others) = arrived();
    println!("{others} of the others after {took:?}, {hot} of the hot range");
    assert!(took < Duration::from_millis(3_000), "{took:?}");
    assert!(hot < items / RANGES / 2 + 100, "{hot}: it was throttled");
    stand.converge(&table, items).await;
    let took = begun.elapsed().as_secs_f64();
    let least = (items / RANGES - items / 20) as f64 / HOT;
    println!("all after {took:.1} s, {least:.1} at the least");
    if std::env::var_os("STORY").is_some() {
        for call in stand.gateways[1].calls_of("BatchWriteItem") {
            if call.keys.iter().any(|key| key.place() < end) {
                println!(
                    "{:.3} {} items {} back {:?}",
                    call.arrived.as_secs_f64(),
                    call.keys.len(),
                    call.unprocessed,
                    call.code()
                );
            }
        }
    }
    assert!(took < 2.0 * least + 2.0, "{took}");
    let calls = stand.gateways[1].calls_of("BatchWriteItem");
    let refused: usize = calls.iter().map(|call| call.unprocessed).sum();
    println!("{refused} writes were sent in vain");
    assert!(
        refused < items / RANGES,
        "{refused} writes were sent in vain"
    );
    assert!(worker.stop().await.success());
}

/// A table that is short of units slows its writes, and has its pace again once it is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn throttling_slows_a_table_and_passes() {
    let seed = common::seed();
    let stand = Stand::gateways(Options::new(seed), Options::new(seed).metered()).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&limited(&table, 1_000)], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let short = Fault::throttle(farshore::embedded::gateway::Limit::MaxOnDemand);
    let short = stand.gateways[1].inject(short.on("BatchWriteItem").table(&table).chance(0.5));
    fill(&stand.source, &table, 0..6_000, 100).await;
    let limit = async || worker.metric("farshore_write_limit_units").await;
    eventually("it is slowed", PATIENCE, async || limit().await < 700.0).await;
    assert_eq!(worker.metric("farshore_write_budget_units").await, 1_000.0);
    short.off();
    let slow = limit().await;
    eventually("it recovers", 2 * PATIENCE, async || {
        limit().await == 1_000.0
    })
    .await;
    println!("from {slow:.0} back to 1000 units/s");
    stand.converge(&table, 6_000).await;
    assert!(worker.stop().await.success());
}

/// Whatever befalls the replica of one table, the changes of another go on at their pace. Nobody but the worker
/// tries again, and it does so over the connections it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trouble_with_one_table_starves_no_other() {
    let seed = common::seed();
    let stand = Stand::gateways(Options::new(seed).shards(2), Options::new(seed)).await;
    let (sick, well) = (stand.table("sick"), stand.table("well"));
    stand.create_source(&sick).await;
    stand.create_source(&well).await;
    let config = stand.config(&[&sick, &well], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let gateway = &stand.gateways[1];
    let pace = async |ids: std::ops::Range<usize>| {
        let begun = Instant::now();
        let count = ids.end;
        fill(&stand.source, &well, ids, 100).await;
        let all = async || checker::items(&stand.target, &well).await.len() == count;
        eventually("the other table's changes arrive", PATIENCE, all).await;
        begun.elapsed()
    };
    put(&stand.source, &sick, "first", 1).await;
    put(&stand.source, &well, "k0", 1).await;
    stand.converge(&sick, 1).await;
    stand.converge(&well, 1).await;
    let undisturbed = pace(1..1_500).await;
    println!("undisturbed {undisturbed:?}");
    let throttled = Fault::throttle(farshore::embedded::gateway::Limit::Provisioned);
    let troubles = [
        ("throttled", throttled),
        ("denied", Fault::access_denied()),
        ("cut", Fault::cut()),
        // For good: its client has given up long before.
        ("held back", Fault::hold(Duration::from_secs(600))),
    ];
    let mut first = 1_500;
    for (name, fault) in troubles {
        let fault = gateway.inject(fault.on("BatchWriteItem").table(&sick));
        fill(&stand.source, &sick, 0..2_000, 100).await;
        let struck = async || fault.hits() > 0;
        eventually(name, PATIENCE, struck).await;
        let (connections, calls) = (gateway.connections(), gateway.next_call());
        let took = pace(first..first + 1_500).await;
        first += 1_500;
        println!("{name}: {took:?}");
        assert!(
            took < 2 * undisturbed + Duration::from_secs(1),
            "{name}: {took:?}"
        );
        let (connections, calls) = (
            gateway.connections() - connections,
            gateway.next_call() - calls,
        );
        println!("{connections} connections for {calls} calls");
        // A call that is cut or given up takes its connection along.
        if !matches!(name, "cut" | "held back") {
            assert!(connections * 4 < calls, "{connections} for {calls} calls");
        }
        fault.off();
    }
    worker.kill();
}

/// Each failure is counted, and followed by a pause: nobody beneath the worker tries again unseen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_attempt_is_the_workers_own() {
    let seed = common::seed();
    let stand = Stand::gateways(Options::new(seed), Options::new(seed)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let worker = Worker::following(&config).await;
    let fails = [
        Fault::error_before(),
        Fault::unavailable(),
        Fault::throttle(farshore::embedded::gateway::Limit::Provisioned),
    ];
    for fault in fails {
        let fault = fault.on("BatchWriteItem").table(&table).times(3);
        stand.gateways[1].inject(fault);
    }
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    let failed = stand.gateways[1]
        .calls_where(|call| call.operation == "BatchWriteItem" && !call.succeeded());
    assert_eq!(failed.len(), 9);
    let counted = worker.metric("farshore_retries_total").await;
    assert_eq!(counted, 9.0, "attempts that nobody counted");
    assert!(worker.stop().await.success());
}
