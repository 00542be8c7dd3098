//! The control record: which region is active, and how far a change of it has come.

use serde::{Deserialize, Serialize};

use super::{CONTROL_KEY, Counted, FORMAT_VERSION};

/// What a control record says is under way.
pub mod state {
    /// Nothing: data flows from the active region.
    pub const STEADY: &str = "steady";
    /// A planned switchover is near: writes to the active region should wait.
    pub const CLOSING: &str = "closing";
    /// A new epoch has begun, and the writers of the old one are being stopped.
    pub const FENCING: &str = "fencing";
    /// They are stopped; the actions run.
    pub const ACTIONS: &str = "actions";
    /// Everything is done, and writes of the old epoch that take effect late are looked for.
    pub const WATCHING: &str = "watching";
    /// A copy in a region that was active itself: nothing is written there.
    pub const QUARANTINED: &str = "quarantined";
    /// A copy of several records of one epoch that name different regions: nobody applies.
    pub const CONFLICT: &str = "conflict";
}

/// Epochs that a record remembers.
pub const PAST_MAX: usize = 16;

/// The active region before, and its epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Previous {
    /// Its label.
    pub active: String,
    /// Number of the epoch.
    pub epoch: u64,
}

/// A step of a failover that is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StepDone {
    /// Its name.
    pub step: String,
    /// When, by the clock of the region of the state table, in milliseconds.
    pub at_ms: i64,
    /// What there is to say of it, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// An action that somebody runs now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActionRun {
    /// The action's name.
    pub name: String,
    /// Who runs it, with a nonce of the process start.
    pub by: String,
}

/// `control`: which region is active, and since which epoch. The record that counts lies in the state
/// table of the region that it makes active; others hold copies of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControlRow {
    /// Hash key.
    pub lease_key: String,
    /// `control`.
    pub entity_type: String,
    /// Version of the row's form.
    pub format_version: u32,
    /// The group it belongs to.
    pub group: String,
    /// Label of the active region.
    pub active: String,
    /// Number of the epoch; grows with every change of the active region.
    pub epoch: u64,
    /// Name of the epoch: number and target.
    pub epoch_label: String,
    /// One of [`state`].
    pub state: String,
    /// Who wrote it.
    pub by: String,
    /// Why.
    pub reason: String,
    /// When, RFC 3339.
    pub at: String,
    /// Grows with every update within its epoch. A copy has that of the record it was made of.
    #[serde(default)]
    pub lease_counter: u64,
    /// The active region before; absent in the first epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
    /// The epochs before, as far as they are known, oldest first; at most [`PAST_MAX`] of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub past: Vec<Previous>,
    /// Labels of regions that were active and may hold writes that never left: nobody writes there.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub quarantined: Vec<String>,
    /// Labels of regions that came home in this epoch: what they held is captured, and they are fed again.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub returned: Vec<String>,
    /// Of a copy of several records of one epoch: the regions they name.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub rivals: Vec<String>,
    /// What is done of a failover to this epoch, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepDone>,
    /// While it says [`state::CLOSING`]: until when, by the clock of the region of the state table, in
    /// milliseconds. What has not changed it by then is dead, and it counts as [`state::STEADY`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closing_until: Option<i64>,
    /// Names of the actions that are done.
    #[serde(
        default,
        with = "serde_dynamo::string_set",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub actions: Vec<String>,
    /// The action under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<ActionRun>,
}

impl ControlRow {
    /// The first record of a group: epoch 1, `active` from the configuration.
    pub fn first(group: &str, active: &str, by: &str, at: String) -> Self {
        Self {
            lease_key: CONTROL_KEY.to_owned(),
            entity_type: "control".to_owned(),
            format_version: FORMAT_VERSION,
            group: group.to_owned(),
            active: active.to_owned(),
            epoch: 1,
            epoch_label: format!("1-{active}"),
            state: state::STEADY.to_owned(),
            by: by.to_owned(),
            reason: "provisioned".to_owned(),
            at,
            lease_counter: 0,
            previous: None,
            past: Vec::new(),
            quarantined: Vec::new(),
            returned: Vec::new(),
            rivals: Vec::new(),
            steps: Vec::new(),
            closing_until: None,
            actions: Vec::new(),
            running: None,
        }
    }

    /// Whether the region `label` came home in this epoch, and all of that is done.
    pub fn is_home(&self, label: &str) -> bool {
        self.has_returned(label) && self.done_ms(&format!("home:{label}")).is_some()
    }

    /// When the application of the active region may have begun to write, in milliseconds; `None` where nobody
    /// remembers.
    pub fn begun_ms(&self) -> Option<i64> {
        let steps = ["begun-first", "begun"];
        steps.iter().find_map(|step| self.done_ms(step))
    }

    /// Whether the region `label` came home in this epoch.
    pub fn has_returned(&self, label: &str) -> bool {
        self.returned.iter().any(|one| one == label)
    }

    /// When `step` was done, in milliseconds; `None` if it was not.
    pub fn done_ms(&self, step: &str) -> Option<i64> {
        let mut steps = self.steps.iter();
        steps.find(|done| done.step == step).map(|done| done.at_ms)
    }

    /// The same, steady again: the planned switchover that asked writes to wait was given up.
    #[must_use]
    pub fn reopened(&self) -> Self {
        let mut row = self.clone();
        state::STEADY.clone_into(&mut row.state);
        row.closing_until = None;
        row.steps.clear();
        row.lease_counter += 1;
        row
    }

    /// Takes note that `step` is done. Once noted it stays so.
    pub fn note(&mut self, step: &str, at_ms: i64, note: impl Into<String>) {
        if self.done_ms(step).is_none() {
            self.steps.push(StepDone {
                step: step.to_owned(),
                at_ms,
                note: note.into(),
            });
        }
    }
}

impl Counted for ControlRow {
    fn key(&self) -> &str {
        &self.lease_key
    }

    fn counter(&self) -> u64 {
        self.lease_counter
    }
}
