//! Rewrites a file so that a reader sees the old text or the new one, and nothing between; then may
//! tell a process.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, kill_process};

use super::{Moment, Trouble};
use crate::config::actions::{FileAction, Signal, Tell};

/// A new file can be read by everybody: it holds a region's name, and others are to read it. One
/// that is there keeps its own mode.
const MODE: u32 = 0o644;
/// A pid file holds one number.
const PID_FILE_BYTES_MAX: u64 = 64;

pub(super) async fn rewrite(action: &FileAction, moment: &Moment<'_>) -> Result<(), Trouble> {
    let text = action.content.fill(moment);
    let path = action.path.clone();
    let written = blocking(move || replace(&path, text.as_bytes())).await?;
    written.map_err(|error| not_written(&action.path, &error))?;
    match &action.tell {
        None => Ok(()),
        Some(tell) => {
            let pid_file = tell.pid_file.clone();
            let pid = blocking(move || read_pid(&pid_file)).await??;
            signal(pid, tell)
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Trouble> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        Trouble::passing(
            format!("The thread that does it ended: {error}"),
            "Report the log to Farshore's developers",
        )
    })
}

/// Puts `bytes` in the place of what `path` holds: beside it, synced, renamed, and the folder synced,
/// so that neither a crash nor a reader ever meets half of it.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A link stays one: what it points to is replaced.
    let target = match fs::canonicalize(path) {
        // Also where that is not there yet, as after a start on a file system in memory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(path) {
            Ok(to) => path.parent().unwrap_or(Path::new("/")).join(to),
            Err(_) => path.to_owned(),
        },
        target => target?,
    };
    let folder = target.parent().unwrap_or(Path::new("/"));
    let before = match fs::metadata(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        before => Some(before?),
    };
    let mut temporary = tempfile::Builder::new()
        .prefix(".farshore-")
        .tempfile_in(folder)?;
    temporary.write_all(bytes)?;
    let file = temporary.as_file();
    let mode = before
        .as_ref()
        .map_or(MODE, |before| before.mode() & 0o7777);
    if let Some(before) = &before {
        keep_owner(file, before, &target)?;
    }
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()?;
    temporary.persist(&target).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// Only root may give a file away; for all others it becomes their own, which a mode that lets others
/// read it makes up for.
fn keep_owner(file: &File, before: &Metadata, path: &Path) -> io::Result<()> {
    let now = file.metadata()?;
    if (now.uid(), now.gid()) == (before.uid(), before.gid()) {
        return Ok(());
    }
    if let Err(error) = fchown(file, Some(before.uid()), Some(before.gid())) {
        tracing::warn!(path = %path.display(), %error, "a rewritten file has another owner than before");
    }
    Ok(())
}

fn not_written(path: &Path, error: &io::Error) -> Trouble {
    let why = format!("{} could not be written: {error}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound => {
            Trouble::lasting(why, "Create the folder it belongs in, or correct `path`")
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Trouble::lasting(
            why,
            "Let this user create files in that folder: the file is replaced, not changed",
        ),
        io::ErrorKind::ResourceBusy => Trouble::lasting(
            why,
            "Mount the folder and not the single file: a mount point cannot be replaced",
        ),
        _ => Trouble::passing(why, "See whether the file system is full or broken"),
    }
}

fn read_pid(path: &PathBuf) -> Result<Pid, Trouble> {
    let shown = path.display();
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(PID_FILE_BYTES_MAX).read_to_string(&mut text))
        .map_err(|error| {
            Trouble::passing(
                format!("The pid file {shown} could not be read: {error}"),
                "Start the process it belongs to, or correct `pid_file`",
            )
        })?;
    // 1 is the init process, and 0 and less are groups: no pid file means them.
    let number = text.trim().parse::<i32>().ok().filter(|number| *number > 1);
    number.and_then(Pid::from_raw).ok_or_else(|| {
        Trouble::passing(
            format!("The pid file {shown} holds no process id"),
            "Start the process it belongs to, or correct `pid_file`",
        )
    })
}

fn signal(pid: Pid, tell: &Tell) -> Result<(), Trouble> {
    let which = match tell.signal {
        Signal::Hup => rustix::process::Signal::HUP,
        Signal::Usr1 => rustix::process::Signal::USR1,
        Signal::Usr2 => rustix::process::Signal::USR2,
        Signal::Term => rustix::process::Signal::TERM,
    };
    kill_process(pid, which).map_err(|error| {
        let why = format!(
            "The file is written, but {} did not reach process {} of {}: {error}",
            tell.signal.name(),
            pid.as_raw_nonzero(),
            tell.pid_file.display()
        );
        match error {
            rustix::io::Errno::PERM => Trouble::lasting(
                why,
                "Run Farshore as the user of that process, or use a command that may signal it",
            ),
            _ => Trouble::passing(why, "Start that process, or remove its stale pid file"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_holds_one_process_and_never_init_or_a_group() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        for (text, is_pid) in [
            ("4711\n", true),
            (" 4711 ", true),
            ("", false),
            ("0", false),
            ("1", false),
            ("-4711", false),
            ("4711\n4712\n", false),
            ("pid", false),
            ("99999999999", false),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(read_pid(&path).is_ok(), is_pid, "{text:?}");
        }
    }
}
