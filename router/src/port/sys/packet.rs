//! Sockets that send whole frames by one interface, each with virtio's network header before it (packet(7)).
//!
//! A socket of protocol 0 is given nothing that the interface receives, so it costs nobody else anything. No crate binds such a socket or
//! sends several frames in one call without allocating.

use std::ffi::c_int;
use std::io::{self, IoSlice};
use std::mem::{self, MaybeUninit};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use weft_encap::virtio;

/// Most frames in one call of [`send`].
pub const FRAMES: usize = 64;

/// <https://elixir.bootlin.com/linux/v6.18/source/include/uapi/linux/if_packet.h#L58>.
const PACKET_VNET_HDR: c_int = 15;
/// <https://elixir.bootlin.com/linux/v6.18/source/include/uapi/linux/if_packet.h#L65>.
const PACKET_VNET_HDR_SZ: c_int = 24;
/// The length of virtio's header without its last field.
const SHORT_HEADER: usize = 10;

/// Bytes that may wait in the interface's queue: some dozens of superframes.
const SEND_BUFFER: usize = 4 << 20;

/// Opens the interface of this number in the calling thread's network namespace. Returns the socket, which does not block, and how much of
/// virtio's header stands before each frame: all of it where the kernel also takes UDP superframes (both came with Linux 6.2 and 6.6).
///
/// # Errors
/// The kernel's: `EPERM` without CAP_NET_RAW, `ENODEV` if there is no such interface, `ENETDOWN` if it is down.
pub fn open(interface: u32) -> io::Result<(OwnedFd, usize)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    let header = match set_option(&socket, PACKET_VNET_HDR_SZ, virtio::LEN as c_int) {
        Ok(()) => virtio::LEN,
        Err(_) => {
            set_option(&socket, PACKET_VNET_HDR, 1)?;
            SHORT_HEADER
        }
    };
    // Without CAP_NET_ADMIN the system's limit holds, which is small but works.
    let _ = sockopt::set_socket_send_buffer_size_force(&socket, SEND_BUFFER);
    bind(&socket, interface)?;
    Ok((socket, header))
}

fn set_option(socket: impl AsFd, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the value is an int that lives until the call returns, with its length. No crate has these options.
    let result = unsafe {
        let (value, len) = ((&raw const value).cast(), size_of::<c_int>() as libc::socklen_t);
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::SOL_PACKET, name, value, len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn bind(socket: impl AsFd, interface: u32) -> io::Result<()> {
    // SAFETY: `sockaddr_ll` is plain numbers, for which zero is a value: protocol 0 is that of a socket that receives nothing.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as _;
    address.sll_ifindex = c_int::try_from(interface).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the address lives until the call returns, and its length is given. rustix has no address of this family.
    let result = unsafe {
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        libc::bind(socket.as_fd().as_raw_fd(), (&raw const address).cast(), len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends up to [`FRAMES`] frames from the front of `frames`, whose ranges refer to `slices`. Returns how many were sent, at least one if
/// there was one. Never blocks.
///
/// # Errors
/// The kernel's for the first frame; later ones have not been tried.
///
/// # Panics
/// If a range lies outside of `slices`.
pub fn send(socket: impl AsFd, frames: &[Range<usize>], slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let count = frames.len().min(FRAMES);
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; FRAMES];
    for (header, range) in headers.iter_mut().zip(&frames[..count]) {
        let bytes = &slices[range.clone()];
        // SAFETY: `msghdr` is plain numbers and pointers, for which zero is a value. It cannot be written as a literal, since
        // it has private padding on some systems.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = bytes.as_ptr().cast_mut().cast();
        message.msg_iovlen = bytes.len() as _;
        header.write(libc::mmsghdr { msg_hdr: message, msg_len: 0 });
    }
    // SAFETY: the first `count` headers were written above. Their bytes are borrowed by `slices`; an `IoSlice` is laid out as an
    // `iovec`, and sending only reads them. Only `msg_len` of the headers is written. rustix's sendmmsg wants its own kind of headers,
    // which it allocates.
    let sent = unsafe {
        libc::sendmmsg(socket.as_fd().as_raw_fd(), headers.as_mut_ptr().cast(), count as _, libc::MSG_DONTWAIT)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
