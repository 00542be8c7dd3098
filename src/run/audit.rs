//! The audit: each table is compared with its replica, for ever and gently, by the same join that
//! `reconcile` uses. It finds what nobody else would: a bug, or somebody who writes to the replica. It
//! repairs nothing.
//!
//! A pass is a job whose segments stand in the state table: one worker of the fleet reads at a time,
//! and what it leaves another goes on with. The last pass that ended keeps its row, which says what it
//! found; [`super::rows`] tells metrics and readiness from it.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::context::Shared;
use super::job::{How, Wanted, build, plan_of, terms};
use crate::backoff::Backoff;
use crate::config::Table;
use crate::error::Fault;
use crate::jobs::reconcile::Ended;
use crate::jobs::reconcile::desk;
use crate::jobs::reconcile::report::Counts;
use crate::lease::row::{JobKind, ReconcileRow, comparison_rows, comparisons};
use crate::lease::table::Written;

/// Passes begin no more often: so many lease durations apart.
const PASS_LEASES: u32 = 6;
/// A worker does not give an audit more memory than this.
const MEMORY_MAX: u64 = 32 << 20;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Compares `table` with its replica until `stop`, if the configuration wants it.
pub async fn audit(shared: Arc<Shared>, table: Table, stop: CancellationToken) {
    if shared.config.audit.read_units_per_second == 0 {
        return;
    }
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while !stop.is_cancelled() {
        let pause = match pass(&shared, &table, &stop).await {
            Ok(()) => {
                backoff.reset();
                shared.config.leases.duration
            }
            Err(why) => {
                // Its row stands: it is gone on with.
                tracing::info!(table = table.name, why, "a pass of the audit was cut short");
                backoff.pause()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
    }
}

/// Takes part in the pass under way, or begins one if it is time.
async fn pass(shared: &Shared, table: &Table, stop: &CancellationToken) -> Result<(), String> {
    let said = |fault: Fault| fault.to_string();
    // One table at a time in each worker: neither memory nor read units nor looks at the state table grow
    // with the tables.
    let turn = tokio::select! {
        turn = shared.audits.acquire() => turn,
        () = stop.cancelled() => return Ok(()),
    };
    let Ok(_turn) = turn else { return Ok(()) };
    let Some(plan) = plan(shared, table).await.map_err(said)? else {
        return Ok(());
    };
    let units = Some(shared.config.audit.read_units_per_second);
    let how = How {
        units,
        one_at_a_time: true,
        memory_max: MEMORY_MAX,
        repairs: None,
    };
    let job = build(shared, table, plan.clone(), how, stop);
    let job = job.await.map_err(said)?;
    match job.run().await {
        Ok(counts) => {
            tell(table, &plan, &counts);
            Ok(())
        }
        Err((_, Ended::Stopped | Ended::Gone)) => Ok(()),
        Err((_, Ended::Failed { subject, fault })) => Err(format!("{subject}: {fault}")),
        Err((_, Ended::Lost)) => Err("its row was not renewed in time".to_owned()),
        Err((_, Ended::File(error))) => Err(error.to_string()),
        // It writes nothing.
        Err((_, Ended::TooManyDeletes { .. } | Ended::Unverified)) => Ok(()),
    }
}

fn tell(table: &Table, plan: &ReconcileRow, counts: &Counts) {
    let (different, unsettled) = (counts.different(), counts.unsettled);
    let (table, job, items) = (&table.name, &plan.job, counts.source_items);
    if different + unsettled == 0 {
        tracing::info!(table, job, items, "audit: the replica equals its source");
    } else {
        tracing::warn!(
            table,
            job,
            items,
            missing = counts.missing,
            changed = counts.changed,
            extra = counts.extra,
            unsettled,
            "audit: the replica does not equal its source"
        );
    }
}

/// The pass under way; a new one, if the last one began long enough ago. `None`: not yet.
async fn plan(shared: &Shared, table: &Table) -> Result<Option<ReconcileRow>, Fault> {
    let (mut plans, mut segments) = comparison_rows(shared.state.rows().await?);
    plans.retain(|row| row.table == table.name && row.audit_pass().is_some());
    segments.retain(|row| row.table == table.name);
    let current = |plan: &&ReconcileRow| plan.epoch == shared.epoch;
    let last = plans
        .iter()
        .filter(current)
        .max_by_key(|plan| plan.audit_pass());
    let now_ms = shared.target.clock.now_ms();
    let number = match last {
        Some(last) if last.ended.is_none() => return Ok(Some(last.clone())),
        Some(last) => {
            let apart = shared.config.leases.duration * PASS_LEASES;
            if last.at_ms + apart.as_millis() as i64 > now_ms {
                return Ok(None);
            }
            last.audit_pass().unwrap_or_default() + 1
        }
        None => 1,
    };
    let verified = last.and_then(ReconcileRow::verified_ms);
    let wanted = Wanted {
        kind: JobKind::Audit(number),
        apply: false,
        closes: Vec::new(),
        verified_at_ms: verified,
    };
    let next = plan_of(shared, table, wanted).await?;
    // What is left of one of that name, from before somebody removed it, is none of it.
    let terms = terms(shared, Duration::ZERO);
    let left = segments.iter().filter(|row| row.job == next.job);
    desk::sweep(&terms, &left.collect::<Vec<_>>()).await?;
    // Of several workers one begins it, and the others take part as its row says.
    if shared.state.create(&next).await? == Written::Refused {
        return shared.state.reconcile(&next.lease_key).await;
    }
    let old = |job: &&crate::lease::row::Progress<'_>| {
        job.plan.epoch < shared.epoch || job.plan.audit_pass().is_some_and(|n| n + 1 < number)
    };
    for job in comparisons(&plans, &segments).iter().filter(old) {
        desk::remove(&terms, job).await?;
    }
    Ok(Some(next))
}
