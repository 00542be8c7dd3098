//! Who reads which segment. Alone, one after the other; with rows in the state table, several processes
//! share a job, and what one leaves another takes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Ended;
use super::report::Counts;
use crate::error::Fault;
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::{Progress, ReconcileRow, Row, SegmentRow};
use crate::lease::rules::take_name;

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

    /// The rows as they are now.
    pub(super) async fn rows(&self) -> Result<Rows, Ended> {
        let all = self.terms.state.rows().await;
        let all = all.map_err(|fault| self.failed(fault))?;
        let mut rows = Rows {
            plan: None,
            segments: BTreeMap::new(),
        };
        for row in all {
            match row {
                Row::Reconcile(row) if row.lease_key == self.plan.lease_key => {
                    rows.plan = Some(row);
                }
                Row::Segment(row) if row.job == self.plan.job && row.table == self.plan.table => {
                    rows.segments.insert(row.number, row);
                }
                _ => {}
            }
        }
        Ok(rows)
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
            let held = match rows.segments.get(&number) {
                None => {
                    let row = SegmentRow::new(&self.plan.job, &self.plan.table, number);
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
            match held.map_err(|fault| self.failed(fault))? {
                Some(hold) => return Ok(Claim::Held(hold)),
                None if self.one_at_a_time => return Ok(Claim::Others),
                None => others = true,
            }
        }
        Ok(match others {
            true => Claim::Others,
            false => Claim::Nothing,
        })
    }

    /// Takes a row if nobody may be at it.
    pub(super) async fn take(
        &self,
        row: SegmentRow,
    ) -> Result<Option<Arc<Hold<SegmentRow>>>, Fault> {
        if row.lease_owner.is_some() && row.until > self.terms.clock.now_ms() {
            return Ok(None);
        }
        Hold::take(self.terms.clone(), row, self.holder()).await
    }

    fn holder(&self) -> String {
        take_name(&self.me, rand::random())
    }

    /// Says what came of the job, or removes it where nobody else wants to know; and with it what
    /// others left that died before it.
    pub(super) async fn end(
        &self,
        rows: &Rows,
        counts: &Counts,
        too_many: Option<(u64, u64)>,
    ) -> Result<(), Fault> {
        let Some(plan) = &rows.plan else {
            return Ok(());
        };
        let state = &self.terms.state;
        let known = plan.lease_counter;
        let ended = ReconcileRow {
            ended: Some(counts.clone()),
            ended_at_ms: Some(self.terms.clock.now_ms()),
            too_many_deletes: too_many,
            lease_counter: known + 1,
            ..plan.clone()
        };
        state.replace(&ended, known).await?;
        for row in rows.segments.values() {
            state.delete_key(&row.lease_key).await?;
        }
        if plan.joined < 2 {
            state.delete_key(&plan.lease_key).await?;
        }
        Ok(())
    }
}

/// Removes a comparison from the state table, segments first: without its plan nobody sees them.
///
/// # Errors
/// The fault of the call.
pub async fn remove(terms: &Terms, job: &Progress<'_>) -> Result<(), Fault> {
    for row in &job.segments {
        terms.state.delete_key(&row.lease_key).await?;
    }
    terms.state.delete_key(&job.plan.lease_key).await?;
    Ok(())
}
