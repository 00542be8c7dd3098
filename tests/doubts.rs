//! Writes that take effect late (tenet 7): put in doubt, and repaired when they no longer can.

mod common;
mod suite;

use std::sync::Arc;
use std::time::Duration;

use common::binary::Worker;
use common::stand::{SOURCE, Stand, client, delete, put, s, state_rows};
use common::{eventually, long};
use farshore::dynamo::transmit::{Bound, Left, http_client, within};
use farshore::embedded::gateway::{Call, Fault, Options};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rustix::process::Signal;

/// Rows of the state table that are doubts.
async fn doubts(stand: &Stand) -> usize {
    let rows = state_rows(&stand.target, &stand.state_table()).await;
    rows.iter()
        .filter(|row| row["entityType"] == s("doubt"))
        .count()
}

async fn until_settled(stand: &Stand) {
    let settled = async || doubts(stand).await == 0;
    eventually("every doubt is settled", Duration::from_secs(40), settled).await;
}

/// Writes held back beyond the client's patience and delivered after newer ones: every item is
/// right once the doubts are settled, and until then they show.
async fn held_back_writes_are_repaired(seed: u64) {
    let stand = Stand::gateways(Options::new(seed), Options::new(seed)).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    let held = stand.gateways[1].inject(
        Fault::hold(Duration::from_secs(4))
            .on("BatchWriteItem")
            .chance(0.1),
    );
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..10 {
        suite::random_changes(&stand, &table, &mut random, 60, 30).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(held.hits() > 0, "seed {seed}: nothing was held back");
    held.off();
    let shown = async || doubts(&stand).await > 0;
    eventually("a doubt is stored", Duration::from_secs(10), shown).await;
    until_settled(&stand).await;
    stand.converge(&table, 1).await;
    assert_eq!(stand.dead_letters(), Vec::<serde_json::Value>::new());
    assert!(worker.metric("farshore_doubts_repaired_total").await > 0.0);
    assert!(worker.stop().await.success(), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_held_back_and_delivered_late_are_repaired() {
    let seeds = 1..=long(10, 3);
    futures::future::join_all(seeds.map(held_back_writes_are_repaired)).await;
}

/// A right to write that is good for ever, or over.
struct Fixed(Duration);

impl Bound for Fixed {
    fn remaining(&self) -> Duration {
        self.0
    }
}

/// Between the decision to write and the moment it leaves, the lease may end: then it does not leave.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_is_refused_at_transmit_once_its_lease_is_over() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = client(&stand.source_url, SOURCE).config().to_builder();
    let client = aws_sdk_dynamodb::Client::from_conf(config.http_client(http_client()).build());
    let write = async |remaining: Duration| {
        let call = client
            .put_item()
            .table_name(&table)
            .item("id", s("a"))
            .send();
        let bound: Arc<dyn Bound> = Arc::new(Fixed(remaining));
        let (answer, left) = within(bound, Duration::from_secs(10), call).await;
        (answer.is_some_and(|answer| answer.is_ok()), left)
    };
    let arrived = || stand.gateways[0].calls_of("PutItem").len();
    assert_eq!(write(Duration::ZERO).await, (false, Left::No));
    assert_eq!(arrived(), 0, "a write without a lease reached the region");
    assert_eq!(write(Duration::from_secs(9)).await, (true, Left::Yes));
    assert_eq!(arrived(), 1);
}

/// Two workers' configurations for one stand, its table provisioned, and the first one running.
async fn first_of_two(
    stand: &Stand,
    table: &str,
    environment: &[(&str, &str)],
) -> (Worker, std::path::PathBuf) {
    stand.create_source(table).await;
    // What is written while the first one starts is the stream's to bring, and no copy's.
    let table = format!("name = \"{table}\"\nbootstrap = false");
    let first = stand.config(&[&table], "");
    let second = stand.config(&[&table], "");
    common::binary::provision(&first);
    (Worker::start_with(&first, environment), second)
}

/// Writes of a key that reached the replica's region.
fn writes_of(stand: &Stand, id: &str) -> Vec<Call> {
    let key = format!(r#"{{"id":{{"S":"{id}"}}}}"#);
    stand.gateways[1].calls_where(|call| {
        call.operation == "BatchWriteItem" && call.keys.iter().any(|other| other.json == key)
    })
}

/// A worker that stopped in its second write, of the value 2 to `b`, and the one after it.
async fn stopped_in_a_write(failpoint: &str) -> (Stand, String, Worker, Worker) {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let stopping = [("FARSHORE_TEST_FAILPOINT", failpoint)];
    let (first, config) = first_of_two(&stand, &table, &stopping).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    put(&stand.source, &table, "b", 2).await;
    let stopped = async || first.is_stopped();
    eventually("it stops", Duration::from_secs(15), stopped).await;
    let second = Worker::following(&config).await;
    (stand, table, first, second)
}

/// Stopped just before its second write leaves and continued after another worker has taken the
/// shard, it does not send that write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_stopped_before_transmit_never_leaves_once_the_lease_has_passed_on() {
    let (stand, table, first, second) = stopped_in_a_write("BatchWriteItem@2").await;
    stand.converge(&table, 2).await;
    put(&stand.source, &table, "b", 3).await;
    stand.converge(&table, 2).await;
    let before = writes_of(&stand, "b").len();
    first.signal(Signal::CONT);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(writes_of(&stand, "b").len(), before, "the old write left");
    assert!(first.logged("stood still") > 0, "the pause was not noticed");
    until_settled(&stand).await;
    stand.converge(&table, 2).await;
    assert!(first.stop().await.success() && second.stop().await.success());
}

/// Stopped after the last check, its write may leave late: whatever it does to the item is repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_stopped_after_the_last_check_is_repaired_by_the_next_owner() {
    let (stand, table, first, second) = stopped_in_a_write("BatchWriteItem@2!").await;
    put(&stand.source, &table, "b", 3).await;
    stand.converge(&table, 2).await;
    first.signal(Signal::CONT);
    let shown = async || doubts(&stand).await > 0;
    eventually("the take puts it in doubt", Duration::from_secs(10), shown).await;
    until_settled(&stand).await;
    stand.converge(&table, 2).await;
    assert!(first.stop().await.success() && second.stop().await.success());
}

/// A worker was killed with the value 2 of `a` on its way; its successor wrote 3, and then the 2 took
/// effect. The successor, and its configuration.
async fn undone_by_a_dead_owners_write() -> (Stand, String, Worker, std::path::PathBuf) {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (first, config) = first_of_two(&stand, &table, &[]).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    stand.gateways[1].inject(Fault::hold_until_delivered().on("BatchWriteItem").once());
    put(&stand.source, &table, "a", 2).await;
    assert!(
        stand.gateways[1]
            .wait_for_held(1, Duration::from_secs(10))
            .await
    );
    first.kill();
    let second = Worker::following(&config).await;
    put(&stand.source, &table, "a", 3).await;
    stand.converge(&table, 1).await;
    let held = stand.gateways[1].held();
    stand.gateways[1].deliver(held[0].call).await.unwrap();
    assert_eq!(
        stand.differences(&table).await.len(),
        1,
        "the late write did nothing"
    );
    (stand, table, second, config)
}

/// Killed with a write on its way: the next owner puts what was not checkpointed in doubt, and
/// repairs it although the write arrived after its own, newer one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_owners_late_write_is_repaired_by_the_next_owner() {
    let (stand, table, second, _) = undone_by_a_dead_owners_write().await;
    until_settled(&stand).await;
    assert_eq!(stand.differences(&table).await, Vec::<String>::new());
    assert!(second.metric("farshore_repair_writes_total").await >= 1.0);
    assert!(second.stop().await.success());
}

/// The replica took the newest value, a late write put an older one over it, and the replica takes
/// the newest no longer: nobody else would ever tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_repair_cannot_write_is_a_dead_letter() {
    let (stand, table, second, config) = undone_by_a_dead_owners_write().await;
    let refused = Fault::code(400, "ValidationException", "Type mismatch for Index Key");
    let refused = stand.gateways[1].inject(refused.on("BatchWriteItem").key("\"a\""));
    // As long as the letter finds no place, the doubt stays.
    let aside = stand.letters().with_extension("aside");
    std::fs::rename(stand.letters(), &aside).unwrap();
    std::fs::write(stand.letters(), "in the way").unwrap();
    let told = async || {
        let (status, body) = second.get("/readyz").await.unwrap();
        status == 503 && body.contains("outage-dead-letters")
    };
    eventually("readiness tells why", Duration::from_secs(40), told).await;
    assert!(doubts(&stand).await > 0, "the doubt went before its letter");
    std::fs::remove_file(stand.letters()).unwrap();
    std::fs::rename(&aside, stand.letters()).unwrap();
    until_settled(&stand).await;
    let letters = stand.dead_letters();
    assert_eq!(letters.len(), 1, "{letters:?}");
    let letter = &letters[0];
    assert_eq!(letter["keys"], serde_json::json!({ "id": { "S": "a" } }));
    assert_eq!(letter["event"], "MODIFY");
    assert_eq!(letter["oldImage"]["v"]["N"], "2");
    assert_eq!(letter["newImage"]["v"]["N"], "3");
    assert_eq!(letter["error"]["class"], "validation");
    assert!(letter.get("sequenceNumber").is_none(), "{letter}");
    assert_eq!(second.metric("farshore_dead_letters_total").await, 1.0);
    refused.off();
    let redrive = ["redrive", "--apply", "--config", config.to_str().unwrap()];
    let output = common::binary::run(&redrive);
    assert!(output.status.success(), "{output:?}");
    stand.converge(&table, 1).await;
    assert!(second.stop().await.success());
}

/// Beside a repair nothing is applied that its refusals could be measured by: they are no flood, and
/// close no tap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_repairs_are_no_flood() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (first, config) = first_of_two(&stand, &table, &[]).await;
    let ids: Vec<String> = (0..120).map(|id| format!("k{id}")).collect();
    let held = stand.gateways[1].inject(Fault::hold_until_delivered().on("BatchWriteItem"));
    for id in &ids {
        put(&stand.source, &table, id, 1).await;
    }
    // None is answered, so that the next owner has all of them in doubt.
    let waits = stand.gateways[1].wait_for_held(1, Duration::from_secs(10));
    assert!(waits.await);
    first.kill();
    held.off();
    let second = Worker::following(&config).await;
    // Once this one is there all others were applied again.
    put(&stand.source, &table, "last", 1).await;
    stand.converge(&table, 121).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // What late writes may do, and a replica that no longer takes what it took.
    let refused = Fault::code(400, "ValidationException", "Type mismatch for Index Key");
    stand.gateways[1].inject(refused.on("BatchWriteItem").key("\"k"));
    for id in &ids {
        delete(&stand.target, &table, id).await;
    }
    until_settled(&stand).await;
    assert_eq!(stand.dead_letters().len(), 120);
    let (status, body) = second.get("/readyz").await.unwrap();
    assert!(!body.contains("paused"), "{status} {body}");
    put(&stand.source, &table, "after", 1).await;
    let flows = async || stand.differences(&table).await.len() == 120;
    eventually("it flows on", Duration::from_secs(10), flows).await;
    assert!(second.stop().await.success());
}

/// A repair that dies in the middle is finished by the next worker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_whose_process_died_is_finished_by_the_next() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (first, config) = first_of_two(&stand, &table, &[]).await;
    for id in 0..60 {
        put(&stand.source, &table, &format!("k{id}"), id).await;
    }
    stand.converge(&table, 60).await;
    first.kill();
    let second = Worker::following(&config).await;
    let slow = stand.gateways[1].inject(Fault::delay(Duration::from_secs(3)).on("BatchGetItem"));
    let claimed = async || {
        let rows = state_rows(&stand.target, &stand.state_table()).await;
        rows.iter()
            .any(|row| row["entityType"] == s("doubt") && row.contains_key("leaseOwner"))
    };
    eventually(
        "the doubt is being repaired",
        Duration::from_secs(20),
        claimed,
    )
    .await;
    second.kill();
    slow.off();
    let third = Worker::following(&config).await;
    until_settled(&stand).await;
    stand.converge(&table, 60).await;
    assert!(third.stop().await.success());
}

/// A worker that cannot renew stops by itself: no write leaves after its lease's end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_renew_stops_by_itself() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (_config, worker) = suite::replicated(&stand, &table, "").await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    let state = stand.state_table();
    stand.gateways[1].inject(Fault::access_denied().on("PutItem").table(&state));
    // The lease of a second, and a little for a write that was on its way.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    put(&stand.source, &table, "b", 2).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(writes_of(&stand, "b").len(), 0, "it wrote without a lease");
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert!(status == 503 && body.contains("outage-state"), "{body}");
    stand.gateways[1].clear_faults();
    stand.converge(&table, 2).await;
    assert!(worker.stop().await.success());
}

/// A batch that takes longer than the claim of its repair is good for, because few units are to be
/// spent in a second: the claim is renewed meanwhile, and the repair comes to its end at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_slower_than_its_claim_comes_to_its_end() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (first, _) = first_of_two(&stand, &table, &[]).await;
    let config = stand.config(&[&table], "[writes]\nunits_per_second = 10\n");
    // The late writes come before the repair begins, however slowly all is applied.
    let text =
        common::stand::text_of(&config).replace("late_effect = \"5s\"", "late_effect = \"8s\"");
    std::fs::write(&config, text).unwrap();
    stand.gateways[1].inject(Fault::hold_until_delivered().on("BatchWriteItem"));
    let write_all = async |value: u64| {
        for id in 0..20 {
            put(&stand.source, &table, &format!("k{id}"), value).await;
        }
    };
    write_all(1).await;
    assert!(
        stand.gateways[1]
            .wait_for_held(1, Duration::from_secs(10))
            .await
    );
    first.kill();
    stand.gateways[1].clear_faults();
    let second = Worker::following(&config).await;
    write_all(2).await;
    stand.converge(&table, 20).await;
    for held in stand.gateways[1].held() {
        stand.gateways[1].deliver(held.call).await.unwrap();
    }
    let late = stand.differences(&table).await.len();
    assert!(late >= 10, "late writes changed {late} items of 20");
    until_settled(&stand).await;
    stand.converge(&table, 20).await;
    let written = second.metric("farshore_repair_writes_total").await;
    assert!(
        written <= 20.0,
        "{written} writes for {late} items: it began again"
    );
    assert!(second.stop().await.success());
}

/// A repair whose reads fail for ever does not wait unseen: the outage shows, and ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_that_fails_again_and_again_shows() {
    let stand = Stand::gateways(Options::new(1), Options::new(1)).await;
    let table = stand.table("orders");
    let (first, config) = first_of_two(&stand, &table, &[]).await;
    put(&stand.source, &table, "a", 1).await;
    stand.converge(&table, 1).await;
    first.kill();
    let second = Worker::following(&config).await;
    let failing = stand.gateways[1].inject(Fault::error_before().on("BatchGetItem"));
    put(&stand.source, &table, "a", 2).await;
    let shown = async || {
        let (status, body) = second.get("/readyz").await.unwrap();
        status == 503 && body.contains("outage-replica") && body.contains("BatchGetItem")
    };
    eventually("the outage shows", Duration::from_secs(60), shown).await;
    failing.off();
    until_settled(&stand).await;
    let over = async || !second.get("/readyz").await.unwrap().1.contains("outage");
    eventually("it is over", Duration::from_secs(15), over).await;
    assert!(second.stop().await.success());
}
