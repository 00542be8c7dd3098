//! One stream: its shards, and how far its records were taken over from the database.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::keys::KeySchema;
use super::shards::ShardTree;

/// Which images the records of a stream carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) name: &'static str,
    pub(crate) old: bool,
    pub(crate) new: bool,
}

impl View {
    /// The view a `StreamViewType` names; both images if it names none of the four.
    pub(crate) fn named(name: &str) -> Self {
        let (name, old, new) = match name {
            "KEYS_ONLY" => ("KEYS_ONLY", false, false),
            "NEW_IMAGE" => ("NEW_IMAGE", false, true),
            "OLD_IMAGE" => ("OLD_IMAGE", true, false),
            _ => ("NEW_AND_OLD_IMAGES", true, true),
        };
        Self { name, old, new }
    }
}

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) arn: String,
    pub(crate) label: String,
    pub(crate) table: String,
    pub(crate) table_id: String,
    pub(crate) schema: KeySchema,
    pub(crate) view: View,
    pub(crate) created_ms: i64,
    state: Mutex<State>,
    /// The last number taken over from the database's stream; whoever holds it takes over.
    taken: Mutex<i64>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) tree: ShardTree,
    /// When the stream was disabled, or its table deleted.
    pub(crate) disabled_ms: Option<i64>,
    /// The next split by schedule is due.
    pub(crate) split_ms: i64,
}

/// What a stream is made with.
pub(crate) struct StreamParts {
    pub(crate) arn: String,
    pub(crate) label: String,
    pub(crate) table: String,
    pub(crate) table_id: String,
    pub(crate) schema: KeySchema,
    pub(crate) view: View,
    pub(crate) created_ms: i64,
    pub(crate) tree: ShardTree,
    /// Records of the database up to this number are not of this stream.
    pub(crate) taken: i64,
}

impl Stream {
    pub(crate) fn new(parts: StreamParts) -> Self {
        Self {
            arn: parts.arn,
            label: parts.label,
            table: parts.table,
            table_id: parts.table_id,
            schema: parts.schema,
            view: parts.view,
            created_ms: parts.created_ms,
            state: Mutex::new(State {
                tree: parts.tree,
                disabled_ms: None,
                split_ms: parts.created_ms,
            }),
            taken: Mutex::new(parts.taken),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn taken(&self) -> MutexGuard<'_, i64> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.state().disabled_ms.is_none()
    }

    /// Closes it for good: its records stay readable until they are trimmed.
    pub(crate) fn disable(&self, now_ms: i64) {
        let mut state = self.state();
        if state.disabled_ms.is_none() {
            state.tree.close(now_ms);
            state.disabled_ms = Some(now_ms);
        }
    }
}
