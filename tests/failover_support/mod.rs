//! A group of three regions behind gateways, with a worker in each.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, StreamViewType};
use farshore::embedded::gateway::{Gateway, Options};
use tempfile::TempDir;

use crate::common::binary::{Worker, farshore, provision, stderr, stdout};
use crate::common::checker;
use crate::common::proxy::Proxy;
use crate::common::stand::{client, create_table, free_port, n, s, state_rows};

/// The regions of a group; the first is active at the beginning.
pub const LABELS: [&str; 3] = ["us-east-1", "us-west-2", "eu-west-1"];
pub const A: usize = 0;
pub const B: usize = 1;
pub const C: usize = 2;
pub const TABLE: &str = "orders";

pub type Row = HashMap<String, AttributeValue>;

/// Up to three regions.
pub struct Group {
    pub gateways: Vec<Gateway>,
    pub clients: Vec<Client>,
    pub temp: TempDir,
    pub lease: &'static str,
    pub late_effect: &'static str,
}

impl Group {
    /// So many regions; the table is there in the active one.
    pub async fn new(seed: u64, regions: usize) -> Self {
        let mut gateways = Vec::new();
        for label in &LABELS[..regions] {
            let options = Options::new(seed).region(label);
            gateways.push(Gateway::start(options).await.unwrap());
        }
        let clients: Vec<Client> = gateways
            .iter()
            .zip(LABELS)
            .map(|(gateway, label)| client(&gateway.endpoint_url(), label))
            .collect();
        create_table(&clients[A], TABLE, Some(StreamViewType::NewAndOldImages)).await;
        Self {
            gateways,
            clients,
            temp: tempfile::tempdir().unwrap(),
            lease: "1s",
            late_effect: "5s",
        }
    }

    pub fn state_table(&self) -> String {
        "farshore-g".to_owned()
    }

    fn urls(&self) -> Vec<String> {
        self.gateways.iter().map(Gateway::endpoint_url).collect()
    }

    /// A proxy in front of each region, for one process alone: a partition.
    pub async fn partition(&self) -> Vec<Proxy> {
        let mut proxies = Vec::new();
        for url in self.urls() {
            proxies.push(Proxy::start(url.strip_prefix("http://").unwrap()).await);
        }
        proxies
    }

    /// The file of a process in the region `here`; `more` is TOML for the end of it.
    pub fn config(&self, here: usize, more: &str) -> PathBuf {
        self.config_at(here, &self.urls(), more)
    }

    /// As [`config`](Self::config), with other endpoints.
    pub fn config_at(&self, here: usize, urls: &[String], more: &str) -> PathBuf {
        let port = free_port();
        let mut text = format!(
            "group = \"g\"\nactive = \"{}\"\nhere = \"{}\"\n",
            LABELS[A], LABELS[here]
        );
        for (label, url) in LABELS.iter().zip(urls) {
            text += &format!("[regions.{label}]\nendpoint_url = \"{url}\"\n");
        }
        text += &format!(
            r#"[worker]
listen = "127.0.0.1:{port}"
poll_interval = "20ms"
idle_interval = "50ms"
checkpoint_every = "100ms"
discover_every = "1s"
shutdown_grace = "10s"
[leases]
duration = "{}"
late_effect = "{}"
[dead_letters]
directory = {:?}
[[tables]]
name = "{TABLE}"
{more}
"#,
            self.lease,
            self.late_effect,
            self.temp.path().join(LABELS[here]),
        );
        let path = self.temp.path().join(format!("{here}-{port}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Everything that workers in these regions need.
    pub fn provision(&self, regions: &[usize]) {
        for region in regions {
            provision(&self.config(*region, ""));
        }
    }

    /// A worker in `here` that has found its role.
    pub async fn worker(&self, here: usize) -> Worker {
        let config = self.config(here, "");
        match here {
            A => {
                let worker = Worker::start(&config);
                until_ready(&worker, |body| body.contains("\"ready\":")).await;
                worker
            }
            _ => Worker::following(&config).await,
        }
    }

    pub async fn rows(&self, region: usize) -> Vec<Row> {
        state_rows(&self.clients[region], &self.state_table()).await
    }

    /// Rows of one kind.
    pub async fn rows_of(&self, region: usize, kind: &str) -> Vec<Row> {
        let mut rows = self.rows(region).await;
        rows.retain(|row| row["entityType"] == s(kind));
        rows
    }

    /// The control record of a region.
    pub async fn control(&self, region: usize) -> Option<Row> {
        self.rows_of(region, "control").await.pop()
    }

    /// The epoch and the active region that the record of `region` tells, and its state.
    pub async fn told(&self, region: usize) -> Option<(u64, String, String)> {
        let row = self.control(region).await?;
        let epoch = row["epoch"].as_n().unwrap().parse().unwrap();
        let text = |name: &str| row[name].as_s().unwrap().clone();
        Some((epoch, text("active"), text("state")))
    }

    pub async fn put(&self, region: usize, id: &str, v: impl ToString) {
        crate::common::stand::put(&self.clients[region], TABLE, id, v).await;
    }

    pub async fn get(&self, region: usize, id: &str) -> Option<Row> {
        let answer = self.clients[region].get_item().table_name(TABLE);
        let answer = answer.key("id", s(id)).consistent_read(true);
        answer.send().await.unwrap().item
    }

    /// The number under `v` of an item.
    pub async fn value(&self, region: usize, id: &str) -> Option<String> {
        let item = self.get(region, id).await?;
        Some(item["v"].as_n().unwrap().clone())
    }

    pub async fn equal(&self, one: usize, other: usize) -> bool {
        let [one, other] = [one, other].map(|region| (&self.clients[region], TABLE));
        checker::differences(one, other).await.is_empty()
    }

    /// Waits until both regions hold the same, of `items` items at least.
    pub async fn converge(&self, one: usize, other: usize, items: usize) {
        let equal = async || self.equal(one, other).await;
        crate::common::eventually("both are equal", Duration::from_secs(60), equal).await;
        let held = checker::items(&self.clients[other], TABLE).await.len();
        assert!(held >= items, "only {held} items");
    }

    /// Writes the record of the next epoch, as a failover to `to` begins.
    pub async fn write_epoch(&self, region: usize, epoch: u64, to: usize) {
        let mut row = self.control(region).await.unwrap();
        let was = row.insert("active".into(), s(LABELS[to])).unwrap();
        let set = AttributeValue::Ss(vec![was.as_s().unwrap().clone()]);
        row.insert("quarantined".into(), set);
        row.insert("epoch".into(), n(epoch));
        row.insert("state".into(), s("fencing"));
        let put = self.clients[region].put_item();
        let put = put.table_name(self.state_table()).set_item(Some(row));
        put.send().await.unwrap();
    }
}

/// Waits until the readiness of a worker is as wanted.
pub async fn until_ready(worker: &Worker, wanted: impl Fn(&str) -> bool) -> String {
    let start = std::time::Instant::now();
    loop {
        let body = worker.get("/readyz").await.map(|(_, body)| body);
        if let Some(body) = body.as_ref().filter(|body| wanted(body)) {
            return body.clone();
        }
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "readiness says {body:?}:\n{}",
            crate::common::stand::text_of(&worker.log)
        );
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Runs a command; its exit code, what it answers and what it says besides.
pub async fn command(
    config: &std::path::Path,
    arguments: &[&str],
) -> (Option<i32>, String, String) {
    let mut all = arguments.to_vec();
    all.extend(["--config", config.to_str().unwrap()]);
    let mut command = farshore(&all);
    let output = tokio::task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().unwrap();
    (output.status.code(), stdout(&output), stderr(&output))
}
