//! What can go wrong in the laboratory.

use std::io;
use std::path::PathBuf;

/// Why something could not be set up, asked or sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// Namespaces and raw sockets need privileges.
    #[error(
        "{what} needs root with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW; run it with sudo, or in a \
         container that has them"
    )]
    NotPermitted {
        /// What was refused.
        what: &'static str,
    },
    /// A namespace could not be made, opened, entered or left.
    #[error("{what}: {source}")]
    Namespace {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no interface of this name in the namespace.
    #[error("there is no interface {name} in the namespace")]
    NoSuchLink {
        /// The name asked for.
        name: String,
    },
    /// The kernel refused a netlink request.
    #[error("{what} {link}: {source}")]
    Netlink {
        /// What was asked.
        what: &'static str,
        /// The interface that it was about.
        link: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel's answer makes no sense.
    #[error("{what} {link}: unexpected answer from the kernel ({reason})")]
    Answer {
        /// What was asked.
        what: &'static str,
        /// The interface that it was about.
        link: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// An offload could not be switched.
    #[error("switching {what} of {link}: {source}")]
    Offload {
        /// The offload.
        what: &'static str,
        /// The interface.
        link: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A kernel parameter could not be set.
    #[error("writing {}: {source}", path.display())]
    Sysctl {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The machine around the guest does not do it.
    #[error("the machine's monitor: {what}: {reason}")]
    Machine {
        /// What was tried.
        what: String,
        /// What the monitor said, or why it could not be asked.
        reason: String,
    },
    /// A socket call failed.
    #[error("{what}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl LabError {
    /// Is it for lack of privileges? A container's `/proc/sys` that may only be read counts.
    #[must_use]
    pub fn is_not_permitted(&self) -> bool {
        use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        match self {
            Self::NotPermitted { .. } => true,
            Self::Sysctl { source, .. } | Self::Offload { source, .. } => {
                matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem)
            }
            _ => false,
        }
    }

    pub(crate) fn namespace(what: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted { what },
            _ => Self::Namespace { what, source },
        }
    }

    pub(crate) fn socket(what: &'static str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotPermitted { what },
            _ => Self::Socket { what, source },
        }
    }
}
