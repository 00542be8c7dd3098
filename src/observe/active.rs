//! `GET /active` and `GET /region`: where to write, for load balancers and applications.
//!
//! Both rest on [`Whereabouts`], and an answer is good for what is left of a lease: ask again, or
//! wait for a change.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::whereabouts::{Known, Whereabouts};
use crate::lease::row::state::CONFLICT;

/// Load balancers cut a connection that is silent for a minute.
const WAIT_MAX: Duration = Duration::from_secs(55);

#[derive(Clone)]
struct Shared {
    whereabouts: Whereabouts,
    /// The server stops: who waits is answered at once.
    stop: CancellationToken,
}

/// The two routes.
pub fn routes(whereabouts: Whereabouts, stop: CancellationToken) -> Router {
    Router::new()
        .route("/active", get(active))
        .route("/region", get(region))
        .with_state(Shared { whereabouts, stop })
}

/// 200 where `here` is active and may be written to, 503 everywhere else and where nobody can say.
async fn active(State(shared): State<Shared>) -> Response {
    let now = shared.whereabouts.now();
    let here = shared.whereabouts.here();
    let refused = match &now {
        Ok(known) => known.serves(here).err(),
        Err(why) => Some(why.clone()),
    };
    let known = now.ok();
    let body = json!({
        "version": 1,
        "group": shared.whereabouts.group(),
        "here": here,
        "active": refused.is_none(),
        "region": known.as_ref().map(|known| &known.active),
        "epoch": known.as_ref().map(|known| known.epoch),
        "state": known.as_ref().map(|known| &known.state),
        "reason": refused,
    });
    match refused.is_none() {
        true => answer(StatusCode::OK, body),
        false => answer(StatusCode::SERVICE_UNAVAILABLE, body),
    }
}

/// The active region, or 503 where nobody can say. With `?epoch=N&wait=30s` it is answered once the
/// epoch is another than N, or when the wait is over; with `&writable=true` (or `false`) also once it may
/// be written to no more (or may be).
async fn region(State(shared): State<Shared>, uri: Uri) -> Response {
    let asked = match Asked::parse(uri.query().unwrap_or_default()) {
        Ok(asked) => asked,
        Err(reason) => {
            let body = json!({ "version": 1, "reason": reason });
            return answer(StatusCode::BAD_REQUEST, body);
        }
    };
    if let Some((epoch, wait)) = asked.waits {
        let known = (epoch, asked.writable);
        let Ok(_place) = shared.whereabouts.waiters().try_acquire_owned() else {
            let body = json!({ "version": 1, "reason": "too many requests wait for a change" });
            let mut full = answer(StatusCode::SERVICE_UNAVAILABLE, body);
            let later = HeaderValue::from_static("5");
            full.headers_mut().insert(header::RETRY_AFTER, later);
            return full;
        };
        wait_for_another(&shared, known, Instant::now() + wait).await;
    }
    show_region(&shared.whereabouts)
}

/// Returns once an epoch other than `epoch` is known, or whether it may be written to is another than
/// `writable`; or the time is over or the server stops.
async fn wait_for_another(shared: &Shared, (epoch, writable): (u64, Option<bool>), until: Instant) {
    let is_another = |known: &Known| {
        let turned = writable.is_some_and(|writable| writable != known.is_writable());
        known.epoch != epoch || turned
    };
    let mut changes = shared.whereabouts.changes();
    while !shared
        .whereabouts
        .now()
        .is_ok_and(|known| is_another(&known))
    {
        tokio::select! {
            () = changes.next() => {}
            () = tokio::time::sleep_until(until) => return,
            () = shared.stop.cancelled() => return,
        }
    }
}

fn show_region(whereabouts: &Whereabouts) -> Response {
    let group = whereabouts.group();
    match whereabouts.now() {
        Ok(Known { epoch, state, .. }) if state == CONFLICT => answer(
            StatusCode::SERVICE_UNAVAILABLE,
            json!({
                "version": 1,
                "group": group,
                "epoch": epoch,
                "state": state,
                "reason": format!("epoch {epoch} names several active regions"),
            }),
        ),
        Ok(known) => {
            let endpoint = whereabouts.endpoint(&known.active);
            answer(
                StatusCode::OK,
                json!({
                    "version": 1,
                    "group": group,
                    "label": known.active,
                    "region": endpoint.map(|endpoint| &endpoint.region),
                    "endpoint": endpoint.and_then(|endpoint| endpoint.url.as_ref()),
                    "epoch": known.epoch,
                    "state": known.state,
                    "writable": known.is_writable(),
                }),
            )
        }
        Err(why) => answer(
            StatusCode::SERVICE_UNAVAILABLE,
            json!({ "version": 1, "group": group, "reason": why }),
        ),
    }
}

/// An answer that nobody keeps: it is true for less than a lease.
fn answer(status: StatusCode, body: Value) -> Response {
    let fresh = [(header::CACHE_CONTROL, "no-store")];
    (status, fresh, Json(body)).into_response()
}

/// What a query asks for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    /// The epoch that is known already, and how long to wait for another.
    waits: Option<(u64, Duration)>,
    /// Whether it may be written to, as it is known already.
    writable: Option<bool>,
}

impl Asked {
    fn parse(query: &str) -> Result<Self, String> {
        let (mut epoch, mut wait, mut writable) = (None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=').unwrap_or((pair, "")) {
                ("epoch", text) => {
                    let number = text.parse::<u64>();
                    epoch = Some(number.map_err(|_| "epoch is no number".to_owned())?);
                }
                ("wait", text) => {
                    let time = humantime::parse_duration(text);
                    let time = time.map_err(|_| "wait is no duration like 30s".to_owned())?;
                    wait = Some(time.min(WAIT_MAX));
                }
                ("writable", "true") => writable = Some(true),
                ("writable", "false") => writable = Some(false),
                ("writable", _) => return Err("writable is true or false".to_owned()),
                _ => return Err("only epoch, wait and writable are known".to_owned()),
            }
        }
        match (epoch, wait) {
            (Some(epoch), Some(wait)) => Ok(Self {
                waits: Some((epoch, wait)),
                writable,
            }),
            (None, None) if writable.is_none() => Ok(Self {
                waits: None,
                writable,
            }),
            _ => Err("epoch and wait go together, like ?epoch=7&wait=30s".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_query_asks_for_both_or_neither() {
        let waits = |query: &str| Asked::parse(query).map(|asked| asked.waits);
        assert_eq!(waits(""), Ok(None));
        let second = Duration::from_secs(1);
        assert_eq!(waits("epoch=7&wait=1s"), Ok(Some((7, second))));
        assert_eq!(waits("wait=1h&epoch=7"), Ok(Some((7, WAIT_MAX))));
        let known = Asked::parse("epoch=7&wait=1s&writable=false").map(|asked| asked.writable);
        assert_eq!(known, Ok(Some(false)));
        for wrong in [
            "writable=true",
            "epoch=7&wait=1s&writable=1",
            "epoch=7",
            "wait=1s",
            "epoch=x&wait=1s",
            "epoch=1&wait=1",
            "x=1",
        ] {
            assert!(waits(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn no_query_panics(query in "(epoch|wait|=|&|[0-9]{1,24}|s|m|%|\\PC){0,12}") {
            if let Ok(Asked { waits: Some((_, wait)), .. }) = Asked::parse(&query) {
                prop_assert!(wait <= WAIT_MAX);
            }
        }
    }
}
