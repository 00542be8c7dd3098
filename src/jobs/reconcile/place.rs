//! One of the two tables: reading it within its budget, and waiting for what passes by itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::Ended;
use crate::apply::budget::Budget;
use crate::backoff::Backoff;
use crate::dynamo::RegionClients;
use crate::dynamo::item::ItemKey;
use crate::dynamo::read::{BATCH_KEYS_MAX, ScanPage, batch_get, scan_page};
use crate::dynamo::value::Item;
use crate::error::{Fault, Operation, Policy};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a call that fails in a way that passes by itself is made again: what was read so far is
/// worth some patience.
const PATIENCE: Duration = Duration::from_secs(300);

/// One of the two tables.
pub struct Place {
    region: RegionClients,
    table: String,
    /// What reading it by key is called in errors.
    reading: Operation,
    budget: RwLock<(Option<u32>, Arc<Budget>)>,
    /// Thousandths of read units spent so far.
    milliunits: AtomicU64,
    stop: CancellationToken,
}

impl Place {
    /// The table `table`, read with `units_per_second` at most (`None`: without a limit).
    pub fn new(
        region: &RegionClients,
        table: &str,
        reading: Operation,
        units_per_second: Option<u32>,
        stop: &CancellationToken,
    ) -> Self {
        Self {
            region: region.clone(),
            table: table.to_owned(),
            reading,
            budget: RwLock::new((units_per_second, Arc::new(Budget::new(units_per_second)))),
            milliunits: AtomicU64::new(0),
            stop: stop.clone(),
        }
    }

    /// Reads with so many units per second from now on: others share what there is.
    pub fn set_units(&self, units_per_second: Option<u32>) {
        let mut budget = self.budget.write().unwrap_or_else(PoisonError::into_inner);
        if budget.0 != units_per_second {
            *budget = (units_per_second, Arc::new(Budget::new(units_per_second)));
        }
    }

    fn budget(&self) -> Arc<Budget> {
        let budget = self.budget.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&budget.1)
    }

    /// The region's clients.
    pub fn region(&self) -> &RegionClients {
        &self.region
    }

    /// The table's name there.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// What it is called in messages.
    pub fn name(&self) -> String {
        format!("{} in {}", self.table, self.region.label)
    }

    /// The page of `segment` (of so many) that begins after `after`.
    pub async fn scan(&self, segment: (i32, i32), after: Option<Item>) -> Result<ScanPage, Ended> {
        let table = (&self.region.tables, self.table.as_str());
        let page = self
            .patiently(|| scan_page(table, segment, after.clone(), None).boxed())
            .await?;
        self.pay(page.units).await;
        Ok(page)
    }

    /// The items under `keys`, read consistently, and the read units that it took.
    pub async fn get(&self, keys: &[ItemKey]) -> Result<(Vec<Item>, f64), Ended> {
        let mut units = 0.0;
        let table = (&self.region.tables, self.table.as_str());
        let mut left: Vec<Item> = keys.iter().map(ItemKey::to_keys).collect();
        let mut found = Vec::with_capacity(keys.len());
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while !left.is_empty() {
            let now = left.len().min(BATCH_KEYS_MAX);
            let got = self
                .patiently(|| batch_get(self.reading, table, &left[..now]).boxed())
                .await?;
            self.pay(got.units).await;
            units += got.units;
            if !got.left.is_empty() {
                tokio::time::sleep(backoff.pause()).await;
            }
            found.extend(got.items);
            left.drain(..now);
            left.extend(got.left);
        }
        Ok((found, units))
    }

    /// Pays after the fact: what a read costs is known only then.
    async fn pay(&self, units: f64) {
        let milliunits = (units * 1_000.0).round() as u64;
        let before = self.milliunits.fetch_add(milliunits, Ordering::Relaxed);
        // Whole units as they come together, so that halves are neither lost nor doubled.
        let whole = (before + milliunits) / 1_000 - before / 1_000;
        self.pace(u32::try_from(whole).unwrap_or(u32::MAX)).await;
    }

    /// Waits until so many units may be spent.
    pub(super) async fn pace(&self, units: u32) {
        let budget = self.budget();
        tokio::select! {
            () = budget.spend(units) => {}
            () = self.stop.cancelled() => {}
        }
    }

    async fn patiently<'a, T>(
        &self,
        call: impl Fn() -> BoxFuture<'a, Result<T, Fault>>,
    ) -> Result<T, Ended> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        let mut failing: Option<Instant> = None;
        loop {
            if self.stop.is_cancelled() {
                return Err(Ended::Stopped);
            }
            match call().await {
                Ok(answer) => return Ok(answer),
                Err(fault) => {
                    let since = *failing.get_or_insert_with(Instant::now);
                    if fault.policy() != Policy::Retry || since.elapsed() >= PATIENCE {
                        return Err(Ended::Failed {
                            subject: self.name(),
                            fault,
                        });
                    }
                    tracing::debug!(code = fault.code, "a read is tried again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }
}
