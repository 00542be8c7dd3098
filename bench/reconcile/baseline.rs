//! The two comparers that farshore is measured against, as a careful script would have them: several
//! segments at once, eventually consistent scans, no more in memory than their idea needs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{
    AttributeValue, ConsumedCapacity, KeysAndAttributes, ReturnConsumedCapacity,
};
use futures::stream::{StreamExt, TryStreamExt};
use tokio::task::JoinSet;

use crate::Error;
use crate::data::{Answer, Item, KEY, TABLE};

/// Parts of a table that are read at once, as in farshore.
const SEGMENTS: i32 = 4;
/// Keys of one BatchGetItem; DynamoDB takes no more.
const GET_KEYS_MAX: usize = 100;
/// BatchGetItem calls at once for the keys of one page.
const GETS_AT_ONCE: usize = 4;
/// How often the rest of a batch is read again.
const ATTEMPTS: u32 = 10;

/// What is read of an item.
#[derive(Clone, Copy)]
enum Wanted {
    All,
    /// Cheaper to move about, and not to read: units are for whole items.
    Key,
}

#[derive(Default)]
struct Counts {
    scanned: u64,
    units: f64,
}

/// One table, and what was read of it.
#[derive(Clone)]
struct Side {
    client: Client,
    counts: Arc<Mutex<Counts>>,
}

/// How the items of one side compare with the other.
#[derive(Default)]
struct Found {
    absent: u64,
    changed: u64,
}

/// Looks every item of the source up in the target, and every key of the target in the source.
pub async fn scan_and_get(source: &str, target: &str) -> Result<Answer, Error> {
    let (source, target) = (Side::new(source), Side::new(target));
    let forth = look_up(&source, &target, Wanted::All).await?;
    // What both have was compared on the way forth.
    let back = look_up(&target, &source, Wanted::Key).await?;
    Ok(Answer {
        missing: forth.absent,
        changed: forth.changed,
        extra: back.absent,
        ..counted(&source, &target)
    })
}

/// Reads both tables into memory, and compares them there.
pub async fn load_both(source: &str, target: &str) -> Result<Answer, Error> {
    let (source, target) = (Side::new(source), Side::new(target));
    let (from, mut to) = tokio::try_join!(load(&source), load(&target))?;
    let mut answer = counted(&source, &target);
    for (id, item) in from {
        match to.remove(&id) {
            None => answer.missing += 1,
            Some(other) => answer.changed += u64::from(!is_same(item, other)),
        }
    }
    answer.extra = to.len() as u64;
    Ok(answer)
}

fn counted(source: &Side, target: &Side) -> Answer {
    let (source, target) = (source.counts(), target.counts());
    Answer {
        source_items: source.scanned,
        target_items: target.scanned,
        source_units: source.units,
        target_units: target.units,
        ..Answer::default()
    }
}

async fn look_up(from: &Side, to: &Side, wanted: Wanted) -> Result<Found, Error> {
    let mut segments = JoinSet::new();
    for segment in 0..SEGMENTS {
        let (from, to) = (from.clone(), to.clone());
        segments.spawn(async move { look_up_segment(&from, &to, segment, wanted).await });
    }
    let mut all = Found::default();
    while let Some(found) = segments.join_next().await {
        all.add(found??);
    }
    Ok(all)
}

async fn look_up_segment(
    from: &Side,
    to: &Side,
    segment: i32,
    wanted: Wanted,
) -> Result<Found, Error> {
    let mut all = Found::default();
    let mut after = None;
    loop {
        let (items, next) = from.scan(segment, after, wanted).await?;
        let found: Vec<Found> = futures::stream::iter(in_batches(items))
            .map(|batch| look_up_batch(to, batch, wanted))
            .buffer_unordered(GETS_AT_ONCE)
            .try_collect()
            .await?;
        found.into_iter().for_each(|found| all.add(found));
        after = next;
        if after.is_none() {
            return Ok(all);
        }
    }
}

fn in_batches(items: Vec<Item>) -> Vec<Vec<Item>> {
    let mut items = items.into_iter().peekable();
    let mut batches = Vec::new();
    while items.peek().is_some() {
        batches.push(items.by_ref().take(GET_KEYS_MAX).collect());
    }
    batches
}

async fn look_up_batch(to: &Side, batch: Vec<Item>, wanted: Wanted) -> Result<Found, Error> {
    let mut others = to.get(&batch, wanted).await?;
    let mut found = Found::default();
    for item in batch {
        match others.remove(id_of(&item)?) {
            None => found.absent += 1,
            Some(other) => found.changed += u64::from(!is_same(item, other)),
        }
    }
    Ok(found)
}

async fn load(side: &Side) -> Result<HashMap<String, Item>, Error> {
    let loaded = Arc::new(Mutex::new(HashMap::new()));
    let mut segments = JoinSet::new();
    for segment in 0..SEGMENTS {
        let (side, loaded) = (side.clone(), Arc::clone(&loaded));
        segments.spawn(async move {
            let mut after = None;
            loop {
                let (items, next) = side.scan(segment, after, Wanted::All).await?;
                let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
                for item in items {
                    loaded.insert(id_of(&item)?.to_owned(), item);
                }
                after = next;
                if after.is_none() {
                    return Ok::<(), Error>(());
                }
            }
        });
    }
    while let Some(done) = segments.join_next().await {
        done??;
    }
    let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut loaded))
}

impl Found {
    fn add(&mut self, other: Found) {
        self.absent += other.absent;
        self.changed += other.changed;
    }
}

impl Side {
    fn new(url: &str) -> Self {
        Self {
            client: crate::client(url),
            counts: Arc::default(),
        }
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A page of a segment, and where the next one begins.
    async fn scan(
        &self,
        segment: i32,
        after: Option<Item>,
        wanted: Wanted,
    ) -> Result<(Vec<Item>, Option<Item>), Error> {
        let answer = self
            .client
            .scan()
            .table_name(TABLE)
            .segment(segment)
            .total_segments(SEGMENTS)
            .set_exclusive_start_key(after)
            .set_projection_expression(wanted.projection())
            .return_consumed_capacity(ReturnConsumedCapacity::Total)
            .send()
            .await?;
        let items = answer.items.unwrap_or_default();
        let mut counts = self.counts();
        counts.scanned += items.len() as u64;
        counts.units += answer.consumed_capacity.as_ref().map_or(0.0, units);
        Ok((
            items,
            answer.last_evaluated_key.filter(|key| !key.is_empty()),
        ))
    }

    /// The items under the keys of `batch`, by their ids.
    async fn get(&self, batch: &[Item], wanted: Wanted) -> Result<HashMap<String, Item>, Error> {
        let mut found = HashMap::with_capacity(batch.len());
        let mut left = Vec::with_capacity(batch.len());
        for item in batch {
            let id = AttributeValue::S(id_of(item)?.to_owned());
            left.push(Item::from([(KEY.to_owned(), id)]));
        }
        for _ in 0..ATTEMPTS {
            let request = KeysAndAttributes::builder()
                .set_keys(Some(left))
                .consistent_read(true)
                .set_projection_expression(wanted.projection())
                .build()?;
            let answer = self
                .client
                .batch_get_item()
                .request_items(TABLE, request)
                .return_consumed_capacity(ReturnConsumedCapacity::Total)
                .send()
                .await?;
            self.counts().units += answer.consumed_capacity().iter().map(units).sum::<f64>();
            let responses = answer.responses.unwrap_or_default();
            for item in responses.into_values().flatten() {
                found.insert(id_of(&item)?.to_owned(), item);
            }
            let unprocessed = answer.unprocessed_keys.unwrap_or_default();
            left = unprocessed.into_values().flat_map(|u| u.keys).collect();
            if left.is_empty() {
                return Ok(found);
            }
        }
        Err("the embedded server does not answer for all keys".into())
    }
}

impl Wanted {
    fn projection(self) -> Option<String> {
        match self {
            Wanted::All => None,
            Wanted::Key => Some(KEY.to_owned()),
        }
    }
}

fn units(consumed: &ConsumedCapacity) -> f64 {
    consumed.capacity_units.unwrap_or_default()
}

fn id_of(item: &Item) -> Result<&String, Error> {
    let id = item.get(KEY).and_then(|id| id.as_s().ok());
    id.ok_or_else(|| "an item without its key".into())
}

/// Whether two items are equal; sets come in any order.
fn is_same(mut one: Item, mut other: Item) -> bool {
    one.values_mut().for_each(sort_sets);
    other.values_mut().for_each(sort_sets);
    one == other
}

fn sort_sets(value: &mut AttributeValue) {
    match value {
        AttributeValue::Ss(set) | AttributeValue::Ns(set) => set.sort_unstable(),
        AttributeValue::M(map) => map.values_mut().for_each(sort_sets),
        AttributeValue::L(list) => list.iter_mut().for_each(sort_sets),
        _ => {}
    }
}
