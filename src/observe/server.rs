//! The worker's HTTP server: the page, `/metrics`, `/livez`, `/readyz`, `/status`; `/active` and
//! `/region` are [`active`](super::active)'s.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::active;
use super::health::Health;
use super::page::page;
use super::view::View;
use super::whereabouts::Whereabouts;
use crate::error::Failure;

/// What the server shows of the worker behind it.
pub trait Show: Send + Sync {
    /// All that there is to see.
    fn view(&self) -> View;
    /// Metrics are about to be read: those that grow older by themselves are set to what they are now.
    fn before_metrics(&self);
}

/// Where a worker puts what it shows, anew with each role.
#[derive(Clone, Default)]
pub struct Stage(Arc<RwLock<Option<Arc<dyn Show>>>>);

impl Stage {
    /// From now on `show` is shown.
    pub fn put(&self, show: Arc<dyn Show>) {
        // Nothing can be left half changed.
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(show);
    }

    /// What is shown now; `None` before the first role.
    fn get(&self) -> Option<Arc<dyn Show>> {
        let shown = self.0.read().unwrap_or_else(PoisonError::into_inner);
        shown.clone()
    }
}

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    metrics: Option<PrometheusHandle>,
    stage: Stage,
}

/// Binds the address of metrics and health.
///
/// # Errors
/// When the address is taken or not this host's.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        Failure::new(
            format!("The worker could not listen on {address}"),
            error.to_string(),
            "Set worker.listen (or FARSHORE_WORKER_LISTEN) to a free address of this host",
        )
    })
}

/// Serves until `stop` is cancelled.
pub async fn serve(
    listener: TcpListener,
    health: Arc<Health>,
    metrics: Option<PrometheusHandle>,
    stage: Stage,
    whereabouts: Whereabouts,
    stop: CancellationToken,
) {
    let router = Router::new()
        .route("/", get(page))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/metrics", get(render))
        .with_state(Shared {
            health,
            metrics,
            stage,
        })
        .merge(active::routes(whereabouts, stop.clone()));
    let served = axum::serve(listener, router)
        .with_graceful_shutdown(async move { stop.cancelled().await })
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "metrics and health are no longer served");
    }
}

/// 200 while the main loop comes round. An outage elsewhere is no reason to be restarted.
async fn livez(State(shared): State<Shared>) -> impl IntoResponse {
    if shared.health.is_live() {
        (StatusCode::OK, Json(json!({ "version": 1, "live": true })))
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "version": 1, "live": false })),
        )
    }
}

/// 200 when nothing needs attention, else 503 with the reasons. For alarms, not for restarts.
async fn readyz(State(shared): State<Shared>) -> impl IntoResponse {
    let reasons = shared.health.reasons();
    let status = if reasons.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({
        "version": 1,
        "ready": reasons.is_empty(),
        "standby": shared.health.standby(),
        "reasons": reasons,
    });
    (status, Json(body))
}

/// All that there is to see. Answers 200 however bad it is: [`readyz`] is for alarms.
async fn status(State(shared): State<Shared>) -> Response {
    match shared.stage.get() {
        Some(show) => {
            let headers = [(header::CACHE_CONTROL, "no-store")];
            (headers, Json(show.view())).into_response()
        }
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "version": 1, "starting": true })),
        )
            .into_response(),
    }
}

async fn render(State(shared): State<Shared>) -> impl IntoResponse {
    if let Some(show) = shared.stage.get() {
        show.before_metrics();
    }
    match shared.metrics {
        Some(metrics) => (
            StatusCode::OK,
            [(
                header::CONTENT_TYPE,
                "text/plain; version=0.0.4; charset=utf-8",
            )],
            metrics.render(),
        ),
        None => (
            StatusCode::NOT_FOUND,
            [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
            "no recorder is installed in this process\n".to_owned(),
        ),
    }
}
