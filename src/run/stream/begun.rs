//! Where a stream begins: from which moment on it is read, and what has to be copied or compared for that to be all.

use super::Stream;
use crate::config::Start;
use crate::dynamo::RegionClients;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Fault, Operation};
use crate::lease::row::{
    ControlRow, FORMAT_VERSION, GapReason, GapRow, JobKind, StreamRow, shard_key,
};
use crate::lease::table::record_gap;
use crate::mutation::crash;
use crate::run::job::{Wanted, plan_of};
use crate::run::rows::Snapshot;
use crate::stream::{ShardId, stream_label};

/// How much earlier than asked a start by time begins: stream times are whole seconds, and the
/// source's clock is known to two.
const LATEST_MARGIN_MS: i64 = 3_000;

impl Stream {
    /// The row that says where the first run of this stream started, made if it is not there.
    pub(super) async fn stream_row(&self, snapshot: &Snapshot) -> Result<StreamRow, Fault> {
        let context = &self.context;
        let shared = &context.shared;
        let table = &context.table;
        let key = StreamRow::key(shared.epoch, &table.name, &context.stream_arn);
        if let Some(row) = snapshot.streams.iter().find(|row| row.lease_key == key) {
            return Ok(row.clone());
        }
        // The snapshot may be older than the row.
        if let Some(row) = shared.state.stream(&key).await? {
            return Ok(row);
        }
        let of_table = snapshot
            .streams
            .iter()
            .filter(|row| row.table == table.name);
        let seen_before = of_table
            .clone()
            .any(|row| row.is_of(shared.epoch, &table.name));
        // Or this region was active itself: what it holds was never a copy.
        let here = |active: &str| active == shared.target.label;
        let was_active = snapshot.control.as_ref().is_some_and(|c| here(&c.active));
        let returned = snapshot
            .control
            .as_ref()
            .filter(|control| control.epoch == shared.epoch)
            .filter(|control| control.has_returned(&shared.target.label));
        let had_another_source = of_table.count() > 0 || was_active || returned.is_some();
        // Resolved before the source is looked at, and a little early: what is written in between
        // is either seen there or replayed. Too early is right, too late is not.
        let clock = shared.source.clock.reading();
        let begun_ms = clock.map_or(0, |clock| clock.now_ms - clock.error_ms);
        let came_home = returned.and_then(ControlRow::begun_ms);
        let start_timestamp = match table.start {
            // A re-created stream is read from its beginning.
            _ if seen_before => None,
            // What the source held at the fence came from here.
            _ if came_home.is_some() => came_home.map(|ms| ms - LATEST_MARGIN_MS),
            Start::TrimHorizon => None,
            Start::Latest => Some(shared.source.clock.now_ms() - LATEST_MARGIN_MS),
            Start::At(time) => Some(time.to_millis().unwrap_or(0) - LATEST_MARGIN_MS),
        };
        // The gap, or the job, is durable before anything that would hide it.
        let label = stream_label(&context.stream_arn);
        if seen_before {
            // Nothing of before the new stream is older than what the old one had proven.
            let applied_until = shared.proven_of_table(&table.name);
            self.gap(GapReason::StreamRecreated, label, None, applied_until)
                .await?;
        } else if had_another_source {
            self.gap(GapReason::SourceSwitched, label, None, None)
                .await?;
        } else {
            let (source, target) = (&shared.source, &shared.target);
            let (from, to) = tokio::try_join!(self.is_empty(source), self.is_empty(target))?;
            match (table.bootstrap, from && to) {
                (_, true) => {}
                (true, false) => self.plan_bootstrap().await?,
                (false, false) if from => {}
                (false, false) => {
                    self.gap(GapReason::NeverCopied, label, None, None).await?;
                }
            }
        }
        crash("bootstrap-planned");
        let row = StreamRow {
            lease_key: key,
            entity_type: "stream".to_owned(),
            format_version: FORMAT_VERSION,
            table: table.name.clone(),
            stream_arn: context.stream_arn.clone(),
            table_id: self.table_id.clone(),
            start_timestamp,
            initialised: false,
            finished: false,
            begun_at: Some(begun_ms),
            settled: false,
        };
        shared.state.create(&row).await?;
        crash("stream-pinned");
        // Somebody else may have been faster: what is stored counts.
        let stored = shared.state.stream(&row.lease_key).await?;
        Ok(stored.unwrap_or(row))
    }

    pub(super) async fn gap(
        &self,
        reason: GapReason,
        detail: &str,
        shard: Option<&ShardId>,
        applied_until: Option<i64>,
    ) -> Result<(), Fault> {
        let shared = &self.context.shared;
        let at = rfc3339(host_ms());
        let (table, arn) = (&self.context.table.name, &self.context.stream_arn);
        let mut gap = GapRow::new(shared.epoch, table, reason, detail, at)
            .found(shared.source.clock.now_ms())
            .applied_until(applied_until);
        if let Some(shard) = shard {
            gap = gap.awaiting(shard_key(shared.epoch, table, arn, shard));
        }
        record_gap(&shared.state, &gap).await?;
        shared.rescan.notify_one();
        Ok(())
    }

    /// Stores that the table is to be copied. Whoever finds that stored already takes part.
    async fn plan_bootstrap(&self) -> Result<(), Fault> {
        let (shared, table) = (&self.context.shared, &self.context.table);
        let wanted = Wanted {
            kind: JobKind::Bootstrap,
            apply: true,
            closes: Vec::new(),
            verified_at_ms: None,
        };
        let plan = plan_of(shared, table, wanted).await?;
        shared.state.create(&plan).await?;
        shared.rescan.notify_one();
        Ok(())
    }

    async fn is_empty(&self, region: &RegionClients) -> Result<bool, Fault> {
        let answer = region
            .tables
            .scan()
            .table_name(self.context.table.name_in(&region.label))
            .limit(1)
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| crate::error::classify(Operation::Scan, &error))?;
        // A page that is empty and goes on proves nothing.
        Ok(answer.count == 0 && answer.last_evaluated_key.is_none_or(|key| key.is_empty()))
    }
}
