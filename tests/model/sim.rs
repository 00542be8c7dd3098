//! Virtual time: tasks that wait, processes that stand still or die, and one seed that decides.
//!
//! Everything happens on one thread, in the order of a queue: an entry wakes a task or does something
//! to the world. A task that belongs to a process which stands still is woken when that goes on.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::world::World;

/// Milliseconds of virtual time.
pub type Ms = i64;
pub type TaskId = usize;
pub type ProcessId = usize;
/// The process that services and chaos belong to: it never stands still.
pub const SYSTEM: ProcessId = 0;
/// Standing still for longer counts as a pause (mirrors `dynamo::pause::LIMIT`).
const PAUSE_LIMIT: Ms = 500;
/// Events printed with a failure.
const LAST_EVENTS: usize = 40;
const BEGIN: Ms = 1_000_000;

pub type Later<T> = Pin<Box<dyn Future<Output = T>>>;

/// Something that happens to the world at its time.
type Deed = Box<dyn FnOnce(&Rc<World>)>;

enum What {
    Wake(TaskId),
    Do(Deed),
}

struct Entry {
    at: Ms,
    serial: u64,
    what: What,
}

impl Ord for Entry {
    /// The earliest is the greatest: the queue is a max-heap.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.serial).cmp(&(self.at, self.serial))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

struct Task {
    process: ProcessId,
    future: Option<Later<()>>,
}

#[derive(Debug, Clone, Copy)]
struct Process {
    alive: bool,
    paused_until: Ms,
    pauses: u64,
    /// How far its wall clock is off.
    skew: Ms,
}

/// Time, tasks, processes and dice.
pub struct Sim {
    now: Cell<Ms>,
    serial: Cell<u64>,
    queue: RefCell<BinaryHeap<Entry>>,
    tasks: RefCell<Vec<Task>>,
    current: Cell<TaskId>,
    processes: RefCell<Vec<Process>>,
    dice: Cell<u64>,
    base: Instant,
    pub events: Cell<u64>,
    pub tracing: Tracing,
    trace: RefCell<VecDeque<String>>,
    failure: RefCell<Option<String>>,
}

/// What becomes of the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracing {
    Off,
    /// The last events are kept.
    Last,
    /// Every event is printed.
    Print,
}

/// Notes an event, if anybody wants to know.
macro_rules! note {
    ($world:expr, $($what:tt)*) => {
        if $world.sim.tracing != $crate::model::sim::Tracing::Off {
            $world.sim.note(format!($($what)*));
        }
    };
}
pub(crate) use note;

impl Sim {
    pub fn new(seed: u64, tracing: Tracing) -> Self {
        let system = Process {
            alive: true,
            paused_until: 0,
            pauses: 0,
            skew: 0,
        };
        Self {
            now: Cell::new(BEGIN),
            serial: Cell::new(0),
            queue: RefCell::default(),
            tasks: RefCell::default(),
            current: Cell::new(0),
            processes: RefCell::new(vec![system]),
            dice: Cell::new(seed),
            base: Instant::now(),
            events: Cell::new(0),
            tracing,
            trace: RefCell::default(),
            failure: RefCell::default(),
        }
    }

    pub fn now(&self) -> Ms {
        self.now.get()
    }

    /// Now, as the crate's rules want it.
    pub fn instant(&self) -> Instant {
        self.base + Duration::from_millis((self.now() - BEGIN) as u64)
    }

    /// A number below `bound` (splitmix64).
    pub fn below(&self, bound: u64) -> u64 {
        let state = self.dice.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.dice.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// From `low` to `high`, both included.
    pub fn between(&self, low: Ms, high: Ms) -> Ms {
        low + self.below((high - low + 1) as u64) as Ms
    }

    /// Whether something of this many per mille happens.
    pub fn chance(&self, per_mille: u64) -> bool {
        self.below(1_000) < per_mille
    }

    pub fn pick<T: Copy>(&self, among: &[T]) -> Option<T> {
        match among.len() {
            0 => None,
            len => Some(among[self.below(len as u64) as usize]),
        }
    }

    pub fn note(&self, what: String) {
        let line = format!("{:>9.3} {what}", (self.now() - BEGIN) as f64 / 1_000.0);
        if self.tracing == Tracing::Print {
            println!("{line}");
        }
        let mut trace = self.trace.borrow_mut();
        if trace.len() == LAST_EVENTS {
            trace.pop_front();
        }
        trace.push_back(line);
    }

    pub fn last_events(&self) -> Vec<String> {
        self.trace.borrow().iter().cloned().collect()
    }

    /// A promise is broken: the run ends here.
    pub fn fail(&self, what: String) {
        if self.tracing != Tracing::Off {
            self.note(format!("BROKEN: {what}"));
        }
        self.failure.borrow_mut().get_or_insert(what);
    }

    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    pub fn new_process(&self, skew: Ms) -> ProcessId {
        let mut processes = self.processes.borrow_mut();
        processes.push(Process {
            alive: true,
            paused_until: 0,
            pauses: 0,
            skew,
        });
        processes.len() - 1
    }

    fn process(&self, id: ProcessId) -> Process {
        self.processes.borrow()[id]
    }

    pub fn is_alive(&self, id: ProcessId) -> bool {
        self.process(id).alive
    }

    pub fn is_paused(&self, id: ProcessId) -> bool {
        self.process(id).paused_until > self.now()
    }

    /// Pauses of a process so far (mirrors `dynamo::pause::count`).
    pub fn pauses(&self, id: ProcessId) -> u64 {
        self.process(id).pauses
    }

    /// What the process takes for the service's time.
    pub fn wall_ms(&self, id: ProcessId) -> Ms {
        self.now() + self.process(id).skew
    }

    pub fn pause(&self, id: ProcessId, length: Ms) {
        let process = &mut self.processes.borrow_mut()[id];
        process.paused_until = process.paused_until.max(self.now() + length);
        process.pauses += u64::from(length >= PAUSE_LIMIT);
    }

    pub fn resume(&self, id: ProcessId) {
        self.processes.borrow_mut()[id].paused_until = 0;
        // Who waits for a later moment is woken once more than needed.
        for task in 0..self.tasks.borrow().len() {
            self.wake(task);
        }
    }

    /// The process is gone, and all its tasks with it.
    pub fn kill(&self, id: ProcessId) {
        self.processes.borrow_mut()[id].alive = false;
        let mut dead = Vec::new();
        for task in self.tasks.borrow_mut().iter_mut() {
            if task.process == id {
                dead.extend(task.future.take());
            }
        }
    }

    pub fn spawn(&self, process: ProcessId, future: impl Future<Output = ()> + 'static) -> TaskId {
        let id = {
            let mut tasks = self.tasks.borrow_mut();
            tasks.push(Task {
                process,
                future: Some(Box::pin(future)),
            });
            tasks.len() - 1
        };
        self.wake(id);
        id
    }

    pub fn current(&self) -> TaskId {
        self.current.get()
    }

    pub fn wake(&self, task: TaskId) {
        self.wake_at(self.now(), task);
    }

    pub fn wake_at(&self, at: Ms, task: TaskId) {
        self.enqueue(at, What::Wake(task));
    }

    /// Does something at a time, whatever becomes of the process that asked for it.
    pub fn at(&self, at: Ms, work: impl FnOnce(&Rc<World>) + 'static) {
        self.enqueue(at, What::Do(Box::new(work)));
    }

    fn enqueue(&self, at: Ms, what: What) {
        let serial = self.serial.get() + 1;
        self.serial.set(serial);
        let at = at.max(self.now());
        self.queue.borrow_mut().push(Entry { at, serial, what });
    }

    /// Lets time pass until a promise is broken or nothing is left to happen.
    pub fn run(&self, world: &Rc<World>) {
        loop {
            let Some(entry) = self.queue.borrow_mut().pop() else {
                return;
            };
            self.now.set(entry.at);
            self.events.set(self.events.get() + 1);
            match entry.what {
                What::Do(work) => work(world),
                What::Wake(task) => self.poll(task),
            }
            if self.failure.borrow().is_some() {
                return;
            }
        }
    }

    fn poll(&self, id: TaskId) {
        let (process, future) = {
            let mut tasks = self.tasks.borrow_mut();
            let task = &mut tasks[id];
            let process = self.process(task.process);
            if process.paused_until > self.now() && task.future.is_some() {
                drop(tasks);
                return self.wake_at(process.paused_until, id);
            }
            (task.process, task.future.take())
        };
        let Some(mut future) = future else {
            return;
        };
        self.current.set(id);
        let mut context = Context::from_waker(Waker::noop());
        if future.as_mut().poll(&mut context).is_pending() && self.is_alive(process) {
            self.tasks.borrow_mut()[id].future = Some(future);
        }
    }

    /// Ends the run: drops every task.
    pub fn end(&self) {
        self.queue.borrow_mut().clear();
        let futures: Vec<_> = {
            let mut tasks = self.tasks.borrow_mut();
            tasks.iter_mut().map(|task| task.future.take()).collect()
        };
        drop(futures);
    }
}

/// A moment that a task waits for.
#[derive(Default)]
pub struct Alarm {
    asked: Ms,
}

impl Alarm {
    /// Whether `at` has come; otherwise the current task is woken then.
    pub fn is_due(&mut self, sim: &Sim, at: Ms) -> bool {
        if sim.now() >= at {
            return true;
        }
        if self.asked != at {
            self.asked = at;
            sim.wake_at(at, sim.current());
        }
        false
    }
}

pub async fn sleep(sim: &Sim, length: Ms) {
    let until = sim.now() + length;
    let mut alarm = Alarm::default();
    poll_fn(|_| ready(alarm.is_due(sim, until))).await;
}

pub fn ready(ready: bool) -> Poll<()> {
    match ready {
        true => Poll::Ready(()),
        false => Poll::Pending,
    }
}

/// Tasks to wake when something changes.
#[derive(Default)]
pub struct Bell {
    waiting: RefCell<Vec<TaskId>>,
}

impl Bell {
    pub fn wait(&self, sim: &Sim) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.contains(&sim.current()) {
            waiting.push(sim.current());
        }
    }

    pub fn ring(&self, sim: &Sim) {
        for task in self.waiting.borrow_mut().drain(..) {
            sim.wake(task);
        }
    }
}

/// Something that is said once (mirrors `CancellationToken`).
#[derive(Default)]
pub struct Signal {
    set: Cell<bool>,
    bell: Bell,
}

impl Signal {
    pub fn is_set(&self) -> bool {
        self.set.get()
    }

    pub fn set(&self, sim: &Sim) {
        self.set.set(true);
        self.bell.ring(sim);
    }

    /// Whether it is set; otherwise the current task is woken when it is.
    pub fn look(&self, sim: &Sim) -> bool {
        if !self.set.get() {
            self.bell.wait(sim);
        }
        self.set.get()
    }
}

/// An answer on its way.
pub struct Reply<T> {
    answer: RefCell<Option<T>>,
    task: TaskId,
}

impl<T> Reply<T> {
    /// To be waited for by the current task.
    pub fn new(sim: &Sim) -> Rc<Self> {
        Rc::new(Self {
            answer: RefCell::new(None),
            task: sim.current(),
        })
    }

    pub fn send(&self, sim: &Sim, answer: T) {
        *self.answer.borrow_mut() = Some(answer);
        sim.wake(self.task);
    }

    pub fn take(&self) -> Option<T> {
        self.answer.borrow_mut().take()
    }

    pub async fn wait(&self) -> T {
        poll_fn(|_| match self.take() {
            Some(answer) => Poll::Ready(answer),
            None => Poll::Pending,
        })
        .await
    }
}

/// One at a time (mirrors `tokio::sync::Mutex`).
pub struct Lock<T> {
    value: RefCell<T>,
    taken: Cell<bool>,
    bell: Bell,
}

/// The right to what a [`Lock`] holds.
pub struct Guard<'a, T> {
    lock: &'a Lock<T>,
    sim: &'a Sim,
}

impl<T: Clone> Lock<T> {
    pub fn new(value: T) -> Self {
        Self {
            value: RefCell::new(value),
            taken: Cell::new(false),
            bell: Bell::default(),
        }
    }

    pub async fn lock<'a>(&'a self, sim: &'a Sim) -> Guard<'a, T> {
        poll_fn(|_| {
            if self.taken.get() {
                self.bell.wait(sim);
                return Poll::Pending;
            }
            self.taken.set(true);
            Poll::Ready(())
        })
        .await;
        Guard { lock: self, sim }
    }
}

impl<T: Clone> Guard<'_, T> {
    pub fn get(&self) -> T {
        self.lock.value.borrow().clone()
    }

    pub fn set(&self, value: T) {
        *self.lock.value.borrow_mut() = value;
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.lock.taken.set(false);
        self.lock.bell.ring(self.sim);
    }
}

/// Waits for `work`, or gives `None` once `stop` is set (mirrors a biased `select!`).
pub async fn unless<T>(sim: &Sim, stop: &Signal, work: impl Future<Output = T>) -> Option<T> {
    let mut work = std::pin::pin!(work);
    poll_fn(|context| {
        if stop.look(sim) {
            return Poll::Ready(None);
        }
        work.as_mut().poll(context).map(Some)
    })
    .await
}
