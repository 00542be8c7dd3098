//! What an action will do, in one line. Pure.

use super::Moment;
use super::template::{Template, plain};
use crate::config::Action;
use crate::config::actions::{FileAction, Kind, Webhook};

/// A value, an argument list: longer ones are cut.
const SHOWN_CHARS: usize = 120;

/// One line for the plan: what the action does at `moment`, and what happens when it fails. It holds
/// no secret, and of a webhook's URL, which may be one, only the host.
pub fn describe(action: &Action, moment: &Moment<'_>) -> String {
    let attempts = u64::from(action.retries) + 1;
    let times = match attempts {
        1 => "once".to_owned(),
        _ => format!("at most {attempts} times"),
    };
    let timeout = humantime::format_duration(action.timeout);
    let failing = match action.required {
        true => "the failover stops if it fails",
        false => "the failover goes on if it fails",
    };
    let what = what(&action.kind, moment);
    plain(&format!(
        "{}: {what} ({times}, {timeout} each; {failing})",
        action.name
    ))
}

fn what(kind: &Kind, moment: &Moment<'_>) -> String {
    match kind {
        Kind::File(file) => write(file, moment),
        Kind::Command { argv } => {
            let words: Vec<String> = argv.iter().map(|word| word.fill(moment)).collect();
            format!("run {}", cut(&words.join(" ")))
        }
        Kind::Webhook(webhook) => {
            let signed = if webhook.secret.is_some() {
                "signed"
            } else {
                "unsigned"
            };
            format!("POST to {}, {signed}", origin(webhook))
        }
        Kind::SsmParameter(parameter) => format!(
            "set the parameter {} in {} to {}",
            parameter.parameter.fill(moment),
            parameter.region.fill(moment),
            filled(&parameter.value, moment)
        ),
        Kind::Sns(sns) => format!("publish to {}", sns.topic_arn.fill(moment)),
        Kind::Route53Record(record) => format!(
            "set {} {} to {} for {}, with a call to Route 53's control plane",
            record.record_type.name(),
            record.record.fill(moment),
            filled(&record.value, moment),
            humantime::format_duration(record.ttl)
        ),
    }
}

fn write(file: &FileAction, moment: &Moment<'_>) -> String {
    let path = file.path.display();
    let bytes = file.content.fill(moment).len();
    match &file.tell {
        None => format!("write {path} ({bytes} bytes)"),
        Some(tell) => format!(
            "write {path} ({bytes} bytes), then {} to the process of {}",
            tell.signal.name(),
            tell.pid_file.display()
        ),
    }
}

/// Scheme, host and port of a webhook's URL.
pub(super) fn origin(webhook: &Webhook) -> String {
    match webhook.url.parse::<hyper::Uri>() {
        Ok(uri) => format!(
            "{}://{}",
            uri.scheme_str().unwrap_or("http"),
            uri.authority().map_or("", |authority| authority.as_str())
        ),
        Err(_) => "a webhook".to_owned(),
    }
}

fn filled(template: &Template, moment: &Moment<'_>) -> String {
    cut(&template.fill(moment))
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::config::actions::{Secret, Signal, Tell};

    fn action(kind: Kind) -> Action {
        Action {
            name: "a".to_owned(),
            required: true,
            timeout: Duration::from_secs(10),
            retries: 2,
            kind,
        }
    }

    fn template(text: &str) -> Template {
        text.parse().unwrap()
    }

    #[test]
    fn the_plan_says_what_is_done_and_shows_no_secret() {
        let file = action(Kind::File(FileAction {
            path: "/etc/active".into(),
            content: template("{region}\n"),
            tell: Some(Tell {
                pid_file: "/run/p.pid".into(),
                signal: Signal::Hup,
            }),
        }));
        assert_eq!(
            describe(&file, &Moment::SAMPLE),
            "a: write /etc/active (7 bytes), then SIGHUP to the process of /run/p.pid \
             (at most 3 times, 10s each; the failover stops if it fails)"
        );
        let mut hook = action(Kind::Webhook(Webhook {
            url: "https://hooks.example.com:8443/T0/token?key=secret".to_owned(),
            body: None,
            secret: Some(Secret::Env("HOOK".to_owned())),
        }));
        (hook.required, hook.retries) = (false, 0);
        assert_eq!(
            describe(&hook, &Moment::SAMPLE),
            "a: POST to https://hooks.example.com:8443, signed \
             (once, 10s each; the failover goes on if it fails)"
        );
    }

    proptest! {
        #[test]
        fn a_description_is_one_line(words in proptest::collection::vec(any::<String>(), 1..4), reason in any::<String>()) {
            let argv: Vec<Template> = words.iter().filter_map(|word| word.parse().ok()).collect();
            let moment = Moment { reason: &reason, ..Moment::SAMPLE };
            let text = describe(&action(Kind::Command { argv }), &moment);
            prop_assert!(!text.contains(char::is_control));
        }
    }
}
