//! The suite's packets: Ethernet frames of the EtherType for local experiments (IEEE 802 section 9.2.3,
//! 0x88B5), whose bytes are a function of a sequence number and a length, so that a receiver can tell
//! which one it has and that nothing in it has changed.

/// Bytes before the filling: two addresses, EtherType, magic, sequence number.
pub const HEADER: usize = 22;
/// EtherType of the suite's packets.
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MAGIC: [u8; 4] = *b"cnfm";
/// Locally administered, unicast: no kernel answers it.
const ADDRESSES: [u8; 12] = [0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1];

/// Packet number `sequence`, `len` bytes long; a shorter one than [`HEADER`] is cut off.
#[must_use]
pub fn make(sequence: u32, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len.max(HEADER));
    bytes.extend(ADDRESSES);
    bytes.extend(ETHERTYPE);
    bytes.extend(MAGIC);
    bytes.extend(sequence.to_be_bytes());
    let mut state = u64::from(sequence) << 20 | len as u64;
    while bytes.len() < len {
        state = split_mix(state);
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The sequence number, when this is a whole and unchanged packet of the suite.
///
/// `Err` is a packet of the suite that has changed; `Ok(None)` is somebody else's, or one shorter than
/// Ethernet allows that was padded on the way (IEEE 802.3, clause 4.2.3.3).
///
/// # Errors
/// What is wrong with it.
pub fn check(bytes: &[u8]) -> Result<Option<u32>, String> {
    let ours = bytes.get(12..18).is_some_and(|b| b[..2] == ETHERTYPE && b[2..] == MAGIC);
    let Some(sequence) = bytes.get(18..HEADER).filter(|_| ours) else { return Ok(None) };
    let sequence = u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]]);
    let expected = make(sequence, bytes.len());
    match bytes.iter().zip(&expected).position(|(a, b)| a != b) {
        None => Ok(Some(sequence)),
        Some(_) if is_padded(bytes, sequence) => Ok(None),
        Some(at) => Err(format!("packet {sequence} of {} bytes differs at byte {at}", bytes.len())),
    }
}

/// Shortest packet on an Ethernet, FCS not counted.
const SHORTEST: usize = 60;

/// Is this a packet that was shorter, with zeroes behind it?
fn is_padded(bytes: &[u8], sequence: u32) -> bool {
    let made = |len: &usize| bytes[..*len] == make(sequence, *len) && bytes[*len..].iter().all(|b| *b == 0);
    bytes.len() == SHORTEST && (HEADER..SHORTEST).any(|len| made(&len))
}

/// A fixed function whose values look random; feed it its own result.
#[must_use]
pub const fn split_mix(state: u64) -> u64 {
    crate::fault::split_mix(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_tells_its_number_and_every_changed_byte_is_seen() {
        let packet = make(7, 100);
        assert_eq!(check(&packet), Ok(Some(7)));
        for at in HEADER..100 {
            let mut changed = packet.clone();
            changed[at] ^= 1;
            assert!(check(&changed).is_err(), "byte {at}");
        }
        assert!(check(&packet[..99]).is_err(), "cut off");
        let mut padded = make(8, 40);
        padded.resize(60, 0);
        assert_eq!(check(&padded), Ok(None), "padded");
        padded.push(0);
        assert!(check(&padded).is_err(), "longer");
        assert_eq!(check(&[0; 60]), Ok(None));
        assert_eq!(check(&[]), Ok(None));
    }
}
