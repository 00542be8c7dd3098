//! The late-write watch: what was in flight when the epoch ended may take effect for `late_effect` more,
//! in a region that the application writes to now. Such a write is undone, on condition that nobody has
//! written since, and reported.
//!
//! ```text
//!   what was in flight ─▶ records of the old region ┐
//!                                                   ├▶ judged key by key ([`history`]) ─▶ undone
//!   stream of the new active region ────────────────┘
//! ```
//!
//! Doubts of the old epoch in the new active region are settled by this, and never by repair from the old
//! region: that is not the source any more.

pub mod history;
mod sent;
mod undo;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Table;
use crate::dynamo::RegionClients;
use crate::dynamo::clock::uptime;
use crate::dynamo::image::Image;
use crate::dynamo::item::ItemKey;
use crate::dynamo::json::item_from_json;
use crate::dynamo::table::{describe, enabled_stream, holds_new_images};
use crate::dynamo::value::{Item, same_item};
use crate::error::{Fault, Policy};
use crate::lease::doubts::until_ms;
use crate::lease::row::{DoubtRow, print_of, state};
use crate::lease::table::StateTable;
use crate::lease::term::Term;
use crate::mutation::{self, Mutation};
use crate::stream::change::{Change, OldImage};

use crate::stream::reader::Position;
use crate::stream::sequence::SequenceNumber;

use super::super::tail::{Read, Tail};
use super::fence::Writers;
use super::{Ended, Failover, Watcher, step};
use history::{History, Judged, Old};
use sent::Accounted;
use undo::{Undone, undo};

/// Keys watched at once; beyond it a table is not watched, and that is said.
const KEYS_MAX: usize = 200_000;
/// How much earlier than the first record in flight the records of its key are looked at: two minutes.
const BEFORE_MS: i64 = 120_000;
/// Stream times are whole seconds, and clocks of two regions are known to two.
const MARGIN_MS: i64 = 3_000;
/// A write is not waited for longer before it is in doubt.
const ATTEMPT_MAX: Duration = Duration::from_secs(10);
/// How long a region is asked whether it answers at all.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long nothing may come on, after the last moment at which something can be late, before a stream counts
/// as one that cannot be read to there: two minutes.
const READ_OUT_MS: i64 = 120_000;
const ROUND_PAUSE: Duration = Duration::from_millis(200);

/// What a key holds. Two are equal when DynamoDB says so.
#[derive(Debug, Clone)]
pub(super) struct Held(pub(super) Option<Item>);

impl Held {
    /// What a key holds that has this image; `None` where that cannot be read.
    fn of(image: Option<&Image>) -> Option<Self> {
        match image {
            None => Some(Self(None)),
            Some(image) => item_from_json(&image.to_value()).map(|item| Self(Some(item))),
        }
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(a), Some(b)) => same_item(a, b),
            _ => false,
        }
    }
}

/// What the watch found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Keys that were in flight.
    pub keys: usize,
    /// Changes that came after the fence and were left: nothing newer was replaced.
    pub arrived: usize,
    /// Late writes that were undone.
    pub undone: usize,
    /// Late writes that stand because the application has written the key since.
    pub overwritten: usize,
    /// Late writes that could not be undone, by table and why.
    pub standing: Vec<(String, String)>,
    /// Tables whose late writes could not be looked for, and why.
    pub unwatched: Vec<(String, String)>,
    /// Jobs of which nobody knows what they sent last, by key.
    pub unknown: Vec<(String, String)>,
}

/// A key of one table.
struct Key {
    history: History<Held>,
    keys: Item,
    /// Its first record known was made then, by the source's clock in milliseconds.
    since_ms: Option<i64>,
    /// A repair of it was at work.
    is_repaired: bool,
    /// Its last change was late: the next one may be what takes it back.
    is_late: bool,
    /// What of that was seen.
    accounted: Accounted,
}

/// The keys of one table that were in flight.
struct Watched<'a> {
    table: &'a Table,
    keys: HashMap<ItemKey, Key>,
    tail: Tail,
    /// Its stream was read beyond the time after which nothing can be late.
    passed: bool,
    /// That time, by the target's clock in milliseconds: the last write of this watch comes into it, too.
    until_ms: i64,
    /// Keys whose last change was late: what they hold, and what they are to hold.
    due: HashMap<ItemKey, (Held, Held)>,
    /// What was read and is not judged yet: it is not read again, whatever fails meanwhile.
    pending: VecDeque<Read>,
}

/// A range of a shard in flight.
struct Range {
    from: Position,
    /// Its last record, or the source's time after which nothing is part of it; neither: to its end.
    to: Option<SequenceNumber>,
    to_ms: Option<i64>,
    /// A repair of it was at work: it writes what the source holds then.
    is_repaired: bool,
}

impl Range {
    fn of_doubt(doubt: &DoubtRow) -> Option<Self> {
        Some(Self {
            from: doubt.position()?,
            to: doubt.to.as_deref().and_then(SequenceNumber::parse),
            to_ms: doubt.to_time,
            is_repaired: doubt.lease_owner.is_some() || doubt.until != doubt.due,
        })
    }

    fn holds(&self, sequence: &SequenceNumber, created_ms: i64) -> bool {
        let begun = match &self.from {
            Position::After(from) => from < sequence,
            Position::TrimHorizon => true,
            Position::AtTimestamp(ms) => created_ms >= *ms,
        };
        begun
            && self.to.as_ref().is_none_or(|to| sequence <= to)
            && self.to_ms.is_none_or(|to_ms| created_ms <= to_ms)
    }
}

/// What was in flight of one table, by epoch, stream and shard.
type Ranges = BTreeMap<(u64, String, String), Vec<Range>>;

fn ranges(table: &str, writers: &Writers) -> Ranges {
    let mut ranges = Ranges::new();
    let mut add = |(epoch, stream, shard): (u64, &str, &str), range: Option<Range>| {
        let place = (epoch, stream.to_owned(), shard.to_owned());
        // One that cannot be read covers the whole shard.
        let all = Range {
            from: Position::TrimHorizon,
            to: None,
            to_ms: None,
            is_repaired: false,
        };
        ranges.entry(place).or_default().push(range.unwrap_or(all));
    };
    for row in writers.in_flight().filter(|row| row.table == table) {
        let range = row.position().map(|from| Range {
            from,
            to: None,
            to_ms: None,
            is_repaired: false,
        });
        add((row.epoch, &row.stream_arn, &row.shard_id), range);
    }
    for doubt in writers.doubts.iter().filter(|row| row.table == table) {
        let place = (
            doubt.epoch,
            doubt.stream_arn.as_str(),
            doubt.shard_id.as_str(),
        );
        add(place, Range::of_doubt(doubt));
    }
    ranges
}

impl Failover<'_> {
    /// Watches for late writes until none can take effect any more.
    pub(super) async fn watch_late(
        &mut self,
        writers: &Writers,
        watcher: &mut dyn Watcher,
    ) -> Result<Found, Ended> {
        let mut found = Found::default();
        let in_flight = writers.in_flight().next().is_some() || !writers.doubts.is_empty();
        if !in_flight || mutation::is_off(Mutation::Late) {
            return Ok(found);
        }
        self.store(|row| state::WATCHING.clone_into(&mut row.state))
            .await?;
        self.patiently(async || self.forget_sent().await).await?;
        let fenced_ms = self.record.done_ms(step::FENCED).unwrap_or_default();
        // From then on the application may write.
        let begun_ms = [step::BEGUN, step::BEGUN_FIRST]
            .into_iter()
            .filter_map(|step| self.record.done_ms(step))
            .min()
            .unwrap_or(fenced_ms);
        let doubts = writers.doubts.iter().map(|doubt| doubt.until);
        let last_ms = doubts.max().unwrap_or_default();
        let last_ms = last_ms.max(until_ms(fenced_ms, self.config.leases.late_effect));
        let mut open: Vec<&Table> = self.config.tables.iter().collect();
        open.retain(|table| !ranges(&table.name, writers).is_empty());
        let mut watched = Vec::new();
        let mut trouble: BTreeMap<String, String> = BTreeMap::new();
        let stop = self.stop.clone();
        let lease = self.config.leases.duration;
        // What takes back must be as sure of its epoch as what applied.
        let term = Term::new(self.record.epoch, lease, uptime());
        let mut read: Option<Instant> = None;
        // It may be gone on with long after that time.
        let mut moved_ms = self.now_ms();
        loop {
            let now_ms = self.now_ms();
            let mut still = Vec::new();
            for table in open {
                let begun = tokio::select! {
                    begun = self.begin_watching(table, writers, fenced_ms) => begun,
                    () = stop.cancelled() => return Err(Ended::Stopped),
                };
                match begun {
                    Ok(one) => {
                        moved_ms = self.now_ms();
                        trouble.remove(&table.name);
                        found.keys += one.keys.len();
                        watched.push(one);
                    }
                    Err(why) => {
                        trouble.insert(table.name.clone(), why);
                        still.push(table);
                    }
                }
            }
            open = still;
            for one in watched.iter_mut().filter(|one| !one.passed) {
                // Each time: the one before may have taken long.
                if read.is_none_or(|at| at.elapsed() >= lease / 10) {
                    read = Some(Instant::now());
                    let begun = uptime();
                    self.reread().await?;
                    term.confirm(begun);
                }
                match self.look(one, (begun_ms, last_ms), &term, &mut found).await {
                    Ok(past) => {
                        // What it took back in this look is read in the next one.
                        let is_read = past && one.until_ms < now_ms;
                        one.passed = is_read && now_ms > last_ms + MARGIN_MS;
                        if one.tail.has_moved() {
                            moved_ms = self.now_ms();
                        }
                        trouble.remove(&one.table.name);
                    }
                    Err(fault) => {
                        trouble.insert(one.table.name.clone(), fault.to_string());
                    }
                }
            }
            let over = now_ms > last_ms + MARGIN_MS;
            let is_done = |one: &Watched<'_>| one.passed || trouble.contains_key(&one.table.name);
            // What could not be begun is in trouble as well.
            if over && watched.iter().all(is_done) {
                break;
            }
            if now_ms > (last_ms + MARGIN_MS).max(moved_ms) + READ_OUT_MS {
                for one in watched.iter().filter(|one| !one.passed) {
                    let why = "its stream could not be read to where it stands in time";
                    let told = trouble.entry(one.table.name.clone());
                    told.or_insert_with(|| why.to_owned());
                }
                break;
            }
            watcher.under_way(&format!(
                "watching {} key(s) for writes of epoch {} that take effect late; {} undone",
                found.keys,
                self.record.epoch - 1,
                found.undone
            ));
            tokio::select! {
                () = self.stop.cancelled() => return Err(Ended::Stopped),
                () = tokio::time::sleep(ROUND_PAUSE) => {}
            }
        }
        found.unwatched = trouble.into_iter().collect();
        Ok(found)
    }

    /// Reads what was in flight of `table`, and finds the beginning of its stream in the target.
    async fn begin_watching<'b>(
        &self,
        table: &'b Table,
        writers: &Writers,
        fenced_ms: i64,
    ) -> Result<Watched<'b>, String> {
        let name = table.name_in(&self.target.label);
        let told = |fault: Fault| fault.to_string();
        let described = describe(&self.target.tables, name).await.map_err(told)?;
        let described = described.ok_or_else(|| format!("there is no table {name}"))?;
        let arn = enabled_stream(&described)
            .filter(|(_, view)| holds_new_images(*view))
            .map(|(arn, _)| arn.to_owned());
        let Some(arn) = arn else {
            return Err(format!(
                "table {name} in {} has no stream of new and old images",
                self.target.label
            ));
        };
        let ranges = ranges(&table.name, writers);
        let streams = self.streams(&table.name, writers, &ranges);
        for (epoch, _) in &streams {
            self.refuse_silent(*epoch).await?;
        }
        let keys = self.read_old(&streams, &ranges, fenced_ms).await?;
        // Nothing of what was in flight was sent long before it was noticed.
        let late_ms = until_ms(0, self.config.leases.late_effect);
        let leases = writers.in_flight().filter(|row| row.table == table.name);
        let leases = leases.map(|row| row.updated_at.unwrap_or(row.created_at));
        let doubts = writers.doubts.iter().filter(|row| row.table == table.name);
        let doubts = doubts.map(|doubt| doubt.due - late_ms);
        let noticed = leases.chain(doubts).min().unwrap_or(fenced_ms);
        let since_ms = noticed - until_ms(MARGIN_MS, self.config.leases.duration * 2 + ATTEMPT_MAX);
        Ok(Watched {
            table,
            keys,
            tail: Tail::new(self.target, arn, since_ms),
            passed: false,
            until_ms: i64::MIN,
            due: HashMap::new(),
            pending: VecDeque::new(),
        })
    }

    /// The streams that flowed into `table`, oldest epoch first: those of which something was in flight, and
    /// those of the last epoch, which say what came after that.
    fn streams(&self, table: &str, writers: &Writers, ranges: &Ranges) -> Vec<(u64, String)> {
        let last = self.record.epoch - 1;
        let rows = writers.shards.iter().filter(|row| row.table == table);
        let of_last = rows.filter(|row| row.epoch == last);
        let mut streams: Vec<(u64, String)> = of_last
            .map(|row| (row.epoch, row.stream_arn.clone()))
            .chain(
                ranges
                    .keys()
                    .map(|(epoch, stream, _)| (*epoch, stream.clone())),
            )
            .collect();
        streams.sort();
        streams.dedup();
        streams
    }

    /// Asks a region that is to be read once, and briefly: one that is gone without an answer would hold
    /// everything up with each of its calls.
    async fn refuse_silent(&self, epoch: u64) -> Result<(), String> {
        let source = self.source_of(epoch)?;
        let client = source.tables_within(ASK_TIMEOUT);
        let state = StateTable::new(client, self.config.state_table());
        match state.control().await {
            Err(fault) if fault.policy() == Policy::Retry => Err(unread(source, &fault)),
            // Whatever else it says, it answers.
            _ => Ok(()),
        }
    }

    /// The region whose stream that is.
    fn source_of(&self, epoch: u64) -> Result<&RegionClients, String> {
        let mut sources = self.sources_of(epoch).into_iter();
        sources.next().ok_or_else(|| {
            format!("which region was active in epoch {epoch} is not known any more")
        })
    }

    /// The records of the old regions that concern keys in flight, by key. Twice over the streams: which keys
    /// those are, and then what came before as well. Without that, what the flow applied in time a moment
    /// before the end would be taken for the application's.
    async fn read_old(
        &self,
        streams: &[(u64, String)],
        ranges: &Ranges,
        fenced_ms: i64,
    ) -> Result<HashMap<ItemKey, Key>, String> {
        let mut keys: HashMap<ItemKey, Key> = HashMap::new();
        let mut first_ms = fenced_ms;
        // Later ones nobody has sent.
        let until_ms = fenced_ms + MARGIN_MS;
        for (epoch, stream) in streams {
            let of_stream: Vec<(String, Position)> = ranges
                .iter()
                .filter(|((of, arn, _), _)| of == epoch && arn == stream)
                .map(|((_, _, shard), ranges)| {
                    let first = ranges.iter().map(|range| range.from.clone());
                    let first = first.reduce(older).unwrap_or(Position::TrimHorizon);
                    (shard.clone(), first)
                })
                .collect();
            if of_stream.is_empty() {
                continue;
            }
            let source = self.source_of(*epoch)?;
            let mut tail = Tail::new(source, stream.clone(), i64::MIN);
            tail.begin_at(of_stream.into_iter());
            let taken = tail.read_all(until_ms, async |shard, record| {
                let place = (*epoch, stream.clone(), shard.to_owned());
                let judged = judged(ranges, &place, record, fenced_ms);
                if let Some((change, true, is_repaired)) = judged
                    && keys.len() <= KEYS_MAX
                {
                    first_ms = first_ms.min(change.created_ms);
                    keys.entry(change.key)
                        .or_insert_with(|| Key::new(change.keys))
                        .is_repaired |= is_repaired;
                }
            });
            taken.await.map_err(|fault| unread(source, &fault))?;
            if keys.len() > KEYS_MAX {
                return Err(format!("more than {KEYS_MAX} keys were in flight"));
            }
        }
        for (epoch, stream) in streams {
            let source = self.source_of(*epoch)?;
            let mut tail = Tail::new(source, stream.clone(), first_ms - BEFORE_MS);
            let taken = tail.read_all(until_ms, async |shard, record| {
                let place = (*epoch, stream.clone(), shard.to_owned());
                if let Some((change, in_flight, _)) = judged(ranges, &place, record, fenced_ms)
                    && let Some(key) = keys.get_mut(&change.key)
                {
                    key.note(change, in_flight);
                }
            });
            taken.await.map_err(|fault| unread(source, &fault))?;
        }
        for key in keys.values_mut().filter(|key| key.is_repaired) {
            key.history.all_in_flight();
        }
        Ok(keys)
    }

    /// Takes in what the stream of the target shows, and undoes what is late. Whether it has passed
    /// `last_ms`.
    async fn look(
        &self,
        watched: &mut Watched<'_>,
        (begun_ms, last_ms): (i64, i64),
        term: &Arc<Term>,
        found: &mut Found,
    ) -> Result<bool, Fault> {
        // Judged first: a fault of one shard says nothing of what the others have shown.
        watched.until_ms = watched.until_ms.max(last_ms);
        let until_ms = watched.until_ms;
        let passed = watched.tail.round(until_ms, &mut watched.pending).await;
        while let Some(record) = watched.pending.pop_front() {
            let (of, created_ms) = match &record {
                Ok(change) => (Some(change.key.clone()), change.created_ms),
                Err(bad) => (bad.keys.as_ref().map(ItemKey::new), bad.created_ms),
            };
            let Some(of) = of else { continue };
            let key = watched.keys.get_mut(&of);
            let key = key.filter(|key| key.since_ms.is_some_and(|since_ms| created_ms >= since_ms));
            let Some(key) = key else { continue };
            let known = record.as_ref().ok().and_then(|change| {
                let before = match &change.old_image {
                    None => Held(None),
                    Some(OldImage::Known(image)) => Held::of(Some(image))?,
                    Some(OldImage::Unknown) => return None,
                };
                Some((change, before, Held::of(change.new_image.as_ref())?))
            });
            let Some((change, before, after)) = known else {
                let why = "a record of a key that was in flight cannot be read".to_owned();
                found.standing.push((watched.table.name.clone(), why));
                continue;
            };
            // Stream times are cut to the second: what may be the application's counts as such.
            let fenced = change.created_ms + 1_000 > begun_ms;
            let is_ours = match key.is_late {
                false => false,
                true => match self.sent(&watched.table.name, &of).await {
                    Ok(sent) => {
                        let prints = (print_of(before.0.as_ref()), print_of(after.0.as_ref()));
                        key.accounted.is_ours(&sent, prints, created_ms)
                    }
                    Err(fault) => {
                        watched.pending.push_front(record);
                        return Err(fault);
                    }
                },
            };
            let is_first = key.history.is_new();
            let judged = match is_ours {
                true => key.history.taken_back(&after),
                // Stream times are cut to the second, and the clock is known to one.
                false if created_ms > last_ms + 1_000 => key.history.written(&after),
                false => key.history.change(&before, &after, fenced),
            };
            key.is_late = matches!(judged, Judged::Late(_));
            for (held, was_right) in [(&before, is_first), (&after, !key.is_late)] {
                if was_right {
                    key.accounted.was_right(print_of(held.0.as_ref()));
                }
            }
            // Something was written over what was late before: that needs nothing any more.
            if watched.due.remove(&of).is_some() {
                found.overwritten += 1;
            }
            match judged {
                Judged::Right => {}
                // In the second in which the epoch began nobody can say.
                Judged::Arrived => found.arrived += usize::from(change.created_ms >= begun_ms),
                // Not at once: the next record may say what it has to hold by now.
                Judged::Late(right) => {
                    watched.due.insert(of, (after, right));
                }
            }
        }
        let due: Vec<ItemKey> = watched.due.keys().cloned().collect();
        for of in due {
            let (Some((late, right)), Some(key)) =
                (watched.due.get(&of), watched.keys.get_mut(&of))
            else {
                continue;
            };
            let table = watched.table.name_in(&self.target.label);
            // Where that fails it stays due.
            let noted = async || {
                self.note_sent(&watched.table.name, &of, (late, right))
                    .await
            };
            let place = (self.target, table, &key.keys);
            let undone = undo(place, term, (late, right), noted).await?;
            tracing::warn!(
                table = watched.table.name,
                how = undone.label(),
                "a write of the old epoch took effect late"
            );
            match undone {
                Undone::Yes => found.undone += 1,
                Undone::Overwritten => found.overwritten += 1,
                Undone::Cannot(why) => {
                    found.standing.push((watched.table.name.clone(), why));
                }
            }
            // The stream has to be read to what was sent as well; its times are whole seconds.
            watched.until_ms = watched.until_ms.max(self.now_ms() + 1_000);
            watched.due.remove(&of);
        }
        passed
    }
}

/// The older of two positions of one shard.
fn older(one: Position, other: Position) -> Position {
    match (one, other) {
        (Position::After(one), Position::After(other)) => Position::After(one.min(other)),
        (Position::AtTimestamp(one), Position::AtTimestamp(other)) => {
            Position::AtTimestamp(one.min(other))
        }
        // By name and by time: the whole shard holds both.
        _ => Position::TrimHorizon,
    }
}

/// A record of the old region, whether its write was in flight, and whether a repair of it was at work.
/// `None` for what was written after the end: nobody has sent it.
fn judged(
    ranges: &Ranges,
    place: &(u64, String, String),
    record: Read,
    fenced_ms: i64,
) -> Option<(Change, bool, bool)> {
    // What cannot be read, nobody has sent.
    let change = record.ok()?;
    if change.created_ms > fenced_ms + MARGIN_MS {
        return None;
    }
    // Of a shard that came from one in flight nothing was sent before that had ended.
    let of_shard = ranges.get(place).into_iter().flatten();
    let mut held = of_shard
        .filter(|range| range.holds(&change.sequence, change.created_ms))
        .peekable();
    let in_flight = held.peek().is_some();
    let is_repaired = held.any(|range| range.is_repaired);
    Some((change, in_flight, is_repaired))
}

fn unread(source: &RegionClients, fault: &Fault) -> String {
    let label = &source.label;
    format!("what was in flight could not be read in {label}: {fault}")
}

impl Key {
    fn new(keys: Item) -> Self {
        Self {
            history: History::new(Vec::new()),
            keys,
            since_ms: None,
            is_repaired: false,
            is_late: false,
            accounted: Accounted::default(),
        }
    }

    fn note(&mut self, change: Change, in_flight: bool) {
        let Some(image) = Held::of(change.new_image.as_ref()) else {
            return;
        };
        self.since_ms.get_or_insert(change.created_ms - MARGIN_MS);
        self.history.push(Old { image, in_flight });
    }
}
