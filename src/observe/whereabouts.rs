//! Which region is active, as this worker knows it. What applications and load balancers go by
//! ([`active`](super::active)), so it is right or it says that it does not know.
//!
//! ```text
//!   a reading of the control records ─▶ set ─▶ Known ─┬▶ younger than a lease: the answer
//!   a reading that failed ─▶ unknown ─▶ why ──────────┴▶ older: nobody can say, and why
//! ```
//!
//! The highest epoch that was ever seen counts: a reading that lacks it, because the region that holds
//! its record is away, takes nothing back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::config::Config;
use crate::config::read::Loaded;
use crate::dynamo::Regions;
use crate::dynamo::clock::uptime;
use crate::lease::row::state::{CONFLICT, STEADY};

/// In these states the active region may be written to: the fence of its epoch is complete. In every
/// other, known or not, an old flow may still write there, writes are asked to wait, or nobody knows who
/// may.
const SERVING: [&str; 3] = [STEADY, "actions", "watching"];

/// Requests that wait for a change at once.
const WAITERS_MAX: usize = 256;

/// What a reading of the control records said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Label of the active region.
    pub active: String,
    /// Number of the epoch.
    pub epoch: u64,
    /// State of the control record: `steady`, `closing`, `fencing`, `actions`, `watching`, `conflict`,
    /// `quarantined`.
    pub state: String,
    /// When the reading began, by [`uptime`].
    pub read: Duration,
}

/// How a region is reached, for applications.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// AWS region name.
    pub region: String,
    /// URL of DynamoDB; `None` where the SDK's own for that region is meant.
    pub url: Option<String>,
}

#[derive(Debug, Default)]
struct Seen {
    known: Option<Known>,
    /// Why the last reading said nothing.
    trouble: Option<String>,
}

/// What is the same for as long as the worker runs.
#[derive(Debug)]
struct Ground {
    group: String,
    here: String,
    lease: Duration,
    endpoints: BTreeMap<String, Endpoint>,
    waiters: Arc<Semaphore>,
}

/// Which region is active. Its clones are one.
#[derive(Debug, Clone)]
pub struct Whereabouts {
    ground: Arc<Ground>,
    seen: Arc<watch::Sender<Seen>>,
}

impl Whereabouts {
    /// Of a worker in `loaded.here`, which knows nothing yet.
    pub fn new(loaded: &Loaded, regions: &Regions) -> Self {
        let endpoints = regions.iter().map(|region| {
            let url = region.endpoint_url.clone();
            let endpoint = Endpoint {
                region: region.region.clone(),
                url,
            };
            (region.label.clone(), endpoint)
        });
        Self::with(&loaded.config, &loaded.here, endpoints.collect())
    }

    /// As [`new`](Self::new), with the regions' endpoints by label.
    pub fn with(config: &Config, here: &str, endpoints: BTreeMap<String, Endpoint>) -> Self {
        let ground = Ground {
            group: config.group.clone(),
            here: here.to_owned(),
            lease: config.leases.duration,
            endpoints,
            waiters: Arc::new(Semaphore::new(WAITERS_MAX)),
        };
        Self {
            ground: Arc::new(ground),
            seen: Arc::new(watch::Sender::new(Seen::default())),
        }
    }

    /// A reading said this.
    pub fn set(&self, known: Known) {
        self.seen.send_if_modified(|seen| {
            let merged = merge(seen.known.take(), known);
            let changed = seen.trouble.take().is_some() || merged.1;
            seen.known = Some(merged.0);
            changed
        });
    }

    /// A reading said nothing, and why: one sentence without its full stop. What an earlier one said
    /// counts until it is a lease old.
    pub fn unknown(&self, why: impl Into<String>) {
        let why = why.into();
        self.seen.send_if_modified(|seen| {
            seen.trouble = Some(why);
            false
        });
    }

    /// Which region is active now.
    ///
    /// # Errors
    /// Why nobody can say.
    pub fn now(&self) -> Result<Known, String> {
        judge(&self.seen.borrow(), self.ground.lease, uptime()).cloned()
    }

    /// Told of every change.
    pub fn changes(&self) -> Changes {
        Changes(self.seen.subscribe())
    }

    /// The group.
    pub fn group(&self) -> &str {
        &self.ground.group
    }

    /// Label of the region this worker is in.
    pub fn here(&self) -> &str {
        &self.ground.here
    }

    /// How the region `label` is reached.
    pub fn endpoint(&self, label: &str) -> Option<&Endpoint> {
        self.ground.endpoints.get(label)
    }

    /// Places of those who wait for a change.
    pub(super) fn waiters(&self) -> Arc<Semaphore> {
        Arc::clone(&self.ground.waiters)
    }
}

/// Tells that something changed.
pub struct Changes(watch::Receiver<Seen>);

impl Changes {
    /// Returns once something changed since the last call, or since this value was made.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            // Nobody can change it any more.
            std::future::pending::<()>().await;
        }
    }
}

impl Known {
    /// Whether the active region may be written to.
    pub fn is_writable(&self) -> bool {
        SERVING.contains(&self.state.as_str())
    }

    /// Whether the region `here` may be written to.
    ///
    /// # Errors
    /// Why not.
    pub fn serves(&self, here: &str) -> Result<(), String> {
        if self.active != here {
            return Err(format!("the active region is {}", self.active));
        }
        match self.is_writable() {
            true => Ok(()),
            false => Err(format!(
                "the control record of epoch {} says `{}`",
                self.epoch, self.state
            )),
        }
    }
}

/// What is known after `new` was read, and whether that is something else than before.
fn merge(old: Option<Known>, new: Known) -> (Known, bool) {
    let Some(old) = old else { return (new, true) };
    let read = old.read.max(new.read);
    if new.epoch < old.epoch {
        return (Known { read, ..old }, false);
    }
    if new.epoch > old.epoch {
        return (Known { read, ..new }, true);
    }
    let state = match new.active == old.active && old.state != CONFLICT {
        true => new.state,
        // Only a higher epoch ends a conflict.
        false => CONFLICT.to_owned(),
    };
    let changed = state != old.state;
    (Known { state, read, ..old }, changed)
}

/// What counts at `now`, by [`uptime`].
fn judge(seen: &Seen, lease: Duration, now: Duration) -> Result<&Known, String> {
    let fresh = |known: &&Known| now.saturating_sub(known.read) < lease;
    if let Some(known) = seen.known.as_ref().filter(fresh) {
        return Ok(known);
    }
    let why = match (&seen.trouble, &seen.known) {
        (Some(why), _) => why.clone(),
        (None, None) => "the control record was not read yet".to_owned(),
        (None, Some(_)) => format!(
            "the control record was not read for {}",
            humantime::format_duration(lease)
        ),
    };
    Err(why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    fn known(active: &str, epoch: u64, state: &str, read_s: u64) -> Known {
        Known {
            active: active.to_owned(),
            epoch,
            state: state.to_owned(),
            read: Duration::from_secs(read_s),
        }
    }

    #[test]
    fn a_reading_counts_for_a_lease_and_no_longer() {
        let mut seen = Seen::default();
        let at = |seen: &Seen, s| judge(seen, LEASE, Duration::from_secs(s)).cloned();
        assert!(at(&seen, 0).unwrap_err().contains("not read yet"));
        seen.known = Some(known("a", 1, STEADY, 5));
        assert!(at(&seen, 14).is_ok());
        assert!(at(&seen, 15).unwrap_err().contains("not read for 10s"));
        seen.trouble = Some("access denied".to_owned());
        assert!(at(&seen, 14).is_ok(), "what was read before still counts");
        assert_eq!(at(&seen, 15), Err("access denied".to_owned()));
    }

    #[test]
    fn only_an_active_region_whose_fence_is_complete_serves() {
        for state in [STEADY, "actions", "watching"] {
            assert_eq!(known("a", 1, state, 0).serves("a"), Ok(()), "{state}");
        }
        assert!(known("a", 1, STEADY, 0).serves("b").is_err());
        for state in [
            "closing",
            "fencing",
            CONFLICT,
            "quarantined",
            "",
            "something new",
        ] {
            assert!(known("a", 1, state, 0).serves("a").is_err(), "{state}");
        }
    }

    fn any_known() -> impl Strategy<Value = Known> {
        let state = proptest::sample::select(vec![STEADY, "fencing", CONFLICT]);
        (0..2_u8, 0..4_u64, state, 0..100_u64).prop_map(|(active, epoch, state, read)| {
            known(&format!("r{active}"), epoch, state, read)
        })
    }

    proptest! {
        /// In whatever order readings come: no epoch goes back, no epoch changes its region, and one
        /// that named two serves nobody.
        #[test]
        fn what_was_seen_is_not_taken_back(readings in proptest::collection::vec(any_known(), 1..12)) {
            let mut seen: Option<Known> = None;
            let mut regions: BTreeMap<u64, String> = BTreeMap::new();
            let mut torn = std::collections::BTreeSet::new();
            for reading in readings {
                let before = seen.clone();
                let of_epoch = regions.entry(reading.epoch).or_insert_with(|| reading.active.clone());
                if *of_epoch != reading.active || reading.state == CONFLICT {
                    torn.insert(reading.epoch);
                }
                let (merged, changed) = merge(seen.take(), reading.clone());
                if let Some(before) = &before {
                    prop_assert!(merged.epoch >= before.epoch && merged.read >= before.read);
                    prop_assert!(merged.epoch > before.epoch || merged.active == before.active);
                    let same = (&merged.active, merged.epoch, &merged.state)
                        == (&before.active, before.epoch, &before.state);
                    prop_assert_eq!(changed, !same);
                }
                // Only readings of the epoch that counts can tear it: those before it came too late.
                if merged.epoch == reading.epoch && merged.state == STEADY {
                    prop_assert_eq!(&merged.active, &reading.active);
                    prop_assert!(!torn.contains(&merged.epoch));
                }
                seen = Some(merged);
            }
        }
    }
}
