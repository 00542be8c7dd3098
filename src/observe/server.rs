//! The worker's HTTP server: `/metrics`, `/livez`, `/readyz`; `/active` and `/region` are
//! [`active`](super::active)'s.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::active;
use super::health::Health;
use super::whereabouts::Whereabouts;
use crate::error::Failure;

#[derive(Clone)]
struct Shared {
    health: Arc<Health>,
    metrics: Option<PrometheusHandle>,
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
    whereabouts: Whereabouts,
    stop: CancellationToken,
) {
    let router = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(render))
        .with_state(Shared { health, metrics })
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

async fn render(State(shared): State<Shared>) -> impl IntoResponse {
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
