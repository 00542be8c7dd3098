//! The body of a `BatchWriteItem`, written straight from the changes.
//!
//! A change is kept until it is durable, and the SDK's own request wants to own its items: each would be
//! copied, only to be written as JSON and dropped. So the SDK makes an empty request, and gets this body
//! before it signs. Everything else, from the endpoint to the answer, is the SDK's.

use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_types::body::SdkBody;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::ser::{Error as _, SerializeMap};
use serde::{Serialize, Serializer};

use super::coalesce::Op;
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, Operation};

/// The body that writes `ops` to `table`.
///
/// # Errors
/// A value of a type that this version does not know.
pub fn batch_body(table: &str, ops: &[Op]) -> Result<Bytes, Fault> {
    let about: usize = ops.iter().map(|op| op.change.bytes).sum();
    let mut body = Vec::with_capacity(about + 64 * ops.len());
    let batch = Batch {
        request_items: Requests { table, ops },
        return_consumed_capacity: "TOTAL",
    };
    match serde_json::to_writer(&mut body, &batch) {
        Ok(()) => Ok(Bytes::from(body)),
        Err(error) => Err(Fault::own(
            Operation::Write,
            Class::Unknown,
            "request not built",
            error.to_string(),
        )),
    }
}

/// Gives `request` this body.
pub fn replace_body(request: &mut HttpRequest, body: &Bytes) {
    let length = body.len().to_string();
    request.headers_mut().insert("content-length", length);
    *request.body_mut() = SdkBody::from(body.clone());
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Batch<'a> {
    request_items: Requests<'a>,
    /// What it took is told, so that the write budget is not kept by estimates alone.
    return_consumed_capacity: &'static str,
}

struct Requests<'a> {
    table: &'a str,
    ops: &'a [Op],
}

#[derive(Serialize)]
enum Request<'a> {
    #[serde(rename_all = "PascalCase")]
    PutRequest { item: Attributes<'a> },
    #[serde(rename_all = "PascalCase")]
    DeleteRequest { key: Attributes<'a> },
}

struct Attributes<'a>(&'a Item);

struct Attribute<'a>(&'a AttributeValue);

struct Binary<'a>(&'a [u8]);

impl Serialize for Requests<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tables = serializer.serialize_map(Some(1))?;
        let requests = Sequence(|| {
            self.ops.iter().map(|op| match &op.change.new_image {
                Some(image) => Request::PutRequest {
                    item: Attributes(image),
                },
                None => Request::DeleteRequest {
                    key: Attributes(&op.change.keys),
                },
            })
        });
        tables.serialize_entry(self.table, &requests)?;
        tables.end()
    }
}

/// What an iterator gives, as a sequence.
struct Sequence<F>(F);

impl<F, I> Serialize for Sequence<F>
where
    F: Fn() -> I,
    I: Iterator<Item: Serialize>,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

impl Serialize for Attributes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, Attribute(value))))
    }
}

impl Serialize for Attribute<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut typed = serializer.serialize_map(Some(1))?;
        match self.0 {
            AttributeValue::S(text) => typed.serialize_entry("S", text)?,
            AttributeValue::N(number) => typed.serialize_entry("N", number)?,
            AttributeValue::B(bytes) => typed.serialize_entry("B", &Binary(bytes.as_ref()))?,
            AttributeValue::Bool(flag) => typed.serialize_entry("BOOL", flag)?,
            AttributeValue::Null(flag) => typed.serialize_entry("NULL", flag)?,
            AttributeValue::Ss(set) => typed.serialize_entry("SS", set)?,
            AttributeValue::Ns(set) => typed.serialize_entry("NS", set)?,
            AttributeValue::Bs(set) => {
                let all = Sequence(|| set.iter().map(|bytes| Binary(bytes.as_ref())));
                typed.serialize_entry("BS", &all)?;
            }
            AttributeValue::L(list) => {
                let all = Sequence(|| list.iter().map(Attribute));
                typed.serialize_entry("L", &all)?;
            }
            AttributeValue::M(map) => typed.serialize_entry("M", &Attributes(map))?,
            _ => {
                return Err(S::Error::custom(
                    "an attribute has a type that is not known",
                ));
            }
        }
        typed.end()
    }
}

impl Serialize for Binary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0, &STANDARD))
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
