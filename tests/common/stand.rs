//! Two regions to replicate between: embedded ones, or those that `FARSHORE_TEST_ENDPOINT`
//! names (`URL` for both, or `URL,URL`).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_dynamodb::types::{
    AttributeDefinition, AttributeValue, BillingMode, KeySchemaElement, KeyType,
    ScalarAttributeType, StreamSpecification, StreamViewType,
};
use farshore::embedded::EmbeddedServer;
use farshore::embedded::gateway::{Gateway, Options};
use tempfile::TempDir;

use super::checker;
use super::proxy::Proxy;

pub const SOURCE: &str = "us-east-1";
pub const TARGET: &str = "us-west-2";

pub struct Stand {
    pub source: Client,
    pub target: Client,
    pub source_url: String,
    pub target_url: String,
    /// Tables of one stand do not meet those of another on a server that both use.
    pub suffix: String,
    pub temp: TempDir,
    servers: Vec<EmbeddedServer>,
    /// Gateways in front of source and target, where the stand has them.
    pub gateways: Vec<Gateway>,
}

pub fn client(url: &str, region: &str) -> Client {
    let config = aws_sdk_dynamodb::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(region.to_owned()))
        .endpoint_url(url)
        .credentials_provider(Credentials::new("test", "test", None, None, "test"))
        .build();
    Client::from_conf(config)
}

impl Stand {
    /// The regions that the environment names, or two embedded ones.
    pub async fn new() -> Self {
        match std::env::var("FARSHORE_TEST_ENDPOINT") {
            Ok(urls) => {
                let (source, target) = urls.split_once(',').unwrap_or((&urls, &urls));
                Self::at(source, target)
            }
            Err(_) => Self::embedded().await,
        }
    }

    /// Two embedded regions.
    pub async fn embedded() -> Self {
        let source = EmbeddedServer::start().await.unwrap();
        let target = EmbeddedServer::start().await.unwrap();
        let mut stand = Self::at(&source.endpoint_url(), &target.endpoint_url());
        stand.servers = vec![source, target];
        stand
    }

    /// Two embedded regions, each behind a gateway with the given options.
    pub async fn gateways(source: Options, target: Options) -> Self {
        let source = Gateway::start(source.region(SOURCE)).await.unwrap();
        let target = Gateway::start(target.region(TARGET)).await.unwrap();
        let mut stand = Self::at(&source.endpoint_url(), &target.endpoint_url());
        stand.gateways = vec![source, target];
        stand
    }

    /// Regions at the given endpoints.
    pub fn at(source_url: &str, target_url: &str) -> Self {
        Self {
            source: client(source_url, SOURCE),
            target: client(target_url, TARGET),
            source_url: source_url.to_owned(),
            target_url: target_url.to_owned(),
            suffix: format!("{:08x}", rand::random::<u32>()),
            temp: tempfile::tempdir().unwrap(),
            servers: Vec::new(),
            gateways: Vec::new(),
        }
    }

    pub fn table(&self, name: &str) -> String {
        format!("{name}-{}", self.suffix)
    }

    pub fn state_table(&self) -> String {
        format!("farshore-{}", self.group())
    }

    pub fn group(&self) -> String {
        format!("g{}", self.suffix)
    }

    pub fn letters(&self) -> PathBuf {
        self.temp.path().join("letters")
    }

    /// Dead letters in the directory, parsed; those that were brought home as well.
    pub fn dead_letters(&self) -> Vec<serde_json::Value> {
        Self::dead_letters_in(&self.letters())
    }

    /// Dead letters in another directory. A line that a crash cut short is none.
    pub fn dead_letters_in(directory: &Path) -> Vec<serde_json::Value> {
        let Ok(files) = std::fs::read_dir(directory) else {
            return Vec::new();
        };
        let is_letters = |path: &PathBuf| path.extension().is_some_and(|e| e == "jsonl");
        files
            .map(|file| file.unwrap().path())
            .filter(is_letters)
            .map(|path| std::fs::read_to_string(path).unwrap())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| serde_json::from_str(&line).ok())
            .collect()
    }

    /// Writes a configuration for these regions; `more` is TOML for the end of the file.
    pub fn config(&self, tables: &[&str], more: &str) -> PathBuf {
        let letters = format!("[dead_letters]\ndirectory = {:?}\n", self.letters());
        self.config_at(
            &self.source_url,
            &self.target_url,
            tables,
            &format!("{letters}{more}"),
        )
    }

    /// As [`config`](Self::config), with other endpoints and without dead letters.
    pub fn config_at(
        &self,
        source_url: &str,
        target_url: &str,
        tables: &[&str],
        more: &str,
    ) -> PathBuf {
        let port = free_port();
        let mut text = format!(
            r#"group = "{}"
active = "{SOURCE}"
here = "{TARGET}"
[regions.{SOURCE}]
endpoint_url = "{source_url}"
[regions.{TARGET}]
endpoint_url = "{target_url}"
[worker]
listen = "127.0.0.1:{port}"
poll_interval = "20ms"
idle_interval = "50ms"
checkpoint_every = "100ms"
discover_every = "1s"
shutdown_grace = "10s"
[leases]
duration = "1s"
late_effect = "5s"
"#,
            self.group()
        );
        for table in tables {
            // A table given with settings brings its own section.
            if table.contains('=') {
                text.push_str(&format!("[[tables]]\n{table}\n"));
            } else {
                text.push_str(&format!("[[tables]]\nname = \"{table}\"\n"));
            }
        }
        text.push_str(more);
        let path = self.temp.path().join(format!("farshore-{port}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A table with the key `id` (S) and a stream in the source.
    pub async fn create_source(&self, name: &str) {
        create_table(&self.source, name, Some(StreamViewType::NewAndOldImages)).await;
    }

    pub async fn differences(&self, table: &str) -> Vec<String> {
        checker::differences((&self.source, table), (&self.target, table)).await
    }

    /// Waits until source and replica are equal, with at least `items` items.
    pub async fn converge(&self, table: &str, items: usize) {
        let start = std::time::Instant::now();
        loop {
            let differences = self.differences(table).await;
            if differences.is_empty() {
                break;
            }
            assert!(
                start.elapsed().as_secs() < 120,
                "not equal after 120 s, {} differences:\n{}",
                differences.len(),
                differences[..differences.len().min(5)].join("\n")
            );
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let held = checker::items(&self.target, table).await.len();
        assert!(
            held >= items,
            "only {held} items in {table}, {items} expected"
        );
    }

    /// A proxy that can be cut, in front of an endpoint of this stand.
    pub async fn proxy(&self, url: &str) -> Proxy {
        Proxy::start(url.strip_prefix("http://").unwrap()).await
    }
}

/// A free port of this machine that no other test of this process is told, and that no outgoing
/// connection takes either: it lies below the ports that systems hand out by themselves (Linux
/// from 32,768, others from 49,152). Workers keep theirs over restarts, so one that the system
/// gave away in between would refuse their next start for good.
pub fn free_port() -> u16 {
    const FIRST: u32 = 20_000;
    const COUNT: u32 = 12_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Processes that run side by side begin far from each other.
    let begin = std::process::id().wrapping_mul(1_009);
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = (FIRST + begin.wrapping_add(step) % COUNT) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port from {FIRST} on");
}

pub fn s(text: impl Into<String>) -> AttributeValue {
    AttributeValue::S(text.into())
}

pub fn n(number: impl ToString) -> AttributeValue {
    AttributeValue::N(number.to_string())
}

/// A table with the key `id` (S).
pub async fn create_table(client: &Client, name: &str, stream: Option<StreamViewType>) {
    let mut request = client
        .create_table()
        .table_name(name)
        .attribute_definitions(attribute("id", ScalarAttributeType::S))
        .key_schema(key("id", KeyType::Hash))
        .billing_mode(BillingMode::PayPerRequest);
    if let Some(view) = stream {
        request = request.stream_specification(
            StreamSpecification::builder()
                .stream_enabled(true)
                .stream_view_type(view)
                .build()
                .unwrap(),
        );
    }
    request.send().await.unwrap();
}

pub fn attribute(name: &str, kind: ScalarAttributeType) -> AttributeDefinition {
    AttributeDefinition::builder()
        .attribute_name(name)
        .attribute_type(kind)
        .build()
        .unwrap()
}

pub fn key(name: &str, kind: KeyType) -> KeySchemaElement {
    KeySchemaElement::builder()
        .attribute_name(name)
        .key_type(kind)
        .build()
        .unwrap()
}

/// Puts `{id, v}`.
pub async fn put(client: &Client, table: &str, id: &str, v: impl ToString) {
    client
        .put_item()
        .table_name(table)
        .item("id", s(id))
        .item("v", n(v))
        .send()
        .await
        .unwrap();
}

pub async fn delete(client: &Client, table: &str, id: &str) {
    client
        .delete_item()
        .table_name(table)
        .key("id", s(id))
        .send()
        .await
        .unwrap();
}

/// The rows of a state table, as plain maps.
pub async fn state_rows(
    client: &Client,
    table: &str,
) -> Vec<std::collections::HashMap<String, AttributeValue>> {
    client
        .scan()
        .table_name(table)
        .consistent_read(true)
        .send()
        .await
        .unwrap()
        .items
        .unwrap_or_default()
}

pub fn text_of(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
