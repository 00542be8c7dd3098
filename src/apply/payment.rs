//! What a call is paid with, and what of it comes back.
//!
//! | answer | what it took |
//! | --- | --- |
//! | applied, and the service says the units | those |
//! | applied, and it says nothing | what was estimated by size |
//! | unprocessed, throttled, refused, never left | nothing |
//! | none, or a 5xx | what was estimated: it may have happened |

use std::sync::Arc;
use std::time::Duration;

use aws_sdk_dynamodb::operation::batch_write_item::BatchWriteItemError;
use aws_sdk_dynamodb::operation::delete_item::DeleteItemError;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::ThrottlingReason;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;

use super::budget::{Budget, Charge};
use super::coalesce::Op;
use crate::dynamo::clock::uptime;
use crate::dynamo::transmit::Bound;

/// What throttling is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strain {
    /// One range of keys: who writes elsewhere is not concerned.
    Keys,
    /// The table, one of its indexes or the account; or nobody says.
    Table,
}

/// The name of the limit of one range of keys within a reason, whatever it is of.
const KEY_RANGE: &str = "KeyRangeThroughputExceeded";

impl Strain {
    fn of(reasons: &[ThrottlingReason]) -> Self {
        let of_keys = |reason: &ThrottlingReason| {
            let reason = reason.reason.as_deref();
            reason.is_some_and(|reason| reason.ends_with(KEY_RANGE))
        };
        match !reasons.is_empty() && reasons.iter().all(of_keys) {
            true => Self::Keys,
            false => Self::Table,
        }
    }

    /// What a batch was throttled for.
    pub fn of_batch(error: &SdkError<BatchWriteItemError, HttpResponse>) -> Self {
        use BatchWriteItemError as E;
        Self::of(match error.as_service_error() {
            Some(E::ProvisionedThroughputExceededException(error)) => error.throttling_reasons(),
            Some(E::ThrottlingException(error)) => error.throttling_reasons(),
            Some(E::RequestLimitExceeded(error)) => error.throttling_reasons(),
            _ => &[],
        })
    }

    /// What a put was throttled for.
    pub fn of_put(error: &SdkError<PutItemError, HttpResponse>) -> Self {
        use PutItemError as E;
        Self::of(match error.as_service_error() {
            Some(E::ProvisionedThroughputExceededException(error)) => error.throttling_reasons(),
            Some(E::ThrottlingException(error)) => error.throttling_reasons(),
            Some(E::RequestLimitExceeded(error)) => error.throttling_reasons(),
            _ => &[],
        })
    }

    /// What a delete was throttled for.
    pub fn of_delete(error: &SdkError<DeleteItemError, HttpResponse>) -> Self {
        use DeleteItemError as E;
        Self::of(match error.as_service_error() {
            Some(E::ProvisionedThroughputExceededException(error)) => error.throttling_reasons(),
            Some(E::ThrottlingException(error)) => error.throttling_reasons(),
            Some(E::RequestLimitExceeded(error)) => error.throttling_reasons(),
            _ => &[],
        })
    }
}

/// A call that is paid for and not answered. Where it is dropped, what was paid counts as used: the call
/// may have left.
#[must_use]
pub struct Payment<'a> {
    lane: &'a Budget,
    budget: &'a Budget,
    charge: Charge,
    price: f64,
    /// When it was paid, as this machine's uptime.
    at: Duration,
}

impl<'a> Payment<'a> {
    /// Pays for the first of `ops`, one at least: to the lane, whose turn may be long in coming, then to the
    /// table's budget.
    pub async fn make(lane: &'a Budget, budget: &'a Budget, ops: &[Op]) -> Self {
        let units: Vec<f64> = ops.iter().map(|op| f64::from(op.change.units)).collect();
        Self::of(lane, budget, &units).await
    }

    /// Pays for the first of some writes, given by their units by size.
    pub async fn of(lane: &'a Budget, budget: &'a Budget, units: &[f64]) -> Self {
        let price = budget.price();
        let costs: Vec<f64> = units.iter().map(|units| units * price).collect();
        let reserved = Reserved {
            lane,
            charge: lane.take(&costs).await,
        };
        let charge = budget.take(&costs[..reserved.charge.count]).await;
        reserved.keep(charge.units);
        Self {
            lane,
            budget,
            charge,
            price,
            at: uptime(),
        }
    }

    /// How many it is for.
    pub fn count(&self) -> usize {
        self.charge.count
    }

    /// It was answered: those of `ops` at the places `unprocessed` were not written. `told`: the units that
    /// the service says it took, 0 where it says nothing. Returns the units it took.
    pub fn answered(self, ops: &[Op], unprocessed: &[usize], told: f64) -> f64 {
        let processed = ops.iter().enumerate();
        let processed = processed.filter(|(place, _)| !unprocessed.contains(place));
        let units = processed.map(|(_, op)| f64::from(op.change.units)).sum();
        // Who is short of capacity for some keys may have plenty for others, and a part sent back gives no
        // reason. Were it the table's, every lane would find out by itself; the other way round shards
        // would wait that have nothing to do with it.
        if !unprocessed.is_empty() {
            self.lane.throttled(self.at);
        }
        self.took(units, told)
    }

    /// It took `told` units for a write of `units` by size; where the service says nothing, those at their
    /// price. Returns what it took.
    pub fn took(self, units: f64, told: f64) -> f64 {
        let used = match told > 0.0 {
            true => told,
            false => units * self.price,
        };
        if told > 0.0 {
            self.budget.learn(units, told);
        }
        self.settle(used);
        used
    }

    /// It was throttled, and took nothing.
    pub fn throttled(self, strain: Strain) {
        match strain {
            Strain::Keys => self.lane.throttled(self.at),
            Strain::Table => self.budget.throttled(self.at),
        }
        self.settle(0.0);
    }

    /// It did not leave, or was refused: it took nothing.
    pub fn give_back(self) {
        self.settle(0.0);
    }

    fn settle(&self, used: f64) {
        self.lane.settle(self.charge.units, Some(used));
        self.budget.settle(self.charge.units, Some(used));
    }
}

/// What was taken from a lane and is given back, unless the table has units for it.
struct Reserved<'a> {
    lane: &'a Budget,
    charge: Charge,
}

impl Reserved<'_> {
    fn keep(mut self, units: f64) {
        let all = std::mem::replace(&mut self.charge.units, 0.0);
        self.lane.settle(all, Some(units));
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.charge.units > 0.0 {
            self.lane.settle(self.charge.units, Some(0.0));
        }
    }
}

/// The right to write, for as long as there is a share of the write budget to write with.
pub struct Funded {
    bound: Arc<dyn Bound>,
    budget: Arc<Budget>,
}

impl Funded {
    /// `bound`, no longer than the share of `budget`.
    pub fn within(bound: &Arc<dyn Bound>, budget: &Arc<Budget>) -> Arc<dyn Bound> {
        if !budget.is_shared() {
            return Arc::clone(bound);
        }
        Arc::new(Self {
            bound: Arc::clone(bound),
            budget: Arc::clone(budget),
        })
    }
}

impl Bound for Funded {
    fn remaining(&self) -> Duration {
        self.bound.remaining().min(self.budget.remaining())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_throttled_for_its_keys_alone_slows_its_lane() {
        let reasons = |names: &[&str]| -> Vec<ThrottlingReason> {
            let reason = |name: &&str| ThrottlingReason::builder().reason(*name).build();
            names.iter().map(reason).collect()
        };
        let keys = "TableWriteKeyRangeThroughputExceeded";
        for (names, strain) in [
            (vec![keys], Strain::Keys),
            (
                vec![keys, "IndexWriteKeyRangeThroughputExceeded"],
                Strain::Keys,
            ),
            (
                vec!["TableWriteProvisionedThroughputExceeded"],
                Strain::Table,
            ),
            (
                vec!["TableWriteMaxOnDemandThroughputExceeded"],
                Strain::Table,
            ),
            (vec!["TableWriteAccountLimitExceeded"], Strain::Table),
            (vec![keys, "TableWriteAccountLimitExceeded"], Strain::Table),
            (vec!["SomethingNew"], Strain::Table),
            (vec![], Strain::Table),
        ] {
            assert_eq!(Strain::of(&reasons(&names)), strain, "{names:?}");
        }
    }
}
