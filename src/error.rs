//! Kinds of failure; `policy.rs` is the one table that says what is done about each.
//!
//! Two things live here and nowhere else:
//!
//! * [`Failure`]: what a person reads on stderr when a command could not run: one sentence of
//!   what failed, one of why, one of what to do.
//! * [`Fault`]: an error met while running, already mapped to exactly one [`Policy`] by
//!   [`classify`]. Everything that talks to a service passes its errors through that function;
//!   no other code looks at error codes.

mod policy;

use std::fmt;
use std::process::ExitCode;

pub use policy::{Class, Operation, Policy, class_of_code, classify};

/// How a command ended (DESIGN section 3). `main` alone turns it into a process exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done and in sync; for `run`: drained cleanly.
    Done,
    /// It ran, and drift, gaps or dead letters remain; for `run`: the grace ran out.
    Remains,
    /// It could not run.
    CouldNotRun,
    /// A job cut short by a signal.
    Interrupted,
}

impl Exit {
    /// The process exit code.
    pub const fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Remains => 1,
            Exit::CouldNotRun => 2,
            Exit::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

/// Why a command could not run, for a person: what failed, why, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One sentence: what failed.
    pub what: String,
    /// One sentence: why.
    pub why: String,
    /// One sentence: what to do.
    pub next: String,
}

impl Failure {
    /// Builds a failure from its three sentences, without their full stops.
    pub fn new(what: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            why: why.into(),
            next: next.into(),
        }
    }

    /// A failure to `what` because of `fault`, with the policy table's own next step.
    pub fn from_fault(what: impl Into<String>, fault: &Fault) -> Self {
        Self::new(what, fault.to_string(), fault.next_step())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (label, sentence) in [
            ("error", &self.what),
            ("  why", &self.why),
            ("   do", &self.next),
        ] {
            // One line each, whatever the cause brought along.
            let lines: Vec<&str> = sentence.lines().map(str::trim).collect();
            writeln!(f, "{label}: {}", lines.join(" ").trim_end_matches('.'))?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Code of a row that a newer version wrote.
pub const NEWER_ROW: &str = "newer row format";
/// Code of a row that cannot be understood.
pub const UNREADABLE_ROW: &str = "unreadable row";

/// An error met while running, classified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The call it came from.
    pub operation: Operation,
    /// Its kind.
    pub class: Class,
    /// The service's error code, or the transport's kind of failure.
    pub code: String,
    /// The service's message. It may name attributes of an item, so it is shown where a person
    /// asked for it and put into dead letters, and never logged for writes.
    pub message: String,
}

impl Fault {
    /// A fault that no service reported.
    pub fn own(operation: Operation, class: Class, code: &str, message: impl Into<String>) -> Self {
        Self {
            operation,
            class,
            code: code.to_owned(),
            message: message.into(),
        }
    }

    /// What is done about it.
    pub fn policy(&self) -> Policy {
        self.class.policy(self.operation)
    }

    /// What the operator does next.
    pub fn next_step(&self) -> &'static str {
        self.class.next_step()
    }

    /// Whether a row of the state table is there and this version cannot read it.
    pub fn is_unreadable(&self) -> bool {
        self.operation == Operation::State
            && matches!(self.code.as_str(), NEWER_ROW | UNREADABLE_ROW)
    }

    /// The fault without the service's message: safe for logs and health reasons, since it can
    /// hold nothing of an item.
    pub fn summary(&self) -> String {
        format!("{} failed: {}", self.operation.name(), self.code)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {}", self.operation.name(), self.code)?;
        if !self.message.is_empty() && self.message != self.code {
            write!(f, " ({})", self.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// The messages of an error and its sources, outermost first, joined by colons.
pub fn source_chain(error: Option<&dyn std::error::Error>) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = error;
    while let Some(error) = next {
        let text = error.to_string();
        if parts.last().is_none_or(|last| !last.contains(&text)) {
            parts.push(text);
        }
        next = error.source();
    }
    parts.join(": ")
}
