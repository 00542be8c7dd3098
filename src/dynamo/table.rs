//! What a table is: its description, keys and stream, as far as replication cares.

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{KeyType, StreamViewType, TableDescription, TimeToLiveStatus};

use crate::error::{Class, Fault, Operation, classify};

/// Reads a table's description; `None` where there is no such table.
///
/// # Errors
/// Any other fault of the call.
pub async fn describe(client: &Client, name: &str) -> Result<Option<TableDescription>, Fault> {
    match client.describe_table().table_name(name).send().await {
        Ok(answer) => Ok(answer.table),
        Err(error) => match classify(Operation::DescribeTable, &error) {
            fault if fault.class == Class::NotFound => Ok(None),
            fault => Err(fault),
        },
    }
}

/// One part of a primary key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPart {
    /// The attribute.
    pub name: String,
    /// `HASH` or `RANGE`.
    pub role: String,
    /// `S`, `N` or `B`.
    pub kind: String,
}

/// The primary key of a table: partition key first.
pub fn primary_key(table: &TableDescription) -> Vec<KeyPart> {
    let mut parts: Vec<KeyPart> = table
        .key_schema()
        .iter()
        .map(|element| KeyPart {
            name: element.attribute_name().to_owned(),
            role: element.key_type().as_str().to_owned(),
            kind: table
                .attribute_definitions()
                .iter()
                .find(|definition| definition.attribute_name() == element.attribute_name())
                .map_or_else(
                    || "?".to_owned(),
                    |definition| definition.attribute_type().as_str().to_owned(),
                ),
        })
        .collect();
    parts.sort_by_key(|part| part.role != KeyType::Hash.as_str());
    parts
}

/// The attribute by which TTL deletes a table's items, if it does.
///
/// # Errors
/// The call failed.
pub async fn ttl_attribute(client: &Client, table: &str) -> Result<Option<String>, Fault> {
    let answer = client
        .describe_time_to_live()
        .table_name(table)
        .send()
        .await
        .map_err(|error| classify(Operation::DescribeTable, &error))?;
    let described = answer.time_to_live_description;
    Ok(described.and_then(|ttl| ttl.attribute_name))
}

/// Whether TTL by `attribute` is on for a table, or being turned on. One that is being turned off is not, and
/// neither is one by another attribute.
///
/// # Errors
/// The call failed.
pub async fn ttl_is_on(client: &Client, table: &str, attribute: &str) -> Result<bool, Fault> {
    let answer = client
        .describe_time_to_live()
        .table_name(table)
        .send()
        .await
        .map_err(|error| classify(Operation::DescribeTable, &error))?;
    Ok(answer.time_to_live_description.is_some_and(|ttl| {
        let status = ttl.time_to_live_status();
        let is_on = matches!(
            status,
            Some(TimeToLiveStatus::Enabled | TimeToLiveStatus::Enabling)
        );
        is_on && ttl.attribute_name() == Some(attribute)
    }))
}

/// A primary key for people: `id (S, HASH), at (N, RANGE)`.
pub fn show_key(parts: &[KeyPart]) -> String {
    parts
        .iter()
        .map(|part| format!("{} ({}, {})", part.name, part.kind, part.role))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The stream of a table that has one enabled: its ARN and view type.
pub fn enabled_stream(table: &TableDescription) -> Option<(&str, Option<&StreamViewType>)> {
    let specification = table.stream_specification()?;
    if !specification.stream_enabled() {
        return None;
    }
    Some((table.latest_stream_arn()?, specification.stream_view_type()))
}

/// Whether a stream of this view type says what an item became.
pub fn holds_new_images(view: Option<&StreamViewType>) -> bool {
    matches!(
        view,
        Some(StreamViewType::NewAndOldImages | StreamViewType::NewImage)
    )
}
