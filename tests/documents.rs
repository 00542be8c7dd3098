//! The documents that operators read at three in the morning say what the program says, word for word.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const TROUBLESHOOTING: &str = include_str!("../docs/TROUBLESHOOTING.md");
const SEEING: &str = include_str!("../docs/SEEING.md");
const RULES: &str = include_str!("../config/prometheus-rules.yml");
const RULES_TEST: &str = include_str!("../config/prometheus-rules-test.yml");

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Where a string literal that begins at `text`'s first character, a quote, ends: the place of its closing one.
fn end_of_string(text: &str) -> usize {
    let mut escaped = false;
    for (place, character) in text.char_indices().skip(1) {
        match character {
            '"' if !escaped => return place,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    panic!("a string without end: {}", &text[..text.len().min(80)]);
}

/// The last string of a macro's arguments that stands for itself, which is the message: those before it are
/// values of fields, those after it are arguments of the message, and neither is one.
fn message(arguments: &str) -> Option<String> {
    let (mut depth, mut place) = (1, 0);
    let mut begins = true;
    let mut found = None;
    while depth > 0 {
        let rest = &arguments[place..];
        let character = rest.chars().next()?;
        match character {
            '"' => {
                let end = end_of_string(rest);
                if depth == 1 && begins {
                    found = Some(unescaped(&rest[1..end]));
                }
                place += end;
                begins = false;
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' => begins = true,
            _ if character.is_whitespace() => {}
            _ => begins = false,
        }
        place += if character == '"' {
            1
        } else {
            character.len_utf8()
        };
    }
    found
}

/// A literal as it is logged: lines that go on are joined.
fn unescaped(literal: &str) -> String {
    let mut lines = literal.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines
        .fold(first, |all, line| all + line.trim_start())
        .replace("\\\"", "\"")
}

/// What a source without its tests logs at `level`.
fn messages(source: &str, level: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]\nmod ").next().unwrap();
    let name = format!("tracing::{level}!(");
    code.split(name.as_str())
        .skip(1)
        .map(|arguments| {
            message(arguments).unwrap_or_else(|| panic!("no message: {arguments:.200}"))
        })
        .collect()
}

/// A message that is nothing but a sentence made elsewhere.
fn is_made_elsewhere(message: &str) -> bool {
    message.starts_with('{') && message.ends_with('}') && message.matches('{').count() == 1
}

fn logged(levels: &[&str]) -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    let mut logged = BTreeSet::new();
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        let is_test = file
            .file_stem()
            .is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
        for level in levels.iter().filter(|_| !is_test) {
            logged.extend(messages(&source, level));
        }
    }
    logged
}

/// The lines that have an entry in the document.
fn entries() -> BTreeSet<String> {
    let (_, by_line) = TROUBLESHOOTING.split_once("\n## By log line\n").unwrap();
    let heads = by_line
        .lines()
        .filter_map(|line| line.strip_prefix("#### `")?.strip_suffix('`'));
    heads.map(str::to_owned).collect()
}

/// The place that a link to a heading leads to, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let text: String = heading.to_lowercase().chars().filter(kept).collect();
    text.trim().replace(' ', "-")
}

fn anchors() -> BTreeSet<String> {
    let heads = TROUBLESHOOTING.lines().filter(|line| line.starts_with('#'));
    heads
        .map(|line| anchor(line.trim_start_matches('#')))
        .collect()
}

#[test]
fn every_warning_and_error_has_an_entry() {
    let entries = entries();
    let logged = logged(&["warn", "error"]);
    // Were the reader of the sources blind, nothing would be missing.
    assert!(
        logged.len() > 35,
        "only {} messages were found",
        logged.len()
    );
    let missing: Vec<_> = logged
        .iter()
        .filter(|message| !is_made_elsewhere(message) && !entries.contains(*message))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/TROUBLESHOOTING.md lacks {missing:#?}"
    );
    // Sentences made elsewhere are those of a stopped table and of missing signs of life, and no others.
    let elsewhere = logged.iter().filter(|message| is_made_elsewhere(message));
    assert_eq!(elsewhere.collect::<Vec<_>>(), ["{text}", "{}"]);
}

#[test]
fn every_entry_is_a_line_that_is_logged() {
    let logged = logged(&["warn", "error", "info"]);
    let mut sources_read = Vec::new();
    sources(Path::new("src"), &mut sources_read);
    let all: String = sources_read
        .iter()
        .map(|file| std::fs::read_to_string(file).unwrap())
        .collect();
    // The sentences of a stopped table are handed over as such.
    let is_said = |entry: &str| logged.contains(entry) || all.contains(&format!("\"{entry}\""));
    let gone: Vec<_> = entries()
        .into_iter()
        .filter(|entry| !is_said(entry))
        .collect();
    assert!(gone.is_empty(), "nothing logs {gone:#?}");
}

#[test]
fn every_readiness_code_has_an_entry() {
    let readme = include_str!("../README.md");
    let (_, table) = readme.split_once("| code | means |").unwrap();
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let codes: Vec<&str> = rows
        .filter_map(|row| row.split('|').nth(1))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    assert!(codes.len() > 12, "{codes:?}");
    let (_, by_code) = TROUBLESHOOTING
        .split_once("\n## By readiness code\n")
        .unwrap();
    for code in codes {
        let has_entry = by_code
            .lines()
            .any(|line| line.starts_with("### ") && line.contains(&format!("`{code}`")));
        assert!(has_entry, "{code}");
    }
}

/// Each alert as its name and its lines.
fn alerts() -> Vec<(&'static str, &'static str)> {
    let alerts: Vec<_> = RULES
        .split("      - alert: ")
        .skip(1)
        .map(|alert| alert.split_once('\n').unwrap())
        .collect();
    assert!(alerts.len() > 20, "{}", alerts.len());
    alerts
}

#[test]
fn every_alert_has_a_runbook_a_test_and_a_reason_for_its_time() {
    for (name, lines) in alerts() {
        let link = format!("runbook_url: docs/TROUBLESHOOTING.md#{}", anchor(name));
        assert!(lines.contains(&link), "{name} lacks {link}");
        assert!(
            TROUBLESHOOTING.contains(&format!("\n### {name}\n")),
            "{name}"
        );
        assert!(RULES_TEST.contains(name), "no test fires {name}");
        assert!(SEEING.contains(name), "{name} answers no question");
        let (before, _) = lines.split_once("        for: ").expect("a time");
        assert!(
            before.contains("        # for: "),
            "{name} does not say why it waits that long"
        );
        assert!(
            lines.contains("severity: critical") || lines.contains("severity: warning"),
            "{name}"
        );
    }
    let told = TROUBLESHOOTING
        .lines()
        .filter_map(|line| line.strip_prefix("### Farshore"));
    assert_eq!(
        told.count(),
        alerts().len(),
        "an entry for an alert that is none"
    );
}

#[test]
fn every_link_within_the_document_leads_somewhere() {
    let anchors = anchors();
    for (document, text) in [("TROUBLESHOOTING", TROUBLESHOOTING), ("SEEING", SEEING)] {
        let own = if document == "TROUBLESHOOTING" {
            "](#"
        } else {
            "](TROUBLESHOOTING.md#"
        };
        for link in text.split(own).skip(1) {
            let (to, _) = link.split_once(')').unwrap();
            assert!(anchors.contains(to), "{document}: #{to}");
        }
    }
}

/// Metrics that the answers, the rules and the dashboard name exist.
#[test]
fn every_metric_that_is_named_exists() {
    let known: BTreeSet<&str> = farshore::observe::metrics::METRICS
        .iter()
        .map(|m| m.name)
        .collect();
    let is_known = |name: &str| {
        let bare = ["_bucket", "_sum", "_count"]
            .into_iter()
            .find_map(|end| name.strip_suffix(end));
        known.contains(name) || bare.is_some_and(|bare| known.contains(bare))
    };
    let dashboard = include_str!("../config/grafana-dashboard.json");
    for text in [RULES, RULES_TEST, dashboard] {
        for part in text.split("farshore_").skip(1) {
            let end = part
                .find(|c: char| !(c.is_ascii_lowercase() || c == '_'))
                .unwrap();
            assert!(
                is_known(&format!("farshore_{}", &part[..end])),
                "farshore_{}",
                &part[..end]
            );
        }
    }
    let (_, questions) = SEEING.split_once("| question |").unwrap();
    for row in questions
        .lines()
        .take_while(|line| line.starts_with('|'))
        .skip(1)
    {
        let metrics = row.split('|').nth(4).unwrap_or_default();
        for name in metrics.split('`').skip(1).step_by(2) {
            assert!(is_known(&format!("farshore_{name}")), "{name}");
        }
    }
}
