//! What the stream cannot tell any more: the region's own version of every key that differs in the active region.

use std::time::{Duration, Instant};

use super::capture::Stranding;
use super::store::Write;
use crate::backoff::Backoff;
use crate::dynamo::RegionClients;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::{BATCH_KEYS_MAX, Got, batch_get, scan_page};
use crate::dynamo::table::{describe, primary_key, ttl_attribute};
use crate::dynamo::value::{Item, same_item};
use crate::error::{Class, Fault, Operation, Policy};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a call is made again while its failure may pass by itself.
const ATTEMPTS_MAX: u32 = 20;

/// Paces reading: no more than so many units a second, over time.
struct Pace {
    units_per_second: f64,
    begun: Instant,
    used: f64,
}

impl Pace {
    async fn used(&mut self, units: f64) {
        self.used += units;
        let due = Duration::from_secs_f64((self.used / self.units_per_second).min(1e6));
        if let Some(left) = due.checked_sub(self.begun.elapsed()) {
            tokio::time::sleep(left).await;
        }
    }
}

/// Compares both tables from end to end, and takes in what `here` holds of every key that differs.
pub(super) async fn compare(stranding: &mut Stranding<'_>) -> Result<(), Fault> {
    let (here, active) = (stranding.here, stranding.active);
    let (ours, theirs) = (
        stranding.table.name_in(&here.label).to_owned(),
        stranding.table.name_in(&active.label).to_owned(),
    );
    let described = describe(&here.tables, &ours).await?;
    let key: Vec<String> = described
        .map(|table| {
            primary_key(&table)
                .into_iter()
                .map(|part| part.name)
                .collect()
        })
        .unwrap_or_default();
    let units_per_second = f64::from(stranding.config.reconcile.read_units_per_second);
    let mut pace = Pace {
        // 0 is no limit.
        units_per_second: match units_per_second > 0.0 {
            true => units_per_second,
            false => f64::INFINITY,
        },
        begun: Instant::now(),
        used: 0.0,
    };
    let mut walk = Walk::new((here, &ours), (active, &theirs), &key);
    while let Some(pairs) = walk.next(&mut pace).await? {
        for (keys, own, other) in pairs {
            if !same_item(&own, &other.unwrap_or_default()) {
                put(stranding, (here, &ours), keys, &mut pace).await?;
            }
        }
    }
    let ttl = ttl_attribute(&here.tables, &ours).await?;
    let now_s = here.clock.now_ms() / 1_000;
    // What is there only: deleted here, unless time to live did it, or made there.
    let mut walk = Walk::new((active, &theirs), (here, &ours), &key);
    while let Some(pairs) = walk.next(&mut pace).await? {
        for (keys, other, own) in pairs {
            if own.is_none() && !has_expired(&other, ttl.as_deref(), now_s) {
                put(stranding, (here, &ours), keys, &mut pace).await?;
            }
        }
    }
    Ok(())
}

/// Takes in what `here` holds under `keys`, read once more and consistently: a scan may show what was there a moment
/// before the stream told of the next write, and must not replace that.
async fn put(
    stranding: &Stranding<'_>,
    here: (&RegionClients, &str),
    keys: Item,
    pace: &mut Pace,
) -> Result<(), Fault> {
    let held = read_all(here, vec![keys.clone()], pace).await?;
    let write = Write {
        keys: &keys,
        image: held.first(),
        at_ms: stranding.here.clock.now_ms(),
        writes: 1,
    };
    let place = (stranding.epoch.unwrap_or(0), stranding.table.name.as_str());
    stranding.store.put_found(place, &write).await
}

fn has_expired(item: &Item, ttl: Option<&str>, now_s: i64) -> bool {
    let expires = ttl.and_then(|name| item.get(name)?.as_n().ok()?.parse::<f64>().ok());
    expires.is_some_and(|at| at <= now_s as f64)
}

/// Reads `one` from end to end, with what `other` holds of the same keys.
struct Walk<'a> {
    one: (&'a RegionClients, &'a str),
    other: (&'a RegionClients, &'a str),
    key: &'a [String],
    items: std::vec::IntoIter<Item>,
    after: Option<Item>,
    ended: bool,
}

impl<'a> Walk<'a> {
    fn new(
        one: (&'a RegionClients, &'a str),
        other: (&'a RegionClients, &'a str),
        key: &'a [String],
    ) -> Self {
        Self {
            one,
            other,
            key,
            items: Vec::new().into_iter(),
            after: None,
            ended: false,
        }
    }

    /// Some more keys, what the one holds of them and what the other does. `None` after the last.
    async fn next(
        &mut self,
        pace: &mut Pace,
    ) -> Result<Option<Vec<(Item, Item, Option<Item>)>>, Fault> {
        while self.items.len() == 0 {
            if self.ended {
                return Ok(None);
            }
            let (client, name) = (&self.one.0.tables, self.one.1);
            let page =
                patiently(|| scan_page((client, name), (0, 1), self.after.clone(), None)).await?;
            pace.used(page.units).await;
            self.ended = page.next.is_none();
            self.after = page.next;
            self.items = page.items.into_iter();
        }
        let items: Vec<Item> = self.items.by_ref().take(BATCH_KEYS_MAX).collect();
        let keys: Vec<Item> = items.iter().map(|item| keys_of(item, self.key)).collect();
        let mut held = read_all(self.other, keys.clone(), pace).await?;
        let pairs = keys.into_iter().zip(items).map(|(keys, item)| {
            let id = ItemKey::new(&keys);
            let place = held.iter().position(|item| ItemKey::of(item, &keys) == id);
            let there = place.map(|place| held.swap_remove(place));
            (keys, item, there)
        });
        Ok(Some(pairs.collect()))
    }
}

fn keys_of(item: &Item, key: &[String]) -> Item {
    let parts = key.iter();
    parts
        .filter_map(|name| Some((name.clone(), item.get(name)?.clone())))
        .collect()
}

async fn read_all(
    table: (&RegionClients, &str),
    keys: Vec<Item>,
    pace: &mut Pace,
) -> Result<Vec<Item>, Fault> {
    let (mut items, mut left) = (Vec::new(), keys);
    while !left.is_empty() {
        let got = patiently(|| read_some(table, &left)).await?;
        pace.used(got.units).await;
        items.extend(got.items);
        left = got.left;
    }
    Ok(items)
}

async fn read_some(table: (&RegionClients, &str), keys: &[Item]) -> Result<Got, Fault> {
    let got = batch_get(Operation::ReadReplica, (&table.0.tables, table.1), keys).await?;
    if got.left.len() < keys.len() {
        return Ok(got);
    }
    Err(Fault::own(
        Operation::ReadReplica,
        Class::Throttled,
        "UnprocessedKeys",
        "the service returned all keys unprocessed",
    ))
}

/// Makes a call again while its failure may pass by itself.
pub(super) async fn patiently<T, F: Future<Output = Result<T, Fault>>>(
    mut call: impl FnMut() -> F,
) -> Result<T, Fault> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut attempts = 0;
    loop {
        attempts += 1;
        match call().await {
            Err(fault) if fault.policy() == Policy::Retry && attempts < ATTEMPTS_MAX => {
                tokio::time::sleep(backoff.pause()).await;
            }
            answer => return answer,
        }
    }
}

/// As [`patiently`], for a call that changes something.
pub(super) async fn patiently_mut<T>(
    mut call: impl AsyncFnMut() -> Result<T, Fault>,
) -> Result<T, Fault> {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut attempts = 0;
    loop {
        attempts += 1;
        match call().await {
            Err(fault) if fault.policy() == Policy::Retry && attempts < ATTEMPTS_MAX => {
                tokio::time::sleep(backoff.pause()).await;
            }
            answer => return answer,
        }
    }
}
