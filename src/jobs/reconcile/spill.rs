//! Keys kept on the disk until they are wanted: deletes wait for the end of the scan, and there may
//! be many. Each with a number, which says to whoever wants it where it was found.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::dynamo::item::ItemKey;

/// A file without a name, which goes with the process.
pub(super) struct Spill {
    file: BufWriter<File>,
}

impl Spill {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            file: BufWriter::new(tempfile::tempfile()?),
        })
    }

    pub(super) fn push(&mut self, key: &ItemKey, number: u64) -> std::io::Result<()> {
        writeln!(
            self.file,
            "{number} {}",
            BASE64_STANDARD.encode(key.as_bytes())
        )
    }

    /// All of them, in the order in which they came.
    pub(super) fn read(self) -> std::io::Result<Spilled> {
        let mut file = self
            .file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        let lines = BufReader::new(file).lines();
        Ok(Box::new(lines.map(|line| {
            let line = line?;
            let cut = || std::io::Error::other("a line of a temporary file is cut short");
            let (number, key) = line.split_once(' ').ok_or_else(cut)?;
            let number = number.parse().map_err(std::io::Error::other)?;
            let bytes = BASE64_STANDARD.decode(key).map_err(std::io::Error::other)?;
            Ok((ItemKey::from_bytes(&bytes), number))
        })))
    }
}

/// What was spilled, with its numbers.
pub(super) type Spilled = Box<dyn Iterator<Item = std::io::Result<(ItemKey, u64)>> + Send + Sync>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_as_they_went() {
        let keys: Vec<ItemKey> = (0u16..500)
            .map(|id| ItemKey::from_bytes(&[id.to_be_bytes().as_slice(), b"\n\0x"].concat()))
            .collect();
        let mut spill = Spill::new().unwrap();
        for (number, key) in keys.iter().enumerate() {
            spill.push(key, number as u64).unwrap();
        }
        let back: Result<Vec<(ItemKey, u64)>, _> = spill.read().unwrap().collect();
        let numbered: Vec<_> = keys.into_iter().zip(0..).collect();
        assert_eq!(back.unwrap(), numbered);
    }
}
