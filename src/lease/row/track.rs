//! How far a region that is not fed reads its own stream: what is stranded in one that was active, and what the
//! active one has written since it became so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    AT_TIMESTAMP, Counted, DoubtRow, FORMAT_VERSION, SHARD_END, TRIM_HORIZON, UNREAD_LIMIT_MS,
};
use crate::lease::hold::Holdable;
use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

/// Where a stream was read to: by shard, `None` for one that was read to its end.
pub type Places = BTreeMap<String, Option<Position>>;

/// What is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Track {
    /// Writes that never left a region that was active: it is in quarantine.
    Stranded,
    /// Keys that the active region has written since the fence, while another one is away.
    Ledger,
}

impl Track {
    /// The name in rows.
    pub const fn label(self) -> &'static str {
        match self {
            Track::Stranded => "capture",
            Track::Ledger => "ledger",
        }
    }
}

/// `capture#<epoch>#<table>` and `ledger#<epoch>#<table>`: one process at a time reads on from here. The epoch is
/// the last one in which the region was active, or the one in which it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackRow {
    /// Hash key.
    pub lease_key: String,
    /// `capture` or `ledger`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The epoch.
    pub epoch: u64,
    /// The table, by its name in the configuration.
    pub table: String,
    /// Its stream.
    pub stream_arn: String,
    /// Where it was read to, by shard.
    pub places: BTreeMap<String, String>,
    /// Why it does not hold all that it should; absent where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lacks: Option<String>,
    /// Of a capture that lacks something: when both tables were compared from end to end, and what differs was
    /// taken in, in milliseconds of the region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compared: Option<i64>,
    /// Everything that was written until then is in, by the region's clock, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_until: Option<i64>,
    /// From when on, by the region's clock in milliseconds, what is not read may be forgotten.
    #[serde(default)]
    pub begun: i64,
    /// No flow from here into the active region is known in that epoch: what that holds need not be an earlier
    /// version of what is here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub blind: bool,
    /// Records that were taken in, about: some may have been counted twice.
    pub records: u64,
    /// Pages of a ledger.
    #[serde(default)]
    pub pages: u64,
    /// Keys of a ledger.
    #[serde(default)]
    pub keys: u64,
    /// The quarantine has ended, and what is written later than this is not taken in any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closes: Option<i64>,
    /// In which epoch that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed_in: Option<u64>,
    /// Who reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_owner: Option<String>,
    /// Grows with every update.
    pub lease_counter: u64,
    /// From when on somebody else may read, by the region's clock, in milliseconds.
    pub until: i64,
}

impl TrackRow {
    /// One that nobody has begun with.
    pub fn new(track: Track, epoch: u64, table: &str, stream_arn: &str) -> Self {
        Self {
            lease_key: Self::key_of(track, epoch, table),
            entity_type: track.label().to_owned(),
            format_version: FORMAT_VERSION,
            epoch,
            table: table.to_owned(),
            stream_arn: stream_arn.to_owned(),
            places: BTreeMap::new(),
            lacks: None,
            compared: None,
            read_until: None,
            begun: 0,
            blind: false,
            records: 0,
            pages: 0,
            keys: 0,
            closes: None,
            closed_in: None,
            lease_owner: None,
            lease_counter: 0,
            until: 0,
        }
    }

    /// The key of a row.
    pub fn key_of(track: Track, epoch: u64, table: &str) -> String {
        format!("{}#{epoch}#{table}", track.label())
    }

    /// Takes note of where the stream was read to.
    pub fn set_places(&mut self, places: &Places) {
        let text = |place: &Option<Position>| match place {
            None => SHARD_END.to_owned(),
            Some(Position::TrimHorizon) => TRIM_HORIZON.to_owned(),
            Some(Position::AtTimestamp(ms)) => format!("{AT_TIMESTAMP}:{ms}"),
            Some(Position::After(sequence)) => sequence.as_str().to_owned(),
        };
        let shards = places.iter();
        self.places = shards
            .map(|(id, place)| (id.clone(), text(place)))
            .collect();
    }

    /// Where the stream was read to. What this version cannot read is read from its beginning.
    pub fn places(&self) -> Places {
        let place = |text: &str| match text {
            SHARD_END => None,
            TRIM_HORIZON => Some(Position::TrimHorizon),
            text => Some(match text.split_once(':') {
                Some((AT_TIMESTAMP, ms)) => ms
                    .parse()
                    .map_or(Position::TrimHorizon, Position::AtTimestamp),
                _ => SequenceNumber::parse(text).map_or(Position::TrimHorizon, Position::After),
            }),
        };
        let shards = self.places.iter();
        shards.map(|(id, text)| (id.clone(), place(text))).collect()
    }

    /// Whether all that it should hold is in it, up to `ms` of the region: read to there, and compared where it
    /// could not be read.
    pub fn holds_until(&self, ms: i64) -> bool {
        let is_whole = self.lacks.is_none() || self.compared.is_some();
        is_whole && self.read_until.is_some_and(|until| until >= ms)
    }

    /// Whether it was not read for almost as long as a stream remembers, at `now_ms` of the region.
    pub fn is_unread(&self, now_ms: i64) -> bool {
        let last = self.read_until.unwrap_or(0).max(self.begun);
        !self.is_closed() && now_ms - last > UNREAD_LIMIT_MS
    }

    /// Whether the quarantine has ended, and everything until then is in.
    pub fn is_closed(&self) -> bool {
        self.closes.is_some_and(|ms| self.holds_until(ms))
    }
}

impl Counted for TrackRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}

impl Holdable for TrackRow {
    fn count(&mut self) {
        self.lease_counter += 1;
    }

    fn set_holder(&mut self, holder: Option<String>) {
        self.lease_owner = holder;
    }

    fn until_mut(&mut self) -> &mut i64 {
        &mut self.until
    }
}

/// The doubt `doubt` once its epoch is over and nothing of it can take effect late any more: what it covers may
/// never have been applied, and is stranded then. `past-` before its key.
pub fn past_doubt(doubt: &DoubtRow) -> DoubtRow {
    DoubtRow {
        lease_key: format!("past-{}", doubt.lease_key),
        entity_type: "past-doubt".to_owned(),
        lease_owner: None,
        ..doubt.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_survive_the_way_through_a_row() {
        let after = Position::After(SequenceNumber::parse("12345").unwrap());
        let places: Places = [
            ("a".to_owned(), None),
            ("b".to_owned(), Some(Position::TrimHorizon)),
            ("c".to_owned(), Some(Position::AtTimestamp(77))),
            ("d".to_owned(), Some(after)),
        ]
        .into();
        let mut row = TrackRow::new(Track::Stranded, 3, "orders", "arn");
        row.set_places(&places);
        let item: crate::dynamo::value::Item = serde_dynamo::to_item(&row).unwrap();
        let again: TrackRow = serde_dynamo::from_item(item).unwrap();
        assert_eq!(again.places(), places);
        assert_eq!(again, row);
    }

    #[test]
    fn what_lacks_something_holds_nothing_until_it_was_compared() {
        let mut row = TrackRow::new(Track::Stranded, 3, "orders", "arn");
        assert!(!row.holds_until(5));
        row.read_until = Some(5);
        assert!(row.holds_until(5) && !row.holds_until(6) && !row.is_closed());
        row.lacks = Some("forgotten".into());
        assert!(!row.holds_until(5));
        row.compared = Some(4);
        row.closes = Some(5);
        assert!(row.holds_until(5) && row.is_closed());
    }
}
