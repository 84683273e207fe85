//! What the kernel and we agree on, bit for bit: structures and constants of AF_XDP and of bpf(2).
//!
//! Contract: every structure has the size that the kernel expects, asserted when this is compiled, and
//! no padding. Source: `include/uapi/linux/if_xdp.h`, `bpf.h` and `if_link.h` of Linux 6.18; where a
//! field or option came later than Linux 5.10, it says since when.

use bytemuck::{Pod, Zeroable};

/// `AF_XDP`.
pub(super) const AF_XDP: u16 = 44;
/// `SOL_XDP`.
pub(super) const SOL_XDP: i32 = 283;

/// Another socket's UMEM is used.
pub(super) const XDP_SHARED_UMEM: u16 = 1 << 0;
/// The kernel shall copy.
pub(super) const XDP_COPY: u16 = 1 << 1;
/// The device shall read and write our chunks.
pub(super) const XDP_ZEROCOPY: u16 = 1 << 2;
/// The kernel says in the rings when it wants a wake-up.
pub(super) const XDP_USE_NEED_WAKEUP: u16 = 1 << 3;
/// Packets may take several descriptors (6.6).
pub(super) const XDP_USE_SG: u16 = 1 << 4;

/// A chunk may start anywhere.
pub(super) const XDP_UMEM_UNALIGNED_CHUNK: u32 = 1 << 0;
/// The kernel computes checksums of copied packets itself (6.8).
pub(super) const XDP_UMEM_TX_SW_CSUM: u32 = 1 << 1;
/// `tx_metadata_len` is meant (6.9; 6.8 took any value).
pub(super) const XDP_UMEM_TX_METADATA_LEN: u32 = 1 << 2;

/// Set in a ring's flags when the kernel sleeps.
pub(super) const XDP_RING_NEED_WAKEUP: u32 = 1 << 0;

/// Socket options at level [`SOL_XDP`].
pub(super) mod option {
    pub(crate) const MMAP_OFFSETS: i32 = 1;
    pub(crate) const RX_RING: i32 = 2;
    pub(crate) const TX_RING: i32 = 3;
    pub(crate) const UMEM_REG: i32 = 4;
    pub(crate) const UMEM_FILL_RING: i32 = 5;
    pub(crate) const UMEM_COMPLETION_RING: i32 = 6;
    pub(crate) const STATISTICS: i32 = 7;
    pub(crate) const OPTIONS: i32 = 8;
    /// Packets that one send may pass on in copy mode, 32 to the size of the TX ring (6.17).
    pub(crate) const MAX_TX_SKB_BUDGET: i32 = 9;
}

/// File offsets that choose which ring mmap(2) gives.
pub(super) mod page_offset {
    pub(crate) const RX: i64 = 0;
    pub(crate) const TX: i64 = 0x8000_0000;
    pub(crate) const FILL: i64 = 0x1_0000_0000;
    pub(crate) const COMPLETION: i64 = 0x1_8000_0000;
}

/// In `XDP_OPTIONS`: the socket does without copies.
pub(super) const XDP_OPTIONS_ZEROCOPY: u32 = 1 << 0;

/// In unaligned mode the upper 16 bits of an RX address are an offset to be added to the rest.
pub(super) const UNALIGNED_OFFSET_SHIFT: u32 = 48;

/// In a descriptor: the packet goes on in the next one (6.6).
pub(super) const XDP_PKT_CONTD: u32 = 1 << 0;
/// In a TX descriptor: [`TxMetadata`] lies before the packet (6.8).
pub(super) const XDP_TX_METADATA: u32 = 1 << 1;
/// In [`TxMetadata`]: note when the packet left.
pub(super) const TXMD_TIMESTAMP: u64 = 1 << 0;
/// In [`TxMetadata`]: compute a checksum.
pub(super) const TXMD_CHECKSUM: u64 = 1 << 1;

/// Bytes that the kernel keeps free before each received packet, after the UMEM's own headroom.
pub(super) const XDP_PACKET_HEADROOM: u32 = 256;
/// Smallest chunk of a UMEM; the largest is a page.
pub(super) const MIN_CHUNK: u32 = 2048;
/// Largest chunk of a UMEM: a page.
pub(super) const PAGE: u32 = 4096;
/// Frames that a packet may have on transmit: the smallest `MAX_SKB_FRAGS` that a kernel is built
/// with. A packet with more is dropped without a completion, which would strand its frames.
pub(super) const MAX_SEGMENTS: usize = 17;
/// Packets that one send passes on in copy mode where the budget cannot be raised.
pub(super) const TX_BATCH: u32 = 32;

/// `struct sockaddr_xdp`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct SockaddrXdp {
    pub(super) family: u16,
    pub(super) flags: u16,
    pub(super) ifindex: u32,
    pub(super) queue_id: u32,
    pub(super) shared_umem_fd: u32,
}

/// `struct xdp_ring_offset`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RingOffset {
    pub(super) producer: u64,
    pub(super) consumer: u64,
    pub(super) desc: u64,
    pub(super) flags: u64,
}

/// `struct xdp_mmap_offsets`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct MmapOffsets {
    pub(super) rx: RingOffset,
    pub(super) tx: RingOffset,
    pub(super) fill: RingOffset,
    pub(super) completion: RingOffset,
}

/// `struct xdp_umem_reg`; kernels before 6.8 know it without the last word and ignore that.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct UmemReg {
    pub(super) addr: u64,
    pub(super) len: u64,
    pub(super) chunk_size: u32,
    pub(super) headroom: u32,
    pub(super) flags: u32,
    pub(super) tx_metadata_len: u32,
}

/// `struct xdp_statistics`.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Statistics {
    pub(super) rx_dropped: u64,
    pub(super) rx_invalid_descs: u64,
    pub(super) tx_invalid_descs: u64,
    pub(super) rx_ring_full: u64,
    pub(super) rx_fill_ring_empty: u64,
    pub(super) tx_ring_empty: u64,
}

/// `struct xdp_desc`: an entry of the RX and TX rings. Entries of the fill and completion rings are
/// bare addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct XdpDesc {
    /// Address of the packet in the UMEM; in unaligned mode with an offset in the upper 16 bits.
    pub(super) addr: u64,
    /// Bytes.
    pub(super) len: u32,
    /// Flags: the packet goes on (bit 0), metadata before the packet (bit 1).
    pub(super) options: u32,
}

/// `struct xsk_tx_metadata` as of 6.16 (before, without the last word): lies right before a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct TxMetadata {
    pub(super) flags: u64,
    /// On request: start and offset of the checksum; on completion, all 8 bytes: the time.
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
    pub(super) reserved: u32,
    pub(super) launch_time: u64,
}

/// Bytes of [`TxMetadata`].
pub(super) const TX_METADATA_BYTES: u32 = 24;
/// Where in [`TxMetadata`] the time of a completed packet is.
pub(super) const TX_TIMESTAMP_AT: u32 = 8;

const _: () = {
    assert!(size_of::<SockaddrXdp>() == 16);
    assert!(size_of::<RingOffset>() == 32);
    assert!(size_of::<MmapOffsets>() == 128);
    assert!(size_of::<UmemReg>() == 32);
    assert!(size_of::<Statistics>() == 48);
    assert!(size_of::<XdpDesc>() == 16);
    assert!(size_of::<TxMetadata>() == TX_METADATA_BYTES as usize);
};

/// Commands of bpf(2).
pub(super) mod bpf {
    pub(crate) const MAP_CREATE: i32 = 0;
    pub(crate) const MAP_UPDATE_ELEM: i32 = 2;
    pub(crate) const MAP_DELETE_ELEM: i32 = 3;
    pub(crate) const PROG_LOAD: i32 = 5;
    pub(crate) const PROG_TEST_RUN: i32 = 10;
    pub(crate) const OBJ_GET_INFO_BY_FD: i32 = 15;
    pub(crate) const LINK_CREATE: i32 = 28;
    pub(crate) const LINK_UPDATE: i32 = 29;
    pub(crate) const MAP_TYPE_XSKMAP: u32 = 17;
    pub(crate) const PROG_TYPE_XDP: u32 = 6;
    pub(crate) const ATTACH_XDP: u32 = 37;
    /// The program may see packets in several buffers (5.18).
    pub(crate) const F_XDP_HAS_FRAGS: u32 = 1 << 5;
    pub(crate) const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
    pub(crate) const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
    /// Verdicts.
    pub(crate) const XDP_PASS: i32 = 2;
    pub(crate) const XDP_REDIRECT: u32 = 4;
    pub(crate) const HELPER_REDIRECT_MAP: i32 = 51;
}

/// `union bpf_attr` for `BPF_MAP_CREATE`, as far as it is used.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct MapCreate {
    pub(super) map_type: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) map_flags: u32,
    pub(super) inner_map_fd: u32,
    pub(super) numa_node: u32,
    pub(super) name: [u8; 16],
}

/// `union bpf_attr` for `BPF_MAP_*_ELEM`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct MapElem {
    pub(super) map_fd: u32,
    pub(super) pad: u32,
    pub(super) key: u64,
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as it is used.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ProgLoad {
    pub(super) prog_type: u32,
    pub(super) insn_cnt: u32,
    pub(super) insns: u64,
    pub(super) license: u64,
    pub(super) log_level: u32,
    pub(super) log_size: u32,
    pub(super) log_buf: u64,
    pub(super) kern_version: u32,
    pub(super) prog_flags: u32,
    pub(super) name: [u8; 16],
    pub(super) ifindex: u32,
    pub(super) expected_attach_type: u32,
}

/// `union bpf_attr` for `BPF_PROG_TEST_RUN`, as far as it is used.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct TestRun {
    pub(super) prog_fd: u32,
    pub(super) retval: u32,
    pub(super) data_size_in: u32,
    pub(super) data_size_out: u32,
    pub(super) data_in: u64,
    pub(super) data_out: u64,
    pub(super) repeat: u32,
    pub(super) duration: u32,
}

/// `union bpf_attr` for `BPF_LINK_CREATE`, as far as it is used.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct LinkCreate {
    pub(super) prog_fd: u32,
    pub(super) target_ifindex: u32,
    pub(super) attach_type: u32,
    pub(super) flags: u32,
}

/// `union bpf_attr` for `BPF_LINK_UPDATE`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct LinkUpdate {
    pub(super) link_fd: u32,
    pub(super) new_prog_fd: u32,
    pub(super) flags: u32,
    pub(super) old_prog_fd: u32,
}

/// `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ObjInfo {
    pub(super) fd: u32,
    pub(super) info_len: u32,
    pub(super) info: u64,
}

/// `struct bpf_insn`: one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Insn {
    /// Operation.
    pub(super) code: u8,
    /// Destination register in the low, source register in the high half.
    pub(super) registers: u8,
    /// Distance of a jump or of a memory access.
    pub(super) offset: i16,
    /// Constant.
    pub(super) imm: i32,
}

const _: () = {
    assert!(size_of::<MapCreate>() == 44);
    assert!(size_of::<MapElem>() == 32);
    assert!(size_of::<ProgLoad>() == 72);
    assert!(size_of::<TestRun>() == 40);
    assert!(size_of::<LinkCreate>() == 16);
    assert!(size_of::<LinkUpdate>() == 16);
    assert!(size_of::<ObjInfo>() == 16);
    assert!(size_of::<Insn>() == 8);
};
