//! Dead letters in a directory: a file a day, one line of JSON a letter.
//!
//! A file is only ever appended to: a letter brought home is marked in a second file, by the place
//! of its line, and both files go once every letter of an older day is home. So appending and
//! bringing home need no agreement beyond a lock for the moment of each.

use std::collections::HashSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::message::{DeadLetter, Unreadable};
use super::{Receipt, Waiting};
use crate::dynamo::clock::{host_ms, rfc3339};
use crate::error::{Class, Failure, Fault, Operation};

const LETTERS: &str = "jsonl";
const MARKS: &str = "home";

/// A directory of dead letters. Its files hold items: they are this user's alone.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
}

/// A letter that was brought home: where its line begins.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    offset: u64,
}

/// What a look through the directory found.
#[derive(Debug, Default)]
pub struct Found {
    /// Letters that are not home.
    pub letters: Vec<Waiting>,
    /// Lines that a crash left half-written. No letter counted as delivered stands in one: it was
    /// made again.
    pub broken: usize,
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

    /// Where it is, without links and dots: the same for every process of this host.
    pub fn place(&self) -> PathBuf {
        std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone())
    }

    /// Appends a letter; done when it is on disk.
    ///
    /// # Errors
    /// What the file system said. The letter may then be there or not.
    pub async fn append(&self, letter: &DeadLetter) -> Result<(), Fault> {
        let line = letter
            .to_plain()
            .map_err(|message| fault("letter not written", message))?;
        let path = self.path.join(format!("{}.{LETTERS}", today()));
        let directory = self.path.clone();
        blocking(move || append_line(&directory, &path, &line)).await
    }

    /// All letters that are not home, in the order of their files.
    ///
    /// # Errors
    /// What the file system said.
    pub async fn letters(&self) -> Result<Found, Fault> {
        let path = self.path.clone();
        blocking(move || find_letters(&path)).await
    }

    /// These letters are home.
    ///
    /// # Errors
    /// What the file system said. They may then be marked or not.
    pub async fn mark_home(&self, letters: Vec<(String, u64)>) -> Result<(), Fault> {
        let directory = self.path.clone();
        blocking(move || {
            for (file, offset) in letters {
                let line =
                    serde_json::to_string(&Mark { offset }).map_err(std::io::Error::other)?;
                append_line(&directory, &directory.join(marks_of(&file)), &line)?;
            }
            Ok(())
        })
        .await
    }

    /// Removes the files of older days whose letters are all home.
    ///
    /// # Errors
    /// What the file system said.
    pub async fn tidy(&self) -> Result<(), Fault> {
        let directory = self.path.clone();
        blocking(move || tidy(&directory)).await
    }
}

fn fault(code: &str, message: String) -> Fault {
    Fault::own(Operation::Queue, Class::Unknown, code, message)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Fault> {
    let failed = |message: String| fault("directory not usable", message);
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(error.to_string()))
}

fn today() -> String {
    rfc3339(host_ms()).chars().take(10).collect()
}

fn marks_of(file: &str) -> String {
    format!("{file}.{MARKS}")
}

/// Appends one line durably. Safe for several processes: the file is locked meanwhile. A line
/// that a crash left half-written is ended first, so that it spoils no other.
fn append_line(directory: &Path, path: &Path, line: &str) -> std::io::Result<()> {
    let mut file = loop {
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(path)?;
        file.lock()?;
        // Removed between opening and locking: what is written to it now is gone with it.
        if file.metadata()?.nlink() > 0 {
            break file;
        }
    };
    // Whoever finds it empty syncs its name, also one that another has made a moment ago.
    let is_new = file.metadata()?.len() == 0;
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

/// The files of letters, oldest day first.
fn files(directory: &Path) -> std::io::Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let (Some(name), Some(LETTERS)) = (name, path.extension().and_then(|e| e.to_str())) {
            files.push(name.to_owned());
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn find_letters(directory: &Path) -> std::io::Result<Found> {
    let mut found = Found::default();
    for file in files(directory)? {
        find_in(directory, &file, &mut found)?;
    }
    Ok(found)
}

fn find_in(directory: &Path, file: &str, found: &mut Found) -> std::io::Result<()> {
    let home = marks(&directory.join(marks_of(file)))?;
    let Some(opened) = open_if_there(&directory.join(file))? else {
        return Ok(());
    };
    let mut lines = BufReader::new(opened);
    let mut offset = 0;
    loop {
        let mut line = Vec::new();
        let length = lines.read_until(b'\n', &mut line)? as u64;
        if length == 0 {
            return Ok(());
        }
        let whole = line.pop_if(|last| *last == b'\n').is_some();
        let is_home = home.contains(&offset);
        let begun = offset;
        offset += length;
        if !whole || is_home || line.is_empty() {
            // One without an end is being written, or will be ended by the next that is.
            found.broken += usize::from(!whole);
            continue;
        }
        let text = String::from_utf8_lossy(&line);
        if serde_json::from_str::<serde::de::IgnoredAny>(&text).is_err() {
            found.broken += 1;
            continue;
        }
        found.letters.push(Waiting {
            letter: DeadLetter::read(&text),
            id: format!("{file}:{begun}"),
            sent_ms: None,
            receipt: Receipt::Line(file.to_owned(), begun),
        });
    }
}

fn open_if_there(path: &Path) -> std::io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The marks in a file. A half-written one is none: its letter is brought home once more.
fn marks(path: &Path) -> std::io::Result<HashSet<u64>> {
    let Some(mut file) = open_if_there(path)? else {
        return Ok(HashSet::new());
    };
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let marks = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Mark>(line).ok());
    Ok(marks.map(|mark| mark.offset).collect())
}

fn tidy(directory: &Path) -> std::io::Result<()> {
    let today = today();
    for file in files(directory)? {
        if file.as_str() >= today.as_str() {
            continue;
        }
        let path = directory.join(&file);
        let Some(opened) = open_if_there(&path)? else {
            continue;
        };
        // Nobody appends meanwhile.
        opened.lock()?;
        if opened.metadata()?.nlink() == 0 {
            // Removed by another since it was opened; what has its name now is none of this.
            continue;
        }
        let mut found = Found::default();
        find_in(directory, &file, &mut found)?;
        if found.letters.is_empty() && found.broken == 0 {
            // The marks first: left behind, they would speak for lines of another file.
            let marks = directory.join(marks_of(&file));
            if marks.exists() {
                std::fs::remove_file(marks)?;
                File::open(directory)?.sync_all()?;
            }
            std::fs::remove_file(&path)?;
            File::open(directory)?.sync_all()?;
        }
        opened.unlock()?;
    }
    Ok(())
}

impl Waiting {
    /// Whether a newer Farshore has to read it.
    pub fn is_newer(&self) -> bool {
        matches!(self.letter, Err(Unreadable::Newer(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::tests::letter;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn directory() -> (tempfile::TempDir, PathBuf, Directory) {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("letters");
        let directory = Directory::open(&path).unwrap();
        (temp, path, directory)
    }

    fn file_of(path: &Path) -> PathBuf {
        path.join(format!("{}.jsonl", today()))
    }

    fn append_raw(path: &Path, bytes: &[u8]) {
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(bytes).unwrap();
    }

    fn texts(found: &Found) -> Vec<String> {
        let text = |waiting: &Waiting| {
            let letter = waiting.letter.as_ref().unwrap();
            let image = letter.new_image.as_ref().unwrap();
            image["v"]["S"].as_str().unwrap().to_owned()
        };
        found.letters.iter().map(text).collect()
    }

    fn place(waiting: &Waiting) -> (String, u64) {
        match &waiting.receipt {
            Receipt::Line(file, offset) => (file.clone(), *offset),
            Receipt::Message(_) => panic!("a directory has lines"),
        }
    }

    #[tokio::test]
    async fn letters_are_private_whole_lines_even_after_a_crash_in_one() {
        let (_temp, path, directory) = directory();
        directory.append(&letter("one")).await.unwrap();
        let file = file_of(&path);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        append_raw(&file, b"{\"version\":1,\"gro");
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
        let found = directory.letters().await.unwrap();
        assert_eq!(found.letters.len(), 21);
        assert_eq!(found.broken, 1);
    }

    #[tokio::test]
    async fn a_letter_brought_home_is_marked_and_others_stay() {
        let (_temp, path, directory) = directory();
        for text in ["a", "b", "c"] {
            directory.append(&letter(text)).await.unwrap();
        }
        let found = directory.letters().await.unwrap();
        assert_eq!(texts(&found), ["a", "b", "c"]);
        let marked = vec![place(&found.letters[1])];
        directory.mark_home(marked).await.unwrap();
        assert_eq!(texts(&directory.letters().await.unwrap()), ["a", "c"]);
        // A crash in the middle of a mark marks nothing, and spoils no other.
        let marks = path.join(format!("{}.jsonl.home", today()));
        append_raw(&marks, b"{\"offset\":");
        let marked = vec![place(&found.letters[0])];
        directory.mark_home(marked).await.unwrap();
        assert_eq!(texts(&directory.letters().await.unwrap()), ["c"]);
        assert_eq!(
            marks.metadata().unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[tokio::test]
    async fn files_of_older_days_go_once_all_of_them_is_home() {
        let (_temp, path, directory) = directory();
        directory.append(&letter("old")).await.unwrap();
        let old = path.join("2026-01-01.jsonl");
        std::fs::rename(file_of(&path), &old).unwrap();
        directory.append(&letter("new")).await.unwrap();
        directory.tidy().await.unwrap();
        assert!(old.exists(), "it was not home");
        let found = directory.letters().await.unwrap();
        assert_eq!(texts(&found), ["old", "new"]);
        let all = found.letters.iter().map(place).collect();
        directory.mark_home(all).await.unwrap();
        directory.tidy().await.unwrap();
        let mut left: Vec<_> = std::fs::read_dir(&path)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let today = today();
        // Today's may still be appended to.
        assert_eq!(
            left,
            [format!("{today}.jsonl"), format!("{today}.jsonl.home")]
        );
        assert!(directory.letters().await.unwrap().letters.is_empty());
    }

    #[tokio::test]
    async fn a_file_that_was_removed_meanwhile_is_made_anew() {
        let (_temp, path, directory) = directory();
        directory.append(&letter("a")).await.unwrap();
        // Held by somebody who removes it, as `tidy` does.
        let file = File::open(file_of(&path)).unwrap();
        file.lock().unwrap();
        let appending = tokio::spawn({
            let directory = directory.clone();
            async move { directory.append(&letter("b")).await }
        });
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        std::fs::remove_file(file_of(&path)).unwrap();
        file.unlock().unwrap();
        appending.await.unwrap().unwrap();
        assert_eq!(texts(&directory.letters().await.unwrap()), ["b"]);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_refused() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        assert!(Directory::open(&temp.path().join("below-a-file")).is_err());
    }
}
