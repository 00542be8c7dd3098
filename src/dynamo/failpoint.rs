//! Stops this process just before it transmits a request (cargo feature `failpoints`, tests only).
//!
//! `FARSHORE_TEST_FAILPOINT=BatchWriteItem@3` stops it (SIGSTOP to itself) before the third
//! BatchWriteItem is checked for the last time; `BatchWriteItem@3!` after that check, with nothing
//! but the connection still to come, the way a suspended machine would. The test continues it with
//! SIGCONT.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use rustix::process::{Signal, getpid, kill_process};

/// Names the operation, which of its calls, and the place.
const VARIABLE: &str = "FARSHORE_TEST_FAILPOINT";

/// Within this time a signal to the process has stopped all of its threads.
const SETTLE: Duration = Duration::from_millis(200);

/// Calls of the operation so far, over all clients of the process.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// Where a call passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Before the last check.
    BeforeCheck,
    /// After it.
    AfterCheck,
}

struct Failpoint {
    operation: String,
    call: u64,
    place: Place,
}

fn chosen() -> Option<&'static Failpoint> {
    static CHOSEN: OnceLock<Option<Failpoint>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| {
            let text = std::env::var(VARIABLE).ok()?;
            let (operation, call) = text.split_once('@')?;
            let (call, place) = match call.strip_suffix('!') {
                Some(call) => (call, Place::AfterCheck),
                None => (call, Place::BeforeCheck),
            };
            Some(Failpoint {
                operation: operation.to_owned(),
                call: call.parse().ok()?,
                place,
            })
        })
        .as_ref()
}

/// A request passes `place`.
pub(super) fn pass(place: Place, request: &HttpRequest) {
    let Some(failpoint) = chosen().filter(|failpoint| failpoint.place == place) else {
        return;
    };
    let target = request.headers().get("x-amz-target");
    let meant =
        target.is_some_and(|target| target.rsplit('.').next() == Some(&failpoint.operation));
    if meant && CALLS.fetch_add(1, Ordering::SeqCst) + 1 == failpoint.call {
        // A process can always signal itself.
        let _ = kill_process(getpid(), Signal::STOP);
        // The signal may reach another thread first, and this one a moment later.
        std::thread::sleep(SETTLE);
    }
}
