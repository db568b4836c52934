//! A worker's ports as they come, are given another device, and go.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};

use super::{Slot, Worker};
use crate::control::{self, Half, NewPort, PortEnd, Removed, RouterError, UplinkHalf};
use crate::port::packet::PacketPort;
use crate::port::raw::RawPort;
use crate::port::tap::TapPort;
use crate::port::udp::UdpPort;
use crate::port::xdp::{KernelWay, XdpPort, XdpUnderlay};
use crate::port::{Port, PortId};

impl Worker {
    /// Takes a new one.
    pub(super) fn add(&mut self, new: NewPort) -> Result<(), RouterError> {
        let (id, shared) = (new.id, new.shared);
        let port = self.make(id, new.half)?;
        self.insert(id, port, shared).map_err(RouterError::Device)
    }

    fn make(&mut self, id: PortId, half: Half) -> Result<Box<dyn Port>, RouterError> {
        let tunnel_mtu = self.tables.load().tunnel_mtu;
        Ok(match half {
            Half::Tap { tap, receives } => Box::new(TapPort::new(tap, id, receives)),
            Half::Outlet(outlet) => Box::new(PacketPort::new(outlet, id)),
            Half::Xdp { device, .. } => Box::new(XdpPort::new(*device, &self.pool, id).map_err(RouterError::Device)?),
            Half::Underlay(sockets) => Box::new(UdpPort::new(sockets, id, tunnel_mtu)),
            Half::Raw { half, receives } => Box::new(RawPort::new(half, id, receives, tunnel_mtu)),
            Half::Uplink(half) => self.uplink(id, *half, tunnel_mtu).map_err(RouterError::Device)?,
        })
    }

    /// Gives one that is there another device.
    pub(super) fn replace(&mut self, new: NewPort) -> Result<Option<OwnedFd>, RouterError> {
        let port = self.make(new.id, new.half)?;
        self.put_in_place(new.id, port, new.shared).map_err(RouterError::Device)
    }

    /// Puts another device in the place of a port's. What waits for it leaves by the new one.
    pub(super) fn put_in_place(
        &mut self,
        id: PortId,
        mut port: Box<dyn Port>,
        shared: control::Shared,
    ) -> io::Result<Option<OwnedFd>> {
        let Some(Some(slot)) = self.ports.get_mut(id.index()) else {
            return self.insert(id, port, shared).map(|()| None);
        };
        watch(&self.poll, id, &*port)?;
        slot.can_peek = port.peek().is_some();
        (slot.kind, slot.capabilities, slot.shared, slot.ready) = (port.kind(), port.capabilities(), shared, false);
        let before = slot.port.replace(port);
        self.attention.forget(id);
        self.ready.retain(|ready| *ready != id);
        let device = before.and_then(|mut before| {
            before.count(self.forwarder.stats());
            if let Some(fd) = before.readable() {
                let _ = self.poll.registry().deregister(&mut SourceFd(&fd.as_raw_fd()));
            }
            before.retire()
        });
        self.mark_ready(id);
        Ok(device)
    }

    /// A worker without a queue of the uplink has the sockets alone.
    fn uplink(&self, id: PortId, half: UplinkHalf, tunnel_mtu: u32) -> io::Result<Box<dyn Port>> {
        let kernel = Box::new(UdpPort::new(half.sockets, id, tunnel_mtu));
        if half.devices.is_empty() {
            return Ok(kernel);
        }
        let kernel = KernelWay::new(kernel);
        Ok(Box::new(XdpUnderlay::new(half.devices, half.tunnel, half.hops, kernel, &self.pool, id)?))
    }

    /// Puts a port in its place.
    pub(super) fn insert(&mut self, id: PortId, mut port: Box<dyn Port>, shared: control::Shared) -> io::Result<()> {
        if self.ports.len() <= id.index() {
            self.ports.resize_with(id.index() + 1, || None);
        }
        let slot = &mut self.ports[id.index()];
        if slot.as_ref().is_some_and(|slot| slot.port.is_some()) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("port {id} is in use")));
        }
        watch(&self.poll, id, &*port)?;
        let (kind, capabilities) = (port.kind(), port.capabilities());
        self.forwarder.open_port(id, shared.receivers);
        let can_peek = port.peek().is_some();
        *slot = Some(Slot { port: Some(port), kind, capabilities, shared, ready: false, busy: false, can_peek });
        self.mark_ready(id);
        Ok(())
    }

    /// Receives from a port by which this worker only sent so far.
    pub(super) fn receive(&mut self, id: PortId) {
        let slot = self.ports.get_mut(id.index()).and_then(Option::as_mut);
        let Some(port) = slot.and_then(|slot| slot.port.as_mut()) else { return };
        port.receive_too();
        match watch(&self.poll, id, &**port) {
            Ok(()) => self.mark_ready(id),
            Err(_) => self.gone(id, PortEnd::Device),
        }
    }

    /// Ends one; its last counters.
    pub(super) fn remove(&mut self, id: PortId) -> Option<Removed> {
        let slot = self.ports.get_mut(id.index())?.as_mut()?;
        if let Some(port) = &mut slot.port {
            port.count(self.forwarder.stats());
        }
        let device = self.retire(id);
        self.ports[id.index()] = None;
        Some(Removed { stats: *self.forwarder.stats().port(id), device })
    }
}

/// Has the poller tell when a port can be received from.
pub(super) fn watch(poll: &Poll, id: PortId, port: &dyn Port) -> io::Result<()> {
    let Some(fd) = port.readable() else { return Ok(()) };
    poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), Token(id.index()), Interest::READABLE)
}
