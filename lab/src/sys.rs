//! System calls that no crate of ours wraps: ethtool requests and packet sockets.
#![allow(unsafe_code, reason = "ioctl, recvmsg and bind take raw structures")]

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

// linux/ethtool.h
pub(crate) const ETHTOOL_GRXCSUM: u32 = 0x14;
pub(crate) const ETHTOOL_SRXCSUM: u32 = 0x15;
pub(crate) const ETHTOOL_GTXCSUM: u32 = 0x16;
pub(crate) const ETHTOOL_STXCSUM: u32 = 0x17;
pub(crate) const ETHTOOL_GTSO: u32 = 0x1e;
pub(crate) const ETHTOOL_STSO: u32 = 0x1f;
pub(crate) const ETHTOOL_GGSO: u32 = 0x23;
pub(crate) const ETHTOOL_SGSO: u32 = 0x24;
pub(crate) const ETHTOOL_GGRO: u32 = 0x2b;
pub(crate) const ETHTOOL_SGRO: u32 = 0x2c;

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Sets a value of interface `name`.
pub(crate) fn ethtool_set(socket: &impl AsFd, name: &str, command: u32, data: u32) -> io::Result<()> {
    ethtool(socket, name, &mut EthtoolValue { command, data })
}

/// Gets a value of interface `name`.
pub(crate) fn ethtool_get(socket: &impl AsFd, name: &str, command: u32) -> io::Result<u32> {
    let mut value = EthtoolValue { command, data: 0 };
    ethtool(socket, name, &mut value)?;
    Ok(value.data)
}

fn ethtool(socket: &impl AsFd, name: &str, value: &mut EthtoolValue) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0, so the name ends.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(value).cast();
    // SAFETY: the request and the value that it points to outlive the call, and the commands above
    // read and write a `struct ethtool_value`.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens a packet socket for all protocols on interface `index` of the thread's namespace.
pub(crate) fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0 until it is bound: frames of other interfaces must never enter the queue.
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    for option in [libc::PACKET_IGNORE_OUTGOING, libc::PACKET_AUXDATA] {
        set_option(&socket, libc::SOL_PACKET, option, &1_i32)?;
    }
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index.cast_signed();
    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is valid for `size` bytes.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Makes the interface that a packet socket is bound to promiscuous while the socket lives.
pub(crate) fn packet_promiscuous(socket: &impl AsFd, index: u32) -> io::Result<()> {
    let membership = libc::packet_mreq {
        mr_ifindex: index.cast_signed(),
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set_option(socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)
}

/// Sets a socket option whose value is plain old data.
pub(crate) fn set_option<T: Copy>(socket: &impl AsFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is valid for `size` bytes; the kernel copies it.
    let result = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), size)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until the socket can be read; false when `timeout` has passed.
pub(crate) fn readable(socket: &impl AsFd, timeout: Duration) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let deadline = std::time::Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        // Rounded up, or the last millisecond would be spent spinning.
        let left = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(left)) {
            Ok(0) if left == u16::MAX => {}
            Ok(n) => return Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The tag that the kernel took out of a frame on its way to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vlan {
    pub(crate) tpid: u16,
    pub(crate) tci: u16,
}

/// Receives a frame if one is there: its length (which may exceed the buffer), and its VLAN tag.
pub(crate) fn packet_receive(
    socket: &impl AsFd,
    buffer: &mut [u8],
) -> io::Result<Option<(usize, Option<Vlan>)>> {
    const ROOM: usize = 128;
    #[repr(align(8))]
    struct Control([u8; ROOM]);
    let mut control = Control([0; ROOM]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero bytes are a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control.0).cast();
    message.msg_controllen = ROOM;
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: the buffers that the message points to outlive the call and have the lengths it says.
    let length = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    }
    let filled = message.msg_controllen.min(ROOM);
    let header = size_of::<libc::cmsghdr>();
    let needed = header + size_of::<libc::tpacket_auxdata>();
    let word = |at: usize| u16::from_ne_bytes([control.0[at], control.0[at + 1]]);
    let long = |at: usize| i32::from_ne_bytes(std::array::from_fn(|i| control.0[at + i]));
    let mut vlan = None;
    // Auxiliary data is the only control message that this socket asked for, so it comes first.
    if filled >= needed
        && long(offset_of!(libc::cmsghdr, cmsg_level)) == libc::SOL_PACKET
        && long(offset_of!(libc::cmsghdr, cmsg_type)) == libc::PACKET_AUXDATA
    {
        let status = long(header + offset_of!(libc::tpacket_auxdata, tp_status)).cast_unsigned();
        if status & libc::TP_STATUS_VLAN_VALID != 0 {
            let known = status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
            let tpid = word(header + offset_of!(libc::tpacket_auxdata, tp_vlan_tpid));
            let tci = word(header + offset_of!(libc::tpacket_auxdata, tp_vlan_tci));
            vlan = Some(Vlan { tpid: if known { tpid } else { 0x8100 }, tci });
        }
    }
    Ok(Some((length.cast_unsigned(), vlan)))
}

/// Segments that a TCP socket had to send again so far.
pub(crate) fn tcp_retransmitted(socket: &impl AsFd) -> io::Result<u64> {
    // SAFETY: all-zero bytes are a valid `tcp_info`.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `size` bytes, which `info` has.
    let result = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut size)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(u64::from(info.tcpi_total_retrans)) }
}

/// Is there a BPF program of this number? Asks for a descriptor (`BPF_PROG_GET_FD_BY_ID`, Linux 4.13).
pub(crate) fn bpf_program_exists(id: u32) -> io::Result<bool> {
    const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
    // prog_id, next_id, open_flags of `union bpf_attr`.
    let attributes = [id, 0, 0];
    let size = size_of_val(&attributes);
    // SAFETY: the kernel reads `size` bytes of the array, which outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_GET_FD_BY_ID, attributes.as_ptr(), size) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::NotFound { Ok(false) } else { Err(error) };
    }
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(true)
}
