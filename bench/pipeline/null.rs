//! The null endpoint: it serves a stream from a template and takes every batch without a look at it. All
//! else, the state table and descriptions, goes to an embedded server behind it.
//!
//! It is the judge as well: it counts calls, and knows when the first page was given out and the last item
//! written. No shard gets a page before all have asked for one, so that a worker's start is not measured.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use farshore::embedded::EmbeddedServer;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, HOST};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::Error;
use crate::load::{LAST_MARK, Load, Template};

/// Whoever asks before all others have gets an empty page after this time: a worker looks whether the stream
/// can be read before it takes a shard.
const GATHERING_MAX: Duration = Duration::from_secs(2);

/// What the endpoint saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Whether pages are given out.
    pub begun: bool,
    /// Microseconds from the first page to the last item.
    pub took_us: Option<u64>,
    /// Items written.
    pub written: u64,
    /// Calls since the first page, by operation.
    pub calls: BTreeMap<String, u64>,
}

struct Null {
    template: Template,
    load: Load,
    round_trip: Duration,
    client: Client<HttpConnector, Full<Bytes>>,
    upstream: Uri,
    asked: Mutex<BTreeSet<u64>>,
    begins: Notify,
    begun: Mutex<Option<Instant>>,
    written: AtomicU64,
    shards_done: AtomicU64,
    seen: Mutex<Seen>,
}

/// Where a null endpoint listens.
#[derive(Debug, Serialize, Deserialize)]
pub struct Address {
    /// Streams and the replica.
    pub null: String,
    /// The embedded server behind it.
    pub behind: String,
}

/// Serves until the standard input is closed; prints where.
pub async fn serve(load: Load, round_trip: Duration) -> Result<(), Error> {
    let embedded = EmbeddedServer::start().await?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let null = Arc::new(Null {
        template: Template::new(load),
        load,
        round_trip,
        client: Client::builder(TokioExecutor::new()).build(connector),
        upstream: embedded.endpoint_url().parse()?,
        asked: Mutex::default(),
        begins: Notify::new(),
        begun: Mutex::default(),
        written: AtomicU64::new(0),
        shards_done: AtomicU64::new(0),
        seen: Mutex::default(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = Address {
        null: format!("http://{}", listener.local_addr()?),
        behind: embedded.endpoint_url(),
    };
    println!("{}", serde_json::to_string(&address)?);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let _ = stream.set_nodelay(true);
                    let null = Arc::clone(&null);
                    tokio::spawn(async move {
                        let service = service_fn(move |request| Arc::clone(&null).answer(request));
                        let connection = hyper::server::conn::http1::Builder::new();
                        // A client that hangs up is nothing to report.
                        let _ = connection
                            .serve_connection(TokioIo::new(stream), service)
                            .await;
                    });
                }
                Err(error) => eprintln!("the null endpoint's port: {error}"),
            }
        }
    });
    let closed = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(closed).await??;
    Ok(())
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Null {
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Error> {
        if request.method() != Method::POST {
            let seen = serde_json::to_vec(&*locked(&self.seen))?;
            return Ok(Response::new(Full::new(seen.into())));
        }
        let (parts, body) = request.into_parts();
        let target = parts.headers.get("x-amz-target");
        let target = target.and_then(|target| target.to_str().ok()).unwrap_or("");
        let operation = target.rsplit('.').next().unwrap_or("").to_owned();
        let body = body.collect().await?.to_bytes();
        self.count(&operation);
        if !self.round_trip.is_zero() {
            tokio::time::sleep(self.round_trip).await;
        }
        let answer = match operation.as_str() {
            "BatchWriteItem" | "PutItem" | "DeleteItem" if self.is_replica(&body) => {
                self.write(&body)
            }
            "GetRecords" => self.records(&body).await?,
            "GetShardIterator" => iterator(&body)?,
            "DescribeStream" => self.describe(&body)?,
            _ => return self.pass_on(parts.headers, body).await,
        };
        let mut response = Response::new(Full::new(answer));
        let json = hyper::header::HeaderValue::from_static("application/x-amz-json-1.0");
        let headers = response.headers_mut();
        headers.insert(hyper::header::CONTENT_TYPE, json);
        Ok(response)
    }

    fn count(&self, operation: &str) {
        let mut seen = locked(&self.seen);
        if seen.begun && seen.took_us.is_none() {
            *seen.calls.entry(operation.to_owned()).or_default() += 1;
        }
    }

    /// The state table is behind.
    fn is_replica(&self, body: &[u8]) -> bool {
        let name = format!("\"{}\"", crate::TARGET_TABLE);
        memchr::memmem::find(body, name.as_bytes()).is_some()
    }

    fn write(&self, body: &[u8]) -> Bytes {
        let puts = match memchr::memmem::find_iter(body, b"Request\":").count() {
            0 => 1,
            puts => puts as u64,
        };
        let written = self.written.fetch_add(puts, Relaxed) + puts;
        let lasts = memchr::memmem::find_iter(body, LAST_MARK).count() as u64;
        let done = self.shards_done.fetch_add(lasts, Relaxed) + lasts;
        if lasts > 0 || written >= self.load.writes_min() {
            let mut seen = locked(&self.seen);
            seen.written = written;
            if done >= self.load.shards
                && written >= self.load.writes_min()
                && seen.took_us.is_none()
                && let Some(begun) = *locked(&self.begun)
            {
                seen.took_us = Some(begun.elapsed().as_micros() as u64);
            }
        }
        Bytes::from_static(br#"{"UnprocessedItems":{}}"#)
    }

    async fn records(&self, body: &[u8]) -> Result<Bytes, Error> {
        let asked: Value = serde_json::from_slice(body)?;
        let iterator = asked["ShardIterator"].as_str().unwrap_or("");
        let limit = asked["Limit"].as_u64().unwrap_or(1_000);
        let (shard, first) = iterator.split_once(':').ok_or("a strange iterator")?;
        let (shard, first) = (shard.parse()?, first.parse()?);
        let limit = if self.has_begun(shard).await {
            limit
        } else {
            0
        };
        Ok(self.template.page(shard, first, limit))
    }

    /// Whether all shards were asked for a page; waits a while for it.
    async fn has_begun(&self, shard: u64) -> bool {
        if locked(&self.begun).is_some() {
            return true;
        }
        let begins = self.begins.notified();
        let all = {
            let mut asked = locked(&self.asked);
            asked.insert(shard);
            asked.len() as u64 >= self.load.shards
        };
        if !all {
            return tokio::time::timeout(GATHERING_MAX, begins).await.is_ok();
        }
        locked(&self.begun).get_or_insert_with(Instant::now);
        locked(&self.seen).begun = true;
        self.begins.notify_waiters();
        true
    }

    fn describe(&self, body: &[u8]) -> Result<Bytes, Error> {
        let asked: Value = serde_json::from_slice(body)?;
        let shards = match asked["ShardFilter"].is_null() {
            true => (0..self.load.shards)
                .map(|shard| {
                    json!({
                        "ShardId": format!("shardId-{shard:020}"),
                        "SequenceNumberRange": {"StartingSequenceNumber": "1"},
                    })
                })
                .collect(),
            // All are open: none has children.
            false => Vec::new(),
        };
        Ok(Bytes::from(serde_json::to_vec(
            &json!({"StreamDescription": {
                "StreamArn": asked["StreamArn"],
                "StreamStatus": "ENABLED",
                "StreamViewType": "NEW_AND_OLD_IMAGES",
                "TableName": crate::SOURCE_TABLE,
                "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
                "Shards": shards,
            }}),
        )?))
    }

    async fn pass_on(
        &self,
        headers: hyper::HeaderMap,
        body: Bytes,
    ) -> Result<Response<Full<Bytes>>, Error> {
        let mut request = Request::post(&self.upstream).body(Full::new(body))?;
        *request.headers_mut() = headers;
        for own in [HOST, CONTENT_LENGTH] {
            request.headers_mut().remove(own);
        }
        let (parts, body) = self.client.request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(parts, Full::new(body)))
    }
}

fn iterator(body: &[u8]) -> Result<Bytes, Error> {
    let asked: Value = serde_json::from_slice(body)?;
    let shard = asked["ShardId"].as_str().unwrap_or("");
    let shard: u64 = shard.trim_start_matches("shardId-").parse()?;
    let first = match asked["SequenceNumber"].as_str() {
        Some(sequence) => Template::after(sequence),
        None => 0,
    };
    let answer = json!({"ShardIterator": format!("{shard}:{first}")});
    Ok(Bytes::from(serde_json::to_vec(&answer)?))
}
