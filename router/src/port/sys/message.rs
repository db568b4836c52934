//! Datagrams with control messages: many sent per call, one received per call.
//!
//! `UDP_SEGMENT` lets one message stand for many datagrams of one size, `UDP_GRO` tells that a received one does:
//! <https://elixir.bootlin.com/linux/v6.18/source/include/uapi/linux/udp.h#L35>. No crate sends these control messages
//! without allocating, so the calls are made here.

use std::ffi::c_int;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

/// Most messages in one call of [`send`].
pub const MESSAGES: usize = 64;

const UDP_SEGMENT: c_int = 103;
const UDP_GRO: c_int = 104;

/// One message of a [`send`].
#[derive(Clone, Debug)]
pub struct Message {
    /// Where to.
    pub to: SocketAddr,
    /// TOS or traffic class of the IP header.
    pub tos: u8,
    /// Which slices are its bytes.
    pub slices: Range<usize>,
    /// If not 0, the kernel cuts the bytes into datagrams of this length, the last of which may be shorter.
    pub segment: u16,
}

#[repr(C)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// Room for control messages, aligned as `cmsghdr` is.
#[repr(C, align(8))]
struct Control<const N: usize>([u8; N]);

/// Room for UDP_SEGMENT and a TOS: two messages of at most 24 bytes each.
const SEND_CONTROL: usize = 64;

/// Room for UDP_GRO, TOS and the overflow count, and one that nobody asked for.
const RECEIVE_CONTROL: usize = 128;

/// Sends up to [`MESSAGES`] messages from the front of `messages`, whose ranges refer to `slices`. Returns how many were sent,
/// at least one if there was one.
///
/// # Errors
/// The kernel's for the first message; later ones have not been tried.
///
/// # Panics
/// If a message's range lies outside of `slices`.
pub fn send(socket: impl AsFd, messages: &[Message], slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let count = messages.len().min(MESSAGES);
    let mut addresses = [const { MaybeUninit::<Address>::uninit() }; MESSAGES];
    let mut controls = [const { MaybeUninit::<Control<SEND_CONTROL>>::uninit() }; MESSAGES];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; MESSAGES];
    for (index, message) in messages[..count].iter().enumerate() {
        let bytes = &slices[message.slices.clone()];
        let (address, address_len) = encode(message.to);
        let address = addresses[index].write(address);
        let control = controls[index].write(Control([0; SEND_CONTROL]));
        let control_len = write_control(control, message);
        // SAFETY: `msghdr` is plain numbers and pointers, for which zero is a value. It cannot be written as a literal, since
        // it has private padding on some systems.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_name = std::ptr::from_mut(address).cast();
        header.msg_namelen = address_len;
        header.msg_iov = bytes.as_ptr().cast_mut().cast();
        header.msg_iovlen = bytes.len() as _;
        if control_len > 0 {
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = control_len as _;
        }
        headers[index].write(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
    }
    // SAFETY: the first `count` headers were written above. Their names and control messages live in the arrays beside
    // them, their bytes in `slices`; an `IoSlice` is laid out as an `iovec`, and sending only reads them. Only `msg_len` of
    // the headers is written. rustix's sendmsg cannot carry UDP_SEGMENT.
    let sent = unsafe {
        libc::sendmmsg(socket.as_fd().as_raw_fd(), headers.as_mut_ptr().cast(), count as _, libc::MSG_DONTWAIT)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Writes the control messages and returns their length, 0 if there are none.
fn write_control(control: &mut Control<SEND_CONTROL>, message: &Message) -> usize {
    let mut len = 0;
    if message.segment != 0 {
        len += append(&mut control.0[len..], libc::SOL_UDP, UDP_SEGMENT, &message.segment.to_ne_bytes());
    }
    if message.tos != 0 {
        let (level, kind) = match message.to {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        len += append(&mut control.0[len..], level, kind, &c_int::from(message.tos).to_ne_bytes());
    }
    len
}

/// Lays out a control message as cmsg(3) says, and returns the room that it takes. A `cmsghdr` is a `size_t` length and
/// two ints.
fn append(out: &mut [u8], level: c_int, kind: c_int, data: &[u8]) -> usize {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    const ALIGN: usize = size_of::<usize>();
    const { assert!(HEADER == ALIGN + 2 * size_of::<c_int>()) };
    let len = HEADER + data.len();
    out[..ALIGN].copy_from_slice(&len.to_ne_bytes());
    out[ALIGN..ALIGN + 4].copy_from_slice(&level.to_ne_bytes());
    out[ALIGN + 4..HEADER].copy_from_slice(&kind.to_ne_bytes());
    out[HEADER..len].copy_from_slice(data);
    len.next_multiple_of(ALIGN)
}

fn encode(address: SocketAddr) -> (Address, libc::socklen_t) {
    match address {
        SocketAddr::V4(address) => {
            let v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            };
            (Address { v4 }, size_of::<libc::sockaddr_in>() as _)
        }
        SocketAddr::V6(address) => {
            let v6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            (Address { v6 }, size_of::<libc::sockaddr_in6>() as _)
        }
    }
}

/// What [`receive`] says about a datagram, or about several that the kernel merged.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Its length in bytes. More than the buffer's if it was cut.
    pub len: usize,
    /// Whether it was cut.
    pub truncated: bool,
    /// Who sent it.
    pub from: IpAddr,
    /// Length of each of the merged datagrams but the last; `None` for a single one.
    pub stride: Option<u16>,
    /// TOS or traffic class of the IP header.
    pub tos: u8,
    /// How many datagrams the kernel dropped for this socket so far, modulo 2³².
    pub overruns: Option<u32>,
}

/// Receives one message into `buffer`. Never blocks.
///
/// # Errors
/// The kernel's; `WouldBlock` if there is none.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Datagram> {
    let mut control = Control([0; RECEIVE_CONTROL]);
    let mut address = MaybeUninit::<Address>::zeroed();
    let mut slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: as in `send`.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_name = address.as_mut_ptr().cast();
    header.msg_namelen = size_of::<Address>() as _;
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = RECEIVE_CONTROL as _;
    // SAFETY: name, buffer and control messages are exclusively borrowed memory of the lengths given. rustix's recvmsg
    // does not know UDP_GRO.
    let len = unsafe {
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags)
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: all of it was zeroed, so any bytes the kernel left untouched are initialised, and both variants of the union are
    // plain numbers.
    let from = decode(unsafe { address.assume_init_ref() });
    let truncated = header.msg_flags & libc::MSG_TRUNC != 0;
    let mut datagram = Datagram { len, truncated, from, stride: None, tos: 0, overruns: None };
    let control_len = (header.msg_controllen as usize).min(RECEIVE_CONTROL);
    read_control(&control.0[..control_len], &mut datagram);
    Ok(datagram)
}

/// Most messages that [`receive_many`] takes at once.
pub const RECEIVED: usize = 16;

/// Receives as many messages as there are, and as there are pairs of buffers, each into the first of its pair and what does not fit there
/// into the second. Never blocks. Returns how many there were; what is known of each stands at the front of `datagrams`.
///
/// # Errors
/// The kernel's; `WouldBlock` if there is none.
pub fn receive_many(
    socket: impl AsFd,
    buffers: &mut [[IoSliceMut<'_>; 2]],
    datagrams: &mut [Datagram; RECEIVED],
) -> io::Result<usize> {
    let count = buffers.len().min(RECEIVED);
    let mut addresses = [const { MaybeUninit::<Address>::zeroed() }; RECEIVED];
    let mut controls = [const { Control([0; RECEIVE_CONTROL]) }; RECEIVED];
    let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; RECEIVED];
    for (index, pair) in buffers[..count].iter_mut().enumerate() {
        // SAFETY: as in `send`.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_name = addresses[index].as_mut_ptr().cast();
        header.msg_namelen = size_of::<Address>() as _;
        header.msg_iov = pair.as_mut_ptr().cast();
        header.msg_iovlen = pair.len() as _;
        header.msg_control = controls[index].0.as_mut_ptr().cast();
        header.msg_controllen = RECEIVE_CONTROL as _;
        headers[index].write(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
    }
    // SAFETY: the first `count` headers were written above. Their names and control messages live in the arrays beside them, and their
    // buffers are exclusively borrowed; an `IoSliceMut` is laid out as an `iovec`. rustix has no recvmmsg.
    let received = unsafe {
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        let (fd, none) = (socket.as_fd().as_raw_fd(), std::ptr::null_mut());
        libc::recvmmsg(fd, headers.as_mut_ptr().cast(), count as _, flags as _, none)
    };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    for (index, datagram) in datagrams[..received].iter_mut().enumerate() {
        // SAFETY: it was written before the call, which changed lengths and flags in it.
        let told = unsafe { headers[index].assume_init_read() };
        let header: libc::msghdr = told.msg_hdr;
        // SAFETY: as in `receive`.
        let from = decode(unsafe { addresses[index].assume_init_ref() });
        let truncated = header.msg_flags & libc::MSG_TRUNC != 0;
        *datagram = Datagram { len: told.msg_len as usize, truncated, from, stride: None, tos: 0, overruns: None };
        #[allow(clippy::unnecessary_cast, reason = "it is another integer with other C libraries")]
        let control_len = (header.msg_controllen as usize).min(RECEIVE_CONTROL);
        read_control(&controls[index].0[..control_len], datagram);
    }
    Ok(received)
}

impl Datagram {
    /// Of nothing that was received.
    pub const NONE: Datagram = Datagram {
        len: 0,
        truncated: false,
        from: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        stride: None,
        tos: 0,
        overruns: None,
    };
}

/// Has the kernel say how many messages it dropped.
///
/// # Errors
/// The kernel's.
pub fn count_overruns(socket: impl AsFd) -> io::Result<()> {
    set_flag(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL)
}

/// The sender's address; one mapped into IPv6 as the IPv4 address that it is.
fn decode(address: &Address) -> IpAddr {
    // SAFETY: both variants begin with the family and are initialised throughout, so each may be read whatever
    // the other says.
    unsafe {
        if c_int::from(address.v4.sin_family) == libc::AF_INET6 {
            IpAddr::V6(Ipv6Addr::from(address.v6.sin6_addr.s6_addr)).to_canonical()
        } else {
            IpAddr::V4(Ipv4Addr::from(address.v4.sin_addr.s_addr.to_ne_bytes()))
        }
    }
}

fn read_control(mut control: &[u8], datagram: &mut Datagram) {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    const ALIGN: usize = size_of::<usize>();
    let int = |bytes: &[u8]| bytes.first_chunk().map(|bytes| c_int::from_ne_bytes(*bytes));
    while let Some((len, rest)) = control.split_first_chunk() {
        let len = usize::from_ne_bytes(*len);
        let (Some(level), Some(kind)) = (int(rest), rest.get(4..).and_then(int)) else { return };
        let Some(data) = control.get(HEADER..len) else { return };
        match (level, kind, int(data), data.first()) {
            (libc::SOL_UDP, UDP_GRO, Some(stride), _) => {
                datagram.stride = u16::try_from(stride).ok().filter(|stride| *stride > 0);
            }
            (libc::IPPROTO_IP, libc::IP_TOS, _, Some(tos)) => datagram.tos = *tos,
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, Some(tos), _) => datagram.tos = tos as u8,
            (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, Some(count), _) => datagram.overruns = Some(count as u32),
            _ => {}
        }
        control = control.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
}

/// Has the kernel merge datagrams of one flow, and say how many it dropped.
///
/// # Errors
/// The kernel's, if it is too old to merge (before 5.0).
pub fn set_receive_options(socket: impl AsFd) -> io::Result<()> {
    set_flag(&socket, libc::SOL_UDP, UDP_GRO)?;
    set_flag(&socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL)
}

/// Has a socket send no packet longer than every path by IPv6 carries, but fragments.
pub fn set_fragment_size_v6(socket: impl AsFd) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU, 1280)
}

/// Has a raw socket that is not connected learn from routers that packets are too big; other sockets do so by themselves. The next call
/// to send then fails once.
pub fn learn_path_mtus_v6(socket: impl AsFd) -> io::Result<()> {
    set_flag(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
}

/// Makes a socket one for which the kernel refuses to segment.
#[cfg(test)]
pub(crate) fn disable_checksums(socket: impl AsFd) -> io::Result<()> {
    set_flag(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK)
}

fn set_flag(socket: impl AsFd, level: c_int, name: c_int) -> io::Result<()> {
    set_option(socket, level, name, 1)
}

fn set_option(socket: impl AsFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the value is an int that lives until the call returns, with its length. No crate has these options.
    let result = unsafe {
        let (value, len) = ((&raw const value).cast(), size_of::<c_int>() as libc::socklen_t);
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, value, len)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_segmented_message_arrives_as_datagrams_or_merged_with_their_length() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        set_receive_options(&receiver).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (head, payload) = ([1u8; 100], [2u8; 900]);
        let slices: Vec<_> = (0..3).flat_map(|_| [IoSlice::new(&head), IoSlice::new(&payload)]).collect();
        let to = receiver.local_addr().unwrap();
        let messages =
            [Message { to, tos: 0x10, slices: 0..6, segment: 1000 }, Message { to, tos: 0, slices: 1..2, segment: 0 }];
        assert_eq!(send(&sender, &messages, &slices).unwrap(), 2);
        let (mut bytes, mut buffer) = (0, [0xa5; 4000]);
        while bytes < 3900 {
            let Ok(datagram) = receive(&receiver, &mut buffer) else { continue };
            assert_eq!(datagram.from, to.ip());
            assert!(!datagram.truncated);
            if datagram.len > 1000 {
                assert_eq!(datagram.stride, Some(1000));
            }
            bytes += datagram.len;
        }
        assert_eq!(bytes, 3900);
    }

    #[test]
    fn a_datagram_longer_than_the_buffer_says_so() {
        let receiver = UdpSocket::bind("[::1]:0").unwrap();
        let sender = UdpSocket::bind("[::1]:0").unwrap();
        let bytes = [7u8; 100];
        let messages = [Message { to: receiver.local_addr().unwrap(), tos: 4, slices: 0..1, segment: 0 }];
        send(&sender, &messages, &[IoSlice::new(&bytes)]).unwrap();
        let mut buffer = [0; 10];
        let datagram = loop {
            match receive(&receiver, &mut buffer) {
                Ok(datagram) => break datagram,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        };
        assert_eq!((datagram.len, datagram.truncated, buffer), (100, true, [7; 10]));
        assert_eq!(datagram.from, receiver.local_addr().unwrap().ip());
    }

    #[test]
    fn control_messages_cut_short_are_left_out() {
        let mut control = [0; 64];
        let mut len = append(&mut control, libc::SOL_UDP, UDP_GRO, &1400i32.to_ne_bytes());
        len += append(&mut control[len..], libc::IPPROTO_IP, libc::IP_TOS, &[0x2e]);
        for cut in 0..=len {
            let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let mut datagram = Datagram { len: 0, truncated: false, from, stride: None, tos: 0, overruns: None };
            read_control(&control[..cut], &mut datagram);
            assert_eq!(datagram.stride, (cut >= 20).then_some(1400));
            assert_eq!(datagram.tos, if cut >= 24 + 17 { 0x2e } else { 0 });
        }
    }
}
