//! What it costs to compare two large tables: time, reads and memory, beside two comparers as a
//! script would have them.
//!
//! `cargo bench --bench reconcile -- --items 1000000 --drift 0 --json FILE`
//!
//! Each side is an embedded server in a process of its own, behind a front that serves long scans in
//! time linear to the table ([`server`]); each comparer is a process of its own as well, so that its
//! peak of memory is its alone.
//!
//! | comparer | what it does |
//! | --- | --- |
//! | farshore | `farshore reconcile`, dry, without a limit of read units |
//! | scan + BatchGet both ways | looks each item of the source up in the target, then each key of the target in the source |
//! | load both and compare | reads both tables into memory |
//! | farshore, opposite order | as the first, with a target whose scans come in descending order |
//!
//! With `--drift D`, D items are missing, changed and extra, in thirds. An answer that is wrong ends
//! the bench with an error; a target that does not hold is only shown.

#[path = "reconcile/baseline.rs"]
mod baseline;
#[path = "reconcile/data.rs"]
mod data;
#[path = "reconcile/process.rs"]
mod process;
#[path = "reconcile/server.rs"]
mod server;
#[path = "reconcile/show.rs"]
mod show;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};

use data::{Answer, Data, Region, TABLE};
use process::Ended;
use server::{Server, client};
use show::{Report, Row};

type Error = Box<dyn std::error::Error + Send + Sync>;

const SOURCE: &str = "us-east-1";
const TARGET: &str = "us-west-2";

#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// Items on each side.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    items: u64,
    /// Items that differ: a third of them each is missing, changed and extra.
    #[arg(long, default_value_t = 0)]
    drift: u64,
    /// Also writes the rows as JSON to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

// What the bench starts itself as. No doc comment: it would be the bench's own help.
#[derive(Subcommand)]
enum Role {
    /// One side: serves a table until its standard input is closed.
    #[command(hide = true)]
    Serve {
        /// Parts that a scan of the whole table is served in.
        parts: u64,
    },
    #[command(hide = true)]
    ScanAndGet(Sides),
    #[command(hide = true)]
    LoadBoth(Sides),
}

#[derive(Args)]
struct Sides {
    source: String,
    target: String,
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments = Arguments::parse();
    match &arguments.role {
        None => measure(&arguments).await,
        Some(Role::Serve { parts }) => server::serve(*parts).await,
        Some(Role::ScanAndGet(sides)) => {
            tell(&baseline::scan_and_get(&sides.source, &sides.target).await?)
        }
        Some(Role::LoadBoth(sides)) => {
            tell(&baseline::load_both(&sides.source, &sides.target).await?)
        }
    }
}

fn tell(answer: &Answer) -> Result<(), Error> {
    println!("{}", serde_json::to_string(answer)?);
    Ok(())
}

async fn measure(arguments: &Arguments) -> Result<(), Error> {
    let data = Data::new(arguments.items, arguments.drift)?;
    let temp = tempfile::tempdir()?;
    let source = Server::start(data.parts()).await?;
    let target = Server::start(data.parts()).await?;
    let loading_seconds = load(&data, &source, &target).await?;

    let own = |role: &str| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([role, &source.ascending, &target.ascending]);
        Ok::<_, Error>(command)
    };
    let alike = farshore(temp.path(), &source.ascending, &target.ascending)?;
    let opposite = farshore(temp.path(), &source.ascending, &target.descending)?;
    let mut rows = Vec::new();
    for (what, command) in [
        (show::FARSHORE, alike),
        (show::SCAN_AND_GET, own("scan-and-get")?),
        (show::LOAD_BOTH, own("load-both")?),
        (show::OPPOSITE, opposite),
    ] {
        eprintln!("{what} …");
        let ended = process::run(command, temp.path()).await?;
        rows.push(row(what, &data, ended)?);
    }
    let report = Report {
        items: data.items,
        drift: data.drift,
        loading_seconds,
        rows,
    };
    report.print();
    if let Some(file) = &arguments.json {
        std::fs::write(file, report.as_json().to_string())?;
    }
    report.check()
}

/// Fills both sides at once; seconds it took.
async fn load(data: &Data, source: &Server, target: &Server) -> Result<f64, Error> {
    let start = Instant::now();
    let (from, to) = (client(&source.direct), client(&target.direct));
    let both = async {
        tokio::try_join!(
            data.load(&from, Region::Source),
            data.load(&to, Region::Target)
        )
    };
    tokio::time::timeout(process::TIMEOUT, both).await??;
    let seconds = start.elapsed().as_secs_f64();
    eprintln!(
        "{} items a side loaded in {seconds:.1} s, {:.0} items/s",
        data.items,
        2.0 * data.items as f64 / seconds
    );
    Ok(seconds)
}

/// The command that compares the tables behind these two endpoints.
fn farshore(directory: &Path, source: &str, target: &str) -> Result<Command, Error> {
    let letters = directory.join("letters");
    let text = format!(
        r#"group = "bench"
active = "{SOURCE}"
here = "{TARGET}"
[regions.{SOURCE}]
endpoint_url = "{source}"
[regions.{TARGET}]
endpoint_url = "{target}"
[[tables]]
name = "{TABLE}"
[dead_letters]
directory = {letters:?}
"#
    );
    let (_file, config) = tempfile::Builder::new()
        .suffix(".toml")
        .tempfile_in(directory)?
        .keep()?;
    std::fs::write(&config, text)?;
    Ok(process::farshore(
        &config,
        &["reconcile", "--json", "--read-units", "0"],
    ))
}

/// What a comparer answered, and whether it is right.
fn row(what: &'static str, data: &Data, ended: Ended) -> Result<Row, Error> {
    let is_farshore = what == show::FARSHORE || what == show::OPPOSITE;
    let failed = |why: &str| format!("{what}: {why}: {}\n{}", ended.stdout, ended.stderr);
    let differences_code = i32::from(is_farshore && data.drift > 0);
    if ended.code != Some(differences_code) {
        return Err(failed(&format!("ended with {:?}", ended.code)).into());
    }
    let mut answer: serde_json::Value =
        serde_json::from_str(&ended.stdout).map_err(|error| failed(&error.to_string()))?;
    if is_farshore {
        answer = answer["tables"][0].take();
    }
    let answer: Answer =
        serde_json::from_value(answer).map_err(|error| failed(&error.to_string()))?;
    Ok(Row {
        what,
        seconds: ended.took.as_secs_f64(),
        processor_seconds: ended.processor_seconds,
        peak_bytes: ended.peak_bytes,
        wrong: data.wrong(&answer),
        answer,
    })
}
