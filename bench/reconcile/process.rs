//! Processes that the bench starts: they end with it, and their memory is measured.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Error;

/// Longest time for one comparer, and for loading.
pub const TIMEOUT: Duration = Duration::from_secs(20 * 60);
/// Short against the growth of memory, and against the time of a run.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The unit of /proc, whatever the kernel's own ticks are.
pub const TICKS_PER_SECOND: f64 = 100.0;

/// A process that does not outlive this value.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a process ended.
pub struct Ended {
    /// Its exit code; none where a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
    /// The most memory that was resident at once, where the system tells.
    pub peak_bytes: Option<u64>,
    /// Processor time of all its threads, where the system tells.
    pub processor_seconds: Option<f64>,
}

/// Runs a command to its end. What it prints goes to files in `directory`: nobody has to read it
/// while it runs.
pub async fn run(mut command: Command, directory: &Path) -> Result<Ended, Error> {
    let (stdout, stderr) = (directory.join("stdout"), directory.join("stderr"));
    command
        .stdin(Stdio::null())
        .stdout(File::create(&stdout)?)
        .stderr(File::create(&stderr)?);
    let start = Instant::now();
    let mut running = Running(command.spawn()?);
    let (mut peak_bytes, mut ticks) = (None, None);
    let status = loop {
        peak_bytes = peak_bytes.max(peak_bytes_of(running.0.id()));
        ticks = ticks.max(ticks_of(running.0.id()));
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
        if start.elapsed() > TIMEOUT {
            return Err(format!("{command:?} did not end within {TIMEOUT:?}").into());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    Ok(Ended {
        code: status.code(),
        took: start.elapsed(),
        stdout: std::fs::read_to_string(stdout)?,
        stderr: std::fs::read_to_string(stderr)?,
        peak_bytes,
        processor_seconds: ticks.map(|ticks| ticks as f64 / TICKS_PER_SECOND),
    })
}

/// A command of Farshore by the file `config`.
pub fn farshore(config: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
    // Nothing of this machine's own settings may lead it elsewhere.
    for (name, _) in std::env::vars() {
        if name.starts_with("AWS_") || name.starts_with("FARSHORE_") {
            command.env_remove(name);
        }
    }
    command
        .args(arguments)
        .arg("--config")
        .arg(config)
        .env("AWS_ACCESS_KEY_ID", "bench")
        .env("AWS_SECRET_ACCESS_KEY", "bench")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .stdin(Stdio::null());
    command
}

/// The kernel keeps the peak itself, so that nothing between two looks is lost but what a process
/// takes just before its end.
pub fn peak_bytes_of(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1_024)
}

pub fn ticks_of(process: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut times = fields.split(' ').skip(11).map(str::parse::<u64>);
    Some(times.next()?.ok()? + times.next()?.ok()?)
}
