//! The record of what was there before a fix, from which it is undone.
//!
//! Contract: what [`Record::save`] returned for survives a crash of the program and of the machine: a
//! new file is written, flushed and put in the place of the old one. One process at a time has the
//! record. A file that is not understood is never overwritten.

use super::Form;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longer than the record of any host: an entry takes about 200 bytes.
const LONGEST: u64 = 64 << 20;
/// The version of the format.
const VERSION: u32 = 1;

/// Why the record cannot be used. Nothing was changed after it happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another process has it.
    #[error("another process uses the undo record {}: wait until it is done", path.display())]
    Busy {
        /// The record.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("cannot {doing} the undo record {}: {source}; run as root, or name another file with --state", path.display())]
    Io {
        /// The record.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what this program writes.
    #[error("the undo record {} is not understood: {why}; move it away if it is no longer needed", path.display())]
    Malformed {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// What was done to one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    /// The check that asked for it.
    pub(super) check: String,
    pub(super) path: String,
    pub(super) form: Form,
    /// What was there before the first fix.
    pub(super) before: String,
    /// What fixes wrote, and what the kernel made of it.
    pub(super) ours: Vec<String>,
    /// A fix was about to write, and has not said yet what came of it: any value may be its doing.
    pub(super) pending: bool,
}

impl Entry {
    /// Notes a value that a fix brought about.
    pub(super) fn own(&mut self, value: &str) {
        if !self.owns(value) {
            self.ours.push(value.to_owned());
        }
    }

    /// Whether a fix brought this value about.
    pub(super) fn owns(&self, value: &str) -> bool {
        self.ours.iter().any(|own| self.form.same(own, value))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    /// Identifies the boot during which the changes were made; they end with it.
    boot: String,
    /// In the order in which they were made.
    entries: Vec<Entry>,
}

#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    boot: String,
    pub(super) entries: Vec<Entry>,
    /// Of an earlier boot: the restart has undone them.
    pub(super) outlived: Vec<Entry>,
    /// Of the directory, which stays when the file is replaced.
    directory: Flock<fs::File>,
}

impl Record {
    /// Opens the record, or begins one if there is none yet. `boot` identifies the present boot.
    pub(super) fn open(path: &Path, boot: String) -> Result<Self, StateError> {
        let failed = |doing| move |source| StateError::Io { path: path.to_owned(), doing, source };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(failed("make the directory of"))?;
        let directory = fs::File::open(parent).map_err(failed("open the directory of"))?;
        let directory =
            Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
                nix::errno::Errno::EWOULDBLOCK => StateError::Busy { path: path.to_owned() },
                errno => failed("lock")(errno.into()),
            })?;
        let mut record =
            Self { path: path.to_owned(), boot, entries: Vec::new(), outlived: Vec::new(), directory };
        let mut text = Vec::new();
        match fs::File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(record),
            Err(error) => return Err(failed("open")(error)),
            Ok(file) => file.take(LONGEST + 1).read_to_end(&mut text).map_err(failed("read"))?,
        };
        let malformed = |why: String| StateError::Malformed { path: path.to_owned(), why };
        if text.len() as u64 > LONGEST {
            return Err(malformed("it is too long".to_owned()));
        }
        let stored: Stored = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if stored.version != VERSION {
            return Err(malformed(format!(
                "it has version {}, this program knows {VERSION}",
                stored.version
            )));
        }
        // Where the boot is not known, it is taken for the same one: nothing is forgotten by mistake.
        if stored.boot == record.boot || stored.boot.is_empty() || record.boot.is_empty() {
            record.entries = stored.entries;
        } else {
            record.outlived = stored.entries;
        }
        Ok(record)
    }

    /// Writes the record so that it outlives a crash. An empty one is a file that is gone.
    pub(super) fn save(&self) -> Result<(), StateError> {
        let failed = |doing| move |source| StateError::Io { path: self.path.clone(), doing, source };
        if self.entries.is_empty() {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove")(error)),
                _ => {}
            }
        } else {
            let stored = Stored { version: VERSION, boot: self.boot.clone(), entries: self.entries.clone() };
            let mut text = serde_json::to_vec_pretty(&stored).map_err(|e| failed("write")(e.into()))?;
            text.push(b'\n');
            let mut next = self.path.clone().into_os_string();
            next.push(".new");
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(nix::libc::O_NOFOLLOW)
                .open(&next)
                .map_err(failed("write"))?;
            file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed("write"))?;
            fs::rename(&next, &self.path).map_err(failed("replace"))?;
        }
        // The name has to last too.
        self.directory.sync_all().map_err(failed("flush the directory of"))
    }
}
