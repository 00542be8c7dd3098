//! Running but dead is never green: what stands still or dies in a worker is seen, and heals.

mod common;
mod suite;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::binary::{Worker, provision};
use common::eventually;
use common::stand::{Stand, put};
use farshore::embedded::gateway::{Fault, Options};

/// A worker to which trouble can be made, and where.
struct Patient {
    stand: Stand,
    table: String,
    config: PathBuf,
    trouble: PathBuf,
}

impl Patient {
    async fn new() -> Self {
        let stand = Stand::gateways(Options::new(common::seed()), Options::new(1)).await;
        let table = stand.table("orders");
        stand.create_source(&table).await;
        let config = stand.config(&[&table], "");
        provision(&config);
        let trouble = stand.temp.path().join("trouble");
        std::fs::create_dir(&trouble).unwrap();
        Self {
            stand,
            table,
            config,
            trouble,
        }
    }

    fn start(&self) -> Worker {
        let variable = ("FARSHORE_TEST_TROUBLE", self.trouble.to_str().unwrap());
        Worker::start_with(&self.config, &[variable])
    }

    /// Makes trouble, and waits until it has been met.
    async fn make(&self, trouble: &str) {
        let file: &Path = &self.trouble.join(trouble);
        std::fs::write(file, "").unwrap();
        let met = async || !file.exists();
        eventually("the trouble is met", Duration::from_secs(15), met).await;
    }

    /// A worker follows; then `trouble` turns readiness red with `code`, and it heals: what was
    /// written meanwhile arrives, and only the memory of it is left, if any.
    async fn heals(&self, trouble: &str, code: &str) {
        let worker = self.start();
        green(&worker).await;
        put(&self.stand.source, &self.table, "before", 1).await;
        self.stand.converge(&self.table, 1).await;
        let start = Instant::now();
        self.make(trouble).await;
        for id in 0..20 {
            put(&self.stand.source, &self.table, &format!("k{id}"), id).await;
        }
        red_with(&worker, code).await;
        let seen = start.elapsed();
        self.stand.converge(&self.table, 21).await;
        println!(
            "{trouble}: {code} after {seen:?}, healed after {:?}",
            start.elapsed()
        );
        let restarts = async || worker.metric("farshore_task_restarts_total").await >= 1.0;
        eventually("it is counted", Duration::from_secs(20), restarts).await;
        let healed = async || {
            let (_, body) = worker.get("/readyz").await.unwrap();
            !["stalled", "unread", "unowned", "not-live"]
                .iter()
                .any(|code| body.contains(code))
        };
        eventually("it heals", Duration::from_secs(30), healed).await;
        put(&self.stand.source, &self.table, "after", 1).await;
        self.stand.converge(&self.table, 22).await;
        assert!(worker.stop().await.success());
    }
}

async fn red_with(worker: &Worker, code: &str) {
    let start = Instant::now();
    loop {
        let answer = worker.get("/readyz").await;
        if answer
            .as_ref()
            .is_some_and(|(status, body)| *status == 503 && body.contains(code))
        {
            return;
        }
        assert!(start.elapsed().as_secs() < 40, "{code} not in {answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn green(worker: &Worker) {
    let start = Instant::now();
    loop {
        let answer = worker.get("/readyz").await;
        if answer.as_ref().is_some_and(|(status, _)| *status == 200) {
            return;
        }
        assert!(start.elapsed().as_secs() < 60, "not ready: {answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Mostly it is waited: the troubles of one test are made to workers of their own, side by side.
async fn all_heal(troubles: &[(&str, &str)]) {
    let heal = async |(trouble, code): &(&str, &str)| {
        Patient::new().await.heals(trouble, code).await;
    };
    futures::future::join_all(troubles.iter().map(heal)).await;
}

macro_rules! heals {
    ($($test:ident => [$($trouble:expr),*];)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            all_heal(&[$($trouble),*]).await;
        }
    )*};
}

heals! {
    a_shard_that_dies_or_hangs_is_seen_ended_and_taken_again =>
        [("shard-panic", "task-died"), ("shard-hang", "shard-stalled")];
    a_reader_that_dies_or_hangs_is_seen_ended_and_started_again =>
        [("reader-panic", "task-died"), ("reader-hang", "shard-stalled")];
    a_discovery_that_dies_or_hangs_is_seen_and_started_again =>
        [("discovery-panic", "task-died"), ("discovery-hang", "discovery-stalled")];
    a_table_that_dies_or_hangs_is_seen_and_started_again =>
        [("table-panic", "task-died"), ("table-hang", "loop-stalled")];
    a_stream_that_hangs_is_seen_and_started_again => [("stream-hang", "loop-stalled")];
    a_reader_of_the_state_table_that_dies_or_hangs_is_seen_and_started_again =>
        [("rows-panic", "task-died"), ("rows-hang", "state-unread")];
}

/// Shards that nobody takes although they could be read are seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_without_an_owner_is_seen_and_taken() {
    let patient = Patient::new().await;
    let worker = patient.start();
    green(&worker).await;
    put(&patient.stand.source, &patient.table, "before", 1).await;
    patient.stand.converge(&patient.table, 1).await;
    assert!(worker.stop().await.success());
    // The next worker hangs before it takes anything.
    std::fs::write(patient.trouble.join("stream-hang"), "").unwrap();
    let worker = patient.start();
    red_with(&worker, "shard-unowned").await;
    put(&patient.stand.source, &patient.table, "after", 1).await;
    patient.stand.converge(&patient.table, 2).await;
    let taken = async || {
        let (_, body) = worker.get("/readyz").await.unwrap();
        !body.contains("shard-unowned")
    };
    eventually("it is taken", Duration::from_secs(30), taken).await;
    assert!(worker.stop().await.success());
}

/// What waits for an outage is not dead, and is not started again for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_the_replica_is_no_stall() {
    let patient = Patient::new().await;
    let worker = patient.start();
    green(&worker).await;
    let away = patient.stand.gateways[1].inject(Fault::access_denied().on("BatchWriteItem"));
    put(&patient.stand.source, &patient.table, "a", 1).await;
    red_with(&worker, "outage-replica").await;
    let start = Instant::now();
    // Longer than a stall takes to be called one.
    while start.elapsed() < Duration::from_secs(18) {
        let (_, body) = worker.get("/readyz").await.unwrap();
        assert!(!body.contains("stalled"), "{body}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    away.off();
    patient.stand.converge(&patient.table, 1).await;
    green(&worker).await;
    assert_eq!(worker.metric("farshore_task_restarts_total").await, 0.0);
    assert!(worker.stop().await.success());
}
