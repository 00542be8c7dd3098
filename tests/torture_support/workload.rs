//! An application that writes to the source: hot keys and cold ones, items of every size.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::config::retry::RetryConfig;
use aws_sdk_dynamodb::config::timeout::TimeoutConfig;
use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::{
    AttributeValue as V, BillingMode, DeleteRequest, KeySchemaElement, KeyType,
    LocalSecondaryIndex, Projection, ProjectionType, Put, PutRequest, ScalarAttributeType,
    StreamSpecification, StreamViewType, TransactWriteItem, WriteRequest,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;

use super::{POISON, Table};
use crate::common::stand::{attribute, client, key, n, s};

/// Keys that most changes are made to, and all others.
const HOT: u32 = 6;
const COLD: u32 = 240;
const POISONED: u32 = 4;
/// Values of the sort key, where there is one.
const SORTS: u32 = 4;
/// Longest wait for an answer: the application has other things to do.
const PATIENCE: Duration = Duration::from_millis(600);
/// Pause between two calls of a writer.
const PAUSE: Duration = Duration::from_millis(6);

type Item = HashMap<String, V>;

/// Poisonous items put or updated for certain, as messages name them.
pub type Poison = BTreeSet<String>;

/// Makes the table in the source. The sorted one has a local index, which not every item is in.
pub async fn create(client: &Client, table: &Table) {
    let stream = StreamSpecification::builder()
        .stream_enabled(true)
        .stream_view_type(StreamViewType::NewAndOldImages);
    let mut request = client
        .create_table()
        .table_name(&table.name)
        .attribute_definitions(attribute("id", ScalarAttributeType::S))
        .key_schema(key("id", KeyType::Hash))
        .billing_mode(BillingMode::PayPerRequest)
        .stream_specification(stream.build().unwrap());
    if table.is_sorted() {
        let index = LocalSecondaryIndex::builder()
            .index_name("by-touch")
            .set_key_schema(Some(vec![
                index_key("id", true),
                index_key("touched", false),
            ]))
            .projection(
                Projection::builder()
                    .projection_type(ProjectionType::KeysOnly)
                    .build(),
            );
        request = request
            .attribute_definitions(attribute("at", ScalarAttributeType::N))
            .attribute_definitions(attribute("touched", ScalarAttributeType::N))
            .key_schema(key("at", KeyType::Range))
            .local_secondary_indexes(index.build().unwrap());
    }
    request.send().await.unwrap();
}

fn index_key(name: &str, hash: bool) -> KeySchemaElement {
    key(name, if hash { KeyType::Hash } else { KeyType::Range })
}

/// Applications at work, one for each table.
pub struct Workload {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Poison>>,
}

impl Workload {
    /// Starts them. They write through the source's gateway, and take no error to heart.
    pub fn start(url: &str, region: &str, tables: &[&Table], seed: u64) -> Self {
        let timeouts = TimeoutConfig::builder().operation_timeout(PATIENCE);
        let config = client(url, region).config().to_builder();
        let config = config
            .timeout_config(timeouts.build())
            .retry_config(RetryConfig::disabled());
        let client = Client::from_conf(config.build());
        let stop = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let writers = tables.iter().zip(1..).map(|(table, number)| {
            let writer = Writer {
                client: client.clone(),
                table: (*table).clone(),
                random: StdRng::seed_from_u64(seed ^ (number << 40)),
                version: 0,
                written: Arc::clone(&written),
                poison: Poison::new(),
            };
            tokio::spawn(writer.run(Arc::clone(&stop)))
        });
        let writers = writers.collect();
        Self {
            stop,
            written,
            writers,
        }
    }

    /// Counts the items put, updated or deleted, as far as the source said so.
    pub fn written(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.written)
    }

    /// Lets them finish what they are at.
    pub async fn stop(self) -> Poison {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Poison::new();
        for writer in self.writers {
            all.extend(writer.await.unwrap());
        }
        all
    }
}

struct Writer {
    client: Client,
    table: Table,
    random: StdRng,
    version: u64,
    written: Arc<AtomicU64>,
    poison: Poison,
}

impl Writer {
    async fn run(mut self, stop: Arc<AtomicBool>) -> Poison {
        while !stop.load(Ordering::Relaxed) {
            match self.random.random_range(0..20) {
                0..8 => self.batch().await,
                8..12 => self.put().await,
                12..16 => self.update().await,
                16 => self.delete().await,
                17 => {
                    // There, gone, there again.
                    let id = self.id();
                    self.put_at(&id).await;
                    self.delete_at(&id).await;
                    self.put_at(&id).await;
                }
                _ => self.transact().await,
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.poison
    }

    /// The key of an item: hot, cold, seldom poisonous.
    fn id(&mut self) -> Item {
        let id = match self.random.random_range(0..100) {
            0 => format!("{POISON}{}", self.random.random_range(0..POISONED)),
            1..50 => format!("hot-{}", self.random.random_range(0..HOT)),
            _ => format!("cold-{}", self.random.random_range(0..COLD)),
        };
        let mut key = Item::from([("id".to_owned(), s(id))]);
        if self.table.is_sorted() {
            key.insert("at".to_owned(), n(self.random.random_range(0..SORTS)));
        }
        key
    }

    /// Different keys.
    fn ids(&mut self, count: usize) -> Vec<Item> {
        let mut ids: Vec<Item> = Vec::new();
        for _ in 0..count {
            let id = self.id();
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// A new version of an item: mostly small, now and then of some 100 KB.
    fn item(&mut self, key: &Item) -> Item {
        self.version += 1;
        let mut item = key.clone();
        item.insert("version".to_owned(), n(self.version));
        let length = match self.random.random_range(0..1_000) {
            0..4 => self.random.random_range(100_000..250_000),
            4..20 => self.random.random_range(10_000..50_000),
            20..200 => self.random.random_range(500..5_000),
            _ => self.random.random_range(0..100),
        };
        let fill = (b'a' + (self.version % 26) as u8) as char;
        item.insert("padding".to_owned(), s(fill.to_string().repeat(length)));
        match self.random.random_range(0..6) {
            0 => {
                let set = vec![
                    format!("{}", self.version),
                    "7".to_owned(),
                    "-1.5".to_owned(),
                ];
                item.insert("numbers".to_owned(), V::Ns(set));
            }
            1 => {
                let bytes = self.version.to_be_bytes().to_vec();
                item.insert("bytes".to_owned(), V::B(Blob::new(bytes)));
            }
            2 => {
                let inner = Item::from([("n".to_owned(), n(self.version))]);
                let list = vec![V::M(inner), V::Bool(true), V::Null(true), s("")];
                item.insert("nested".to_owned(), V::L(list));
            }
            3 => {
                item.insert("touched".to_owned(), n(self.version));
            }
            _ => {}
        }
        item
    }

    /// The source took so many items, these of them put or updated. Deleting what is not there
    /// makes no record, so a delete proves nothing about poison.
    fn took(&mut self, items: usize, put: &[Item]) {
        self.written.fetch_add(items as u64, Ordering::Relaxed);
        for key in put {
            let name = self.table.name_of(key);
            if name.contains(POISON) {
                self.poison.insert(name);
            }
        }
    }

    async fn batch(&mut self) {
        let count = self.random.random_range(2..16);
        let keys = self.ids(count);
        let mut requests = Vec::new();
        let mut put = Vec::new();
        for key in keys {
            let request = if self.random.random_bool(0.2) {
                let delete = DeleteRequest::builder().set_key(Some(key));
                WriteRequest::builder().delete_request(delete.build().unwrap())
            } else {
                let item = self.item(&key);
                put.push(key);
                let request = PutRequest::builder().set_item(Some(item));
                WriteRequest::builder().put_request(request.build().unwrap())
            };
            requests.push(request.build());
        }
        let count = requests.len();
        let call = self.client.batch_write_item();
        let answer = call.request_items(&self.table.name, requests).send().await;
        if answer.is_ok_and(|done| done.unprocessed_items.is_none_or(|left| left.is_empty())) {
            self.took(count, &put);
        }
    }

    async fn put(&mut self) {
        let key = self.id();
        self.put_at(&key).await;
    }

    async fn put_at(&mut self, key: &Item) {
        let item = self.item(key);
        let call = self.client.put_item().table_name(&self.table.name);
        if call.set_item(Some(item)).send().await.is_ok() {
            self.took(1, std::slice::from_ref(key));
        }
    }

    async fn update(&mut self) {
        let key = self.id();
        self.version += 1;
        let call = self.client.update_item().table_name(&self.table.name);
        let call = call
            .set_key(Some(key.clone()))
            .update_expression("SET touched = :version ADD updates :one")
            .expression_attribute_values(":version", n(self.version))
            .expression_attribute_values(":one", n(1));
        if call.send().await.is_ok() {
            self.took(1, &[key]);
        }
    }

    async fn delete(&mut self) {
        let key = self.id();
        self.delete_at(&key).await;
    }

    async fn delete_at(&mut self, key: &Item) {
        let call = self.client.delete_item().table_name(&self.table.name);
        if call.set_key(Some(key.clone())).send().await.is_ok() {
            self.took(1, &[]);
        }
    }

    async fn transact(&mut self) {
        let keys = self.ids(3);
        let mut call = self.client.transact_write_items();
        for key in &keys {
            let item = self.item(key);
            let put = Put::builder().table_name(&self.table.name);
            let put = put.set_item(Some(item)).build().unwrap();
            call = call.transact_items(TransactWriteItem::builder().put(put).build());
        }
        if call.send().await.is_ok() {
            self.took(keys.len(), &keys);
        }
    }
}
