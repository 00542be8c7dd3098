//! The table in which what the way home needs is kept: `<state table>-failback`, one in each region.
//!
//! ```text
//!   stranded#<epoch>#<table>#<digest of the key>              the last write of a key that never left
//!   part#<epoch>#<table>#<digest of the key>#<position>#<n>   a part of its image, where that is large
//!   ledger#<epoch>#<table>#<n>                                keys that the active region wrote since the fence
//! ```
//!
//! *Why a table of its own*: a queue forgets after 14 days, leaves large images out and cannot be read by key; a
//! directory is one host's; and the state table is read from end to end every few seconds, which a million
//! rows more would forbid. *Why not the table itself*, which holds the stranded items: its application may
//! still write, time to live may delete, and the way home writes over it.

use std::io::{Read as _, Write as _};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::AttributeValue;
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;

use super::judging::is_same;
use super::ledger::Page;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::json::{item_from_json, item_to_json};
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, Operation, classify};
use crate::stream::sequence::SequenceNumber;

/// Hash key of the table.
pub const KEY: &str = "item";
/// An item has at most 400 KB; the rest of a row takes little.
const PART_BYTES: usize = 350_000;
/// No item is larger as JSON, written out.
const IMAGE_BYTES_MAX: u64 = 16 << 20;
/// Digits of the longest sequence number.
const SEQUENCE_DIGITS: usize = 40;
const PARTS_MAX: usize = 64;
/// How often what a comparison has found is stored while somebody else stores the same key.
const FOUND_ATTEMPTS: u32 = 20;

/// What was decided about a stranded write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Decided {
    /// The active region holds the same.
    Equal,
    /// It was applied to the active region.
    Applied,
    /// It was reported, and the active region's value stands.
    Reported,
}

impl Decided {
    /// The name in rows and reports.
    pub const fn label(self) -> &'static str {
        match self {
            Decided::Equal => "equal",
            Decided::Applied => "applied",
            Decided::Reported => "reported",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let all = [Decided::Equal, Decided::Applied, Decided::Reported];
        all.into_iter().find(|one| one.label() == text)
    }
}

/// The last write of a key that never left its region.
#[derive(Debug, Clone, PartialEq)]
pub struct Stranded {
    /// The key of its row.
    pub row: String,
    /// The key attributes.
    pub keys: Item,
    /// What it left; `None` is a delete.
    pub image: Option<Item>,
    /// Its position, in full length. Empty where it was found by comparing.
    pub sequence: String,
    /// Another one whenever the row says something else: a comparison changes what it holds, and not its position.
    pub version: String,
    /// When it was made, by the region's clock, in milliseconds.
    pub at_ms: i64,
    /// How many writes of the key are stranded, about.
    pub writes: u64,
    /// What was decided about it.
    pub decided: Option<Decided>,
    /// When it was about to be written to the active region last, by that one's clock in milliseconds.
    pub sent_ms: Option<i64>,
    /// Parts of its image.
    pub parts: usize,
    /// What their keys are made of.
    pub parts_of: String,
}

/// A write to be stored.
pub struct Write<'a> {
    /// The key attributes.
    pub keys: &'a Item,
    /// What it left.
    pub image: Option<&'a Item>,
    /// When it was made, in milliseconds.
    pub at_ms: i64,
    /// How many writes of the key it stands for.
    pub writes: u64,
}

/// The table, of one region.
#[derive(Clone)]
pub struct Store {
    client: Client,
    name: String,
}

/// A page of a scan of what is stranded.
pub struct Stored {
    /// Rows of it.
    pub rows: Vec<Stranded>,
    /// Where the next one begins; `None` after the last.
    pub next: Option<Item>,
}

fn text(value: &str) -> AttributeValue {
    AttributeValue::S(value.to_owned())
}

fn number(value: impl ToString) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

fn unreadable(message: &str) -> Fault {
    Fault::own(
        Operation::State,
        Class::Unknown,
        crate::error::UNREADABLE_ROW,
        format!("a row of the failback table could not be read: {message}"),
    )
}

impl Stranded {
    /// The table in which it is stranded, by its name in the configuration.
    pub fn table(&self) -> &str {
        self.row.split('#').nth(2).unwrap_or_default()
    }
}

impl Store {
    /// The table `name` behind `client`.
    pub fn new(client: Client, name: String) -> Self {
        Self { client, name }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn exists(&self) -> Result<bool, Fault> {
        let asked = self
            .client
            .get_item()
            .table_name(&self.name)
            .key(KEY, text("?"))
            .send()
            .await;
        match asked.map_err(|error| classify(Operation::State, &error)) {
            Ok(_) => Ok(true),
            Err(fault) if fault.class == Class::NotFound => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    fn row_of(epoch: u64, table: &str, keys: &Item) -> String {
        let digest = Digest::of_key(&ItemKey::new(keys));
        format!("{}{digest}", stranded(epoch, table))
    }

    /// Takes a stranded write in that the stream told, unless a later one of its key is there. What was decided about an
    /// earlier one says nothing of it.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn put(
        &self,
        (epoch, table): (u64, &str),
        write: &Write<'_>,
        sequence: &SequenceNumber,
    ) -> Result<(), Fault> {
        let row = Self::row_of(epoch, table, write.keys);
        let digits = format!("{:0>SEQUENCE_DIGITS$}", sequence.as_str());
        let condition = "attribute_not_exists(#item) OR #sequence < :sequence";
        let sequence = (digits.as_str(), &digits);
        self.store(&row, write, sequence, (condition, None))
            .await
            .map(|_| ())
    }

    /// Takes in what the region holds of a key that differs in the active one, as a comparison has found it. Where the
    /// stream told of a write of the key, this is what has become of it since: its position stays, so that what the
    /// stream tells later counts, and nothing that it told before does.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn put_found(
        &self,
        (epoch, table): (u64, &str),
        write: &Write<'_>,
    ) -> Result<(), Fault> {
        let row = Self::row_of(epoch, table, write.keys);
        // Somebody who takes in what the stream tells may be faster.
        for _ in 0..FOUND_ATTEMPTS {
            let known = self.get(&row).await?;
            let nonce: u64 = rand::random();
            let Some(known) = known else {
                let parts_of = format!("found-{nonce:016x}");
                let condition = "attribute_not_exists(#item)";
                let stored = self.store(&row, write, ("", &parts_of), (condition, None));
                if stored.await? {
                    return Ok(());
                }
                continue;
            };
            if is_same(known.image.as_ref(), write.image) {
                return Ok(());
            }
            let parts_of = format!("{}-found-{nonce:016x}", known.sequence);
            let condition = ("#version = :known", Some(known.version.as_str()));
            let sequence = (known.sequence.as_str(), &parts_of);
            if self.store(&row, write, sequence, condition).await? {
                return Ok(());
            }
        }
        Err(Fault::own(
            Operation::State,
            Class::Condition,
            "a key changes all the time",
            "what was found by comparing could not be stored",
        ))
    }

    /// Stores a write with this position, its parts under `parts_of`. False where the condition does not hold.
    async fn store(
        &self,
        row: &str,
        write: &Write<'_>,
        (sequence, parts_of): (&str, &String),
        (condition, known): (&str, Option<&str>),
    ) -> Result<bool, Fault> {
        let packed = write.image.map(pack).transpose()?;
        let mut call = self
            .client
            .update_item()
            .table_name(&self.name)
            .key(KEY, text(row))
            .condition_expression(condition)
            .expression_attribute_names("#keys", "keys")
            .expression_attribute_names("#sequence", "sequence")
            .expression_attribute_names("#version", "version")
            .expression_attribute_values(
                ":version",
                text(&format!("{:016x}", rand::random::<u64>())),
            )
            .expression_attribute_values(":keys", AttributeValue::M(write.keys.clone()))
            .expression_attribute_values(":sequence", text(sequence))
            .expression_attribute_values(":at", number(write.at_ms))
            .expression_attribute_values(":writes", number(write.writes));
        if let Some(known) = known {
            call = call.expression_attribute_values(":known", text(known));
        }
        if condition.contains("#item") {
            call = call.expression_attribute_names("#item", KEY);
        }
        let (set, remove) = match packed {
            None => ("", ", image, parts, partsOf"),
            Some(packed) if packed.len() > PART_BYTES => {
                let parts: Vec<&[u8]> = packed.chunks(PART_BYTES).collect();
                for (place, part) in parts.iter().enumerate() {
                    self.client
                        .put_item()
                        .table_name(&self.name)
                        .item(KEY, text(&part_key(row, parts_of, place)))
                        .item("part", AttributeValue::B(Blob::new(*part)))
                        .send()
                        .await
                        .map_err(|error| classify(Operation::State, &error))?;
                }
                call = call
                    .expression_attribute_values(":parts", number(parts.len()))
                    .expression_attribute_values(":of", text(parts_of));
                (", parts = :parts, partsOf = :of", ", image")
            }
            Some(packed) => {
                let image = AttributeValue::B(Blob::new(packed));
                call = call.expression_attribute_values(":image", image);
                (", image = :image", ", parts, partsOf")
            }
        };
        let answer = call
            .update_expression(format!(
                "SET #keys = :keys, #sequence = :sequence, #version = :version, atMs = :at{set} REMOVE decided, sentMs{remove} ADD writes :writes"
            ))
            .send()
            .await;
        match answer.map_err(|error| classify(Operation::State, &error)) {
            Ok(_) => Ok(true),
            // A later one is there, or this one.
            Err(fault) if fault.class == Class::Condition => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// A page of what is stranded of `table`, in no order.
    ///
    /// # Errors
    /// The fault of the call, or a row that this version cannot read.
    pub async fn page(
        &self,
        (epoch, table): (u64, &str),
        after: Option<Item>,
    ) -> Result<Stored, Fault> {
        let (rows, next) = self.items(&stranded(epoch, table), after).await?;
        let mut read = Vec::with_capacity(rows.len());
        for item in rows {
            read.push(self.stranded_from(item).await?);
        }
        Ok(Stored { rows: read, next })
    }

    /// A page of what is stranded of any table and epoch, in no order.
    ///
    /// # Errors
    /// The fault of the call, or a row that this version cannot read.
    pub async fn any_page(&self, after: Option<Item>) -> Result<Stored, Fault> {
        let (rows, next) = self.items("stranded#", after).await?;
        let mut read = Vec::with_capacity(rows.len());
        for item in rows {
            read.push(self.stranded_from(item).await?);
        }
        Ok(Stored { rows: read, next })
    }

    async fn items(
        &self,
        prefix: &str,
        after: Option<Item>,
    ) -> Result<(Vec<Item>, Option<Item>), Fault> {
        let answer = self
            .client
            .scan()
            .table_name(&self.name)
            .consistent_read(true)
            .filter_expression("begins_with(#item, :prefix)")
            .expression_attribute_names("#item", KEY)
            .expression_attribute_values(":prefix", text(prefix))
            .set_exclusive_start_key(after)
            .send()
            .await
            .map_err(|error| classify(Operation::State, &error))?;
        let next = answer.last_evaluated_key.filter(|key| !key.is_empty());
        Ok((answer.items.unwrap_or_default(), next))
    }

    /// One row, by its key.
    ///
    /// # Errors
    /// As [`page`](Self::page).
    pub async fn get(&self, row: &str) -> Result<Option<Stranded>, Fault> {
        match self.item(row).await? {
            Some(item) => self.stranded_from(item).await.map(Some),
            None => Ok(None),
        }
    }

    async fn item(&self, row: &str) -> Result<Option<Item>, Fault> {
        let answer = self
            .client
            .get_item()
            .table_name(&self.name)
            .key(KEY, text(row))
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| classify(Operation::State, &error))?;
        Ok(answer.item)
    }

    async fn stranded_from(&self, item: Item) -> Result<Stranded, Fault> {
        let words = |name: &str| item.get(name).and_then(|value| value.as_s().ok());
        let figure = |name: &str| item.get(name).and_then(|value| value.as_n().ok());
        let row = words(KEY).ok_or_else(|| unreadable("it has no key"))?;
        let keys = item.get("keys").and_then(|value| value.as_m().ok());
        let keys = keys.ok_or_else(|| unreadable("it names no item"))?;
        let sequence = words("sequence").cloned().unwrap_or_default();
        let packed = match (item.get("image"), figure("parts")) {
            (Some(image), _) => {
                let image = image
                    .as_b()
                    .map_err(|_| unreadable("its image is no binary"))?;
                Some(image.as_ref().to_vec())
            }
            (None, Some(parts)) => {
                let parts: usize = parts.parse().unwrap_or(usize::MAX);
                let parts_of = words("partsOf").unwrap_or(&sequence);
                Some(self.parts(row, parts_of, parts).await?)
            }
            (None, None) => None,
        };
        Ok(Stranded {
            row: row.clone(),
            keys: keys.clone(),
            image: packed.map(|packed| unpack(&packed)).transpose()?,
            at_ms: figure("atMs").and_then(|ms| ms.parse().ok()).unwrap_or(0),
            writes: figure("writes").and_then(|n| n.parse().ok()).unwrap_or(1),
            version: words("version").cloned().unwrap_or_default(),
            decided: words("decided").and_then(|text| Decided::parse(text)),
            sent_ms: figure("sentMs").and_then(|ms| ms.parse().ok()),
            parts: figure("parts").and_then(|n| n.parse().ok()).unwrap_or(0),
            parts_of: words("partsOf").unwrap_or(&sequence).clone(),
            sequence,
        })
    }

    async fn parts(&self, row: &str, parts_of: &str, parts: usize) -> Result<Vec<u8>, Fault> {
        let mut packed = Vec::new();
        for place in 0..parts.min(PARTS_MAX) {
            let part = self.item(&part_key(row, parts_of, place)).await?;
            let part = part.and_then(|item| item.get("part")?.as_b().ok().cloned());
            let part = part.ok_or_else(|| unreadable("a part of its image is gone"))?;
            packed.extend_from_slice(part.as_ref());
        }
        Ok(packed)
    }

    /// Takes note that `one` is about to be written to the active region, unless a later write of its key has come in,
    /// or something was decided about it. Whether it was noted.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn note_sent(&self, one: &Stranded, now_ms: i64) -> Result<bool, Fault> {
        let answer = self
            .client
            .update_item()
            .table_name(&self.name)
            .key(KEY, text(&one.row))
            .update_expression("SET sentMs = :now")
            .condition_expression("#version = :version AND attribute_not_exists(decided)")
            .expression_attribute_names("#version", "version")
            .expression_attribute_values(":now", number(now_ms))
            .expression_attribute_values(":version", text(&one.version))
            .send()
            .await;
        match answer.map_err(|error| classify(Operation::State, &error)) {
            Ok(_) => Ok(true),
            Err(fault) if fault.class == Class::Condition => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Takes note of what was decided about `one`, unless a later write of its key has come in. Whether it was noted.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn decide(&self, one: &Stranded, decided: Decided) -> Result<bool, Fault> {
        let answer = self
            .client
            .update_item()
            .table_name(&self.name)
            .key(KEY, text(&one.row))
            .update_expression("SET decided = :decided")
            .condition_expression("#version = :version")
            .expression_attribute_names("#version", "version")
            .expression_attribute_values(":decided", text(decided.label()))
            .expression_attribute_values(":version", text(&one.version))
            .send()
            .await;
        match answer.map_err(|error| classify(Operation::State, &error)) {
            Ok(_) => Ok(true),
            Err(fault) if fault.class == Class::Condition => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Removes a row about which something was decided, with its parts; not where a later write has come in.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn remove(&self, one: &Stranded) -> Result<(), Fault> {
        let answer = self
            .client
            .delete_item()
            .table_name(&self.name)
            .key(KEY, text(&one.row))
            .condition_expression("attribute_exists(decided) AND #version = :version")
            .expression_attribute_names("#version", "version")
            .expression_attribute_values(":version", text(&one.version))
            .send()
            .await;
        match answer.map_err(|error| classify(Operation::State, &error)) {
            Ok(_) => {}
            Err(fault) if fault.class == Class::Condition => return Ok(()),
            Err(fault) => return Err(fault),
        }
        for place in 0..one.parts.min(PARTS_MAX) {
            self.client
                .delete_item()
                .table_name(&self.name)
                .key(KEY, text(&part_key(&one.row, &one.parts_of, place)))
                .send()
                .await
                .map_err(|error| classify(Operation::State, &error))?;
        }
        Ok(())
    }

    /// Removes what is left of images of writes that were replaced by later ones: only where nothing is kept.
    ///
    /// # Errors
    /// The fault of a call.
    pub async fn remove_parts(&self, (epoch, table): (u64, &str)) -> Result<(), Fault> {
        self.remove_all(&format!("part#{epoch}#{table}#")).await
    }

    /// Removes everything whose key begins with `prefix`.
    ///
    /// # Errors
    /// The fault of a call.
    async fn remove_all(&self, prefix: &str) -> Result<(), Fault> {
        let mut after = None;
        loop {
            let (items, next) = self.items(prefix, after.take()).await?;
            for item in items {
                let Some(key) = item.get(KEY) else { continue };
                self.client
                    .delete_item()
                    .table_name(&self.name)
                    .key(KEY, key.clone())
                    .send()
                    .await
                    .map_err(|error| classify(Operation::State, &error))?;
            }
            match next {
                None => return Ok(()),
                next => after = next,
            }
        }
    }

    /// Stores a page of the ledger. False if there is one of its number already: somebody else keeps it.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn put_page(&self, (epoch, table): (u64, &str), page: &Page) -> Result<bool, Fault> {
        let keys: Vec<u8> = page.keys.iter().flat_map(Digest::to_bytes).collect();
        let answer = self
            .client
            .put_item()
            .table_name(&self.name)
            .item(
                KEY,
                text(&format!("{}{}", ledger(epoch, table), page.number)),
            )
            .item("number", number(page.number))
            .item("keys", AttributeValue::B(Blob::new(keys)))
            .condition_expression("attribute_not_exists(#item)")
            .expression_attribute_names("#item", KEY)
            .send()
            .await;
        match answer.map_err(|error| classify(Operation::State, &error)) {
            Ok(_) => Ok(true),
            Err(fault) if fault.class == Class::Condition => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// The pages of a ledger, in no order.
    ///
    /// # Errors
    /// The fault of a call, or a page that this version cannot read.
    pub async fn pages(&self, (epoch, table): (u64, &str)) -> Result<Vec<Page>, Fault> {
        let (mut pages, mut after) = (Vec::new(), None);
        loop {
            let (items, next) = self.items(&ledger(epoch, table), after.take()).await?;
            for item in items {
                let number = item.get("number").and_then(|value| value.as_n().ok());
                let keys = item.get("keys").and_then(|value| value.as_b().ok());
                let read = number.and_then(|number| number.parse().ok()).zip(keys);
                let (number, keys) = read.ok_or_else(|| unreadable("it is no page of a ledger"))?;
                let (whole, rest) = keys.as_ref().as_chunks::<16>();
                if !rest.is_empty() {
                    return Err(unreadable("a page of a ledger is cut off"));
                }
                pages.push(Page {
                    number,
                    keys: whole.iter().copied().map(Digest::from_bytes).collect(),
                });
            }
            match next {
                None => return Ok(pages),
                next => after = next,
            }
        }
    }

    /// Removes a ledger.
    ///
    /// # Errors
    /// The fault of a call.
    pub async fn remove_ledger(&self, (epoch, table): (u64, &str)) -> Result<(), Fault> {
        self.remove_all(&ledger(epoch, table)).await
    }
}

fn stranded(epoch: u64, table: &str) -> String {
    format!("stranded#{epoch}#{table}#")
}

fn ledger(epoch: u64, table: &str) -> String {
    format!("ledger#{epoch}#{table}#")
}

fn part_key(row: &str, parts_of: &str, place: usize) -> String {
    let row = row.replacen("stranded#", "part#", 1);
    format!("{row}#{parts_of}#{place}")
}

fn pack(image: &Item) -> Result<Vec<u8>, Fault> {
    let packing = || {
        let json = serde_json::to_vec(&item_to_json(image))?;
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&json)?;
        encoder.finish()
    };
    packing().map_err(|error| unreadable(&format!("an image could not be packed: {error}")))
}

/// What [`pack`] has packed; bounded, whatever it claims to hold.
fn unpack(packed: &[u8]) -> Result<Item, Fault> {
    let mut json = Vec::new();
    DeflateDecoder::new(packed)
        .take(IMAGE_BYTES_MAX)
        .read_to_end(&mut json)
        .map_err(|error| unreadable(&format!("an image could not be unpacked: {error}")))?;
    let value = serde_json::from_slice(&json);
    let value = value.map_err(|_| unreadable("an image is no JSON"))?;
    item_from_json(&value).ok_or_else(|| unreadable("an image is no item"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_survives_being_packed() {
        let blob = AttributeValue::B(Blob::new([0, 1, 255]));
        let item: Item = [
            ("id".to_owned(), text("ä")),
            ("n".to_owned(), number("1e5")),
            ("b".to_owned(), blob),
        ]
        .into();
        let packed = pack(&item).unwrap();
        assert_eq!(unpack(&packed).unwrap(), item);
        assert!(unpack(&packed[..packed.len() / 2]).is_err());
    }

    #[test]
    fn keys_of_rows_and_parts_name_epoch_and_table() {
        let keys: Item = [("id".to_owned(), text("a"))].into();
        let row = Store::row_of(7, "orders", &keys);
        assert!(row.starts_with("stranded#7#orders#"));
        assert!(part_key(&row, "12", 3).starts_with("part#7#orders#"));
        assert!(part_key(&row, "12", 3).ends_with("#12#3"));
    }
}
