//! Discovery: the one task of a stream that lists its shards, out of everybody's way.
//!
//! ```text
//!   a shard ended: its children? ─┐
//!   a complete listing, please ───┼─▶ few waiting:  CHILD_SHARDS for each
//!   every `every`, with jitter ───┘   many waiting: one complete listing for all ─▶ published
//! ```
//!
//! An answer counts only if it was asked for after the question: an older listing may lack what
//! the question is about. Children may be listed later than their parent ends, so they are asked
//! for again and again, and only a complete listing begun [`PATIENCE`] after the question decides
//! that there are none.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::backoff::Backoff;
use crate::dynamo::clock::uptime;
use crate::error::{Class, Fault, Policy};
use crate::mutation::trouble;
use crate::stream::listing::Lister;
use crate::stream::{Shard, ShardId, stream_label};

/// Up to this many questions are asked one by one however short the listing is.
const FEW: usize = 4;
/// How long children may be listed later than their parent ended.
const PATIENCE: Duration = Duration::from_secs(5);
const CHILDREN_FIRST_PAUSE: Duration = Duration::from_millis(50);
const CHILDREN_LONGEST_PAUSE: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Questions on their way; whoever asks more waits for room.
const QUESTIONS_MAX: usize = 1_024;

/// A complete listing.
#[derive(Debug)]
pub struct Listed {
    /// The shards. None if the stream is forgotten.
    pub shards: Vec<Shard>,
    /// When it began.
    pub began: Instant,
    /// The same, by [`uptime`].
    pub began_uptime: Duration,
    /// How many complete listings there were, this one included.
    pub number: u64,
    /// Whether the service does not know the stream any more.
    pub forgotten: bool,
}

impl Listed {
    /// Whether it began less than `longest` ago. An older one makes no rows: what it shows may have been read,
    /// forgotten by the service, and its row deleted since.
    pub fn is_fresh(&self, longest: Duration) -> bool {
        uptime().saturating_sub(self.began_uptime) < longest
    }
}

/// What discovery tells the worker, and asks it.
pub trait Surroundings: Send + Sync + 'static {
    /// A page of a listing came.
    fn paged(&self);
    /// A complete listing, begun then, is done.
    fn listed(&self, began: Instant);
    /// The service answered.
    fn succeeded(&self);
    /// A call failed; it is made again.
    fn failed(&self, fault: &Fault);
    /// The task died; it is started again.
    fn died(&self);
    /// Whether a newer stream has taken this one's place, so that the service may forget it.
    fn is_replaced(&self) -> bool;
}

/// Asks a stream's discovery task. Clones ask the same one.
#[derive(Clone, Debug)]
pub struct Discovery {
    questions: mpsc::Sender<Question>,
    listed: watch::Receiver<Option<Arc<Listed>>>,
    soon: Arc<Notify>,
}

/// The other end of a [`Discovery`], from which its task is made.
pub struct Duty {
    questions: Arc<Mutex<mpsc::Receiver<Question>>>,
    listed: Arc<watch::Sender<Option<Arc<Listed>>>>,
    soon: Arc<Notify>,
}

#[derive(Debug)]
struct Question {
    asked: Instant,
    about: About,
}

#[derive(Debug)]
enum About {
    Listing(oneshot::Sender<Arc<Listed>>),
    Children {
        parent: ShardId,
        /// Some have rows already: an answer without any is an answer.
        some_known: bool,
        reply: oneshot::Sender<Vec<Shard>>,
    },
}

/// A discovery that nobody has made a task of yet, and what the task is made from.
pub fn discovery() -> (Discovery, Duty) {
    let (questions, asked) = mpsc::channel(QUESTIONS_MAX);
    let (listed, seen) = watch::channel(None);
    let soon = Arc::new(Notify::new());
    let discovery = Discovery {
        questions,
        listed: seen,
        soon: Arc::clone(&soon),
    };
    let duty = Duty {
        questions: Arc::new(Mutex::new(asked)),
        listed: Arc::new(listed),
        soon,
    };
    (discovery, duty)
}

impl Discovery {
    /// The children of the ended shard `parent`; none if it has none. `some_known` says that some
    /// have rows already. Waits until the service answers, and may be dropped while it does.
    pub async fn children(&self, parent: &ShardId, some_known: bool) -> Vec<Shard> {
        self.ask(|reply| About::Children {
            parent: parent.clone(),
            some_known,
            reply,
        })
        .await
    }

    /// A complete listing begun after now. Waits until there is one, and may be dropped while it
    /// does.
    pub async fn listing(&self) -> Arc<Listed> {
        self.ask(About::Listing).await
    }

    /// Asks for a complete listing begun after now, and does not wait for it.
    pub fn list_soon(&self) {
        self.soon.notify_one();
    }

    /// The last complete listing.
    pub fn last(&self) -> Option<Arc<Listed>> {
        self.listed.borrow().clone()
    }

    /// Hears of every complete listing.
    pub fn listings(&self) -> watch::Receiver<Option<Arc<Listed>>> {
        self.listed.clone()
    }

    async fn ask<T>(&self, about: impl Fn(oneshot::Sender<T>) -> About) -> T {
        let asked = Instant::now();
        let mut backoff = Backoff::new(CHILDREN_FIRST_PAUSE, CHILDREN_LONGEST_PAUSE);
        loop {
            let (reply, answer) = oneshot::channel();
            let question = Question {
                asked,
                about: about(reply),
            };
            if self.questions.send(question).await.is_ok()
                && let Ok(answer) = answer.await
            {
                return answer;
            }
            // The task died with the question; it is started again.
            tokio::time::sleep(backoff.pause()).await;
        }
    }
}

impl Duty {
    /// Lists the stream `arn` for whoever asks, and every `every` times the number of workers.
    /// Never ends: if the task behind it dies, it is started again.
    pub async fn run(
        self,
        lister: Lister,
        arn: String,
        every: Duration,
        surroundings: Arc<dyn Surroundings>,
    ) {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            let questions = Arc::clone(&self.questions);
            let task = Task {
                lister: lister.clone(),
                arn: arn.clone(),
                every,
                surroundings: Arc::clone(&surroundings),
                listed: Arc::clone(&self.listed),
                soon: Arc::clone(&self.soon),
                waiting: Vec::new(),
                next_listing: Instant::now(),
                not_before: Instant::now(),
                backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
                pages: 1,
            };
            // A set of one: dropped with this future, it takes the task with it.
            let mut tasks = JoinSet::new();
            tasks.spawn(async move { task.serve(&mut *questions.lock().await).await });
            match tasks.join_next().await {
                // Nobody can ask any more.
                Some(Ok(())) => return,
                _ => {
                    surroundings.died();
                    tracing::error!(
                        stream = stream_label(&arn),
                        "the task that lists a stream died; it is started again"
                    );
                }
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }
}

/// A question that waits for its answer.
struct Waiting {
    question: Question,
    due: Instant,
    backoff: Backoff,
    /// Only a complete listing can answer it.
    needs_all: bool,
}

impl Waiting {
    fn new(question: Question) -> Self {
        Self {
            needs_all: matches!(question.about, About::Listing(_)),
            due: question.asked,
            backoff: Backoff::new(CHILDREN_FIRST_PAUSE, CHILDREN_LONGEST_PAUSE),
            question,
        }
    }

    fn is_abandoned(&self) -> bool {
        match &self.question.about {
            About::Listing(reply) => reply.is_closed(),
            About::Children { reply, .. } => reply.is_closed(),
        }
    }

    /// Asked again after a while; once patience has run out, a complete listing decides.
    fn put_off(&mut self) {
        self.due = Instant::now() + self.backoff.pause();
        self.needs_all = self.question.asked.elapsed() >= PATIENCE;
    }

    /// Answers from a complete listing, if that can answer it. `None` once answered.
    fn answered_by(mut self, listed: &Arc<Listed>, children: &Children<'_>) -> Option<Self> {
        if self.question.asked > listed.began {
            return Some(self);
        }
        match self.question.about {
            About::Listing(reply) => {
                // Whoever asked may be gone.
                let _ = reply.send(Arc::clone(listed));
                None
            }
            About::Children {
                parent,
                some_known,
                reply,
            } => {
                let found = children.get(&parent).map_or(&[][..], Vec::as_slice);
                let patient = listed.began - self.question.asked >= PATIENCE;
                if !found.is_empty() || some_known || patient || listed.forgotten {
                    let _ = reply.send(found.iter().map(|shard| (*shard).clone()).collect());
                    return None;
                }
                self.question.about = About::Children {
                    parent,
                    some_known,
                    reply,
                };
                self.put_off();
                Some(self)
            }
        }
    }
}

/// The shards of a listing by their parent.
type Children<'a> = HashMap<&'a ShardId, Vec<&'a Shard>>;

struct Task {
    lister: Lister,
    arn: String,
    every: Duration,
    surroundings: Arc<dyn Surroundings>,
    listed: Arc<watch::Sender<Option<Arc<Listed>>>>,
    soon: Arc<Notify>,
    waiting: Vec<Waiting>,
    next_listing: Instant,
    /// Nothing is asked before this: the service has just failed.
    not_before: Instant,
    backoff: Backoff,
    /// Pages of the last complete listing: what one costs.
    pages: usize,
}

impl Task {
    async fn serve(mut self, questions: &mut mpsc::Receiver<Question>) {
        loop {
            // All that have come, so that a crowd is seen as one.
            while let Ok(question) = questions.try_recv() {
                self.waiting.push(Waiting::new(question));
            }
            self.waiting.retain(|waiting| !waiting.is_abandoned());
            let now = Instant::now();
            if now >= self.not_before {
                let due = || self.waiting.iter().filter(|waiting| waiting.due <= now);
                let crowd = due().count() > FEW.max(self.pages);
                if now >= self.next_listing || crowd || due().any(|waiting| waiting.needs_all) {
                    self.list_all().await;
                    continue;
                }
                if due().next().is_some() {
                    self.ask_one_by_one().await;
                    continue;
                }
            }
            let wake = self.waiting.iter().map(|waiting| waiting.due).min();
            let wake = wake.map_or(self.next_listing, |due| due.min(self.next_listing));
            tokio::select! {
                question = questions.recv() => match question {
                    Some(question) => self.waiting.push(Waiting::new(question)),
                    None => return,
                },
                () = self.soon.notified() => self.next_listing = Instant::now(),
                () = tokio::time::sleep_until(wake.max(self.not_before).into()) => {}
            }
        }
    }

    /// Lists the whole stream, publishes it, and answers what it can answer.
    async fn list_all(&mut self) {
        trouble("discovery").await;
        let (began, began_uptime) = (Instant::now(), uptime());
        let pages = AtomicUsize::new(0);
        let on_page = || {
            pages.fetch_add(1, Ordering::Relaxed);
            self.surroundings.paged();
        };
        let (shards, forgotten) = match self.lister.all(&self.arn, on_page).await {
            Ok(listing) => (listing.shards, false),
            Err(fault) if fault.class == Class::NotFound && self.surroundings.is_replaced() => {
                (Vec::new(), true)
            }
            Err(fault) => return self.failed(&fault),
        };
        self.succeeded();
        self.pages = pages.into_inner().max(1);
        let number = self
            .listed
            .borrow()
            .as_ref()
            .map_or(1, |last| last.number + 1);
        let listed = Arc::new(Listed {
            shards,
            began,
            began_uptime,
            number,
            forgotten,
        });
        self.listed.send_replace(Some(Arc::clone(&listed)));
        self.surroundings.listed(began);
        // The fleet lists as often as one worker alone would, and not all at one moment.
        let every = self.every * self.lister.workers();
        self.next_listing = began + every.mul_f64(rand::random_range(0.8..=1.2));
        let mut children: Children<'_> = HashMap::new();
        for shard in &listed.shards {
            if let Some(parent) = &shard.parent {
                children.entry(parent).or_default().push(shard);
            }
        }
        self.waiting = std::mem::take(&mut self.waiting)
            .into_iter()
            .filter_map(|waiting| waiting.answered_by(&listed, &children))
            .collect();
    }

    /// Asks for the children of each shard whose question is due.
    async fn ask_one_by_one(&mut self) {
        let now = Instant::now();
        let (due, rest) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiting| waiting.due <= now);
        self.waiting = rest;
        for mut waiting in due {
            let About::Children {
                parent, some_known, ..
            } = &waiting.question.about
            else {
                self.waiting.push(waiting);
                continue;
            };
            let answer = if now >= self.not_before {
                self.lister.children(&self.arn, parent).await
            } else {
                // One of them has just failed: the others wait as well.
                self.waiting.push(waiting);
                continue;
            };
            match answer {
                // Those known are no reason not to ask: a sibling must have its row as well.
                Ok(children) if !children.is_empty() || *some_known => {
                    self.succeeded();
                    if let About::Children { reply, .. } = waiting.question.about {
                        // Whoever asked may be gone.
                        let _ = reply.send(children);
                    }
                    continue;
                }
                Ok(_) => {
                    self.succeeded();
                    waiting.put_off();
                }
                Err(fault) if fault.policy() == Policy::Retry => self.failed(&fault),
                // A server that does not know the filter, or no longer knows the parent: the whole
                // listing tells as much, or why it cannot.
                Err(_) => waiting.needs_all = true,
            }
            self.waiting.push(waiting);
        }
    }

    fn succeeded(&mut self) {
        self.backoff.reset();
        self.surroundings.succeeded();
    }

    fn failed(&mut self, fault: &Fault) {
        self.surroundings.failed(fault);
        self.not_before = Instant::now() + self.backoff.pause();
    }
}
