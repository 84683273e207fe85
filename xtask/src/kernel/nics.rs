//! The guest's network devices, and its way to the monitor that pulls their cables and takes them out.
//!
//! ```text
//! virtio0 -- hub 0 -- virtio1     e1000e0 -- hub 2 -- e1000e1     each behind a root port of its own, so that it
//! virtio2 -- hub 1 -- virtio3     e1000e2 -- hub 3 -- e1000e3     is alone in its IOMMU group and can be unplugged
//! virtio4 -- taps on a bridge -- virtio5                          so, too: two queues each, which hubs cannot
//! spare0, spare1                  two functions of one slot, in one IOMMU group: virtio-net, with no cable
//! ports                           a device with I/O ports (pci-testdev), and nothing that drives it
//! ```
//!
//! Contract: the names are QEMU's ids; inside, `isoplane_lab::Machine` finds the devices by them. Their MAC addresses
//! are 02:00:00:00:00:NN, with NN from 0 for virtio0 to 3, e1000e0 to 3, virtio4 and 5. The taps are in a network
//! namespace of QEMU's own, which goes with it; where none can be made, there are no virtio4 and 5.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The kinds on hubs, with QEMU's device and what it is asked for. Two hubs of two devices for each.
const KINDS: [(&str, &str, &str); 2] = [("virtio", "virtio-net-pci", VIRTIO), ("e1000e", "e1000e", "")];
/// As a cloud has them: modern only, behind the IOMMU; packed rings for whoever wants them.
const VIRTIO: &str = ",disable-legacy=on,iommu_platform=on,ats=on,packed=on";
/// Where instructions are counted: packets are taken from a TX ring a while after its doorbell, all at once, and
/// not whenever the host gets round to it; so batches are as long in each run, and as long for each forwarder.
const PACED: &str = ",tx=timer";
/// Devices of a kind on hubs.
const EACH: usize = 4;
/// Those with several queues.
const MANY: [&str; 2] = ["virtio4", "virtio5"];
/// Queues of these.
const QUEUES: usize = 2;

/// Makes the taps and what they are plugged into, then becomes what it is given. The bridge learns nothing: a hub.
const TAPS: &str = "ip link add isobr type bridge ageing_time 0 mcast_snooping 0 || exit\n\
    ip link set isobr addrgenmode none up || exit\n\
    for tap in isotap0 isotap1; do\n\
        ip tuntap add $tap mode tap multi_queue || exit\n\
        ip link set $tap addrgenmode none master isobr up || exit\n\
    done\n\
    exec \"$@\"";

/// A network namespace of QEMU's own, with taps for devices of several queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taps {
    /// As root.
    Root,
    /// As somebody who is root in a user namespace.
    User,
    /// Not to be had.
    None,
}

impl Taps {
    /// Finds out what works here.
    pub(super) fn here() -> Self {
        let works = |taps: Self| {
            let command = taps.command("true");
            let mut command = match command {
                Some(command) => command,
                None => return false,
            };
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        [Self::Root, Self::User].into_iter().find(|taps| works(*taps)).unwrap_or(Self::None)
    }

    /// The command that runs `program` with the taps in its network namespace; killed when we are.
    pub(super) fn command(self, program: &str) -> Option<Command> {
        let mut command = Command::new("unshare");
        match self {
            Self::Root => command.arg("--net"),
            Self::User => command.args(["--user", "--map-root-user", "--net"]),
            Self::None => return None,
        };
        // Last: a new user namespace undoes it.
        command.args(["setpriv", "--pdeathsig", "KILL", "sh", "-c", TAPS, "sh", program]);
        Some(command)
    }
}

/// QEMU's arguments for all of them, with the monitor at `socket`; `counted` where the guest counts instructions.
pub(super) fn arguments(socket: &str, taps: Taps, counted: bool) -> Vec<String> {
    let mut all = Vec::new();
    let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
    let mut nic = |at: usize, netdev: String, device: String| {
        add("-device", format!("pcie-root-port,id=port{at},chassis={at},slot={at},addr={:#x}", 0x10 + at));
        add("-netdev", netdev);
        add("-device", format!("{device},netdev=cable{at},bus=port{at},mac=02:00:00:00:00:{at:02x}"));
    };
    for (kind, (name, device, more)) in KINDS.iter().enumerate() {
        let paced = if counted && *more == VIRTIO { PACED } else { "" };
        for each in 0..EACH {
            let at = kind * EACH + each;
            let hub = at / 2;
            nic(
                at,
                format!("hubport,id=cable{at},hubid={hub}"),
                format!("{device},id={name}{each}{more}{paced}"),
            );
        }
    }
    if taps != Taps::None {
        for (tap, name) in MANY.iter().enumerate() {
            let at = KINDS.len() * EACH + tap;
            let tap = format!(
                "tap,id=cable{at},ifname=isotap{tap},queues={QUEUES},script=no,downscript=no,vhost=off"
            );
            // An interrupt for each direction of each queue, for control, and for changes of configuration.
            let vectors = 2 * QUEUES + 2;
            // No rss=on: with taps, QEMU 7.2 loses what it steers so itself.
            nic(at, tap, format!("virtio-net-pci,id={name}{VIRTIO},mq=on,vectors={vectors}"));
        }
    }
    // The kernel holds Intel's functions apart at this place.
    add("-device", "virtio-net-pci,id=spare0,addr=0x1e.0,multifunction=on,disable-legacy=on".to_owned());
    add("-device", "virtio-net-pci,id=spare1,addr=0x1e.1,disable-legacy=on".to_owned());
    add("-device", "pci-testdev,id=ports,addr=0x1d".to_owned());
    // The monitor listens on a socket, and a virtio port calls there: chardevs are made in this order.
    add("-chardev", format!("socket,id=monitor,path={socket},server=on,wait=off"));
    add("-mon", "chardev=monitor,mode=control".to_owned());
    add("-chardev", format!("socket,id=qmp,path={socket}"));
    add("-device", "virtserialport,chardev=qmp,name=qmp".to_owned());
    all
}

/// Where the monitor listens.
pub(super) fn socket(share: &Path) -> PathBuf {
    share.join("qmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_cable_a_port_and_a_name_of_its_own() {
        let all = arguments("/s", Taps::Root, false);
        assert_eq!(all.len() % 2, 0);
        let ids = |option: &str| {
            let pairs = all.chunks(2).filter(|pair| pair[0] == option);
            let id = |pair: &[String]| {
                pair[1].split(',').find_map(|part| part.strip_prefix("id=")).map(str::to_owned)
            };
            pairs.filter_map(id).collect::<Vec<_>>()
        };
        let cables = ids("-netdev");
        assert_eq!(cables.len(), KINDS.len() * EACH + MANY.len());
        let mut names = [ids("-device"), cables, ids("-chardev")].concat();
        for id in ["virtio0", "virtio5", "e1000e0", "e1000e3", "spare0", "spare1"] {
            assert!(names.iter().any(|name| name == id), "{id} in {names:?}");
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count, "{names:?}");
        assert!(!arguments("/s", Taps::None, false).concat().contains("virtio5"));
    }

    #[test]
    fn taps_are_there_for_the_program_and_for_nobody_else() {
        let taps = Taps::here();
        let Some(mut command) = taps.command("ip") else {
            println!("skipped: no network namespace, bridge or tap can be made here");
            return;
        };
        let output = command.args(["-br", "link"]).output().expect("unshare");
        let links = String::from_utf8_lossy(&output.stdout).into_owned();
        for name in ["isobr", "isotap0", "isotap1"] {
            assert!(links.contains(name), "{name} in {links}");
            assert!(!Path::new("/sys/class/net").join(name).exists(), "{name} is here, too");
        }
    }
}
