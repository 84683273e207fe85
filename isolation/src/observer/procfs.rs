//! Where the observer reads: the kernel's text files below one root, so that a test can have its own.
//!
//! Contract: files stay open and are read from their start each time (every file here is made anew by
//! the kernel at each read from offset 0); buffers are kept. Nothing here enters the CPU of a worker:
//! these files are filled from memory by the reader. A descriptor of a thread's file stays bound to that
//! thread, so a process id that is used again is not mistaken for the old one (`ESRCH` instead).

use super::finding::Missing;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// No file is read further: /proc/interrupts of 8192 CPUs with 700 lines has 64 MB.
const MOST_BYTES: usize = 64 << 20;

/// The tree that holds `proc` and `sys`.
#[derive(Debug, Clone)]
pub struct ProcFs {
    root: PathBuf,
}

impl Default for ProcFs {
    /// The running kernel's.
    fn default() -> Self {
        Self::at("/")
    }
}

impl ProcFs {
    /// A tree with `proc` and `sys` below `root`.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A file of the tree, by its path below the root. It is opened when it is first read.
    pub(super) fn file(&self, path: &str) -> Kept {
        let path = self.root.join(path);
        Kept { source: path.clone(), path, file: None, buffer: Vec::new() }
    }

    /// A file of one thread.
    pub(super) fn of_thread(&self, (pid, tid): (u32, u32), name: &str) -> Kept {
        let source = self.root.join(format!("proc/PID/task/TID/{name}"));
        Kept { source, ..self.file(&format!("proc/{pid}/task/{tid}/{name}")) }
    }
}

/// A file that stays open, with the buffer it is read into.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    /// The same for all threads.
    source: PathBuf,
    file: Option<File>,
    buffer: Vec<u8>,
}

impl Kept {
    /// What it is called when it cannot be read: said once, not for each thread.
    pub(super) fn source(&self) -> &Path {
        &self.source
    }

    /// As [`read`](Self::read); an error is noted, and logged the first time.
    pub(super) fn noted(&mut self, missing: &mut Vec<Missing>) -> Option<&[u8]> {
        match self.fill() {
            Ok(length) => Some(&self.buffer[..length]),
            Err(error) => {
                self.file = None;
                Missing::note(missing, &self.source, error.to_string());
                None
            }
        }
    }

    /// All of it, as it is now. After an error it is opened anew the next time.
    pub(super) fn read(&mut self) -> io::Result<&[u8]> {
        match self.fill() {
            Ok(length) => Ok(&self.buffer[..length]),
            Err(error) => {
                self.file = None;
                Err(error)
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        if self.file.is_none() {
            self.file = Some(File::open(&self.path)?);
        }
        let Some(file) = &self.file else { return Ok(0) };
        if self.buffer.is_empty() {
            self.buffer.resize(4096, 0);
        }
        let mut length = 0;
        loop {
            if length == self.buffer.len() {
                if length >= MOST_BYTES {
                    return Ok(length);
                }
                self.buffer.resize(length * 2, 0);
            }
            match file.read_at(&mut self.buffer[length..], length as u64) {
                Ok(0) => return Ok(length),
                Ok(n) => length = (length + n).min(self.buffer.len()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
