//! Quarantine: what was written in a region that was active and never left it is captured, by its own worker,
//! from the positions that the other region stored at the fence to the end of the stream, and on.
//!
//! What is captured is a superset: what had been sent and not yet checkpointed is among it. Deletes by time to live
//! are none of it. What the stream has forgotten is found by comparing both tables.

use std::collections::HashMap;

use futures::{StreamExt, TryStreamExt};

use super::super::tail::Read;
use super::compare::compare;
use super::follow::Keep;
use super::store::{Store, Write};
use crate::config::{Config, Table};
use crate::dynamo::RegionClients;
use crate::dynamo::item::ItemKey;
use crate::dynamo::json::item_from_json;
use crate::dynamo::table::{describe, enabled_stream, holds_new_images};
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, Operation};
use crate::lease::row::{
    DoubtRow, GapRow, JobKind, Places, Row, ShardRow, Track, TrackRow, UNREAD_LIMIT_MS, state,
};
use crate::lease::table::StateTable;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

/// Rows written at once.
const ROWS_AT_ONCE: usize = 16;

/// Captures what is stranded in one table.
pub struct Stranding<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The table.
    pub table: &'a Table,
    /// The region in quarantine.
    pub here: &'a RegionClients,
    /// The active region.
    pub active: &'a RegionClients,
    /// The state table of the active region, which holds the positions of the fence.
    pub state: StateTable,
    /// Where it is kept.
    pub store: Store,
    /// The last epoch in which `here` was active; `None` where nobody remembers.
    pub epoch: Option<u64>,
    /// The epoch of now.
    pub now: u64,
}

/// The last write of a key among those of a round.
struct Last {
    keys: Item,
    image: Option<Item>,
    sequence: SequenceNumber,
    at_ms: i64,
    writes: u64,
}

impl Stranding<'_> {
    fn epoch(&self) -> u64 {
        self.epoch.unwrap_or(0)
    }

    fn name(&self) -> &str {
        self.table.name_in(&self.here.label)
    }
}

impl Keep for Stranding<'_> {
    const TRACK: Track = Track::Stranded;

    async fn begin(&mut self) -> Result<TrackRow, Fault> {
        let described = describe(&self.here.tables, self.name()).await?;
        let described = described.ok_or_else(|| not_there(self.name()))?;
        let stream = enabled_stream(&described).filter(|(_, view)| holds_new_images(*view));
        let arn = stream.map(|(arn, _)| arn.to_owned());
        let control = self.state.control().await?;
        if control.is_some_and(|control| control.state == state::FENCING) {
            return Err(Fault::own(
                Operation::State,
                Class::Condition,
                "the fence is not complete",
                "the positions of the fence are not final: the failover has not come to its end",
            ));
        }
        // Twice: a doubt that becomes a past one between two pages may be seen in neither form by one reading.
        let mut rows = self.state.rows().await?;
        rows.extend(self.state.rows().await?);
        let now_ms = self.here.clock.now_ms();
        let found = Found::of(rows, self.epoch(), &self.table.name, arn.as_deref());
        let mut row = TrackRow::new(
            Track::Stranded,
            self.epoch(),
            &self.table.name,
            arn.as_deref().unwrap_or_default(),
        );
        row.set_places(&found.places);
        row.lacks = found.lacks(now_ms);
        row.blind = !found.any;
        row.begun = found.proven_ms.map_or(now_ms, |ms| ms.min(now_ms));
        if self.epoch.is_none() {
            let why = "nobody remembers in which epoch this region was active";
            row.lacks = Some(why.to_owned());
        }
        match arn {
            Some(_) => Ok(row),
            None => Err(Fault::own(
                Operation::DescribeStream,
                Class::NotFound,
                "no stream",
                format!(
                    "table {} in {} has no stream of new images that could be read",
                    self.name(),
                    self.here.label
                ),
            )),
        }
    }

    fn since_ms(&self) -> i64 {
        0
    }

    async fn load(&mut self, _row: &TrackRow) -> Result<(), Fault> {
        match self.store.exists().await? {
            true => Ok(()),
            false => Err(Fault::own(
                Operation::State,
                Class::NotFound,
                "no failback table",
                format!(
                    "there is no table {} in {}, in which what is stranded is kept: create it with `farshore provision --apply`",
                    self.store.name(),
                    self.here.label
                ),
            )),
        }
    }

    async fn keep(&mut self, records: Vec<Read>) -> Result<Option<String>, Fault> {
        let mut lacks = None;
        let mut last: HashMap<ItemKey, Last> = HashMap::new();
        for record in records {
            let Ok(change) = record else {
                lacks.get_or_insert_with(|| "a record of it could not be read".to_owned());
                continue;
            };
            if change.ttl_delete {
                continue;
            }
            let image = change
                .new_image
                .as_ref()
                .map(|image| item_from_json(&image.to_value()));
            let Some(image) = image.map_or(Some(None), |image| image.map(Some)) else {
                lacks.get_or_insert_with(|| "an item of it could not be read".to_owned());
                continue;
            };
            let writes = last.get(&change.key).map_or(1, |known| known.writes + 1);
            last.insert(
                change.key,
                Last {
                    keys: change.keys,
                    image,
                    sequence: change.sequence,
                    at_ms: change.created_ms,
                    writes,
                },
            );
        }
        let place = (self.epoch(), self.table.name.as_str());
        let store = &self.store;
        futures::stream::iter(last.into_values())
            .map(async |one| {
                let write = Write {
                    keys: &one.keys,
                    image: one.image.as_ref(),
                    at_ms: one.at_ms,
                    writes: one.writes,
                };
                store.put(place, &write, &one.sequence).await
            })
            .buffer_unordered(ROWS_AT_ONCE)
            .try_collect::<()>()
            .await?;
        Ok(lacks)
    }

    fn note(&self, row: &mut TrackRow) {
        if row.closes.is_some() {
            row.closed_in.get_or_insert(self.now);
        }
    }

    fn reopened(&self, row: &TrackRow) -> Option<TrackRow> {
        let is_over = row.closed_in.is_some_and(|epoch| epoch < self.now);
        is_over.then(|| {
            // It was fed since: what it holds is no later version of what the active region holds.
            let mut row = row.clone();
            (row.closes, row.closed_in, row.compared, row.read_until) = (None, None, None, None);
            row.begun = self.here.clock.now_ms();
            row.lacks = Some("it was on its way home, and is in quarantine once more".to_owned());
            row.blind = true;
            row.lease_counter += 1;
            row
        })
    }

    async fn stream(&self) -> Result<Option<String>, Fault> {
        let described = describe(&self.here.tables, self.name()).await?;
        let described = described.ok_or_else(|| not_there(self.name()))?;
        let stream = enabled_stream(&described).filter(|(_, view)| holds_new_images(*view));
        Ok(stream.map(|(arn, _)| arn.to_owned()))
    }

    async fn compare(&mut self) -> Result<bool, Fault> {
        compare(self).await.map(|()| true)
    }
}

fn not_there(name: &str) -> Fault {
    Fault::own(
        Operation::DescribeTable,
        Class::NotFound,
        "ResourceNotFoundException",
        format!("there is no table {name}"),
    )
}

/// What the active region's state table says of the flow that fed a table in an epoch that is over.
#[derive(Debug, Default, PartialEq)]
struct Found {
    /// From where on the stream is to be read.
    places: Places,
    /// Whether there was a flow.
    any: bool,
    /// Another stream of the table that was not read to its end.
    another_stream: bool,
    /// A gap that was open.
    gap: Option<String>,
    /// The first copy had not ended.
    unfinished: bool,
    /// The oldest moment at which an open shard was known to be read.
    proven_ms: Option<i64>,
}

impl Found {
    fn of(rows: Vec<Row>, epoch: u64, table: &str, arn: Option<&str>) -> Self {
        let mut found = Self::default();
        let mut doubts: Vec<DoubtRow> = Vec::new();
        for row in rows {
            match row {
                Row::Shard(row) if row.epoch == epoch && row.table == table => {
                    found.shard(&row, arn);
                }
                Row::Doubt(row) | Row::PastDoubt(row)
                    if row.epoch == epoch && row.table == table =>
                {
                    doubts.push(row);
                }
                Row::Gap(row) if row.epoch <= epoch && row.table == table => found.gap(&row),
                Row::Reconcile(row)
                    if row.table == table
                        && row.epoch <= epoch
                        && row.kind() == JobKind::Bootstrap =>
                {
                    found.unfinished = true;
                }
                _ => {}
            }
        }
        for doubt in doubts {
            found.any = true;
            if arn != Some(doubt.stream_arn.as_str()) {
                found.another_stream = true;
                continue;
            }
            let from = doubt.position().unwrap_or(Position::TrimHorizon);
            let known = found.places.get(&doubt.shard_id).cloned().flatten();
            let place = match known {
                Some(known) => older(known, from),
                None => from,
            };
            found.places.insert(doubt.shard_id.clone(), Some(place));
        }
        found
    }

    fn shard(&mut self, row: &ShardRow, arn: Option<&str>) {
        self.any = true;
        if arn != Some(row.stream_arn.as_str()) {
            self.another_stream |= !row.is_finished();
            return;
        }
        let place = match row.is_finished() {
            true => None,
            // What this version cannot read is read from its beginning.
            false => Some(row.position().unwrap_or(Position::TrimHorizon)),
        };
        if place.is_some() {
            let proven = row.proven_ms();
            self.proven_ms = Some(self.proven_ms.map_or(proven, |known| known.min(proven)));
        }
        self.places.insert(row.shard_id.clone(), place);
    }

    fn gap(&mut self, row: &GapRow) {
        self.gap
            .get_or_insert_with(|| row.reason.label().to_owned());
    }

    /// Why the stream alone does not tell what is stranded.
    fn lacks(&self, now_ms: i64) -> Option<String> {
        if !self.any {
            return Some("nothing says how far its stream had been read at the fence".to_owned());
        }
        if self.another_stream {
            return Some("its stream was made anew before all of the old one was read".to_owned());
        }
        if self.unfinished {
            return Some("its first copy had not ended at the fence".to_owned());
        }
        if let Some(reason) = &self.gap {
            return Some(format!("a gap was open at the fence: {reason}"));
        }
        let is_old = self
            .proven_ms
            .is_some_and(|ms| now_ms - ms > UNREAD_LIMIT_MS);
        is_old.then(|| "its stream may have forgotten what was not read at the fence".to_owned())
    }
}

/// The older of two positions of one shard.
fn older(one: Position, other: Position) -> Position {
    match (one, other) {
        (Position::After(one), Position::After(other)) => Position::After(one.min(other)),
        (Position::AtTimestamp(one), Position::AtTimestamp(other)) => {
            Position::AtTimestamp(one.min(other))
        }
        _ => Position::TrimHorizon,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::row::{DoubtCause, GapReason, past_doubt};
    use crate::stream::ShardId;

    const ARN: &str = "arn:aws:dynamodb:us-east-1:1:table/orders/stream/2026";

    fn after(number: u64) -> Position {
        Position::After(SequenceNumber::parse(&number.to_string()).unwrap())
    }

    fn shard(epoch: u64, id: &str, place: &Position) -> ShardRow {
        let id = ShardId(id.into());
        ShardRow::new(epoch, "orders", ARN, &id, None, place, 1_000)
    }

    #[test]
    fn it_begins_where_the_flow_was_fenced_and_before_what_was_in_doubt() {
        let mut ended = shard(2, "ended", &after(1));
        ended.checkpoint = crate::lease::row::SHARD_END.into();
        let doubt = |shard: &str, from: &Position| {
            let id = ShardId(shard.into());
            let cause = DoubtCause::Unanswered;
            let doubt = DoubtRow::new(2, "orders", ARN, &id, cause, from, 0, "now".into());
            Row::PastDoubt(past_doubt(&doubt))
        };
        let rows = vec![
            Row::Shard(shard(2, "open", &after(9))),
            Row::Shard(ended),
            Row::Shard(shard(1, "open", &after(1))),
            doubt("open", &after(5)),
            doubt("ended", &after(7)),
            doubt("gone", &Position::TrimHorizon),
        ];
        let found = Found::of(rows, 2, "orders", Some(ARN));
        let places: Places = [
            ("open".to_owned(), Some(after(5))),
            ("ended".to_owned(), Some(after(7))),
            ("gone".to_owned(), Some(Position::TrimHorizon)),
        ]
        .into();
        assert_eq!(found.places, places);
        assert_eq!(found.lacks(1_000), None);
        assert!(found.lacks(1_001 + UNREAD_LIMIT_MS).is_some());
    }

    #[test]
    fn what_the_flow_had_lost_itself_is_found_by_comparing() {
        assert!(
            Found::of(Vec::new(), 2, "orders", Some(ARN))
                .lacks(0)
                .is_some()
        );
        let row = || Row::Shard(shard(2, "open", &after(9)));
        let gap = GapRow::new(2, "orders", GapReason::Trimmed, "open", "now".into());
        let found = Found::of(vec![row(), Row::Gap(gap)], 2, "orders", Some(ARN));
        assert!(found.lacks(1_000).unwrap().contains("trimmed"));
        let found = Found::of(vec![row()], 2, "orders", Some("another"));
        assert!(found.lacks(1_000).unwrap().contains("anew"));
    }
}
