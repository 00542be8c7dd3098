//! The policy table knows every error that the SDKs model for the calls that Farshore makes: read
//! from the sources of the very versions it is built with.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use farshore::error::{Class, Operation, class_of_code};

const SDKS: [&str; 3] = ["aws-sdk-dynamodb", "aws-sdk-dynamodbstreams", "aws-sdk-sqs"];

/// Modelled errors of which nothing is known but that they are our own mistake, or a person's: they
/// wait and alarm like one that nobody has ever seen, and their code tells which it is.
const UNKNOWN_BY_DESIGN: [&str; 9] = [
    "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
    "AWS.SimpleQueueService.BatchRequestTooLong",
    "AWS.SimpleQueueService.EmptyBatchRequest",
    "AWS.SimpleQueueService.InvalidBatchEntryId",
    "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
    "AWS.SimpleQueueService.UnsupportedOperation",
    "InvalidAttributeName",
    "InvalidAttributeValue",
    "QueueAlreadyExists",
];

/// Where the sources of a dependency lie.
fn sources() -> BTreeMap<String, PathBuf> {
    let version = Command::new(env!("CARGO")).arg("-vV").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    // What other platforms need is not on this machine.
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", host.unwrap()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(metadata.status.success(), "{metadata:?}");
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let path = |package: &serde_json::Value| {
        let name = package["name"].as_str().unwrap().to_owned();
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        (name, manifest.parent().unwrap().to_owned())
    };
    packages.iter().map(path).collect()
}

fn rust_files(directory: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        // What the embedded server speaks is no call of Farshore's.
        if path.is_dir() && !path.ends_with("embedded") {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(std::fs::read_to_string(path).unwrap());
        }
    }
}

/// Names of methods that are called without arguments, as the SDK's operations are.
fn called() -> BTreeSet<String> {
    let mut files = Vec::new();
    rust_files(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    files
        .iter()
        .flat_map(|text| text.split("()"))
        .filter_map(|before| {
            let start = before.rfind(|c: char| !is_name(c))?;
            before[..=start]
                .ends_with('.')
                .then(|| before[start + 1..].to_owned())
        })
        .collect()
}

/// The codes that the SDK in `source` models for `operation`; `None` if it has no such operation.
fn modelled(source: &Path, operation: &str) -> Option<Vec<String>> {
    let file = source.join(format!("src/protocol_serde/shape_{operation}.rs"));
    let text = std::fs::read_to_string(file).ok()?;
    let begin = text.find(&format!("pub fn de_{operation}_http_error("))?;
    let body = &text[begin..];
    let end = body[1..].find("\npub fn ").map_or(body.len(), |at| at + 1);
    let code = |line: &str| {
        let line = line.strip_prefix("        \"")?;
        let (code, rest) = line.split_once('"')?;
        rest.starts_with(" =>").then(|| code.to_owned())
    };
    Some(body[..end].lines().filter_map(code).collect())
}

#[test]
fn every_error_that_the_sdks_model_has_a_class() {
    let sources = sources();
    let mut operations = 0;
    let mut codes = BTreeSet::new();
    for name in called() {
        for sdk in SDKS {
            let Some(found) = modelled(&sources[sdk], &name) else {
                continue;
            };
            operations += 1;
            assert!(!found.is_empty(), "{sdk} {name}: no code was found");
            codes.extend(found);
        }
    }
    assert!(operations >= 15, "only {operations} operations were found");
    assert!(codes.len() >= 30, "only {} codes were found", codes.len());
    let unknown: BTreeSet<&str> = codes
        .iter()
        .map(String::as_str)
        .filter(|code| class_of_code(code, 400) == Class::Unknown)
        .collect();
    assert_eq!(unknown, BTreeSet::from(UNKNOWN_BY_DESIGN));
}

/// Every class says what to do, on every call, and none of them drops a record for want of knowing.
#[test]
fn every_class_has_a_policy_and_a_next_step() {
    for class in Class::ALL {
        assert!(!class.next_step().is_empty() && !class.next_step().ends_with('.'));
        for operation in Operation::ALL {
            // It is a const fn without a wildcard over classes: this is that it does not panic.
            let _ = class.policy(operation);
        }
    }
}
