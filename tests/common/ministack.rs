//! ministack: an independent server that speaks DynamoDB, its streams and SQS.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::stand::{SOURCE, Stand, TARGET, free_port, text_of};

/// ministack is Python, and a test has two of it beside its worker: more tests at once would only
/// wait for each other's time limits.
static SEATS: Semaphore = Semaphore::const_new(2);

/// It starts in a quarter of a second on an idle machine.
const HEALTHY_WITHIN: Duration = Duration::from_secs(30);

/// Starts ministack and kills it once nobody holds the other end of stdin any more: however a test
/// ends, even killed, its servers end with it. There is nothing to save. A signal to the whole
/// process group must not end the shell before it has done so.
const LIFELINE: &str =
    r#"trap '' HUP INT TERM; "$0" & server=$!; read -r _; kill -9 "$server"; wait "$server""#;

/// The Python environment of the peers: `FARSHORE_PEERS`, or where `.ci/peers` installs it.
pub fn environment() -> PathBuf {
    std::env::var_os("FARSHORE_PEERS").map_or_else(|| PathBuf::from("target/peers"), PathBuf::from)
}

/// A program of that environment.
///
/// # Panics
/// If it is not there: a peer that is missing is a failure, not a pass.
fn program(name: &str) -> PathBuf {
    let path = environment().join("bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: run .ci/peers, or set FARSHORE_PEERS to an environment that has it",
        path.display()
    );
    path
}

/// A script of `tests/peers` as a command of the environment's python.
pub fn script(name: &str) -> Command {
    let mut command = python();
    command.arg(format!("tests/peers/{name}"));
    command
}

/// The environment's python.
pub fn python() -> Command {
    let mut command = Command::new(program("python"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AWS_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// A running ministack; it ends with this value.
pub struct Ministack {
    lifeline: Child,
    port: u16,
    home: TempDir,
}

impl Ministack {
    /// Starts one and waits until it is healthy.
    pub async fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let log = File::create(home.path().join("log")).unwrap();
        let port = free_port();
        let lifeline = Command::new("sh")
            .args(["-c", LIFELINE])
            .arg(program("ministack").canonicalize().unwrap())
            .env("BIND_HOST", "127.0.0.1")
            .env("GATEWAY_PORT", port.to_string())
            .env("LOG_LEVEL", "WARNING")
            // Its own files, and none of the services that would open ports or look for a Docker.
            .envs([("HOME", home.path()), ("TMPDIR", home.path())])
            .env("DOCKER_HOST", "unix:///nonexistent")
            .envs([("SFTP_ENABLED", "0"), ("IOT_MTLS_ENABLED", "0")])
            .current_dir(home.path())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Self {
            lifeline,
            port,
            home,
        };
        let start = Instant::now();
        while !server.is_healthy().await {
            assert!(
                start.elapsed() < HEALTHY_WITHIN,
                "ministack is not healthy after {HEALTHY_WITHIN:?}:\n{}",
                text_of(&server.home.path().join("log"))
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        server
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The URL of a queue of its only account, at `origin`: its own, or that of a proxy.
    pub fn queue_url(origin: &str, name: &str) -> String {
        format!("{origin}/000000000000/{name}")
    }

    async fn is_healthy(&self) -> bool {
        let ask = async {
            let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await?;
            let request =
                b"GET /_ministack/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await?;
            let mut status = [0; 12];
            stream.read_exact(&mut status).await?;
            std::io::Result::Ok(status)
        };
        let answer = tokio::time::timeout(Duration::from_secs(2), ask).await;
        matches!(answer, Ok(Ok(status)) if status.ends_with(b"200"))
    }
}

impl Drop for Ministack {
    fn drop(&mut self) {
        drop(self.lifeline.stdin.take());
        let _ = self.lifeline.wait();
    }
}

/// Two of them as two regions, and the seat of the test that uses them.
pub struct Ministacks {
    pub source: Ministack,
    pub target: Ministack,
    _seat: SemaphorePermit<'static>,
}

impl Ministacks {
    pub async fn start() -> Self {
        let seat = SEATS.acquire().await.unwrap();
        let (source, target) = tokio::join!(Ministack::start(), Ministack::start());
        Self {
            source,
            target,
            _seat: seat,
        }
    }

    /// The regions to replicate between.
    pub fn stand(&self) -> Stand {
        Stand::at(&self.source.url(), &self.target.url())
    }

    /// boto3's view of them, as arguments: endpoint and region of source, then of target.
    pub fn arguments(&self) -> [String; 4] {
        let (source, target) = (self.source.url(), self.target.url());
        [source, SOURCE.to_owned(), target, TARGET.to_owned()]
    }
}
