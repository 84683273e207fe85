//! What a kernel is made of: source, patches, configuration, compiler. And the making of it.
//!
//! Contract: the same recipe gives the same key, and whatever may change the result is in it. A patch that
//! needs fuzz, or an option that the kernel does not take, is an error, not a different kernel.

use super::cache::{Cache, Entry, Key};
use super::source::Source;
use super::tools::{self, logged, output};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Changes whenever what an entry holds changes.
const LAYOUT: &str = "2";
/// Options that come with the patches.
const OURS: &str = "TASK_ISOLATION";
/// A module, built as one so that tests can load it, and where an entry has it.
const MODULE: &str = "drivers/net/dummy.ko";
pub(crate) const MODULE_KEPT: &str = "dummy.ko";
/// The patches' own tests, in the kernel's tree.
pub(crate) const KSELFTESTS: &str = "task_isolation";

/// Which kernel.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Choice {
    /// A tree of Linux 6.12.y to build instead of the pinned Debian source; it is copied, not changed.
    #[arg(long, value_name = "DIR")]
    pub(crate) source: Option<PathBuf>,
    /// Without kernel/patches: to compare with, or for a --source that has them already.
    #[arg(long)]
    pub(crate) stock: bool,
    /// With kernel/config/debug.config: lockdep, KASAN and the like.
    #[arg(long)]
    pub(crate) debug: bool,
    /// With kernel/config/mutants.config: as it is without --debug, and with a switch for each hook of the series.
    #[arg(long, conflicts_with = "debug")]
    pub(crate) switches: bool,
}

/// A patch: its file's name and its text.
type Patch = (String, Vec<u8>);

/// Everything that goes into a kernel.
pub(crate) struct Recipe {
    source: Source,
    identity: String,
    patches: Vec<Patch>,
    config: String,
    compiler: String,
}

impl Recipe {
    pub(crate) fn new(choice: &Choice) -> Result<Self, String> {
        let kernel = crate::root().join("kernel");
        let source = Source::new(choice.source.as_deref())?;
        let patches = if choice.stock { Vec::new() } else { patches(&kernel.join("patches/6.12"))? };
        let mut config = String::new();
        for (name, wanted) in
            [("guest.config", true), ("debug.config", choice.debug), ("mutants.config", choice.switches)]
        {
            if wanted {
                let path = kernel.join("config").join(name);
                config +=
                    &fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            }
        }
        let compiler = [("gcc", "--version"), ("ld", "--version")]
            .map(|(program, flag)| output(Command::new(program).arg(flag)))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?
            .join("\n");
        Ok(Self { identity: source.identity()?, source, patches, config, compiler })
    }

    /// Of the kernel: patches that only add tests and words do not change it.
    fn kernel_key(&self) -> Key {
        let patches = self.patches.iter().filter(|(_, text)| reaches_kernel(text));
        self.key("kernel", self.config.as_bytes(), patches)
    }

    /// Of the kselftests, which are the same for every configuration.
    fn kselftests_key(&self) -> Key {
        self.key("kselftests", b"", self.patches.iter())
    }

    fn key<'a>(&self, what: &str, config: &[u8], patches: impl Iterator<Item = &'a Patch>) -> Key {
        let fixed = [
            ("layout", LAYOUT.as_bytes()),
            ("what", what.as_bytes()),
            ("source", self.identity.as_bytes()),
            ("config", config),
            ("compiler", self.compiler.as_bytes()),
        ];
        let patches: Vec<_> = patches.map(|(_, text)| substance(text)).collect();
        Key::of(fixed.into_iter().chain(patches.iter().map(|text| ("patch", text.as_slice()))))
    }

    /// The kernel, from the cache or built now.
    pub(crate) fn kernel(&self, cache: &Cache) -> Result<Entry, String> {
        self.entry(cache, "kernel", &self.kernel_key(), |tree, dir, log| {
            // A stock kernel has no options of ours. One with our patches that has none is an error.
            let config = match self.patches.is_empty() && !has_ours(tree) {
                true => &without_ours(&self.config),
                false => &self.config,
            };
            configure(tree, config, dir, log)?;
            logged("building the kernel", make(tree).args(["bzImage", "modules"]), log)?;
            for (from, to) in [
                ("arch/x86/boot/bzImage", "bzImage"),
                ("System.map", "System.map"),
                (".config", "config"),
                (MODULE, MODULE_KEPT),
            ] {
                fs::rename(tree.join(from), dir.join(to))
                    .map_err(|e| format!("the build made no {from}: {e}; see {}", log.display()))?;
            }
            Ok(())
        })
    }

    /// The installed kselftests, likewise; nothing when this source has none of ours.
    pub(crate) fn kselftests(&self, cache: &Cache) -> Result<Option<Entry>, String> {
        let place = format!("tools/testing/selftests/{KSELFTESTS}");
        let patched = self.patches.iter().any(|(_, text)| paths(text).any(|path| path.starts_with(&place)));
        if !patched && !self.source.has(&place) {
            return Ok(None);
        }
        self.entry(cache, "kselftests", &self.kselftests_key(), |tree, dir, log| {
            logged("making the kernel's headers", make(tree).arg("headers"), log)?;
            let mut install = make(tree);
            install.args(["-C", "tools/testing/selftests", "FORCE_TARGETS=1", "install"]);
            install.arg(format!("TARGETS={KSELFTESTS}")).arg(format!("INSTALL_PATH={}", dir.display()));
            logged("building the kselftests", &mut install, log)
        })
        .map(Some)
    }

    /// An entry, which `build` fills from a patched copy of the source: (tree, entry, log).
    fn entry(
        &self,
        cache: &Cache,
        what: &str,
        key: &Key,
        build: impl FnOnce(&Path, &Path, &Path) -> Result<(), String>,
    ) -> Result<Entry, String> {
        let (entry, built) = cache.entry(key, |dir| {
            let patches = match self.patches.len() {
                0 => "without patches".to_owned(),
                n => format!("with {n} patches"),
            };
            let log = cache.log(key);
            let (id, source) = (key.as_str(), self.source.name());
            eprintln!("building {what} {id} from {source} {patches}; log: {}", log.display());
            fs::write(&log, "").map_err(|e| format!("cannot write {}: {e}", log.display()))?;
            let start = Instant::now();
            let tree = dir.join("linux");
            self.source.unpack(&tree, cache.root(), &log)?;
            for patch in &self.patches {
                apply(&tree, patch, dir, &log)?;
            }
            build(&tree, dir, &log)?;
            fs::remove_dir_all(&tree).map_err(|e| format!("cannot remove {}: {e}", tree.display()))?;
            eprintln!("built in {:.0} s", start.elapsed().as_secs_f64());
            // Of use only as long as it may be asked why a build failed.
            let _ = fs::rename(&log, dir.join("build.log"));
            Ok(())
        })?;
        if !built {
            eprintln!("{what} {} is in the cache", key.as_str());
        }
        Ok(entry)
    }
}

/// The files that a patch in git's format is about.
fn paths(patch: &[u8]) -> impl Iterator<Item = String> {
    let text = String::from_utf8_lossy(patch).into_owned();
    let paths = |line: &str| {
        let (old, new) = line.strip_prefix("diff --git a/")?.split_once(" b/")?;
        Some([old.to_owned(), new.to_owned()])
    };
    text.lines().filter_map(paths).flatten().collect::<Vec<_>>().into_iter()
}

/// What a patch does, without its message, the names of git's objects, and the version of git that ends it.
fn substance(patch: &[u8]) -> Vec<u8> {
    let lines: Vec<&[u8]> = patch.split_inclusive(|byte| *byte == b'\n').collect();
    let Some(start) = lines.iter().position(|line| line.starts_with(b"diff --git ")) else {
        // Not in git's format: all of it may matter.
        return patch.to_vec();
    };
    let version = |line: &[u8]| line.trim_ascii().iter().all(|byte| b"0123456789.".contains(byte));
    let signed = lines.iter().rposition(|line| *line == b"-- \n");
    let end = signed.filter(|at| lines[at + 1..].iter().all(|line| version(line))).unwrap_or(lines.len());
    let kept = lines[start..end.max(start)].iter().filter(|line| !line.starts_with(b"index "));
    kept.copied().flatten().copied().collect()
}

/// Can this patch change the kernel? One that does not say what it is about can.
fn reaches_kernel(patch: &[u8]) -> bool {
    let aside = |path: String| {
        path == "MAINTAINERS" || ["tools/testing/", "Documentation/"].iter().any(|dir| path.starts_with(dir))
    };
    let mut paths = paths(patch).peekable();
    paths.peek().is_none() || !paths.all(aside)
}

/// `make` in the tree, on all CPUs, so that the result depends on nothing but the recipe.
fn make(tree: &Path) -> Command {
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // Should we be killed, it stops.
    let mut make = Command::new("setpriv");
    make.args(["--pdeathsig", "TERM", "make"]);
    make.current_dir(tree).arg(format!("-j{jobs}")).arg("LOCALVERSION=");
    make.args(["KBUILD_BUILD_USER=isoplane", "KBUILD_BUILD_HOST=isoplane", "KBUILD_BUILD_TIMESTAMP=@0"]);
    // A make that runs us must not lend its flags.
    for name in ["MAKEFLAGS", "MFLAGS", "CROSS_COMPILE", "ARCH", "KCFLAGS", "KBUILD_OUTPUT"] {
        make.env_remove(name);
    }
    if tools::in_path("ccache").is_some() {
        make.arg("CC=ccache gcc");
    }
    make
}

/// The series in its order.
fn patches(dir: &Path) -> Result<Vec<Patch>, String> {
    let named = |e: std::io::Error| format!("cannot read {}: {e}", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(named)? {
        let path = entry.map_err(named)?.path();
        if path.extension().is_some_and(|extension| extension == "patch") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push((name, fs::read(&path).map_err(named)?));
        }
    }
    found.sort();
    if found.is_empty() {
        eprintln!("no patches in {}: this is a stock kernel", dir.display());
    }
    Ok(found)
}

fn apply(tree: &Path, (name, text): &Patch, dir: &Path, log: &Path) -> Result<(), String> {
    let file = dir.join("patch");
    fs::write(&file, text).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
    let mut patch = Command::new("patch");
    patch.current_dir(tree).args(["--strip=1", "--fuzz=0", "--force", "--no-backup-if-mismatch", "--input"]);
    logged(&format!("applying {name} without fuzz"), patch.arg(&file), log)?;
    fs::remove_file(&file).map_err(|e| format!("cannot remove {}: {e}", file.display()))
}

/// Makes `.config`: what the fragments name, and nothing else that can be off.
fn configure(tree: &Path, config: &str, dir: &Path, log: &Path) -> Result<(), String> {
    let file = dir.join("fragments");
    fs::write(&file, config).map_err(|e| format!("cannot write {}: {e}", file.display()))?;
    let mut all = make(tree);
    all.arg(format!("KCONFIG_ALLCONFIG={}", file.display())).arg("allnoconfig");
    logged("configuring the kernel", &mut all, log)?;
    let made = fs::read_to_string(tree.join(".config")).map_err(|e| format!("no .config: {e}"))?;
    let lost = lost(config, &made);
    if lost.is_empty() {
        return Ok(());
    }
    Err(format!(
        "the kernel does not take these options of kernel/config: {}. What they depend on is off, or this source \
         has no such options",
        lost.join(", ")
    ))
}

/// One line of a configuration: the option, and its value or nothing when it is off.
fn option(line: &str) -> Option<(&str, Option<&str>)> {
    if let Some(off) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
        return off.starts_with("CONFIG_").then_some((off, None));
    }
    let (name, value) = line.split_once('=')?;
    name.starts_with("CONFIG_").then_some((name, Some(value).filter(|value| *value != "n")))
}

/// Options that were asked for and did not become what was asked.
fn lost(asked: &str, made: &str) -> Vec<String> {
    let made: std::collections::HashMap<_, _> = made.lines().filter_map(option).collect();
    // The last line about an option counts.
    let asked: std::collections::BTreeMap<_, _> = asked.lines().filter_map(option).collect();
    asked
        .into_iter()
        .filter(|(name, value)| made.get(name).copied().flatten() != *value)
        .map(|(name, value)| format!("{name}={}", value.unwrap_or("n")))
        .collect()
}

/// Does a tree have the options that the patches add?
fn has_ours(tree: &Path) -> bool {
    let text = fs::read_to_string(tree.join("init/Kconfig")).unwrap_or_default();
    text.lines().any(|line| line.trim_end() == format!("config {OURS}"))
}

/// The fragments without the options that the patches add.
fn without_ours(config: &str) -> String {
    let keep = |line: &&str| option(line).is_none_or(|(name, _)| !name.contains(OURS));
    config.lines().filter(keep).flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        Recipe {
            source: Source::Pinned,
            identity: "linux-source-6.12=6.12.1".into(),
            patches: vec![("0001-a.patch".into(), b"+a".to_vec()), ("0002-b.patch".into(), b"+b".to_vec())],
            config: "CONFIG_SMP=y\n".into(),
            compiler: "gcc 12".into(),
        }
    }

    #[test]
    fn whatever_goes_in_is_in_the_key() {
        let base = recipe().kernel_key();
        assert_eq!(base, recipe().kernel_key());
        let changes: [fn(&mut Recipe); 7] = [
            |r| r.identity.push('0'),
            |r| r.config.push_str("CONFIG_NUMA=y\n"),
            |r| r.compiler = "gcc 14".into(),
            |r| r.patches[1].1.push(b'!'),
            |r| r.patches.swap(0, 1),
            |r| drop(r.patches.pop()),
            |r| r.patches.clear(),
        ];
        let mut keys = vec![base];
        for change in changes {
            let mut recipe = recipe();
            change(&mut recipe);
            keys.push(recipe.kernel_key());
        }
        keys.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        let all = keys.len();
        keys.dedup();
        assert_eq!(keys.len(), all, "two recipes share a key");
    }

    #[test]
    fn tests_and_words_leave_the_kernel_as_it_is() {
        let patch = |paths: &[&str]| -> Vec<u8> {
            paths.iter().flat_map(|path| format!("diff --git a/{path} b/{path}\n+x\n").into_bytes()).collect()
        };
        let tests =
            patch(&["MAINTAINERS", "tools/testing/selftests/task_isolation/a.c", "Documentation/a.rst"]);
        assert!(!reaches_kernel(&tests));
        assert!(reaches_kernel(&patch(&["Documentation/a.rst", "kernel/fork.c"])));
        assert!(reaches_kernel(&patch(&["tools/objtool/check.c"])));
        assert!(reaches_kernel(b"--- a/Documentation/x\n+++ b/Documentation/x\n"));
        let mut with = recipe();
        with.patches.push(("0003-tests.patch".into(), tests));
        assert_eq!(with.kernel_key(), recipe().kernel_key());
        assert_ne!(with.kselftests_key(), recipe().kselftests_key());
        assert_ne!(with.kselftests_key(), with.kernel_key());
    }

    #[test]
    fn a_patch_may_be_reworded_without_another_build() {
        let patch = |message: &str, line: &str| {
            let diff =
                format!("diff --git a/f b/f\nindex 1..2 100644\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n{line}\n");
            format!("From 12 Mon\nSubject: {message}\n---\n f | 2 +-\n\n{diff}-- \n2.39\n").into_bytes()
        };
        let old = substance(&patch("one", "+a"));
        assert_eq!(old, substance(&patch("two", "+a")));
        assert_ne!(old, substance(&patch("one", "+b")));
        assert_eq!(old, b"diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n+a\n");
        let removed = patch("one", "-- \n+b");
        assert_ne!(substance(&removed), substance(&patch("one", "-- \n+c")), "a removed line ends no patch");
        assert_eq!(substance(b"--- a/f\n+++ b/f\n"), b"--- a/f\n+++ b/f\n");
    }

    #[test]
    fn one_build_of_the_kselftests_serves_every_configuration() {
        let mut debug = recipe();
        debug.config.push_str("CONFIG_KASAN=y\n");
        assert_eq!(debug.kselftests_key(), recipe().kselftests_key());
    }

    #[test]
    fn patches_come_in_order_and_nothing_else_does() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["0010-z.patch", "0002-b.patch", "README", "0001-a.patch~"] {
            fs::write(dir.path().join(name), name).expect("written");
        }
        let found = patches(dir.path()).expect("readable");
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["0002-b.patch", "0010-z.patch"]);
        assert!(patches(&dir.path().join("none")).expect_err("no such directory").contains("none"));
    }

    #[test]
    fn a_patch_that_needs_fuzz_is_refused_and_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let tree = dir.path().join("linux");
        fs::create_dir(&tree).expect("made");
        let patch = |context: &str| {
            let text = format!("--- a/f\n+++ b/f\n@@ -1,4 +1,5 @@\n {context}\n two\n three\n+new\n four\n");
            ("0001-f.patch".to_owned(), text.into_bytes())
        };
        let try_it = |patch: &Patch| {
            fs::write(tree.join("f"), "one\ntwo\nthree\nfour\n").expect("written");
            apply(&tree, patch, dir.path(), &dir.path().join("log"))
        };
        try_it(&patch("one")).expect("applies");
        assert_eq!(fs::read_to_string(tree.join("f")).expect("there"), "one\ntwo\nthree\nnew\nfour\n");
        let error = try_it(&patch("uno")).expect_err("needs fuzz");
        assert!(error.contains("0001-f.patch"), "{error}");
    }

    #[test]
    fn options_that_did_not_take_are_found() {
        let asked = "# words\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=5\nCONFIG_B=n\n";
        assert!(lost(asked, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=5\n").is_empty());
        assert_eq!(
            lost(asked, "CONFIG_B=y\nCONFIG_C=y\nCONFIG_D=6\n"),
            ["CONFIG_A=y", "CONFIG_B=n", "CONFIG_C=n", "CONFIG_D=5"]
        );
    }

    #[test]
    fn a_stock_kernel_is_not_asked_for_our_options() {
        let config =
            "CONFIG_A=y\nCONFIG_TASK_ISOLATION=y\n# CONFIG_DEBUG_TASK_ISOLATION is not set\n# text\n";
        assert_eq!(without_ours(config), "CONFIG_A=y\n# text\n");
    }
}
