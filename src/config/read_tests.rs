use super::*;

const MINIMAL: &str = r#"group = "orders"
active = "us-east-1"
here = "us-west-2"
[regions.us-east-1]
[regions.us-west-2]
[[tables]]
name = "orders"
[dead_letters]
directory = "/var/lib/farshore"
"#;

fn parsed(text: &str) -> Result<Loaded, Failure> {
    parse("farshore.toml", text, &[])
}

fn why(text: &str) -> String {
    let failure = parsed(text).expect_err("the text should be refused");
    format!("{} / {}", failure.why, failure.next)
}

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .collect()
}

#[test]
fn a_minimal_file_is_enough() {
    let loaded = parsed(MINIMAL).unwrap();
    assert_eq!(loaded.here, "us-west-2");
    assert_eq!(loaded.config.state_table(), "farshore-orders");
    assert_eq!(loaded.config.worker, super::super::Worker::default());
}

#[test]
fn an_unknown_key_names_its_field_its_line_and_the_nearest_key() {
    let text = why(&format!("{MINIMAL}[worker]\nlisten_on = \"127.0.0.1:1\"\n"));
    assert!(text.contains("line 11"), "{text}");
    assert!(text.contains("worker.listen_on"), "{text}");
    assert!(text.contains("`worker.listen`"), "{text}");
    let text = why(&MINIMAL.replace("name = ", "nmae = "));
    assert!(
        text.contains("line 7") && text.contains("tables[].nmae"),
        "{text}"
    );
    assert!(text.contains("`tables[].name`"), "{text}");
    let text = why(&MINIMAL.replace("[dead_letters]", "[dead_leters]"));
    assert!(
        text.contains("line 8") && text.contains("dead_leters"),
        "{text}"
    );
}

#[test]
fn a_wrong_type_names_its_field_and_line() {
    let text = why(&format!("{MINIMAL}[worker]\nconcurrency = \"many\"\n"));
    assert!(text.contains("line 11"), "{text}");
    assert!(text.contains("worker.concurrency"), "{text}");
    let text = why(&format!("{MINIMAL}[leases]\nduration = 10\n"));
    assert!(text.contains("leases.duration"), "{text}");
    let text = why(&format!("{MINIMAL}[leases]\nduration = \"10\"\n"));
    assert!(
        text.contains("leases.duration") && text.contains("10s"),
        "{text}"
    );
}

#[test]
fn variables_override_single_fields() {
    let environment = env(&[
        ("FARSHORE_WORKER_LISTEN", "0.0.0.0:9464"),
        ("FARSHORE_WRITES_UNITS_PER_SECOND", "50"),
        (
            "FARSHORE_REGIONS_US_EAST_1_ENDPOINT_URL",
            "http://127.0.0.1:8000",
        ),
        ("FARSHORE_SERVICE_PORT", "80"),
        ("FARSHORE_CONFIG", "elsewhere.toml"),
    ]);
    let loaded = parse("farshore.toml", MINIMAL, &environment).unwrap();
    assert_eq!(loaded.config.worker.listen.to_string(), "0.0.0.0:9464");
    assert_eq!(loaded.config.writes.units_per_second, 50);
    assert_eq!(
        loaded.config.regions["us-east-1"].endpoint_url.as_deref(),
        Some("http://127.0.0.1:8000")
    );
    assert_eq!(loaded.unknown_variables, ["FARSHORE_SERVICE_PORT"]);
    let wrong = env(&[("FARSHORE_WORKER_CONCURRENCY", "many")]);
    let failure = parse("farshore.toml", MINIMAL, &wrong).unwrap_err();
    assert!(
        failure.why.contains("FARSHORE_WORKER_CONCURRENCY"),
        "{failure}"
    );
}

#[test]
fn here_comes_from_the_environment_and_must_be_a_region() {
    let text = MINIMAL.replace("here = \"us-west-2\"\n", "");
    assert!(why(&text).contains("here: it is not set"));
    let loaded = parse("f", &text, &env(&[("AWS_REGION", "us-west-2")])).unwrap();
    assert_eq!(loaded.here, "us-west-2");
    let failure = parse("f", &text, &env(&[("AWS_REGION", "eu-west-1")])).unwrap_err();
    assert!(
        failure.why.contains("`eu-west-1` is none of the regions"),
        "{failure}"
    );
}

#[test]
fn what_types_cannot_say_is_refused_by_name() {
    for (from, to, names) in [
        (
            "active = \"us-east-1\"",
            "active = \"mars\"",
            "active: `mars`",
        ),
        ("group = \"orders\"", "group = \"or/ders\"", "group:"),
        (
            "[regions.us-east-1]",
            "[regions.us-east-1]\nendpoint_url = \"x\"",
            "regions.us-east-1.endpoint_url",
        ),
        (
            "directory = \"/var/lib/farshore\"",
            "max_attempts = 2",
            "neither queue_url nor directory",
        ),
        (
            "directory = \"/var/lib/farshore\"",
            "directory = \"/x\"\nqueue_url = \"http://q/1\"",
            "both set",
        ),
        (
            "name = \"orders\"",
            "name = \"orders\"\n[[tables]]\nname = \"orders\"",
            "stands twice",
        ),
        (
            "name = \"orders\"",
            "name = \"orders\"\nnames = { mars = \"x\" }",
            "no region `mars`",
        ),
        (
            "name = \"orders\"",
            "name = \"orders\"\nstart = \"yesterday\"",
            "trim-horizon",
        ),
        (
            "name = \"orders\"",
            "name = \"orders\"\n[[tables]]\nname = \"b\"\nnames = { us-west-2 = \"orders\" }",
            "called `orders` in us-west-2",
        ),
        (
            "[regions.us-west-2]",
            "[regions.us-west-2]\nregion = \"us-east-1\"",
            "replicated into itself",
        ),
    ] {
        assert!(MINIMAL.contains(from));
        let text = why(&MINIMAL.replace(from, to));
        assert!(text.contains(names), "{to}: {text}");
    }
}

#[test]
fn the_default_file_says_what_the_code_does() {
    let text = include_str!("../../config/default.toml");
    let loaded = parse("config/default.toml", text, &[]).unwrap();
    let config = loaded.config;
    assert_eq!(config.worker, super::super::Worker::default());
    assert_eq!(
        config.leases.duration,
        super::super::Leases::default().duration
    );
    assert_eq!(config.writes, super::super::Writes::default());
    assert_eq!(
        config.dead_letters.max_attempts,
        super::super::DeadLetters::default().max_attempts
    );
    // Every key stands in the file, used or as a comment.
    for key in keys::KEYS {
        let name = key.path.rsplit('.').find(|part| *part != "*").unwrap();
        assert!(
            text.lines().any(|line| {
                line.trim_start_matches(['#', ' '])
                    .split('=')
                    .next()
                    .is_some_and(|left| left.trim() == name)
            }),
            "config/default.toml does not show {}",
            key.path
        );
    }
}

#[test]
fn the_documentation_lists_every_key_with_its_default() {
    let text = include_str!("../../docs/CONFIGURATION.md");
    for key in keys::KEYS {
        let default = if key.default.is_empty() {
            "—"
        } else {
            key.default
        };
        let row = format!(
            "| `{}` | {} | {} | {} |",
            key.path, key.kind, default, key.reason
        );
        assert!(
            text.lines().any(|line| line == row),
            "docs/CONFIGURATION.md lacks the row:\n{row}"
        );
    }
    let rows = text.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(
        rows,
        keys::KEYS.len(),
        "a row for a key that does not exist"
    );
}
