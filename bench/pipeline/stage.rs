//! What the benches against the null endpoint share: that endpoint, the worker beside it, and the core that each
//! of them has.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::{
    AttributeDefinition, BillingMode, KeySchemaElement, KeyType, ScalarAttributeType,
    StreamSpecification, StreamViewType,
};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use crate::load::{Keys, Load};
use crate::null::{Address, Seen};
use crate::process::{self, Running, farshore, peak_bytes_of, ticks_of};
use crate::{Error, SOURCE_TABLE, TARGET_TABLE};

pub const SOURCE: &str = "us-east-1";
pub const TARGET: &str = "us-west-2";
/// Longest time for one row.
const PATIENCE: Duration = Duration::from_secs(10 * 60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The core of what is measured, and that of everything else.
pub const CORE: usize = 0;
const OTHER_CORE: usize = 1;

/// What was seen of one replay.
pub struct Measured {
    /// From the first page to the last item.
    pub seconds: f64,
    pub processor_seconds: f64,
    pub peak_bytes: u64,
    pub seen: Seen,
}

/// Becomes `command`, on one core.
pub fn on_core(core: usize, command: &[String]) -> Result<(), Error> {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores)?;
    let (program, arguments) = command.split_first().ok_or("no command")?;
    Err(Command::new(program).args(arguments).exec().into())
}

/// `command` on one core.
pub fn pinned(core: usize, command: Command) -> Result<Command, Error> {
    let mut on = Command::new(std::env::current_exe()?);
    on.args(["on", &core.to_string(), "--"]);
    on.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => on.env(name, value),
            None => on.env_remove(name),
        };
    }
    Ok(on)
}

/// This bench itself, in another role.
pub fn own(role: &str, arguments: &[&str], load: Load) -> Result<Command, Error> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(role).args(arguments);
    command.args(["--shards", &load.shards.to_string()]);
    command.args(["--records", &load.records.to_string()]);
    command.args(["--item-bytes", &load.item_bytes.to_string()]);
    let keys = match load.keys {
        Keys::Distinct => "distinct",
        Keys::Hot => "hot",
    };
    command.args(["--keys", keys]);
    Ok(command)
}

/// A running null endpoint.
pub struct Endpoint {
    _process: Running,
    pub address: Address,
}

impl Endpoint {
    /// Starts one whose answers take `round_trip` longer.
    pub async fn start(load: Load, round_trip: Duration) -> Result<Self, Error> {
        let round_trip = round_trip.as_millis().to_string();
        let arguments = ["--round-trip-ms", &round_trip];
        let mut command = pinned(OTHER_CORE, own("null", &arguments, load)?)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Running(command.spawn()?);
        let stdout = process.0.stdout.take().ok_or("no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        Ok(Self {
            _process: process,
            address: serde_json::from_str(&line)?,
        })
    }

    /// What it saw so far.
    pub async fn seen(&self) -> Result<Seen, Error> {
        let client = Client::builder(TokioExecutor::new()).build_http::<Empty<bytes::Bytes>>();
        let answer = client.get(self.address.null.parse()?).await?;
        let body = answer.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    }

    /// Watches `process` until everything is written.
    pub async fn watch(&self, process: &mut Running) -> Result<Measured, Error> {
        let begun = Instant::now();
        let id = process.0.id();
        let (mut peak_bytes, mut ticks_before, mut ticks) = (0, None, 0);
        loop {
            peak_bytes = peak_bytes_of(id).unwrap_or(0).max(peak_bytes);
            ticks = ticks_of(id).unwrap_or(ticks);
            let seen = self.seen().await?;
            if seen.begun {
                ticks_before.get_or_insert(ticks);
            }
            if let Some(took_us) = seen.took_us {
                let ticks = ticks - ticks_before.unwrap_or(0);
                return Ok(Measured {
                    seconds: took_us as f64 / 1e6,
                    processor_seconds: ticks as f64 / process::TICKS_PER_SECOND,
                    peak_bytes,
                    seen,
                });
            }
            if let Some(status) = process.0.try_wait()?
                && !status.success()
            {
                return Err(format!("what is measured ended: {status}").into());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("not done within {PATIENCE:?}: {seen:?}").into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// A worker beside an endpoint, on the core of what is measured.
pub struct Worker {
    pub process: Running,
    log: PathBuf,
}

impl Worker {
    /// Makes the tables and starts it.
    pub async fn start(directory: &Path, endpoint: &Endpoint) -> Result<Self, Error> {
        create_tables(&endpoint.address.behind).await?;
        let behind = config(directory, &endpoint.address.behind)?;
        let provisioned = farshore(&behind, &["provision", "--apply"]).output()?;
        if !provisioned.status.success() {
            return Err(String::from_utf8_lossy(&provisioned.stderr).into());
        }
        let config = config(directory, &endpoint.address.null)?;
        let mut command = pinned(CORE, farshore(&config, &["run"]))?;
        let log = directory.join("stderr");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?);
        let process = Running(command.spawn()?);
        Ok(Self { process, log })
    }

    /// What it said last, after an error.
    pub fn explain(&self, error: &Error) -> Error {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(20).collect();
        format!("{error}\n{}", last.join("\n")).into()
    }
}

/// Replays the load of `endpoint` by the worker.
pub async fn by_worker(directory: &Path, endpoint: &Endpoint) -> Result<Measured, Error> {
    let mut worker = Worker::start(directory, endpoint).await?;
    let measured = endpoint.watch(&mut worker.process).await;
    measured.map_err(|error| worker.explain(&error))
}

async fn create_tables(endpoint: &str) -> Result<(), Error> {
    let sdk = aws_config::defaults(aws_config::BehaviorVersion::v2026_01_12())
        .region(aws_config::Region::new(SOURCE))
        .credentials_provider(aws_credential_types::Credentials::new(
            "bench", "bench", None, None, "bench",
        ))
        .endpoint_url(endpoint)
        .load()
        .await;
    let client = aws_sdk_dynamodb::Client::new(&sdk);
    for table in [SOURCE_TABLE, TARGET_TABLE] {
        let key = AttributeDefinition::builder()
            .attribute_name("id")
            .attribute_type(ScalarAttributeType::S);
        let hash = KeySchemaElement::builder()
            .attribute_name("id")
            .key_type(KeyType::Hash);
        let stream = StreamSpecification::builder()
            .stream_enabled(true)
            .stream_view_type(StreamViewType::NewAndOldImages)
            .build()?;
        client
            .create_table()
            .table_name(table)
            .attribute_definitions(key.build()?)
            .key_schema(hash.build()?)
            .billing_mode(BillingMode::PayPerRequest)
            .set_stream_specification((table == SOURCE_TABLE).then_some(stream))
            .send()
            .await?;
    }
    Ok(())
}

fn config(directory: &Path, endpoint: &str) -> Result<PathBuf, Error> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let letters = directory.join("letters");
    let text = format!(
        r#"group = "bench"
active = "{SOURCE}"
here = "{TARGET}"
[regions.{SOURCE}]
endpoint_url = "{endpoint}"
[regions.{TARGET}]
endpoint_url = "{endpoint}"
[[tables]]
name = "{SOURCE_TABLE}"
names = {{ {TARGET} = "{TARGET_TABLE}" }}
[writes]
units_per_second = 0
[dead_letters]
directory = {letters:?}
[worker]
listen = "{port}"
"#
    );
    let file = directory.join("farshore.toml");
    std::fs::write(&file, text)?;
    Ok(file)
}
