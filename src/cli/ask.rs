//! Asks a worker's HTTP server.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Orchestrators give a probe a few seconds.
pub(super) const TIMEOUT: Duration = Duration::from_secs(3);
/// A worker of a thousand shards answers a megabyte; much more is not a worker's answer.
const BODY_MAX: usize = 64 << 20;

/// Any failure, to be shown.
pub(super) type Trouble = Box<dyn std::error::Error + Send + Sync>;

/// Where a worker that listens on `address` can be asked: all interfaces include the loopback.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// Status and body of `path` at `authority` (`host:port`).
///
/// # Errors
/// What kept it from being answered in [`TIMEOUT`].
pub(super) async fn get(authority: &str, path: &str) -> Result<(StatusCode, Bytes), Trouble> {
    let asked = tokio::time::timeout(TIMEOUT, ask(authority, path)).await;
    asked.map_err(|_| format!("no answer within {} s", TIMEOUT.as_secs()))?
}

async fn ask(authority: &str, path: &str) -> Result<(StatusCode, Bytes), Trouble> {
    let stream = TcpStream::connect(authority).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer; its error, if any, shows in the request as well.
    tokio::spawn(connection);
    let request = Request::get(path)
        .header(hyper::header::HOST, authority)
        .body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), BODY_MAX).collect().await?;
    Ok((status, body.to_bytes()))
}

/// The `host:port` that a worker's URL names. Workers speak HTTP without TLS.
///
/// # Errors
/// What is wrong with it, in a word.
pub(super) fn authority(url: &str) -> Result<String, &'static str> {
    let uri: Uri = url.parse().map_err(|_| "it is no URL")?;
    if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
        return Err("workers speak http");
    }
    let authority = uri.authority().ok_or("it names no host")?;
    Ok(match authority.port_u16() {
        Some(_) => authority.to_string(),
        None => format!("{authority}:9464"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_named_by_host_and_port_with_or_without_a_scheme() {
        assert_eq!(
            authority("http://10.0.0.7:9000/").as_deref(),
            Ok("10.0.0.7:9000")
        );
        assert_eq!(authority("worker-7:9464").as_deref(), Ok("worker-7:9464"));
        assert_eq!(authority("http://worker-7").as_deref(), Ok("worker-7:9464"));
        assert!(authority("https://worker-7").is_err());
        assert!(authority("/status").is_err());
    }
}
