//! The last moment before a request leaves: is it still allowed to?
//!
//! ```text
//!   within(bound, call) ─▶ SDK: build, sign ─▶ [Client::call: paused? bound over?] ─▶ connection
//!                                                      │ yes: refused, nothing was sent
//! ```
//!
//! A lease may end between the decision to write and the moment the SDK hands the request to a
//! connection: credentials are fetched, the process is stopped. So every client sends through
//! [`http_client`], which asks once more. After a pause of the process it makes all connections anew:
//! what an old one still holds must not reach the service.
//!
//! What a clock cannot fence remains: a request that left may take effect late. [`Left`] says
//! whether one did, and `lease::doubts` what follows.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::{Builder, Connector as Connections, ConnectorBuilder, tls};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;

use super::pause;
use crate::mutation::{self, Mutation};

/// A right to write that ends by itself, as a lease does.
pub trait Bound: Send + Sync {
    /// How long it is still good; zero once it is over.
    fn remaining(&self) -> Duration;
}

/// Whether a request reached a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// It did: without a complete answer its effect is unknown.
    Yes,
    /// It did not, for certain.
    No,
}

struct Attempt {
    bound: Arc<dyn Bound>,
    /// Pauses of the process before it began.
    pauses: u64,
    left: AtomicBool,
}

tokio::task_local! {
    static ATTEMPT: Arc<Attempt>;
}

/// Makes one `call` that may only leave while `bound` is good and the process was not paused since
/// now. `None` when it did not answer within `timeout`, or the process was paused meanwhile.
pub async fn within<T>(
    bound: Arc<dyn Bound>,
    timeout: Duration,
    call: impl Future<Output = T>,
) -> (Option<T>, Left) {
    let attempt = Arc::new(Attempt {
        bound,
        pauses: pause::count(),
        left: AtomicBool::new(false),
    });
    let call = ATTEMPT.scope(Arc::clone(&attempt), tokio::time::timeout(timeout, call));
    let answer = tokio::select! {
        answer = call => answer.ok(),
        () = pause::after(attempt.pauses) => None,
    };
    let left = match attempt.left.load(Ordering::SeqCst) {
        true => Left::Yes,
        false => Left::No,
    };
    (answer, left)
}

/// An HTTP client as the SDK's own default is made, whose requests are checked once more when they
/// leave, and whose connections do not outlive a pause of the process.
pub fn http_client() -> SharedHttpClient {
    pause::begin_watching();
    SharedHttpClient::new(Client {
        current: Mutex::new((pause::count(), connections())),
    })
}

struct Client {
    current: Mutex<(u64, SharedHttpClient)>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

fn connections() -> SharedHttpClient {
    Builder::new()
        .build_with_connector_fn(|settings, components| secure(settings.cloned(), components))
}

/// Connections to whomever a person names, no service of AWS: by the same TLS, through the same
/// proxies. Who sends bounds the time.
pub fn connector() -> SharedHttpConnector {
    SharedHttpConnector::new(secure(None, None))
}

fn secure(
    settings: Option<HttpConnectorSettings>,
    components: Option<&RuntimeComponents>,
) -> Connections {
    let mut builder = ConnectorBuilder::default().tls_provider(tls::Provider::Rustls(
        tls::rustls_provider::CryptoMode::AwsLc,
    ));
    builder.set_connector_settings(settings);
    if let Some(components) = components {
        builder.set_sleep_impl(components.sleep_impl());
    }
    builder.set_proxy_config(Some(ProxyConfig::from_env()));
    builder.build()
}

impl HttpClient for Client {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let pauses = pause::count();
        let client = {
            // A poisoned lock still holds a whole client.
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if current.0 != pauses {
                *current = (pauses, connections());
            }
            current.1.clone()
        };
        SharedHttpConnector::new(Connector {
            pauses,
            inner: client.http_connector(settings, components),
        })
    }
}

/// Sends one request over connections that were made after `pauses` pauses.
#[derive(Debug)]
struct Connector {
    pauses: u64,
    inner: SharedHttpConnector,
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        #[cfg(feature = "failpoints")]
        super::failpoint::pass(super::failpoint::Place::BeforeCheck, &request);
        let attempt = ATTEMPT.try_with(Arc::clone).ok();
        if !mutation::is_off(Mutation::Transmit) {
            let pauses = pause::count();
            let began = attempt.as_ref().map_or(self.pauses, |a| a.pauses);
            if pauses != self.pauses || pauses != began {
                return refused("the process was paused before the request left");
            }
            if let Some(attempt) = &attempt
                && attempt.bound.remaining().is_zero()
            {
                return refused(
                    "the lease, or the share of the write budget, ended before the request left",
                );
            }
        }
        #[cfg(feature = "failpoints")]
        super::failpoint::pass(super::failpoint::Place::AfterCheck, &request);
        let Some(attempt) = attempt else {
            return self.inner.call(request);
        };
        attempt.left.store(true, Ordering::SeqCst);
        let answer = self.inner.call(request);
        HttpConnectorFuture::new(async move {
            let answer = answer.await;
            // Where there was no connection, nothing left.
            if let Err(error) = &answer
                && never_connected(error)
            {
                attempt.left.store(false, Ordering::SeqCst);
            }
            answer
        })
    }
}

fn refused(why: &'static str) -> HttpConnectorFuture {
    HttpConnectorFuture::ready(Err(ConnectorError::io(why.into())))
}

fn never_connected(error: &ConnectorError) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
            return error.is_connect();
        }
        next = error.source();
    }
    false
}
