//! One side: an embedded server in a process of its own, and two fronts that its table is scanned
//! through.
//!
//! The embedded server orders a segment by a hash of the key, and for every page it reads and sorts
//! all that is left of the segment: a scan takes time quadratic in the table, minutes where DynamoDB
//! takes seconds. So its database has an index over the hash, and a front asks for each segment as
//! many small ones, one a page, which the index finds. The items, their order and their price are the
//! server's own; pages are a little smaller than 1 MB.
//!
//! One front asks for the small segments from the first to the last, so that two tables with the same
//! keys come in the same order. The other asks from the last to the first: beside the first one, all
//! but the items of a page come in the opposite order. Where a scan stands is told by
//! `LastEvaluatedKey` alone, which has the number of the small segment as a further attribute.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use axum::serve::ListenerExt;
use bytes::Bytes;
use dynoxide::Database;
use farshore::embedded::EmbeddedServer;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use crate::Error;
use crate::data::{KEY, TABLE};
use crate::process::Running;

/// A server that does not say where it listens by then has failed.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The attribute of a position that holds the number of the small segment.
const STEP: &str = "step";

#[derive(Serialize, Deserialize)]
struct Addresses {
    direct: String,
    ascending: String,
    descending: String,
}

/// A running side, as the bench sees it.
pub struct Server {
    _process: Running,
    /// Without a front: for loading.
    pub direct: String,
    /// Scanned in the server's own order.
    pub ascending: String,
    /// Scanned in the opposite order.
    pub descending: String,
}

impl Server {
    /// Starts a server with an empty table, whose scan comes in `parts`.
    pub async fn start(parts: u64) -> Result<Self, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", &parts.to_string()]);
        // It ends when its standard input is closed, however the bench ends.
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Running(command.spawn()?);
        let stdout = process.0.stdout.take().ok_or("no standard output")?;
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        });
        let line = tokio::time::timeout(START_TIMEOUT, line).await???;
        let addresses: Addresses = serde_json::from_str(&line)?;
        Ok(Self {
            _process: process,
            direct: addresses.direct,
            ascending: addresses.ascending,
            descending: addresses.descending,
        })
    }
}

/// Serves an empty table until the standard input is closed.
pub async fn serve(parts: u64) -> Result<(), Error> {
    let embedded = EmbeddedServer::around(database()?).await?;
    let direct = embedded.endpoint_url();
    let addresses = Addresses {
        ascending: front(&direct, parts, Order::Ascending).await?,
        descending: front(&direct, parts, Order::Descending).await?,
        direct,
    };
    println!("{}", serde_json::to_string(&addresses)?);
    let closed = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(closed).await??;
    Ok(())
}

fn database() -> Result<Database, Error> {
    // Two connections find the same database by its name.
    let name = format!("file:bench-{}?mode=memory&cache=shared", std::process::id());
    let database = Database::new(&name)?;
    database.create_table(serde_json::from_value(json!({
        "TableName": TABLE,
        "KeySchema": [{"AttributeName": KEY, "KeyType": "HASH"}],
        "AttributeDefinitions": [{"AttributeName": KEY, "AttributeType": "S"}],
        "BillingMode": "PAY_PER_REQUEST",
    }))?)?;
    // The expression by which the server finds a segment.
    rusqlite::Connection::open(&name)?.execute_batch(&format!(
        "CREATE INDEX bench_by_bucket ON \"{TABLE}\"(substr(hash_prefix, 1, 3))"
    ))?;
    Ok(database)
}

#[derive(Clone, Copy)]
enum Order {
    Ascending,
    Descending,
}

struct Front {
    client: Client<HttpConnector, Full<Bytes>>,
    upstream: Uri,
    /// Small segments of the whole table.
    parts: u64,
    order: Order,
}

/// Starts a front; where it listens.
async fn front(upstream: &str, parts: u64, order: Order) -> Result<String, Error> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let front = Arc::new(Front {
        client: Client::builder(TokioExecutor::new()).build(connector),
        upstream: upstream.parse()?,
        parts,
        order,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    // With Nagle's algorithm answers would wait for the client's delayed acknowledgement.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let app = Router::new().fallback(answer).with_state(front);
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(url)
}

async fn answer(
    State(front): State<Arc<Front>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let is_scan = headers
        .get("x-amz-target")
        .is_some_and(|target| target.as_bytes().ends_with(b".Scan"));
    let answered = match is_scan {
        true => front.scan(headers, &body).await,
        false => front.pass_on(headers, body).await,
    };
    answered.map_or_else(
        |error| {
            eprintln!("a front could not answer: {error}");
            let mut response = Response::new(Body::from(error.to_string()));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        },
        |response| response.map(Body::from),
    )
}

/// What of a page is changed; the items pass as they are.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Page<'a> {
    #[serde(borrow)]
    items: &'a RawValue,
    count: u64,
    scanned_count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_evaluated_key: Option<Map<String, Value>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    consumed_capacity: Option<&'a RawValue>,
}

impl Front {
    async fn pass_on(&self, headers: HeaderMap, body: Bytes) -> Result<Response<Bytes>, Error> {
        let mut request = Request::post(&self.upstream).body(Full::new(body))?;
        *request.headers_mut() = headers;
        for own in [header::HOST, header::CONTENT_LENGTH, header::CONNECTION] {
            request.headers_mut().remove(own);
        }
        let (parts, body) = self.client.request(request).await?.into_parts();
        Ok(Response::from_parts(
            parts,
            body.collect().await?.to_bytes(),
        ))
    }

    /// A page of a small segment, for a page of the one that was asked for.
    async fn scan(&self, headers: HeaderMap, body: &[u8]) -> Result<Response<Bytes>, Error> {
        let mut asked: Map<String, Value> = serde_json::from_slice(body)?;
        let number = |name, absent| asked.get(name).and_then(Value::as_u64).unwrap_or(absent);
        let (segment, segments) = (number("Segment", 0), number("TotalSegments", 1));
        let parts = self.parts.div_ceil(segments).max(1);
        let mut after = match asked.remove("ExclusiveStartKey") {
            Some(Value::Object(after)) => after,
            _ => Map::new(),
        };
        let step = step_of(after.remove(STEP))?;
        let part = match self.order {
            Order::Ascending => step,
            Order::Descending => parts - 1 - step,
        };
        asked.insert("Segment".to_owned(), json!(segment * parts + part));
        asked.insert("TotalSegments".to_owned(), json!(segments * parts));
        if !after.is_empty() {
            asked.insert("ExclusiveStartKey".to_owned(), Value::Object(after));
        }
        let asked = Bytes::from(serde_json::to_vec(&asked)?);
        let mut response = self.pass_on(headers, asked).await?;
        if response.status() == StatusCode::OK {
            let mut page: Page = serde_json::from_slice(response.body())?;
            let (step, after) = match page.last_evaluated_key.take() {
                Some(after) => (step, after),
                None => (step + 1, Map::new()),
            };
            page.last_evaluated_key = (step < parts).then(|| position(step, after));
            let body = Bytes::from(serde_json::to_vec(&page)?);
            let headers = response.headers_mut();
            // Both are of the body as it was.
            headers.remove("x-amz-crc32");
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
            *response.body_mut() = body;
        }
        Ok(response)
    }
}

/// Where a scan goes on: in which small segment, and after which of its items.
fn position(step: u64, mut after: Map<String, Value>) -> Map<String, Value> {
    after.insert(STEP.to_owned(), json!({"N": step.to_string()}));
    after
}

fn step_of(attribute: Option<Value>) -> Result<u64, Error> {
    match attribute {
        None => Ok(0),
        Some(step) => Ok(step["N"]
            .as_str()
            .ok_or("no position of a front")?
            .parse()?),
    }
}

/// A client of an embedded server.
pub fn client(url: &str) -> aws_sdk_dynamodb::Client {
    use aws_sdk_dynamodb::config::timeout::TimeoutConfig;
    use aws_sdk_dynamodb::config::{BehaviorVersion, Credentials, Region};

    let timeouts = TimeoutConfig::builder()
        .operation_timeout(Duration::from_secs(60))
        .build();
    let config = aws_sdk_dynamodb::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(url)
        .credentials_provider(Credentials::new("bench", "bench", None, None, "bench"))
        .timeout_config(timeouts)
        .build();
    aws_sdk_dynamodb::Client::from_conf(config)
}
