//! The way of a call: log, faults, effect, answer.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::HeaderMap;
use serde::Deserialize;
use tokio::sync::oneshot;

use super::admission::{self, Admitted};
use super::clock::signature_seconds;
use super::faults::Subject;
use super::held::{Delivered, HeldWrite, Release};
use super::iterator::Iterator;
use super::log::{Call, Outcome};
use super::protocol::{self, Answer, Failure};
use super::region::Region;
use super::rules::{After, HoldPlan, Plan, Refusal};
use super::touched::{Touched, table_name, touched};
use super::{streams, tables};

pub(crate) const EPOCH_HEADER: &str = crate::lease::term::EPOCH_HEADER;

/// What the client gets.
#[derive(Debug)]
pub(crate) enum Ending {
    Answer(Answer),
    /// The answer breaks off in the middle.
    Broken(Answer),
    /// The connection breaks.
    Cut,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) operation: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// Carries a call out to its end, whether its client still waits or not: as in AWS, what has
/// arrived takes effect even if nobody hears of it.
pub(crate) async fn run(region: Arc<Region>, request: Request, client: oneshot::Sender<Ending>) {
    let way = Way::new(&region, request, client);
    way.go().await;
}

struct Way<'r> {
    region: &'r Arc<Region>,
    request: Request,
    touched: Touched,
    shard: Option<String>,
    number: u64,
    was_held: bool,
    /// None once the client was answered or hung up on.
    client: Option<oneshot::Sender<Ending>>,
}

impl<'r> Way<'r> {
    fn new(region: &'r Arc<Region>, request: Request, client: oneshot::Sender<Ending>) -> Self {
        let operation = &request.operation;
        let (touched, shard) = if protocol::is_streams(operation) {
            streams_touched(&request.body)
        } else {
            let sizes = region.options.metered || region.rules.meters();
            let schema = |table: &str| region.schema(table);
            (touched(operation, &request.body, &schema, sizes), None)
        };
        let epoch = request.headers.get(EPOCH_HEADER);
        let epoch = epoch
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let number = region.log.arrive(|number, arrived| Call {
            number,
            arrived,
            ended: None,
            operation: operation.clone(),
            tables: touched.tables.clone(),
            keys: touched.keys.clone(),
            shard: shard.clone(),
            epoch,
            outcome: Outcome::Pending,
            effect: None,
            units: 0.0,
            unprocessed: 0,
            faults: Vec::new(),
        });
        Self {
            region,
            request,
            touched,
            shard,
            number,
            was_held: false,
            client: Some(client),
        }
    }

    fn subject(&self) -> Subject<'_> {
        Subject {
            operation: &self.request.operation,
            tables: &self.touched.tables,
            keys: &self.touched.keys,
            shard: self.shard.as_deref(),
        }
    }

    fn signed(&self) -> Option<i64> {
        let date = self.request.headers.get("x-amz-date")?;
        signature_seconds(date.to_str().ok()?)
    }

    async fn go(mut self) {
        let half_trip = Duration::from_micros(self.region.round_trip_us.load(Relaxed) / 2);
        pause(half_trip).await;
        let mut plan = self.region.rules.plan(&self.subject(), self.signed());
        if !plan.names.is_empty() {
            let names = std::mem::take(&mut plan.names);
            self.region
                .log
                .update(self.number, |call| call.faults = names);
        }
        pause(plan.delay).await;
        if let Some(refusal) = plan.refusal.take() {
            pause(half_trip).await;
            self.end(match refusal {
                Refusal::Failure(failure) => Ending::Answer(failure.answer()),
                Refusal::Cut => Ending::Cut,
            });
            return;
        }
        let mut released = None;
        if let Some(hold) = plan.hold.take() {
            match self.hold(hold).await {
                Release::Abandoned => return,
                Release::ByTest(told) => released = Some(told),
                Release::ByTime => {}
            }
        }
        // What waited grew older meanwhile; anything else was judged just now.
        let stale = if self.was_held || !plan.delay.is_zero() {
            self.region.rules.stale(&self.subject(), self.signed())
        } else {
            None
        };
        let answer = match stale {
            Some(failure) => failure.answer(),
            None => self.execute(&mut plan).await,
        };
        self.tell(released, &answer);
        pause(plan.slow).await;
        pause(half_trip).await;
        let effect = answer.is_ok();
        self.end(match plan.after {
            Some(After::Failure(failure)) if effect => Ending::Answer(failure.answer()),
            Some(After::Cut) if effect => Ending::Cut,
            Some(After::CutWithin) if effect => Ending::Broken(answer),
            _ => Ending::Answer(answer),
        });
    }

    /// Keeps a write back.
    async fn hold(&mut self, hold: HoldPlan) -> Release {
        let write = HeldWrite {
            call: self.number,
            operation: self.request.operation.clone(),
            keys: self.touched.keys.clone(),
        };
        if hold.hang_up {
            self.end(Ending::Cut);
        }
        self.was_held = true;
        self.region.held.wait(write, hold.time).await
    }

    /// Tells whoever released a held write what became of it.
    fn tell(&self, released: Option<oneshot::Sender<Delivered>>, answer: &Answer) {
        if let Some(released) = released {
            let told = match &answer.code {
                None if answer.is_ok() => Ok(()),
                code => Err(code.clone().unwrap_or_else(|| answer.status.to_string())),
            };
            // Whoever released it may have stopped waiting.
            let _ = released.send(told);
        }
    }

    async fn execute(&self, plan: &mut Plan) -> Answer {
        let operation = self.request.operation.as_str();
        let (headers, body) = (&self.request.headers, &self.request.body);
        let answer = if protocol::is_streams(operation) {
            self.execute_streams(plan).await
        } else if tables::concerns(operation) {
            tables::serve(self.region, operation, headers, body.clone()).await
        } else if protocol::is_write(operation) {
            self.execute_write(plan).await
        } else {
            self.execute_read(plan).await
        };
        if answer.is_ok() {
            let at = self.region.log.elapsed();
            self.region
                .log
                .update(self.number, |call| call.effect = Some(at));
        }
        answer
    }

    async fn execute_streams(&self, plan: &mut Plan) -> Answer {
        let region = Arc::clone(self.region);
        let operation = self.request.operation.clone();
        let body = self.request.body.clone();
        let rules = self.region.rules.concerning(&self.subject());
        let page = std::mem::take(&mut plan.page);
        let serve = move || streams::serve(&region, &operation, &body, &rules, &page);
        let served = tokio::task::spawn_blocking(serve).await;
        // It fails only if the call panicked, which has been logged by then.
        served.unwrap_or_else(|_| Failure::internal().answer())
    }

    async fn execute_read(&self, plan: &Plan) -> Answer {
        let (headers, body) = (&self.request.headers, &self.request.body);
        let batch = self.request.operation == "BatchGetItem";
        let part = batch.then(|| admission::leave_keys(body, &self.touched, plan));
        let Some((body, left)) = part.flatten() else {
            return self.region.upstream.send(headers, body.clone()).await;
        };
        self.charge(0.0, left.count);
        let answer = self.region.upstream.send(headers, body).await;
        admission::with_left(answer, &left)
    }

    async fn execute_write(&self, plan: &Plan) -> Answer {
        let shared = self.region.gate.read().await;
        let Request {
            operation,
            headers,
            body,
        } = &self.request;
        let admitted = admission::admit(self.region, operation, body, &self.touched, plan).await;
        let answer = match admitted {
            Admitted::All { units } => {
                self.charge(units, 0);
                let answer = self.region.upstream.send(headers, body.clone()).await;
                admission::with_units(answer, &self.touched, units)
            }
            Admitted::Part { body, left, units } => {
                self.charge(units, left.count);
                let answer = self.region.upstream.send(headers, body).await;
                let answer = admission::with_units(answer, &self.touched, units);
                admission::with_left(answer, &left)
            }
            Admitted::None(failure) => {
                self.charge(0.0, self.touched.writes.len());
                failure.answer()
            }
        };
        drop(shared);
        answer
    }

    /// Notes what a write used up and how many of its items had to stay behind.
    fn charge(&self, units: f64, behind: usize) {
        if units > 0.0 || behind > 0 {
            self.region.log.update(self.number, |call| {
                call.units = units;
                call.unprocessed = behind;
            });
        }
    }

    /// Answers the client, once.
    fn end(&mut self, ending: Ending) {
        let Some(client) = self.client.take() else {
            return;
        };
        let outcome = match &ending {
            Ending::Answer(answer) => Outcome::Answered {
                status: answer.status,
                code: answer.code.clone(),
            },
            Ending::Broken(_) | Ending::Cut => Outcome::Cut,
        };
        let at = self.region.log.elapsed();
        self.region.log.update(self.number, |call| {
            call.outcome = outcome;
            call.ended = Some(at);
        });
        // The client may be gone; its call took effect all the same.
        let _ = client.send(ending);
    }
}

async fn pause(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

/// Table and shard of a call of the Streams API.
fn streams_touched(body: &[u8]) -> (Touched, Option<String>) {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Names {
        stream_arn: Option<String>,
        shard_id: Option<String>,
        shard_iterator: Option<String>,
        table_name: Option<String>,
    }
    let mut touched = Touched::default();
    let Ok(names) = serde_json::from_slice::<Names>(body) else {
        return (touched, None);
    };
    let iterator = names.shard_iterator.as_deref().and_then(Iterator::decode);
    let (stream, shard) = match iterator {
        Some(iterator) => (Some(iterator.stream), Some(iterator.shard)),
        None => (names.stream_arn, names.shard_id),
    };
    let table = stream.or(names.table_name);
    touched
        .tables
        .extend(table.map(|table| table_name(&table).to_owned()));
    (touched, shard)
}
