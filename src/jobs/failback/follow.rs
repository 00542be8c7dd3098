//! Reads the stream of a table in a region that is not fed, on and on, one process at a time, and keeps what comes.
//!
//! ```text
//!   the row says where ─▶ held ─▶ a round of all shards ─▶ kept durably ─▶ places stored ─▶ …
//!                                    └ forgotten records ─▶ both tables compared, once
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::super::tail::{Read, Tail};
use crate::backoff::Backoff;
use crate::config::Config;
use crate::dynamo::RegionClients;
use crate::error::Fault;
use crate::lease::hold::{Hold, Terms};
use crate::lease::row::{Track, TrackRow};
use crate::lease::table::StateTable;
use crate::mutation::crash;

/// After a moment up to which everything is read, before the next one is aimed at.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
/// Between two rounds that brought nothing.
const EMPTY_PAUSE: Duration = Duration::from_millis(250);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How much longer than a moment a stream is watched before everything that was written until then counts as read.
pub(super) const SETTLE_MS: i64 = 1_500;
/// Stream times are whole seconds, and the region's clock is known to one.
const MARGIN_MS: i64 = 3_000;

/// When it ends.
#[derive(Clone)]
pub struct Ending {
    /// Cancelled when it is to stop at once; somebody goes on later.
    pub stop: CancellationToken,
    /// The quarantine ended then, by the region's clock in milliseconds; `i64::MAX` while it has not.
    closes: Arc<AtomicI64>,
}

impl Ending {
    /// Ends with `stop`.
    pub fn new(stop: CancellationToken) -> Self {
        Self {
            stop,
            closes: Arc::new(AtomicI64::new(i64::MAX)),
        }
    }

    /// What is written later than `ms` is not taken in; everything else is, and then it ends.
    pub fn close(&self, ms: i64) {
        self.closes.fetch_min(ms, Ordering::AcqRel);
    }

    fn closes(&self) -> Option<i64> {
        Some(self.closes.load(Ordering::Acquire)).filter(|ms| *ms != i64::MAX)
    }
}

/// What is followed, and where.
pub struct Ground<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The region whose streams are read.
    pub region: &'a RegionClients,
    /// Its state table.
    pub state: &'a StateTable,
    /// Who reads.
    pub me: &'a str,
}

/// Keeps what is read.
pub trait Keep {
    /// What is read for.
    const TRACK: Track;

    /// The row with which it begins: from where on, and whether something is gone already.
    fn begin(&mut self) -> impl Future<Output = Result<TrackRow, Fault>> + Send;

    /// Records before this are none of it, in milliseconds.
    fn since_ms(&self) -> i64;

    /// Goes on where `row` says.
    fn load(&mut self, row: &TrackRow) -> impl Future<Output = Result<(), Fault>> + Send;

    /// Keeps records, durably. What it could not keep, as a reason.
    fn keep(
        &mut self,
        records: Vec<Read>,
    ) -> impl Future<Output = Result<Option<String>, Fault>> + Send;

    /// Changes what else the row says.
    fn note(&self, row: &mut TrackRow);

    /// The row with which it begins once more, where it was closed for another epoch.
    fn reopened(&self, _row: &TrackRow) -> Option<TrackRow> {
        None
    }

    /// The table's stream of now, where it has one.
    fn stream(&self) -> impl Future<Output = Result<Option<String>, Fault>> + Send;

    /// Finds what the stream cannot tell any more. False where that is not of this kind.
    fn compare(&mut self) -> impl Future<Output = Result<bool, Fault>> + Send;
}

/// How a while of it ended.
enum While {
    /// For good.
    Over,
    /// Somebody else is at it, or was faster.
    Again(Duration),
}

/// Follows one table until `ending`. `tell` hears how it goes.
pub async fn follow<K: Keep>(
    ground: &Ground<'_>,
    (epoch, table): (u64, &str),
    kept: &mut K,
    ending: &Ending,
    tell: impl Fn(Result<&TrackRow, &Fault>),
) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    while !ending.stop.is_cancelled() {
        let pause = match a_while(ground, (epoch, table), kept, ending, &tell).await {
            Ok(While::Over) => return,
            Ok(While::Again(pause)) => {
                backoff.reset();
                pause
            }
            Err(fault) => {
                tell(Err(&fault));
                backoff.pause()
            }
        };
        tokio::select! {
            () = ending.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn a_while<K: Keep>(
    ground: &Ground<'_>,
    (epoch, table): (u64, &str),
    kept: &mut K,
    ending: &Ending,
    tell: &impl Fn(Result<&TrackRow, &Fault>),
) -> Result<While, Fault> {
    let lease = ground.config.leases.duration;
    let key = TrackRow::key_of(K::TRACK, epoch, table);
    let row = match ground.state.track(&key).await? {
        Some(row) => row,
        None => {
            let row = kept.begin().await?;
            crash("track-begun");
            // Somebody else may be faster: what is stored counts.
            ground.state.create(&row).await?;
            return Ok(While::Again(Duration::ZERO));
        }
    };
    if let Some(again) = kept.reopened(&row) {
        // Refused: somebody else was faster.
        ground.state.replace(&again, row.lease_counter).await?;
        return Ok(While::Again(Duration::ZERO));
    }
    if row.is_closed() {
        tell(Ok(&row));
        return Ok(While::Over);
    }
    let now_ms = ground.region.clock.now_ms();
    if row.lease_owner.is_some() && row.until > now_ms {
        tell(Ok(&row));
        return Ok(While::Again(lease / 3));
    }
    let terms = Terms {
        state: ground.state.clone(),
        clock: Arc::clone(&ground.region.clock),
        duration: lease,
        // What is kept is kept on condition; nothing of it does harm late.
        late_effect: Duration::ZERO,
    };
    let Some(hold) = Hold::take(terms, row, ground.me.to_owned()).await? else {
        return Ok(While::Again(FIRST_PAUSE));
    };
    let over = read_on(ground, &hold, kept, ending, tell).await;
    if !matches!(over, Ok(While::Again(_))) {
        hold.give_back().await;
    }
    over
}

async fn read_on<K: Keep>(
    ground: &Ground<'_>,
    hold: &Arc<Hold<TrackRow>>,
    kept: &mut K,
    ending: &Ending,
    tell: &impl Fn(Result<&TrackRow, &Fault>),
) -> Result<While, Fault> {
    let lease = ground.config.leases.duration;
    let row = hold.row();
    hold.keep(kept.load(&row)).await?;
    let mut tail = Tail::new(ground.region, row.stream_arn.clone(), kept.since_ms());
    tail.go_on_from(&row.places());
    let mut lacks = row.lacks.clone();
    // What is lost anew asks for a comparison anew.
    let mut loses = false;
    if row.is_unread(ground.region.clock.now_ms()) {
        let why = "nobody read its stream for almost as long as it remembers";
        lacks.get_or_insert_with(|| why.to_owned());
        loses = true;
    }
    let mut stored = Instant::now();
    let mut aim: Option<i64> = None;
    let mut records = 0;
    loop {
        if ending.stop.is_cancelled() {
            return Ok(While::Over);
        }
        if hold.is_over() {
            return Ok(While::Again(FIRST_PAUSE));
        }
        let closes = hold.row().closes.or(ending.closes());
        let aim_ms = *aim.get_or_insert_with(|| ground.region.clock.now_ms());
        // Records come a moment after they were made.
        let settled_ms = aim_ms + SETTLE_MS;
        let mut pending = VecDeque::new();
        let round = hold.keep(tail.round(settled_ms, &mut pending));
        let passed = tokio::select! {
            passed = round => passed,
            () = ending.stop.cancelled() => return Ok(While::Over),
        };
        let ours = |record: &Read| {
            let made_ms = match record {
                Ok(change) => change.created_ms,
                Err(bad) => bad.created_ms,
            };
            closes.is_none_or(|ms| made_ms <= ms)
        };
        let new: Vec<Read> = pending.into_iter().filter(ours).collect();
        let many = new.len() as u64;
        records += many;
        if let Some(why) = hold.keep(kept.keep(new)).await? {
            lacks.get_or_insert(why);
            loses = true;
        }
        if tail.take_lost() {
            lacks.get_or_insert_with(|| "its stream had forgotten records by then".to_owned());
            loses = true;
        }
        crash("track-kept");
        let has_passed = matches!(passed, Ok(true));
        let is_due = stored.elapsed() >= lease / 3;
        let was_closed = hold.row().closes.is_some();
        if has_passed || many > 0 || is_due || (closes.is_some() && !was_closed) {
            let places = tail.places();
            let renewed = hold
                .renew(|row| {
                    row.set_places(&places);
                    row.lacks.clone_from(&lacks);
                    if std::mem::take(&mut loses) {
                        row.compared = None;
                    }
                    row.closes = closes;
                    row.records += std::mem::take(&mut records);
                    if has_passed {
                        // What was written in the second of `aim_ms` may have been written after it.
                        row.read_until = row.read_until.max(Some(aim_ms));
                    }
                    kept.note(row);
                })
                .await?;
            if !renewed {
                return Ok(While::Again(FIRST_PAUSE));
            }
            stored = Instant::now();
            crash("track-stored");
        }
        if has_passed {
            aim = None;
            if lacks.is_some() && hold.row().compared.is_none() {
                let now_ms = ground.region.clock.now_ms();
                let compared = tokio::select! {
                    compared = hold.keep(kept.compare()) => compared?,
                    () = ending.stop.cancelled() => return Ok(While::Over),
                };
                if compared && !hold.renew(|row| row.compared = Some(now_ms)).await? {
                    return Ok(While::Again(FIRST_PAUSE));
                }
            }
        }
        let row = hold.row();
        tell(Ok(&row));
        if row.is_closed() {
            return Ok(While::Over);
        }
        // What did not pass in this round is told, and read on with.
        passed?;
        if tail.has_ended()
            && let Some(arn) = kept.stream().await?
            && arn != row.stream_arn
        {
            let renewed = hold
                .renew(|row| {
                    row.stream_arn = arn;
                    row.places.clear();
                    row.compared = None;
                    let why = "its stream was made anew";
                    row.lacks.get_or_insert_with(|| why.to_owned());
                })
                .await?;
            tracing::warn!(
                table = row.table,
                renewed,
                "the stream of a table was made anew"
            );
            hold.give_back().await;
            return Ok(While::Again(FIRST_PAUSE));
        }
        if many == 0 {
            // Between two moments that are aimed at there is time.
            let pause = match has_passed {
                true => IDLE_PAUSE.min(lease / 4),
                false => EMPTY_PAUSE,
            };
            tokio::select! {
                () = ending.stop.cancelled() => return Ok(While::Over),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// From when on, by the stream's time, a record may have been made at `ms` or later.
pub(super) const fn since(ms: i64) -> i64 {
    ms - MARGIN_MS
}
