//! From a file and the environment to a validated [`Config`].

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::actions::{CALLS_AWS, Written, Wrong, checked, unknown_region};
use super::{Config, keys};
use crate::error::Failure;

/// The configuration as one process sees it: the file, and which region is `here`.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The validated configuration.
    pub config: Config,
    /// Label of the region this process feeds.
    pub here: String,
    /// `FARSHORE_…` variables that name no key: warned about, since orchestrators set some of
    /// their own (a Kubernetes service called `farshore` does).
    pub unknown_variables: Vec<String>,
}

/// Variables that are not overrides of a key.
const OTHER_VARIABLES: &[&str] = &["FARSHORE_CONFIG", "FARSHORE_LOG", "FARSHORE_LONG"];
const TEST_VARIABLES: &str = "FARSHORE_TEST_";

/// One page of a scan; correct with less, and slow.
const RECONCILE_MEMORY_MIN: u64 = 1 << 20;
/// `TotalSegments` of a scan goes no higher.
const SEGMENTS_MAX: u32 = 10_000;
/// An item has up to 400 KB.
const READ_AHEAD_MIN: u64 = 512 * 1024;

/// Reads `path`, applies `environment`, and validates.
///
/// # Errors
/// A [`Failure`] that names the file, the dotted field and, where it is in the file, its line.
pub fn load(path: &Path, environment: &[(String, String)]) -> Result<Loaded, Failure> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::new(
            format!("The configuration file {shown} could not be read"),
            error.to_string(),
            "Name the file with --config FILE or FARSHORE_CONFIG; config/default.toml is an example",
        )
    })?;
    parse(&shown, &text, environment)
}

/// [`load`] for a text that is already in memory; `name` stands for the file in messages.
pub fn parse(name: &str, text: &str, environment: &[(String, String)]) -> Result<Loaded, Failure> {
    let refused = |why: String, next: &str| {
        Failure::new(format!("The configuration {name} is not usable"), why, next)
    };
    let tree = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(0, |span| line_of(text, span.start));
        refused(
            format!("line {line}: {}", error.message()),
            "Mend the TOML syntax in that line",
        )
    })?;
    if let Some(unknown) = unknown_key(text, tree.get_ref()) {
        return Err(refused(unknown.0, &unknown.1));
    }
    let wrong_type = |error: &toml::de::Error| {
        let span = error.span().filter(|span| span.end > span.start)?;
        let line = line_of(text, span.start);
        let field = field_at(tree.get_ref(), span.start);
        Some(refused(
            format!("line {line}, {field}: {}", error.message()),
            "Correct the value; docs/CONFIGURATION.md lists every key with its type",
        ))
    };
    let wrong_action = |wrong: Wrong| {
        let line = line_of(text, action_offset(tree.get_ref(), &wrong));
        refused(format!("line {line}, {wrong}"), &wrong.next)
    };
    // The environment has no say in actions, so nothing that is missing may still come.
    let written = toml::from_str::<OnlyActions>(text).map_err(|error| {
        wrong_type(&error).unwrap_or_else(|| {
            let next = "Correct the action; docs/ACTIONS.md shows each kind";
            refused(format!("actions: {}", error.message()), next)
        })
    })?;
    checked(written.actions, CALLS_AWS).map_err(wrong_action)?;
    // Parsed once without the environment, so that an error in the file can name its line.
    let typed = toml::from_str::<Config>(text);
    if let Err(error) = &typed
        // A missing required key is reported with the span of its table; the environment may
        // still supply it.
        && !error.message().starts_with("missing field")
        && let Some(refused) = wrong_type(error)
    {
        return Err(refused);
    }
    let mut table: toml::Table = toml::from_str(text)
        .map_err(|error| refused(error.message().to_owned(), "Mend the TOML syntax"))?;
    let (applied, unknown_variables) = override_from(&mut table, environment);
    let config: Config = table.try_into().map_err(|error: toml::de::Error| {
        let source = if applied.is_empty() {
            String::new()
        } else {
            format!(" (with {} applied)", applied.join(", "))
        };
        refused(
            format!("{}{source}", error.message()),
            "Correct the value; docs/CONFIGURATION.md lists every key with its type",
        )
    })?;
    let here = validate(&config, environment).map_err(|(why, next)| refused(why, &next))?;
    if let Some(wrong) = unknown_region(&config.actions, &config.regions) {
        return Err(wrong_action(wrong));
    }
    Ok(Loaded {
        config,
        here,
        unknown_variables,
    })
}

/// The actions of a file, whatever else stands in it.
#[derive(Deserialize)]
struct OnlyActions {
    #[serde(default)]
    actions: Vec<Written>,
}

/// Where the key that is wrong stands, or else its action begins.
fn action_offset(root: &DeTable<'_>, wrong: &Wrong) -> usize {
    let action = root
        .get("actions")
        .and_then(|list| list.get_ref().as_array()?.get(wrong.index));
    let Some(action) = action else { return 0 };
    let key = action.get_ref().as_table().and_then(|table| {
        let mut keys = table.iter().map(|(name, _)| name);
        keys.find(|name| name.get_ref() == wrong.field)
    });
    key.map_or(action.span().start, |key| key.span().start)
}

/// The line (from 1) of a byte offset.
fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())]
        .iter()
        .filter(|byte| **byte == b'\n')
        .count()
        + 1
}

/// The first key that nobody knows, as why and next step.
fn unknown_key(text: &str, root: &DeTable<'_>) -> Option<(String, String)> {
    let mut found = None;
    visit(root, &mut Vec::new(), &mut |path, span, is_table| {
        let parts: Vec<&str> = path.iter().map(String::as_str).collect();
        let known = if is_table {
            keys::is_section(&parts)
        } else {
            // A known key whose value has the wrong shape is left to the typed parse.
            keys::is_section(&parts) || keys::KEYS.iter().any(|k| keys::matches(k.path, &parts))
        };
        if !known && found.is_none() {
            let line = line_of(text, span.start);
            let why = format!("line {line}: there is no key `{}`", keys::display(&parts));
            let next = match keys::nearest(&parts) {
                Some(near) => {
                    format!("Did you mean `{near}`? docs/CONFIGURATION.md lists every key")
                }
                None => "Remove it; docs/CONFIGURATION.md lists every key".to_owned(),
            };
            found = Some((why, next));
        }
        known
    });
    found
}

/// Walks all keys; `see` gets path, span of the key and whether the value is a table, and says
/// whether to go inside.
fn visit(
    table: &DeTable<'_>,
    path: &mut Vec<String>,
    see: &mut impl FnMut(&[String], std::ops::Range<usize>, bool) -> bool,
) {
    for (name, value) in table.iter() {
        path.push(name.get_ref().to_string());
        let is_table = is_table(value);
        if see(path, name.span(), is_table) {
            descend(value, path, see);
        }
        path.pop();
    }
}

fn descend(
    value: &Spanned<DeValue<'_>>,
    path: &mut Vec<String>,
    see: &mut impl FnMut(&[String], std::ops::Range<usize>, bool) -> bool,
) {
    if let Some(inner) = value.get_ref().as_table() {
        visit(inner, path, see);
    } else if let Some(list) = value.get_ref().as_array() {
        path.push("[]".to_owned());
        for entry in list.iter() {
            if let Some(inner) = entry.get_ref().as_table() {
                visit(inner, path, see);
            }
        }
        path.pop();
    }
}

fn is_table(value: &Spanned<DeValue<'_>>) -> bool {
    match value.get_ref() {
        DeValue::Table(_) => true,
        DeValue::Array(list) => list.iter().any(|entry| entry.get_ref().is_table()),
        _ => false,
    }
}

/// The dotted field whose value holds the byte `offset`.
fn field_at(root: &DeTable<'_>, offset: usize) -> String {
    fn walk(table: &DeTable<'_>, offset: usize, path: &mut Vec<String>) -> bool {
        for (name, value) in table.iter() {
            path.push(name.get_ref().to_string());
            if let Some(inner) = value.get_ref().as_table() {
                if walk(inner, offset, path) {
                    return true;
                }
            } else if let Some(list) = value.get_ref().as_array() {
                path.push("[]".to_owned());
                for entry in list.iter() {
                    if let Some(inner) = entry.get_ref().as_table()
                        && walk(inner, offset, path)
                    {
                        return true;
                    }
                }
                path.pop();
            }
            if value.span().contains(&offset) || name.span().contains(&offset) {
                return true;
            }
            path.pop();
        }
        false
    }
    let mut path = Vec::new();
    walk(root, offset, &mut path);
    keys::display(&path.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Puts `FARSHORE_SECTION_KEY` variables over the file's values. Returns the names applied and
/// those that name no key.
fn override_from(
    table: &mut toml::Table,
    environment: &[(String, String)],
) -> (Vec<String>, Vec<String>) {
    let mut applied = Vec::new();
    let mut unknown = Vec::new();
    let labels: Vec<String> = table
        .get("regions")
        .and_then(|regions| regions.as_table())
        .map(|regions| regions.keys().cloned().collect())
        .unwrap_or_default();
    let targets = override_targets(&labels);
    for (name, value) in environment {
        if !name.starts_with("FARSHORE_")
            || OTHER_VARIABLES.contains(&name.as_str())
            || name.starts_with(TEST_VARIABLES)
        {
            continue;
        }
        match targets.iter().find(|(variable, ..)| variable == name) {
            Some((_, path, kind)) => {
                set(table, path, scalar(kind, value));
                applied.push(name.clone());
            }
            None => unknown.push(name.clone()),
        }
    }
    (applied, unknown)
}

/// Every variable that overrides a field, with the field's path and type.
fn override_targets(labels: &[String]) -> Vec<(String, Vec<String>, &'static str)> {
    let mut targets = Vec::new();
    for key in keys::KEYS.iter().filter(|key| !key.path.contains("[]")) {
        let fill: Vec<Option<&String>> = if key.path.contains('*') {
            labels.iter().map(Some).collect()
        } else {
            vec![None]
        };
        for label in fill {
            let path: Vec<String> = key
                .path
                .split('.')
                .map(|part| match label {
                    Some(label) if part == "*" => label.clone(),
                    _ => part.to_owned(),
                })
                .collect();
            let variable = format!(
                "FARSHORE_{}",
                path.join("_").to_ascii_uppercase().replace('-', "_")
            );
            targets.push((variable, path, key.kind));
        }
    }
    targets
}

fn scalar(kind: &str, value: &str) -> toml::Value {
    match kind {
        "number" => value.parse().map(toml::Value::Integer).ok(),
        "boolean" => value.parse().map(toml::Value::Boolean).ok(),
        _ => None,
    }
    // A wrong number stays text, so that the typed parse can say what it expected.
    .unwrap_or_else(|| toml::Value::String(value.to_owned()))
}

fn set(table: &mut toml::Table, path: &[String], value: toml::Value) {
    match path {
        [] => {}
        [last] => {
            table.insert(last.clone(), value);
        }
        [first, rest @ ..] => {
            let inner = table
                .entry(first.clone())
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let Some(inner) = inner.as_table_mut() {
                set(inner, rest, value);
            }
        }
    }
}

/// Checks what types cannot say. Returns the label of `here`, or why not and what to do.
fn validate(config: &Config, environment: &[(String, String)]) -> Result<String, (String, String)> {
    let refuse = |why: String, next: &str| Err((why, next.to_owned()));
    if config.group.is_empty()
        || !config
            .group
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    {
        return refuse(
            format!("group: `{}` cannot be part of a table name", config.group),
            "Use letters, digits, `-`, `_` and `.` only",
        );
    }
    if config.regions.len() < 2 {
        return refuse(
            format!(
                "regions: {} given, and a copy needs two",
                config.regions.len()
            ),
            "Add a section [regions.LABEL] for each region",
        );
    }
    let labels = config
        .regions
        .keys()
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if !config.regions.contains_key(&config.active) {
        return refuse(
            format!(
                "active: `{}` is none of the regions ({labels})",
                config.active
            ),
            "Set `active` to one of the labels under [regions]",
        );
    }
    for (label, region) in &config.regions {
        for (field, url) in [
            ("endpoint_url", &region.endpoint_url),
            ("streams_endpoint_url", &region.streams_endpoint_url),
        ] {
            if let Some(url) = url
                && !(field == "endpoint_url" && url == super::EMBEDDED)
                && !is_url(url)
            {
                return refuse(
                    format!("regions.{label}.{field}: `{url}` is no http or https URL"),
                    "Write it like https://dynamodb.us-east-1.amazonaws.com",
                );
            }
        }
        if region.external_id.is_some() && region.role_arn.is_none() {
            return refuse(
                format!("regions.{label}.external_id: there is no role_arn to present it to"),
                "Set role_arn too, or remove external_id",
            );
        }
        if cfg!(not(feature = "embedded")) && region.is_embedded() {
            return refuse(
                format!("regions.{label}.endpoint_url: this build has no embedded DynamoDB"),
                "Use a build with the cargo feature `embedded`, or name an endpoint",
            );
        }
    }
    let mut names = BTreeSet::new();
    for (index, table) in config.tables.iter().enumerate() {
        if table.name.is_empty() {
            return refuse(
                format!("tables[{index}].name: it is empty"),
                "Give the table's name",
            );
        }
        if !names.insert(table.name.as_str()) {
            return refuse(
                format!("tables[{index}].name: `{}` stands twice", table.name),
                "List each table once",
            );
        }
        if let Some(label) = table
            .names
            .keys()
            .find(|l| !config.regions.contains_key(*l))
        {
            return refuse(
                format!("tables[{index}].names.{label}: there is no region `{label}` ({labels})"),
                "Use the labels under [regions]",
            );
        }
    }
    for label in config.regions.keys() {
        let mut taken = BTreeSet::new();
        for (index, table) in config.tables.iter().enumerate() {
            let name = table.name_in(label);
            if !taken.insert(name) {
                return refuse(
                    format!(
                        "tables[{index}]: two tables are called `{name}` in {label}, and each would overwrite the other"
                    ),
                    "Give each table a name of its own in every region",
                );
            }
        }
    }
    for (label, region) in &config.regions {
        let twin = config.regions.iter().find(|(other, candidate)| {
            *other > label
                && !region.is_embedded()
                && config.region_name(other) == config.region_name(label)
                && (
                    &candidate.endpoint_url,
                    &candidate.profile,
                    &candidate.role_arn,
                ) == (&region.endpoint_url, &region.profile, &region.role_arn)
        });
        if let Some((twin, _)) = twin {
            return refuse(
                format!(
                    "regions.{twin}: it is the same place as regions.{label}, and a table would be replicated into itself"
                ),
                "Give the two labels different regions, endpoints or accounts",
            );
        }
    }
    if config.tables.is_empty() {
        return refuse(
            "tables: none is listed".to_owned(),
            "Add a section [[tables]] with a name for each table",
        );
    }
    for (field, number) in [
        ("worker.concurrency", config.worker.concurrency),
        (
            "dead_letters.max_attempts",
            config.dead_letters.max_attempts as usize,
        ),
    ] {
        if number == 0 {
            return refuse(format!("{field}: 0 would do nothing"), "Set at least 1");
        }
    }
    for (field, duration, least_ms) in [
        ("worker.poll_interval", config.worker.poll_interval, 1),
        ("worker.idle_interval", config.worker.idle_interval, 1),
        ("worker.checkpoint_every", config.worker.checkpoint_every, 1),
        ("worker.discover_every", config.worker.discover_every, 100),
        ("worker.shutdown_grace", config.worker.shutdown_grace, 100),
        ("leases.duration", config.leases.duration, 500),
        ("leases.late_effect", config.leases.late_effect, 1_000),
        ("reconcile.settle", config.reconcile.settle, 100),
    ] {
        if duration.as_millis() < least_ms {
            return refuse(
                format!(
                    "{field}: {} is too short",
                    humantime::format_duration(duration)
                ),
                &format!("Set at least {least_ms}ms"),
            );
        }
    }
    if config.worker.read_ahead.as_u64() < READ_AHEAD_MIN {
        return refuse(
            format!(
                "worker.read_ahead: {} is too little to hold one item",
                config.worker.read_ahead
            ),
            "Set at least 512 KiB",
        );
    }
    if config.reconcile.memory.as_u64() < RECONCILE_MEMORY_MIN {
        return refuse(
            format!(
                "reconcile.memory: {} holds less than a page",
                config.reconcile.memory
            ),
            "Set at least 1 MiB",
        );
    }
    if config.reconcile.segments > SEGMENTS_MAX {
        return refuse(
            format!(
                "reconcile.segments: {} are more rows than the state table is to hold",
                config.reconcile.segments
            ),
            "Set at most 10000",
        );
    }
    match (
        &config.dead_letters.queue_url,
        &config.dead_letters.directory,
    ) {
        (None, None) => {
            return refuse(
                "dead_letters: neither queue_url nor directory is set, so a record that the replica refuses would have nowhere to go".to_owned(),
                "Set dead_letters.queue_url to an SQS queue in the replica region, or dead_letters.directory for one host",
            );
        }
        (Some(_), Some(_)) => {
            return refuse(
                "dead_letters: queue_url and directory are both set".to_owned(),
                "Keep one of them",
            );
        }
        (Some(url), None) if !is_url(url) => {
            return refuse(
                format!("dead_letters.queue_url: `{url}` is no http or https URL"),
                "Write the queue's URL as SQS shows it",
            );
        }
        _ => {}
    }
    resolve_here(config, environment, &labels)
}

pub(super) fn is_url(text: &str) -> bool {
    text.parse::<hyper::Uri>()
        .is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some())
}

/// The label of the region this process feeds: `here`, else `AWS_REGION`.
fn resolve_here(
    config: &Config,
    environment: &[(String, String)],
    labels: &str,
) -> Result<String, (String, String)> {
    let (source, wanted) = match &config.here {
        Some(here) => ("here", here.clone()),
        None => {
            let region = ["AWS_REGION", "AWS_DEFAULT_REGION"]
                .iter()
                .find_map(|name| {
                    environment
                        .iter()
                        .find(|(variable, value)| variable == name && !value.is_empty())
                        .map(|(_, value)| value.clone())
                });
            match region {
                Some(region) => ("AWS_REGION", region),
                None => {
                    return Err((
                        "here: it is not set, and neither is AWS_REGION".to_owned(),
                        format!(
                            "Set `here`, FARSHORE_HERE or AWS_REGION to the region this process feeds ({labels})"
                        ),
                    ));
                }
            }
        }
    };
    if config.regions.contains_key(&wanted) {
        return Ok(wanted);
    }
    let mut by_name = config
        .regions
        .keys()
        .filter(|label| config.region_name(label) == wanted);
    match (by_name.next(), by_name.next()) {
        (Some(label), None) => Ok(label.clone()),
        (Some(_), Some(_)) => Err((
            format!("{source}: several regions are called `{wanted}`"),
            "Set `here` to one of the labels".to_owned(),
        )),
        _ => Err((
            format!("{source}: `{wanted}` is none of the regions ({labels})"),
            "Set `here` to the region this process feeds".to_owned(),
        )),
    }
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
