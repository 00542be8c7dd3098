//! The replica: what it holds, and how writes get there: late, twice, in part, or never.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;

use farshore::mutation::{Mutation, is_off};

use super::lease::Bound;
use super::sim::{Alarm, Ms, ProcessId, Reply, Signal, note, sleep, unless};
use super::source::{Key, Value};
use super::world::{LATE_EFFECT, World, stumble};

/// Longest wait for the answer to a write (mirrors `apply::batch::ATTEMPT_TIMEOUT`).
const ATTEMPT_TIMEOUT: Ms = 10_000;
/// Mirrors `apply::batch::LEASE_MARGIN`.
const LEASE_MARGIN: Ms = 100;

/// One operation of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Put {
    pub key: Key,
    pub value: Value,
    /// Number of the record it comes from; 0 for a repair's.
    pub number: u64,
}

#[derive(Default)]
pub struct Replica {
    pub items: BTreeMap<Key, Value>,
    /// The last record of each key that took effect at some time.
    pub applied: BTreeMap<Key, u64>,
    /// Writes that may still take effect.
    pub under_way: usize,
}

/// What the service answers.
#[derive(Debug, Clone)]
enum Reaction {
    /// All applied but these, by position.
    Done(Vec<usize>),
    Throttled,
    /// A 5xx: nobody knows.
    Broken,
}

/// How one call ended (mirrors `apply::batch::Answer`).
#[derive(Debug)]
pub enum Answer {
    Done { unprocessed: Vec<usize> },
    Failed,
    Stopped,
}

/// One call within `bound` (mirrors `Writer::send` and, inside it, `transmit::within`). Says as well
/// whether it left without a complete answer in time.
pub async fn send(
    world: &Rc<World>,
    process: ProcessId,
    bound: &Rc<dyn Bound>,
    stop: &Signal,
    puts: &[Put],
) -> (Answer, bool) {
    let sim = &world.sim;
    // `Writer::send`: the budget is waited for, and a stop ends that.
    let waited = unless(sim, stop, sleep(sim, sim.between(0, 20))).await;
    if waited.is_none() {
        return (Answer::Stopped, false);
    }
    // `Writer::send`: the first look at the lease.
    let remaining = bound.remaining(sim.now());
    if remaining <= LEASE_MARGIN {
        return (Answer::Failed, false);
    }
    let until = sim.now() + ATTEMPT_TIMEOUT.min(remaining - LEASE_MARGIN);
    let pauses = sim.pauses(process);
    let left = Cell::new(false);
    // `transmit::within`: the call against its timeout and against a pause of the process.
    let answer = {
        let mut call = std::pin::pin!(call(world, process, bound, pauses, puts, &left));
        let mut alarm = Alarm::default();
        poll_fn(|context| {
            let paused = sim.pauses(process) != pauses;
            // Which of two that are ready goes first is the runtime's to choose.
            if paused && sim.chance(500) {
                return Poll::Ready(None);
            }
            if let Poll::Ready(answer) = call.as_mut().poll(context) {
                return Poll::Ready(answer);
            }
            match paused || alarm.is_due(sim, until) {
                true => Poll::Ready(None),
                false => Poll::Pending,
            }
        })
        .await
    };
    // `Writer::send`: an answer after the lease's end is as good as none.
    let in_time = bound.remaining(sim.now()) > 0;
    let settled = match &answer {
        Some(Reaction::Done(_)) => in_time,
        Some(Reaction::Throttled) => true,
        Some(Reaction::Broken) | None => false,
    };
    let unanswered = left.get() && !settled;
    let answer = match answer {
        Some(Reaction::Done(unprocessed)) => Answer::Done { unprocessed },
        _ => Answer::Failed,
    };
    if unanswered {
        world.count(|counts| counts.unanswered += 1);
        note!(world, "p{process}: {} got no answer in time", show(puts));
    }
    (answer, unanswered)
}

/// Builds, signs and transmits one request. `None` where it was not let out.
async fn call(
    world: &Rc<World>,
    process: ProcessId,
    bound: &Rc<dyn Bound>,
    pauses: u64,
    puts: &[Put],
    left: &Cell<bool>,
) -> Option<Reaction> {
    let sim = &world.sim;
    // Credentials are fetched, the request is built and signed.
    sleep(sim, sim.between(0, 10)).await;
    stumble(world, process).await;
    let signed = sim.wall_ms(process);
    stumble(world, process).await;
    // `transmit::Connector::call`: the second look.
    if !is_off(Mutation::Transmit)
        && (sim.pauses(process) != pauses || bound.remaining(sim.now()) == 0)
    {
        return None;
    }
    if let Some(wrong) = bound.objection(sim.now()) {
        let what = show(puts);
        sim.fail(format!("p{process} transmits {what} {wrong}"));
    }
    if bound.remaining(sim.now()) == 0 {
        let what = show(puts);
        sim.fail(format!("p{process} transmits {what} without a right to"));
    }
    left.set(true);
    Some(transmit(world, process, signed, puts).wait().await)
}

/// How a write goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Answered,
    /// Answered after a while: perhaps after the timeout or the lease.
    Slow,
    /// It takes effect, and the answer is lost or is a 5xx.
    Lost,
    /// It is cut off before it arrives.
    Cut,
    /// It takes effect after its sender gave up.
    Late,
    Throttled,
    Part,
}

const FATES: [Fate; 9] = [
    Fate::Slow,
    Fate::Lost,
    Fate::Cut,
    Fate::Late,
    Fate::Late,
    Fate::Late,
    Fate::Late,
    Fate::Throttled,
    Fate::Part,
];

/// Hands a request to the network.
fn transmit(
    world: &Rc<World>,
    process: ProcessId,
    signed: Ms,
    puts: &[Put],
) -> Rc<Reply<Reaction>> {
    let sim = &world.sim;
    let reply = Reply::new(sim);
    let fate = match world.fate(world.rates.writes_fail) {
        true => FATES[sim.below(FATES.len() as u64) as usize],
        false => Fate::Answered,
    };
    note!(world, "p{process}: transmits {} ({fate:?})", show(puts));
    let soon = sim.now() + sim.between(1, 25);
    let after = soon + sim.between(1, 25);
    let answer = |at: Ms, reaction: Reaction| {
        let reply = Rc::clone(&reply);
        sim.at(at, move |world| reply.send(&world.sim, reaction));
    };
    match fate {
        Fate::Answered => {
            effect(world, soon, signed, puts.to_vec(), false);
            answer(after, Reaction::Done(Vec::new()));
        }
        Fate::Slow => {
            effect(world, soon, signed, puts.to_vec(), false);
            answer(soon + sim.between(500, 12_000), Reaction::Done(Vec::new()));
        }
        Fate::Lost => {
            effect(world, soon, signed, puts.to_vec(), false);
            if sim.chance(500) {
                answer(after, Reaction::Broken);
            }
        }
        Fate::Cut => answer(after, Reaction::Broken),
        Fate::Late => {
            // A batch is no transaction: each operation at a time of its own, or all at one.
            let latest = (signed + LATE_EFFECT * 8 / 10).max(sim.now());
            let together = sim.between(sim.now(), latest);
            for put in puts {
                let at = match sim.chance(300) {
                    true => sim.between(sim.now(), latest),
                    false => together,
                };
                effect(world, at, signed, vec![*put], true);
            }
            // Given up by the sender's own timeout, or cut off before that.
            if sim.chance(700) {
                answer(sim.now() + sim.between(20, 1_500), Reaction::Broken);
            }
        }
        Fate::Throttled => answer(after, Reaction::Throttled),
        Fate::Part => {
            let unprocessed: Vec<usize> = (0..puts.len()).filter(|_| sim.chance(500)).collect();
            let done = puts.iter().enumerate();
            let done = done.filter(|(at, _)| !unprocessed.contains(at));
            effect(
                world,
                soon,
                signed,
                done.map(|(_, put)| *put).collect(),
                false,
            );
            answer(after, Reaction::Done(unprocessed));
        }
    }
    reply
}

/// Lets `puts` take effect at a time. The service refuses what was signed too long ago.
fn effect(world: &Rc<World>, at: Ms, signed: Ms, puts: Vec<Put>, late: bool) {
    world.replica.borrow_mut().under_way += 1;
    world.sim.at(at, move |world| {
        let mut replica = world.replica.borrow_mut();
        replica.under_way -= 1;
        if world.sim.now() > signed + LATE_EFFECT {
            return;
        }
        if late {
            world.count(|counts| counts.late_writes += 1);
            note!(world, "replica: {} takes effect late", show(&puts));
        }
        for put in &puts {
            let held = replica.items.insert(put.key, put.value);
            let applied = replica.applied.entry(put.key).or_default();
            if put.number != 0 && put.number < *applied && held != Some(put.value) {
                world.count(|counts| counts.older_over_newer += 1);
            }
            *applied = put.number.max(*applied);
        }
    });
}

/// The item under a key, read consistently.
pub async fn item(world: &Rc<World>, key: Key) -> Value {
    let sim = &world.sim;
    sleep(sim, sim.between(1, 15)).await;
    let value = world.replica.borrow().items.get(&key).copied().flatten();
    sleep(sim, sim.between(1, 15)).await;
    value
}

fn show(puts: &[Put]) -> String {
    let show = |put: &Put| format!("{}={:?}@{}", put.key, put.value, put.number);
    puts.iter().map(show).collect::<Vec<_>>().join(" ")
}
