//! What each step of a record's way costs by itself, without a network: to see which of them a change made
//! slower.
//!
//! `cargo bench --bench micro -- --json FILE`
//!
//! | step | what it is |
//! | --- | --- |
//! | decode | an answer of GetRecords with 1,000 records of 1 KB into changes |
//! | convert | 25 changes into the body of a BatchWriteItem |
//! | coalesce | 1,000 changes through the window: pushed, taken by 25, applied |
//! | size | an image looked through: types, size in bytes, write units |
//! | digest | the digest of an item, and of its key |

#[path = "pipeline/load.rs"]
#[allow(dead_code, reason = "only its pages are wanted")]
mod load;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use criterion::{BatchSize, Criterion, Throughput};
use farshore::apply::coalesce::{Op, Window};
use farshore::apply::request::batch_body;
use farshore::dynamo::digest::Digest;
use farshore::dynamo::image::Image;
use farshore::dynamo::item::ItemKey;
use farshore::dynamo::json::item_from_json;
use farshore::stream::answer::read;
use farshore::stream::change::{Change, write_units};
use serde_json::{Value, json};

use load::{Keys, Load, Template};

type Error = Box<dyn std::error::Error>;

#[derive(Parser)]
struct Arguments {
    /// Only steps whose name has this in it.
    filter: Option<String>,
    /// Also writes the figures as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// For each step.
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURE: Duration = Duration::from_secs(3);

const PAGE_RECORDS: u64 = 1_000;
const BATCH: usize = 25;

fn page(keys: Keys) -> bytes::Bytes {
    let load = Load {
        shards: 1,
        // The last record of a shard is another: it is not in this page.
        records: PAGE_RECORDS + 1,
        item_bytes: 1_000,
        keys,
    };
    Template::new(load).page(0, 0, PAGE_RECORDS)
}

fn changes(keys: Keys) -> Vec<Change> {
    let answer = read(&page(keys)).ok();
    let records = answer.and_then(|answer| answer.records).unwrap_or_default();
    records.into_iter().filter_map(Result::ok).collect()
}

/// Takes `changes` in, and hands them out and hears of them as durable until none is left.
fn through_a_window(changes: Vec<Change>) -> usize {
    let mut window = Window::new(true);
    let mut finished = 0;
    for change in changes {
        window.push(change);
    }
    while !window.is_empty() {
        for op in window.take(BATCH, usize::MAX) {
            window.applied(&op, |_| finished += 1);
        }
    }
    finished
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(PAGE_RECORDS));
    for (name, keys) in [("new", Keys::Distinct), ("overwritten", Keys::Hot)] {
        let page = page(keys);
        group.bench_function(name, |bench| bench.iter(|| read(black_box(&page))));
    }
}

fn convert(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("convert");
    group.throughput(Throughput::Elements(BATCH as u64));
    let ops: Vec<Op> = (0..)
        .zip(changes(Keys::Distinct).into_iter().take(BATCH))
        .map(|(slot, change)| Op {
            slot,
            change: Arc::new(change),
        })
        .collect();
    group.bench_function("batch", |bench| {
        bench.iter(|| batch_body("bench-replica", black_box(&ops)));
    });
}

fn coalesce(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("coalesce");
    group.throughput(Throughput::Elements(PAGE_RECORDS));
    for (name, keys) in [("distinct", Keys::Distinct), ("hot", Keys::Hot)] {
        let changes = changes(keys);
        group.bench_function(name, |bench| {
            bench.iter_batched(|| changes.clone(), through_a_window, BatchSize::LargeInput);
        });
    }
}

fn size(criterion: &mut Criterion) {
    let Some(image) = changes(Keys::Distinct)
        .pop()
        .and_then(|change| change.new_image)
    else {
        return;
    };
    criterion.bench_function("size/image", |bench| {
        bench.iter(|| {
            let image = Image::parse(black_box(image.json()));
            image.map(|image| write_units(image.item_bytes()))
        });
    });
}

fn digest(criterion: &mut Criterion) {
    let Some(change) = changes(Keys::Distinct).pop() else {
        return;
    };
    let item = change
        .new_image
        .and_then(|image| item_from_json(&image.to_value()));
    let Some(item) = item else {
        return;
    };
    criterion.bench_function("digest/item", |bench| {
        bench.iter(|| Digest::of_item(black_box(&item)));
    });
    criterion.bench_function("digest/key", |bench| {
        bench.iter(|| Digest::of_key(&ItemKey::new(black_box(&change.keys))));
    });
}

/// Collects what criterion estimated.
fn write_json(file: &Path, home: &Path) -> Result<(), Error> {
    let mut steps = BTreeMap::new();
    for group in std::fs::read_dir(home)?.collect::<Result<Vec<_>, _>>()? {
        let group = group.path();
        if !group.is_dir() {
            continue;
        }
        for step in std::fs::read_dir(&group)?.collect::<Result<Vec<_>, _>>()? {
            let estimates = step.path().join("new/estimates.json");
            if let Ok(text) = std::fs::read_to_string(&estimates) {
                let estimates: Value = serde_json::from_str(&text)?;
                let name = step.path();
                let name = name.strip_prefix(home)?.to_string_lossy().into_owned();
                steps.insert(name, estimates["mean"]["point_estimate"].clone());
            }
        }
    }
    let figures = json!({"version": 1, "nanoseconds": steps});
    Ok(std::fs::write(file, figures.to_string())?)
}

fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    let temp = tempfile::tempdir()?;
    let mut criterion = Criterion::default()
        .output_directory(temp.path())
        .warm_up_time(WARM_UP)
        .measurement_time(MEASURE);
    if let Some(filter) = &arguments.filter {
        criterion = criterion.with_filter(filter);
    }
    for step in [decode, convert, coalesce, size, digest] {
        step(&mut criterion);
    }
    match &arguments.json {
        Some(file) => write_json(file, temp.path()),
        None => Ok(()),
    }
}
