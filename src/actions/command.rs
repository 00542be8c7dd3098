//! Runs a program. No shell is between, and what it started ends with its time.

use std::collections::VecDeque;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use super::template::{Template, plain};
use super::{Moment, Trouble};

/// What of its output is kept: the end, where programs say why they failed.
const KEPT_BYTES: usize = 400;
/// How long output is still read once the program has ended: a process it left behind may hold the
/// other end for ever.
const LAST_WORDS: Duration = Duration::from_millis(200);

pub(super) async fn run(argv: &[Template], name: &str, moment: &Moment<'_>) -> Result<(), Trouble> {
    let words: Vec<String> = argv.iter().map(|word| word.fill(moment)).collect();
    let Some((program, arguments)) = words.split_first() else {
        return Err(Trouble::lasting("There is no program", "Set `command`"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("FARSHORE_ACTION", plain(name))
        .env("FARSHORE_GROUP", plain(moment.group))
        .env("FARSHORE_REGION", plain(moment.region))
        .env("FARSHORE_PREVIOUS", plain(moment.previous))
        .env("FARSHORE_EPOCH", moment.epoch.to_string())
        .env("FARSHORE_REASON", plain(moment.reason))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own, so that its children can be ended with it.
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command
        .spawn()
        .map_err(|error| not_started(program, &error))?;
    let mut output = Output::of(&mut child);
    // Dropped before `child` is, which reaps the process: until then its number is nobody else's.
    let group = Group::of(&child);
    let status = child.wait().await.map_err(|error| {
        Trouble::passing(
            format!("How {program} ended could not be learned: {error}"),
            "See whether it did its work",
        )
    })?;
    group.ended();
    match status.success() {
        true => Ok(()),
        false => Err(ended_badly(program, status, &output.last_words().await)),
    }
}

fn not_started(program: &str, error: &io::Error) -> Trouble {
    let why = format!("{program} could not be started: {error}");
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput => {
            Trouble::lasting(
                why,
                "Correct the first part of `command`, and let this user execute it",
            )
        }
        _ => Trouble::passing(why, "See whether this host lacks memory or processes"),
    }
}

fn ended_badly(program: &str, status: ExitStatus, last: &str) -> Trouble {
    let said = match last {
        "" => "and said nothing".to_owned(),
        last => format!("and last said: {last}"),
    };
    Trouble::passing(
        format!("{program} ended with {status} {said}"),
        "Mend what it complains about; it is run again by the same command",
    )
}

/// The process group of a running program: killed with this value, unless it ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        Self(pid.and_then(Pid::from_raw))
    }

    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Who has ended meanwhile need not be killed.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

type Tail = Arc<Mutex<VecDeque<u8>>>;

/// The end of what a program says, read all the time so that it never waits for a reader.
struct Output {
    readers: JoinSet<()>,
    stdout: Tail,
    stderr: Tail,
}

impl Output {
    fn of(child: &mut Child) -> Self {
        let (stdout, stderr) = (Tail::default(), Tail::default());
        let mut readers = JoinSet::new();
        if let Some(pipe) = child.stdout.take() {
            readers.spawn(keep_end(pipe, Arc::clone(&stdout)));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.spawn(keep_end(pipe, Arc::clone(&stderr)));
        }
        Self {
            readers,
            stdout,
            stderr,
        }
    }

    /// What it last said to stderr, or else to stdout, in one line.
    async fn last_words(&mut self) -> String {
        let all_read = async { while self.readers.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_WORDS, all_read).await;
        let text = |tail: &Tail| {
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            let text = String::from_utf8_lossy(tail.make_contiguous()).into_owned();
            plain(text.trim()).trim().to_owned()
        };
        match text(&self.stderr) {
            words if words.is_empty() => text(&self.stdout),
            words => words,
        }
    }
}

async fn keep_end(mut pipe: impl AsyncRead + Unpin, tail: Tail) {
    let mut buffer = [0; 4_096];
    while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..read]);
        let surplus = tail.len().saturating_sub(KEPT_BYTES);
        tail.drain(..surplus);
    }
}
