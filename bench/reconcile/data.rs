//! What the two tables hold, how they differ, and what a comparer should say of them.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, PutRequest, WriteRequest};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::Error;

pub type Item = HashMap<String, AttributeValue>;

pub const TABLE: &str = "bench";
/// The attribute of the primary key.
pub const KEY: &str = "id";

/// Items that a page of 1 MB has room for, with some to spare: a scan is served in parts of about so
/// many.
const PART_ITEMS: u64 = 2_900;
const WRITERS: u64 = 8;
/// Items of one BatchWriteItem; DynamoDB takes no more.
const WRITE_ITEMS_MAX: usize = 25;
/// How often the rest of a batch is written again.
const ATTEMPTS: u32 = 10;

#[derive(Clone, Copy)]
pub enum Region {
    Source,
    Target,
}

#[derive(Clone, Copy)]
enum Drift {
    Missing,
    Changed,
    Extra,
}

/// Two tables, told by numbers alone: item `index` is the same in every run.
#[derive(Clone, Copy)]
pub struct Data {
    pub items: u64,
    pub drift: u64,
}

/// What a comparer says.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Items scanned.
    pub source_items: u64,
    pub target_items: u64,
    /// Read units that the servers charged, for scans and for reads by key.
    pub source_units: f64,
    pub target_units: f64,
    pub missing: u64,
    pub changed: u64,
    pub extra: u64,
    /// Keys that a comparer could not make up its mind about.
    #[serde(default)]
    pub unsettled: u64,
}

impl Answer {
    /// Items and read units of source and target.
    pub fn sides(&self) -> [(f64, f64); 2] {
        [
            (self.source_items as f64, self.source_units),
            (self.target_items as f64, self.target_units),
        ]
    }
}

impl Data {
    pub fn new(items: u64, drift: u64) -> Result<Self, Error> {
        match drift <= items {
            true => Ok(Self { items, drift }),
            false => Err("no more items can differ than there are".into()),
        }
    }

    /// Parts that a scan of the whole table is served in.
    pub fn parts(&self) -> u64 {
        self.items.div_ceil(PART_ITEMS)
    }

    /// How an item differs, if it does: those that differ are spread over the table.
    fn drift_of(&self, index: u64) -> Option<Drift> {
        let apart = self.items.checked_div(self.drift)?;
        let differs = index.is_multiple_of(apart) && index / apart < self.drift;
        differs.then(|| match index / apart % 3 {
            0 => Drift::Missing,
            1 => Drift::Changed,
            _ => Drift::Extra,
        })
    }

    /// What `region` holds under `index`.
    fn item_in(&self, region: Region, index: u64) -> Option<Item> {
        match (region, self.drift_of(index)) {
            (Region::Target, Some(Drift::Missing)) | (Region::Source, Some(Drift::Extra)) => None,
            (Region::Target, Some(Drift::Changed)) => Some(item(index, "Harwich")),
            _ => Some(item(index, "Hoek van Holland")),
        }
    }

    /// What is wrong with an answer, if anything is.
    pub fn wrong(&self, answer: &Answer) -> Option<String> {
        let (missing, changed) = (self.drift.div_ceil(3), (self.drift + 1) / 3);
        let extra = self.drift - missing - changed;
        let wanted = [
            ("source items", answer.source_items, self.items - extra),
            ("target items", answer.target_items, self.items - missing),
            ("missing", answer.missing, missing),
            ("changed", answer.changed, changed),
            ("extra", answer.extra, extra),
            ("unsettled", answer.unsettled, 0),
        ];
        let wrong = wanted.iter().filter(|(_, said, right)| said != right);
        let wrong: Vec<String> = wrong
            .map(|(name, said, right)| format!("{name}: {said} instead of {right}"))
            .collect();
        (!wrong.is_empty()).then(|| wrong.join(", "))
    }

    /// Fills one table, by several writers at once.
    pub async fn load(&self, client: &Client, region: Region) -> Result<(), Error> {
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let (data, client) = (*self, client.clone());
            let range = self.items * writer / WRITERS..self.items * (writer + 1) / WRITERS;
            writers.spawn(async move {
                let mut items = range
                    .filter_map(|index| data.item_in(region, index))
                    .peekable();
                while items.peek().is_some() {
                    write(&client, items.by_ref().take(WRITE_ITEMS_MAX)).await?;
                }
                Ok::<(), Error>(())
            });
        }
        while let Some(done) = writers.join_next().await {
            done??;
        }
        Ok(())
    }
}

async fn write(client: &Client, items: impl Iterator<Item = Item>) -> Result<(), Error> {
    let mut left = Vec::with_capacity(WRITE_ITEMS_MAX);
    for item in items {
        let put = PutRequest::builder().set_item(Some(item)).build()?;
        left.push(WriteRequest::builder().put_request(put).build());
    }
    for _ in 0..ATTEMPTS {
        let call = client.batch_write_item().request_items(TABLE, left);
        let mut unprocessed = call.send().await?.unprocessed_items.unwrap_or_default();
        left = unprocessed.remove(TABLE).unwrap_or_default();
        if left.is_empty() {
            return Ok(());
        }
    }
    Err("the embedded server does not take its items".into())
}

/// About 300 bytes as DynamoDB counts them, with something of most types.
fn item(index: u64, city: &str) -> Item {
    let s = |text: String| AttributeValue::S(text);
    let n = |number: u64| AttributeValue::N(number.to_string());
    let address = HashMap::from([
        ("street".to_owned(), s(format!("Quay {}", index % 977))),
        ("city".to_owned(), s(city.to_owned())),
        ("code".to_owned(), n(10_000 + index % 89_999)),
    ]);
    let tags = (0..3).map(|tag| format!("tag-{tag}-{}", index % 7));
    let weights = (1..4).map(|weight| format!("{}.5", index % 50 * weight + weight));
    HashMap::from([
        (KEY.to_owned(), s(format!("item-{index:09}"))),
        ("customer".to_owned(), s(format!("c-{:06}", index / 3))),
        ("state".to_owned(), s("shipped".to_owned())),
        ("amount".to_owned(), n(index * 7_919 % 1_000_003)),
        ("at".to_owned(), n(1_790_000_000 + index)),
        (
            "gift".to_owned(),
            AttributeValue::Bool(index.is_multiple_of(2)),
        ),
        ("address".to_owned(), AttributeValue::M(address)),
        ("tags".to_owned(), AttributeValue::Ss(tags.collect())),
        ("weights".to_owned(), AttributeValue::Ns(weights.collect())),
        ("note".to_owned(), s(format!("{:0>132}", index * 31))),
    ])
}
