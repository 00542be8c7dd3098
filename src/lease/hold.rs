//! The right to do a piece of work that writes to a replica: the repair of a doubt, a redrive. One
//! row of the state table, one holder at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::doubts::until_ms;
use super::row::Counted;
use super::table::{StateTable, Written};
use crate::dynamo::clock::{ServiceClock, uptime};
use crate::dynamo::transmit::Bound;
use crate::error::Fault;

/// A row that can be held.
pub trait Holdable: Counted + Clone + Send + Sync {
    /// Raises the counter.
    fn count(&mut self);
    /// Names the holder; `None` once it is given back.
    fn set_holder(&mut self, holder: Option<String>);
    /// From when on somebody else may hold it, by the replica region's clock, in milliseconds.
    fn until_mut(&mut self) -> &mut i64;
}

/// What a holder goes by.
#[derive(Clone)]
pub struct Terms {
    /// Where the rows are.
    pub state: StateTable,
    /// The clock of that region.
    pub clock: Arc<ServiceClock>,
    /// How long a hold is good for after each renewal.
    pub duration: Duration,
    /// How long after its end a write may still take effect.
    pub late_effect: Duration,
}

/// A row that is held. The hold is good for its duration after each renewal, and moves the row's
/// `until` to a late effect after its own end: nobody else begins before every write of it is dead.
pub struct Hold<R> {
    terms: Terms,
    held: Mutex<Held<R>>,
    /// The row's `until` when it was taken.
    taken_until: i64,
    /// Held over a renewal: two at once would refuse each other by the row's counter.
    turn: tokio::sync::Mutex<()>,
}

struct Held<R> {
    row: R,
    /// As this machine's uptime.
    valid_until: Duration,
}

impl<R: Holdable> Bound for Hold<R> {
    fn remaining(&self) -> Duration {
        self.held().valid_until.saturating_sub(uptime())
    }
}

impl<R: Holdable> Hold<R> {
    /// Takes a row that is in the table as `row`, for `holder`. `None` if somebody else was faster.
    ///
    /// # Errors
    /// The state table could not be written; whether it was is not known.
    pub async fn take(terms: Terms, row: R, holder: String) -> Result<Option<Arc<Self>>, Fault> {
        let hold = Self::of(terms, row, holder);
        Ok(hold.renew(|_| ()).await?.then(|| Arc::new(hold)))
    }

    /// Makes the row `row`, held by `holder`. `None` if there is one already.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub async fn create(terms: Terms, row: R, holder: String) -> Result<Option<Arc<Self>>, Fault> {
        let hold = Self::of(terms, row, holder);
        let sent = uptime();
        let row = hold.renewed();
        if hold.terms.state.create(&row).await? == Written::Refused {
            return Ok(None);
        }
        hold.note(row, sent);
        Ok(Some(Arc::new(hold)))
    }

    fn of(terms: Terms, mut row: R, holder: String) -> Self {
        row.set_holder(Some(holder));
        Self {
            terms,
            taken_until: *row.until_mut(),
            held: Mutex::new(Held {
                row,
                valid_until: Duration::ZERO,
            }),
            turn: tokio::sync::Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held<R>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, row: R, sent: Duration) {
        let mut held = self.held();
        held.row = row;
        held.valid_until = sent + self.terms.duration;
    }

    /// The row as it was last written.
    pub fn row(&self) -> R {
        self.held().row.clone()
    }

    /// Whether nothing may be sent under it any more.
    pub fn is_over(&self) -> bool {
        self.remaining().is_zero()
    }

    /// The row with a late effect after the end of a hold that begins now.
    fn renewed(&self) -> R {
        let mut row = self.row();
        row.count();
        // The last write leaves before the hold's end, and takes effect a late effect later at most.
        let end = until_ms(self.terms.clock.now_ms(), self.terms.late_effect);
        let until = until_ms(end, self.terms.duration);
        *row.until_mut() = until.max(*row.until_mut());
        row
    }

    /// Renews the hold and changes its row. False if it is lost.
    ///
    /// # Errors
    /// The state table could not be written; whether it was is not known, and the hold ends when it
    /// would have ended before.
    pub async fn renew(&self, change: impl FnOnce(&mut R)) -> Result<bool, Fault> {
        let _turn = self.turn.lock().await;
        let known = self.row().counter();
        // It counts from before its end is worked out: the process may stand still in between.
        let sent = uptime();
        let mut row = self.renewed();
        change(&mut row);
        if self.terms.state.replace(&row, known).await? == Written::Refused {
            self.held().valid_until = Duration::ZERO;
            return Ok(false);
        }
        self.note(row, sent);
        Ok(true)
    }

    /// Renews the hold as long as `work` takes, whatever that waits for: with a small write budget a
    /// single batch may take longer than a hold is good for, and a hold that ends in its middle
    /// would be given back and begun again for ever.
    pub async fn keep<T>(&self, work: impl Future<Output = T>) -> T {
        let done = CancellationToken::new();
        let work = async {
            let worked = work.await;
            done.cancel();
            worked
        };
        tokio::join!(work, self.keep_until(&done, || |_: &mut R| ())).0
    }

    /// Renews the hold until `done`, or until it is lost. `change` says what is to be changed in its row
    /// at each renewal.
    pub async fn keep_until<C: FnOnce(&mut R)>(
        &self,
        done: &CancellationToken,
        mut change: impl FnMut() -> C,
    ) {
        loop {
            tokio::select! {
                () = done.cancelled() => return,
                () = tokio::time::sleep(self.terms.duration / 3) => {}
            }
            // Not broken off by `done`: a renewal on its way would refuse what is written to the row
            // next.
            match self.renew(change()).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(fault) => tracing::debug!(code = fault.code, "a hold was not renewed"),
            }
        }
    }

    /// Gives it back. Only where every write under it was answered completely: the next holder need
    /// not wait. If the state table does not answer, it waits all the same: later, and as right.
    pub async fn give_back(&self) {
        let _ = self.release(|_| ()).await;
    }

    /// Changes its row and gives it back, as [`give_back`](Self::give_back) does. False if it is lost.
    ///
    /// # Errors
    /// The state table could not be written; whether it was is not known.
    pub async fn release(&self, change: impl FnOnce(&mut R)) -> Result<bool, Fault> {
        let _turn = self.turn.lock().await;
        let mut row = self.row();
        let known = row.counter();
        row.count();
        row.set_holder(None);
        // Never before it was due when it was taken: a clock that was wrong for a moment must not make
        // others believe that it is.
        *row.until_mut() = self.terms.clock.now_ms().max(self.taken_until);
        change(&mut row);
        let written = self.terms.state.replace(&row, known).await?;
        self.held().valid_until = Duration::ZERO;
        Ok(written == Written::Yes)
    }

    /// Removes the row: the work is done. Refused if it is somebody else's now.
    ///
    /// # Errors
    /// The fault of the call.
    pub async fn finish(&self) -> Result<Written, Fault> {
        let _turn = self.turn.lock().await;
        self.terms.state.delete(&self.row()).await
    }
}
