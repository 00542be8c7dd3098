//! Who reads which segment. Alone, one after the other; with rows in the state table, several processes
//! share a job, and what one leaves another takes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Ended;
use super::report::Counts;
use crate::backoff::Backoff;
use crate::dynamo::clock::rfc3339;
use crate::error::{Fault, Policy};
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::{Progress, ReconcileRow, Row, SegmentRow};
use crate::lease::rules::take_name;
use crate::lease::table::Written;
use crate::mutation::crash;

const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long the state table is waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// Where segments are dealt out.
pub enum Desk {
    /// Nobody else takes part, and nothing is stored.
    Alone(AtomicU32),
    /// By rows of the state table.
    Shared(Box<Shared>),
}

/// A job whose segments stand in the state table.
pub struct Shared {
    /// What was asked for.
    pub plan: ReconcileRow,
    /// How segments are held.
    pub terms: Terms,
    /// This process start.
    pub me: String,
    /// Whether one segment is read at a time, whoever reads it.
    pub one_at_a_time: bool,
    /// Ends it.
    pub stop: CancellationToken,
}

/// What there is to do for this process.
pub(super) enum Claim {
    /// This segment, from its beginning, held by nobody.
    Alone(u32),
    /// This segment, as its row says.
    Held(Arc<Hold<SegmentRow>>),
    /// Nothing: all are read.
    Nothing,
    /// Nothing now: others are at work.
    Others,
}

/// The rows of a job.
pub(super) struct Rows {
    /// `None`: somebody has ended it, and its rows are gone.
    pub(super) plan: Option<ReconcileRow>,
    pub(super) segments: BTreeMap<u32, SegmentRow>,
    /// What is left of a job of the same name.
    stale: BTreeMap<u32, SegmentRow>,
}

impl Rows {
    /// What was found, by all processes.
    pub(super) fn counts(&self) -> Counts {
        let counts = self.segments.values().map(|row| &row.counts);
        counts.fold(Counts::default(), |sum, one| sum + one)
    }

    /// Items of the target, and those that only it has; `None` until all of it is read.
    pub(super) fn scanned(&self, segments: u32) -> Option<(u64, u64)> {
        let mut sum = (0, 0);
        for number in 0..segments {
            let (items, extra) = self.segments.get(&number)?.scanned?;
            sum = (sum.0 + items, sum.1 + extra);
        }
        Some(sum)
    }

    pub(super) fn is_done(&self, segments: u32) -> bool {
        (0..segments).all(|number| self.segments.get(&number).is_some_and(|row| row.done))
    }
}

impl Desk {
    /// The next segment to read. `mine`: those in the hands of this process.
    pub(super) async fn claim(&self, segments: u32, mine: &[u32]) -> Result<Claim, Ended> {
        match self {
            Desk::Alone(next) => {
                let number = next.fetch_add(1, Ordering::Relaxed);
                Ok(match number < segments {
                    true => Claim::Alone(number),
                    false => Claim::Nothing,
                })
            }
            Desk::Shared(shared) => shared.claim_to_read(mine).await,
        }
    }
}

impl Shared {
    pub(super) fn failed(&self, fault: Fault) -> Ended {
        Ended::Failed {
            subject: format!("the state table {}", self.terms.state.name()),
            fault,
        }
    }

    /// Whether `row` is the plan of this job, and not of one that began anew under its name.
    fn is_this(&self, row: &ReconcileRow) -> bool {
        row.lease_key == self.plan.lease_key && row.at_ms == self.plan.at_ms
    }

    /// The rows as they are now.
    pub(super) async fn rows(&self) -> Result<Rows, Ended> {
        let all = self.read_all().await?;
        let mut rows = Rows {
            plan: None,
            segments: BTreeMap::new(),
            stale: BTreeMap::new(),
        };
        for row in all {
            match row {
                Row::Reconcile(row) if self.is_this(&row) => rows.plan = Some(row),
                Row::Segment(row) if row.is_of(&self.plan) => {
                    rows.segments.insert(row.number, row);
                }
                Row::Segment(row) if row.job == self.plan.job && row.table == self.plan.table => {
                    rows.stale.insert(row.number, row);
                }
                _ => {}
            }
        }
        Ok(rows)
    }

    /// All rows. What passes by itself is waited for.
    async fn read_all(&self) -> Result<Vec<Row>, Ended> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let begun = Instant::now();
        loop {
            match self.terms.state.rows().await {
                Ok(rows) => return Ok(rows),
                Err(fault) if fault.policy() == Policy::Retry && begun.elapsed() < PATIENCE => {
                    tracing::debug!(code = fault.code, "the state table did not answer");
                }
                Err(fault) => return Err(self.failed(fault)),
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = self.stop.cancelled() => return Err(Ended::Stopped),
            }
        }
    }

    /// The next one to read: never begun, given back, or of one whose writes are dead.
    async fn claim_to_read(&self, mine: &[u32]) -> Result<Claim, Ended> {
        let rows = self.rows().await?;
        if rows.plan.as_ref().is_none_or(|plan| plan.ended.is_some()) {
            return Ok(Claim::Nothing);
        }
        let now_ms = self.terms.clock.now_ms();
        let is_held = |row: &SegmentRow| row.lease_owner.is_some() && row.until > now_ms;
        if self.one_at_a_time && rows.segments.values().any(is_held) {
            return Ok(Claim::Others);
        }
        let mut others = false;
        for number in 0..self.plan.segments {
            if mine.contains(&number) {
                continue;
            }
            if let Some(stale) = rows.stale.get(&number) {
                let swept = sweep(&self.terms, &[stale]).await;
                swept.map_err(|fault| self.failed(fault))?;
            }
            let held = match rows.segments.get(&number) {
                None => {
                    let row = SegmentRow::new(&self.plan, number, now_ms);
                    Hold::create(self.terms.clone(), row, self.holder()).await
                }
                Some(row) if row.done || (row.scanned.is_some() && row.is_whole()) => continue,
                Some(row) => {
                    // What its owner had in hand is read once more.
                    let row = SegmentRow {
                        scanned: None,
                        ..row.clone()
                    };
                    self.take(row).await
                }
            };
            // Whether it was taken is not known: it is anybody's once it has ended.
            let held = match held {
                Err(fault) if fault.policy() == Policy::Retry => None,
                held => held.map_err(|fault| self.failed(fault))?,
            };
            match held {
                Some(hold) => return self.is_open(hold).await,
                None if self.one_at_a_time => return Ok(Claim::Others),
                None => others = true,
            }
        }
        Ok(match others {
            true => Claim::Others,
            false => Claim::Nothing,
        })
    }

    /// A segment of a job that has ended meanwhile is none.
    async fn is_open(&self, hold: Arc<Hold<SegmentRow>>) -> Result<Claim, Ended> {
        let plan = self.terms.state.reconcile(&self.plan.lease_key).await;
        if matches!(&plan, Ok(Some(plan)) if plan.ended.is_none() && self.is_this(plan)) {
            return Ok(Claim::Held(hold));
        }
        if plan.is_ok() {
            let _ = hold.finish().await;
            return Ok(Claim::Nothing);
        }
        hold.give_back().await;
        Ok(Claim::Others)
    }

    /// Takes a row if nobody may be at it.
    pub(super) async fn take(
        &self,
        row: SegmentRow,
    ) -> Result<Option<Arc<Hold<SegmentRow>>>, Fault> {
        if row.lease_owner.is_some() && row.until > self.terms.clock.now_ms() {
            return Ok(None);
        }
        // One that still has its owner died in the middle of something.
        let row = SegmentRow {
            dirty: row.dirty || row.lease_owner.is_some(),
            ..row
        };
        Hold::take(self.terms.clone(), row, self.holder()).await
    }

    fn holder(&self) -> String {
        take_name(&self.me, rand::random())
    }

    /// Says what came of the job, or removes it where nobody else wants to know.
    pub(super) async fn end(
        &self,
        rows: Rows,
        too_many: Option<(u64, u64)>,
    ) -> Result<(Counts, Option<(u64, u64)>), Ended> {
        let state = &self.terms.state;
        let counts = rows.counts();
        let mut plan = rows.plan;
        loop {
            let Some(known) = plan else {
                return Err(Ended::Gone);
            };
            if let Some(counts) = known.ended {
                return Ok((counts, known.too_many_deletes));
            }
            // Before it has ended: nobody would close them then.
            if too_many.is_none() && known.closes_gaps(&counts) {
                self.close(&known)
                    .await
                    .map_err(|fault| self.failed(fault))?;
            }
            let counter = known.lease_counter;
            let ended = ReconcileRow {
                ended: Some(counts.clone()),
                ended_at_ms: Some(self.terms.clock.now_ms()),
                too_many_deletes: too_many,
                lease_counter: counter + 1,
                ..known
            };
            let written = state.replace(&ended, counter).await;
            if written.map_err(|fault| self.failed(fault))? == Written::Yes {
                // Where rows stay behind somebody cleans them up later.
                if self.forget(&rows.segments, &ended).await.is_err() {
                    tracing::debug!(job = ended.job, "rows of a job that has ended stay");
                }
                return Ok((counts, too_many));
            }
            // Somebody has joined, or says that he is still here; or an earlier attempt took effect.
            let read = state.reconcile(&ended.lease_key).await;
            let read = read.map_err(|fault| self.failed(fault))?;
            plan = read.filter(|plan| self.is_this(plan));
        }
    }

    /// Closes the gaps that the job was begun after. One that was found again since stays open.
    async fn close(&self, plan: &ReconcileRow) -> Result<(), Fault> {
        for gap in &plan.closes {
            let closed = self.terms.state.close_gap(&gap.key, gap.counter).await?;
            let (table, gap) = (&plan.table, &gap.key);
            match closed {
                Written::Yes => tracing::info!(table, gap, "gap closed: nothing differs any more"),
                Written::Refused => {
                    tracing::info!(table, gap, "found again since, the gap stays open");
                }
            }
        }
        crash("gap-closed");
        Ok(())
    }

    async fn forget(
        &self,
        segments: &BTreeMap<u32, SegmentRow>,
        plan: &ReconcileRow,
    ) -> Result<(), Fault> {
        let state = &self.terms.state;
        for row in segments.values() {
            state.delete(row).await?;
        }
        if plan.joined < 2 {
            state.delete(plan).await?;
        }
        Ok(())
    }
}

/// Says, until `done`, that somebody is at the jobs with these plans, so that nobody begins another one.
pub async fn stay(terms: &Terms, plans: &[String], done: &CancellationToken) {
    loop {
        for plan in plans {
            is_here(terms, plan).await;
        }
        tokio::select! {
            () = done.cancelled() => return,
            () = tokio::time::sleep(terms.duration / 3) => {}
        }
    }
}

/// Moves a plan's `until` on. Another process that does the same at the same moment is as good.
async fn is_here(terms: &Terms, plan: &str) {
    let Ok(Some(plan)) = terms.state.reconcile(plan).await else {
        return;
    };
    if plan.ended.is_some() {
        return;
    }
    let known = plan.lease_counter;
    let ahead_ms = terms.duration.as_millis() as i64 * 2;
    let plan = ReconcileRow {
        until: plan.until.max(terms.clock.now_ms() + ahead_ms),
        lease_counter: known + 1,
        ..plan
    };
    let _ = terms.state.replace(&plan, known).await;
}

/// Removes a comparison from the state table, unless somebody has changed it since: its plan first, so that
/// nobody takes part any more.
///
/// # Errors
/// The fault of the call.
pub async fn remove(terms: &Terms, job: &Progress<'_>) -> Result<(), Fault> {
    if terms.state.delete(job.plan).await? == Written::Yes {
        sweep(terms, &job.segments).await?;
    }
    Ok(())
}

/// Has a comparison that has ended begin anew, unless somebody has changed it since.
///
/// # Errors
/// The fault of the call.
pub async fn begin_anew(terms: &Terms, job: &Progress<'_>) -> Result<(), Fault> {
    let known = job.plan;
    let now_ms = terms.clock.now_ms().max(known.at_ms + 1);
    let plan = ReconcileRow {
        ended: None,
        ended_at_ms: None,
        too_many_deletes: None,
        // Whoever is still at the one before takes no part in this one.
        at_ms: now_ms,
        at: rfc3339(now_ms),
        lease_counter: known.lease_counter + 1,
        ..known.clone()
    };
    let replaced = terms.state.replace(&plan, known.lease_counter).await?;
    if replaced == Written::Yes {
        sweep(terms, &job.segments).await?;
    }
    Ok(())
}

/// Removes segments that nobody needs. One that is held stays: what its holder writes may take effect yet.
///
/// # Errors
/// The fault of the call.
pub async fn sweep(terms: &Terms, segments: &[&SegmentRow]) -> Result<(), Fault> {
    let now_ms = terms.clock.now_ms();
    for row in segments {
        if row.lease_owner.is_none() || row.until < now_ms {
            terms.state.delete(*row).await?;
        }
    }
    Ok(())
}
