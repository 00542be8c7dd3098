//! `config/haproxy.cfg` as it is shipped, with ports of this machine: traffic follows `/active`.

mod common;
mod whereabouts_support;

use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use common::binary::{die_with_parent, spawn};
use common::eventually;
use common::stand::{SOURCE, TARGET, free_port};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use whereabouts_support::Served;

const SHIPPED: &str = include_str!("../config/haproxy.cfg");

/// What the shipped file promises of a change, and a moment for this machine.
const MOVES_WITHIN: Duration = Duration::from_millis(2_500);

/// `FARSHORE_HAPROXY`, or where Debian's package puts it.
///
/// # Panics
/// If it is not there: a peer that is missing is a failure, not a pass.
fn program() -> PathBuf {
    let path = std::env::var_os("FARSHORE_HAPROXY");
    let path = path.map_or_else(|| PathBuf::from("/usr/sbin/haproxy"), PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: run .ci/watchers, or set FARSHORE_HAPROXY",
        path.display()
    );
    path
}

/// A running HAProxy; it ends with this value.
struct Haproxy(Child);

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The shipped file with each of its addresses replaced by one of this machine.
fn with_ports(addresses: &[(&str, u16)]) -> String {
    let mut text = SHIPPED.to_owned();
    for (shipped, port) in addresses {
        assert_eq!(
            text.matches(shipped).count(),
            1,
            "{shipped} in config/haproxy.cfg"
        );
        text = text.replace(shipped, &format!("127.0.0.1:{port}"));
    }
    assert!(
        !text.contains(" 10."),
        "an address was not replaced:\n{text}"
    );
    text
}

/// An application that says in which region it is.
async fn application(label: &'static str) -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = Router::new()
        .route("/healthz", get(|| async { "well" }))
        .fallback(move || async move { label });
    let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (port, task)
}

/// What is answered to a request at `port`: status and body.
async fn ask(port: u16) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let request = b"GET /orders HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::InvalidData)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Ok((
        status.ok_or(io::ErrorKind::InvalidData)?,
        body.trim().to_owned(),
    ))
}

/// Who served, one after another, as a client sees it that asks all the time.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn watch(&self, port: u16) -> JoinHandle<()> {
        let seen = self.clone();
        tokio::spawn(async move {
            loop {
                let said = match ask(port).await {
                    Ok((200, body)) => body,
                    Ok((503, body)) => body,
                    other => format!("{other:?}"),
                };
                {
                    let mut seen = seen.0.lock().unwrap();
                    if seen.last() != Some(&said) {
                        seen.push(said);
                    }
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
    }

    async fn last_is(&self, said: &str, within: Duration) -> Duration {
        let begin = Instant::now();
        let last = async || {
            self.0
                .lock()
                .unwrap()
                .last()
                .is_some_and(|last| last == said)
        };
        eventually(said, within, last).await;
        begin.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs haproxy: .ci/watchers installs Debian's package"]
async fn traffic_moves_when_the_active_region_changes() {
    const NOBODY: &str = "no region is active";
    let lease = "1h";
    let east = [
        Served::start(SOURCE, lease).await,
        Served::start(SOURCE, lease).await,
    ];
    let west = [
        Served::start(TARGET, lease).await,
        Served::start(TARGET, lease).await,
    ];
    let tell = |workers: &[Served], active: &str, epoch, state: &str| {
        for worker in workers {
            worker.tell(active, epoch, state);
        }
    };
    tell(&east, SOURCE, 1, "steady");
    tell(&west, SOURCE, 1, "steady");
    let (east_app, _east_task) = application(SOURCE).await;
    let (west_app, _west_task) = application(TARGET).await;
    let port = free_port();
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("haproxy.cfg");
    let text = with_ports(&[
        ("10.1.0.11:9464", east[0].port),
        ("10.1.0.12:9464", east[1].port),
        ("10.2.0.11:9464", west[0].port),
        ("10.2.0.12:9464", west[1].port),
        ("10.1.0.21:8080", east_app),
        ("10.1.0.22:8080", east_app),
        ("10.2.0.21:8080", west_app),
        ("10.2.0.22:8080", west_app),
        (":8000", port),
    ]);
    std::fs::write(&path, text).unwrap();
    let mut command = Command::new(program());
    command.arg("-db").arg("-f").arg(&path).stdin(Stdio::null());
    command.stdout(std::fs::File::create(temp.path().join("log")).unwrap());
    die_with_parent(&mut command);
    let _haproxy = Haproxy(spawn(command).unwrap());
    let up = async || ask(port).await.is_ok();
    eventually("haproxy listens", Duration::from_secs(10), up).await;
    let seen = Seen::default();
    let client = seen.watch(port);
    seen.last_is(SOURCE, Duration::from_secs(10)).await;
    // Both regions' first moments are over; from here on the order of answers is fixed.
    seen.0.lock().unwrap().clear();

    // One worker of the active region is restarted: nobody notices.
    east[0].stop.cancel();
    tokio::time::sleep(MOVES_WITHIN).await;

    // A failover: fence, then the new region.
    tell(&east, TARGET, 2, "fencing");
    tell(&west, TARGET, 2, "fencing");
    let left = seen.last_is(NOBODY, MOVES_WITHIN).await;
    tell(&west, TARGET, 2, "steady");
    tell(&east, TARGET, 2, "steady");
    let reached = seen.last_is(TARGET, MOVES_WITHIN).await;
    println!(
        "traffic left the old region after {left:?} and reached the new one after {reached:?}"
    );

    // The old region, cut off, says that it is active as well: neither is served.
    east[1].tell(SOURCE, 3, "steady");
    seen.last_is("two regions say that they are active", MOVES_WITHIN)
        .await;
    east[1].tell(TARGET, 4, "steady");
    seen.last_is(TARGET, MOVES_WITHIN).await;
    client.abort();
    let order = seen.0.lock().unwrap().clone();
    assert_eq!(
        order,
        [
            SOURCE,
            NOBODY,
            TARGET,
            "two regions say that they are active",
            TARGET
        ]
    );
}
