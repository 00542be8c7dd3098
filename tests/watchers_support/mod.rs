//! Those who watch a worker and are none of ours: Debian's Prometheus, Debian's Chromium.

pub mod browser;
pub mod grafana;
pub mod prometheus;
pub mod scene;

use std::path::PathBuf;
use std::process::Command;

use crate::common::binary::die_with_parent;

/// A program of this machine.
///
/// # Panics
/// If it is not there: a watcher that is missing is a failure, not a pass.
pub fn program(name: &str) -> Command {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join(name).is_file())
    });
    assert!(found, "{name} is missing: run .ci/watchers");
    let mut command = Command::new(name);
    die_with_parent(&mut command);
    command
}

/// Where pictures are put: `FARSHORE_PICTURES`, or `target/watchers`.
pub fn pictures() -> PathBuf {
    let named = std::env::var_os("FARSHORE_PICTURES").map(PathBuf::from);
    let directory = named.unwrap_or_else(|| PathBuf::from("target/watchers"));
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// Answer of `GET path` at a port of this machine, asked without any client of ours.
pub async fn get(port: u16, path: &str) -> Option<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    };
    let limit = std::time::Duration::from_secs(10);
    tokio::time::timeout(limit, ask).await.ok().flatten()
}
