//! The seam between the checks and the machine: a root directory, and answers of the kernel that no
//! file holds.
//!
//! Contract: whatever a check learns about a host it learns here. Files are read below [`Host::at`]'s
//! root, so that a test can put a made-up `/proc` and `/sys` in its place; reads are bounded and never
//! block. Writes go to files that exist and create none.

use super::probe::Probes;
use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// No file that a check reads is longer than this: `/proc/interrupts` of a very large machine.
const LONGEST: u64 = 16 << 20;

type WriteFile = dyn Fn(&Path, &str) -> io::Result<()> + Send + Sync;
type Wait = dyn Fn(Duration) + Send + Sync;

/// A machine to look at: this one, or a made-up one below a directory.
pub struct Host {
    root: PathBuf,
    probes: Probes,
    write: Box<WriteFile>,
    wait: Box<Wait>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("root", &self.root).field("probes", &self.probes).finish_non_exhaustive()
    }
}

/// What reading a file gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Its text, without white space at either end.
    Text(String),
    /// There is no such file.
    Missing,
    /// There is one, and it cannot be read: why.
    Unreadable(String),
}

impl Found {
    pub(super) fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text),
            Self::Missing | Self::Unreadable(_) => None,
        }
    }
}

fn write_existing(path: &Path, content: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
    // One call: the kernel takes each write to such a file as a whole value.
    let written = file.write(content.as_bytes())?;
    if written == content.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

impl Host {
    /// This machine, asked now.
    #[must_use]
    pub fn real() -> Self {
        Self { probes: Probes::ask(), ..Self::at("/") }
    }

    /// The machine whose `/proc` and `/sys` are below `root`. Nothing is known of it but its files, until
    /// [`probes`](Self::probes) says more.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            probes: Probes::default(),
            write: Box::new(write_existing),
            wait: Box::new(std::thread::sleep),
        }
    }

    /// Says what the kernel of the machine answers.
    #[must_use]
    pub fn probes(mut self, probes: Probes) -> Self {
        self.probes = probes;
        self
    }

    /// Replaces the writing of files (for tests: kernels refuse values, or make something else of them).
    #[must_use]
    pub fn writing(mut self, write: impl Fn(&Path, &str) -> io::Result<()> + Send + Sync + 'static) -> Self {
        self.write = Box::new(write);
        self
    }

    /// Replaces the waiting between two samples (for tests).
    #[must_use]
    pub fn waiting(mut self, wait: impl Fn(Duration) + Send + Sync + 'static) -> Self {
        self.wait = Box::new(wait);
        self
    }

    pub(super) const fn answers(&self) -> &Probes {
        &self.probes
    }

    pub(super) fn wait(&self, time: Duration) {
        (self.wait)(time);
    }

    /// Where the file with this absolute path is, below the root.
    #[must_use]
    pub fn locate(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn read(&self, path: &str) -> Found {
        let read = || -> io::Result<String> {
            let mut bytes = Vec::new();
            let path = self.locate(path);
            // A pipe in the place of a file would block for ever.
            if !fs::metadata(&path)?.is_file() {
                return Err(io::Error::other("not a file"));
            }
            fs::File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
        };
        match read() {
            Ok(text) => Found::Text(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Missing,
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Found::Missing,
            Err(error) => Found::Unreadable(error.to_string()),
        }
    }

    /// The text of a file that may as well not be there.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        self.read(path).text()
    }

    pub(super) fn write(&self, path: &str, content: &str) -> io::Result<()> {
        (self.write)(&self.locate(path), content)
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.locate(path).exists()
    }

    pub(super) fn is_dir(&self, path: &str) -> bool {
        self.locate(path).is_dir()
    }

    /// Names in a directory, sorted, numbers by value; none if there is no such directory.
    pub(super) fn list(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.locate(path)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        names
    }

    /// The last component of what a symbolic link points to.
    pub(super) fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.locate(path)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }
}
