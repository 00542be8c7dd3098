//! Keeps the ledger of a table in the active region, from the fence on, while another region is away.

use super::super::tail::Read;
use super::follow::{Keep, since};
use super::ledger::Ledger;
use super::store::Store;
use crate::config::Table;
use crate::dynamo::RegionClients;
use crate::dynamo::digest::Digest;
use crate::dynamo::item::ItemKey;
use crate::dynamo::table::{describe, enabled_stream};
use crate::error::{Class, Fault, Operation};
use crate::lease::row::{Track, TrackRow, UNREAD_LIMIT_MS};
use crate::stream::stream_label;

/// Keys that a ledger holds at most: some 50 MB.
pub const KEYS_MAX: usize = 1_000_000;

/// Keeps the ledger of one table.
pub struct Keeper<'a> {
    table: &'a Table,
    here: &'a RegionClients,
    store: Store,
    epoch: u64,
    /// When the epoch began, by the region's clock in milliseconds; `None` where nobody remembers.
    begun_ms: Option<i64>,
    ledger: Ledger,
}

impl<'a> Keeper<'a> {
    /// Keeps that of `table` in `here`, which became active in `epoch` at `begun_ms`.
    pub fn new(
        table: &'a Table,
        here: &'a RegionClients,
        store: Store,
        epoch: u64,
        begun_ms: Option<i64>,
    ) -> Self {
        Self {
            table,
            here,
            store,
            epoch,
            begun_ms,
            ledger: Ledger::new(KEYS_MAX),
        }
    }
}

/// The ledger of `table` as it is stored, with its row. One without a row is not whole.
///
/// # Errors
/// The fault of a call.
pub async fn load(
    store: &Store,
    place: (u64, &str),
    row: Option<&TrackRow>,
) -> Result<Ledger, Fault> {
    let pages = store.pages(place).await?;
    let mut ledger = Ledger::of(pages, row.map_or(u64::MAX, |row| row.pages), KEYS_MAX);
    if row.is_none_or(|row| row.lacks.is_some()) {
        ledger.lost();
    }
    Ok(ledger)
}

/// Whether `record` says which key it wrote, and that.
pub(super) fn key_of(record: &Read) -> Option<Digest> {
    match record {
        Ok(change) => Some(Digest::of_key(&change.key)),
        Err(bad) => bad
            .keys
            .as_ref()
            .map(|keys| Digest::of_key(&ItemKey::new(keys))),
    }
}

impl Keep for Keeper<'_> {
    const TRACK: Track = Track::Ledger;

    async fn begin(&mut self) -> Result<TrackRow, Fault> {
        let name = self.table.name_in(&self.here.label);
        let described = describe(&self.here.tables, name).await?;
        let arn = described.as_ref().and_then(enabled_stream);
        let arn = arn.map(|(arn, _)| arn.to_owned()).ok_or_else(|| {
            Fault::own(
                Operation::DescribeStream,
                Class::NotFound,
                "no stream",
                format!(
                    "table {name} in {} has no stream, and nobody can say what is written to it",
                    self.here.label
                ),
            )
        })?;
        let mut row = TrackRow::new(Track::Ledger, self.epoch, &self.table.name, &arn);
        let now_ms = self.here.clock.now_ms();
        row.begun = self.begun_ms.unwrap_or(now_ms);
        // The label of a stream is when it was made.
        let made_ms = humantime::parse_rfc3339_weak(&format!("{}Z", stream_label(&row.stream_arn)))
            .ok()
            .and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok())
            .and_then(|since| i64::try_from(since.as_millis()).ok());
        let is_younger = |ms: i64| made_ms.is_some_and(|made| made > ms);
        row.lacks = match self.begun_ms {
            Some(ms) if is_younger(ms) => {
                Some("its stream was made after this region became active".to_owned())
            }
            None => Some("nobody remembers when this region became active".to_owned()),
            Some(ms) if now_ms - ms > UNREAD_LIMIT_MS => {
                Some("it was begun long after this region became active".to_owned())
            }
            Some(_) => None,
        };
        Ok(row)
    }

    fn since_ms(&self) -> i64 {
        self.begun_ms.map_or(0, since)
    }

    async fn load(&mut self, row: &TrackRow) -> Result<(), Fault> {
        let place = (self.epoch, self.table.name.as_str());
        self.ledger = load(&self.store, place, Some(row)).await?;
        Ok(())
    }

    async fn keep(&mut self, records: Vec<Read>) -> Result<Option<String>, Fault> {
        let was_whole = self.ledger.is_whole();
        for record in &records {
            match key_of(record) {
                Some(key) => self.ledger.note(key),
                None => self.ledger.lost(),
            }
        }
        while let Some(page) = self.ledger.next_page() {
            let place = (self.epoch, self.table.name.as_str());
            if !self.store.put_page(place, &page).await? {
                return Err(Fault::own(
                    Operation::State,
                    Class::Condition,
                    "somebody else keeps the ledger",
                    "a page of its number is there already: it is read again",
                ));
            }
            self.ledger.stored(&page);
        }
        let lost = was_whole && !self.ledger.is_whole();
        Ok(lost.then(|| {
            format!("more than {KEYS_MAX} keys were written, or a record could not be read")
        }))
    }

    fn note(&self, row: &mut TrackRow) {
        row.pages = self.ledger.pages();
        row.keys = self.ledger.len() as u64;
    }

    async fn stream(&self) -> Result<Option<String>, Fault> {
        let name = self.table.name_in(&self.here.label);
        let described = describe(&self.here.tables, name).await?;
        let stream = described.as_ref().and_then(enabled_stream);
        Ok(stream.map(|(arn, _)| arn.to_owned()))
    }

    async fn compare(&mut self) -> Result<bool, Fault> {
        Ok(false)
    }
}
