//! The fleet under torture: real worker processes, killed, paused, stopped and started again.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::process::Signal;

use crate::common::binary::Worker;
use crate::common::stand::text_of;

use super::Pace;

/// A worker that was asked to stop must have ended this long after its grace: machines are slow.
const SLACK: Duration = Duration::from_secs(6);
/// A worker that could not start is started again after this, as an orchestrator would.
const START_AGAIN: Duration = Duration::from_millis(300);
/// How much of a log is shown with a failure.
const TAIL_LINES: usize = 12;
const TAIL_WIDTH: usize = 260;

enum State {
    /// Never started.
    New,
    Up(Worker),
    /// Stopped by SIGSTOP until then.
    Paused(Worker, Instant),
    /// Asked to stop, then.
    Leaving(Worker, Instant),
    /// Ended; started again then.
    Down(Instant),
}

struct Slot {
    config: PathBuf,
    state: State,
    /// Where the log of its latest process begins.
    log_begins: usize,
}

/// What was done to the fleet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub kills: u64,
    pub stops: u64,
    pub pauses: u64,
    pub starts: u64,
    /// Starts that gave up because a region did not answer.
    pub refused: u64,
}

/// Up to four workers of one group.
pub struct Fleet {
    slots: Vec<Slot>,
    pace: Pace,
    pub done: Done,
    /// What no worker may do.
    pub troubles: Vec<String>,
}

impl Fleet {
    pub fn new(configs: Vec<PathBuf>, pace: Pace) -> Self {
        let slot = |config| Slot {
            config,
            state: State::New,
            log_begins: 0,
        };
        Self {
            slots: configs.into_iter().map(slot).collect(),
            pace,
            done: Done::default(),
            troubles: Vec::new(),
        }
    }

    fn start(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.log_begins = text_of(&slot.config.with_extension("log")).len();
        // With a safeguard turned off, to see the test fail: FARSHORE_TORTURE_MUTATION=doubts.
        let off = std::env::var("FARSHORE_TORTURE_MUTATION").unwrap_or_default();
        let environment = [("FARSHORE_TEST_MUTATION", off.as_str())];
        slot.state = State::Up(Worker::start_with(&slot.config, &environment));
        self.done.starts += 1;
    }

    /// Starts a worker that never ran, if there is one.
    pub fn start_another(&mut self) {
        let new = |slot: &Slot| matches!(slot.state, State::New);
        if let Some(index) = self.slots.iter().position(new) {
            self.start(index);
        }
    }

    fn any_up(&self, random: &mut StdRng) -> Option<usize> {
        let up = |index: &usize| matches!(self.slots[*index].state, State::Up(_));
        let up: Vec<usize> = (0..self.slots.len()).filter(up).collect();
        (!up.is_empty()).then(|| up[random.random_range(0..up.len())])
    }

    /// Moves a worker that is up to another state.
    fn turn(&mut self, index: usize, into: impl FnOnce(Worker) -> State) {
        let slot = &mut self.slots[index];
        slot.state = match std::mem::replace(&mut slot.state, State::New) {
            State::Up(worker) => into(worker),
            other => other,
        };
    }

    /// SIGKILL, and a start some time later.
    pub fn kill(&mut self, random: &mut StdRng) {
        let away = Duration::from_millis(random.random_range(0..1_200));
        if let Some(index) = self.any_up(random) {
            self.turn(index, |worker| {
                worker.kill();
                State::Down(Instant::now() + away)
            });
            self.done.kills += 1;
        }
    }

    /// SIGTERM, and a start once it has ended.
    pub fn ask_to_stop(&mut self, random: &mut StdRng) {
        if let Some(index) = self.any_up(random) {
            self.turn(index, |worker| {
                worker.signal(Signal::TERM);
                State::Leaving(worker, Instant::now())
            });
            self.done.stops += 1;
        }
    }

    /// SIGSTOP for 0.3 to 3 leases, then SIGCONT.
    pub fn pause(&mut self, random: &mut StdRng) {
        let length = self.pace.lease().mul_f64(random.random_range(0.3..3.0));
        if let Some(index) = self.any_up(random) {
            self.turn(index, |worker| {
                worker.signal(Signal::STOP);
                State::Paused(worker, Instant::now() + length)
            });
            self.done.pauses += 1;
        }
    }

    /// Does what is due, and notes what must not be.
    pub fn tend(&mut self) {
        let (now, limit) = (Instant::now(), self.pace.grace() + SLACK);
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let mut begin = false;
            slot.state = match std::mem::replace(&mut slot.state, State::New) {
                State::Paused(worker, until) if until <= now => {
                    worker.signal(Signal::CONT);
                    State::Up(worker)
                }
                State::Down(until) if until <= now => {
                    begin = true;
                    State::Down(until)
                }
                State::Up(mut worker) => match worker.exited() {
                    None => State::Up(worker),
                    Some(status) => {
                        self.done.refused += 1;
                        // It may give up while it finds out its role, not later.
                        if status.code() != Some(2) || feeds(&slot.config, slot.log_begins) {
                            let trouble = format!("worker {index} ended by itself: {status}");
                            self.troubles.push(trouble);
                        }
                        State::Down(now + START_AGAIN)
                    }
                },
                State::Leaving(mut worker, since) => match worker.exited() {
                    Some(status) => {
                        let early = !feeds(&slot.config, slot.log_begins);
                        if !matches!(status.code(), Some(0 | 1)) && !early {
                            let trouble = format!("worker {index}, asked to stop: {status}");
                            self.troubles.push(trouble);
                        }
                        State::Down(now + START_AGAIN)
                    }
                    None if since.elapsed() > limit => {
                        let trouble = format!("worker {index} did not stop within its grace");
                        self.troubles.push(trouble);
                        worker.kill();
                        State::Down(now)
                    }
                    None => State::Leaving(worker, since),
                },
                other => other,
            };
            if begin {
                self.start(index);
            }
        }
    }

    /// The torture is over: no pause lasts any longer, and who is down comes back at once.
    pub fn recover(&mut self) {
        let now = Instant::now();
        for slot in &mut self.slots {
            match &mut slot.state {
                State::Paused(_, until) | State::Down(until) => *until = now,
                _ => {}
            }
        }
        self.tend();
    }

    /// Whether every worker that ever ran is up.
    pub fn is_whole(&self) -> bool {
        let whole = |slot: &Slot| matches!(slot.state, State::Up(_) | State::New);
        self.slots.iter().all(whole)
    }

    pub fn up(&self) -> impl Iterator<Item = &Worker> {
        self.slots.iter().filter_map(|slot| match &slot.state {
            State::Up(worker) => Some(worker),
            _ => None,
        })
    }

    /// Stops all that is up, and expects each to give up its leases and to say so.
    pub async fn stop(&mut self) {
        let limit = self.pace.grace() + SLACK;
        // All at once, so that none takes over what another gives up.
        self.up().for_each(|worker| worker.signal(Signal::TERM));
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if let State::Up(mut worker) = std::mem::replace(&mut slot.state, State::New) {
                let code = worker.ended(limit).await.code();
                if code != Some(0) {
                    let trouble = format!("worker {index} was stopped at rest and exited {code:?}");
                    self.troubles.push(trouble);
                }
            }
        }
    }

    /// The last lines of every log.
    pub fn tails(&self) -> String {
        let mut text = String::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let log = text_of(&slot.config.with_extension("log"));
            let lines: Vec<&str> = log.lines().collect();
            text.push_str(&format!("-- worker {index}, {} lines:\n", lines.len()));
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                text.extend(line.chars().take(TAIL_WIDTH));
                text.push('\n');
            }
        }
        text
    }
}

/// Whether the process whose log begins there found its role.
fn feeds(config: &std::path::Path, log_begins: usize) -> bool {
    let log = text_of(&config.with_extension("log"));
    log.get(log_begins..)
        .is_some_and(|log| log.contains(" feeding "))
}
