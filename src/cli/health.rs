//! `farshore health`: the probe of a container. Asks whether the worker is live, not whether it
//! is ready: an outage elsewhere is no reason to restart it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::answer;
use crate::config::read::Loaded;
use crate::error::{Exit, Failure};

/// Orchestrators give a probe a few seconds.
const TIMEOUT: Duration = Duration::from_secs(3);

pub(super) async fn run(loaded: Loaded) -> Result<Exit, Failure> {
    let address = reachable(loaded.config.worker.listen);
    let asked = tokio::time::timeout(TIMEOUT, ask(address)).await;
    let (exit, text) = match asked {
        Ok(Ok(true)) => (Exit::Done, format!("live: the worker at {address} answers")),
        Ok(Ok(false)) => (
            Exit::Remains,
            format!("not live: the worker at {address} no longer comes round"),
        ),
        Ok(Err(error)) => (
            Exit::Remains,
            format!("not live: no worker answers at {address}: {error}"),
        ),
        Err(_) => (
            Exit::Remains,
            format!("not live: the worker at {address} did not answer within 3 s"),
        ),
    };
    answer(&text)?;
    Ok(exit)
}

/// Where a worker that listens on `address` can be asked: all interfaces include the loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

async fn ask(address: SocketAddr) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer; its error, if any, shows in the request as well.
    tokio::spawn(connection);
    let request = Request::get("/livez")
        .header(hyper::header::HOST, address.to_string())
        .body(Empty::<Bytes>::new())?;
    Ok(sender.send_request(request).await?.status().is_success())
}
