//! Calls about tables: passed on, with the gateway's own streams in place of the database's.

use std::sync::Arc;

use bytes::Bytes;
use hyper::header::HeaderMap;
use serde_json::{Value, json};

use super::protocol::{Answer, Failure};
use super::region::Region;
use super::stream::Stream;
use super::touched::table_name;

/// The view the database records with, so that writes which change nothing can be told.
const INNER_VIEW: &str = "NEW_AND_OLD_IMAGES";

/// True for calls that this module answers.
pub(crate) fn concerns(operation: &str) -> bool {
    matches!(
        operation,
        "CreateTable"
            | "UpdateTable"
            | "DeleteTable"
            | "DescribeTable"
            | "TagResource"
            | "UntagResource"
            | "ListTagsOfResource"
            | "UpdateTimeToLive"
            | "DescribeTimeToLive"
    )
}

/// Answers one call about tables.
pub(crate) async fn serve(
    region: &Arc<Region>,
    operation: &str,
    headers: &HeaderMap,
    body: Bytes,
) -> Answer {
    let inner = format!(
        "arn:aws:dynamodb:{}:{}:",
        dynoxide::streams::LOCAL_REGION,
        dynoxide::streams::LOCAL_ACCOUNT
    );
    let body = replace(&body, &region.arn_prefix(), &inner);
    let answer = match operation {
        "CreateTable" => create(region, headers, body).await,
        "UpdateTable" => update(region, headers, body).await,
        "DeleteTable" => delete(region, headers, body).await,
        _ => region.upstream.send(headers, body).await,
    };
    let replaced = replace(&answer.body, &inner, &region.arn_prefix());
    let described = if answer.is_ok() {
        describe(region, &replaced).await
    } else {
        None
    };
    match described {
        Some(described) => answer.with_body(described),
        None if replaced == answer.body => answer,
        None => answer.with_body(replaced),
    }
}

fn replace(body: &Bytes, from: &str, to: &str) -> Bytes {
    match std::str::from_utf8(body) {
        Ok(text) if from != to && text.contains(from) => text.replace(from, to).into(),
        _ => body.clone(),
    }
}

/// The view a call asks for if it enables a stream; its body then asks the database for all.
struct Enabling {
    table: String,
    /// `Some(None)` disables.
    stream: Option<Option<String>>,
    body: Bytes,
}

/// What a call wants of a stream, or `None` if it cannot be read.
fn enabling(body: &Bytes) -> Option<Enabling> {
    let mut call: Value = serde_json::from_slice(body).ok()?;
    let table = table_name(call["TableName"].as_str()?).to_owned();
    let wanted = &call["StreamSpecification"]["StreamEnabled"];
    let Some(enable) = wanted.as_bool() else {
        return Some(Enabling {
            table,
            stream: None,
            body: body.clone(),
        });
    };
    if !enable {
        return Some(Enabling {
            table,
            stream: Some(None),
            body: body.clone(),
        });
    }
    let view = call["StreamSpecification"]["StreamViewType"].as_str();
    let view = view.unwrap_or_default().to_owned();
    if ["KEYS_ONLY", "NEW_IMAGE", "OLD_IMAGE"].contains(&view.as_str()) {
        call["StreamSpecification"]["StreamViewType"] = Value::from(INNER_VIEW);
    }
    Some(Enabling {
        table,
        stream: Some(Some(view)),
        body: call.to_string().into(),
    })
}

async fn create(region: &Arc<Region>, headers: &HeaderMap, body: Bytes) -> Answer {
    let alone = region.gate.write().await;
    let Some(call) = enabling(&body) else {
        return region.upstream.send(headers, body).await;
    };
    let answer = region.upstream.send(headers, call.body).await;
    if answer.is_ok() {
        region.forget_schema(&call.table);
        if let Some(before) = region.newest_stream(&call.table) {
            // The table was deleted without the gateway.
            before.disable(region.clock.now_ms());
        }
        if let Some(Some(view)) = call.stream {
            open(region, &call.table, &view).await;
        }
    }
    drop(alone);
    answer
}

async fn update(region: &Arc<Region>, headers: &HeaderMap, body: Bytes) -> Answer {
    let alone = region.gate.write().await;
    let call = match enabling(&body) {
        Some(call) if call.stream.is_some() => call,
        _ => return region.upstream.send(headers, body).await,
    };
    let refused = |state: &str| {
        let message = format!(
            "Table already has {state} stream: TableName: {}",
            call.table
        );
        Failure::validation(message).answer()
    };
    blocking(region, |region| region.find_streams()).await;
    let enabled = region.enabled_stream(&call.table).ok();
    let exists = region.schema(&call.table).is_some();
    match (&call.stream, &enabled) {
        (Some(Some(_)), Some(_)) => return refused("an enabled"),
        (Some(None), None) if exists => return refused("a disabled"),
        _ => {}
    }
    if let Some(stream) = &enabled {
        drain(region, stream).await;
    }
    let answer = region.upstream.send(headers, call.body.clone()).await;
    if answer.is_ok() {
        match (&call.stream, &enabled) {
            (Some(Some(view)), _) => open(region, &call.table, view).await,
            (_, Some(stream)) => stream.disable(region.clock.now_ms()),
            _ => {}
        }
    }
    drop(alone);
    answer
}

async fn delete(region: &Arc<Region>, headers: &HeaderMap, body: Bytes) -> Answer {
    let alone = region.gate.write().await;
    let table = enabling(&body).map(|call| call.table);
    let stream = table.as_deref().and_then(|t| region.enabled_stream(t).ok());
    if let Some(stream) = &stream {
        drain(region, stream).await;
    }
    let answer = region.upstream.send(headers, body).await;
    if answer.is_ok() {
        if let Some(stream) = stream {
            stream.disable(region.clock.now_ms());
        }
        if let Some(table) = table {
            region.forget_schema(&table);
        }
    }
    drop(alone);
    answer
}

async fn blocking(region: &Arc<Region>, work: impl FnOnce(&Region) + Send + 'static) {
    let region = Arc::clone(region);
    // It fails only if the work panicked, which has been logged by then.
    let _ = tokio::task::spawn_blocking(move || work(&region)).await;
}

async fn open(region: &Arc<Region>, table: &str, view: &str) {
    let (table, view) = (table.to_owned(), view.to_owned());
    blocking(region, move |region| {
        region.open_stream(&table, &view, false);
    })
    .await;
}

/// Takes over everything that was written while the stream was enabled.
async fn drain(region: &Arc<Region>, stream: &Arc<Stream>) {
    let stream = Arc::clone(stream);
    blocking(region, move |region| region.take_over(&stream)).await;
}

/// A description of a table with the gateway's stream in it; `None` if the answer holds none.
async fn describe(region: &Arc<Region>, body: &Bytes) -> Option<Bytes> {
    let mut answer: Value = serde_json::from_slice(body).ok()?;
    let field = ["Table", "TableDescription"]
        .into_iter()
        .find(|f| answer[*f].is_object())?;
    let table = answer[field].as_object_mut()?;
    let name = table.get("TableName")?.as_str()?.to_owned();
    let id = table
        .get("TableId")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let streams = table.remove("StreamSpecification").is_some();
    table.remove("LatestStreamArn");
    table.remove("LatestStreamLabel");
    let mut stream = region.newest_stream(&name);
    if streams && !stream.as_ref().is_some_and(|stream| stream.is_enabled()) {
        blocking(region, |region| region.find_streams()).await;
        stream = region.newest_stream(&name);
    }
    // The stream of a deleted table is not that of its successor.
    if let Some(stream) = stream.filter(|stream| stream.table_id == id) {
        table.insert(
            "LatestStreamArn".to_owned(),
            Value::from(stream.arn.as_str()),
        );
        table.insert(
            "LatestStreamLabel".to_owned(),
            Value::from(stream.label.as_str()),
        );
        if stream.is_enabled() && streams {
            let view = json!({ "StreamEnabled": true, "StreamViewType": stream.view.name });
            table.insert("StreamSpecification".to_owned(), view);
        }
    }
    Some(answer.to_string().into())
}
