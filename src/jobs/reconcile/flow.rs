//! How far the flow from source to target is, asked for by all who look at suspects.

use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::Ended;
use super::judge::{Flow, FlowWatch};
use crate::error::Policy;
use crate::lease::row::Row;
use crate::lease::table::StateTable;

/// The state table is asked no more often.
const ASKED_EVERY: Duration = Duration::from_millis(500);

/// How the flow from source to target is asked after.
pub struct FlowSource {
    /// The state table in the target's region.
    state: StateTable,
    epoch: u64,
    /// A worker whose rows stand still for so long is dead.
    patience: Duration,
    heeds_doubts: bool,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    watch: FlowWatch,
    last: Option<(Instant, Flow)>,
}

impl FlowSource {
    /// By the rows of `state`, in the epoch of this number. A worker whose rows stand still for
    /// `patience` is dead.
    pub fn new(state: StateTable, epoch: u64, patience: Duration) -> Self {
        Self {
            state,
            epoch,
            patience,
            heeds_doubts: true,
            known: Mutex::default(),
        }
    }

    /// As if nothing were in doubt: for who only deletes by key, and need not say what was a difference.
    #[must_use]
    pub fn beside_doubts(self) -> Self {
        Self {
            heeds_doubts: false,
            ..self
        }
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// How far the changes of `table` were applied a moment ago.
    pub(super) async fn ask(&self, table: &str) -> Result<Flow, Ended> {
        let mut known = self.known.lock().await;
        if let Some((at, flow)) = known.last
            && at.elapsed() < ASKED_EVERY
        {
            return Ok(flow);
        }
        let now = Instant::now();
        let flow = match self.state.rows().await {
            Ok(rows) if !self.heeds_doubts => {
                let rows: Vec<Row> = rows
                    .into_iter()
                    .filter(|row| !matches!(row, Row::Doubt(_)))
                    .collect();
                known
                    .watch
                    .see(&rows, self.epoch, table, now, self.patience)
            }
            Ok(rows) => known
                .watch
                .see(&rows, self.epoch, table, now, self.patience),
            // Nothing is called different because the state table did not answer for a moment.
            Err(fault) if fault.policy() == Policy::Retry => {
                tracing::debug!(code = fault.code, "the state table did not answer");
                Flow::Unknown
            }
            Err(fault) => {
                return Err(Ended::Failed {
                    subject: format!("the state table {}", self.state.name()),
                    fault,
                });
            }
        };
        known.last = Some((now, flow));
        Ok(flow)
    }
}
