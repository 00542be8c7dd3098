//! One reader of the state table for the whole worker: everybody else looks at its snapshots.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::dynamo::clock::uptime;
use crate::lease::row::{
    ControlRow, DoubtRow, GapRow, PauseRow, Row, ShardRow, StreamRow, WorkerRow,
};
use crate::lease::rules::Observer;
use crate::lease::table::StateTable;
use crate::mutation::trouble;
use crate::observe::health::{Health, Scope};
use crate::observe::pulse::Pulse;

/// The state table as read at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Leases.
    pub shards: Vec<ShardRow>,
    /// Streams.
    pub streams: Vec<StreamRow>,
    /// Processes of the fleet, dead ones as well.
    pub workers: Vec<WorkerRow>,
    /// Ranges in doubt.
    pub doubts: Vec<DoubtRow>,
    /// Closed taps.
    pub pauses: Vec<PauseRow>,
    /// Which region is active.
    pub control: Option<ControlRow>,
    /// When the reading of it began.
    pub begun: Option<Instant>,
    /// The same moment by [`uptime`], which runs on while the machine is suspended.
    pub begun_uptime: Option<Duration>,
    /// Keys of the leases that may be taken.
    pub takeable: HashSet<String>,
    /// Whether it has been read at all.
    pub read: bool,
}

/// Reads the state table again and again, and at once when `rescan` asks.
pub async fn watch_rows(
    state: StateTable,
    duration: Duration,
    snapshots: Arc<watch::Sender<Arc<Snapshot>>>,
    rescan: Arc<Notify>,
    health: Arc<Health>,
) {
    let mut observer = Observer::default();
    let pulse = Pulse::start(&health, "", "rows");
    loop {
        pulse.beat();
        trouble("rows").await;
        let (begun, begun_uptime) = (Instant::now(), uptime());
        // A third of a lease: an expired one is seen within 4/3 of its duration. After a failure
        // sooner: taps close once the last reading is a lease old.
        let mut pause = duration / 3;
        match state.rows().await {
            Ok(rows) => {
                health.succeeded(Scope::State, "", "rows");
                let mut snapshot = digest(rows, &mut observer, duration, &health);
                snapshot.begun = Some(begun);
                snapshot.begun_uptime = Some(begun_uptime);
                health.rows_read(begun);
                snapshots.send_replace(Arc::new(snapshot));
            }
            Err(fault) => {
                health.failed(Scope::State, "", "rows", &fault);
                pause = duration / 10;
            }
        }
        tokio::select! {
            () = rescan.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

fn digest(
    rows: Vec<Row>,
    observer: &mut Observer,
    duration: Duration,
    health: &Health,
) -> Snapshot {
    let mut snapshot = Snapshot {
        read: true,
        ..Snapshot::default()
    };
    let mut gaps: Vec<GapRow> = Vec::new();
    for row in rows {
        match row {
            Row::Shard(row) => snapshot.shards.push(row),
            Row::Stream(row) => snapshot.streams.push(row),
            Row::Gap(row) => gaps.push(row),
            Row::Worker(row) => snapshot.workers.push(row),
            Row::Doubt(row) => snapshot.doubts.push(row),
            Row::Pause(row) => snapshot.pauses.push(row),
            Row::Control(row) => snapshot.control = Some(row),
            Row::Other(_) => {}
        }
    }
    health.set_gaps(
        gaps.iter()
            .map(|gap| (gap.table.as_str(), gap.reason, gap.lease_key.as_str())),
    );
    let now = Instant::now();
    observer.observe(snapshot.shards.iter(), now);
    snapshot.takeable = snapshot
        .shards
        .iter()
        .filter(|row| !row.is_finished() && observer.is_takeable(row, duration, now))
        .map(|row| row.lease_key.clone())
        .collect();
    snapshot
}
