//! Keys kept on the disk until they are wanted: deletes wait for the end of the scan, and there may
//! be many.

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

    pub(super) fn push(&mut self, key: &ItemKey) -> std::io::Result<()> {
        writeln!(self.file, "{}", BASE64_STANDARD.encode(key.as_bytes()))
    }

    /// All of them, in the order in which they came.
    pub(super) fn read(self) -> std::io::Result<impl Iterator<Item = std::io::Result<ItemKey>>> {
        let mut file = self
            .file
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        let lines = BufReader::new(file).lines();
        Ok(lines.map(|line| {
            let bytes = BASE64_STANDARD.decode(line?);
            bytes
                .map(|bytes| ItemKey::from_bytes(&bytes))
                .map_err(std::io::Error::other)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_as_they_went() {
        let keys: Vec<ItemKey> = (0u16..500)
            .map(|id| ItemKey::from_bytes(&[id.to_be_bytes().as_slice(), b"\n\0x"].concat()))
            .collect();
        let mut spill = Spill::new().unwrap();
        for key in &keys {
            spill.push(key).unwrap();
        }
        let back: Result<Vec<ItemKey>, _> = spill.read().unwrap().collect();
        assert_eq!(back.unwrap(), keys);
    }
}
