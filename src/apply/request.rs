//! The body of a `BatchWriteItem`, written straight from the changes.
//!
//! A change is kept until it is durable, with its image as the stream spelled it, and the SDK's own request
//! wants items of its own: each would be taken apart and copied, only to be spelled again and dropped. So the
//! SDK makes an empty request, and gets this body before it signs. Everything else, from the endpoint to the
//! answer, is the SDK's.

use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::coalesce::Op;
use crate::dynamo::image::{Attributes, Image, Sequence};
use crate::error::{Class, Fault, Operation};

/// What an operation takes besides its image: a key, at most times.
const OP_BYTES: usize = 128;

/// The body that writes `ops` to `table`.
///
/// # Errors
/// A value of a type that this version does not know.
pub fn batch_body(table: &str, ops: &[Op]) -> Result<Bytes, Fault> {
    let images = ops.iter().filter_map(|op| op.change.new_image.as_ref());
    let about: usize = images.map(Image::text_bytes).sum();
    let mut body = Vec::with_capacity(about + OP_BYTES * ops.len() + table.len() + 64);
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
    PutRequest { item: &'a RawValue },
    #[serde(rename_all = "PascalCase")]
    DeleteRequest { key: Attributes<'a> },
}

impl Serialize for Requests<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tables = serializer.serialize_map(Some(1))?;
        let requests = Sequence(|| {
            self.ops.iter().map(|op| match &op.change.new_image {
                Some(image) => Request::PutRequest { item: image.json() },
                None => Request::DeleteRequest {
                    key: Attributes(&op.change.keys),
                },
            })
        });
        tables.serialize_entry(self.table, &requests)?;
        tables.end()
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
