//! How a shard is given up: read anew after a gap, released as asked, or finished.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::{Consumer, Ended, FIRST_PAUSE, LONGEST_PAUSE};
use crate::apply::coalesce::Window;
use crate::backoff::Backoff;
use crate::error::{Fault, Operation};
use crate::mutation::crash;
use crate::observe::health::Scope;
use crate::run::doubts::ShardDoubts;
use crate::run::source::Restart;
use crate::stream::reader::Position;

impl Consumer<'_> {
    /// Stores that the shard is read anew from the oldest record, as a gap says. Everything taken in is
    /// durable: nothing of before the gap reaches the replica any more, except what is in doubt. False
    /// if it was asked to stop before.
    pub(super) async fn begin_anew(&mut self, restart: &Restart) -> Result<bool, Ended> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            self.live(true);
            let stored = match self.store_doubts().await {
                Ok(()) => self.lease.restart(restart.found_ms).await,
                Err(fault) => Err(fault),
            };
            match stored {
                Ok(()) => break,
                Err(_) if self.lease.lost().is_cancelled() => return Err(Ended::Lost),
                Err(_) if self.stop.is_cancelled() => return Ok(false),
                Err(fault) => {
                    let health = &self.context.shared.health;
                    health.failed(Scope::State, &self.context.table.name, &self.shard, &fault);
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        }
        crash("position-stored");
        // What is put in doubt from now on begins there, and not at a position that is lost.
        self.start = Position::TrimHorizon;
        self.doubts = ShardDoubts::default();
        self.proof.begin_anew(Instant::now());
        self.window = Window::new(self.context.shared.config.coalesces(&self.context.table));
        self.stored = None;
        self.last_sequence = None;
        Ok(true)
    }

    /// Stores what is in doubt and the last checkpoint, and gives the lease up. No answer is waited
    /// for any more; dead letters that were not delivered are made again by the next owner.
    pub(super) async fn release(&mut self) -> Ended {
        self.show();
        let table = &self.context.table.name;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            self.live(true);
            let result = match self.store_progress().await {
                Ok(()) => self.lease.release().await,
                Err(fault) => Err(fault),
            };
            match result {
                Ok(()) => return Ended::Released,
                Err(_) if self.lease.lost().is_cancelled() => return Ended::Lost,
                Err(fault) => {
                    let health = &self.context.shared.health;
                    health.failed(Scope::State, table, &self.shard, &fault);
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        }
    }

    /// Stores what is in doubt, then how far everything is durable.
    pub(super) async fn store_progress(&mut self) -> Result<(), Fault> {
        self.store_doubts().await?;
        if let Some(sequence) = self.progress() {
            let proves = self.window.proven_ms();
            let said = self.may_say(proves);
            self.lease.checkpoint(&sequence, said).await?;
            self.stored = Some(sequence);
            self.proof.checkpointed(proves, said);
        }
        Ok(())
    }

    pub(super) async fn store_doubts(&mut self) -> Result<(), Fault> {
        let doubt = self.doubts.store(self.context, self.lease.shard()).await?;
        self.doubts_stored(doubt);
        Ok(())
    }

    /// The shard is applied to its end: its children get their rows, then it says SHARD_END.
    pub(super) async fn finish(&mut self, stop: &CancellationToken) -> Ended {
        let context = self.context;
        let table = &context.table.name;
        let shared = &context.shared;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        // All of it is applied, whatever comes after it.
        if let Some(ended_ms) = self.ended_ms {
            self.standing.applied_until(ended_ms);
            self.note_nothing(ended_ms);
        }
        self.show();
        loop {
            self.vital.ends();
            let lease = self.lease;
            let row = lease.row().await;
            // In order of priority: a stop does not wait for a service that does not answer.
            let children = tokio::select! {
                biased;
                () = lease.lost().cancelled() => return Ended::Lost,
                children = context.children_of(&row) => children,
                () = stop.cancelled() => return self.release().await,
            };
            let finished = async {
                // Whoever reads the children must not find this one's doubts missing.
                self.store_doubts().await?;
                let proves = self.window.proven_ms().or(self.proof.stored_ms());
                let said = self.may_say(proves);
                let at_ms = shared.source.clock.now_ms();
                lease.finish(&children?, at_ms, said).await
            };
            let result = tokio::select! {
                () = lease.lost().cancelled() => return Ended::Lost,
                result = finished => result,
            };
            match result {
                Ok(()) => {
                    shared.health.succeeded(Scope::Source, table, &self.shard);
                    // The owner may stay on a finished row; clearing it is tidy, not needed.
                    let _ = self.lease.release().await;
                    return Ended::Finished;
                }
                Err(_) if self.lease.lost().is_cancelled() => return Ended::Lost,
                Err(fault) => {
                    let scope = match fault.operation {
                        Operation::State => Scope::State,
                        _ => Scope::Source,
                    };
                    shared.health.failed(scope, table, &self.shard, &fault);
                    tokio::select! {
                        () = stop.cancelled() => return self.release().await,
                        () = tokio::time::sleep(backoff.pause()) => {}
                    }
                }
            }
        }
    }
}
