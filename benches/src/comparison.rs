//! What a comparison is.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Why a comparison could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The peer's program did not start.
    #[error(
        "cannot run {program}: {source}; is its package installed? (cargo xtask bench installs it as root)"
    )]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The peer ended or said something that we do not understand.
    #[error("{program}: {what}; its last words: {output}")]
    Peer {
        /// The program.
        program: String,
        /// What was expected.
        what: String,
        /// End of its output.
        output: String,
    },
    /// Our side failed.
    #[error("our side of {case}: {what}")]
    Ours {
        /// Name of the case.
        case: String,
        /// What went wrong.
        what: String,
    },
    /// A comparison needs more than this machine has.
    #[error("{0}")]
    Machine(String),
}

impl BenchError {
    /// Our side failed with an error of any type.
    pub fn ours(case: &str, error: impl std::fmt::Display) -> Self {
        Self::Ours { case: case.to_owned(), what: error.to_string() }
    }
}

/// One measurement.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// What is compared, in the comparison's unit; more is better.
    pub rate: f64,
    /// Figures worth knowing beside it, by a name that ends in their unit.
    #[serde(default)]
    pub beside: BTreeMap<String, f64>,
}

/// Where a comparison is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Place {
    /// On the machine that the program runs on.
    Here,
    /// In the guest of `cargo xtask kernel`, with its network devices.
    Guest,
    /// There, with a clock that counts instructions (`--counted`).
    Counted,
}

/// What a ratio must be for a run to succeed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Target {
    /// This or more.
    AtLeast(f64),
    /// More than this.
    MoreThan(f64),
}

impl Target {
    /// Is it met?
    #[must_use]
    pub fn met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio >= least,
            Self::MoreThan(limit) => ratio > limit,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, "at least {least:.2}"),
            Self::MoreThan(limit) => write!(f, "more than {limit:.2}"),
        }
    }
}

/// One comparison: our side against a peer's.
pub trait Comparison {
    /// Name on the command line, such as `null`. Several cases may share it.
    fn name(&self) -> &'static str;
    /// Which variant of the comparison, where there are several.
    fn case(&self) -> &'static str {
        ""
    }
    /// The peer and how it is run.
    fn peer_name(&self) -> &'static str;
    /// What is counted.
    fn unit(&self) -> &'static str;
    /// Where it is made.
    fn place(&self) -> Place {
        Place::Here
    }
    /// What the ratio must be; without a target it is reported and nothing else.
    fn target(&self) -> Option<Target> {
        None
    }
    /// Debian packages that the peer comes in.
    fn packages(&self) -> &'static [&'static str];
    /// Measures our side. Runs in a process of its own.
    ///
    /// # Errors
    /// See [`BenchError`].
    fn ours(&self) -> Result<Sample, BenchError>;
    /// Measures the peer.
    ///
    /// # Errors
    /// See [`BenchError`].
    fn peer(&self) -> Result<Sample, BenchError>;
}

/// Every comparison there is.
#[must_use]
pub fn all() -> Vec<Box<dyn Comparison>> {
    use crate::fib::{Lookup, Lookups};
    use crate::router::{Forward, Version};
    use crate::vfio::{Measure, Nic, Vfio};
    use crate::{afxdp::AfXdp, diag, diag::Diag, null::Null, wire::Load};
    vec![
        Box::new(Null),
        Box::new(AfXdp(Load::TxOnly)),
        Box::new(AfXdp(Load::Overload)),
        Box::new(Diag(diag::Line::Integers)),
        Box::new(Diag(diag::Line::Formatted)),
        Box::new(Diag(diag::Line::Message)),
        Box::new(Lookup(Lookups::Routed4)),
        Box::new(Lookup(Lookups::Any4)),
        Box::new(Lookup(Lookups::Routed6)),
        Box::new(crate::flap::Flap),
        Box::new(Forward(Version::Four)),
        Box::new(Forward(Version::Six)),
        Box::new(Vfio(Nic::Virtio, Measure::Rate)),
        Box::new(Vfio(Nic::E1000e, Measure::Rate)),
        Box::new(Vfio(Nic::Virtio, Measure::Instructions)),
        Box::new(Vfio(Nic::E1000e, Measure::Instructions)),
    ]
}
