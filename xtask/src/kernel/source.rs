//! Where a kernel's source comes from, what identifies it, and making a copy of it to work on.
//!
//! Contract: neither the machine's packages nor the tree that a user names are changed: the one is unpacked
//! from a downloaded package, the other copied.

use super::tools::{self, logged, output};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The source that kernel/patches/6.12 is made for. Moving on to a newer one is a rebase: on purpose, with the
/// patches refreshed and the tests run.
pub(crate) const PACKAGE: &str = "linux-source-6.12";
pub(crate) const VERSION: &str = "6.12.117-1~deb12u1";
/// What the package holds, and where it is when somebody has installed it.
const TARBALL: &str = "usr/src/linux-source-6.12.tar.xz";

/// A kernel's source.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// Debian's package, in the pinned version.
    Pinned,
    /// A tree of 6.12.y.
    Tree(PathBuf),
}

impl Source {
    pub(crate) fn new(tree: Option<&Path>) -> Result<Self, String> {
        let Some(tree) = tree else { return Ok(Self::Pinned) };
        let named = |why: String| format!("--source {}: {why}", tree.display());
        let tree = tree.canonicalize().map_err(|e| named(e.to_string()))?;
        let makefile = fs::read_to_string(tree.join("Makefile"))
            .map_err(|e| format!("--source {}: no kernel source: Makefile: {e}", tree.display()))?;
        match series(&makefile).as_deref() {
            Some("6.12") => Ok(Self::Tree(tree)),
            Some(other) => Err(named(format!("is Linux {other}; the patches are for 6.12"))),
            None => Err(named("its Makefile has no VERSION and PATCHLEVEL: no kernel source".to_owned())),
        }
    }

    /// What tells this source from any other, for the cache's key.
    pub(crate) fn identity(&self) -> Result<String, String> {
        match self {
            Self::Pinned => Ok(format!("{PACKAGE}={VERSION}")),
            Self::Tree(tree) => match git_identity(tree) {
                Some(identity) => Ok(identity),
                None => walk_identity(tree).map_err(|e| format!("cannot read {}: {e}", tree.display())),
            },
        }
    }

    /// Does the source have this file or directory before it is patched? The pinned one has nothing of ours.
    pub(crate) fn has(&self, path: &str) -> bool {
        matches!(self, Self::Tree(tree) if tree.join(path).exists())
    }

    /// For people.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Pinned => format!("{PACKAGE} {VERSION}"),
            Self::Tree(tree) => tree.display().to_string(),
        }
    }

    /// Makes a copy in `into`, which does not exist yet. Packages are kept in `kept`.
    pub(crate) fn unpack(&self, into: &Path, kept: &Path, log: &Path) -> Result<(), String> {
        fs::create_dir(into).map_err(|e| format!("cannot make {}: {e}", into.display()))?;
        match self {
            Self::Pinned => {
                let (tarball, _guard) = pinned_tarball(kept, log)?;
                let mut tar = Command::new("tar");
                tar.args(["--extract", "--strip-components=1", "--file"]).arg(&tarball);
                logged("unpacking the source", tar.arg("--directory").arg(into), log)
            }
            Self::Tree(tree) => {
                let script = "tar -C \"$0\" --exclude=./.git -cf - . | tar -C \"$1\" -xf -";
                let mut copy = Command::new("bash");
                copy.args(["-o", "pipefail", "-c", script]).arg(tree).arg(into);
                logged("copying the source", &mut copy, log)?;
                // It may have been built in.
                let mut clean = Command::new("make");
                logged("cleaning the copy", clean.arg("-C").arg(into).args(["-s", "mrproper"]), log)
            }
        }
    }
}

/// `6.12` out of a kernel's top Makefile.
fn series(makefile: &str) -> Option<String> {
    let value = |name: &str| {
        makefile.lines().take(10).find_map(|line| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    };
    Some(format!("{}.{}", value("VERSION")?, value("PATCHLEVEL")?))
}

/// Finds the pinned tarball: installed, kept from before, or downloaded now. The guard holds what it is in.
fn pinned_tarball(kept: &Path, log: &Path) -> Result<(PathBuf, Option<tempfile::TempDir>), String> {
    let version = output(Command::new("dpkg-query").args([
        "--show",
        "--showformat=${db:Status-Status} ${Version}",
        PACKAGE,
    ]));
    let installed = Path::new("/").join(TARBALL);
    if version.is_ok_and(|found| found == format!("installed {VERSION}")) && installed.is_file() {
        return Ok((installed, None));
    }
    let package = kept.join(format!("{PACKAGE}_{}.deb", VERSION.replace(':', "%3a")));
    if !package.is_file() {
        download(&package, log)?;
    }
    let dir = tempfile::tempdir_in(kept).map_err(|e| format!("cannot use {}: {e}", kept.display()))?;
    let mut extract = Command::new("dpkg-deb");
    extract.arg("--extract").arg(&package).arg(dir.path());
    logged("opening the source package", &mut extract, log)?;
    Ok((dir.path().join(TARBALL), Some(dir)))
}

/// Fetches the package, which apt checks against the archive's signature, without installing it.
fn download(to: &Path, log: &Path) -> Result<(), String> {
    if tools::in_path("apt-get").is_none() {
        return Err(format!(
            "{PACKAGE} {VERSION} comes as a Debian package, and there is no apt-get here. \
             Unpack a 6.12.y tree and name it: --source DIR"
        ));
    }
    let parent = to.parent().unwrap_or(Path::new("."));
    let dir = tempfile::tempdir_in(parent).map_err(|e| format!("cannot use {}: {e}", parent.display()))?;
    eprintln!("downloading {PACKAGE} {VERSION}");
    let fetch = || {
        let mut apt = Command::new("apt-get");
        apt.current_dir(dir.path()).args(["download", &format!("{PACKAGE}={VERSION}")]);
        logged("downloading the source package", &mut apt, log)
    };
    fetch()
        .or_else(|_| {
            logged("apt-get update", Command::new("apt-get").arg("update"), log)?;
            fetch()
        })
        .map_err(|reason| gone(&known_versions(), &reason))?;
    let found = fs::read_dir(dir.path())
        .ok()
        .and_then(|mut files| files.find_map(|file| Some(file.ok()?.path())))
        .ok_or_else(|| gone(&known_versions(), "apt-get downloaded nothing"))?;
    fs::rename(&found, to).map_err(|e| format!("cannot keep {}: {e}", to.display()))
}

/// Versions of the package that this machine's archives have now.
fn known_versions() -> String {
    output(Command::new("apt-cache").args(["madison", PACKAGE])).unwrap_or_default()
}

/// Why there is no source, and how to go on.
fn gone(madison: &str, reason: &str) -> String {
    let versions: Vec<&str> =
        madison.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim).collect();
    let known = match versions.as_slice() {
        [] => format!("this machine's package sources have no {PACKAGE} at all"),
        some => format!("this machine's package sources have {}", some.join(", ")),
    };
    format!(
        "{PACKAGE} {VERSION}, for which the patches are made, could not be fetched: {known}.\n\
         Ways on: name a tree of 6.12.y with --source DIR (a release of kernel.org will do); install the pinned \
         version from an archive of old Debian packages; or rebase kernel/patches/6.12 and change VERSION in \
         xtask/src/kernel/source.rs.\n{reason}"
    )
}

/// Identity of a git work tree: its commit's tree, and what differs from it.
fn git_identity(tree: &Path) -> Option<String> {
    let git = |args: &[&str]| output(Command::new("git").arg("-C").arg(tree).args(args)).ok();
    if Path::new(&git(&["rev-parse", "--show-toplevel"])?).canonicalize().ok()? != tree {
        return None;
    }
    let head = git(&["rev-parse", "HEAD^{tree}"])?;
    let mut digest = Sha256::new();
    digest.update(git(&["diff", "--binary", "--no-ext-diff", "HEAD"])?);
    let others = git(&["ls-files", "--others", "--exclude-standard", "-z"])?;
    for name in others.split('\0').filter(|name| !name.is_empty()) {
        digest.update(name);
        digest.update([0]);
        digest.update(fs::read(tree.join(name)).unwrap_or_default());
    }
    Some(format!("tree {head} {}", super::cache::hex(&digest.finalize()[..8])))
}

/// Identity of any other tree: each file's path, size and time of modification.
fn walk_identity(tree: &Path) -> std::io::Result<String> {
    fn walk(dir: &Path, digest: &mut Sha256) -> std::io::Result<()> {
        let mut found: Vec<_> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
        found.sort_by_key(fs::DirEntry::file_name);
        for entry in found {
            let meta = entry.metadata()?;
            digest.update(entry.file_name().as_bytes());
            digest.update([0]);
            if meta.is_dir() {
                walk(&entry.path(), digest)?;
            } else {
                digest.update(meta.size().to_le_bytes());
                digest.update(meta.mtime().to_le_bytes());
                digest.update(meta.mtime_nsec().to_le_bytes());
            }
            digest.update([1]);
        }
        Ok(())
    }
    let mut digest = Sha256::new();
    walk(tree, &mut digest)?;
    Ok(format!("files {}", super::cache::hex(&digest.finalize()[..12])))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAKEFILE: &str = "# SPDX-License-Identifier: GPL-2.0\nVERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 9\n";

    fn tree(makefile: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("Makefile"), makefile).expect("written");
        fs::create_dir(dir.path().join("kernel")).expect("made");
        fs::write(dir.path().join("kernel/fork.c"), "int x;").expect("written");
        dir
    }

    fn git(tree: &Path, args: &[&str]) {
        let mut git = Command::new("git");
        git.arg("-C").arg(tree).args(["-c", "user.name=n", "-c", "user.email=e@example.org"]).args(args);
        output(&mut git).expect("git");
    }

    #[test]
    fn only_trees_of_the_series_are_taken() {
        let good = tree(MAKEFILE);
        assert!(matches!(Source::new(Some(good.path())), Ok(Source::Tree(_))));
        let newer = tree(&MAKEFILE.replace("12", "18"));
        let error = Source::new(Some(newer.path())).expect_err("6.18");
        assert!(error.contains("6.18") && error.contains("6.12"), "{error}");
        let other = tree("all:\n\ttrue\n");
        assert!(Source::new(Some(other.path())).expect_err("no kernel").contains("no kernel source"));
        let error = Source::new(Some(Path::new("/nonexistent/tree"))).expect_err("nothing there");
        assert!(error.contains("/nonexistent/tree"), "{error}");
    }

    #[test]
    fn a_change_of_any_file_changes_the_identity() {
        let dir = tree(MAKEFILE);
        let source = Source::new(Some(dir.path())).expect("a tree");
        let identity = || source.identity().expect("readable");
        let before = identity();
        assert_eq!(before, identity());
        fs::write(dir.path().join("kernel/fork.c"), "int y = 1;").expect("written");
        assert_ne!(before, identity());
    }

    #[test]
    fn in_git_contents_count_and_build_products_do_not() {
        let dir = tree(MAKEFILE);
        fs::write(dir.path().join(".gitignore"), "*.o\n").expect("written");
        for args in [&["init", "-q"][..], &["add", "."], &["commit", "-qm", "all"]] {
            git(dir.path(), args);
        }
        let source = Source::new(Some(dir.path())).expect("a tree");
        let identity = || source.identity().expect("readable");
        let clean = identity();
        assert!(clean.starts_with("tree "), "{clean}");
        fs::write(dir.path().join("kernel/fork.o"), "object").expect("written");
        assert_eq!(clean, identity());
        fs::write(dir.path().join("kernel/new.c"), "int n;").expect("written");
        let added = identity();
        assert_ne!(clean, added);
        fs::write(dir.path().join("kernel/fork.c"), "int z;").expect("written");
        assert_ne!(added, identity());
    }

    #[test]
    fn a_tree_is_copied_and_left_alone() {
        let dir = tree(&format!("{MAKEFILE}mrproper:\n\trm -f kernel/*.o\n"));
        fs::write(dir.path().join("kernel/fork.o"), "object").expect("written");
        let work = tempfile::tempdir().expect("a directory");
        let source = Source::new(Some(dir.path())).expect("a tree");
        source.unpack(&work.path().join("linux"), work.path(), &work.path().join("log")).expect("copied");
        assert!(work.path().join("linux/kernel/fork.c").exists());
        assert!(!work.path().join("linux/kernel/fork.o").exists());
        assert!(dir.path().join("kernel/fork.o").exists());
    }

    #[test]
    fn a_version_that_is_gone_says_what_there_is_and_how_to_go_on() {
        let madison = " linux-source-6.12 | 6.12.130-1 | archive trixie/main amd64 Packages\n";
        let text = gone(madison, "E: Version not found");
        for part in [VERSION, "6.12.130-1", "--source", "source.rs", "E: Version not found"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(gone("", "").contains("at all"));
    }
}
