//! The wire format: DynamoDB's JSON 1.0 over HTTP, its operations by name, its errors.

use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::body::AnswerBody;

pub(crate) const JSON: &str = "application/x-amz-json-1.0";
const ERROR_SPACE: &str = "com.amazonaws.dynamodb.v20120810#";
const CORAL_SPACE: &str = "com.amazon.coral.service#";
const VALIDATION_SPACE: &str = "com.amazon.coral.validate#";

/// The operation an `X-Amz-Target` header names, and whether it is one of the Streams API.
pub(crate) fn operation(target: &str) -> Option<(&str, bool)> {
    if let Some(name) = target.strip_prefix("DynamoDB_20120810.") {
        return Some((name, is_streams(name)));
    }
    let name = target.strip_prefix("DynamoDBStreams_20120810.")?;
    Some((name, is_streams(name)))
}

/// True for the four operations of the Streams API.
pub(crate) fn is_streams(operation: &str) -> bool {
    matches!(
        operation,
        "DescribeStream" | "GetShardIterator" | "GetRecords" | "ListStreams"
    )
}

/// True for operations that write items.
pub(crate) fn is_write(operation: &str) -> bool {
    matches!(
        operation,
        "PutItem" | "UpdateItem" | "DeleteItem" | "BatchWriteItem" | "TransactWriteItems"
    ) || is_statement(operation)
}

/// PartiQL may read or write: it counts as both.
pub(crate) fn is_statement(operation: &str) -> bool {
    matches!(
        operation,
        "ExecuteStatement" | "ExecuteTransaction" | "BatchExecuteStatement"
    )
}

/// True for operations that read items.
pub(crate) fn is_read(operation: &str) -> bool {
    matches!(
        operation,
        "GetItem" | "BatchGetItem" | "Query" | "Scan" | "TransactGetItems"
    ) || is_statement(operation)
}

/// An error as the services answer it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: u16,
    pub(crate) code: String,
    pub(crate) message: String,
    /// Reason and resource of each throttled limit.
    pub(crate) reasons: Vec<(String, String)>,
    /// Of a cancelled transaction, the code for each of its items.
    pub(crate) cancellations: Vec<&'static str>,
}

impl Failure {
    pub(crate) fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.to_owned(),
            message: message.into(),
            reasons: Vec::new(),
            cancellations: Vec::new(),
        }
    }

    pub(crate) fn validation(message: impl Into<String>) -> Self {
        Self::new(400, "ValidationException", message)
    }

    pub(crate) fn not_found(what: &str) -> Self {
        let message = format!("Requested resource not found: {what}");
        Self::new(400, "ResourceNotFoundException", message)
    }

    pub(crate) fn internal() -> Self {
        Self::new(500, "InternalServerError", "Internal server error")
    }

    pub(crate) fn answer(&self) -> Answer {
        let space = match self.code.as_str() {
            "AccessDeniedException"
            | "InvalidSignatureException"
            | "UnrecognizedClientException"
            | "SerializationException"
            | "UnknownOperationException" => CORAL_SPACE,
            "ValidationException" => VALIDATION_SPACE,
            _ => ERROR_SPACE,
        };
        let mut body = json!({
            "__type": format!("{space}{}", self.code),
            "message": self.message,
        });
        if !self.reasons.is_empty() {
            // The services spell this field in two ways.
            let field = match self.code.as_str() {
                "ThrottlingException" => "throttlingReasons",
                _ => "ThrottlingReasons",
            };
            let reasons = self.reasons.iter();
            body[field] = reasons
                .map(|(reason, resource)| json!({"reason": reason, "resource": resource}))
                .collect();
        }
        if !self.cancellations.is_empty() {
            // This one error spells its message with a capital.
            body["Message"] = body["message"].take();
            let codes = self.cancellations.iter();
            body["CancellationReasons"] = codes.map(|code| json!({ "Code": code })).collect();
        }
        Answer {
            status: self.status,
            code: Some(self.code.clone()),
            headers: None,
            body: body.to_string().into(),
        }
    }
}

/// An answer on its way to the client.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// The error's code, if it is one.
    pub(crate) code: Option<String>,
    /// The embedded server's own headers, if the body is as it sent it.
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn ok(body: impl Into<Bytes>) -> Self {
        Self {
            status: 200,
            code: None,
            headers: None,
            body: body.into(),
        }
    }

    pub(crate) fn is_ok(&self) -> bool {
        self.status == 200
    }

    /// The same answer with another body; what described the old one goes.
    pub(crate) fn with_body(mut self, body: impl Into<Bytes>) -> Self {
        self.headers = None;
        self.body = body.into();
        self
    }

    /// The HTTP response; `cut` breaks the connection in the middle of its body.
    pub(crate) fn response(self, request_id: &str, cut: bool) -> Response<AnswerBody> {
        let length = self.body.len();
        let body = if cut {
            AnswerBody::cut(self.body)
        } else {
            AnswerBody::full(self.body)
        };
        let mut response = Response::new(body);
        *response.status_mut() =
            StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        if let Some(own) = self.headers {
            *headers = own;
        } else {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
        }
        headers.insert(hyper::header::CONTENT_LENGTH, HeaderValue::from(length));
        if let Ok(id) = HeaderValue::from_str(request_id) {
            headers.insert("x-amzn-requestid", id);
        }
        response
    }
}

/// The code in the body of an error answer.
pub(crate) fn error_code(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Kind {
        #[serde(rename = "__type")]
        kind: String,
    }
    let kind = serde_json::from_slice::<Kind>(body).ok()?.kind;
    Some(kind.rsplit('#').next().unwrap_or(&kind).to_owned())
}
