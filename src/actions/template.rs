//! Texts with placeholders, as the configuration writes them. Pure.
//!
//! `{group}`, `{region}`, `{previous}`, `{epoch}` and `{reason}` stand for what a failover knows.
//! Any other name in braces is refused, so that a typing error shows when the file is read and not
//! when a region is down. `{{` stands for one `{`; braces around anything that is no name are text,
//! so that JSON needs no escaping.

use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use super::Moment;

/// What a placeholder stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placeholder {
    /// The group.
    Group,
    /// Label of the region that is active now.
    Region,
    /// Label of the region that was active before.
    Previous,
    /// Number of the new epoch.
    Epoch,
    /// Why.
    Reason,
}

impl Placeholder {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Group,
        Self::Region,
        Self::Previous,
        Self::Epoch,
        Self::Reason,
    ];

    /// The name between the braces.
    pub const fn name(self) -> &'static str {
        match self {
            Placeholder::Group => "group",
            Placeholder::Region => "region",
            Placeholder::Previous => "previous",
            Placeholder::Epoch => "epoch",
            Placeholder::Reason => "reason",
        }
    }

    fn value(self, moment: &Moment<'_>) -> String {
        match self {
            Placeholder::Group => moment.group.to_owned(),
            Placeholder::Region => moment.region.to_owned(),
            Placeholder::Previous => moment.previous.to_owned(),
            Placeholder::Epoch => moment.epoch.to_string(),
            Placeholder::Reason => moment.reason.to_owned(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Placeholder(Placeholder),
}

/// A text with placeholders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

impl Template {
    /// `{region}`.
    pub fn of_region() -> Self {
        let parts = vec![Part::Placeholder(Placeholder::Region)];
        Self { parts }
    }

    /// The text at `moment`. Control characters of a value become spaces: a reason that a person
    /// typed adds no line to a file.
    pub fn fill(&self, moment: &Moment<'_>) -> String {
        self.fill_with(|placeholder| plain(&placeholder.value(moment)))
    }

    /// As [`fill`](Self::fill), for a text that is JSON and has its placeholders inside strings, or
    /// `{epoch}` as a number.
    pub fn fill_json(&self, moment: &Moment<'_>) -> String {
        self.fill_with(|placeholder| {
            let quoted = serde_json::Value::String(placeholder.value(moment)).to_string();
            quoted[1..quoted.len() - 1].to_owned()
        })
    }

    fn fill_with(&self, value: impl Fn(Placeholder) -> String) -> String {
        self.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text.clone(),
                Part::Placeholder(placeholder) => value(*placeholder),
            })
            .collect()
    }

    /// Whether the text is the same at every moment.
    pub fn is_constant(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, Part::Text(_)))
    }

    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

/// `text` without control characters.
pub(super) fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('{') {
            literal.push_str(&rest[..at]);
            let after = &rest[at + 1..];
            if let Some(escaped) = after.strip_prefix('{') {
                literal.push('{');
                rest = escaped;
            } else if let Some((name, behind)) = named(after) {
                if !literal.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut literal)));
                }
                parts.push(Part::Placeholder(known(name)?));
                rest = behind;
            } else {
                literal.push('{');
                rest = after;
            }
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Text(literal));
        }
        Ok(Self { parts })
    }
}

/// The name that `text`, which follows a brace, begins with, and what comes after its own brace.
fn named(text: &str) -> Option<(&str, &str)> {
    let (name, behind) = text.split_once('}')?;
    let word = name.trim();
    let is_name = word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    is_name.then_some((name, behind))
}

fn known(name: &str) -> Result<Placeholder, String> {
    let found = Placeholder::ALL.into_iter().find(|p| p.name() == name);
    found.ok_or_else(|| {
        let near = Placeholder::ALL
            .into_iter()
            .map(|p| (strsim::damerau_levenshtein(p.name(), name), p.name()))
            .min();
        let near = match near {
            Some((distance, near)) if distance <= 2 => format!("did you mean `{{{near}}}`? "),
            _ => String::new(),
        };
        let all: Vec<String> = Placeholder::ALL
            .iter()
            .map(|p| format!("{{{}}}", p.name()))
            .collect();
        format!(
            "there is no placeholder `{{{name}}}`: {near}There are {}; `{{{{` stands for a brace",
            all.join(", ")
        )
    })
}

impl<'de> Deserialize<'de> for Template {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOMENT: Moment<'static> = Moment {
        group: "orders",
        region: "us-west-2",
        previous: "us-east-1",
        epoch: 7,
        reason: "fire in \"AZ 1\"\nand 2",
    };

    fn filled(text: &str) -> String {
        text.parse::<Template>().unwrap().fill(&MOMENT)
    }

    #[test]
    fn placeholders_are_filled_and_other_braces_are_text() {
        assert_eq!(
            filled("{group}:{region}<{previous}@{epoch}"),
            "orders:us-west-2<us-east-1@7"
        );
        assert_eq!(filled("{reason}"), "fire in \"AZ 1\" and 2");
        assert_eq!(filled("{{region} {{{region}"), "{region} {us-west-2");
        for text in [
            "",
            "{",
            "}",
            "{}",
            "{ }",
            "{\"a\": {\"b\": 1}}",
            "{1}",
            "{a b}",
        ] {
            assert_eq!(filled(text), text);
        }
    }

    #[test]
    fn an_unknown_placeholder_names_the_nearest() {
        let refused = |text: &str| text.parse::<Template>().unwrap_err();
        assert!(refused("x {regoin}").contains("`{regoin}`"));
        assert!(refused("x {regoin}").contains("did you mean `{region}`"));
        assert!(refused("{ region }").contains("did you mean `{region}`"));
        assert!(refused("{Group}").contains("{group}"));
        assert!(!refused("{something-else}").contains("did you mean"));
    }

    #[test]
    fn values_are_escaped_inside_json() {
        let template: Template = r#"{"why": "{reason}", "epoch": {epoch}}"#.parse().unwrap();
        let value: serde_json::Value = serde_json::from_str(&template.fill_json(&MOMENT)).unwrap();
        assert_eq!(value["why"], MOMENT.reason);
        assert_eq!(value["epoch"], 7);
    }

    /// A piece of a template, as it is written and as it is filled.
    fn piece() -> impl Strategy<Value = (String, String)> {
        let placeholder = proptest::sample::select(Placeholder::ALL.to_vec()).prop_map(|p| {
            let written = format!("{{{}}}", p.name());
            (written, plain(&p.value(&MOMENT)))
        });
        let text = "[^{]{0,8}".prop_map(|text| (text.clone(), text));
        let brace = Just(("{{".to_owned(), "{".to_owned()));
        prop_oneof![placeholder, text, brace]
    }

    proptest! {
        #[test]
        fn a_template_is_filled_piece_by_piece(pieces in proptest::collection::vec(piece(), 0..12)) {
            let written: String = pieces.iter().map(|(written, _)| written.as_str()).collect();
            let expected: String = pieces.iter().map(|(_, filled)| filled.as_str()).collect();
            prop_assert_eq!(filled(&written), expected);
        }

        #[test]
        fn no_text_panics_and_no_placeholder_is_left(text in "[a-z{} \"\\PC]{0,24}|(\\{|\\}|group|regio|n|epoch|reason| ){0,12}") {
            let Ok(template) = text.parse::<Template>() else { return Ok(()) };
            let filled = template.fill(&MOMENT);
            let _ = template.fill_json(&MOMENT);
            for placeholder in Placeholder::ALL {
                let left = filled.contains(&format!("{{{}}}", placeholder.name()));
                prop_assert!(!left || text.contains("{{"), "{} -> {}", text, filled);
            }
        }
    }
}
