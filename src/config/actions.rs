//! What happens after a failover: `[[actions]]`.
//!
//! A file writes an action flat, with the keys of its kind beside those that all have (`Written`).
//! `checked` makes of it an [`Action`] that holds what its kind needs, and nothing else.

mod check;

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::actions::template::Template;

pub(super) use check::{CALLS_AWS, Written, Wrong, checked, deserialize, unknown_region};

/// One thing to do after the fence.
#[derive(Debug, Clone, PartialEq)]
pub struct Action {
    /// Its name in plan, report and control record; no other action has it.
    pub name: String,
    /// Whether a failover stops at it when it fails.
    pub required: bool,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// Attempts after the first.
    pub retries: u32,
    /// What is done.
    pub kind: Kind,
}

/// What an action does.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// Rewrites a file, and may tell a process.
    File(FileAction),
    /// Runs a program.
    Command {
        /// The program and its arguments; no shell sees them.
        argv: Vec<Template>,
    },
    /// Posts JSON.
    Webhook(Webhook),
    /// Writes a parameter of Systems Manager.
    SsmParameter(SsmParameter),
    /// Publishes a message.
    Sns(Sns),
    /// Writes a DNS record.
    Route53Record(Route53Record),
}

impl Kind {
    /// Its name in the configuration.
    pub const fn name(&self) -> &'static str {
        match self {
            Kind::File(_) => "file",
            Kind::Command { .. } => "command",
            Kind::Webhook(_) => "webhook",
            Kind::SsmParameter(_) => "ssm_parameter",
            Kind::Sns(_) => "sns",
            Kind::Route53Record(_) => "route53_record",
        }
    }
}

/// A file that says which region is active.
#[derive(Debug, Clone, PartialEq)]
pub struct FileAction {
    /// Where, absolute.
    pub path: PathBuf,
    /// What it holds.
    pub content: Template,
    /// Whom to signal afterwards.
    pub tell: Option<Tell>,
}

/// A process that is told of a new file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tell {
    /// The file with its process id.
    pub pid_file: PathBuf,
    /// What it gets.
    pub signal: Signal,
}

/// A signal that asks a process to look again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Signal {
    /// SIGHUP.
    Hup,
    /// SIGUSR1.
    Usr1,
    /// SIGUSR2.
    Usr2,
    /// SIGTERM, for a process that somebody starts again.
    Term,
}

impl Signal {
    /// Its name with `SIG`.
    pub const fn name(self) -> &'static str {
        match self {
            Signal::Hup => "SIGHUP",
            Signal::Usr1 => "SIGUSR1",
            Signal::Usr2 => "SIGUSR2",
            Signal::Term => "SIGTERM",
        }
    }
}

/// A POST of JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct Webhook {
    /// Where to.
    pub url: String,
    /// What; a body of its own where it is absent.
    pub body: Option<Template>,
    /// What it is signed with.
    pub secret: Option<Secret>,
}

/// Where a secret is read from when it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Secret {
    /// An environment variable.
    Env(String),
    /// A file.
    File(PathBuf),
}

/// A parameter of Systems Manager.
#[derive(Debug, Clone, PartialEq)]
pub struct SsmParameter {
    /// Its name.
    pub parameter: Template,
    /// Its value.
    pub value: Template,
    /// Label of the region it lies in.
    pub region: Template,
    /// Where the service is, if not at AWS's own address.
    pub endpoint_url: Option<String>,
}

/// A message to a topic.
#[derive(Debug, Clone, PartialEq)]
pub struct Sns {
    /// The topic.
    pub topic_arn: Template,
    /// Subject, for topics that send mail.
    pub subject: Option<Template>,
    /// The message; one of its own where it is absent.
    pub message: Option<Template>,
    /// Where the service is, if not at AWS's own address.
    pub endpoint_url: Option<String>,
}

/// A DNS record.
#[derive(Debug, Clone, PartialEq)]
pub struct Route53Record {
    /// The hosted zone it is in.
    pub hosted_zone_id: String,
    /// Its name.
    pub record: Template,
    /// Its type.
    pub record_type: RecordType,
    /// How long resolvers may keep it; whole seconds.
    pub ttl: Duration,
    /// Its only value.
    pub value: Template,
    /// Where the service is, if not at AWS's own address.
    pub endpoint_url: Option<String>,
}

/// Type of a DNS record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum RecordType {
    /// An IPv4 address.
    A,
    /// An IPv6 address.
    Aaaa,
    /// Another name.
    Cname,
}

impl RecordType {
    /// As DNS writes it.
    pub const fn name(self) -> &'static str {
        match self {
            RecordType::A => "A",
            RecordType::Aaaa => "AAAA",
            RecordType::Cname => "CNAME",
        }
    }
}

/// The AWS region of a topic, as its ARN says.
pub(crate) fn topic_region(arn: &str) -> Option<&str> {
    let parts: Vec<&str> = arn.split(':').collect();
    match parts.as_slice() {
        ["arn", _, "sns", region, account, topic]
            if !region.is_empty() && !account.is_empty() && !topic.is_empty() =>
        {
            Some(region)
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "actions/tests.rs"]
mod tests;
