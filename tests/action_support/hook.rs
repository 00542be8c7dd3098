//! A server that receives webhooks.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Bytes of a block of SHA-256.
const BLOCK: usize = 64;

/// One request.
#[derive(Debug, Clone)]
pub struct Call {
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Call {
    pub fn find(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn header(&self, name: &str) -> &str {
        self.find(name)
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.headers))
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Computes the signature as docs/ACTIONS.md says, from RFC 2104, without Farshore's code.
    pub fn check_signature(&self, secret: &[u8]) {
        let signature = self.header("farshore-signature");
        let (time, code) = signature.split_once(',').unwrap();
        let time = time.strip_prefix("t=").unwrap();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(
            now.abs_diff(time.parse().unwrap()) < 60,
            "{time} is not now"
        );
        let signed = [time.as_bytes(), b".", &self.body].concat();
        let expected: String = hmac(secret, &signed)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(code, format!("v1={expected}"));
    }
}

fn hmac(secret: &[u8], text: &[u8]) -> Vec<u8> {
    let mut key = match secret.len() > BLOCK {
        true => Sha256::digest(secret).to_vec(),
        false => secret.to_vec(),
    };
    key.resize(BLOCK, 0);
    let pad = |with: u8| key.iter().map(|byte| byte ^ with).collect::<Vec<u8>>();
    let inner = Sha256::digest([pad(0x36), text.to_vec()].concat());
    Sha256::digest([pad(0x5c), inner.to_vec()].concat()).to_vec()
}

struct Shared {
    calls: Mutex<Vec<Call>>,
    /// What it answers, one after another; the last one for ever. None: it never answers.
    statuses: Vec<u16>,
}

/// A receiver on a free port; it ends with this value.
pub struct Hook {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    task: JoinHandle<()>,
}

impl Hook {
    pub async fn start(statuses: &[u16]) -> Self {
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            statuses: statuses.to_vec(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new()
            .fallback(receive)
            .with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            shared,
            address,
            task,
        }
    }

    /// One that takes every request and answers none.
    pub async fn silent() -> Self {
        Self::start(&[]).await
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub fn calls(&self) -> Vec<Call> {
        self.shared.calls.lock().unwrap().clone()
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn receive(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, HeaderMap) {
    let call = {
        let mut calls = shared.calls.lock().unwrap();
        calls.push(Call {
            headers,
            body: body.to_vec(),
        });
        calls.len() - 1
    };
    let status = shared.statuses.get(call).or(shared.statuses.last());
    match status {
        Some(status) => {
            let mut headers = HeaderMap::new();
            headers.insert("location", "/elsewhere".parse().unwrap());
            (StatusCode::from_u16(*status).unwrap(), headers)
        }
        None => std::future::pending().await,
    }
}
