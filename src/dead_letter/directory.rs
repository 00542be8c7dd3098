//! Dead letters in a directory: a file a day, one line of JSON a letter.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::message::DeadLetter;
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Class, Failure, Fault, Operation};

/// A directory of dead letters. Its files hold items: they are this user's alone.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Uses `path`, which is made if it is not there, and checks that it can be written.
    ///
    /// # Errors
    /// A path that cannot be made or written.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(
                format!(
                    "The dead-letter directory {} cannot be used",
                    path.display()
                ),
                error.to_string(),
                "Set dead_letters.directory to a directory that this user may write",
            )
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed)?;
        // A directory can exist and still refuse us; a file that is made and removed tells.
        let probe = path.join(format!(".probe-{}", std::process::id()));
        OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&probe)
            .map_err(failed)?;
        std::fs::remove_file(&probe).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Appends a letter; done when it is on disk.
    ///
    /// # Errors
    /// What the file system said. The letter may then be there or not.
    pub async fn append(&self, letter: &DeadLetter) -> Result<(), Fault> {
        let failed = |message: String| {
            Fault::own(
                Operation::Queue,
                Class::Unknown,
                "directory not writable",
                message,
            )
        };
        let line = letter.to_line(usize::MAX).map_err(failed)?;
        let day = rfc3339(host_ms()).chars().take(10).collect::<String>();
        let path = self.path.join(format!("{day}.jsonl"));
        let directory = self.path.clone();
        tokio::task::spawn_blocking(move || append_line(&directory, &path, &line))
            .await
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))
    }
}

/// Appends one line durably. Safe for several processes: the file is locked meanwhile. A line
/// that a crash left half-written is ended first, so that it spoils no other.
fn append_line(directory: &Path, path: &Path, line: &str) -> std::io::Result<()> {
    let is_new = !path.exists();
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    file.lock()?;
    let mut text = String::with_capacity(line.len() + 2);
    if !ends_whole(&mut file)? {
        text.push('\n');
    }
    text.push_str(line);
    text.push('\n');
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    if is_new {
        // The file's name is durable only when its directory is.
        File::open(directory)?.sync_all()?;
    }
    file.unlock()
}

fn ends_whole(file: &mut File) -> std::io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

#[cfg(test)]
mod tests {
    use super::super::message::tests::letter;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn only_file(path: &Path) -> PathBuf {
        let mut files: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|f| f.unwrap().path())
            .collect();
        assert_eq!(files.len(), 1);
        files.remove(0)
    }

    #[tokio::test]
    async fn letters_are_private_whole_lines_even_after_a_crash_in_one() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("letters");
        let directory = Directory::open(&path).unwrap();
        directory.append(&letter("one")).await.unwrap();
        let file = only_file(&path);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        // A crash in the middle of a line.
        OpenOptions::new()
            .append(true)
            .open(&file)
            .unwrap()
            .write_all(b"{\"version\":1,\"gro")
            .unwrap();
        let mut tasks = Vec::new();
        for n in 0..20 {
            let directory = directory.clone();
            tasks.push(tokio::spawn(async move {
                directory.append(&letter(&n.to_string())).await
            }));
        }
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let whole = text
            .lines()
            .filter(|line| serde_json::from_str::<DeadLetter>(line).is_ok())
            .count();
        assert_eq!(whole, 21);
        assert_eq!(text.lines().count(), 22);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        assert!(Directory::open(&temp.path().join("below-a-file")).is_err());
    }
}
