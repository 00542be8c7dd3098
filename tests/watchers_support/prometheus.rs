//! Debian's Prometheus, scraping every second, with the rules that are shipped in a hurry.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::{get, program};
use crate::common::binary::spawn;
use crate::common::stand::{free_port, text_of};

/// The rules as they are shipped, but with patience and ranges of seconds.
fn hurried(rules: &str) -> String {
    let line = |line: &str| match line.split_once("for: ") {
        Some((before, time)) if before.trim().is_empty() && time != "0m" => {
            format!("{before}for: 2s")
        }
        _ => line.replace("[5m]", "[10s]").replace("[15m]", "[15s]"),
    };
    rules.lines().map(line).collect::<Vec<_>>().join("\n") + "\n"
}

/// A rule as Prometheus has understood it.
#[derive(Debug, Clone)]
pub struct Rule {
    pub name: String,
    pub query: String,
    pub is_firing: bool,
}

/// A running Prometheus; it ends with this value.
pub struct Prometheus {
    child: Child,
    port: u16,
    home: TempDir,
}

impl Prometheus {
    /// Starts one that scrapes workers at these ports.
    pub async fn start(ports: &[u16]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        let rules = include_str!("../../config/prometheus-rules.yml");
        std::fs::write(at("prometheus-rules.yml"), hurried(rules)).unwrap();
        let shipped = include_str!("../../config/prometheus.yml");
        let targets: Vec<String> = ports
            .iter()
            .map(|port| format!("\"127.0.0.1:{port}\""))
            .collect();
        let config = shipped
            .replace("15s", "1s")
            .replace("[\"127.0.0.1:9464\"]", &format!("[{}]", targets.join(", ")));
        assert!(config.contains(&targets[0]), "the example has another form");
        std::fs::write(at("prometheus.yml"), config).unwrap();
        let log = std::fs::File::create(at("log")).unwrap();
        let port = free_port();
        let mut command = program("prometheus");
        command
            .arg(format!("--config.file={}", at("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", at("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = spawn(command).unwrap();
        let prometheus = Self { child, port, home };
        let start = Instant::now();
        while !matches!(get(port, "/-/ready").await, Some((200, _))) {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "Prometheus is not ready:\n{}",
                text_of(&prometheus.home.path().join("log"))
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        prometheus
    }

    async fn ask(&self, path: &str) -> Value {
        let (status, body) = get(self.port, path).await.expect("Prometheus answers");
        let answer: Value = serde_json::from_str(&body).unwrap_or_default();
        assert!(
            status == 200 && answer["status"] == "success",
            "{path}: {status} {body}"
        );
        answer["data"].clone()
    }

    /// How many series with a value an expression gives now.
    pub async fn series(&self, expression: &str) -> usize {
        let encoded: String = expression
            .bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
                _ => format!("%{byte:02X}"),
            })
            .collect();
        let data = self.ask(&format!("/api/v1/query?query={encoded}")).await;
        let series = data["result"].as_array().cloned().unwrap_or_default();
        series.iter().filter(|one| one["value"][1] != "NaN").count()
    }

    /// The rules, as it has understood them.
    pub async fn rules(&self) -> Vec<Rule> {
        let data = self.ask("/api/v1/rules").await;
        let groups = data["groups"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        groups
            .flat_map(|group| group["rules"].as_array().unwrap())
            .map(|rule| {
                assert_ne!(rule["health"], "err", "{rule}");
                Rule {
                    name: text(&rule["name"]),
                    query: text(&rule["query"]),
                    is_firing: rule["state"] == "firing",
                }
            })
            .collect()
    }

    /// The names of the alerts that fire now.
    pub async fn firing(&self) -> Vec<String> {
        let rules = self.rules().await.into_iter();
        rules
            .filter(|rule| rule.is_firing)
            .map(|rule| rule.name)
            .collect()
    }

    /// Waits until an alert fires, or does not any more.
    pub async fn wait_for(&self, alert: &str, fires: bool) {
        let start = Instant::now();
        loop {
            let firing = self.firing().await;
            if firing.iter().any(|name| name == alert) == fires {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(45),
                "{alert} is to fire: {fires}; firing: {firing:?}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a rule compares: the expressions of which each has to give data if the rule is to be able to say
/// anything, without what they are compared with.
pub fn compared(query: &str) -> Vec<String> {
    let mut sides = vec![query.to_owned()];
    for word in [" unless ", " and "] {
        sides = sides
            .iter()
            .flat_map(|side| side.split(word).map(str::to_owned).collect::<Vec<_>>())
            .collect();
    }
    sides.iter().map(|side| bare(side)).collect()
}

/// One side without its labels of matching, its comparison with a number, and its `absent`.
fn bare(side: &str) -> String {
    let mut side = side.trim();
    for matching in ["on (", "on("] {
        if side.starts_with(matching) {
            side = side.split_once(')').unwrap().1.trim();
        }
    }
    for operator in [" == ", " > ", " < "] {
        if let Some((left, right)) = side.rsplit_once(operator)
            && right.parse::<f64>().is_ok()
        {
            side = left;
        }
    }
    let inner = side
        .strip_prefix("absent(")
        .and_then(|rest| rest.strip_suffix(')'));
    inner.unwrap_or(side).to_owned()
}
