//! The demo's workload: a live random mix of inserts, updates and deletes, and probes that
//! measure the lag from end to end.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::AttributeValue;
use rand::RngExt;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::dynamo::value::Item;
use crate::error::{Fault, Operation, classify};

/// Writers in parallel; each owns a part of the keys.
const WRITERS: u64 = 16;
/// Keys in all.
const KEYS: u64 = 4_000;
/// Probes under way at the same time.
const PROBES: u64 = 4;
const PROBE_EVERY: Duration = Duration::from_millis(150);
const PROBE_POLL: Duration = Duration::from_millis(5);

/// What the workload has done so far.
#[derive(Default)]
pub(super) struct Ledger {
    written: AtomicU64,
    lags_ms: Mutex<Vec<f64>>,
}

impl Ledger {
    /// Changes made to the source.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Lag by probe in milliseconds: median, 99th percentile and number of probes. `None` before
    /// the first.
    pub(super) fn lag_ms(&self) -> Option<(f64, f64, usize)> {
        let mut lags = self
            .lags_ms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        lags.sort_by(f64::total_cmp);
        let at = |share: f64| lags.get(((lags.len() as f64 - 1.0) * share).round() as usize);
        Some((*at(0.5)?, *at(0.99)?, lags.len()))
    }
}

/// The table the workload writes to and the one it probes.
#[derive(Clone)]
pub(super) struct Pair {
    pub(super) source: Client,
    pub(super) target: Client,
    pub(super) table: String,
}

/// Writes at `rate` changes a second until `stop`. Returns once nothing is under way any more.
///
/// # Errors
/// The fault of the first write that failed.
pub(super) async fn write(
    pair: &Pair,
    ledger: &Arc<Ledger>,
    rate: u32,
    seed: u64,
    stop: &CancellationToken,
) -> Result<(), Fault> {
    let mut tasks: JoinSet<Result<(), Fault>> = JoinSet::new();
    for n in 0..WRITERS {
        let writer = Writer {
            pair: pair.clone(),
            ledger: Arc::clone(ledger),
            number: n,
            live: vec![false; (KEYS / WRITERS) as usize],
            random: StdRng::seed_from_u64(seed.wrapping_add(n)),
        };
        let every = Duration::from_secs_f64(WRITERS as f64 / f64::from(rate.max(1)));
        tasks.spawn(writer.run(every, stop.clone()));
    }
    for n in 0..PROBES {
        tasks.spawn(probe(pair.clone(), Arc::clone(ledger), n, stop.clone()));
    }
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let failed = match ended {
            Ok(ended) => ended,
            Err(error) => Err(Fault::own(
                Operation::Scan,
                crate::error::Class::Unknown,
                "a writer died",
                error.to_string(),
            )),
        };
        if failed.is_err() && result.is_ok() {
            stop.cancel();
            result = failed;
        }
    }
    result
}

struct Writer {
    pair: Pair,
    ledger: Arc<Ledger>,
    number: u64,
    /// Which of its keys exist.
    live: Vec<bool>,
    random: StdRng,
}

impl Writer {
    async fn run(mut self, every: Duration, stop: CancellationToken) -> Result<(), Fault> {
        let mut ticks = tokio::time::interval(every);
        // A late write is made up for, so that the rate holds over the whole run.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                _ = ticks.tick() => {}
            }
            self.change_one().await?;
            self.ledger.written.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn change_one(&mut self) -> Result<(), Fault> {
        let slot = self.random.random_range(0..self.live.len());
        let id = format!("item-{:05}", slot as u64 * WRITERS + self.number);
        let roll = self.random.random_range(0..100);
        let (client, table) = (&self.pair.source, &self.pair.table);
        let key = AttributeValue::S(id.clone());
        if self.live[slot] && roll < 20 {
            self.live[slot] = false;
            let answer = client
                .delete_item()
                .table_name(table)
                .key("id", key)
                .send()
                .await;
            return answer
                .map(|_| ())
                .map_err(|e| classify(Operation::Write, &e));
        }
        if self.live[slot] && roll < 60 {
            let answer = client
                .update_item()
                .table_name(table)
                .key("id", key)
                .update_expression("SET revision = revision + :one, note = :note")
                .expression_attribute_values(":one", AttributeValue::N("1".to_owned()))
                .expression_attribute_values(":note", AttributeValue::S(text(&mut self.random, 40)))
                .send()
                .await;
            return answer
                .map(|_| ())
                .map_err(|e| classify(Operation::Write, &e));
        }
        self.live[slot] = true;
        let item = random_item(&mut self.random, &id);
        let answer = client
            .put_item()
            .table_name(table)
            .set_item(Some(item))
            .send()
            .await;
        answer
            .map(|_| ())
            .map_err(|e| classify(Operation::Write, &e))
    }
}

/// Changes an item of its own and looks in the replica until the change is there. What the stream
/// says of time is whole seconds; this is not.
async fn probe(
    pair: Pair,
    ledger: Arc<Ledger>,
    number: u64,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let key = AttributeValue::S(format!("probe-{number}"));
    for round in 0u64.. {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(PROBE_EVERY) => {}
        }
        let value = AttributeValue::N(round.to_string());
        let sent = Instant::now();
        pair.source
            .put_item()
            .table_name(&pair.table)
            .item("id", key.clone())
            .item("round", value.clone())
            .send()
            .await
            .map_err(|error| classify(Operation::Write, &error))?;
        ledger.written.fetch_add(1, Ordering::Relaxed);
        loop {
            let answer = pair
                .target
                .get_item()
                .table_name(&pair.table)
                .key("id", key.clone())
                .consistent_read(true)
                .send()
                .await
                .map_err(|error| classify(Operation::Scan, &error))?;
            if answer.item.and_then(|item| item.get("round").cloned()) == Some(value.clone()) {
                let lag_ms = sent.elapsed().as_secs_f64() * 1_000.0;
                ledger
                    .lags_ms
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(lag_ms);
                break;
            }
            if stop.is_cancelled() {
                return Ok(());
            }
            tokio::time::sleep(PROBE_POLL).await;
        }
    }
    Ok(())
}

/// An item of one of many shapes: every type, nested, empty, and now and then large.
fn random_item(random: &mut StdRng, id: &str) -> Item {
    let mut item = Item::from([
        ("id".to_owned(), AttributeValue::S(id.to_owned())),
        ("revision".to_owned(), AttributeValue::N("0".to_owned())),
    ]);
    for n in 0..random.random_range(1..8) {
        item.insert(format!("a{n}"), random_value(random, 3));
    }
    if random.random_ratio(1, 200) {
        let bytes = random.random_range(5_000..60_000);
        item.insert("large".to_owned(), AttributeValue::S(text(random, bytes)));
    }
    item
}

fn random_value(random: &mut StdRng, depth: u32) -> AttributeValue {
    let kinds = if depth == 0 { 8 } else { 10 };
    match random.random_range(0..kinds) {
        0 => {
            let length = random.random_range(0..60);
            AttributeValue::S(text(random, length))
        }
        1 => AttributeValue::N(format!(
            "{}.{}",
            random.random::<i32>(),
            random.random_range(1..9)
        )),
        2 => {
            let length = random.random_range(0..60);
            AttributeValue::B(Blob::new(
                (0..length).map(|_| random.random()).collect::<Vec<u8>>(),
            ))
        }
        3 => AttributeValue::Bool(random.random()),
        4 => AttributeValue::Null(true),
        5 => AttributeValue::Ss(vec![text(random, 8), text(random, 9)]),
        6 => AttributeValue::Ns(vec![random.random::<u16>().to_string(), "-1.5".to_owned()]),
        7 => AttributeValue::Bs(vec![Blob::new([random.random::<u8>()])]),
        8 => {
            let length = random.random_range(0..4);
            AttributeValue::L(
                (0..length)
                    .map(|_| random_value(random, depth - 1))
                    .collect(),
            )
        }
        _ => {
            let length = random.random_range(0..4);
            let entries = (0..length).map(|n| (format!("m{n}"), random_value(random, depth - 1)));
            AttributeValue::M(entries.collect())
        }
    }
}

fn text(random: &mut StdRng, length: usize) -> String {
    const LETTERS: [char; 16] = [
        'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', ' ', '0', 'ä', '漢', '"', '\\', '\n', 'Z',
    ];
    (0..length)
        .map(|_| LETTERS[random.random_range(0..LETTERS.len())])
        .collect()
}
