//! What the null endpoint gives out: pages of the shape that DynamoDB Streams sends, made from a
//! template, so that giving one out costs a copy and some digits.

use std::ops::Range;

use bytes::Bytes;

/// Digits of keys and sequence numbers in the template: every number fits.
const KEY_DIGITS: usize = 16;
const SEQUENCE_DIGITS: usize = 21;
/// The service cuts pages at 1 MB.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// Distinct keys of a shard where keys are hot.
const HOT_KEYS: u64 = 100;
/// Sequence numbers as long as the service's.
const FIRST_SEQUENCE: u64 = 1 << 60;
/// What the last record of a shard has in its key, and no other.
pub const LAST_MARK: &[u8] = b"last-";
const KEY_MARK: &str = "item-";
/// What is not payload in an item.
const REST_BYTES: usize = 120;

/// Which keys records have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Keys {
    /// Each record has a key of its own: items are new.
    Distinct,
    /// A hundred keys a shard are written again and again: records have both images.
    Hot,
}

/// The records of all shards, told by numbers alone.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Load {
    /// Shards.
    #[arg(long)]
    pub shards: u64,
    /// Records of each shard.
    #[arg(long)]
    pub records: u64,
    /// Bytes of an item, about.
    #[arg(long)]
    pub item_bytes: usize,
    /// Which keys they have.
    #[arg(long)]
    pub keys: Keys,
}

/// A page with room for any numbers.
pub struct Template {
    load: Load,
    record: Vec<u8>,
    /// Where the keys and the sequence number stand in a record.
    keys: Vec<Range<usize>>,
    sequence: Range<usize>,
    /// Records of a full page.
    page_records: u64,
}

impl Load {
    /// Items that are written at least: all the distinct keys.
    pub fn writes_min(&self) -> u64 {
        match self.keys {
            Keys::Distinct => self.shards * self.records,
            Keys::Hot => self.shards * (self.records.min(HOT_KEYS + 1)),
        }
    }

    pub fn all_records(&self) -> u64 {
        self.shards * self.records
    }
}

impl Template {
    pub fn new(load: Load) -> Self {
        let key = format!("{KEY_MARK}{}", "0".repeat(KEY_DIGITS));
        let payload = "x".repeat(load.item_bytes.saturating_sub(REST_BYTES));
        let image = format!(
            r#"{{"id":{{"S":"{key}"}},"status":{{"S":"in transit"}},"amount":{{"N":"1234.5"}},"lines":{{"L":[{{"M":{{"sku":{{"S":"A-1"}},"n":{{"N":"2"}}}}}}]}},"flag":{{"BOOL":true}},"payload":{{"S":"{payload}"}}}}"#
        );
        let (event, old) = match load.keys {
            Keys::Distinct => ("INSERT", String::new()),
            Keys::Hot => ("MODIFY", format!(r#","OldImage":{image}"#)),
        };
        let number = "0".repeat(SEQUENCE_DIGITS);
        let record = format!(
            r#"{{"eventID":"0123456789abcdef0123456789abcdef","eventName":"{event}","eventVersion":"1.1","eventSource":"aws:dynamodb","awsRegion":"us-east-1","dynamodb":{{"ApproximateCreationDateTime":1763800000,"Keys":{{"id":{{"S":"{key}"}}}},"NewImage":{image}{old},"SequenceNumber":"{number}","SizeBytes":{size},"StreamViewType":"NEW_AND_OLD_IMAGES"}}}}"#,
            size = load.item_bytes
        );
        let keys = record
            .match_indices(KEY_MARK)
            .map(|(at, mark)| at..at + mark.len() + KEY_DIGITS)
            .collect();
        let marker = r#""SequenceNumber":""#;
        // It was written above.
        let sequence = record.find(marker).map_or(0, |at| at + marker.len());
        // The limit is on images, not on the JSON around them.
        let images = load.item_bytes * if old.is_empty() { 1 } else { 2 };
        Self {
            load,
            record: record.into_bytes(),
            keys,
            sequence: sequence..sequence + SEQUENCE_DIGITS,
            page_records: (PAGE_BYTES_MAX / images.max(1)).clamp(1, 1_000) as u64,
        }
    }

    /// The page of `shard` that begins at its record `first`, of at most `limit` records.
    pub fn page(&self, shard: u64, first: u64, limit: u64) -> Bytes {
        let end = (first + limit.min(self.page_records)).min(self.load.records);
        let records = end.saturating_sub(first) as usize;
        let mut page = Vec::with_capacity(records * (self.record.len() + 1) + 100);
        page.extend_from_slice(br#"{"Records":["#);
        for record in first..end {
            if record > first {
                page.push(b',');
            }
            let at = page.len();
            page.extend_from_slice(&self.record);
            let record_bytes = &mut page[at..];
            let (mark, key) = match self.load.keys {
                _ if record + 1 == self.load.records => (LAST_MARK, shard),
                Keys::Distinct => (KEY_MARK.as_bytes(), shard * self.load.records + record),
                Keys::Hot => (KEY_MARK.as_bytes(), shard * HOT_KEYS + record % HOT_KEYS),
            };
            for range in &self.keys {
                let (name, digits) = record_bytes[range.clone()].split_at_mut(mark.len());
                name.copy_from_slice(mark);
                write_digits(digits, key);
            }
            write_digits(
                &mut record_bytes[self.sequence.clone()],
                FIRST_SEQUENCE + record,
            );
        }
        let next = end.max(first);
        page.extend_from_slice(format!(r#"],"NextShardIterator":"{shard}:{next}"}}"#).as_bytes());
        Bytes::from(page)
    }

    /// The record after the one with this sequence number.
    pub fn after(sequence: &str) -> u64 {
        let number: u64 = sequence.parse().unwrap_or(0);
        (number + 1).saturating_sub(FIRST_SEQUENCE)
    }
}

fn write_digits(digits: &mut [u8], mut number: u64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}
