//! Fuzz target: whatever lies in a queue or a directory, reading it ends, and what was read as a letter
//! is written and read again as the same one. `.ci/fuzz` builds and runs it.
#![no_main]

use farshore::dead_letter::message::{DeadLetter, MESSAGE_BYTES_MAX, Unreadable, VERSION};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let letter = match DeadLetter::read(&text) {
        Ok(letter) => letter,
        Err(Unreadable::Newer(version)) => {
            assert!(version > u64::from(VERSION));
            return;
        }
        Err(Unreadable::Malformed(why)) => {
            assert!(!why.is_empty());
            return;
        }
    };
    assert!(letter.compressed.is_empty(), "a letter was read half");
    let _ = letter.item_key();
    let plain = letter.to_plain().unwrap();
    assert_eq!(DeadLetter::read(&plain).as_ref(), Ok(&letter));
    if let Ok(line) = letter.to_line(MESSAGE_BYTES_MAX) {
        assert!(line.len() <= MESSAGE_BYTES_MAX);
        let read = DeadLetter::read(&line).unwrap();
        assert_eq!(read.keys, letter.keys);
    }
});
