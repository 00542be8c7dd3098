//! Dead letters in SQS: the queue is made as it has to be, and takes what no replica takes.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_sqs::types::{MessageSystemAttributeName as SystemName, QueueAttributeName as Name};
use serde_json::Value;

use super::{Received, check_against_schema, config_with_queue, receive, sqs};
use crate::common::binary::{Worker, provision, run, stderr, stdout};
use crate::common::ministack::{Ministack, Ministacks};
use crate::common::stand::{Stand, n, s};
use crate::common::{eventually, long, seed};
use crate::suite::faults::{checkpoint, picky_replica, picky_table, put_kind};
use crate::suite::poison::{Place, Size, poison_among_good};
use farshore::embedded::gateway::Options;

pub async fn a_standard_queue_is_provisioned_once(peers: &Ministacks) {
    a_queue_is_provisioned_once(peers, "letters").await;
}

pub async fn a_fifo_queue_is_provisioned_once(peers: &Ministacks) {
    a_queue_is_provisioned_once(peers, "letters.fifo").await;
}

/// 14 days, encrypted, invisible for 300 s once received; and never a second time.
async fn a_queue_is_provisioned_once(peers: &Ministacks, name: &str) {
    let stand = peers.stand();
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), name);
    let path = config.to_str().unwrap();
    let client = sqs(peers);
    let plan = run(&["provision", "--config", path]);
    assert_eq!(plan.status.code(), Some(1), "{}", stderr(&plan));
    assert!(
        stdout(&plan).contains(&format!("create queue {name}")),
        "{}",
        stdout(&plan)
    );
    let queues = client.list_queues().send().await.unwrap();
    assert!(queues.queue_urls().is_empty(), "the plan made a queue");
    let applied = run(&["provision", "--apply", "--config", path]);
    assert_eq!(applied.status.code(), Some(0), "{}", stderr(&applied));
    let url = Ministack::queue_url(&peers.target.url(), name);
    let queues = client.list_queues().send().await.unwrap();
    assert_eq!(queues.queue_urls(), std::slice::from_ref(&url));
    let attributes = async || {
        let answer = client.get_queue_attributes().queue_url(&url);
        let answer = answer.attribute_names(Name::All).send().await.unwrap();
        answer.attributes.unwrap()
    };
    let held = attributes().await;
    let is = |name: Name| held.get(&name).map(String::as_str);
    assert_eq!(is(Name::MessageRetentionPeriod), Some("1209600"));
    assert_eq!(is(Name::VisibilityTimeout), Some("300"));
    assert_eq!(is(Name::SqsManagedSseEnabled), Some("true"));
    let fifo = name.ends_with(".fifo").then_some("true");
    assert_eq!(is(Name::FifoQueue), fifo);
    let again = run(&["provision", "--apply", "--config", path]);
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    assert!(
        stdout(&again).contains("Done: 0 created"),
        "{}",
        stdout(&again)
    );
    assert_eq!(attributes().await, held);
    // Nor does it touch a queue that a person made otherwise.
    let other = client.set_queue_attributes().queue_url(&url);
    let other = other.attributes(Name::VisibilityTimeout, "45");
    other.send().await.unwrap();
    provision(&config);
    assert_eq!(attributes().await[&Name::VisibilityTimeout], "45");
}

/// What a person, or a filter on the queue, reads from the letter of an INSERT of `key`.
fn assert_letter(letter: &Received, stand: &Stand, table: &str, key: &str) {
    let body = &letter.body;
    assert_eq!(body["version"], 1);
    assert_eq!(body["group"], stand.group());
    assert_eq!(body["epoch"], 1);
    assert_eq!(body["table"], table);
    for (side, region) in [("source", "us-east-1"), ("target", "us-west-2")] {
        assert_eq!(body[side]["region"], region);
        assert_eq!(body[side]["table"], table);
    }
    let arn = body["streamArn"].as_str().unwrap();
    assert!(arn.contains(&format!("table/{table}/stream/")), "{arn}");
    assert!(body["shardId"].as_str().unwrap().starts_with("shardId-"));
    let sequence = body["sequenceNumber"].as_str().unwrap();
    assert!(sequence.bytes().all(|byte| byte.is_ascii_digit()));
    assert_eq!(body["event"], "INSERT");
    assert_eq!(body["keys"], serde_json::json!({"id": {"S": key}}));
    assert_eq!(body["newImage"]["kind"]["N"], "7");
    assert!(body.get("oldImage").is_none(), "an INSERT has no old image");
    assert!(body.get("omitted").is_none(), "nothing was left out");
    assert_eq!(body["error"]["class"], "validation");
    assert_eq!(body["error"]["code"], "ValidationException");
    assert!(body["error"]["message"].as_str().unwrap().contains("kind"));
    assert_eq!(body["attempts"], 3);
    for time in ["createdAt", "failedAt"] {
        let time = body[time].as_str().unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    }
    let group = stand.group();
    let expected = [
        ("class", "validation"),
        ("code", "ValidationException"),
        ("event", "INSERT"),
        ("group", group.as_str()),
        ("table", table),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(letter.attributes, expected.into());
}

pub async fn poison_goes_to_a_standard_queue(peers: &Ministacks) {
    poison_goes_to_the_queue(peers, "letters").await;
}

pub async fn poison_goes_to_a_fifo_queue(peers: &Ministacks) {
    poison_goes_to_the_queue(peers, "letters.fifo").await;
}

/// Three poisonous records among 30: each is one message that says all about it, their neighbours
/// are applied, and the checkpoint passes them.
async fn poison_goes_to_the_queue(peers: &Ministacks, name: &str) {
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), name);
    provision(&config);
    let worker = Worker::following(&config).await;
    for id in 0..30 {
        put_kind(&stand, &table, &format!("k{id}"), id % 10 == 3).await;
    }
    let mut letters = receive(&sqs(peers), peers, name, 3).await;
    check_against_schema(&letters);
    letters.sort_by_key(|letter| letter.body["keys"].to_string());
    for (letter, key) in letters.iter().zip(["k13", "k23", "k3"]) {
        assert_letter(letter, &stand, &table, key);
    }
    let applied = async || stand.differences(&table).await.len() == 3;
    eventually("the neighbours arrive", Duration::from_secs(20), applied).await;
    let last = letters[1].body["sequenceNumber"].as_str().unwrap();
    let passed = async || checkpoint(&stand).await.as_str() > last;
    eventually("the checkpoint passes", Duration::from_secs(10), passed).await;
    assert_eq!(worker.metric("farshore_dead_letters_total").await, 3.0);
    let (status, body) = worker.get("/readyz").await.unwrap();
    assert_eq!(status, 200, "{body}");
    assert!(worker.stop().await.success());
}

/// SQS refuses the characters that XML has none of; an item may hold them, and they come back.
pub async fn odd_characters_survive_the_queue(peers: &Ministacks) {
    const ODD: &str =
        "\0\u{1}\u{b}\u{1f}\u{7f}\u{fffd}\u{fffe}\u{ffff}\u{10ffff}\r\n\t\"\\\\uffff ä 漢 🙂";
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), "letters");
    provision(&config);
    let worker = Worker::following(&config).await;
    let put = stand.source.put_item().table_name(&table);
    let put = put.item("id", s(ODD)).item("kind", n(7)).item(ODD, s(ODD));
    put.send().await.unwrap();
    let letter = receive(&sqs(peers), peers, "letters", 1).await.remove(0);
    assert_eq!(letter.body["keys"]["id"]["S"], ODD);
    assert_eq!(letter.body["newImage"][ODD]["S"], ODD);
    assert!(worker.stop().await.success());
}

/// With `endpoint_url` the queue's URL is only its name: its host is never asked for.
pub async fn sqs_is_reached_at_its_endpoint_url_where_it_has_one(peers: &Ministacks) {
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let config = config_with_queue(&stand, &[&table], "http://queue.invalid", "letters");
    let mut text = std::fs::read_to_string(&config).unwrap();
    text.push_str(&format!("endpoint_url = \"{}\"\n", peers.target.url()));
    std::fs::write(&config, text).unwrap();
    provision(&config);
    let worker = Worker::following(&config).await;
    put_kind(&stand, &table, "poison", true).await;
    let letters = receive(&sqs(peers), peers, "letters", 1).await;
    assert_letter(&letters[0], &stand, &table, "poison");
    assert!(worker.stop().await.success());
}

/// A FIFO queue drops a second message with the deduplication id of a first: letters of different
/// tables must never share one, though their shards and positions may look alike.
pub async fn poison_of_two_tables_meets_in_one_fifo_queue(peers: &Ministacks) {
    let stand = peers.stand();
    let tables = [stand.table("first"), stand.table("second")];
    for table in &tables {
        picky_replica(&stand, table).await;
    }
    let names = tables.each_ref().map(String::as_str);
    let config = config_with_queue(&stand, &names, &peers.target.url(), "letters.fifo");
    provision(&config);
    let worker = Worker::following(&config).await;
    for table in &tables {
        put_kind(&stand, table, "poison", true).await;
        put_kind(&stand, table, "good", false).await;
    }
    let letters = receive(&sqs(peers), peers, "letters.fifo", 2).await;
    for table in &tables {
        let of_table = letters
            .iter()
            .find(|letter| letter.body["table"] == **table);
        assert_letter(of_table.unwrap(), &stand, table, "poison");
    }
    assert!(worker.stop().await.success());
}

/// Two groups may copy one source table and share a queue: the same record is then two letters.
pub async fn poison_of_two_groups_meets_in_one_fifo_queue(peers: &Ministacks) {
    let stand = peers.stand();
    let (table, copy) = (stand.table("orders"), stand.table("copy"));
    picky_replica(&stand, &table).await;
    picky_table(&stand, &copy).await;
    let origin = peers.target.url();
    let first = config_with_queue(&stand, &[&table], &origin, "letters.fifo");
    let renamed = format!("name = \"{table}\"\nnames = {{ us-west-2 = \"{copy}\" }}");
    let second = config_with_queue(&stand, &[&renamed], &origin, "letters.fifo");
    let other = format!("other-{}", stand.group());
    let text = std::fs::read_to_string(&second).unwrap();
    std::fs::write(&second, text.replace(&stand.group(), &other)).unwrap();
    provision(&first);
    provision(&second);
    let workers = [
        Worker::following(&first).await,
        Worker::following(&second).await,
    ];
    put_kind(&stand, &table, "poison", true).await;
    let letters = receive(&sqs(peers), peers, "letters.fifo", 2).await;
    let mut groups: Vec<_> = letters
        .iter()
        .map(|letter| letter.attributes["group"].clone())
        .collect();
    groups.sort();
    assert_eq!(groups, [stand.group(), other]);
    for worker in workers {
        assert!(worker.stop().await.success());
    }
}

/// While the queue cannot be reached the checkpoint waits before the poison, readiness says why,
/// other keys go on, and afterwards nothing is lost, not even over a restart in the outage.
pub async fn an_outage_of_the_queue_holds_the_checkpoint(peers: &Ministacks) {
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let proxy = stand.proxy(&peers.target.url()).await;
    let config = config_with_queue(&stand, &[&table], &proxy.url(), "letters");
    provision(&config);
    let worker = Worker::following(&config).await;
    put_kind(&stand, &table, "first", false).await;
    stand.converge(&table, 1).await;
    let moved = async || !checkpoint(&stand).await.is_empty();
    eventually("the first checkpoint", Duration::from_secs(5), moved).await;
    // Checkpoints come every 100 ms: the one of the first item has been stored by then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = checkpoint(&stand).await;
    proxy.cut();
    for id in 0..20 {
        put_kind(&stand, &table, &format!("k{id}"), id % 10 == 3).await;
    }
    let applied = async || stand.differences(&table).await.len() == 2;
    eventually("other keys go on", Duration::from_secs(20), applied).await;
    let red = async || {
        let (status, body) = worker.get("/readyz").await.unwrap();
        status == 503 && body.contains("outage-dead-letters")
    };
    eventually("readiness tells why", Duration::from_secs(20), red).await;
    assert_eq!(worker.get("/livez").await.unwrap().0, 200);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let held = checkpoint(&stand).await;
    assert!(held >= before);
    // It is killed, and the next one starts over before the poison.
    worker.kill();
    proxy.heal();
    let worker = Worker::following(&config).await;
    let letters = receive(&sqs(peers), peers, "letters", 2).await;
    let first = letters
        .iter()
        .map(|letter| letter.body["sequenceNumber"].as_str().unwrap());
    assert!(
        held.as_str() < first.min().unwrap(),
        "the checkpoint passed an undelivered dead letter"
    );
    let green = async || worker.get("/readyz").await.unwrap().0 == 200;
    eventually("readiness turns green", Duration::from_secs(20), green).await;
    for id in [3, 13] {
        put_kind(&stand, &table, &format!("k{id}"), false).await;
    }
    stand.converge(&table, 21).await;
    // And a second outage is waited out by one and the same worker.
    proxy.cut();
    put_kind(&stand, &table, "late", true).await;
    eventually("readiness tells why", Duration::from_secs(20), async || {
        let (_, body) = worker.get("/readyz").await.unwrap();
        body.contains("outage-dead-letters")
    })
    .await;
    proxy.heal();
    let letters = receive(&sqs(peers), peers, "letters", 1).await;
    assert_letter(&letters[0], &stand, &table, "late");
    eventually("readiness turns green", Duration::from_secs(20), green).await;
    assert_eq!(worker.logged("outage ends"), 1);
    assert!(worker.stop().await.success());
}

/// Letters in the queue, received ones included, as the queue counts them.
async fn in_queue(peers: &Ministacks, name: &str) -> u64 {
    let url = Ministack::queue_url(&peers.target.url(), name);
    let asked = sqs(peers).get_queue_attributes().queue_url(&url);
    let answer = asked.attribute_names(Name::All).send().await.unwrap();
    let all = answer.attributes.unwrap();
    let count = |name: Name| {
        all.get(&name)
            .map_or(0, |text| text.parse::<u64>().unwrap())
    };
    count(Name::ApproximateNumberOfMessages) + count(Name::ApproximateNumberOfMessagesNotVisible)
}

pub async fn a_redrive_empties_a_standard_queue(peers: &Ministacks) {
    a_redrive_empties_the_queue(peers, "letters").await;
}

pub async fn a_redrive_empties_a_fifo_queue(peers: &Ministacks) {
    a_redrive_empties_the_queue(peers, "letters.fifo").await;
}

/// Looking consumes nothing; letters that are refused again stay with their new reason; once the
/// cause is mended, two redrives beside each other and the worker empty the queue.
async fn a_redrive_empties_the_queue(peers: &Ministacks, name: &str) {
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), name);
    provision(&config);
    let path = config.to_str().unwrap().to_owned();
    let worker = Worker::following(&config).await;
    for id in 0..60 {
        put_kind(&stand, &table, &format!("k{id}"), id % 3 == 0).await;
    }
    let lettered = async || in_queue(peers, name).await == 20;
    eventually("the letters", Duration::from_secs(30), lettered).await;
    let asked = |arguments: &[&str]| {
        let output = run(&[arguments, &["--json", "--config", &path]].concat());
        let answer = serde_json::from_str(&stdout(&output)).unwrap_or_default();
        let answer: serde_json::Value = answer;
        (output.status.code(), answer, stderr(&output))
    };
    for _ in 0..2 {
        let (code, found, told) = asked(&["dead-letters"]);
        assert_eq!(code, Some(1), "{told}");
        assert_eq!(found["lookedAt"], 20, "{found}");
        assert_eq!(found["groups"][0]["letters"], 20, "{found}");
        assert!(found["oldestSecondsLeft"].as_u64().unwrap() > 1_209_000);
    }
    let (code, again, told) = asked(&["redrive", "--apply"]);
    assert_eq!(code, Some(1), "{told}");
    assert_eq!(again["left"][0]["letters"], 20, "{again}");
    assert_eq!(in_queue(peers, name).await, 20);
    let mend = stand.target.delete_table().table_name(&table);
    mend.send().await.unwrap();
    provision(&config);
    let beside = std::thread::spawn({
        let path = path.clone();
        move || run(&["redrive", "--apply", "--json", "--config", &path])
    });
    let (_, first, told) = asked(&["redrive", "--apply"]);
    let second = beside.join().unwrap();
    let second: serde_json::Value = serde_json::from_str(&stdout(&second)).unwrap();
    let home = |report: &serde_json::Value| report["home"][&table].as_u64().unwrap_or(0);
    assert_eq!(home(&first) + home(&second), 20, "{first} {second} {told}");
    assert_eq!(in_queue(peers, name).await, 0);
    // What was applied before the replica was made anew is for a copy to bring back.
    let found = stand.target.scan().table_name(&table).send().await.unwrap();
    assert_eq!(found.count, 20);
    assert!(worker.stop().await.success());
}

/// Before the queue forgets a letter, readiness says so; brought home, it is green again.
pub async fn an_alarm_comes_before_the_queue_forgets(peers: &Ministacks) {
    let stand = peers.stand();
    let table = stand.table("picky");
    picky_replica(&stand, &table).await;
    let client = sqs(peers);
    let short = client.create_queue().queue_name("letters");
    let short = short.attributes(Name::MessageRetentionPeriod, "60");
    short.send().await.unwrap();
    let config = config_with_queue(&stand, &[&table], &peers.target.url(), "letters");
    provision(&config);
    let worker = Worker::following(&config).await;
    put_kind(&stand, &table, "k", true).await;
    let counted = async || worker.metric("farshore_dead_letters_waiting").await == 1.0;
    eventually("it is counted", Duration::from_secs(20), counted).await;
    let left = worker
        .metric("farshore_dead_letters_oldest_time_left_seconds")
        .await;
    assert!((15.0..=60.0).contains(&left), "{left} s left");
    assert_eq!(worker.get("/readyz").await.unwrap().0, 200);
    let red = async || {
        let (status, body) = worker.get("/readyz").await.unwrap();
        status == 503 && body.contains("dead-letters-expire")
    };
    eventually("readiness warns", Duration::from_secs(60), red).await;
    put_kind(&stand, &table, "k", false).await;
    stand.converge(&table, 1).await;
    let path = config.to_str().unwrap();
    let home = run(&["redrive", "--apply", "--config", path]);
    assert_eq!(home.status.code(), Some(0), "{}", stderr(&home));
    let green = async || worker.get("/readyz").await.unwrap().0 == 200;
    eventually("readiness is green", Duration::from_secs(20), green).await;
    assert!(worker.stop().await.success());
}

pub async fn all_poison_comes_home_from_a_standard_queue(peers: &Ministacks) {
    all_poison_comes_home(peers, "letters").await;
}

pub async fn all_poison_comes_home_from_a_fifo_queue(peers: &Ministacks) {
    all_poison_comes_home(peers, "letters.fifo").await;
}

/// The tables lie behind gateways, which refuse what ministack would take; the queue is ministack's.
async fn all_poison_comes_home(peers: &Ministacks, name: &str) {
    let size = Size {
        good: long(50_000, 10_000) as usize,
        poison: long(2_000, 400) as usize,
        kills: long(10, 4) as usize,
    };
    let source = Options::new(seed()).shards(4);
    let stand = Stand::gateways(source, Options::new(1)).await;
    let table = stand.table("orders");
    stand.create_source(&table).await;
    let proxy = stand.proxy(&peers.target.url()).await;
    let config = config_with_queue(&stand, &[&table], &proxy.url(), name);
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text + "halt_after = 0\n").unwrap();
    provision(&config);
    let outage = async |begins: bool| match begins {
        true => proxy.cut(),
        false => proxy.heal(),
    };
    // What lies in a queue cannot be listed without taking it, but each letter knows when it was sent.
    let sent = async || first_sent(peers, name, size.poison).await;
    poison_among_good(&stand, &table, &config, size, outage, || None, sent).await;
}

/// When the first letter of each record was sent, by its place in the stream; all are given back. Of a
/// FIFO queue only the first letter of an item shows, which is the one that counts.
async fn first_sent(peers: &Ministacks, name: &str, records: usize) -> HashMap<Place, i64> {
    let (client, url) = (sqs(peers), Ministack::queue_url(&peers.target.url(), name));
    let mut found: HashMap<Place, i64> = HashMap::new();
    let mut handles = Vec::new();
    let mut empty = 0;
    // A queue may overlook some once.
    while empty < 3 {
        let call = client.receive_message().queue_url(&url);
        let call = call.max_number_of_messages(10).visibility_timeout(600);
        let call = call.message_system_attribute_names(SystemName::SentTimestamp);
        let messages = call.send().await.unwrap().messages.unwrap_or_default();
        empty = if messages.is_empty() { empty + 1 } else { 0 };
        for message in messages {
            let body: Value = serde_json::from_str(message.body().unwrap()).unwrap();
            let attributes = message.attributes.as_ref().unwrap();
            let sent: i64 = attributes[&SystemName::SentTimestamp].parse().unwrap();
            handles.push(message.receipt_handle.unwrap());
            let text = |name: &str| body[name].as_str().map(str::to_owned);
            // Letters of repairs come from no record.
            if let (Some(shard), Some(position)) = (text("shardId"), text("sequenceNumber")) {
                let first = found.entry((shard, position)).or_insert(sent);
                *first = sent.min(*first);
            }
        }
    }
    let letters = std::mem::take(&mut handles);
    let handles = letters.len();
    for handle in letters {
        let call = client.change_message_visibility().queue_url(&url);
        let call = call.receipt_handle(handle).visibility_timeout(0);
        call.send().await.unwrap();
    }
    // Behind a repair's letter of the same item a FIFO queue hides the record's.
    assert!(
        handles >= records && found.len() * 10 >= records * 9,
        "{} of {records} records, {handles} letters",
        found.len()
    );
    found
}
