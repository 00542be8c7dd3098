//! From what a file writes to an [`Action`], or to what is wrong with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::{
    Action, FileAction, Kind, RecordType, Route53Record, Secret, Signal, Sns, SsmParameter, Tell,
    Webhook, topic_region,
};
use crate::actions::Moment;
use crate::actions::template::Template;
use crate::config::{Region, duration, read, yes};

/// An answer of a service, a program that calls one: most take a second.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What fails once, throttled or cut off, is worth two more tries while a region is down.
const RETRIES: u32 = 2;
/// What resolvers may keep: a failover should not wait for more.
const TTL: Duration = Duration::from_secs(30);
const SIGNAL: Signal = Signal::Hup;

const TIMEOUT_MIN: Duration = Duration::from_millis(100);
const TIMEOUT_MAX: Duration = Duration::from_secs(3_600);
const RETRIES_MAX: u32 = 100;
/// More is no plan that a person reads before it is applied.
const ACTIONS_MAX: usize = 100;
const NAME_CHARS_MAX: usize = 64;
/// Route 53 takes up to 2,147,483,647 s; a day is a mistake for a record that moves.
const TTL_MAX: Duration = Duration::from_secs(86_400);

/// Whether this build has the clients for actions that call AWS.
pub(in crate::config) const CALLS_AWS: bool = cfg!(feature = "actions");

/// What the file writes for an action.
#[derive(Debug, Clone, Deserialize)]
pub(in crate::config) struct Written {
    kind: KindName,
    name: Option<String>,
    #[serde(default = "yes")]
    required: bool,
    #[serde(default = "timeout", deserialize_with = "duration")]
    timeout: Duration,
    #[serde(default = "retries")]
    retries: u32,
    path: Option<PathBuf>,
    content: Option<Template>,
    pid_file: Option<PathBuf>,
    signal: Option<Signal>,
    command: Option<Vec<Template>>,
    url: Option<String>,
    body: Option<Template>,
    secret_env: Option<String>,
    secret_file: Option<PathBuf>,
    parameter: Option<Template>,
    topic_arn: Option<Template>,
    subject: Option<Template>,
    message: Option<Template>,
    hosted_zone_id: Option<String>,
    record: Option<Template>,
    record_type: Option<RecordType>,
    #[serde(default, deserialize_with = "some_duration")]
    ttl: Option<Duration>,
    value: Option<Template>,
    region: Option<Template>,
    endpoint_url: Option<String>,
}

const fn timeout() -> Duration {
    TIMEOUT
}

const fn retries() -> u32 {
    RETRIES
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindName {
    File,
    Command,
    Webhook,
    SsmParameter,
    Sns,
    #[serde(rename = "route53_record")]
    Route53Record,
}

impl KindName {
    const fn name(self) -> &'static str {
        match self {
            KindName::File => "file",
            KindName::Command => "command",
            KindName::Webhook => "webhook",
            KindName::SsmParameter => "ssm_parameter",
            KindName::Sns => "sns",
            KindName::Route53Record => "route53_record",
        }
    }

    /// The keys that only some kinds have and this one does.
    const fn keys(self) -> &'static [&'static str] {
        match self {
            KindName::File => &["path", "content", "pid_file", "signal"],
            KindName::Command => &["command"],
            KindName::Webhook => &["url", "body", "secret_env", "secret_file"],
            KindName::SsmParameter => &["parameter", "value", "region", "endpoint_url"],
            KindName::Sns => &["topic_arn", "subject", "message", "endpoint_url"],
            KindName::Route53Record => &[
                "hosted_zone_id",
                "record",
                "record_type",
                "ttl",
                "value",
                "endpoint_url",
            ],
        }
    }

    const fn calls_aws(self) -> bool {
        matches!(
            self,
            KindName::SsmParameter | KindName::Sns | KindName::Route53Record
        )
    }
}

/// Why an action cannot be taken as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::config) struct Wrong {
    /// Which action, from 0.
    pub index: usize,
    /// The key that is wrong, or missing.
    pub field: &'static str,
    /// What is wrong with it.
    pub why: String,
    /// What to do.
    pub next: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "actions[{}].{}: {}", self.index, self.field, self.why)
    }
}

/// The actions of a file, as [`Config`](crate::config::Config) holds them.
pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<Action>, D::Error> {
    let written = Vec::deserialize(deserializer)?;
    checked(written, CALLS_AWS).map_err(serde::de::Error::custom)
}

/// The first action that names a region which is none of `regions`.
pub(in crate::config) fn unknown_region(
    actions: &[Action],
    regions: &BTreeMap<String, Region>,
) -> Option<Wrong> {
    actions.iter().enumerate().find_map(|(index, action)| {
        let Kind::SsmParameter(parameter) = &action.kind else {
            return None;
        };
        let label = parameter.region.fill(&Moment::SAMPLE);
        if !parameter.region.is_constant() || regions.contains_key(&label) {
            return None;
        }
        let labels: Vec<&str> = regions.keys().map(String::as_str).collect();
        Some(Check { index }.wrong(
            "region",
            format!("`{label}` is none of the regions ({})", labels.join(", ")),
            "Use a label under [regions], {region} or {previous}",
        ))
    })
}

/// Makes actions of what a file writes.
///
/// `calls_aws`: whether there is a client for those that call AWS.
pub(in crate::config) fn checked(
    written: Vec<Written>,
    calls_aws: bool,
) -> Result<Vec<Action>, Wrong> {
    let mut names = BTreeSet::new();
    let mut actions = Vec::new();
    for (index, written) in written.into_iter().enumerate() {
        let check = Check { index };
        if index == ACTIONS_MAX {
            return Err(check.wrong(
                "kind",
                format!("there are more than {ACTIONS_MAX} actions"),
                "Put what belongs together into one command",
            ));
        }
        if written.kind.calls_aws() && !calls_aws {
            return Err(check.wrong(
                "kind",
                format!(
                    "this build cannot call AWS for an action, and `{}` does",
                    written.kind.name()
                ),
                "Use a build with the cargo feature `actions`, or a command that does it",
            ));
        }
        let action = check.action(written)?;
        if !names.insert(action.name.clone()) {
            return Err(check.wrong(
                "name",
                format!("`{}` stands twice", action.name),
                "Give each action a name of its own: what is done already is remembered by it",
            ));
        }
        actions.push(action);
    }
    Ok(actions)
}

/// The checks of one action.
struct Check {
    index: usize,
}

impl Check {
    fn wrong(&self, field: &'static str, why: impl Into<String>, next: impl Into<String>) -> Wrong {
        Wrong {
            index: self.index,
            field,
            why: why.into(),
            next: next.into(),
        }
    }

    fn action(&self, written: Written) -> Result<Action, Wrong> {
        let kind = written.kind;
        self.general(&written)?;
        self.only_its_keys(&written)?;
        let name = written.name.clone();
        Ok(Action {
            name: name.unwrap_or_else(|| format!("{}-{}", kind.name(), self.index + 1)),
            required: written.required,
            timeout: written.timeout,
            retries: written.retries,
            kind: match kind {
                KindName::File => Kind::File(self.file(written)?),
                KindName::Command => self.command(written)?,
                KindName::Webhook => Kind::Webhook(self.webhook(written)?),
                KindName::SsmParameter => Kind::SsmParameter(self.ssm_parameter(written)?),
                KindName::Sns => Kind::Sns(self.sns(written)?),
                KindName::Route53Record => Kind::Route53Record(self.route53_record(written)?),
            },
        })
    }

    /// What every kind has.
    fn general(&self, written: &Written) -> Result<(), Wrong> {
        if let Some(name) = &written.name
            && (name.trim().is_empty()
                || name.chars().count() > NAME_CHARS_MAX
                || name.chars().any(char::is_control))
        {
            return Err(self.wrong(
                "name",
                "it is empty, too long or not one line",
                format!("Give a name of at most {NAME_CHARS_MAX} characters"),
            ));
        }
        if !(TIMEOUT_MIN..=TIMEOUT_MAX).contains(&written.timeout) {
            return Err(self.wrong(
                "timeout",
                format!(
                    "{} is out of bounds",
                    humantime::format_duration(written.timeout)
                ),
                "Set 100ms to 1h, for one attempt",
            ));
        }
        if written.retries > RETRIES_MAX {
            return Err(self.wrong(
                "retries",
                format!("{} is out of bounds", written.retries),
                format!("Set at most {RETRIES_MAX}"),
            ));
        }
        Ok(())
    }

    fn only_its_keys(&self, written: &Written) -> Result<(), Wrong> {
        let kind = written.kind;
        let foreign = written
            .special()
            .into_iter()
            .find(|(key, is_set)| *is_set && !kind.keys().contains(key));
        match foreign {
            None => Ok(()),
            Some((key, _)) => Err(self.wrong(
                key,
                format!("an action of the kind `{}` has no such key", kind.name()),
                format!("Remove it; this kind has {}", kind.keys().join(", ")),
            )),
        }
    }

    fn needed<T>(&self, field: &'static str, value: Option<T>) -> Result<T, Wrong> {
        value.ok_or_else(|| {
            self.wrong(
                field,
                "it is missing",
                "Set it; docs/ACTIONS.md shows each kind with all its keys",
            )
        })
    }

    fn filled(&self, field: &'static str, value: Option<Template>) -> Result<Template, Wrong> {
        let value = self.needed(field, value)?;
        match value.is_empty() {
            true => Err(self.wrong(field, "it is empty", "Give it a value")),
            false => Ok(value),
        }
    }

    fn filled_if_any(
        &self,
        field: &'static str,
        value: Option<Template>,
    ) -> Result<Option<Template>, Wrong> {
        match value {
            None => Ok(None),
            value => self.filled(field, value).map(Some),
        }
    }

    fn absolute(&self, field: &'static str, path: PathBuf) -> Result<PathBuf, Wrong> {
        match path.is_absolute() {
            true => Ok(path),
            false => Err(self.wrong(
                field,
                format!(
                    "`{}` depends on where the command is started",
                    path.display()
                ),
                "Write the whole path, from / on",
            )),
        }
    }

    fn endpoint(&self, url: Option<String>) -> Result<Option<String>, Wrong> {
        match &url {
            Some(url) if !read::is_url(url) => Err(self.wrong(
                "endpoint_url",
                format!("`{url}` is no http or https URL"),
                "Write it like https://ssm.us-east-1.amazonaws.com, or leave it out",
            )),
            _ => Ok(url),
        }
    }

    fn file(&self, written: Written) -> Result<FileAction, Wrong> {
        let path = self.absolute("path", self.needed("path", written.path)?)?;
        let content = self.needed("content", written.content)?;
        let tell = match (written.pid_file, written.signal) {
            (None, None) => None,
            (None, Some(_)) => {
                return Err(self.wrong(
                    "signal",
                    "there is no pid_file, so nobody would get it",
                    "Set pid_file, or remove signal",
                ));
            }
            (Some(pid_file), signal) => Some(Tell {
                pid_file: self.absolute("pid_file", pid_file)?,
                signal: signal.unwrap_or(SIGNAL),
            }),
        };
        Ok(FileAction {
            path,
            content,
            tell,
        })
    }

    fn command(&self, written: Written) -> Result<Kind, Wrong> {
        let argv = self.needed("command", written.command)?;
        match argv.first() {
            None => Err(self.wrong("command", "it is empty", "Name a program")),
            Some(program) if program.is_empty() || !program.is_constant() => Err(self.wrong(
                "command",
                "its first part is no fixed program",
                "Name a program first, then its arguments; they may have placeholders",
            )),
            Some(_) => Ok(Kind::Command { argv }),
        }
    }

    fn webhook(&self, written: Written) -> Result<Webhook, Wrong> {
        let url = self.needed("url", written.url)?;
        // The URL itself may be a secret: it is not repeated.
        if !read::is_url(&url) {
            return Err(self.wrong(
                "url",
                "it is no http or https URL",
                "Write it like https://hooks.example.com/failover",
            ));
        }
        if url.parse::<hyper::Uri>().is_ok_and(|uri| {
            uri.authority()
                .is_some_and(|authority| authority.as_str().contains('@'))
        }) {
            return Err(self.wrong(
                "url",
                "it holds a name or password",
                "Leave it out; a secret_env or secret_file signs the request",
            ));
        }
        if let Some(body) = &written.body
            && serde_json::from_str::<serde_json::Value>(&body.fill_json(&Moment::SAMPLE)).is_err()
        {
            return Err(self.wrong(
                "body",
                "it is no JSON once its placeholders are filled",
                "Put placeholders inside strings, like {\"text\": \"{group} is in {region}\"}",
            ));
        }
        let secret = match (written.secret_env, written.secret_file) {
            (None, None) => None,
            (Some(name), None) if name.is_empty() || name.contains(['=', '\0']) => {
                return Err(self.wrong(
                    "secret_env",
                    "it is no name of a variable",
                    "Name an environment variable that holds the secret",
                ));
            }
            (Some(name), None) => Some(Secret::Env(name)),
            (None, Some(path)) => Some(Secret::File(self.absolute("secret_file", path)?)),
            (Some(_), Some(_)) => {
                return Err(self.wrong(
                    "secret_file",
                    "secret_env is set, too",
                    "Keep one of them",
                ));
            }
        };
        Ok(Webhook {
            url,
            body: written.body,
            secret,
        })
    }

    fn ssm_parameter(&self, written: Written) -> Result<SsmParameter, Wrong> {
        Ok(SsmParameter {
            parameter: self.filled("parameter", written.parameter)?,
            value: self.filled("value", written.value)?,
            region: written.region.unwrap_or_else(Template::of_region),
            endpoint_url: self.endpoint(written.endpoint_url)?,
        })
    }

    fn sns(&self, written: Written) -> Result<Sns, Wrong> {
        let topic_arn = self.filled("topic_arn", written.topic_arn)?;
        let sample = topic_arn.fill(&Moment::SAMPLE);
        if topic_region(&sample).is_none() {
            return Err(self.wrong(
                "topic_arn",
                "it is no ARN of a topic",
                "Write it like arn:aws:sns:{region}:111122223333:failover",
            ));
        }
        Ok(Sns {
            topic_arn,
            subject: self.filled_if_any("subject", written.subject)?,
            message: self.filled_if_any("message", written.message)?,
            endpoint_url: self.endpoint(written.endpoint_url)?,
        })
    }

    fn route53_record(&self, written: Written) -> Result<Route53Record, Wrong> {
        let zone = self.needed("hosted_zone_id", written.hosted_zone_id)?;
        if zone.is_empty() || !zone.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(self.wrong(
                "hosted_zone_id",
                format!("`{zone}` is no id of a hosted zone"),
                "Write it as Route 53 shows it, like Z0123456789ABCDEFGHIJ",
            ));
        }
        let ttl = written.ttl.unwrap_or(TTL);
        if ttl > TTL_MAX || ttl.subsec_nanos() > 0 {
            return Err(self.wrong(
                "ttl",
                format!("{} is out of bounds", humantime::format_duration(ttl)),
                "Set whole seconds, at most 1day",
            ));
        }
        Ok(Route53Record {
            hosted_zone_id: zone,
            record: self.filled("record", written.record)?,
            record_type: self.needed("record_type", written.record_type)?,
            ttl,
            value: self.filled("value", written.value)?,
            endpoint_url: self.endpoint(written.endpoint_url)?,
        })
    }
}

impl Written {
    /// The keys that not every kind has, and whether they are set.
    fn special(&self) -> [(&'static str, bool); 20] {
        [
            ("path", self.path.is_some()),
            ("content", self.content.is_some()),
            ("pid_file", self.pid_file.is_some()),
            ("signal", self.signal.is_some()),
            ("command", self.command.is_some()),
            ("url", self.url.is_some()),
            ("body", self.body.is_some()),
            ("secret_env", self.secret_env.is_some()),
            ("secret_file", self.secret_file.is_some()),
            ("parameter", self.parameter.is_some()),
            ("topic_arn", self.topic_arn.is_some()),
            ("subject", self.subject.is_some()),
            ("message", self.message.is_some()),
            ("hosted_zone_id", self.hosted_zone_id.is_some()),
            ("record", self.record.is_some()),
            ("record_type", self.record_type.is_some()),
            ("ttl", self.ttl.is_some()),
            ("value", self.value.is_some()),
            ("region", self.region.is_some()),
            ("endpoint_url", self.endpoint_url.is_some()),
        ]
    }
}
