//! The write budget of a fleet, judged by what a gateway meters: never above it, used where there is
//! something to write, slowed where it is throttled, and no table waits for another.

mod common;

use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{PutRequest, StreamViewType, WriteRequest};
use common::binary::{Worker, farshore, provision};
use common::stand::{Stand, TARGET, create_table, n, put, s};
use common::{checker, eventually, long};
use farshore::config::read::Loaded;
use farshore::dynamo::Regions;
use farshore::embedded::gateway::{Call, Fault, Gateway, Limit, Options};

/// What a busy host may add to what is saved up for a tenth of a second: calls that it lets wait arrive
/// together. A share too many would exceed it within a few seconds.
const JITTER_SECONDS: f64 = 0.5;
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

/// Seconds since the gateway began.
fn now(gateway: &Gateway, begun: Instant) -> f64 {
    let _ = gateway;
    begun.elapsed().as_secs_f64()
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
        let from = now(self.gateway(), self.begun);
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        // The gateway began a little later than this clock.
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
    println!("{} looks at the row in {seconds:.0} s", looks.len());
    for worker in fleet.workers {
        worker.kill();
    }
}
