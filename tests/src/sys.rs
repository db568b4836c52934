//! The one place with unsafe code: raw Ethernet sockets, for which `rustix` has no address type, socket options, and bpf(2).
//!
//! See packet(7).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A raw socket on the interface of this index, in the namespace of the calling thread: it receives every frame that comes in or goes out
/// there, and sends what it is given as it is.
pub fn packet_socket(index: u32) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) takes three integers and touches no memory of ours.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, is valid, and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `sockaddr_ll` is plain data, for which all zeros is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index as i32;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `address`, which lives beyond the call; bind(2) only reads it.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Has virtio's header, of ten bytes, stand before each frame of a raw socket: PACKET_VNET_HDR of packet(7).
pub fn virtio_headers(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the pointer and the length describe `on`, which lives beyond the call; setsockopt(2) only reads it.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, (&raw const on).cast(), len)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has a raw socket not receive what leaves by its interface: PACKET_IGNORE_OUTGOING of packet(7).
pub fn ignore_outgoing(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the pointer and the length describe `on`, which lives beyond the call; setsockopt(2) only reads it.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            len,
        )
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has a raw socket tell which VLAN tag was taken off a frame: PACKET_AUXDATA of packet(7). See [`receive_tagged`].
pub fn tell_tags(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the pointer and the length describe `on`, which lives beyond the call; setsockopt(2) only reads it.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_AUXDATA, (&raw const on).cast(), len)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives a frame, and the tag that was taken off it: its type and its value.
pub fn receive_tagged(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<(usize, Option<[u16; 2]>)> {
    // As long as a control message with `tpacket_auxdata` is, and aligned as one.
    let mut control = [0_u64; 8];
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: `msghdr` is plain numbers and pointers, for which zero is a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header points to one slice and to the control buffer, with their lengths; both live beyond the call.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has filled the header in; the macros stay within the control buffer that it describes.
    let message = unsafe { libc::CMSG_FIRSTHDR(&raw const header).as_ref() };
    let is_ours = |message: &&libc::cmsghdr| {
        (message.cmsg_level, message.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA)
            && message.cmsg_len >= size_of::<libc::cmsghdr>() + size_of::<libc::tpacket_auxdata>()
    };
    let tag = message.filter(is_ours).map(|message| {
        // SAFETY: the message is long enough for this type, which is plain numbers; it may lie unaligned.
        unsafe { libc::CMSG_DATA(message).cast::<libc::tpacket_auxdata>().read_unaligned() }
    });
    let valid = tag.filter(|tag| tag.tp_status & libc::TP_STATUS_VLAN_VALID != 0);
    Ok((len, valid.map(|tag| [tag.tp_vlan_tpid, tag.tp_vlan_tci])))
}

/// Has the kernel cut what is sent by this socket into datagrams of so many bytes: UDP_SEGMENT of udp(7), for which `rustix` has no call.
pub fn segment(socket: &std::net::UdpSocket, size: usize) -> io::Result<()> {
    let size = size as libc::c_int;
    let len = size_of_val(&size) as libc::socklen_t;
    // SAFETY: the pointer and the length describe `size`, which lives beyond the call; setsockopt(2) only reads it.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const size).cast(), len)
    };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What bpf(2) knows by number.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BpfObject {
    /// A program.
    Program(u32),
    /// A map.
    Map(u32),
}

impl BpfObject {
    /// Whether the kernel has it, whoever keeps it.
    pub fn exists(self) -> bool {
        // <https://elixir.bootlin.com/linux/v6.18/A/ident/bpf_cmd>: BPF_PROG_GET_FD_BY_ID and BPF_MAP_GET_FD_BY_ID.
        let (command, id) = match self {
            BpfObject::Program(id) => (13, id),
            BpfObject::Map(id) => (14, id),
        };
        // What it begins with is the number; the rest is zeros.
        let attributes = [u64::from(id), 0, 0];
        let len = size_of_val(&attributes);
        // SAFETY: the pointer and the length describe `attributes`, which lives beyond the call; these commands only read it.
        let fd = unsafe { libc::syscall(libc::SYS_bpf, command, (&raw const attributes).cast::<u8>(), len) };
        if fd >= 0 {
            // SAFETY: the descriptor was just made, is valid, and nobody else owns it.
            drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
            return true;
        }
        let error = io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "bpf(2) does not tell: {error}");
        false
    }
}
