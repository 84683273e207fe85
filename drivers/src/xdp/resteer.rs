//! Changing what a port takes while it runs.
//!
//! Contract: each packet meets the old rules or the new ones, none meets neither: the kernel puts the new
//! program in the place of the old one in one step (`BPF_LINK_UPDATE`). When that fails the old rules stay.

use super::bpf::{Attachment, Program};
use super::error::XdpError;
use super::program;
use super::steering::Steering;
use std::sync::{Arc, Weak};

/// Changes what a port takes; see [`XdpPort::steering`](super::XdpPort::steering).
///
/// It belongs to the process that opened the port, and does not keep the port open.
#[derive(Debug, Clone)]
pub struct XdpSteering {
    interface: String,
    multi_buffer: bool,
    attachment: Weak<Attachment>,
}

impl XdpSteering {
    pub(super) fn new(interface: &str, multi_buffer: bool, attachment: &Arc<Attachment>) -> Self {
        Self { interface: interface.to_owned(), multi_buffer, attachment: Arc::downgrade(attachment) }
    }

    /// Name of the interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Takes from now on what `steering` says.
    ///
    /// # Errors
    /// See [`XdpError`]; the port then goes on as it was.
    pub fn set(&self, steering: &Steering) -> Result<(), XdpError> {
        let name = self.interface.as_str();
        steering.check(name)?;
        let closed = || XdpError::Closed { interface: name.to_owned() };
        let attachment = self.attachment.upgrade().ok_or_else(closed)?;
        let too_many = || XdpError::TooManyRules {
            interface: name.to_owned(),
            rules: steering.rules().len(),
            most: Steering::MAX_RULES,
        };
        let code = program::assemble(steering, attachment.map.fd()).ok_or_else(too_many)?;
        let program = Program::load(name, &code, self.multi_buffer)?;
        attachment.replace(program).map_err(XdpError::permission(
            name,
            "replacing the XDP program",
            "CAP_NET_ADMIN",
        ))
    }
}
