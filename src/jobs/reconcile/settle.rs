//! Looks at suspects until they are settled, and repairs those that differ.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use futures::stream::StreamExt;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::judge::{Flow, FlowWatch, Held, Kind, Suspicion, Verdict};
use super::report::Line;
use super::spill::Spill;
use super::{Ended, Reconcile, Repairs};
use crate::apply::batch::BATCH_OPS_MAX;
use crate::dynamo::clock::host_ms;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::BATCH_KEYS_MAX;
use crate::dynamo::value::Item;
use crate::error::{Operation, Policy};
use crate::repair::{self, Repairer, Unfinished};

/// Suspects looked at in turns.
const OPEN_MAX: usize = 20_000;
/// Calls of one turn on each side.
const CALLS_AT_ONCE: usize = 4;
/// Looks fit into the time to settle so often.
const LOOKS_IN_SETTLE: u32 = 2;
/// How long a key is looked at before it counts as unsettled: so many times to settle, and until a dead
/// worker is known to be dead.
const PATIENT_SETTLES: u32 = 12;
const PATIENT_FLOWS: u32 = 3;
/// Keys remembered as judged; with more, they are forgotten and may be reported twice.
const JUDGED_MAX: usize = 500_000;
/// The state table is asked for the flow no more often.
const FLOW_EVERY: Duration = Duration::from_millis(500);
/// Batches repaired at once.
const REPAIRS_AT_ONCE: usize = 4;
/// Keys gathered before they are repaired.
const REPAIRS_MAX: usize = 500;
/// How often keys that were written and not verified are repaired again.
const VERIFY_ROUNDS: u32 = 3;

pub(super) struct Settler<'a> {
    job: &'a Reconcile,
    watch: FlowWatch,
    flow: Option<(Instant, Flow)>,
    fresh: VecDeque<ItemKey>,
    /// Looked at before, in the order in which they are to be looked at again.
    waiting: VecDeque<Open>,
    differ: Vec<ItemKey>,
    /// Those that are being looked at: one look may not name a key twice.
    open: HashSet<Digest>,
    /// Those that were called different: where the two sides come in other orders a key may be a
    /// suspect twice.
    judged: HashSet<Digest>,
    rest: Rest<'a>,
}

struct Open {
    key: ItemKey,
    suspicion: Suspicion,
    due: Instant,
}

/// What one look saw.
struct Look {
    open: Open,
    source: Option<Item>,
    target: Option<Item>,
}

impl<'a> Settler<'a> {
    pub(super) fn new(job: &'a Reconcile) -> Result<Self, Ended> {
        Ok(Self {
            job,
            watch: FlowWatch::default(),
            flow: None,
            fresh: VecDeque::new(),
            waiting: VecDeque::new(),
            differ: Vec::new(),
            open: HashSet::new(),
            judged: HashSet::new(),
            rest: Rest {
                job,
                extra: match job.repairs {
                    Some(_) => Some(Spill::new().map_err(Ended::File)?),
                    None => None,
                },
                unverified: Vec::new(),
            },
        })
    }

    /// Settles what comes until nothing comes any more. Returns what is left to do then.
    pub(super) async fn run(
        mut self,
        mut suspects: mpsc::Receiver<ItemKey>,
    ) -> Result<Rest<'a>, Ended> {
        loop {
            if self.job.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            let mut is_over = false;
            while self.fresh.len() + self.waiting.len() < OPEN_MAX {
                match suspects.try_recv() {
                    Ok(key) => self.take_in(key),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        is_over = true;
                        break;
                    }
                }
            }
            let due = self.take_due();
            if !due.is_empty() {
                self.look(due).await?;
                continue;
            }
            if self.waiting.is_empty() && is_over {
                self.repair_differing().await?;
                return Ok(self.rest);
            }
            if !self.differ.is_empty() {
                self.repair_differing().await?;
                continue;
            }
            let next = self.waiting.front().map(|open| open.due);
            let pause = next.map_or(Duration::from_secs(3_600), |due| {
                due.saturating_duration_since(Instant::now())
            });
            let wanted = !is_over && self.waiting.len() < OPEN_MAX;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.job.stop.cancelled() => {}
                key = suspects.recv(), if wanted => if let Some(key) = key {
                    self.take_in(key);
                },
            }
        }
    }

    fn take_in(&mut self, key: ItemKey) {
        let digest = Digest::of_key(&key);
        if !self.judged.contains(&digest) && self.open.insert(digest) {
            self.fresh.push_back(key);
        }
    }

    fn take_due(&mut self) -> Vec<Open> {
        let now = Instant::now();
        let mut due = Vec::new();
        while due.len() < BATCH_KEYS_MAX * CALLS_AT_ONCE {
            if self.waiting.front().is_some_and(|open| open.due <= now) {
                due.extend(self.waiting.pop_front());
            } else if let Some(key) = self.fresh.pop_front() {
                due.push(Open {
                    key,
                    suspicion: Suspicion::default(),
                    due: now,
                });
            } else {
                break;
            }
        }
        due
    }

    async fn look(&mut self, due: Vec<Open>) -> Result<(), Ended> {
        let at_ms = self.job.source.region().clock.now_ms();
        // Before the target is read.
        let flow = self.flow().await?;
        let mut batches = Vec::new();
        let mut due = due.into_iter().peekable();
        while due.peek().is_some() {
            batches.push(due.by_ref().take(BATCH_KEYS_MAX).collect::<Vec<Open>>());
        }
        let looks = try_join_all(batches.into_iter().map(|batch| self.read(batch))).await?;
        for look in looks.into_iter().flatten() {
            self.judge(look, at_ms, flow)?;
        }
        if self.differ.len() >= REPAIRS_MAX {
            self.repair_differing().await?;
        }
        Ok(())
    }

    async fn read(&self, batch: Vec<Open>) -> Result<Vec<Look>, Ended> {
        let keys: Vec<ItemKey> = batch.iter().map(|open| open.key.clone()).collect();
        // The source first: what the target holds is at least as new then, where changes flow.
        let mut source = self.by_key(self.job.source.get(&keys).await?);
        let mut target = self.by_key(self.job.target.get(&keys).await?);
        let look = |open: Open| Look {
            source: source.remove(&open.key),
            target: target.remove(&open.key),
            open,
        };
        Ok(batch.into_iter().map(look).collect())
    }

    fn by_key(&self, items: Vec<Item>) -> HashMap<ItemKey, Item> {
        let items = items.into_iter();
        items.map(|item| (self.job.key_of(&item), item)).collect()
    }

    fn judge(&mut self, look: Look, at_ms: i64, flow: Flow) -> Result<(), Ended> {
        let Look {
            mut open,
            source,
            target,
        } = look;
        let id = Digest::of_key(&open.key);
        if let (None, Some(item), Some(keep)) = (&source, &target, &self.job.keep_expired)
            && keep.keeps(item, host_ms())
        {
            self.open.remove(&id);
            return Ok(());
        }
        let held = |item: &Option<Item>| match item {
            None => Held::Nothing,
            Some(item) => Held::Item(Digest::of_item(item)),
        };
        let (from, to) = (held(&source), held(&target));
        let patience_ms = self.patience().as_millis() as i64;
        let Some(verdict) = open.suspicion.look(from, to, at_ms, flow, patience_ms) else {
            // Not in step with anything that happens at even intervals.
            let pause = self.job.settle.mul_f64(rand::random_range(0.9..1.1));
            open.due = Instant::now() + pause / LOOKS_IN_SETTLE;
            self.waiting.push_back(open);
            return Ok(());
        };
        self.open.remove(&id);
        let kind = match verdict {
            Verdict::Equal => return Ok(()),
            Verdict::Differs(kind) => {
                self.job.found.counts().differs(kind);
                Some(kind)
            }
            Verdict::Unsettled => {
                self.job.found.counts().unsettled += 1;
                None
            }
        };
        if self.judged.len() >= JUDGED_MAX {
            self.judged.clear();
        }
        self.judged.insert(id);
        if let Some(lines) = &self.job.lines {
            let keys = open.key.to_keys();
            let of = |item: &Item| {
                let parts = item.iter().filter(|(name, _)| keys.contains_key(*name));
                parts.map(|(n, v)| (n.clone(), v.clone())).collect::<Item>()
            };
            // As the tables spell it.
            let key = source
                .as_ref()
                .or(target.as_ref())
                .map_or_else(|| keys.clone(), of);
            let line = Line {
                table: &self.job.table,
                key: &key,
                kind,
                source: (from, source.as_ref()),
                target: (to, target.as_ref()),
            };
            lines.write(&line).map_err(Ended::File)?;
        }
        match (kind, &self.job.repairs) {
            (Some(Kind::Extra), Some(_)) => {
                if let Some(extra) = &mut self.rest.extra {
                    extra.push(&open.key).map_err(Ended::File)?;
                }
            }
            (Some(_), Some(_)) => self.differ.push(open.key),
            _ => {}
        }
        Ok(())
    }

    async fn repair_differing(&mut self) -> Result<(), Ended> {
        let keys = std::mem::take(&mut self.differ);
        self.rest.repair(keys).await
    }

    fn patience(&self) -> Duration {
        let flow = self
            .job
            .flow
            .as_ref()
            .map_or(Duration::ZERO, |flow| flow.patience);
        self.job.settle * PATIENT_SETTLES + flow * PATIENT_FLOWS
    }

    async fn flow(&mut self) -> Result<Flow, Ended> {
        let Some(source) = &self.job.flow else {
            return Ok(Flow::Still);
        };
        if let Some((at, flow)) = self.flow
            && at.elapsed() < FLOW_EVERY
        {
            return Ok(flow);
        }
        let now = Instant::now();
        let flow = match source.state.rows().await {
            Ok(rows) => {
                let (epoch, table) = (source.epoch, &self.job.table);
                self.watch.see(&rows, epoch, table, now, source.patience)
            }
            // Nothing is called different because the state table did not answer for a moment.
            Err(fault) if fault.policy() == Policy::Retry => {
                tracing::debug!(code = fault.code, "the state table did not answer");
                Flow::Unknown
            }
            Err(fault) => {
                return Err(Ended::Failed {
                    subject: format!("the state table {}", source.state.name()),
                    fault,
                });
            }
        };
        self.flow = Some((now, flow));
        Ok(flow)
    }
}

/// What is left to do once both tables are scanned.
pub(super) struct Rest<'a> {
    job: &'a Reconcile,
    /// Keys to delete at the end.
    extra: Option<Spill>,
    /// Keys that were written and not verified: their last write may come to nothing good.
    unverified: Vec<ItemKey>,
}

impl Rest<'_> {
    /// Deletes what only the target has, if that is not too much, and repairs again what was not
    /// verified.
    pub(super) async fn finish(mut self) -> Result<(), Ended> {
        let Some(repairs) = &self.job.repairs else {
            return Ok(());
        };
        let extra = self.extra.as_ref().map_or(0, Spill::keys);
        let allowed = repairs.max_deletes.of(self.job.target.items());
        if let Some(spilled) = self.extra.take()
            && extra <= allowed
        {
            let mut keys = Vec::with_capacity(REPAIRS_MAX);
            for key in spilled.read().map_err(Ended::File)? {
                keys.push(key.map_err(Ended::File)?);
                if keys.len() >= REPAIRS_MAX {
                    self.repair(std::mem::take(&mut keys)).await?;
                }
            }
            self.repair(keys).await?;
        }
        self.verify(repairs).await?;
        match extra > allowed {
            true => Err(Ended::TooManyDeletes { extra, allowed }),
            false => Ok(()),
        }
    }

    /// Repairs again, once every write of before is dead.
    async fn verify(&mut self, repairs: &Repairs) -> Result<(), Ended> {
        for _ in 0..VERIFY_ROUNDS {
            if self.unverified.is_empty() {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(repairs.late_effect) => {}
                () = self.job.stop.cancelled() => return Err(Ended::Stopped),
            }
            let keys = std::mem::take(&mut self.unverified);
            self.job.found.counts().unverified -= keys.len() as u64;
            self.repair(keys).await?;
        }
        Ok(())
    }

    /// Makes items as the source has them.
    async fn repair(&mut self, keys: Vec<ItemKey>) -> Result<(), Ended> {
        let Some(repairs) = &self.job.repairs else {
            return Ok(());
        };
        // All that began come to their ends, whatever becomes of one: what was written is verified.
        let failed = AtomicBool::new(false);
        let repaired: Vec<Repaired> = futures::stream::iter(keys.chunks(BATCH_OPS_MAX))
            .map(async |chunk| {
                if failed.load(Ordering::Relaxed) {
                    return Repaired::default();
                }
                let repaired = repair_chunk(self.job, repairs, chunk).await;
                failed.fetch_or(repaired.ended.is_some(), Ordering::Relaxed);
                repaired
            })
            .buffer_unordered(REPAIRS_AT_ONCE)
            .collect()
            .await;
        let mut ended = None;
        for repaired in repaired {
            self.job.found.counts().unverified += repaired.unverified.len() as u64;
            self.unverified.extend(repaired.unverified);
            ended = ended.or(repaired.ended);
        }
        ended.map_or(Ok(()), Err)
    }
}

/// How the repair of a few keys came out.
#[derive(Default)]
struct Repaired {
    unverified: Vec<ItemKey>,
    ended: Option<Ended>,
}

/// Repairs a few keys.
async fn repair_chunk(job: &Reconcile, repairs: &Repairs, keys: &[ItemKey]) -> Repaired {
    match repair_once(job, repairs, keys).await {
        // One hot key must not keep its neighbours.
        (Err(Unfinished::Unsettled), _) if keys.len() > 1 => {
            let mut all = Repaired::default();
            for key in keys {
                let one = std::slice::from_ref(key);
                let (repaired, _) = repair_once(job, repairs, one).await;
                // Whatever was written above is verified by this one, or is not.
                let repaired = note(job, one, repaired, true);
                all.unverified.extend(repaired.unverified);
                all.ended = all.ended.or(repaired.ended);
            }
            all
        }
        (repaired, wrote) => note(job, keys, repaired, wrote),
    }
}

/// Repairs a few keys, and says whether anything was written, or may have been.
async fn repair_once(
    job: &Reconcile,
    repairs: &Repairs,
    keys: &[ItemKey],
) -> (Result<repair::Repaired, Unfinished>, bool) {
    // Each is read on both sides, and in the source once more.
    let units = u32::try_from(keys.len()).unwrap_or(u32::MAX);
    tokio::join!(job.source.pace(units * 2), job.target.pace(units));
    let wrote = AtomicBool::new(false);
    let repairer = Repairer {
        source: (&job.source.region().tables, job.source.table()),
        replica: (&job.target.region().tables, job.target.table()),
        writer: &repairs.writer,
        bound: Arc::clone(&repairs.hold) as _,
        stop: &job.stop,
        keep_expired: job.keep_expired.clone(),
        wrote: Some(&wrote),
    };
    let repaired = repairer.repair(keys.iter().map(ItemKey::to_keys)).await;
    (repaired, wrote.into_inner())
}

fn note(
    job: &Reconcile,
    keys: &[ItemKey],
    repaired: Result<repair::Repaired, Unfinished>,
    wrote: bool,
) -> Repaired {
    let ended = match repaired {
        Ok(repaired) => {
            let refused = repaired.refused.len() as u64;
            let mut counts = job.found.counts();
            counts.repaired += keys.len() as u64 - refused;
            counts.refused += refused;
            for refused in &repaired.refused {
                tracing::warn!(
                    table = job.table,
                    class = refused.fault.class.label(),
                    code = refused.fault.code,
                    "the target refuses an item of the source"
                );
            }
            return Repaired::default();
        }
        Err(Unfinished::Unsettled) => None,
        Err(Unfinished::Unanswered(fault)) => {
            tracing::warn!(
                table = job.table,
                keys = keys.len(),
                code = fault.code,
                "a write was not answered: its keys are repaired again once it is dead"
            );
            None
        }
        Err(Unfinished::Failed(fault)) => Some(Ended::Failed {
            subject: match fault.operation {
                Operation::ReadSource => job.source.name(),
                _ => job.target.name(),
            },
            fault,
        }),
        Err(Unfinished::Stopped) => Some(match job.stop.is_cancelled() {
            true => Ended::Stopped,
            false => Ended::Lost,
        }),
    };
    let unverified = match wrote {
        true => keys.to_vec(),
        false => Vec::new(),
    };
    Repaired { unverified, ended }
}
