//! Shard iterators: opaque to clients, a position and a time of issue to the gateway.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Iterator {
    pub(crate) stream: String,
    pub(crate) shard: String,
    pub(crate) position: u64,
    pub(crate) issued_ms: i64,
}

impl Iterator {
    pub(crate) fn encode(&self) -> String {
        // Strings and integers only: serialising them cannot fail.
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }

    pub(crate) fn decode(text: &str) -> Option<Self> {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()
    }
}
