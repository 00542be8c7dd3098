//! What a comparison found: numbers for a summary, lines for whoever looks into it.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::judge::{Held, Kind};
use crate::dynamo::json::item_to_json;
use crate::dynamo::value::Item;

/// What was found in one table, and done.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Counts {
    /// Items scanned in the source.
    pub source_items: u64,
    /// Items scanned in the target.
    pub target_items: u64,
    /// Read units spent in the source.
    pub source_units: f64,
    /// Read units spent in the target.
    pub target_units: f64,
    /// Keys that the scans saw differ.
    pub suspects: u64,
    /// Differences: items that only the source has.
    pub missing: u64,
    /// Differences: items that both have, not the same.
    pub changed: u64,
    /// Differences: items that only the target has.
    pub extra: u64,
    /// Keys that changed all the time, or whose changes were not applied while they were looked at.
    pub unsettled: u64,
    /// Keys that are as in the source now.
    pub repaired: u64,
    /// Keys that the target refuses to take.
    pub refused: u64,
    /// Differences that the strategy does not touch.
    pub left: u64,
    /// Keys that were being written when that was cut short: they may hold something older.
    pub unverified: u64,
}

impl std::ops::Add<&Counts> for Counts {
    type Output = Counts;

    fn add(self, other: &Counts) -> Counts {
        Counts {
            source_items: self.source_items + other.source_items,
            target_items: self.target_items + other.target_items,
            source_units: self.source_units + other.source_units,
            target_units: self.target_units + other.target_units,
            suspects: self.suspects + other.suspects,
            missing: self.missing + other.missing,
            changed: self.changed + other.changed,
            extra: self.extra + other.extra,
            unsettled: self.unsettled + other.unsettled,
            repaired: self.repaired + other.repaired,
            refused: self.refused + other.refused,
            left: self.left + other.left,
            unverified: self.unverified + other.unverified,
        }
    }
}

impl std::ops::AddAssign<&Counts> for Counts {
    fn add_assign(&mut self, other: &Counts) {
        *self = std::mem::take(self) + other;
    }
}

impl Counts {
    /// One difference.
    pub fn of(kind: Kind) -> Self {
        let mut counts = Self::default();
        match kind {
            Kind::Missing => counts.missing = 1,
            Kind::Changed => counts.changed = 1,
            Kind::Extra => counts.extra = 1,
        }
        counts
    }

    /// Differences found.
    pub fn different(&self) -> u64 {
        self.missing + self.changed + self.extra
    }

    /// Whether nothing differs any more. `lettered`: what the target refuses stands in the dead letters.
    pub fn is_whole(&self, lettered: bool) -> bool {
        let open = match lettered {
            true => {
                self.different()
                    .saturating_sub(self.repaired + self.refused)
                    + self.left
            }
            false => self.remaining(),
        };
        open + self.unsettled + self.unverified == 0
    }

    /// Differences that are still there, and keys nobody can speak for.
    pub fn remaining(&self) -> u64 {
        let open = self.different().saturating_sub(self.repaired);
        open.max(self.refused + self.left) + self.unsettled
    }
}

/// A file of one JSON line for each difference, readable by its owner only: it holds keys.
pub struct Lines {
    file: Mutex<BufWriter<File>>,
    images: bool,
}

impl Lines {
    /// A new file; `goes_on`: or the end of the one that is there. `images`: with both items, whole.
    ///
    /// # Errors
    /// It cannot be made, or is there already: a report is not written over.
    pub fn create(path: &Path, images: bool, goes_on: bool) -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        match goes_on {
            true => options.create(true).append(true),
            false => options.create_new(true).write(true),
        };
        let file = options.read(goes_on).mode(0o600).open(path)?;
        if goes_on {
            // It holds keys, whoever made it; and who died may have left half a line.
            file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
            let text = std::fs::read(path)?;
            let whole = text.iter().rposition(|byte| *byte == b'\n');
            file.set_len(whole.map_or(0, |at| at as u64 + 1))?;
        }
        Ok(Self {
            file: Mutex::new(BufWriter::new(file)),
            images,
        })
    }

    /// One difference, or a key that could not be settled (`kind` is `None`).
    pub(super) fn write(&self, line: &Line<'_>) -> std::io::Result<()> {
        let digest = |held: Held| match held {
            Held::Nothing => Value::Null,
            Held::Item(digest) => digest.map_or_else(|| json!("?"), |d| json!(d.to_string())),
        };
        let mut value = json!({
            "table": line.table,
            "key": item_to_json(line.key),
            "kind": line.kind.map_or("unsettled", Kind::label),
            "sourceDigest": digest(line.source.0),
            "targetDigest": digest(line.target.0),
        });
        if self.images {
            value["source"] = line.source.1.map_or(Value::Null, item_to_json);
            value["target"] = line.target.1.map_or(Value::Null, item_to_json);
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(file, "{value}")
    }

    /// Everything written is on the disk.
    ///
    /// # Errors
    /// It is not.
    pub fn finish(&self) -> std::io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.flush()?;
        file.get_ref().sync_all()
    }
}

/// What a line says.
pub(super) struct Line<'a> {
    pub table: &'a str,
    pub key: &'a Item,
    pub kind: Option<Kind>,
    pub source: (Held, Option<&'a Item>),
    pub target: (Held, Option<&'a Item>),
}
