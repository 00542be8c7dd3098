//! The state table: reading rows, and writing them on condition.

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::row::{
    BUDGET_KEY, BudgetRow, ControlRow, Counted, FORMAT_VERSION, GapRow, Head, JobRow,
    KEY_ATTRIBUTE, PauseRow, ReconcileRow, Row, ShardRow, StreamRow, TrackRow, TtlRow, UndoRow,
    WorkerRow,
};
use crate::dynamo::value::Item;
use crate::error::{Class, Fault, NEWER_ROW, Operation, UNREADABLE_ROW, classify};
use crate::mutation::crash;

/// Pages of a scan; a state table beyond this is not believed.
const SCAN_PAGES_MAX: usize = 10_000;

/// The state table of one region.
#[derive(Clone)]
pub struct StateTable {
    client: Client,
    name: String,
}

/// How a conditional write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// The row is written.
    Yes,
    /// The condition did not hold; nothing changed.
    Refused,
}

impl StateTable {
    /// The table `name` behind `client`.
    pub fn new(client: Client, name: String) -> Self {
        Self { client, name }
    }

    /// The table's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All rows, read consistently.
    ///
    /// # Errors
    /// The fault of the call, or a row of a newer version or of a form this one cannot read.
    pub async fn rows(&self) -> Result<Vec<Row>, Fault> {
        let mut rows = Vec::new();
        let mut after = None;
        for _ in 0..SCAN_PAGES_MAX {
            let page = self
                .client
                .scan()
                .table_name(&self.name)
                .consistent_read(true)
                .set_exclusive_start_key(after.take())
                .send()
                .await
                .map_err(|error| classify(Operation::State, &error))?;
            for item in page.items.unwrap_or_default() {
                rows.push(row_from(item)?);
            }
            after = page.last_evaluated_key.filter(|key| !key.is_empty());
            if after.is_none() {
                return Ok(rows);
            }
        }
        Err(unreadable("the state table does not end"))
    }

    /// One shard's row, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn shard(&self, key: &str) -> Result<Option<ShardRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Shard(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a shard's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// A stream's row, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn stream(&self, key: &str) -> Result<Option<StreamRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Stream(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a stream's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// A worker's row, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn worker(&self, key: &str) -> Result<Option<WorkerRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Worker(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a worker's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// The control record, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn control(&self) -> Result<Option<ControlRow>, Fault> {
        match self.get(super::row::CONTROL_KEY).await? {
            Some(Row::Control(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("the control key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// The pause of `table`, or of all tables, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn pause(&self, table: Option<&str>) -> Result<Option<PauseRow>, Fault> {
        match self.get(&PauseRow::key(table)).await? {
            Some(Row::Pause(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a pause's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// A job's row, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn job(&self, key: &str) -> Result<Option<JobRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Job(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a job's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// What the source of `table` expires, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn ttl(&self, table: &str) -> Result<Option<TtlRow>, Fault> {
        match self.get(&TtlRow::key_of(table)).await? {
            Some(Row::Ttl(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable(
                "the key of a time to live holds another kind of row",
            )),
            None => Ok(None),
        }
    }

    /// How far something is read, by the row's key, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn track(&self, key: &str) -> Result<Option<TrackRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Capture(row) | Row::Ledger(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable(
                "the key of what is read holds another kind of row",
            )),
            None => Ok(None),
        }
    }

    /// What was sent to take late writes of a key back, by the row's key, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn undo(&self, key: &str) -> Result<Option<UndoRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Undo(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable(
                "the key of what was taken back holds another kind of row",
            )),
            None => Ok(None),
        }
    }

    /// The row of a gap, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn gap(&self, key: &str) -> Result<Option<GapRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Gap(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a gap's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// The row of a comparison, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn reconcile(&self, key: &str) -> Result<Option<ReconcileRow>, Fault> {
        match self.get(key).await? {
            Some(Row::Reconcile(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("a comparison's key holds another kind of row")),
            None => Ok(None),
        }
    }

    /// The row of the write budgets, read consistently.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub async fn budget(&self) -> Result<Option<BudgetRow>, Fault> {
        match self.get(BUDGET_KEY).await? {
            Some(Row::Budget(row)) => Ok(Some(row)),
            Some(_) => Err(unreadable("the budget's key holds another kind of row")),
            None => Ok(None),
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Row>, Fault> {
        let answer = self
            .client
            .get_item()
            .table_name(&self.name)
            .key(KEY_ATTRIBUTE, AttributeValue::S(key.to_owned()))
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| classify(Operation::State, &error))?;
        answer.item.map(row_from).transpose()
    }

    /// Writes a row that is not there yet.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn create(&self, row: &impl Serialize) -> Result<Written, Fault> {
        self.put(row, "attribute_not_exists(leaseKey)", None).await
    }

    /// Replaces a row if its counter is still `known_counter`.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn replace(&self, row: &impl Counted, known_counter: u64) -> Result<Written, Fault> {
        let known = AttributeValue::N(known_counter.to_string());
        self.put(row, "leaseCounter = :known", Some(known)).await
    }

    /// Replaces the control record, or makes it where none is `known`: only if it is still in the epoch and
    /// at the counter of `known`. An epoch never goes back.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn replace_control(
        &self,
        row: &ControlRow,
        known: Option<&ControlRow>,
    ) -> Result<Written, Fault> {
        let Some(known) = known else {
            return self.create(row).await;
        };
        // Records of before this was counted have no counter.
        let counted = match known.lease_counter {
            0 => "(attribute_not_exists(leaseCounter) OR leaseCounter = :counter)",
            _ => "leaseCounter = :counter",
        };
        let number = |number: u64| AttributeValue::N(number.to_string());
        let condition = format!("epoch = :epoch AND active = :active AND {counted}");
        let values = [
            (":epoch".to_owned(), number(known.epoch)),
            (":counter".to_owned(), number(known.lease_counter)),
            (
                ":active".to_owned(),
                AttributeValue::S(known.active.clone()),
            ),
        ];
        self.put_if(row, &condition, values.into()).await
    }

    /// Moves the counter of a held row that is no lease, so that no renewal of its holder succeeds; nothing
    /// else of it changes.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn bump(&self, key: &str, known_counter: u64) -> Result<Written, Fault> {
        let number = |number: u64| AttributeValue::N(number.to_string());
        let answer = self
            .client
            .update_item()
            .table_name(&self.name)
            .key(KEY_ATTRIBUTE, AttributeValue::S(key.to_owned()))
            .update_expression("SET leaseCounter = :next")
            .condition_expression("leaseCounter = :known")
            .expression_attribute_values(":next", number(known_counter + 1))
            .expression_attribute_values(":known", number(known_counter))
            .send()
            .await;
        match answer {
            Ok(_) => Ok(Written::Yes),
            Err(error) => refused_or(classify(Operation::State, &error)),
        }
    }

    /// Replaces a stream's row if it is there.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn replace_stream(&self, row: &StreamRow) -> Result<Written, Fault> {
        self.put(row, "attribute_exists(leaseKey)", None).await
    }

    /// Deletes a row if its counter is still that of `row`. One that is gone already is as good.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn delete(&self, row: &impl Counted) -> Result<Written, Fault> {
        self.remove_counted(row.key(), row.counter()).await
    }

    /// Closes the gap with this key if it was not found again since its counter was `counter`.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn close_gap(&self, key: &str, counter: u64) -> Result<Written, Fault> {
        self.remove_counted(key, counter).await
    }

    async fn remove_counted(&self, key: &str, counter: u64) -> Result<Written, Fault> {
        let known = AttributeValue::N(counter.to_string());
        let condition = "attribute_not_exists(leaseKey) OR leaseCounter = :known";
        self.remove(key, condition, Some(known)).await
    }

    /// Deletes a row without a counter. Refused if it is not there.
    ///
    /// # Errors
    /// The fault of the call. Its effect is then unknown.
    pub async fn delete_key(&self, key: &str) -> Result<Written, Fault> {
        self.remove(key, "attribute_exists(leaseKey)", None).await
    }

    async fn remove(
        &self,
        key: &str,
        condition: &str,
        known: Option<AttributeValue>,
    ) -> Result<Written, Fault> {
        let mut request = self
            .client
            .delete_item()
            .table_name(&self.name)
            .key(KEY_ATTRIBUTE, AttributeValue::S(key.to_owned()))
            .condition_expression(condition);
        if let Some(known) = known {
            request = request.expression_attribute_values(":known", known);
        }
        match request.send().await {
            Ok(_) => Ok(Written::Yes),
            Err(error) => refused_or(classify(Operation::State, &error)),
        }
    }

    async fn put(
        &self,
        row: &impl Serialize,
        condition: &str,
        known: Option<AttributeValue>,
    ) -> Result<Written, Fault> {
        let values = known.map(|known| (":known".to_owned(), known));
        self.put_if(row, condition, values.into_iter().collect())
            .await
    }

    async fn put_if(
        &self,
        row: &impl Serialize,
        condition: &str,
        values: Item,
    ) -> Result<Written, Fault> {
        let item: Item = serde_dynamo::to_item(row)
            .map_err(|error| unreadable(&format!("a row could not be written: {error}")))?;
        let request = self
            .client
            .put_item()
            .table_name(&self.name)
            .set_item(Some(item))
            .set_expression_attribute_values((!values.is_empty()).then_some(values))
            .condition_expression(condition);
        match request.send().await {
            Ok(_) => Ok(Written::Yes),
            Err(error) => refused_or(classify(Operation::State, &error)),
        }
    }
}

/// A condition that did not hold is an answer, not a fault.
fn refused_or(fault: Fault) -> Result<Written, Fault> {
    match fault.class {
        Class::Condition => Ok(Written::Refused),
        _ => Err(fault),
    }
}

fn row_from(item: Item) -> Result<Row, Fault> {
    let head: Head = parse(item.clone())?;
    if head.format_version > FORMAT_VERSION {
        return Err(Fault::own(
            Operation::State,
            Class::Unknown,
            NEWER_ROW,
            format!(
                "the row {} has format {}, and this version reads up to {FORMAT_VERSION}: upgrade Farshore here",
                head.lease_key, head.format_version
            ),
        ));
    }
    Ok(match head.entity_type.as_str() {
        "shard" => Row::Shard(parse(item)?),
        "stream" => Row::Stream(parse(item)?),
        "control" => Row::Control(parse(item)?),
        "gap" => Row::Gap(parse(item)?),
        "worker" => Row::Worker(parse(item)?),
        "doubt" => Row::Doubt(parse(item)?),
        "pause" => Row::Pause(parse(item)?),
        "job" => Row::Job(parse(item)?),
        "reconcile" => Row::Reconcile(parse(item)?),
        "segment" => Row::Segment(parse(item)?),
        "budget" => Row::Budget(parse(item)?),
        "ttl" => Row::Ttl(parse(item)?),
        "undo" => Row::Undo(parse(item)?),
        "past-doubt" => Row::PastDoubt(parse(item)?),
        "capture" => Row::Capture(parse(item)?),
        "ledger" => Row::Ledger(parse(item)?),
        _ => Row::Other(head),
    })
}

fn parse<T: DeserializeOwned>(item: Item) -> Result<T, Fault> {
    serde_dynamo::from_item(item)
        .map_err(|error| unreadable(&format!("a row could not be read: {error}")))
}

fn unreadable(message: &str) -> Fault {
    Fault::own(Operation::State, Class::Unknown, UNREADABLE_ROW, message)
}

/// Stores a gap, or that one which stands already was found again: who repairs the earlier one must
/// not close this one. Returns the row as it is stored.
///
/// # Errors
/// The fault of the call.
pub async fn record_gap(state: &StateTable, gap: &GapRow) -> Result<GapRow, Fault> {
    loop {
        if state.create(gap).await? == Written::Yes {
            crash("gap-stored");
            return Ok(gap.clone());
        }
        let Some(known) = state.gap(&gap.lease_key).await? else {
            continue;
        };
        let again = known.found_again(gap);
        if state.replace(&again, known.lease_counter).await? == Written::Yes {
            crash("gap-stored");
            return Ok(again);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::row::GapReason;
    use crate::stream::ShardId;
    use crate::stream::reader::Position;

    #[test]
    fn rows_survive_the_round_trip_with_kcls_names() {
        let shard = ShardId("shardId-1".into());
        let parent = ShardId("shardId-0".into());
        let row = ShardRow::new(
            3,
            "orders",
            "arn:aws:dynamodb:us-east-1:1:table/orders/stream/2026",
            &shard,
            Some(&parent),
            &Position::AtTimestamp(1_000),
            7,
        );
        assert_eq!(row.lease_key, "shard#3#orders#2026#shardId-1");
        let item: Item = serde_dynamo::to_item(&row).unwrap();
        assert_eq!(
            item["parentShardId"],
            AttributeValue::Ss(vec!["shardId-0".into()])
        );
        assert_eq!(item["checkpoint"], AttributeValue::S("AT_TIMESTAMP".into()));
        for name in [
            "leaseKey",
            "leaseCounter",
            "ownerSwitchesSinceCheckpoint",
            "entityType",
            "formatVersion",
        ] {
            assert!(item.contains_key(name), "{name}");
        }
        assert!(!item.contains_key("leaseOwner") && !item.contains_key("childShardIds"));
        assert_eq!(row_from(item).unwrap(), Row::Shard(row));
        let gap = GapRow::new(1, "orders", GapReason::NeverCopied, "l", "now".into());
        let item: Item = serde_dynamo::to_item(&gap).unwrap();
        assert_eq!(row_from(item).unwrap(), Row::Gap(gap));
    }

    #[test]
    fn a_row_of_a_newer_version_is_refused() {
        let gap = GapRow::new(1, "orders", GapReason::Trimmed, "", "now".into());
        let mut item: Item = serde_dynamo::to_item(&gap).unwrap();
        item.insert("formatVersion".into(), AttributeValue::N("2".into()));
        assert!(row_from(item).unwrap_err().message.contains("upgrade"));
    }
}
