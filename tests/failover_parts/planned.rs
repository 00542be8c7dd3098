//! A planned switchover.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::eventually;
use crate::common::stand::s;
use crate::failover_support::{A, B, Group, LABELS};
use crate::{PATIENCE, common, fail_over, failover_support};

/// An application that heeds the control record: it writes where that says, waits while it says `closing`,
/// and notes every write that was acknowledged.
struct Application {
    tasks: Vec<tokio::task::JoinHandle<Noted>>,
    written: Arc<AtomicU64>,
    stop: tokio_util::sync::CancellationToken,
}

#[derive(Default)]
struct Noted {
    /// The last value acknowledged of each key.
    last: std::collections::BTreeMap<String, u64>,
    written: [u64; 2],
    /// Longest time between two acknowledged writes.
    waited: Duration,
}

impl Application {
    /// So many writers, each of which writes so often, each to keys of its own.
    fn start(group: &Group, writers: u64, every: Duration) -> Self {
        let stop = tokio_util::sync::CancellationToken::new();
        let written = Arc::new(AtomicU64::new(0));
        let writer = |writer: u64| {
            let stopped = stop.clone();
            let clients = group.clients.clone();
            let state_table = group.state_table();
            let count = Arc::clone(&written);
            let places = (clients, state_table);
            tokio::spawn(Self::write(writer, every, places, count, stopped))
        };
        let tasks = (0..writers).map(writer).collect();
        Self {
            tasks,
            written,
            stop,
        }
    }

    async fn write(
        writer: u64,
        every: Duration,
        (clients, state_table): (Vec<aws_sdk_dynamodb::Client>, String),
        count: Arc<AtomicU64>,
        stopped: tokio_util::sync::CancellationToken,
    ) -> Noted {
        let mut noted = Noted::default();
        let mut place = Some(A);
        let mut looked = Instant::now();
        let mut last = Instant::now();
        let mut ticks = tokio::time::interval(every);
        let mut v = 0u64;
        while !stopped.is_cancelled() {
            ticks.tick().await;
            if looked.elapsed() > Duration::from_millis(100) || place.is_none() {
                looked = Instant::now();
                let asked = clients[B].get_item().table_name(&state_table);
                let asked = asked.key("leaseKey", s("control")).consistent_read(true);
                let control = asked.send().await.unwrap().item.unwrap();
                place = match (
                    control["active"].as_s().unwrap(),
                    control["state"].as_s().unwrap(),
                ) {
                    (_, state) if state == "closing" || state == "fencing" => None,
                    (active, _) if active == LABELS[A] => Some(A),
                    _ => Some(B),
                };
            }
            let Some(place) = place else { continue };
            v += 1;
            let id = format!("k{writer}-{}", v % 97);
            common::stand::put(&clients[place], failover_support::TABLE, &id, v).await;
            noted.waited = noted.waited.max(last.elapsed());
            last = Instant::now();
            noted.written[place] += 1;
            count.fetch_add(1, Ordering::Relaxed);
            noted.last.insert(id, v);
        }
        noted
    }

    async fn stop(self) -> Noted {
        self.stop.cancel();
        let mut all = Noted::default();
        for task in self.tasks {
            let noted = task.await.unwrap();
            all.last.extend(noted.last);
            all.waited = all.waited.max(noted.waited);
            for (sum, written) in all.written.iter_mut().zip(noted.written) {
                *sum += written;
            }
        }
        all
    }
}

/// A planned switchover under load loses nothing, and says how long writes had to wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_under_load_loses_nothing_and_says_how_long_writes_waited() {
    let mut group = Group::new(9, 2).await;
    group.lease = "3s";
    group.provision(&[B]);
    let worker = group.worker(B).await;
    // 500 a second.
    let application = Application::start(&group, 4, Duration::from_millis(8));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = application.written.load(Ordering::Relaxed);
    let config = group.config(B, "");
    let (code, answer, said) = fail_over(
        &config,
        &["--to", LABELS[B], "--planned", "--within", "60s"],
    )
    .await;
    assert_eq!(code, Some(0), "{answer:#}\n{said}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let noted = application.stop().await;
    let told = answer["writesWaitedSeconds"].as_f64().unwrap();
    println!(
        "{:?} writes, {:.0} a second before it began; told {told} s, the application saw {:?}",
        noted.written,
        before as f64 / 2.0,
        noted.waited
    );
    assert!(
        noted.written[A] > 300 && noted.written[B] > 50,
        "{:?}",
        noted.written
    );
    assert_eq!(answer["leftBehind"], 0, "{answer:#}");
    assert_eq!(answer["inFlight"], serde_json::json!([]));
    for (id, v) in &noted.last {
        assert_eq!(group.value(B, id).await, Some(v.to_string()), "{id}");
    }
    assert!((told - noted.waited.as_secs_f64()).abs() < 2.0, "{told}");
    assert!(worker.stop().await.success());
}

/// A planned switchover that died while writes waited, and whose target went away with it, takes nothing out of
/// service: once its time is over the active region says that it is active.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_that_died_with_its_target_takes_no_region_out_of_service() {
    let mut group = Group::new(16, 2).await;
    group.provision(&[A, B]);
    let (a, b) = (group.worker(A).await, group.worker(B).await);
    group.put(A, "k", 1).await;
    group.converge(A, B, 1).await;
    let serves = async |wanted: u16| {
        a.get("/active")
            .await
            .is_some_and(|(code, _)| code == wanted)
    };
    eventually("it serves", PATIENCE, async || serves(200).await).await;
    let path = group.config(B, "").to_str().unwrap().to_owned();
    let mut dying = common::binary::farshore(&[
        "failover",
        "--to",
        LABELS[B],
        "--planned",
        "--within",
        "2s",
        "--apply",
        "--config",
        &path,
    ]);
    dying.env("FARSHORE_TEST_CRASH", "failover-closed");
    let died = tokio::task::spawn_blocking(move || dying.output()).await;
    assert_eq!(died.unwrap().unwrap().status.code(), None);
    eventually("writes wait", PATIENCE, async || serves(503).await).await;
    b.kill();
    let silent = farshore::embedded::gateway::Outage::Silent;
    group.gateways[B].go_away(silent).await;
    eventually("it serves again", PATIENCE, async || serves(200).await).await;
    assert!(a.stop().await.success());
}

/// An application that does not wait makes a planned switchover give up, and nothing has changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_that_is_never_quiet_is_given_up() {
    let group = Group::new(10, 2).await;
    group.provision(&[B]);
    let worker = group.worker(B).await;
    let client = group.clients[A].clone();
    let writing = tokio::spawn(async move {
        for v in 0u64.. {
            common::stand::put(&client, failover_support::TABLE, "k", v).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let config = group.config(B, "");
    let (code, answer, said) =
        fail_over(&config, &["--to", LABELS[B], "--planned", "--within", "3s"]).await;
    assert_eq!(code, Some(1), "{answer:#}\n{said}");
    assert!(
        answer["givenUp"]
            .as_str()
            .unwrap()
            .contains("stop the application"),
        "{answer:#}"
    );
    let steady = (1, LABELS[A].to_owned(), "steady".to_owned());
    assert_eq!(group.told(B).await, Some(steady.clone()));
    // One that is killed while writes wait does not make them wait for ever.
    let path = config.to_str().unwrap().to_owned();
    let mut dying = common::binary::farshore(&[
        "failover",
        "--to",
        LABELS[B],
        "--planned",
        "--within",
        "1s",
        "--apply",
        "--config",
        &path,
    ]);
    dying.env("FARSHORE_TEST_CRASH", "failover-closed");
    let died = tokio::task::spawn_blocking(move || dying.output())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(died.status.code(), None);
    assert_eq!(group.told(B).await.unwrap().2, "closing");
    let reopened = async || group.told(B).await == Some(steady.clone());
    eventually("writes need not wait any more", PATIENCE, reopened).await;
    writing.abort();
    group.converge(A, B, 1).await;
    assert!(worker.stop().await.success());
}
