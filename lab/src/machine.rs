//! The machine that a guest runs on: its monitor, as seen from inside.
//!
//! Contract: `cargo xtask kernel test` and `boot --nics` put QEMU's monitor (QMP) behind a virtio port of the name
//! `qmp`. One opener at a time; a command that is not answered within a minute is an error.

use crate::LabError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long an answer may take: an emulated machine on a busy host is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// The machine around us.
#[derive(Debug)]
pub struct Machine {
    port: File,
    unread: Vec<u8>,
    commands: u64,
}

fn failed(what: impl Into<String>, reason: impl ToString) -> LabError {
    LabError::Machine { what: what.into(), reason: reason.to_string() }
}

impl Machine {
    /// Finds the monitor.
    ///
    /// # Errors
    /// [`LabError::Machine`]: this is no such guest, or somebody else talks to the monitor.
    pub fn open() -> Result<Self, LabError> {
        let ports = fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten();
        let named = |port: &fs::DirEntry| {
            fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == "qmp")
        };
        let port = ports.into_iter().find(named);
        let port = port.ok_or_else(|| failed("finding the monitor", "no virtio port has the name qmp"))?;
        let path = std::path::Path::new("/dev").join(port.file_name());
        let port = OpenOptions::new().read(true).write(true).open(&path);
        let port = port.map_err(|error| failed(format!("opening {}", path.display()), error))?;
        let mut machine = Self { port, unread: Vec::new(), commands: 0 };
        // Refused when somebody has asked for it before us, which is as good.
        let _ = machine.execute("qmp_capabilities", json!({}));
        Ok(machine)
    }

    /// Has the monitor do something, and gives its answer.
    ///
    /// # Errors
    /// [`LabError::Machine`]: it refuses, or does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, LabError> {
        self.commands += 1;
        // Answers to whoever was here before may still come.
        let id = format!("{}-{}", std::process::id(), self.commands);
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.port.write_all(line.as_bytes()).map_err(|error| failed(command, error))?;
        let mut answer = self.wait(command, |message| message["id"] == json!(id))?;
        match &answer["error"] {
            Value::Null => Ok(answer["return"].take()),
            error => Err(failed(command, error)),
        }
    }

    /// Waits for an event of this name.
    ///
    /// # Errors
    /// [`LabError::Machine`]: it does not come.
    pub fn event(&mut self, name: &str) -> Result<Value, LabError> {
        self.wait(name, |message| message["event"] == json!(name))
    }

    /// The next message that is meant; the others are lost.
    fn wait(&mut self, what: &str, meant: impl Fn(&Value) -> bool) -> Result<Value, LabError> {
        let end = Instant::now() + PATIENCE;
        loop {
            while let Some(at) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=at).collect();
                if let Ok(message) = serde_json::from_slice::<Value>(&line)
                    && meant(&message)
                {
                    return Ok(message);
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.port.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout).map_err(|error| failed(what, error))? == 0 {
                return Err(failed(what, "no answer within a minute"));
            }
            let mut some = [0; 4096];
            match self.port.read(&mut some) {
                Ok(0) => return Err(failed(what, "the monitor has hung up")),
                Ok(read) => self.unread.extend_from_slice(&some[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(what, error)),
            }
        }
    }

    /// The PCI address of the device with this id.
    ///
    /// # Errors
    /// [`LabError::Machine`]: there is none.
    pub fn address(&mut self, id: &str) -> Result<String, LabError> {
        let buses = self.execute("query-pci", json!({}))?;
        let find = |device: &Value| find(device, id);
        let all = buses.as_array().into_iter().flatten();
        let found = all.flat_map(|bus| bus["devices"].as_array().into_iter().flatten()).find_map(find);
        found.ok_or_else(|| failed(format!("finding device {id}"), "there is none on PCI"))
    }

    /// Plugs the cable of a network device in, or pulls it out.
    ///
    /// # Errors
    /// [`LabError::Machine`]: there is no such device.
    pub fn set_link(&mut self, id: &str, up: bool) -> Result<(), LabError> {
        self.execute("set_link", json!({ "name": id, "up": up })).map(drop)
    }

    /// Asks for a device to be taken out; it is out when the guest has agreed ([`Machine::event`] `DEVICE_DELETED`).
    ///
    /// # Errors
    /// [`LabError::Machine`]: there is no such device, or it cannot be taken out.
    pub fn unplug(&mut self, id: &str) -> Result<(), LabError> {
        self.execute("device_del", json!({ "id": id })).map(drop)
    }
}

/// The address of a device with this id, that one or one behind it.
fn find(device: &Value, id: &str) -> Option<String> {
    if device["qdev_id"] == json!(id) {
        let number = |name: &str| device[name].as_u64();
        return Some(format!("0000:{:02x}:{:02x}.{}", number("bus")?, number("slot")?, number("function")?));
    }
    device["pci_bridge"]["devices"].as_array()?.iter().find_map(|device| find(device, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_behind_bridges() {
        let device = |bus, id: &str| json!({"bus": bus, "slot": 0, "function": 0, "qdev_id": id});
        let bridge = json!({"bus": 0, "slot": 16, "function": 1, "qdev_id": "port1",
            "pci_bridge": {"devices": [device(26, "a"), device(27, "b")]}});
        assert_eq!(find(&bridge, "b").as_deref(), Some("0000:1b:00.0"));
        assert_eq!(find(&bridge, "port1").as_deref(), Some("0000:00:10.1"));
        assert_eq!(find(&bridge, "c"), None);
    }
}
