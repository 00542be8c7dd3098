//! The real binary, started, asked, stopped and killed.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::stand::text_of;

/// Longest wait for an answer of a worker's HTTP server. A stopped process still takes connections.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Has the kernel kill the process once the *thread* that starts it ends: however a test ends, even
/// killed, its processes end with it.
#[cfg(target_os = "linux")]
pub fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    let parent = rustix::process::getpid();
    let bind = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died before anybody was to be told.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    };
    // SAFETY: between fork and exec, it makes two system calls and allocates nothing.
    unsafe { command.pre_exec(bind) };
}

#[cfg(not(target_os = "linux"))]
pub fn die_with_parent(_command: &mut Command) {}

type Started = mpsc::Sender<io::Result<Child>>;

/// Starts a process from a thread that lives as long as this process does: the threads of a runtime
/// come and go, and would take the process with them.
pub fn spawn(command: Command) -> io::Result<Child> {
    static STARTER: OnceLock<Mutex<mpsc::Sender<(Command, Started)>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, next) = mpsc::channel::<(Command, Started)>();
        std::thread::spawn(move || {
            while let Ok((mut command, started)) = next.recv() {
                let _ = started.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (started, child) = mpsc::channel();
    let orders = starter.lock().unwrap_or_else(PoisonError::into_inner);
    orders.send((command, started)).unwrap();
    drop(orders);
    child.recv().unwrap()
}

/// A command of Farshore with nothing of this machine's AWS set-up in its environment. It ends with
/// the thread that starts it at the latest.
pub fn farshore(arguments: &[&str]) -> Command {
    let binary = std::env::var("FARSHORE_TEST_BINARY")
        .unwrap_or_else(|_| env!("CARGO_BIN_EXE_farshore").to_owned());
    let mut command = Command::new(binary);
    for (name, _) in std::env::vars() {
        // A safeguard that is turned off is turned off everywhere.
        let keep = name == "FARSHORE_TEST_MUTATION";
        if !keep && (name.starts_with("AWS_") || name.starts_with("FARSHORE_")) {
            command.env_remove(name);
        }
    }
    command
        .args(arguments)
        .env("AWS_ACCESS_KEY_ID", "test")
        .env("AWS_SECRET_ACCESS_KEY", "test")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .stdin(Stdio::null());
    die_with_parent(&mut command);
    command
}

/// Runs a command to its end.
pub fn run(arguments: &[&str]) -> Output {
    farshore(arguments).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Provisions, and expects it to succeed.
pub fn provision(config: &Path) {
    let output = run(&["provision", "--apply", "--config", config.to_str().unwrap()]);
    assert!(
        output.status.success(),
        "{}{}",
        stdout(&output),
        stderr(&output)
    );
}

/// A running `farshore run`.
pub struct Worker {
    child: Child,
    port: u16,
    pub log: PathBuf,
}

impl Worker {
    /// Starts a worker; its log goes to a file beside the configuration.
    pub fn start(config: &Path) -> Self {
        Self::start_with(config, &[])
    }

    /// As [`start`](Self::start), with variables of its own.
    pub fn start_with(config: &Path, environment: &[(&str, &str)]) -> Self {
        let text = text_of(config);
        let port = text
            .split("listen = \"127.0.0.1:")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .unwrap()
            .parse()
            .unwrap();
        let log = config.with_extension("log");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        let mut command = farshore(&["run", "--config", config.to_str().unwrap()]);
        command
            .envs(environment.iter().copied())
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        let child = spawn(command).unwrap();
        Self { child, port, log }
    }

    /// Starts a worker and waits until it follows its tables, ready or not.
    pub async fn following(config: &Path) -> Self {
        let mut worker = Self::start(config);
        let start = Instant::now();
        loop {
            if let Some((_, body)) = worker.get("/readyz").await
                && !body.contains("\"starting\"")
                && worker.metric("farshore_leases_held").await >= 1.0
            {
                return worker;
            }
            if let Some(status) = worker.child.try_wait().unwrap() {
                panic!("the worker ended with {status}:\n{}", text_of(&worker.log));
            }
            assert!(
                start.elapsed().as_secs() < 30,
                "not following:\n{}",
                text_of(&worker.log)
            );
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Status code and body of a path of its HTTP server.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.ask(path))
            .await
            .ok()?
    }

    async fn ask(&self, path: &str) -> Option<(u16, String)> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port))
            .await
            .ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    }

    /// The sum of a metric over its labels; 0 where it is absent.
    pub async fn metric(&self, name: &str) -> f64 {
        let Some((200, text)) = self.get("/metrics").await else {
            return 0.0;
        };
        text.lines()
            .filter(|line| line.starts_with(name) && !line.starts_with('#'))
            .filter(|line| matches!(line.as_bytes().get(name.len()), Some(b' ' | b'{')))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Whether the process is stopped (SIGSTOP).
    pub fn is_stopped(&self) -> bool {
        let stat = text_of(Path::new(&format!("/proc/{}/stat", self.child.id())));
        // The state follows the name, which stands in parentheses.
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('T'))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, once it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and its exit status.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended(Duration::from_secs(30)).await
    }

    pub async fn ended(&mut self, within: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < within,
                "still running:\n{}",
                text_of(&self.log)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Lines of its log that contain `text`.
    pub fn logged(&self, text: &str) -> usize {
        text_of(&self.log)
            .lines()
            .filter(|line| line.contains(text))
            .count()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Only this test's own process; one that has ended is left alone.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
