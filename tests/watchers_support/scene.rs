//! What the watchers look at: two regions behind gateways, a queue that is nobody's of ours, and a load that
//! does not end.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::binary::{Worker, farshore, provision, stderr, stdout};
use crate::common::ministack::Ministack;
use crate::common::stand::{SOURCE, Stand, TARGET, n, s, text_of};
use crate::common::{eventually, seed};
use crate::suite::faults::picky_replica;
use farshore::embedded::gateway::{Fault, FaultHandle, Limit, Options};

/// Keys that the load writes over and over.
const KEYS: u32 = 400;

pub struct Scene {
    pub stand: Stand,
    pub table: String,
    pub config: PathBuf,
    _queue: Ministack,
    load: Load,
}

/// Writes without end, until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Scene {
    /// Regions, queue and tables, provisioned and under load. Nobody feeds the replica yet.
    pub async fn set() -> Self {
        let seed = seed();
        let source = Options::new(seed)
            .shards(4)
            .rotate_every(Duration::from_secs(8));
        let stand = Stand::gateways(source, Options::new(seed)).await;
        let queue = Ministack::start().await;
        let table = stand.table("orders");
        picky_replica(&stand, &table).await;
        let letters = Ministack::queue_url(&queue.url(), "letters");
        // A gap stays until the test has looked at it, and a busy machine loses no lease.
        let more = format!(
            "[dead_letters]\nqueue_url = \"{letters}\"\n[reconcile]\non_gap = \"off\"\nmax_deletes = \"50%\"\n"
        );
        let config = stand.config_at(&stand.source_url, &stand.target_url, &[&table], &more);
        let text = text_of(&config).replace("duration = \"1s\"", "duration = \"2s\"");
        std::fs::write(&config, text).unwrap();
        provision(&config);
        let load = Load::on(&stand, &table);
        Self {
            stand,
            table,
            config,
            _queue: queue,
            load,
        }
    }

    /// The same configuration for a worker in the active region.
    pub fn config_of_the_active_region(&self) -> PathBuf {
        let other = self.stand.config(&[&self.table], "");
        let here = |label: &str| format!("here = \"{label}\"");
        let text = text_of(&other).replace(&here(TARGET), &here(SOURCE));
        std::fs::write(&other, text).unwrap();
        other
    }

    /// Runs a command on the configuration, and expects it to succeed or to leave something to do.
    pub fn command(&self, arguments: &[&str]) {
        let mut command = farshore(arguments);
        command.args(["--config", self.config.to_str().unwrap()]);
        let output = command.env("USER", "alice").output().unwrap();
        let code = output.status.code();
        assert_eq!(
            code,
            Some(0),
            "{arguments:?}: {}{}",
            stdout(&output),
            stderr(&output)
        );
    }

    /// The replica throttles every write, until the handles are off.
    pub fn throttle(&self) -> Vec<FaultHandle> {
        let throttle = |operation| {
            let fault = Fault::throttle(Limit::Provisioned)
                .on(operation)
                .table(&self.table);
            self.stand.gateways[1].inject(fault)
        };
        ["BatchWriteItem", "PutItem", "DeleteItem"]
            .map(throttle)
            .into()
    }

    /// Three changes that the replica refuses for good.
    pub async fn poison(&self) {
        for number in 0..3 {
            put(&self.stand, &self.table, &format!("poison-{number}"), true).await;
        }
    }

    /// Takes the poison away, so that its letters can be brought home.
    pub async fn mend(&self) {
        for number in 0..3 {
            put(&self.stand, &self.table, &format!("poison-{number}"), false).await;
        }
    }

    /// The next worker audits the table.
    pub fn audit(&self) {
        let text = text_of(&self.config) + "[audit]\nread_units_per_second = 50\n";
        std::fs::write(&self.config, text).unwrap();
    }

    /// The stream forgets what has not been read.
    pub fn forget(&self) {
        self.stand.gateways[0].trim(&self.table);
        self.stand.gateways[0].inject(Fault::trimmed().on("GetRecords").once());
    }

    /// A worker that follows its table and is ready.
    pub async fn worker(&self) -> Worker {
        let worker = Worker::following(&self.config).await;
        let ready = async || matches!(worker.get("/readyz").await, Some((200, _)));
        eventually("the worker is ready", Duration::from_secs(60), ready).await;
        worker
    }

    /// No more load, so that what is under way comes to its end.
    pub fn fall_quiet(&self) {
        self.load.stop.store(true, Ordering::Relaxed);
    }
}

async fn put(stand: &Stand, table: &str, id: &str, poison: bool) {
    let kind = if poison { n(7) } else { s("good") };
    let item = stand.source.put_item().table_name(table).item("id", s(id));
    item.item("kind", kind)
        .item("v", n(rand::random::<u32>()))
        .send()
        .await
        .unwrap();
}

impl Load {
    fn on(stand: &Stand, table: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (client, table, stopped) = (stand.source.clone(), table.to_owned(), Arc::clone(&stop));
        tokio::spawn(async move {
            let mut number: u32 = 0;
            while !stopped.load(Ordering::Relaxed) {
                let put = client.put_item().table_name(&table);
                let put = put.item("id", s(format!("k{}", number % KEYS)));
                let put = put.item("kind", s("good")).item("v", n(number));
                // The test that ends takes its regions with it.
                if put.send().await.is_err() {
                    return;
                }
                number += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        Self { stop }
    }
}
