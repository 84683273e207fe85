//! Which VLANs a port is in, and what that does to the tag of a frame that leaves by it.
//!
//! Contract: a frame is edited only at its front, in place, by moving twelve address bytes; offsets in
//! its metadata follow. Customer tags (0x8100) are ours; service tags (0x88a8) and inner tags are
//! payload and pass through untouched.

use crate::wire::VlanId;
use crate::wire::ethernet::{EtherType, HEADER, TAG};
use isoplane_memory::{Frame, FrameFlags, Pool};

/// A set of VLANs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VlanSet([u64; 64]);

impl VlanSet {
    /// No VLAN.
    pub const EMPTY: Self = Self([0; 64]);

    /// All VLANs, 1 to 4094.
    pub const ALL: Self = {
        let mut words = [u64::MAX; 64];
        words[0] &= !1;
        words[63] &= !(1 << 63);
        Self(words)
    };

    /// Adds a VLAN.
    pub const fn insert(&mut self, vlan: VlanId) {
        self.0[vlan.get() as usize / 64] |= 1 << (vlan.get() % 64);
    }

    /// Removes a VLAN.
    pub const fn remove(&mut self, vlan: VlanId) {
        self.0[vlan.get() as usize / 64] &= !(1 << (vlan.get() % 64));
    }

    /// Is the VLAN in the set?
    #[must_use]
    pub const fn contains(&self, vlan: VlanId) -> bool {
        self.0[vlan.get() as usize / 64] & 1 << (vlan.get() % 64) != 0
    }

    /// The VLANs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = VlanId> {
        (1..=VlanId::MAX.get()).filter_map(VlanId::new).filter(|v| self.contains(*v))
    }
}

impl FromIterator<VlanId> for VlanSet {
    fn from_iter<I: IntoIterator<Item = VlanId>>(vlans: I) -> Self {
        let mut set = Self::EMPTY;
        vlans.into_iter().for_each(|v| set.insert(v));
        set
    }
}

impl std::fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == Self::ALL { f.write_str("ALL") } else { f.debug_set().entries(self.iter()).finish() }
    }
}

/// A port's part in VLANs.
///
/// | port | frame comes in | is taken as | goes out |
/// |---|---|---|---|
/// | access | untagged, or tagged with VID 0 | the access VLAN | untagged |
/// | access | tagged | dropped | |
/// | trunk | untagged, or tagged with VID 0 | the native VLAN; dropped without one | native: untagged |
/// | trunk | tagged with an allowed VLAN | that VLAN | tagged (native: untagged) |
/// | trunk | tagged with another VLAN | dropped | never |
///
/// A frame that leaves tagged keeps priority and drop eligibility, if it came with a tag. (IEEE
/// 802.1Q-2022 6.9.1 ingress, 8.6.2 ingress filtering, 8.6.4 egress.)
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "one a port, read when the bridge is made")]
pub enum PortVlans {
    /// In one VLAN, untagged.
    Access(VlanId),
    /// In several VLANs, tagged.
    Trunk {
        /// VLANs that pass, tagged.
        allowed: VlanSet,
        /// The VLAN of untagged frames, both ways; it must be among the allowed ones.
        native: Option<VlanId>,
    },
}

/// The tag of a frame as it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tagged {
    /// None.
    No,
    /// VID 0: priority only.
    Priority,
    /// With the VLAN that it was taken as.
    Vlan,
}

/// What to do to the tag of a frame that goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edit {
    None,
    Push,
    Pop,
    SetVid,
}

impl Edit {
    /// For a frame of a VLAN that came in with `tag` and leaves tagged or not.
    #[inline(always)]
    pub(super) const fn of(tag: Tagged, leave_tagged: bool) -> Self {
        match (tag, leave_tagged) {
            (Tagged::No, false) | (Tagged::Vlan, true) => Self::None,
            (Tagged::No, true) => Self::Push,
            (Tagged::Priority | Tagged::Vlan, false) => Self::Pop,
            (Tagged::Priority, true) => Self::SetVid,
        }
    }

    /// Does it to the first frame of a packet, whose header was checked. False, and the frame as it
    /// was, when the chunk has no room for a tag.
    #[inline(always)]
    pub(super) fn apply(self, pool: &Pool, frame: &mut Frame, vid: u16) -> bool {
        match self {
            Self::None => true,
            Self::Push => push(pool, frame, vid),
            Self::Pop => pop(pool, frame),
            Self::SetVid => set_vid(pool, frame, vid),
        }
    }
}

const MACS: usize = 12;

fn push(pool: &Pool, frame: &mut Frame, vid: u16) -> bool {
    let len = usize::from(frame.len());
    if len < HEADER {
        return false;
    }
    if pool.grow_front(frame, TAG as u16) {
        pool.bytes_mut(frame).copy_within(TAG..TAG + MACS, 0);
    } else if pool.grow_back(frame, TAG as u16) {
        pool.bytes_mut(frame).copy_within(MACS..len, MACS + TAG);
    } else {
        return false;
    }
    let bytes = pool.bytes_mut(frame);
    bytes[MACS..MACS + 2].copy_from_slice(&EtherType::VLAN.0.to_be_bytes());
    bytes[MACS + 2..MACS + 4].copy_from_slice(&vid.to_be_bytes());
    shift_offsets(pool, frame, TAG as i16);
    true
}

fn pop(pool: &Pool, frame: &mut Frame) -> bool {
    if usize::from(frame.len()) < HEADER + TAG {
        return false;
    }
    pool.bytes_mut(frame).copy_within(..MACS, TAG);
    frame.trim_front(TAG as u16);
    shift_offsets(pool, frame, -(TAG as i16));
    true
}

fn set_vid(pool: &Pool, frame: &mut Frame, vid: u16) -> bool {
    let Some([high, low]) = pool.bytes_mut(frame).get_mut(MACS + 2..).and_then(|b| b.first_chunk_mut::<2>())
    else {
        return false;
    };
    let tci = u16::from_be_bytes([*high, *low]) & 0xf000 | vid;
    [*high, *low] = tci.to_be_bytes();
    true
}

/// A checksum that the port shall compute starts where it did in the packet, not in the frame.
#[inline(always)]
pub(in crate::blocks) fn shift_offsets(pool: &Pool, frame: &mut Frame, by: i16) {
    if frame.flags().contains(FrameFlags::META | FrameFlags::TX_CHECKSUM)
        && let Some(mut meta) = pool.meta(frame)
    {
        meta.csum_start = meta.csum_start.saturating_add_signed(by);
        pool.set_meta(frame, meta);
    }
}
