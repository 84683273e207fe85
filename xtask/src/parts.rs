//! The parts of `cargo xtask test`, in the order in which they run: cheap checks first.

use crate::kernel::Ask;
use clap::ValueEnum;

/// One part; its name is what `--skip` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// rustfmt.
    Format,
    /// Clippy on everything, warnings denied.
    Clippy,
    /// rustdoc, warnings denied.
    Rustdoc,
    /// Unit, model, integration and documentation tests of the crates, and the examples.
    Workspace,
    /// Instructions per packet, counted by valgrind.
    Instructions,
    /// End-to-end tests across crates, in network namespaces; as root.
    Namespaces,
    /// The patched kernel in QEMU: its kselftests, and the crates' tests for it.
    Guest,
    /// The same with a kernel that checks itself (lockdep, KASAN and the like); only with `--full`.
    GuestDebug,
    /// The fuzz targets, some seconds each; only with `--full`.
    Fuzz,
    /// Whether the tests in the guest notice when a hook of the series is missing; only with `--full`.
    Mutants,
}

/// Packages whose tests are parts of their own.
const END_TO_END: &str = "isoplane-tests";
const COUNTED: &str = "isoplane-benches";

impl Part {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// Debian packages that the part needs.
    pub(crate) const fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Instructions => &["valgrind"],
            // Independent views: of what the lab has made, of what a worker does, of what a router answers.
            // What drives a router, and what hosts see of it.
            Self::Workspace => &[
                "iproute2",
                "strace",
                "python3-scapy",
                "bird2",
                "iperf3",
                "iputils-ping",
                "iputils-tracepath",
                "traceroute",
            ],
            Self::Namespaces => &["strace"],
            // libFuzzer is built from source.
            Self::Fuzz => &["g++"],
            _ => &[],
        }
    }

    /// Why the part cannot run here, if it cannot.
    pub(crate) fn obstacle(self) -> Option<String> {
        let needs_root = matches!(self, Self::Namespaces);
        (needs_root && !nix::unistd::geteuid().is_root())
            .then(|| "network namespaces and AF_XDP need root".to_owned())
    }

    /// The parts of a run, in order.
    pub(crate) fn all(full: bool) -> impl Iterator<Item = Self> {
        Self::value_variants()
            .iter()
            .copied()
            .filter(move |part| full || !matches!(part, Self::GuestDebug | Self::Fuzz | Self::Mutants))
    }

    /// Arguments for cargo, and then for the test harness.
    pub(crate) fn cargo(self) -> (Vec<&'static str>, Vec<&'static str>) {
        const TEST: [&str; 3] = ["test", "--all-features", "--no-fail-fast"];
        let test = |more: &[&'static str]| TEST.iter().chain(more).copied().collect();
        match self {
            Self::Format => (vec!["fmt", "--all", "--check"], vec![]),
            Self::Clippy => {
                (vec!["clippy", "--workspace", "--all-targets", "--all-features"], vec!["-D", "warnings"])
            }
            Self::Rustdoc => (vec!["doc", "--workspace", "--all-features", "--no-deps"], vec![]),
            // Without a choice of targets: only then cargo builds the examples as programs, to be run.
            Self::Workspace => {
                (test(&["--workspace", "--exclude", END_TO_END, "--exclude", COUNTED]), vec!["--show-output"])
            }
            // What is counted is what is shipped.
            Self::Instructions => {
                (test(&["--package", COUNTED, "--all-targets", "--release"]), vec!["--show-output"])
            }
            // Workers spin: one test at a time leaves the other CPU to the kernel and the kicker.
            Self::Namespaces => (
                test(&["--package", END_TO_END, "--all-targets"]),
                vec!["--show-output", "--test-threads", "1"],
            ),
            // Not cargo's.
            Self::Guest | Self::GuestDebug | Self::Fuzz | Self::Mutants => (vec![], vec![]),
        }
    }

    /// What the part asks of the guest, if that is where it runs.
    pub(crate) const fn guest(self) -> Option<Ask> {
        match self {
            Self::Guest => Some(Ask::Tests),
            Self::GuestDebug => Some(Ask::DebugTests),
            Self::Mutants => Some(Ask::Mutants),
            _ => None,
        }
    }

    /// Does the part run tests, so that its output holds counts?
    pub(crate) const fn counts(self) -> bool {
        !matches!(self, Self::Format | Self::Clippy | Self::Rustdoc)
    }
}
