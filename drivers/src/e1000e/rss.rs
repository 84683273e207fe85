//! Receive-side scaling: which queue a flow comes to (datasheet sections 7.1.11, 10.2.5).
//!
//! Contract: both directions of a flow hash alike, so that they come to one worker: the key repeats two bytes,
//! for which the Toeplitz hash of (source, destination) is that of (destination, source).

use super::layout::{
    MRQC, MRQC_ALL_FIELDS, MRQC_RSS, RETA, RETA_QUEUE_1, RETA_WORDS, RSSRK, RSSRK_WORDS, RXCSUM, RXCSUM_HASH,
    RXCSUM_IP, RXCSUM_TCP_UDP,
};
use super::rx::RxMode;
use crate::pci::Registers;

/// Bytes of the key, in pairs.
pub(super) const KEY: [u8; 2] = [0x6d, 0x5a];

/// Sets hash and checksum offload; `queues` share the flows evenly.
pub(super) fn program<R: Registers>(bar: &R, mode: RxMode, queues: u16) {
    let checksums = RXCSUM_IP | RXCSUM_TCP_UDP;
    bar.write32(MRQC, 0);
    if mode == RxMode::Legacy {
        bar.write32(RXCSUM, checksums);
        return;
    }
    bar.write32(RXCSUM, checksums | RXCSUM_HASH);
    let key = u32::from_le_bytes([KEY[0], KEY[1], KEY[0], KEY[1]]);
    for word in 0..RSSRK_WORDS {
        bar.write32(RSSRK + word * 4, key);
    }
    let entry = |n: u16| if n % queues == 1 { RETA_QUEUE_1 } else { 0 };
    let table = u32::from_le_bytes([entry(0), entry(1), entry(2), entry(3)]);
    for word in 0..RETA_WORDS {
        bar.write32(RETA + word * 4, table);
    }
    if queues > 1 || mode == RxMode::Hash {
        bar.write32(MRQC, MRQC_RSS | MRQC_ALL_FIELDS);
    }
}
