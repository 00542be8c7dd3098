//! What is not applied, for a person: one JSON line for each stranded write, with both values.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::{Value, json};

use super::judge::{Class, Fate};
use super::store::Stranded;
use crate::dynamo::clock::rfc3339;
use crate::dynamo::json::item_to_json;
use crate::dynamo::value::Item;
use crate::error::Failure;

/// A file of lines, readable by its owner only: it holds items. What is in it already stays.
pub struct Lines {
    file: BufWriter<File>,
    path: String,
    /// Lines that were written.
    pub written: u64,
}

/// One line.
pub struct Line<'a> {
    /// The table.
    pub table: &'a str,
    /// The region in which it is stranded.
    pub region: &'a str,
    /// The write.
    pub stranded: &'a Stranded,
    /// What the active region holds.
    pub active: Option<&'a Item>,
    /// How both stand to each other.
    pub class: Class,
    /// What becomes of it.
    pub fate: Fate,
    /// Why, where that is not what was asked for.
    pub why: Option<&'a str>,
}

impl Lines {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let name = path.display().to_string();
        let open = || {
            let mut options = OpenOptions::new();
            options.create(true).append(true).read(true).mode(0o600);
            let mut file = options.open(path)?;
            // One that was there already may have been readable by others.
            file.set_permissions(Permissions::from_mode(0o600))?;
            // A line that was cut off must not swallow the next one.
            if file.metadata()?.len() > 0 {
                let mut last = [0];
                file.seek(SeekFrom::End(-1))?;
                file.read_exact(&mut last)?;
                if last != *b"\n" {
                    file.write_all(b"\n")?;
                }
            }
            if let Some(directory) = path.parent().filter(|parent| parent.is_dir()) {
                File::open(directory)?.sync_all()?;
            }
            Ok(file)
        };
        let file = open().map_err(|error: std::io::Error| failed(&name, &error))?;
        Ok(Self {
            file: BufWriter::new(file),
            path: name,
            written: 0,
        })
    }

    /// Writes a line.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn write(&mut self, line: &Line<'_>) -> Result<(), Failure> {
        let value = |item: Option<&Item>| item.map_or(Value::Null, item_to_json);
        let line = json!({
            "table": line.table,
            "region": line.region,
            "key": item_to_json(&line.stranded.keys),
            "class": line.class.label(),
            "fate": line.fate.label(),
            "why": line.why,
            "at": rfc3339(line.stranded.at_ms),
            "writes": line.stranded.writes,
            "foundBy": match line.stranded.sequence.is_empty() {
                true => "compare",
                false => "stream",
            },
            "stranded": value(line.stranded.image.as_ref()),
            "active": value(line.active),
        });
        self.written += 1;
        let written = serde_json::to_writer(&mut self.file, &line).map_err(std::io::Error::from);
        let written = written.and_then(|()| self.file.write_all(b"\n"));
        written.map_err(|error| failed(&self.path, &error))
    }

    /// Makes sure that what was written outlasts this machine's next moment.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn sync(&mut self) -> Result<(), Failure> {
        let synced = self
            .file
            .flush()
            .and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|error| failed(&self.path, &error))
    }
}

fn failed(path: &str, error: &std::io::Error) -> Failure {
    Failure::new(
        format!("The report {path} could not be written"),
        error.to_string(),
        "Name a file that can be written with --report, and type the same command again: nothing is dropped that is not in a report",
    )
}
