//! AF_XDP sockets: rings that lead to a device's queue, over memory that the kernel and a worker share.
//!
//! Four rings: by *fill* the kernel gets chunks to receive into, by *receive* they come back with frames; by *transmit* it
//! gets frames, by *completion* they come back. [`Umem`] is the memory, a worker's chunks; it is registered with the first socket
//! and shared by the others, whatever their device. A socket is opened on any thread ([`Socket::open`] takes the kernel's RTNL lock,
//! which others may hold for long) and used on its worker's.
//!
//! Read first: <https://docs.kernel.org/networking/af_xdp.html>.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::xdp::{
    SocketAddrXdp, SocketAddrXdpFlags, SocketAddrXdpWithSharedUmem, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING,
    XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpRingOffset, XdpUmemReg, XdpUmemRegFlags,
};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with, sockopt};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::arena::Arena;
use super::ring::{Consumer, Entry, Layout, Memory, Producer};

/// `XDP_UMEM_TX_METADATA_LEN`: <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_UMEM_TX_METADATA_LEN>.
const UMEM_METADATA: u32 = 1 << 2;
/// `XDP_TX_METADATA`: <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_TX_METADATA>.
const METADATA: u32 = 1 << 1;
/// `XDP_TXMD_FLAGS_CHECKSUM`: <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_TXMD_FLAGS_CHECKSUM>.
const METADATA_CHECKSUM: u64 = 1 << 1;
/// `XDP_PKT_CONTD`: <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_PKT_CONTD>.
const CONTINUED: u32 = 1 << 0;
/// Most descriptors of one frame that is sent: `MAX_SKB_FRAGS` and its head, <https://elixir.bootlin.com/linux/v6.18/A/ident/MAX_SKB_FRAGS>.
pub const PIECES: usize = 17;
/// Bytes of `struct xsk_tx_metadata`: <https://elixir.bootlin.com/linux/v6.18/A/ident/xsk_tx_metadata>.
pub const METADATA_LEN: usize = 24;
/// How many frames one call sends in copy mode: <https://elixir.bootlin.com/linux/v6.18/A/ident/XDP_MAX_TX_SKB_BUDGET>.
const MAX_TX_BUDGET: libc::c_int = 9;
/// Memory that frames in flight may take; the default holds a few hundred.
const SEND_BUFFER: usize = 8 << 20;
/// How long a queue may stay busy after its socket was closed.
const BUSY_FOR: Duration = Duration::from_secs(1);

/// An entry of the receive and transmit rings: <https://elixir.bootlin.com/linux/v6.18/A/ident/xdp_desc>.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Descriptor {
    /// Bytes from the start of the memory.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// What more there is to say.
    pub options: u32,
}

impl Descriptor {
    /// A frame to be sent as it is.
    pub fn plain(address: u64, len: usize) -> Descriptor {
        Descriptor { address, len: len as u32, options: 0 }
    }

    /// With [`checksum_metadata`] right before it.
    #[must_use]
    pub fn with_metadata(self) -> Descriptor {
        Descriptor { options: self.options | METADATA, ..self }
    }

    /// To be continued by the next descriptor.
    #[must_use]
    pub fn with_more(self) -> Descriptor {
        Descriptor { options: self.options | CONTINUED, ..self }
    }

    /// Whether the next descriptor continues the frame.
    pub fn is_continued(&self) -> bool {
        self.options & CONTINUED != 0
    }

    /// Whether there is metadata before it.
    pub fn has_metadata(&self) -> bool {
        self.options & METADATA != 0
    }
}

/// What asks the kernel to complete a checksum, to be written right before the frame. Both are as in
/// [`Partial`](weft_encap::offload::Partial).
pub fn checksum_metadata(start: u16, offset: u16) -> [u8; METADATA_LEN] {
    let mut metadata = [0; METADATA_LEN];
    metadata[..8].copy_from_slice(&METADATA_CHECKSUM.to_ne_bytes());
    metadata[8..10].copy_from_slice(&start.to_ne_bytes());
    metadata[10..12].copy_from_slice(&offset.to_ne_bytes());
    metadata
}

/// A worker's chunks, as its sockets share them. It may be sent to whoever opens sockets for the worker.
#[derive(Clone, Debug)]
pub struct Umem {
    base: usize,
    chunk: u32,
    count: u32,
    sockets: Arc<Mutex<Vec<Sibling>>>,
}

/// A socket with which the memory is registered.
#[derive(Debug)]
struct Sibling {
    fd: Weak<OwnedFd>,
    abilities: Abilities,
}

/// What a kernel can do with frames. All sockets on the same memory can do the same.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Complete a checksum if metadata asks for it; since Linux 6.8.
    pub checksum: bool,
    /// Frames of several descriptors, which are longer than a chunk; since Linux 6.6.
    pub pieces: bool,
}

impl Umem {
    /// The chunks of an arena.
    pub fn of(arena: &Arena) -> Umem {
        let (base, chunk, count) = arena.chunks().area();
        Umem { base, chunk: chunk as u32, count, sockets: Arc::default() }
    }

    /// The same chunks, to be registered once more: for sockets of another mode, which cannot share one registration.
    #[must_use]
    pub fn apart(&self) -> Umem {
        Umem { sockets: Arc::default(), ..*self }
    }

    /// Whether these are the chunks of that arena.
    pub fn is_of(&self, arena: &Arena) -> bool {
        arena.chunks().area() == (self.base, self.chunk as usize, self.count)
    }

    /// Registers the memory with a socket. Returns whether the kernel takes metadata with frames to be sent, which it does since
    /// Linux 6.8. With zero copy it is the driver that reads it, and most do not, so none is asked for.
    fn register(&self, fd: &OwnedFd, zero_copy: bool) -> io::Result<bool> {
        let plain = XdpUmemReg {
            addr: self.base as u64,
            len: u64::from(self.chunk) * u64::from(self.count),
            chunk_size: self.chunk,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        if zero_copy {
            return Ok(sockopt::set_xdp_umem_reg(fd, plain).map(|()| false)?);
        }
        let flags = XdpUmemRegFlags::from_bits_retain(UMEM_METADATA);
        let metadata = XdpUmemReg { flags, tx_metadata_len: METADATA_LEN as u32, ..plain };
        match sockopt::set_xdp_umem_reg(fd, metadata) {
            Err(Errno::INVAL) => sockopt::set_xdp_umem_reg(fd, plain).map(|()| false).map_err(io::Error::from),
            result => Ok(result.map(|()| true)?),
        }
    }
}

/// Which queue of which device, and how.
#[derive(Copy, Clone, Debug)]
pub struct Binding {
    /// The device's number in the calling thread's namespace.
    pub interface: u32,
    /// The queue's number.
    pub queue: u32,
    /// Entries of each ring; a power of two.
    pub ring: u32,
    /// Ask for zero copy, which real NICs have: `EOPNOTSUPP` if the driver has not. All sockets of a [`Umem`] must ask alike.
    pub zero_copy: bool,
}

/// The four rings of a socket.
#[derive(Debug)]
pub struct Rings {
    /// Chunks for the kernel to receive into.
    pub fill: Producer<u64>,
    /// Chunks that were transmitted.
    pub completion: Consumer<u64>,
    /// Frames that were received.
    pub receive: Consumer<Descriptor>,
    /// Frames to be transmitted.
    pub transmit: Producer<Descriptor>,
}

/// A bound socket.
#[derive(Debug)]
pub struct Socket {
    /// The only strong reference: the others look at it while they share its memory.
    fd: Arc<OwnedFd>,
    rings: Rings,
    umem: Umem,
    abilities: Abilities,
}

impl Socket {
    /// Opens a socket and binds it to a queue. Frames come once an XDP program redirects them to it; they can be sent at once.
    ///
    /// # Errors
    /// `EBUSY` if another socket has the queue, `ENODEV` if there is no such device, `EINVAL` if it has no such queue, `EPERM` without
    /// CAP_NET_RAW, `ENOBUFS` or `ENOMEM` if the memory cannot be locked.
    pub fn open(umem: &Umem, binding: Binding) -> io::Result<Socket> {
        // The kernel lets go of a queue a while after the last socket on it was closed.
        let deadline = Instant::now() + BUSY_FOR;
        loop {
            match Socket::open_now(umem, binding) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    thread::sleep(BUSY_FOR / 100);
                }
                result => return result,
            }
        }
    }

    fn open_now(umem: &Umem, binding: Binding) -> io::Result<Socket> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let mut sockets = umem.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.retain(|sibling| sibling.fd.strong_count() > 0);
        for index in 0..sockets.len() {
            let abilities = sockets[index].abilities;
            let Some(sibling) = sockets[index].fd.upgrade() else { continue };
            let fd = socket_with(AddressFamily::XDP, SocketType::RAW, flags, None)?;
            let rings = make_rings(&fd, binding.ring)?;
            let addr = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_SHARED_UMEM, binding.interface, binding.queue);
            let shared = SocketAddrXdpWithSharedUmem { addr, shared_umem_fd: sibling.as_fd() };
            match bind(&fd, &shared) {
                Ok(()) => return finish(fd, rings, umem, abilities, &mut sockets),
                // Its device is gone, or it has this very queue and is about to close.
                Err(Errno::BADF | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let fd = socket_with(AddressFamily::XDP, SocketType::RAW, flags, None)?;
        let checksum = umem.register(&fd, binding.zero_copy)?;
        let rings = make_rings(&fd, binding.ring)?;
        let copy = if binding.zero_copy { SocketAddrXdpFlags::XDP_ZEROCOPY } else { SocketAddrXdpFlags::XDP_COPY };
        let flags = copy | SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP;
        let bind = |flags| bind(&fd, &SocketAddrXdp::new(flags, binding.interface, binding.queue));
        let pieces = match bind(flags | SocketAddrXdpFlags::XDP_USE_SG) {
            Err(Errno::INVAL | Errno::OPNOTSUPP) => bind(flags).map(|()| false)?,
            result => result.map(|()| true)?,
        };
        finish(fd, rings, umem, Abilities { checksum, pieces }, &mut sockets)
    }

    /// The memory it works on.
    pub fn umem(&self) -> &Umem {
        &self.umem
    }

    /// What the kernel can do with its frames.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// Its descriptor and its rings.
    pub fn into_parts(self) -> (Wakeup, Rings) {
        (Wakeup { fd: self.fd }, self.rings)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The descriptor of a socket whose rings somebody else has.
#[derive(Debug)]
pub struct Wakeup {
    fd: Arc<OwnedFd>,
}

impl Wakeup {
    /// That of any socket.
    #[cfg(test)]
    pub(crate) fn of(fd: OwnedFd) -> Wakeup {
        Wakeup { fd: Arc::new(fd) }
    }

    /// Has the kernel send what is in the transmit ring, some of it or all.
    ///
    /// # Errors
    /// `ENXIO` if the device is gone. `EAGAIN`, `EBUSY`, `ENOBUFS` if not all could be sent; `ENETDOWN` if the device is down.
    pub fn transmit(&self) -> rustix::io::Result<()> {
        rustix::net::send(&self.fd, &[], rustix::net::SendFlags::DONTWAIT).map(drop)
    }

    /// Has the kernel look for chunks in the fill ring, and says whether the device is still there.
    ///
    /// # Errors
    /// `ENXIO` if the device is gone, `ENETDOWN` if it is down.
    pub fn receive(&self) -> rustix::io::Result<()> {
        recv(&self.fd, &mut [0_u8; 0][..], RecvFlags::DONTWAIT).map(drop)
    }

    /// How many frames the kernel dropped because a ring was full or empty, or because they were too long.
    ///
    /// # Errors
    /// The kernel's.
    pub fn overruns(&self) -> io::Result<u64> {
        let counted = sockopt::xdp_statistics(&self.fd)?;
        // What had no chunk to be copied to counts as dropped, and beside that as a look into an empty fill ring.
        Ok(counted.rx_dropped + counted.rx_ring_full.unwrap_or(0))
    }

    /// The descriptor itself, for who closes it: that waits until no CPU uses the socket any more.
    pub fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }
}

impl AsFd for Wakeup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sets the last options, and makes the socket known to those that come later.
fn finish(
    fd: OwnedFd,
    rings: Rings,
    umem: &Umem,
    abilities: Abilities,
    sockets: &mut Vec<Sibling>,
) -> io::Result<Socket> {
    // Both only make sending cheaper; a kernel or a user that may not have them sends too.
    let _ = sockopt::set_socket_send_buffer_size_force(&fd, SEND_BUFFER);
    let _ = set_option(&fd, MAX_TX_BUDGET, rings.transmit.size());
    let fd = Arc::new(fd);
    sockets.push(Sibling { fd: Arc::downgrade(&fd), abilities });
    Ok(Socket { fd, rings, umem: umem.clone(), abilities })
}

fn make_rings(fd: &OwnedFd, size: u32) -> io::Result<Rings> {
    sockopt::set_xdp_umem_fill_ring_size(fd, size)?;
    sockopt::set_xdp_umem_completion_ring_size(fd, size)?;
    sockopt::set_xdp_rx_ring_size(fd, size)?;
    sockopt::set_xdp_tx_ring_size(fd, size)?;
    let offsets = sockopt::xdp_mmap_offsets(fd)?;
    let (memory, layout) = map_ring::<u64>(fd, XDP_UMEM_PGOFF_FILL_RING, &offsets.fr, size)?;
    let fill = Producer::new(memory, layout, size)?;
    let (memory, layout) = map_ring::<u64>(fd, XDP_UMEM_PGOFF_COMPLETION_RING, &offsets.cr, size)?;
    let completion = Consumer::new(memory, layout, size)?;
    let (memory, layout) = map_ring::<Descriptor>(fd, XDP_PGOFF_RX_RING, &offsets.rx, size)?;
    let receive = Consumer::new(memory, layout, size)?;
    let (memory, layout) = map_ring::<Descriptor>(fd, XDP_PGOFF_TX_RING, &offsets.tx, size)?;
    let transmit = Producer::new(memory, layout, size)?;
    Ok(Rings { fill, completion, receive, transmit })
}

fn map_ring<T: Entry>(fd: &OwnedFd, at: u64, offset: &XdpRingOffset, size: u32) -> io::Result<(Arc<Memory>, Layout)> {
    let flags = offset.flags.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "AF_XDP needs Linux 5.4"))?;
    let layout = Layout {
        producer: offset.producer as usize,
        consumer: offset.consumer as usize,
        flags: flags as usize,
        entries: offset.desc as usize,
    };
    Ok((Arc::new(Memory::map(fd, at, layout.len::<T>(size))?), layout))
}

fn set_option(fd: &OwnedFd, option: libc::c_int, value: u32) -> io::Result<()> {
    // SAFETY: the option is a 32-bit number, read from `value`, which lives until the call returns. rustix does not know it.
    let result = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_XDP, option, (&raw const value).cast(), size_of::<u32>() as _)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
