//! `/dev/net/tun`: making a TAP, and the requests that no crate offers.
//!
//! The numbers are Linux's (include/uapi/linux/if_tun.h); headers of older systems lack some of them, so they are written
//! out here: <https://elixir.bootlin.com/linux/v6.18/source/include/uapi/linux/if_tun.h#L32>.

use std::ffi::{c_int, c_short, c_uint};
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::ioctl::{Getter, IntegerSetter, Opcode, Setter, ioctl, opcode};

/// Checksums may be partial: <https://elixir.bootlin.com/linux/v6.18/source/include/uapi/linux/if_tun.h#L88>.
pub const CSUM: u32 = 0x01;
/// TCP over IPv4 superframes.
pub const TSO4: u32 = 0x02;
/// TCP over IPv6 superframes.
pub const TSO6: u32 = 0x04;
/// UDP superframes over IPv4. Both USO bits or none, and not before Linux 6.2.
pub const USO4: u32 = 0x20;
/// UDP superframes over IPv6.
pub const USO6: u32 = 0x40;

const SET_OFFLOAD: Opcode = opcode::write::<c_uint>(b'T', 208);
const GET_INTERFACE: Opcode = opcode::read::<c_uint>(b'T', 210);
const SET_VNET_HEADER_SIZE: Opcode = opcode::write::<c_int>(b'T', 216);
const SET_VNET_LITTLE_ENDIAN: Opcode = opcode::write::<c_int>(b'T', 220);

const IFF_TAP: c_short = 0x0002;
const IFF_VNET_HDR: c_short = 0x4000;

/// Makes a TAP with virtio headers in the current namespace. The name may hold a `%d`. The descriptor does not block.
///
/// # Errors
/// The kernel's: `EPERM` without CAP_NET_ADMIN, `EBUSY` if there is a device of that name, `EINVAL` for a bad name.
pub fn create(name: &str) -> io::Result<OwnedFd> {
    let mut configuration = tun::Configuration::default();
    configuration.tun_name(name).layer(tun::Layer::L2);
    configuration.platform_config(|platform| {
        // "Root privileges" would configure the interface, which is the daemon's to do, in the pod's namespace.
        platform.ensure_root_privileges(false).vnet_hdr(true);
    });
    let device = tun::create(&configuration).map_err(io::Error::from)?;
    device.set_nonblock()?;
    // SAFETY: `into_raw_fd` gives up the only ownership of an open descriptor. The crate has no safe way to
    // hand it over as an `OwnedFd`.
    Ok(unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) })
}

/// What `TUNGETIFF` fills in: a `struct ifreq`, of which it uses name and flags.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    flags: c_short,
    rest: [u8; 22],
}

/// The interface's name, in whatever namespace it is.
///
/// # Errors
/// `EINVAL` if the descriptor is no TAP with virtio headers; `EBADFD` if its device is gone; the kernel's otherwise.
pub fn name(fd: impl AsFd) -> io::Result<String> {
    // SAFETY: TUNGETIFF copies a whole `struct ifreq` to its argument (40 bytes on 64-bit machines, as `Interface`; its size is
    // asserted below), and any bytes are a valid `Interface`. No crate wraps this request.
    let interface: Interface = unsafe { ioctl(fd, Getter::<GET_INTERFACE, Interface>::new())? };
    if interface.flags & (IFF_TAP | IFF_VNET_HDR) != IFF_TAP | IFF_VNET_HDR {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not a TAP with virtio headers"));
    }
    let end = interface.name.iter().position(|&byte| byte == 0).unwrap_or(interface.name.len());
    Ok(String::from_utf8_lossy(&interface.name[..end]).into_owned())
}

const _: () = assert!(size_of::<Interface>() == size_of::<libc::ifreq>());

/// Sets the length of the virtio header and makes it little endian, as [`weft_encap::virtio`] writes it.
///
/// # Errors
/// The kernel's.
pub fn set_virtio_header(fd: impl AsFd, len: usize) -> io::Result<()> {
    let len = c_int::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: both requests read one int from their argument, which lives until the call returns. No crate
    // wraps them.
    unsafe {
        ioctl(&fd, Setter::<SET_VNET_HEADER_SIZE, c_int>::new(len))?;
        ioctl(&fd, Setter::<SET_VNET_LITTLE_ENDIAN, c_int>::new(1))?;
    }
    Ok(())
}

/// Says what the pod's stack may leave to us.
///
/// # Errors
/// `EINVAL` if the kernel does not know one of the bits.
pub fn set_offload(fd: impl AsFd, bits: u32) -> io::Result<()> {
    // SAFETY: the request takes its argument by value and touches no memory. No crate wraps it.
    unsafe { ioctl(fd, IntegerSetter::<SET_OFFLOAD>::new_usize(bits as usize))? }
    Ok(())
}
