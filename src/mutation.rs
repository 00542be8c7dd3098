//! Single safeguards, turned off to see the tests fail, and tasks that die when a test says so (cargo
//! feature `failpoints`, tests only).
//!
//! A test that passes with its safeguard off proves nothing. `.ci/mutations` turns each off in turn
//! (`FARSHORE_TEST_MUTATION=doubts`) and expects the test that guards it to fail. Without the
//! feature every question is answered "no" at compile time.

/// A safeguard that can be turned off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// A write is not checked again when it is transmitted.
    Transmit,
    /// Unanswered writes and leases that were not released put nothing in doubt.
    Doubts,
    /// A child starts beside its parent.
    Parents,
    /// The checkpoint passes one record that is not durable.
    Checkpoint,
    /// A lease's owner is named without a nonce.
    Nonce,
    /// A tap that cannot be seen counts as open.
    Tap,
    /// A writer goes on although its epoch is over.
    Epoch,
    /// A term does not end by itself.
    Term,
    /// A region that was active is fed like any other.
    Quarantine,
    /// Nobody looks for writes of an old epoch that take effect late.
    Late,
    /// Every key counts as one that the active region has not written since the fence.
    Ledger,
    /// A region that came home is fed before what is stranded there is captured.
    Capture,
}

impl Mutation {
    /// Its name in the environment.
    pub const fn name(self) -> &'static str {
        match self {
            Mutation::Transmit => "transmit",
            Mutation::Doubts => "doubts",
            Mutation::Parents => "parents",
            Mutation::Checkpoint => "checkpoint",
            Mutation::Nonce => "nonce",
            Mutation::Tap => "tap",
            Mutation::Epoch => "epoch",
            Mutation::Term => "term",
            Mutation::Quarantine => "quarantine",
            Mutation::Late => "late",
            Mutation::Ledger => "ledger",
            Mutation::Capture => "capture",
        }
    }
}

/// Whether the safeguard is turned off.
#[cfg(feature = "failpoints")]
pub fn is_off(mutation: Mutation) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    CHOSEN
        .get_or_init(|| std::env::var("FARSHORE_TEST_MUTATION").ok())
        .as_deref()
        == Some(mutation.name())
}

/// Whether the safeguard is turned off: never.
#[cfg(not(feature = "failpoints"))]
pub const fn is_off(_mutation: Mutation) -> bool {
    false
}

/// Makes the task that passes here die or hang, once, when a test asks for it: the directory
/// `FARSHORE_TEST_TROUBLE` then holds a file `<point>-panic` or `<point>-hang`, which is removed.
#[cfg(feature = "failpoints")]
pub async fn trouble(point: &str) {
    static DIRECTORY: std::sync::OnceLock<Option<std::path::PathBuf>> = std::sync::OnceLock::new();
    let directory =
        DIRECTORY.get_or_init(|| std::env::var_os("FARSHORE_TEST_TROUBLE").map(Into::into));
    let Some(directory) = directory else {
        return;
    };
    // Whoever removes the file is the one it was meant for.
    if std::fs::remove_file(directory.join(format!("{point}-panic"))).is_ok() {
        panic!("the test asked for this");
    }
    if std::fs::remove_file(directory.join(format!("{point}-hang"))).is_ok() {
        std::future::pending::<()>().await;
    }
}

/// Makes the task that passes here die or hang: never.
#[cfg(not(feature = "failpoints"))]
pub async fn trouble(_point: &str) {}

/// Kills this process here when a test asks for it: `FARSHORE_TEST_CRASH` names the step.
#[cfg(feature = "failpoints")]
pub fn crash(step: &str) {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("FARSHORE_TEST_CRASH").ok());
    if chosen.as_deref() == Some(step) {
        // A process can always signal itself, and this signal ends it.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// Kills this process here: never.
#[cfg(not(feature = "failpoints"))]
pub const fn crash(_step: &str) {}
