//! What was built, kept outside the work tree under a key of everything that went into it.
//!
//! Contract: an entry that can be seen is whole. It is built beside its final place, under an exclusive
//! lock, and renamed into place as the last step, so a killed build leaves only a leftover, which a later
//! run removes. Who uses an entry holds a shared lock on it, so pruning never takes it away.

use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// How many entries are kept: kernels, ours and stock, normal and debug, and kselftests of the last few series.
const KEPT: usize = 12;
const LEFTOVER: &str = "building-";

/// The name of an entry: a digest of all that decides what is built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(String);

impl Key {
    /// From labelled parts. Labels and lengths go in too, so that nothing can move from one to the next.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut digest = Sha256::new();
        for (label, bytes) in parts {
            for field in [label.as_bytes(), bytes] {
                digest.update(u64::try_from(field.len()).unwrap_or(u64::MAX).to_le_bytes());
                digest.update(field);
            }
        }
        Self(hex(&digest.finalize()[..12]))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A directory of entries.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// An entry that stays until this is dropped.
#[derive(Debug)]
pub(crate) struct Entry {
    dir: PathBuf,
    _used: File,
}

impl Entry {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Cache {
    /// The user's: `$XDG_CACHE_HOME/isoplane/kernel`, or `~/.cache/isoplane/kernel`.
    pub(crate) fn of_user() -> Result<Self, String> {
        let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = set("XDG_CACHE_HOME")
            .or_else(|| set("HOME").map(|home| home.join(".cache")))
            .ok_or("neither XDG_CACHE_HOME nor HOME is set: no place to keep kernels. Set one")?;
        Self::at(base.join("isoplane/kernel"))
    }

    pub(crate) fn at(root: PathBuf) -> Result<Self, String> {
        fs::create_dir_all(&root).map_err(|e| format!("cannot make {}: {e}", root.display()))?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The entry of this key. When there is none, `build` fills a fresh directory for it; says whether it did.
    pub(crate) fn entry(
        &self,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<(), String>,
    ) -> Result<(Entry, bool), String> {
        let named = |e: std::io::Error| format!("cache of kernels in {}: {e}", self.root.display());
        let lock = File::create(self.lock_path(key.as_str())).map_err(named)?;
        let dir = self.root.join(key.as_str());
        lock.lock_shared().map_err(named)?;
        if dir.is_dir() {
            return Ok((used(dir, lock), false));
        }
        lock.unlock().map_err(named)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("another run is building kernel {}: waiting for it", key.as_str());
                lock.lock().map_err(named)?;
            }
            Err(TryLockError::Error(e)) => return Err(named(e)),
        }
        if dir.is_dir() {
            // To a shared lock by way of none: pruning takes only what has long not been used.
            lock.lock_shared().map_err(named)?;
            return Ok((used(dir, lock), false));
        }
        for found in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if found.file_name().to_string_lossy().starts_with(&format!("{LEFTOVER}{}-", key.as_str())) {
                let _ = fs::remove_dir_all(found.path());
            }
        }
        // A name of its own: what a killed run has started may go on for a moment, and must not write into ours.
        let prefix = format!("{LEFTOVER}{}-", key.as_str());
        let unfinished = tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.root).map_err(named)?;
        fs::set_permissions(unfinished.path(), fs::Permissions::from_mode(0o755)).map_err(named)?;
        build(unfinished.path())?;
        fs::rename(unfinished.path(), &dir).map_err(named)?;
        // There is nothing left to remove.
        let _ = unfinished.keep();
        lock.lock_shared().map_err(named)?;
        let entry = used(dir, lock);
        self.prune(KEPT);
        Ok((entry, true))
    }

    /// Removes leftovers of killed builds, and the entries that were not used for longest, except what is in
    /// use. What cannot be removed stays: that is no reason to fail.
    pub(crate) fn prune(&self, keep: usize) {
        let mut entries: Vec<(SystemTime, String)> = Vec::new();
        for found in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            let name = found.file_name().to_string_lossy().into_owned();
            if let Some((key, _)) = name.strip_prefix(LEFTOVER).and_then(|rest| rest.split_once('-')) {
                self.take_away(key, &found.path());
            } else if let Some(key) = name.strip_suffix(".log") {
                // Of a build that failed. Now that one went well, nobody asks why any more.
                if self.locked(key).is_some() {
                    let _ = fs::remove_file(found.path());
                }
            } else if found.path().join(USED).exists() {
                let when = fs::metadata(found.path().join(USED)).and_then(|m| m.modified());
                entries.push((when.unwrap_or(SystemTime::UNIX_EPOCH), name));
            }
        }
        entries.sort();
        let surplus = entries.len().saturating_sub(keep);
        for (_, key) in entries.into_iter().take(surplus) {
            self.take_away(&key, &self.root.join(&key));
        }
    }

    /// Removes a directory of this key, unless somebody builds or uses it.
    fn take_away(&self, key: &str, path: &Path) {
        let Some(_lock) = self.locked(key) else { return };
        // Renamed first: half an entry must not look like one.
        let leftover = self.root.join(format!("{LEFTOVER}{key}-old"));
        let _ = fs::remove_dir_all(&leftover);
        if fs::rename(path, &leftover).is_ok() {
            let _ = fs::remove_dir_all(&leftover);
        }
    }

    /// The lock of a key that nobody builds or uses.
    fn locked(&self, key: &str) -> Option<File> {
        let lock = File::create(self.lock_path(key)).ok()?;
        lock.try_lock().ok().map(|()| lock)
    }

    /// The log of a build: beside the entries, since it outlives one that fails.
    pub(crate) fn log(&self, key: &Key) -> PathBuf {
        self.root.join(format!("{}.log", key.as_str()))
    }

    /// Lock files stay for good: removing one would let two runs each hold "the" lock.
    fn lock_path(&self, key: &str) -> PathBuf {
        self.root.join(format!("{key}.lock"))
    }
}

/// Its time of modification says when the entry was used last.
const USED: &str = "used";

fn used(dir: PathBuf, lock: File) -> Entry {
    let _ = fs::write(dir.join(USED), "");
    Entry { dir, _used: lock }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().expect("a directory");
        let cache = Cache::at(dir.path().join("deep/kernel")).expect("a cache");
        (dir, cache)
    }

    fn key(text: &str) -> Key {
        Key::of([("text", text.as_bytes())])
    }

    fn fill(dir: &Path) -> Result<(), String> {
        fs::write(dir.join("bzImage"), "kernel").map_err(|e| e.to_string())
    }

    #[test]
    fn every_part_of_a_key_counts() {
        let base = Key::of([("a", &b"one"[..]), ("b", b"two")]);
        assert_eq!(base, Key::of([("a", &b"one"[..]), ("b", b"two")]));
        for other in [
            Key::of([("a", &b"one"[..]), ("b", b"tw")]),
            Key::of([("a", &b"onet"[..]), ("b", b"wo")]),
            Key::of([("b", &b"two"[..]), ("a", b"one")]),
            Key::of([("a", &b"one"[..])]),
            Key::of([("a", &b"one"[..]), ("b", b"two"), ("c", b"")]),
            Key::of([("aone", &b""[..]), ("b", b"two")]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn the_second_run_builds_nothing() {
        let (_guard, cache) = cache();
        let (entry, built) = cache.entry(&key("a"), fill).expect("built");
        assert!(built);
        drop(entry);
        let (entry, built) = cache.entry(&key("a"), |_| Err("not again".into())).expect("found");
        assert!(!built);
        assert_eq!(fs::read_to_string(entry.path("bzImage")).expect("kept"), "kernel");
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_is_tried_again() {
        let (_guard, cache) = cache();
        let failed = cache.entry(&key("a"), |dir| {
            fill(dir)?;
            Err("no space".into())
        });
        assert_eq!(failed.map(|_| ()), Err("no space".to_owned()));
        assert!(cache.entry(&key("a"), fill).expect("built").1);
    }

    #[test]
    fn what_a_killed_build_left_is_no_entry() {
        let (_guard, cache) = cache();
        let left = cache.root().join(format!("{LEFTOVER}{}-x1", key("a").as_str()));
        fs::create_dir(&left).expect("made");
        fs::write(left.join("bzImage"), "half").expect("written");
        let (entry, built) = cache
            .entry(&key("a"), |dir| {
                assert!(!dir.join("bzImage").exists(), "starts from nothing");
                assert!(!left.exists(), "the leftover is gone");
                // What the killed run has started may still be at it.
                fs::create_dir(&left)
                    .and_then(|()| fs::write(left.join("bzImage"), "late"))
                    .expect("written");
                fill(dir)
            })
            .expect("built");
        assert!(built);
        assert_eq!(fs::read_to_string(entry.path("bzImage")).expect("whole"), "kernel");
    }

    #[test]
    fn runs_at_the_same_time_build_once() {
        let (_guard, cache) = cache();
        let builds = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let (entry, _) = cache
                        .entry(&key("a"), |dir| {
                            builds.fetch_add(1, Ordering::Relaxed);
                            fill(dir)
                        })
                        .expect("an entry");
                    assert!(entry.path("bzImage").exists());
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn pruning_spares_what_is_in_use_and_takes_leftovers() {
        let (_guard, cache) = cache();
        let (held, _) = cache.entry(&key("held"), fill).expect("built");
        drop(cache.entry(&key("idle"), fill).expect("built"));
        let left = cache.root().join(format!("{LEFTOVER}{}-x1", key("dead").as_str()));
        fs::create_dir(&left).expect("made");
        let log = cache.log(&key("failed"));
        fs::write(&log, "error: no").expect("written");
        cache.prune(0);
        assert!(!log.exists());
        assert!(held.path("bzImage").exists());
        assert!(!cache.root().join(key("idle").as_str()).exists());
        assert!(!left.exists());
    }

    #[test]
    fn pruning_takes_the_least_recently_used() {
        let (_guard, cache) = cache();
        for (age, name) in [(30, "b"), (10, "a"), (20, "c")] {
            let (entry, _) = cache.entry(&key(name), fill).expect("built");
            let stamp = File::options().write(true).open(entry.path(USED)).expect("stamp");
            stamp.set_modified(SystemTime::now() - std::time::Duration::from_secs(age)).expect("set");
        }
        cache.prune(2);
        let there = |name: &str| cache.root().join(key(name).as_str()).exists();
        assert!(!there("b") && there("a") && there("c"));
    }
}
