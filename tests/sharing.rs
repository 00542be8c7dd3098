//! Several workers on one state table: shards shared evenly, handed over without a tear, and left
//! where they are.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use common::binary::{Worker, provision};
use common::eventually;
use common::stand::{Stand, put, s, state_rows};
use farshore::embedded::gateway::Options;

const SHARDS: usize = 16;
/// Long enough for a busy machine to renew in time: what is looked at here must not expire.
const LEASE: Duration = Duration::from_secs(5);
/// Far more than a change takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// The process that owns each shard, by the shard's row.
type Owners = BTreeMap<String, Option<String>>;

async fn owners(client: &Client, state_table: &str) -> Owners {
    state_rows(client, state_table)
        .await
        .into_iter()
        .filter(|row| row["entityType"] == s("shard"))
        .map(|row| {
            let owner = row.get("leaseOwner").and_then(|owner| owner.as_s().ok());
            let worker = owner.and_then(|owner| owner.rsplit_once('.'));
            let key = row["leaseKey"].as_s().unwrap().clone();
            (key, worker.map(|(worker, _)| worker.to_owned()))
        })
        .collect()
}

/// How many shards each process has; `None` while one has no owner.
fn counts(owners: &Owners) -> Option<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for owner in owners.values() {
        *counts.entry(owner.clone()?).or_default() += 1;
    }
    Some(counts)
}

struct Fleet {
    stand: Stand,
    state_table: String,
    workers: Vec<Worker>,
}

impl Fleet {
    async fn owners(&self) -> Owners {
        owners(&self.stand.target, &self.state_table).await
    }

    fn join(&mut self, table: &str) {
        let config = self.stand.config(&[table], "");
        let mut text = common::stand::text_of(&config);
        // Five workers at the pace of one would keep the gateways too busy to answer in time.
        for (name, before, after) in [
            ("duration", "1s", LEASE),
            ("poll_interval", "20ms", Duration::from_millis(200)),
            ("idle_interval", "50ms", Duration::from_millis(300)),
            ("checkpoint_every", "100ms", Duration::from_millis(500)),
        ] {
            let (before, after) = (format!("{name} = \"{before}\""), after.as_millis());
            assert!(text.contains(&before), "{before}");
            text = text.replace(&before, &format!("{name} = \"{after}ms\""));
        }
        std::fs::write(&config, text).unwrap();
        self.workers.push(Worker::start(&config));
    }

    /// Waits until the running workers, and only they, have even shares.
    async fn even(&self, what: &str) {
        let even = async || {
            let Some(counts) = counts(&self.owners().await) else {
                return false;
            };
            let (least, most) = (counts.values().min(), counts.values().max());
            counts.values().sum::<usize>() == SHARDS
                && counts.len() == self.workers.len()
                && most.unwrap() - least.unwrap() <= 1
                && self.workers.iter().all(|worker| has(&counts, worker.pid()))
        };
        let start = Instant::now();
        while !even().await {
            assert!(
                start.elapsed() < PATIENCE,
                "{what}: not even\n{}",
                self.story()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if std::env::var_os("STORY").is_some() {
            println!("{}", self.story());
        }
        println!("{what}: even after {:.1} s", start.elapsed().as_secs_f64());
    }

    /// Looks on for a while: no shard changes hands.
    async fn still(&self, what: &str) {
        let before = self.owners().await;
        let start = Instant::now();
        while start.elapsed() < 2 * LEASE {
            let now = self.owners().await;
            assert!(now == before, "{what}: a shard moved\n{}", self.story());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// What the workers did with shards, for a failure.
    fn story(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        for worker in &self.workers {
            let log = common::stand::text_of(&worker.log);
            let told = ["shard", "outage", "feeding", "asking"];
            let lines_of = log
                .lines()
                .filter(|line| told.iter().any(|t| line.contains(t)));
            lines.extend(lines_of.map(|line| format!("{} {line}", worker.pid())));
        }
        lines.sort_by_key(|line| line.split(' ').nth(1).map(str::to_owned));
        lines.join("\n")
    }

    /// How long shards had no living owner after `pid` went, from the first moment that its rows say
    /// so to the moment that another has the last.
    fn watch_orphans(&self, pid: u32, killed: bool) -> tokio::task::JoinHandle<Vec<Duration>> {
        let (client, table) = (self.stand.target.clone(), self.state_table.clone());
        tokio::spawn(async move {
            let begun = Instant::now();
            let before = owners(&client, &table).await;
            let theirs = |owner: &Option<String>| owner.as_deref().is_some_and(|o| is(o, pid));
            // A killed owner is none from that moment on; one that stops, once it has released.
            let mut since: BTreeMap<&String, Option<Instant>> = before
                .iter()
                .filter(|(_, owner)| theirs(owner))
                .map(|(key, _)| (key, killed.then_some(begun)))
                .collect();
            let mut took = Vec::new();
            while !since.is_empty() {
                assert!(begun.elapsed() < PATIENCE, "shards stay without an owner");
                let sent = Instant::now();
                let now = owners(&client, &table).await;
                since.retain(|key, since| match &now[*key] {
                    owner if theirs(owner) => true,
                    None => {
                        since.get_or_insert(sent);
                        true
                    }
                    Some(_) => {
                        took.push(since.map_or(Duration::ZERO, |since| since.elapsed()));
                        false
                    }
                });
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            took
        })
    }
}

fn is(worker: &str, pid: u32) -> bool {
    worker.contains(&format!("-{pid}#"))
}

fn has(counts: &BTreeMap<String, usize>, pid: u32) -> bool {
    counts.keys().any(|worker| is(worker, pid))
}

fn longest(what: &str, took: &[Duration]) -> Duration {
    let longest = took.iter().max().copied().unwrap_or_default();
    println!(
        "{what}: {} shards without an owner for up to {:.2} s: {took:.2?}",
        took.len(),
        longest.as_secs_f64()
    );
    longest
}

/// Changes of many items, until told to stop; how many.
fn writing(client: Client, table: String, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<u32> {
    tokio::spawn(async move {
        let mut version = 0;
        while !stop.load(Ordering::Relaxed) {
            version += 1;
            put(&client, &table, &format!("k{}", version % 100), version).await;
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        version
    })
}

/// Four workers have four shards each of sixteen. One joins, one is killed, one stops: each time the
/// shares are even again, nothing moves afterwards, no lease was torn from a living owner, and
/// every change arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_shared_evenly_and_stay_where_they_are() {
    let seed = common::seed();
    let source = Options::new(seed).shards(SHARDS);
    let stand = Stand::gateways(source, Options::new(seed)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    provision(&stand.config(&[&table], ""));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = writing(stand.source.clone(), table.clone(), Arc::clone(&stop));
    let mut fleet = Fleet {
        state_table: stand.state_table(),
        stand,
        workers: Vec::new(),
    };
    for _ in 0..4 {
        fleet.join(&table);
    }
    fleet.even("four start").await;
    fleet.still("four").await;

    fleet.join(&table);
    fleet.even("a fifth joins").await;
    fleet.still("five").await;

    let dies = fleet.workers.remove(0);
    let watch = fleet.watch_orphans(dies.pid(), true);
    dies.kill();
    fleet.even("one is killed").await;
    let took = longest("after SIGKILL", &watch.await.unwrap());
    assert!(took < LEASE + Duration::from_secs(6), "{took:?}");

    let leaves = fleet.workers.remove(0);
    let watch = fleet.watch_orphans(leaves.pid(), false);
    // The watcher must have seen what it owned.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut logs: Vec<_> = fleet.workers.iter().map(|w| w.log.clone()).collect();
    logs.push(leaves.log.clone());
    let log = leaves.log.clone();
    let ended = leaves.stop().await;
    assert!(ended.success(), "{ended}\n{}", common::stand::text_of(&log));
    fleet.even("one stops").await;
    let took = longest("after a clean stop", &watch.await.unwrap());
    assert!(took < Duration::from_secs(8), "{took:?}");
    fleet.still("three").await;

    stop.store(true, Ordering::Relaxed);
    let written = writer.await.unwrap();
    fleet
        .stand
        .converge(&table, 100.min(written as usize))
        .await;
    assert!(fleet.stand.dead_letters().is_empty());
    for worker in fleet.workers {
        assert!(worker.stop().await.success());
    }
    let handed: usize = logs.iter().map(|log| handed_over(log)).sum();
    assert!(handed > 0, "the fifth got its share by handover");
}

/// How many shards a worker handed over, each of them drained and released before anybody else had
/// it.
fn handed_over(log: &std::path::Path) -> usize {
    let text = common::stand::text_of(log);
    let lease = |line: &str| {
        let rest = line.split("lease=\"").nth(1)?;
        rest.split('"').next().map(str::to_owned)
    };
    let mut draining = std::collections::BTreeSet::new();
    let mut handed = 0;
    for line in text.lines() {
        if line.contains("shard is handed over") {
            handed += 1;
            draining.extend(lease(line));
        } else if line.contains("shard left") && draining.remove(&lease(line).unwrap()) {
            assert!(line.contains("how=Released"), "not drained: {line}");
        }
    }
    assert!(draining.is_empty(), "still draining: {draining:?}");
    handed
}

/// A worker that stops takes its row along; that of one that was killed goes after ten leases.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_workers_go_with_them_or_a_while_after() {
    let stand = Stand::embedded().await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = stand.config(&[&table], "");
    provision(&config);
    let workers = async || {
        let rows = state_rows(&stand.target, &stand.state_table()).await;
        let workers = rows.iter().filter(|row| row["entityType"] == s("worker"));
        workers
            .map(|row| row["worker"].as_s().unwrap().clone())
            .collect::<Vec<_>>()
    };
    let dies = Worker::following(&config).await;
    let dead = dies.pid();
    assert_eq!(workers().await.len(), 1);
    dies.kill();
    let stays = Worker::following(&stand.config(&[&table], "")).await;
    assert_eq!(workers().await.len(), 2);
    let gone = async || workers().await.iter().all(|worker| !is(worker, dead));
    eventually("the dead worker's row goes", PATIENCE, gone).await;
    assert_eq!(workers().await.len(), 1);
    assert!(stays.stop().await.success());
    assert!(workers().await.is_empty());
}

/// A worker that slept so long that its row was deleted has one again, and its share.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_slept_comes_back_into_the_fleet() {
    let seed = common::seed();
    let source = Options::new(seed).shards(4);
    let stand = Stand::gateways(source, Options::new(seed)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    provision(&stand.config(&[&table], ""));
    let workers = [
        Worker::start(&stand.config(&[&table], "")),
        Worker::start(&stand.config(&[&table], "")),
    ];
    let share = async |pids: &[u32], each: usize| {
        let counts = counts(&owners(&stand.target, &stand.state_table()).await);
        counts.is_some_and(|counts| {
            counts.len() == pids.len()
                && pids.iter().all(|pid| has(&counts, *pid))
                && counts.values().all(|count| *count == each)
        })
    };
    let pids = [workers[0].pid(), workers[1].pid()];
    eventually("both have two", PATIENCE, async || share(&pids, 2).await).await;
    workers[0].signal(rustix::process::Signal::STOP);
    eventually("one has all", PATIENCE, async || share(&pids[1..], 4).await).await;
    let gone = async || {
        let rows = state_rows(&stand.target, &stand.state_table()).await;
        let workers = rows.iter().filter(|row| row["entityType"] == s("worker"));
        workers.count() == 1
    };
    eventually("its row goes", PATIENCE, gone).await;
    workers[0].signal(rustix::process::Signal::CONT);
    eventually("both have two again", PATIENCE, async || {
        share(&pids, 2).await
    })
    .await;
    for worker in workers {
        assert!(worker.stop().await.success());
    }
}
