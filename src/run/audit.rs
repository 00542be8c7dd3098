//! The audit: each table is compared with its replica, for ever and gently, by the same join that
//! `reconcile` uses. It finds what nobody else would: a bug, or somebody who writes to the replica. It
//! repairs nothing.
//!
//! A pass is a job whose segments stand in the state table: one worker of the fleet reads at a time,
//! and what it leaves another goes on with. The last pass that ended keeps its row, which says what it
//! found; [`super::rows`] tells metrics and readiness from it.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::context::Shared;
use super::doubts::keep_expired;
use crate::backoff::Backoff;
use crate::config::Table;
use crate::dynamo::clock::rfc3339;
use crate::dynamo::table::{describe, primary_key};
use crate::error::{Fault, Operation};
use crate::jobs::reconcile::desk::{self, Desk};
use crate::jobs::reconcile::flow::FlowSource;
use crate::jobs::reconcile::place::Place;
use crate::jobs::reconcile::report::Counts;
use crate::jobs::reconcile::strategy::Strategy;
use crate::jobs::reconcile::{Ended, Found, Reconcile, segments_of};
use crate::lease::hold::Terms;
use crate::lease::row::{FORMAT_VERSION, ReconcileRow, comparison_rows, comparisons};
use crate::lease::table::Written;
use crate::repair::Unfinished;

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
    let job = job(shared, table, plan.clone(), stop).await?;
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
    let Some(next) = next(shared, table, number, verified, now_ms).await? else {
        return Ok(None);
    };
    // What is left of one of that name, from before somebody removed it, is none of it.
    for row in segments.iter().filter(|row| row.job == next.job) {
        shared.state.delete_key(&row.lease_key).await?;
    }
    // Of several workers one begins it, and the others take part as its row says.
    if shared.state.create(&next).await? == Written::Refused {
        return shared.state.reconcile(&next.lease_key).await;
    }
    let terms = terms(shared);
    let old = |job: &&crate::lease::row::Progress<'_>| {
        job.plan.epoch < shared.epoch || job.plan.audit_pass().is_some_and(|n| n + 1 < number)
    };
    for job in comparisons(&plans, &segments).iter().filter(old) {
        desk::remove(&terms, job).await?;
    }
    Ok(Some(next))
}

/// The row of a pass that is to begin. `None` while a table is not there.
async fn next(
    shared: &Shared,
    table: &Table,
    number: u64,
    verified_at_ms: Option<i64>,
    now_ms: i64,
) -> Result<Option<ReconcileRow>, Fault> {
    let (source, target) = (&shared.source, &shared.target);
    let from = describe(&source.tables, table.name_in(&source.label)).await?;
    let to = describe(&target.tables, table.name_in(&target.label)).await?;
    let (Some(from), Some(to)) = (from, to) else {
        return Ok(None);
    };
    let bytes = from.table_size_bytes.max(to.table_size_bytes);
    let items = from.item_count.unwrap_or_default() + to.item_count.unwrap_or_default();
    let job = ReconcileRow::audit_job(shared.epoch, number);
    Ok(Some(ReconcileRow {
        lease_key: ReconcileRow::key(&job, &table.name),
        entity_type: "reconcile".to_owned(),
        format_version: FORMAT_VERSION,
        epoch: shared.epoch,
        job,
        table: table.name.clone(),
        order: 0,
        source: source.label.clone(),
        target: target.label.clone(),
        apply: false,
        strategy: Strategy::Mirror.to_string(),
        max_deletes: "0".to_owned(),
        segments: segments_of(bytes.unwrap_or_default()),
        items: u64::try_from(items).unwrap_or_default(),
        at: rfc3339(now_ms),
        at_ms: now_ms,
        lease_counter: 0,
        until: 0,
        // Its row stays when it has ended: the next pass and the fleet want to know.
        joined: 2,
        ended: None,
        ended_at_ms: None,
        verified_at_ms,
        too_many_deletes: None,
    }))
}

fn terms(shared: &Shared) -> Terms {
    Terms {
        state: shared.state.clone(),
        clock: Arc::clone(&shared.target.clock),
        duration: shared.config.leases.duration,
        // It writes nothing that could.
        late_effect: Duration::ZERO,
    }
}

async fn job(
    shared: &Shared,
    table: &Table,
    plan: ReconcileRow,
    stop: &CancellationToken,
) -> Result<Reconcile, String> {
    let config = &shared.config;
    let stop = stop.child_token();
    let units = Some(config.audit.read_units_per_second);
    let (source, target) = (&shared.source, &shared.target);
    let name = table.name_in(&source.label);
    let described = describe(&source.tables, name).await;
    let described = described
        .map_err(|fault| fault.to_string())?
        .ok_or("the source table is not there")?;
    let key_names: Vec<String> = primary_key(&described)
        .into_iter()
        .map(|part| part.name)
        .collect();
    let keep_expired = keep_expired(shared, table).await.map_err(|why| match why {
        Unfinished::Failed(fault) => fault.to_string(),
        _ => "the time to live of the source table is not known".to_owned(),
    })?;
    let memory = config.reconcile.memory.as_u64().min(MEMORY_MAX);
    let patience = config.leases.duration * 2;
    Ok(Reconcile {
        table: table.name.clone(),
        source: Arc::new(Place::new(
            source,
            name,
            Operation::ReadSource,
            units,
            &stop,
        )),
        target: Arc::new(Place::new(
            target,
            table.name_in(&target.label),
            Operation::ReadReplica,
            units,
            &stop,
        )),
        key_names: key_names.into(),
        keep_expired,
        segments: plan.segments,
        desk: Desk::Shared(Box::new(desk::Shared {
            plan,
            terms: terms(shared),
            me: shared.owner.clone(),
            one_at_a_time: true,
            stop: stop.clone(),
        })),
        at_once: 1,
        wait: config.leases.duration,
        memory: usize::try_from(memory).unwrap_or(usize::MAX),
        settle: config.reconcile.settle,
        flow: Some(FlowSource::new(
            shared.state.clone(),
            shared.epoch,
            patience,
        )),
        strategy: Strategy::Mirror,
        repairs: None,
        lines: None,
        stop,
        found: Arc::new(Found::default()),
        lost: AtomicU32::new(0),
    })
}
