//! Lays what is stranded beside what the active region holds, and beside its ledger.
//!
//! ```text
//!   every stranded write ─▶ what the active region holds now ─▶ T ─▶ the ledger is read to T ─▶ judged
//! ```
//!
//! *Why in this order*: a key that the ledger lacks when it has been read beyond the moment at which its item was read
//! was not written between the fence and that moment, so that item is of before the fence.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};

use aws_sdk_dynamodb::types::AttributeValue;

use super::super::tail::Tail;
use super::follow::{SETTLE_MS, since};
use super::judge::Since;
use super::judge::{Class, ConflictPolicy, Fate, classify, fate};
use super::keeper::{key_of, load};
use super::ledger::Ledger;
use super::store::{Decided, Stranded};
use super::{Ended, Home, Policies, compare};
use crate::config::Table;
use crate::dynamo::RegionClients;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::{BATCH_KEYS_MAX, batch_get};
use crate::dynamo::value::{Item, compare_numbers, item_bytes, same_item};
use crate::error::{Class as FaultClass, Fault, Operation};
use crate::jobs::failover::Watcher;
use crate::lease::row::print_of;
use crate::mutation::{self, Mutation};

/// What is known of a stranded write without its image.
#[derive(Debug, Clone)]
pub struct Known {
    /// The key of its row.
    pub row: String,
    /// The key attributes.
    pub keys: Item,
    /// The version of its row.
    pub version: String,
    /// Stands for what the active region held.
    pub held: String,
    /// Whether that is the same.
    pub same: bool,
    /// How the attribute that tells the newer compares: the stranded one's with the active one's.
    pub ages: Option<Ordering>,
    /// Whether the region in which it is stranded still holds it: time to live may have deleted it since, or it is
    /// not the last write of its key after all.
    pub is_there: bool,
    /// Whether that region holds nothing under the key.
    pub is_gone: bool,
    /// When that was read, by the active region's clock in milliseconds.
    pub read_ms: i64,
    /// Write units that it would cost.
    pub units: u32,
}

/// A stranded write that is judged.
#[derive(Debug, Clone)]
pub struct Judged {
    /// The write.
    pub known: Known,
    /// How it stands to what the active region held.
    pub class: Class,
    /// What becomes of it.
    pub fate: Fate,
}

/// What is stranded in a table, in numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Keys about which nothing was decided before.
    pub stranded: u64,
    /// Keys about which something was.
    pub decided: BTreeMap<Decided, u64>,
    /// By how they stand to the active region's.
    pub classes: BTreeMap<Class, u64>,
    /// By what becomes of them.
    pub fates: BTreeMap<Fate, u64>,
}

impl Counts {
    /// Takes note of one.
    pub fn add(&mut self, class: Class, fate: Fate) {
        self.stranded += 1;
        *self.classes.entry(class).or_default() += 1;
        *self.fates.entry(fate).or_default() += 1;
    }

    /// How many are of this class.
    pub fn class(&self, class: Class) -> u64 {
        self.classes.get(&class).copied().unwrap_or_default()
    }

    /// Of how many this becomes.
    pub fn fate(&self, fate: Fate) -> u64 {
        self.fates.get(&fate).copied().unwrap_or_default()
    }

    /// How many were decided like this before.
    pub fn decided(&self, decided: Decided) -> u64 {
        self.decided.get(&decided).copied().unwrap_or_default()
    }
}

/// The ledger of a table, read on by this process.
pub struct Reading {
    ledger: Ledger,
    tail: Option<Tail>,
    /// Why it does not tell everything; absent where it does.
    pub lacks: Option<String>,
}

impl Reading {
    /// How many keys it holds.
    pub fn keys(&self) -> usize {
        self.ledger.len()
    }

    /// Whether the key was written in the active region since the fence.
    pub(super) fn since(&self, keys: &Item) -> Since {
        if mutation::is_off(Mutation::Ledger) {
            return Since::Untouched;
        }
        self.ledger.since(Digest::of_key(&ItemKey::new(keys)))
    }
}

impl Home<'_> {
    /// Opens the ledger of `table`.
    ///
    /// # Errors
    /// The active region could not be asked.
    pub async fn open_ledger(&self, table: &Table) -> Result<Reading, Ended> {
        let row = self.ledger_row(&table.name).await?;
        let place = (self.record.epoch, table.name.as_str());
        let ledger = load(&self.store, place, row.as_ref()).await;
        let mut ledger = match ledger {
            // Nobody made its table: nobody kept it.
            Err(fault) if fault.class == FaultClass::NotFound => Ledger::new(0),
            ledger => ledger.map_err(|fault| {
                self.could_not("The ledger could not be read", self.active, &fault)
            })?,
        };
        let late = self.ledger_is_late();
        let capture = self.capture(&table.name).await?;
        let is_blind = capture.is_some_and(|capture| capture.blind);
        let is_unread = row
            .as_ref()
            .is_some_and(|row| row.is_unread(self.active.clock.now_ms()));
        let lacks = match (&row, late) {
            _ if is_blind => Some(format!(
                "no flow from {} into {} is known in that epoch: what is held there need not be an earlier version",
                self.back.label, self.active.label
            )),
            _ if is_unread => {
                Some("nobody read the stream for almost as long as it remembers".to_owned())
            }
            (None, _) => Some(format!(
                "no worker in {} kept one: start `farshore run` there before the next failover",
                self.active.label
            )),
            (Some(_), Some(late)) => Some(late),
            (Some(row), None) => row.lacks.clone(),
        };
        if lacks.is_some() {
            ledger.lost();
        }
        // What lacks something already need not be read on: what it holds is changed, and all else is unknown.
        let row = row.filter(|_| lacks.is_none());
        let since_ms = self.record.begun_ms().map_or(0, since);
        let tail = row.map(|row| {
            let mut tail = Tail::new(self.active, row.stream_arn.clone(), since_ms);
            tail.go_on_from(&row.places());
            tail
        });
        Ok(Reading {
            ledger,
            tail,
            lacks,
        })
    }

    /// Reads the ledger on until all that was written until `until_ms` is in it.
    pub(super) async fn catch_up(&self, reading: &mut Reading, until_ms: i64) -> Result<(), Ended> {
        let until_ms = until_ms + SETTLE_MS;
        let Some(tail) = &mut reading.tail else {
            return Ok(());
        };
        loop {
            let mut records = VecDeque::new();
            let passed = compare::patiently_mut(async || tail.round(until_ms, &mut records).await);
            let passed = tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                passed = passed => passed,
            };
            for record in &records {
                match key_of(record) {
                    Some(key) => reading.ledger.note(key),
                    None => reading.ledger.lost(),
                }
            }
            let is_over = match &passed {
                Err(fault) => fault.class == FaultClass::NotFound,
                Ok(passed) => !passed && tail.has_ended(),
            };
            if is_over {
                reading.ledger.lost();
                let why = "its stream was turned off, or made anew";
                reading.lacks.get_or_insert_with(|| why.to_owned());
                reading.tail = None;
                return Ok(());
            }
            let passed = passed.map_err(|fault| {
                self.could_not("The stream could not be read", self.active, &fault)
            })?;
            if tail.take_lost() {
                reading.ledger.lost();
                let why = "its stream had forgotten records by then";
                reading.lacks.get_or_insert_with(|| why.to_owned());
            }
            if passed {
                return Ok(());
            }
            if records.is_empty() {
                self.pause().await?;
            }
        }
    }

    /// What the active region holds of these keys, one for each.
    ///
    /// # Errors
    /// It could not be asked.
    pub(super) async fn held(
        &self,
        table: &Table,
        keys: &[Item],
    ) -> Result<Vec<Option<Item>>, Ended> {
        self.held_in(self.active, table, keys).await
    }

    /// What `region` holds of these keys, one for each.
    pub(super) async fn held_in(
        &self,
        region: &RegionClients,
        table: &Table,
        keys: &[Item],
    ) -> Result<Vec<Option<Item>>, Ended> {
        let name = table.name_in(&region.label);
        let mut found: BTreeMap<usize, Item> = BTreeMap::new();
        let places: BTreeMap<ItemKey, usize> = keys
            .iter()
            .enumerate()
            .map(|(place, keys)| (ItemKey::new(keys), place))
            .collect();
        let mut left = keys.to_vec();
        while !left.is_empty() {
            let client = (&region.tables, name);
            let got = compare::patiently(|| read_some(client, &left)).await;
            let got = got.map_err(|fault| {
                self.could_not("The stranded keys could not be read", region, &fault)
            })?;
            for item in got.items {
                if let Some(place) = keys.first().map(|names| ItemKey::of(&item, names))
                    && let Some(place) = places.get(&place)
                {
                    found.insert(*place, item);
                }
            }
            left = got.left;
        }
        Ok((0..keys.len()).map(|place| found.remove(&place)).collect())
    }

    /// Judges everything stranded in `table` about which nothing was decided.
    ///
    /// # Errors
    /// A region could not be asked, or it was asked to stop.
    pub async fn judge(
        &self,
        table: &Table,
        reading: &mut Reading,
        policies: &Policies,
        counts: &mut Counts,
        watcher: &mut dyn Watcher,
    ) -> Result<Vec<Judged>, Ended> {
        let mut known = Vec::new();
        let mut after = None;
        *counts = Counts::default();
        loop {
            let place = self.place(&table.name);
            let page = compare::patiently(|| self.store_back.page(place, after.clone())).await;
            let page = page.map_err(|fault| {
                self.could_not("What is stranded could not be read", self.back, &fault)
            })?;
            let mut open = Vec::new();
            for one in page.rows {
                match one.decided {
                    Some(decided) => *counts.decided.entry(decided).or_default() += 1,
                    None => open.push(one),
                }
            }
            for some in open.chunks(BATCH_KEYS_MAX) {
                let keys: Vec<Item> = some.iter().map(|one| one.keys.clone()).collect();
                let read_ms = self.active.clock.now_ms();
                let held = self.held(table, &keys).await?;
                let there = self.held_in(self.back, table, &keys).await?;
                let pairs = some.iter().zip(held).zip(there);
                known.extend(pairs.map(|((one, held), there)| {
                    let both = (held.as_ref(), there.as_ref());
                    Known::of(one, both, policies, read_ms)
                }));
            }
            watcher.under_way(&format!(
                "judging what is stranded in {}: {} key(s)",
                self.back.label,
                known.len()
            ));
            if self.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        // Every item was read before this.
        self.catch_up(reading, self.active.clock.now_ms()).await?;
        let judged = known.into_iter().map(|known| {
            let since = match known.is_there {
                true => reading.since(&known.keys),
                false => Since::Unknown,
            };
            // Something newer may be there that no stream tells any more: that is not the same.
            let same = known.same && (known.is_there || known.is_gone);
            let class = classify(Some(&()), Some(&()), since, |(), ()| same);
            let ages = known.ages;
            let fate = fate(class, policies.stranded, &policies.conflicts, |_| ages);
            counts.add(class, fate);
            Judged { known, class, fate }
        });
        Ok(judged.collect())
    }
}

impl Known {
    fn of(
        one: &Stranded,
        (held, there): (Option<&Item>, Option<&Item>),
        policies: &Policies,
        read_ms: i64,
    ) -> Self {
        let same = is_same(one.image.as_ref(), held);
        let ages = match (&policies.conflicts, &one.image, held) {
            (ConflictPolicy::Newest(attribute), Some(one), Some(held)) => {
                compared(one.get(attribute), held.get(attribute))
            }
            _ => None,
        };
        Self {
            row: one.row.clone(),
            keys: one.keys.clone(),
            version: one.version.clone(),
            held: print_of(held),
            same,
            ages,
            is_there: is_same(one.image.as_ref(), there),
            is_gone: there.is_none(),
            read_ms,
            units: units(held, one.image.as_ref()),
        }
    }
}

/// Whether both are the same item, or none.
pub(super) fn is_same(one: Option<&Item>, other: Option<&Item>) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(one), Some(other)) => same_item(one, other),
        _ => false,
    }
}

/// Write units, by the larger of both.
fn units(held: Option<&Item>, wanted: Option<&Item>) -> u32 {
    let bytes = |item: Option<&Item>| item.map_or(0, item_bytes);
    let kilobytes = bytes(held).max(bytes(wanted)).div_ceil(1_024).max(1);
    u32::try_from(kilobytes).unwrap_or(u32::MAX)
}

/// Which of two values is greater, where both are numbers or both are strings.
fn compared(one: Option<&AttributeValue>, other: Option<&AttributeValue>) -> Option<Ordering> {
    match (one?, other?) {
        (AttributeValue::N(one), AttributeValue::N(other)) => compare_numbers(one, other),
        (AttributeValue::S(one), AttributeValue::S(other)) => Some(one.cmp(other)),
        _ => None,
    }
}

async fn read_some(
    table: (&aws_sdk_dynamodb::Client, &str),
    keys: &[Item],
) -> Result<crate::dynamo::read::Got, Fault> {
    let got = batch_get(Operation::ReadReplica, table, keys).await?;
    if got.left.len() < keys.len() {
        return Ok(got);
    }
    Err(Fault::own(
        Operation::ReadReplica,
        FaultClass::Throttled,
        "UnprocessedKeys",
        "the service returned all keys unprocessed",
    ))
}
