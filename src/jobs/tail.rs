//! A stream read from its beginning, or from given positions, to where it stands now: every shard after
//! its parents, new shards as they come.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use crate::dynamo::RegionClients;
use crate::error::{Class, Fault, Policy};
use crate::lease::row::Places;
use crate::stream::change::{Change, Undecodable};
use crate::stream::listing::Lister;
use crate::stream::reader::{PAGE_RECORDS_MAX, Position, ShardReader};
use crate::stream::{Shard, ShardId};

/// Consecutive empty pages after which a shard counts as holding nothing more.
const EMPTY_PAGES_PROVE: u32 = 5;
const EMPTY_PAUSE: Duration = Duration::from_millis(100);
/// A page with fewer records than this is the last one for now.
const FULL_PAGE: usize = 100;
/// Between two listings: DescribeStream is paced for others, too.
const LIST_EVERY: Duration = Duration::from_secs(2);
/// How much a round holds before it is handed over, about: 32 MB.
const ROUND_BYTES: usize = 32 << 20;
/// How long children may be listed later than their parent ended.
const CHILDREN_PATIENCE: Duration = Duration::from_secs(5);
/// Pages of one shard in a round, so that one busy shard does not hold the others up.
const PAGES_A_ROUND: u32 = 50;

/// A record as it was read: the change it tells of, or why there is none.
pub(in crate::jobs) type Read = Result<Change, Box<Undecodable>>;

/// When the source made it, in milliseconds; 0 where unknown.
fn made_ms(record: &Read) -> i64 {
    match record {
        Ok(change) => change.created_ms,
        Err(undecodable) => undecodable.created_ms,
    }
}

fn bytes_of(record: &Read) -> usize {
    record.as_ref().map_or(0, |change| change.bytes)
}

struct Reading {
    reader: ShardReader,
    parent: Option<ShardId>,
    ended: bool,
    /// When it was found to have ended.
    ended_at: Option<Instant>,
    /// It was read beyond what is asked for: what follows, in its children as well, is none of it.
    passed: bool,
    /// The latest record that was read was made then.
    latest_ms: i64,
    empty: u32,
    /// When the first of the empty pages was asked for, by the region's clock.
    empty_since_ms: i64,
}

/// A stream that is read on and on.
pub(in crate::jobs) struct Tail {
    region: RegionClients,
    lister: Lister,
    arn: String,
    /// Records made before this are left out, in milliseconds.
    since_ms: i64,
    /// Where to begin, where that is known: then only those shards are read, and what came from them.
    begin: Option<BTreeMap<String, Position>>,
    /// Shards that were read to their ends before.
    ended: BTreeSet<String>,
    /// With places to begin: whether shards that neither came from those nor are older are read as well.
    takes_others: bool,
    shards: BTreeMap<ShardId, Reading>,
    listed: Option<Instant>,
    /// When the last complete listing began.
    list_begun: Option<Instant>,
    made: Instant,
    /// Whether a round brought anything on since this was last taken: records, or the end of a shard.
    moved: bool,
    /// Whether records were forgotten before they were read.
    lost: bool,
}

impl Tail {
    /// The stream `arn` of `region`, from `since_ms` on.
    pub(in crate::jobs) fn new(region: &RegionClients, arn: String, since_ms: i64) -> Self {
        Self {
            region: region.clone(),
            lister: Lister::new(region.streams.clone()),
            arn,
            since_ms,
            begin: None,
            ended: BTreeSet::new(),
            takes_others: false,
            lost: false,
            shards: BTreeMap::new(),
            listed: None,
            list_begun: None,
            made: Instant::now(),
            moved: false,
        }
    }

    /// Whether the rounds since this was last asked brought anything on.
    pub(in crate::jobs) fn has_moved(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// Reads only these shards, from these positions, and those that came from them: those from their
    /// beginning, whatever their own position is, so that nothing of a key is missed in between.
    pub(in crate::jobs) fn begin_at(
        &mut self,
        positions: impl Iterator<Item = (String, Position)>,
    ) {
        self.begin = Some(positions.collect());
    }

    /// Goes on where another one stood. What came from its shards, and what it did not know of, is read from the
    /// beginning; what is older than its shards is not read.
    pub(in crate::jobs) fn go_on_from(&mut self, places: &Places) {
        let open = places
            .iter()
            .filter_map(|(id, place)| Some((id.clone(), place.clone()?)));
        self.begin = Some(open.collect());
        let ended = places.iter().filter(|(_, place)| place.is_none());
        self.ended = ended.map(|(id, _)| id.clone()).collect();
        self.takes_others = true;
    }

    /// Where it stands. A shard that was read to its end is left out once one that came from it is in: what is older
    /// than that is not read again.
    pub(in crate::jobs) fn places(&self) -> Places {
        let has_begun = |reading: &Reading| reading.reader.position() != &Position::TrimHorizon;
        let followed: BTreeSet<&ShardId> = self
            .shards
            .values()
            .filter(|reading| reading.ended || has_begun(reading))
            .filter_map(|reading| reading.parent.as_ref())
            .collect();
        let known = self.shards.iter().filter_map(|(id, reading)| {
            match (reading.ended, has_begun(reading)) {
                (true, _) if followed.contains(id) => None,
                (true, _) => Some((id.0.clone(), None)),
                (false, true) => Some((id.0.clone(), Some(reading.reader.position().clone()))),
                // Nothing of it was read: it is found again.
                (false, false) => None,
            }
        });
        let before = self.ended.iter().map(|id| (id.clone(), None));
        // One that is read again speaks for itself.
        let before = before.filter(|(id, _)| {
            let id = ShardId(id.clone());
            !followed.contains(&id) && !self.shards.contains_key(&id)
        });
        // What is not listed yet stays where it was.
        let unlisted = self.begin.iter().flatten();
        let unlisted =
            unlisted.filter(|(id, _)| !self.shards.contains_key(&ShardId((*id).clone())));
        let unlisted = unlisted.map(|(id, position)| (id.clone(), Some(position.clone())));
        unlisted.chain(before).chain(known).collect()
    }

    /// Whether records were forgotten before they were read, since this was last asked.
    pub(in crate::jobs) fn take_lost(&mut self) -> bool {
        std::mem::take(&mut self.lost)
    }

    /// Whether the stream is over: every shard was read to its end, and none has children. It was turned off.
    pub(in crate::jobs) fn has_ended(&self) -> bool {
        let all_ended = self.shards.values().all(|reading| reading.ended);
        let any = !self.shards.is_empty() || !self.ended.is_empty();
        any && all_ended && self.list_begun.is_some() && self.knows_children()
    }

    /// Whether the children of every shard that was read to its end are known, or there are none: they may be listed
    /// later than their parent ends.
    fn knows_children(&self) -> bool {
        let parents: BTreeSet<&ShardId> = self
            .shards
            .values()
            .filter_map(|reading| reading.parent.as_ref())
            .collect();
        let begun = self.list_begun;
        let is_old = |ended: Instant| begun.is_some_and(|begun| begun > ended + CHILDREN_PATIENCE);
        let ended = self.shards.iter();
        let mut ended = ended.filter_map(|(id, reading)| Some((id, reading.ended_at?)));
        let before = self.ended.iter().map(|id| ShardId(id.clone()));
        ended.all(|(id, at)| parents.contains(id) || is_old(at))
            && before
                .into_iter()
                .all(|id| parents.contains(&id) || is_old(self.made))
    }

    async fn list(&mut self) -> Result<(), Fault> {
        if self.listed.is_some_and(|at| at.elapsed() < LIST_EVERY) {
            return Ok(());
        }
        let begun = Instant::now();
        let listing = self.lister.all(&self.arn, || {}).await?;
        self.listed = Some(Instant::now());
        self.list_begun = Some(begun);
        let parents: BTreeMap<ShardId, ShardId> = listing
            .shards
            .iter()
            .filter_map(|shard| Some((shard.id.clone(), shard.parent.clone()?)))
            .collect();
        for shard in &listing.shards {
            self.take(shard, &parents);
        }
        // Shards that are not listed any more can be read all the same, or are gone.
        let missing: Vec<(String, Position)> = match &self.begin {
            Some(begin) => begin
                .iter()
                .filter(|(id, _)| !self.shards.contains_key(&ShardId((*id).clone())))
                .map(|(id, position)| (id.clone(), position.clone()))
                .collect(),
            None => Vec::new(),
        };
        for (id, position) in missing {
            self.add(ShardId(id), None, position);
        }
        Ok(())
    }

    /// Takes a shard in that is to be read.
    fn take(&mut self, shard: &Shard, parents: &BTreeMap<ShardId, ShardId>) {
        if self.shards.contains_key(&shard.id) {
            return;
        }
        let position = match &self.begin {
            None => match self.since_ms {
                i64::MIN..=0 => Position::TrimHorizon,
                since_ms => Position::AtTimestamp(since_ms),
            },
            Some(begin) => {
                let is_ended = |id: &ShardId| self.ended.contains(&id.0);
                let ours = |id: &ShardId| begin.contains_key(&id.0) || is_ended(id);
                // No lineage is deeper than it has shards.
                let ancestors = |of: &ShardId| {
                    std::iter::successors(parents.get(of), |id| parents.get(*id))
                        .take(parents.len())
                };
                let came_from_ours = ancestors(&shard.id).any(ours);
                // Read again from an older place than before, as after a doubt: what came from it as well.
                let came_from_open = ancestors(&shard.id).any(|id| begin.contains_key(&id.0));
                match begin.get(&shard.id.0) {
                    _ if is_ended(&shard.id) && !came_from_open => return,
                    Some(position) if self.takes_others && !came_from_open => position.clone(),
                    _ if came_from_ours => Position::TrimHorizon,
                    Some(position) => position.clone(),
                    None if self.takes_others => {
                        let known = begin.keys().chain(&self.ended);
                        let mut known = known.map(|id| ShardId(id.clone()));
                        if known.any(|id| ancestors(&id).any(|older| *older == shard.id)) {
                            return;
                        }
                        Position::TrimHorizon
                    }
                    None => return,
                }
            }
        };
        self.add(shard.id.clone(), shard.parent.clone(), position);
    }

    fn add(&mut self, id: ShardId, parent: Option<ShardId>, position: Position) {
        let streams = self.region.streams.clone();
        let reading = Reading {
            reader: ShardReader::new(streams, &self.arn, &id, position),
            parent,
            ended: false,
            ended_at: None,
            passed: false,
            latest_ms: i64::MIN,
            empty: 0,
            empty_since_ms: 0,
        };
        self.shards.insert(id, reading);
    }

    /// The shards that may be read now: their parents are read to their ends.
    /// With `on`, also those that were read beyond what is asked for.
    fn readable(&self, on: bool) -> Vec<ShardId> {
        let open: BTreeSet<&ShardId> = self
            .shards
            .iter()
            .filter(|(_, reading)| !reading.ended)
            .map(|(id, _)| id)
            .collect();
        let may = |reading: &Reading| {
            let parent = reading.parent.as_ref();
            parent.is_none_or(|parent| !open.contains(parent))
        };
        let is_due = |reading: &Reading| may(reading) && (on || !reading.passed);
        open.iter()
            .filter(|id| self.shards.get(**id).is_some_and(is_due))
            .map(|id| (*id).clone())
            .collect()
    }

    /// Reads what there is now, into `records`. Whether every shard was seen to hold nothing more that was
    /// made until `until_ms`.
    pub(in crate::jobs) async fn round(
        &mut self,
        until_ms: i64,
        records: &mut VecDeque<Read>,
    ) -> Result<bool, Fault> {
        self.list().await?;
        let readable = self.readable(true);
        // One that has just ended has children that are not listed yet.
        let mut passed = !readable.is_empty() && self.knows_children();
        let mut held = 0;
        for id in readable {
            if held > ROUND_BYTES {
                // What is held has to be put away first.
                passed = false;
                break;
            }
            let Some(reading) = self.shards.get_mut(&id) else {
                continue;
            };
            for _ in 0..PAGES_A_ROUND {
                let asked_ms = self.region.clock.now_ms();
                let page = match reading.reader.next(PAGE_RECORDS_MAX).await {
                    Ok(page) => page,
                    Err(fault) if fault.policy() == Policy::NewIterator => break,
                    // What it has forgotten is lost; what is left of it is read.
                    Err(fault) if fault.class == Class::Trimmed => {
                        self.lost = true;
                        reading.reader.restart();
                        break;
                    }
                    // A shard that is gone shows nothing any more. What nobody knew of was of before.
                    Err(fault) if fault.class == Class::NotFound => {
                        let was_known = self.begin.iter().any(|begin| begin.contains_key(&id.0));
                        let was_read = matches!(reading.reader.position(), Position::After(_));
                        self.lost |= was_known || was_read;
                        reading.ended = true;
                        break;
                    }
                    Err(fault) => return Err(fault),
                };
                reading.ended = page.end;
                self.moved |= page.end || !page.records.is_empty();
                held += page.records.iter().map(bytes_of).sum::<usize>();
                if page.end {
                    reading.ended_at = Some(Instant::now());
                    // Its children are looked for before anything is said to be read out.
                    self.listed = None;
                }
                let latest_ms = page.records.iter().map(made_ms).max();
                // Somebody may write on and on: a later record says as much as empty pages.
                reading.latest_ms =
                    latest_ms.map_or(reading.latest_ms, |ms| ms.max(reading.latest_ms));
                let is_empty = page.records.is_empty();
                match (is_empty, reading.empty) {
                    (true, 0) => (reading.empty, reading.empty_since_ms) = (1, asked_ms),
                    (true, _) => reading.empty += 1,
                    (false, _) => reading.empty = 0,
                }
                let since_ms = self.since_ms;
                records.extend(page.records.into_iter().filter(|record| {
                    let made_ms = made_ms(record);
                    // Where it is not known when, it may have been then.
                    made_ms == 0 || made_ms >= since_ms
                }));
                if is_empty || reading.ended || held > ROUND_BYTES {
                    break;
                }
            }
            // A child of one that has ended is read in the next round.
            let is_quiet = reading.empty >= EMPTY_PAGES_PROVE && reading.empty_since_ms > until_ms;
            passed &= !reading.ended && (reading.latest_ms > until_ms || is_quiet);
            if reading.empty >= EMPTY_PAGES_PROVE && reading.empty_since_ms <= until_ms {
                reading.empty = 0;
            }
        }
        Ok(passed)
    }

    /// Reads everything there is now that was made until `until_ms`, once. Somebody may write on and on: a
    /// shard is left at the first page with a later record, or that is empty and was asked for later.
    pub(in crate::jobs) async fn read_all(
        &mut self,
        until_ms: i64,
        mut take: impl AsyncFnMut(&str, Read),
    ) -> Result<(), Fault> {
        self.list().await?;
        loop {
            let readable = self.readable(false);
            let mut moved = false;
            for id in readable {
                let Some(reading) = self.shards.get_mut(&id) else {
                    continue;
                };
                while !reading.ended && !reading.passed && reading.empty < EMPTY_PAGES_PROVE {
                    let page = reading.reader.next(PAGE_RECORDS_MAX).await?;
                    reading.ended = page.end;
                    let latest_ms = page.records.iter().map(made_ms).max();
                    reading.passed = latest_ms.is_some_and(|latest| latest > until_ms);
                    match page.records.is_empty() {
                        true => reading.empty += 1,
                        false => reading.empty = 0,
                    }
                    if page.records.len() < FULL_PAGE {
                        // It is read to where it stands now.
                        tokio::time::sleep(EMPTY_PAUSE).await;
                    }
                    for record in page.records {
                        take(&id.0, record).await;
                    }
                }
                moved |= reading.ended;
            }
            // One that has ended makes way for its children.
            if !moved || self.readable(false).is_empty() {
                return Ok(());
            }
        }
    }
}
