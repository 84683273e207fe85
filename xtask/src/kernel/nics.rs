//! The guest's network devices, and its way to the monitor that pulls their cables and takes them out.
//!
//! ```text
//! virtio0 -- hub 0 -- virtio1     e1000e0 -- hub 2 -- e1000e1     each behind a root port of its own, so that it
//! virtio2 -- hub 1 -- virtio3     e1000e2 -- hub 3 -- e1000e3     is alone in its IOMMU group and can be unplugged
//! spare0, spare1                  two functions of one slot, in one IOMMU group: virtio-net, with no cable
//! ports                           a device with I/O ports (pci-testdev), and nothing that drives it
//! ```
//!
//! Contract: the names are QEMU's ids; inside, `isoplane_lab::Machine` finds the devices by them. Their MAC addresses
//! are 02:00:00:00:00:NN, with NN from 0 in the order of the picture's lines, left to right, top to bottom, virtio
//! first.

use std::path::Path;

/// The kinds on hubs, with QEMU's device and what it is asked for. Two hubs of two devices for each.
const KINDS: [(&str, &str, &str); 2] = [
    // As a cloud has them: modern only, behind the IOMMU; packed rings for whoever wants them.
    ("virtio", "virtio-net-pci", ",disable-legacy=on,iommu_platform=on,ats=on,packed=on"),
    ("e1000e", "e1000e", ""),
];
/// Devices of a kind.
const EACH: usize = 4;

/// QEMU's arguments for all of them, with the monitor at `socket`.
pub(super) fn arguments(socket: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
    for (kind, (name, device, more)) in KINDS.iter().enumerate() {
        for each in 0..EACH {
            let at = kind * EACH + each;
            let hub = at / 2;
            add(
                "-device",
                format!("pcie-root-port,id=port{at},chassis={at},slot={at},addr={:#x}", 0x10 + at),
            );
            add("-netdev", format!("hubport,id=cable{at},hubid={hub}"));
            let mac = format!("02:00:00:00:00:{at:02x}");
            add("-device", format!("{device},id={name}{each},netdev=cable{at},bus=port{at},mac={mac}{more}"));
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
pub(super) fn socket(share: &Path) -> std::path::PathBuf {
    share.join("qmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_cable_a_port_and_a_name_of_its_own() {
        let all = arguments("/s");
        assert_eq!(all.len() % 2, 0);
        let ids = |option: &str| {
            let pairs = all.chunks(2).filter(|pair| pair[0] == option);
            let id = |pair: &[String]| {
                pair[1].split(',').find_map(|part| part.strip_prefix("id=")).map(str::to_owned)
            };
            pairs.filter_map(id).collect::<Vec<_>>()
        };
        let cables = ids("-netdev");
        assert_eq!(cables.len(), KINDS.len() * EACH);
        let mut names = [ids("-device"), cables, ids("-chardev")].concat();
        for id in ["virtio0", "virtio3", "e1000e0", "e1000e3", "spare0", "spare1"] {
            assert!(names.iter().any(|name| name == id), "{id} in {names:?}");
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count, "{names:?}");
    }
}
