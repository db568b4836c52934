//! Frames on their way out, one queue per port.
//!
//! The forwarder pushes, the worker takes the touched queues in turn and has their ports send them. Queues keep their
//! memory, so a push allocates only while a queue is growing to the longest it ever was.

use crate::frame::Frame;
use crate::port::{PortId, QUEUE, Queue};

/// Queues by port. See the module's essay.
#[derive(Default)]
pub struct Outbox {
    queues: Vec<Slot>,
    touched: Vec<PortId>,
}

#[derive(Default)]
struct Slot {
    queue: Queue,
    touched: bool,
}

impl Outbox {
    /// An empty one.
    pub fn new() -> Outbox {
        Outbox::default()
    }

    /// Appends a frame to a port's queue.
    ///
    /// # Errors
    /// [`QUEUE`] frames wait there already: the frame comes back, to be dropped by name.
    #[inline(always)]
    pub fn push(&mut self, port: PortId, frame: Frame) -> Result<(), Frame> {
        let slot = self.slot(port);
        if slot.queue.len() >= QUEUE {
            return Err(frame);
        }
        slot.queue.push_back(frame);
        if !std::mem::replace(&mut slot.touched, true) {
            self.touched.push(port);
        }
        Ok(())
    }

    /// A port whose queue has got frames since it was last returned; `None` if there is none left.
    pub fn touched(&mut self) -> Option<PortId> {
        let port = self.touched.pop()?;
        self.slot(port).touched = false;
        Some(port)
    }

    /// A port's queue.
    pub fn queue(&mut self, port: PortId) -> &mut Queue {
        &mut self.slot(port).queue
    }

    #[inline(always)]
    fn slot(&mut self, port: PortId) -> &mut Slot {
        let index = port.index();
        if index >= self.queues.len() {
            self.queues.resize_with(index + 1, Slot::default);
        }
        &mut self.queues[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;

    #[test]
    fn a_touched_port_is_named_once_until_it_is_touched_again() {
        let pool = Pool::new(8, 1).unwrap();
        let mut outbox = Outbox::new();
        for port in [3, 1, 3] {
            let frame = Frame::from_bytes(&[port as u8], PortId(0), &pool).unwrap();
            outbox.push(PortId(port), frame).unwrap();
        }
        let mut touched: Vec<u16> = std::iter::from_fn(|| outbox.touched()).map(|port| port.0).collect();
        touched.sort_unstable();
        assert_eq!(touched, [1, 3]);
        assert_eq!(outbox.queue(PortId(3)).len(), 2);
        outbox.push(PortId(3), Frame::from_bytes(&[3], PortId(0), &pool).unwrap()).unwrap();
        assert_eq!(outbox.touched(), Some(PortId(3)));
        assert_eq!(outbox.touched(), None);
    }

    #[test]
    fn a_full_queue_gives_the_frame_back() {
        let pool = Pool::new(QUEUE as u32 + 1, 1).unwrap();
        let mut outbox = Outbox::new();
        for _ in 0..QUEUE {
            outbox.push(PortId(0), Frame::from_bytes(&[0], PortId(7), &pool).unwrap()).unwrap();
        }
        let frame = outbox.push(PortId(0), Frame::from_bytes(&[1], PortId(7), &pool).unwrap()).unwrap_err();
        assert_eq!(frame.ingress(), PortId(7));
        assert_eq!(outbox.queue(PortId(0)).len(), QUEUE);
    }
}
