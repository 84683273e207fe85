//! Which features to accept.
//!
//! Contract: what we cannot do without and the device does not offer is an error that names it; what is only
//! wanted is taken if it is there; nothing is accepted that this driver does not use.

use super::config::VirtioConfig;
use super::error::VirtioError;
use super::layout::Features;
use crate::xdp::Want;

/// Chooses among what is offered.
pub(super) fn choose(
    address: &str,
    config: &VirtioConfig,
    offered: Features,
) -> Result<Features, VirtioError> {
    let missing = |feature, why| Err(VirtioError::Missing { address: address.to_owned(), feature, why });
    let mut chosen = Features::empty();
    let mut take = |feature: Features, want: Want, why: &'static str| {
        match want {
            Want::Never => {}
            _ if offered.contains(feature) => chosen |= feature,
            Want::Prefer => {}
            Want::Require => return missing(feature, why),
        }
        Ok(())
    };
    let if_asked = |asked: bool| if asked { Want::Require } else { Want::Never };

    take(Features::VERSION_1, Want::Require, "it is older than virtio 1.0 (QEMU: disable-modern=off)")?;
    take(
        Features::ACCESS_PLATFORM,
        config.access_platform,
        "it would read and write memory past the IOMMU (QEMU: iommu_platform=on)",
    )?;
    take(Features::RING_PACKED, config.packed, "packed rings are required (QEMU: packed=on)")?;
    // QEMU (7.2) does not move the index of a packed ring on when it goes on after a receiver that was full: it would
    // wait for a doorbell that is not due, and nothing would be sent any more.
    let packed = config.packed != Want::Never && offered.contains(Features::RING_PACKED);
    let event_index = match config.event_index {
        Want::Prefer if packed => Want::Never,
        wanted => wanted,
    };
    take(Features::EVENT_IDX, event_index, "doorbells by index are required (QEMU: event_idx=on)")?;
    let several = if_asked(config.multi_buffer);
    take(Features::MRG_RXBUF, several, "packets of several frames need it (QEMU: mrg_rxbuf=on)")?;
    take(Features::INDIRECT_DESC, several, "packets of several frames need it (QEMU: indirect_desc=on)")?;
    take(
        Features::GUEST_CSUM,
        if_asked(config.rx_checksum),
        "checksums of received packets need it (QEMU: guest_csum=on)",
    )?;
    take(
        Features::HASH_REPORT,
        if_asked(config.rx_hash),
        "hashes of received packets need it (QEMU: hash=on)",
    )?;
    let commanded = config.queues > 1 || config.rx_hash;
    let command = if commanded || config.mac.is_some() || !config.vlans.is_empty() {
        Want::Require
    } else {
        Want::Prefer
    };
    take(Features::CTRL_VQ, command, "what was asked for is set through it (QEMU: ctrl_vq=on)")?;
    take(
        Features::CTRL_MAC_ADDR,
        if config.mac.is_some() { Want::Require } else { Want::Prefer },
        "an Ethernet address is set through it (QEMU: ctrl_mac_addr=on)",
    )?;
    // Without VLANs there is nothing to filter, and a filter that is on drops all tagged packets.
    take(
        Features::CTRL_VLAN,
        if_asked(!config.vlans.is_empty()),
        "VLANs are filtered through it (QEMU: ctrl_vlan=on)",
    )?;
    take(
        Features::MQ,
        if config.queues > 1 { Want::Require } else { Want::Never },
        "there is one pair of queues without it (QEMU: mq=on and a back end with queues)",
    )?;
    // Flows spread by a hash that we choose, where the device can.
    let spread = if config.queues > 1 { Want::Prefer } else { Want::Never };
    take(Features::RSS, spread, "")?;
    for wanted in [
        Features::CTRL_RX,
        Features::MAC,
        Features::STATUS,
        Features::MTU,
        Features::CSUM,
        Features::ORDER_PLATFORM,
        Features::RING_RESET,
    ] {
        take(wanted, Want::Prefer, "")?;
    }
    // What depends on the control queue goes with it (5.1.3.1).
    if !chosen.contains(Features::CTRL_VQ) {
        chosen -= Features::CTRL_RX | Features::CTRL_MAC_ADDR | Features::RSS;
    }
    Ok(chosen)
}
