//! Much poison among much that is good, workers that are killed, letters that find no place for a
//! while: all good is applied, all poison is lettered, and one redrive brings it home.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use aws_sdk_dynamodb::types::{PutRequest, WriteRequest};
use farshore::dynamo::clock::host_ms;
use farshore::embedded::gateway::{Fault, FaultHandle};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::common::binary::{Worker, run, stderr, stdout};
use crate::common::stand::{Stand, n, s, state_rows};
use crate::common::{eventually, seed};

/// How much of it.
#[derive(Clone, Copy)]
pub struct Size {
    pub good: usize,
    pub poison: usize,
    pub kills: usize,
}

/// A shard and a position in it.
pub type Place = (String, String);

/// What a replica can refuse for good, as the service says it.
fn kinds() -> [Fault; 8] {
    let validation = |message: &str| Fault::code(400, "ValidationException", message);
    let full = "Collection size exceeded.";
    [
        validation("Type mismatch for Index Key kind Expected: S Actual: N"),
        validation("Item size has exceeded the maximum allowed size"),
        validation("One or more parameter values are not valid: an empty string value for key at"),
        Fault::code(400, "ItemCollectionSizeLimitExceededException", full),
        validation("Number overflow. Attempting to store a number with magnitude larger than"),
        validation("Nesting Levels have exceeded supported limits"),
        validation("Aggregated size of all range keys has exceeded the size limit"),
        Fault::code(413, "RequestEntityTooLarge", "Request Entity Too Large"),
    ]
}

/// Refuses the writes of each kind of poison.
fn poisoned(stand: &Stand) -> Vec<FaultHandle> {
    let refuse = |(kind, fault): (usize, Fault)| {
        let fault = fault.on("BatchWriteItem").key(&format!("\"p{kind}-"));
        stand.gateways[1].inject(fault.named(&format!("poison {kind}")))
    };
    kinds().into_iter().enumerate().map(refuse).collect()
}

/// Writes all items once, in any order, 25 at a time.
async fn write_all(stand: &Stand, table: &str, size: Size, random: &mut StdRng) {
    let good = (0..size.good).map(|id| format!("k{id}"));
    let poison = (0..size.poison).map(|id| format!("p{}-{id}", id % 8));
    let mut ids: Vec<String> = good.chain(poison).collect();
    ids.shuffle(random);
    for ids in ids.chunks(25) {
        let puts = ids.iter().map(|id| {
            let put = PutRequest::builder()
                .item("id", s(id))
                .item("v", n(ids.len()));
            let put = put.build().unwrap();
            WriteRequest::builder().put_request(put).build()
        });
        let call = stand.source.batch_write_item();
        let call = call.request_items(table, puts.collect());
        let answer = call.send().await.unwrap();
        assert!(answer.unprocessed_items.unwrap_or_default().is_empty());
    }
}

/// The checkpoint of every shard.
async fn checkpoints(stand: &Stand) -> HashMap<String, String> {
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    rows.into_iter()
        .filter(|row| row["entityType"] == s("shard"))
        .map(|row| {
            let text = |name: &str| row[name].as_s().unwrap().clone();
            (text("shardId"), text("checkpoint"))
        })
        .collect()
}

/// Whether a checkpoint has passed a position.
fn has_passed(checkpoint: &str, position: &str) -> bool {
    let width = |number: &str| number.trim_start_matches('0').len();
    match checkpoint {
        "SHARD_END" => true,
        at if at.bytes().all(|byte| byte.is_ascii_digit()) => {
            (width(at), at) >= (width(position), position)
        }
        _ => false,
    }
}

/// What was seen at a kill: when that was, the checkpoints of the shards then, and the letters that
/// were there, where that can be seen.
struct Kill {
    at_ms: i64,
    checkpoints: HashMap<String, String>,
    there: Option<HashSet<Place>>,
}

impl Kill {
    /// The checkpoints may have passed nothing that was lettered only later.
    fn check(&self, seed: u64, lettered_later: impl Fn(&Place, &Self) -> bool, all: &[Place]) {
        for place in all.iter().filter(|place| lettered_later(place, self)) {
            let (shard, position) = place;
            let at = self.checkpoints.get(shard).map_or("", String::as_str);
            assert!(
                !has_passed(at, position),
                "seed {seed}: the checkpoint {at} had passed {position} before it was lettered"
            );
        }
    }
}

/// `outage` takes the place of the letters away, or brings it back. `lettered` says what lies there
/// by shard and position, where that can be seen without taking it; `sent` says since when, where only
/// that can be told, once all is there.
pub async fn poison_among_good(
    stand: &Stand,
    table: &str,
    config: &Path,
    size: Size,
    outage: impl AsyncFn(bool),
    lettered: impl Fn() -> Option<HashSet<Place>>,
    sent: impl AsyncFn() -> HashMap<Place, i64>,
) {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let faults = poisoned(stand);
    let mut worker = Worker::following(config).await;
    let mut kills: Vec<Kill> = Vec::new();
    let killing = async {
        for kill in 0..size.kills {
            let moment = rand::rng().random_range(300..1_500);
            tokio::time::sleep(Duration::from_millis(moment)).await;
            if kill == size.kills / 2 {
                outage(true).await;
                let red = async || {
                    let answer = worker.get("/readyz").await;
                    answer.is_some_and(|(_, body)| body.contains("outage-dead-letters"))
                };
                eventually("readiness tells why", Duration::from_secs(30), red).await;
            }
            worker.kill();
            // Nothing moves now: no checkpoint may have passed what is not there.
            kills.push(Kill {
                at_ms: host_ms(),
                checkpoints: checkpoints(stand).await,
                there: lettered(),
            });
            if kill == size.kills / 2 {
                outage(false).await;
            }
            worker = Worker::following(config).await;
        }
        worker
    };
    let writing = write_all(stand, table, size, &mut random);
    let (worker, ()) = tokio::join!(killing, writing);
    let within = Duration::from_secs(240 + (size.good / 50) as u64);
    let good_applied = async || {
        // Comparing all of it takes the processors that it waits for.
        tokio::time::sleep(Duration::from_millis(size.good as u64 / 20)).await;
        let differences = stand.differences(table).await;
        differences.len() == size.poison && differences.iter().all(|line| line.contains("p"))
    };
    eventually("all good is applied", within, good_applied).await;
    let path = config.to_str().unwrap();
    let waiting = || {
        let output = run(&["dead-letters", "--look", "0", "--json", "--config", path]);
        let listed: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        listed["waiting"].as_u64().unwrap() as usize
    };
    // Where it can be seen, each record once: repairs and replays make second letters.
    let all_there = async || match lettered() {
        Some(there) => there.len() >= size.poison,
        None => waiting() >= size.poison,
    };
    eventually("all poison is lettered", within, all_there).await;
    // What the killed ones left in doubt is repaired, and refused once more.
    let settled = async || {
        let rows = state_rows(&stand.target, &stand.state_table()).await;
        !rows.iter().any(|row| row["entityType"] == s("doubt"))
    };
    eventually("every doubt is settled", within, settled).await;
    let checked = match lettered() {
        Some(there) => {
            let all: Vec<Place> = there.into_iter().collect();
            let later = |place: &Place, kill: &Kill| {
                !kill.there.as_ref().is_some_and(|then| then.contains(place))
            };
            kills.iter().for_each(|kill| kill.check(seed, later, &all));
            all.len()
        }
        None => {
            let sent = sent().await;
            let all: Vec<Place> = sent.keys().cloned().collect();
            let later = |place: &Place, kill: &Kill| sent[place] > kill.at_ms;
            kills.iter().for_each(|kill| kill.check(seed, later, &all));
            all.len()
        }
    };
    assert!(
        // Of a queue not every letter can be seen.
        checked * 10 >= size.poison * 9,
        "seed {seed}: {checked} of {}",
        size.poison
    );
    let moved = |kill: &Kill| kill.checkpoints.values().any(|at| at != "TRIM_HORIZON");
    assert!(
        kills.len() == size.kills && kills.iter().any(moved),
        "seed {seed}: no checkpoint had moved at any kill"
    );
    for fault in faults {
        assert!(
            fault.hits() > 0,
            "seed {seed}: a kind of poison never struck"
        );
        fault.off();
    }
    let home = run(&["redrive", "--apply", "--config", path]);
    let told = format!("{}{}", stdout(&home), stderr(&home));
    assert_eq!(home.status.code(), Some(0), "seed {seed}: {told}");
    assert_eq!(waiting(), 0, "seed {seed}: {told}");
    stand.converge(table, size.good + size.poison).await;
    assert!(worker.stop().await.success(), "seed {seed}");
}
