//! Reading items: by their keys, and page by page.

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{ConsumedCapacity, KeysAndAttributes, ReturnConsumedCapacity};

use super::value::Item;
use crate::error::{Class, Fault, Operation, classify};

/// Keys of one BatchGetItem; DynamoDB takes no more.
pub const BATCH_KEYS_MAX: usize = 100;

/// What a call read.
#[derive(Debug, Default)]
pub struct Got {
    /// The items that are there.
    pub items: Vec<Item>,
    /// Keys that were not looked at: ask for them again, after a pause.
    pub left: Vec<Item>,
    /// Read units it cost; 0 where the service does not tell.
    pub units: f64,
}

/// Reads the items under `keys`, consistently; at most [`BATCH_KEYS_MAX`].
///
/// # Errors
/// The fault of the call.
pub async fn batch_get(
    operation: Operation,
    table: (&Client, &str),
    keys: &[Item],
) -> Result<Got, Fault> {
    let request = KeysAndAttributes::builder()
        .set_keys(Some(keys.to_vec()))
        .consistent_read(true)
        .build()
        .map_err(|error| {
            Fault::own(
                operation,
                Class::Unknown,
                "request not built",
                error.to_string(),
            )
        })?;
    let answer = table
        .0
        .batch_get_item()
        .request_items(table.1, request)
        .return_consumed_capacity(ReturnConsumedCapacity::Total)
        .send()
        .await
        .map_err(|error| classify(operation, &error))?;
    let unprocessed = answer.unprocessed_keys.unwrap_or_default().into_values();
    Ok(Got {
        items: answer
            .responses
            .unwrap_or_default()
            .into_values()
            .flatten()
            .collect(),
        left: unprocessed.flat_map(|keys| keys.keys).collect(),
        units: answer.consumed_capacity.iter().flatten().map(units).sum(),
    })
}

/// A page of a scan.
#[derive(Debug, Default)]
pub struct ScanPage {
    /// Its items.
    pub items: Vec<Item>,
    /// Where the next one begins; `None` after the last.
    pub next: Option<Item>,
    /// Read units it cost; 0 where the service does not tell.
    pub units: f64,
}

/// Reads a page of the part `segment.0` of `segment.1` of a table, eventually consistent: for half the
/// price, and what it misses is in flight. `limit`: at most so many items.
///
/// # Errors
/// The fault of the call.
pub async fn scan_page(
    table: (&Client, &str),
    segment: (i32, i32),
    after: Option<Item>,
    limit: Option<i32>,
) -> Result<ScanPage, Fault> {
    let answer = table
        .0
        .scan()
        .table_name(table.1)
        .segment(segment.0)
        .total_segments(segment.1)
        .set_exclusive_start_key(after)
        .set_limit(limit)
        .return_consumed_capacity(ReturnConsumedCapacity::Total)
        .send()
        .await
        .map_err(|error| classify(Operation::Scan, &error))?;
    Ok(ScanPage {
        units: answer.consumed_capacity.as_ref().map_or(0.0, units),
        items: answer.items.unwrap_or_default(),
        next: answer.last_evaluated_key.filter(|key| !key.is_empty()),
    })
}

fn units(consumed: &ConsumedCapacity) -> f64 {
    consumed.capacity_units.unwrap_or_default()
}
