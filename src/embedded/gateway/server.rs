//! Connections: a listener on a loopback port that can go away and come back on the same port.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};

use super::body::AnswerBody;
use super::call::{self, Ending};
use super::protocol::{self, Answer, Failure};
use super::region::Region;

/// DynamoDB takes bodies up to 16 MB; a little more, so that the refusal is the database's.
const BODY_MAX: usize = 20 * 1024 * 1024;

/// Whether a region can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    Up,
    /// Connections are refused, and open ones were cut.
    Refused,
    /// Connections are taken and never answered.
    Silent,
    Stopped,
}

/// Why a connection is broken on purpose.
#[derive(Debug, thiserror::Error)]
#[error("the gateway cuts this connection")]
struct Cut;

pub(crate) async fn run(
    listener: TcpListener,
    address: SocketAddr,
    region: Arc<Region>,
    mut wanted: watch::Receiver<Reach>,
    reached: watch::Sender<Reach>,
) {
    let mut listener = Some(listener);
    let mut kept: Option<TcpSocket> = None;
    loop {
        let reach = *wanted.borrow_and_update();
        let turned = match reach {
            Reach::Stopped => return,
            Reach::Refused => {
                listener = None;
                if kept.is_none() {
                    // Bound but not listening: nobody else gets the port, and it refuses.
                    kept = bound(address).inspect_err(complain).ok();
                }
                Ok(())
            }
            Reach::Up | Reach::Silent if listener.is_none() => {
                let socket = kept.take().map_or_else(|| bound(address), Ok);
                socket
                    .and_then(|s| s.listen(1_024))
                    .map(|open| listener = Some(open))
            }
            Reach::Up | Reach::Silent => Ok(()),
        };
        if let Err(error) = turned {
            complain(&error);
            return;
        }
        // Nobody may be waiting to hear it.
        let _ = reached.send(reach);
        let Some(open) = &listener else {
            if wanted.changed().await.is_err() {
                return;
            }
            continue;
        };
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            accepted = open.accept() => match accepted {
                Ok((stream, _)) => {
                    region.connections.fetch_add(1, Ordering::Relaxed);
                    tokio::spawn(connection(stream, Arc::clone(&region), wanted.clone()));
                }
                Err(error) => complain(&error),
            }
        }
    }
}

fn complain(error: &io::Error) {
    tracing::error!(%error, "the gateway's port");
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

async fn connection(stream: TcpStream, region: Arc<Region>, reach: watch::Receiver<Reach>) {
    // Small answers must not wait for the client's acknowledgements.
    let _ = stream.set_nodelay(true);
    let mut gone = reach.clone();
    let service = service_fn(move |request| {
        let (region, reach) = (Arc::clone(&region), reach.clone());
        async move { answer(region, request, reach).await }
    });
    let serve = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // A connection that a client keeps in its pool must not go away without a fault.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    let cut = gone.wait_for(|r| matches!(r, Reach::Refused | Reach::Stopped));
    tokio::select! {
        // A client that hangs up, or one hung up on, is nothing to report.
        _ = serve => {}
        _ = cut => {}
    }
}

async fn answer(
    region: Arc<Region>,
    request: Request<Incoming>,
    mut reach: watch::Receiver<Reach>,
) -> Result<Response<AnswerBody>, Cut> {
    silence(&mut reach).await?;
    let (parts, body) = request.into_parts();
    if parts.method != Method::POST {
        return Ok(Answer::ok(Bytes::from_static(b"healthy")).response("", false));
    }
    let Ok(body) = Limited::new(body, BODY_MAX).collect().await else {
        return Err(Cut);
    };
    let target = parts.headers.get("x-amz-target");
    let target = target.and_then(|target| target.to_str().ok());
    let Some((operation, _)) = target.and_then(protocol::operation) else {
        let unknown = Failure::new(400, "UnknownOperationException", "");
        return Ok(unknown.answer().response("", false));
    };
    let request = call::Request {
        operation: operation.to_owned(),
        headers: parts.headers,
        body: body.to_bytes(),
    };
    let (client, ending) = oneshot::channel();
    tokio::spawn(call::run(region, request, client));
    let ending = ending.await.unwrap_or(Ending::Cut);
    silence(&mut reach).await?;
    match ending {
        Ending::Answer(answer) => Ok(answer.response(&request_id(), false)),
        Ending::Broken(answer) => Ok(answer.response(&request_id(), true)),
        Ending::Cut => Err(Cut),
    }
}

/// Waits out a silent region, which then has lost the connection.
async fn silence(reach: &mut watch::Receiver<Reach>) -> Result<(), Cut> {
    if *reach.borrow() != Reach::Silent {
        return Ok(());
    }
    // An error means that the gateway has stopped.
    let _ = reach.wait_for(|r| *r != Reach::Silent).await;
    Err(Cut)
}

fn request_id() -> String {
    format!(
        "{:026X}{:026X}",
        rand::random::<u64>(),
        rand::random::<u64>()
    )
}
