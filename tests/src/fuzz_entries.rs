//! One function for each way in: any bytes go in, and it panics if a promise is broken.
//!
//! The fuzz targets in `tests/fuzz` are one call to one of these each; the test `corpora` replays what they found and what they were
//! started from. [`ALL`] names them, so that a target without a corpus, or a corpus without a target, is noticed.

use std::net::IpAddr;

use weft_encap::exercise;
use weft_encap::format::Format;
use weft_encap::geneve::GeneveHeader;
use weft_encap::ip;
use weft_encap::offload::Offload;
use weft_router::frame::{Frame, Outer};
use weft_router::pool::Pool;
use weft_router::port::BATCH;
use weft_router::port::memory::Packet;
use weft_router::port::raw::dress;
use weft_router::probing::{PROBE_LEN, PROBE_PORT};
use weft_router::tables::Mode;
use weft_router::{DropReason, PortId, Tables};

use crate::frames::{self, L2, L3};
use crate::gathering;
use crate::masquerading;
use crate::memory::{Input, Memory, PODS, VTEP, node_underlay, node_vtep, tables};

/// An entry: it takes anything.
pub type Entry = fn(&[u8]);

/// All entries of this crate by the name of their target. `cni` and `config` are programs of their own.
pub const ALL: [(&str, Entry); 12] = [
    ("forward", forward),
    ("underlay", underlay),
    ("geneve", geneve),
    ("gre", gre),
    ("ipip", ipip),
    ("probe", probe),
    ("masquerade", masquerade),
    ("gather", gather),
    ("virtio", virtio),
    ("neighbour", neighbour),
    ("api", api),
    ("journal", journal),
];

/// Frames through the whole forwarder, twice: with its cache and with one that never hits. Each frame is a byte that says where it comes
/// from (bit 0..2 port; bit 3 bridged, of the first one), a virtio header, two bytes of length and that many bytes.
pub fn forward(bytes: &[u8]) {
    let mode = if bytes.first().is_some_and(|first| first & 8 != 0) { Mode::Bridged } else { Mode::Routed };
    let (mut cached, mut slow) = (Memory::new(tables(mode)), Memory::new(tables(mode)));
    let mut rest = bytes;
    for _ in 0..32 {
        let Some((input, tail)) = frame(rest) else { return };
        rest = tail;
        slow.tables.epoch += 1;
        let (fast, sure) = (cached.feed(&input), slow.feed(&input));
        assert_eq!(fast, sure, "{input:?}");
    }
}

fn frame(bytes: &[u8]) -> Option<(Input, &[u8])> {
    let ([from], rest) = bytes.split_first_chunk()?;
    let (header, rest) = rest.split_first_chunk::<{ weft_encap::virtio::LEN }>()?;
    let (len, rest) = rest.split_first_chunk::<2>()?;
    let (frame, rest) = rest.split_at(usize::from(u16::from_be_bytes(*len)).min(rest.len()).min(4096));
    let port = u16::from(from & 7) % (PODS + 2);
    let outer = (port == 0).then(|| Outer::vxlan(node_underlay(u16::from(from >> 4 & 3))));
    // What the TAP port refuses never becomes a frame.
    let offload = weft_encap::virtio::parse(header, frame.len()).unwrap_or_default();
    let offload = if outer.is_some() { Offload::default() } else { offload };
    Some((Input { port: PortId(port), bytes: frame.to_vec(), offload, outer, head: usize::MAX }, rest))
}

/// What the underlay hands over: tunnel headers, trains of datagrams to be merged, partial checksums to be recognised.
pub fn underlay(bytes: &[u8]) {
    exercise::vxlan(bytes);
    exercise::coalescing(bytes);
    exercise::partial_checksum(bytes);
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut memory = Memory::new(tables(mode));
        let outer = Some(Outer::vxlan(node_underlay(0)));
        let input = Input { outer, ..Input::pod(0, bytes.get(..bytes.len().min(4096)).unwrap_or_default().to_vec()) };
        memory.feed(&input);
    }
}

/// Geneve: the header with its options, and what the forwarder makes of it.
pub fn geneve(bytes: &[u8]) {
    exercise::geneve(bytes);
    let base = GeneveHeader::claimed_len(bytes) as u16;
    from_tunnel(bytes, Outer { format: Format::Geneve, base, ..Outer::vxlan(node_underlay(0)) }, Offload::default());
}

/// What lies behind an outer IP header with GRE's protocol.
pub fn gre(bytes: &[u8]) {
    exercise::gre(bytes);
    dressed(ip::GRE, bytes);
}

/// What lies behind an outer IP header that says that IP is inside. The first byte is that header's protocol.
pub fn ipip(bytes: &[u8]) {
    exercise::ipip(bytes);
    let Some((protocol, rest)) = bytes.split_first() else { return };
    dressed(if protocol & 1 == 0 { ip::IPIP } else { ip::IPV6 }, rest);
}

/// A packet as the port for such packets hands it over.
fn dressed(protocol: u8, bytes: &[u8]) {
    let pool = Pool::new(4, 4).expect("there is memory");
    let Some(mut frame) = Frame::from_bytes(bytes.get(..bytes.len().min(4096)).unwrap_or_default(), PortId(0), &pool)
    else {
        return;
    };
    if dress(&mut frame, protocol, 1450).is_ok()
        && let Some(outer) = frame.outer
    {
        let outer = Outer { peer: node_underlay(0), ..outer };
        from_tunnel(&frame.to_vec(), outer, frame.offload);
    }
}

/// A frame from another node, twice: the second time its flow is known.
fn from_tunnel(bytes: &[u8], outer: Outer, offload: Offload) {
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut memory = Memory::new(tables(mode));
        let bytes = bytes.get(..bytes.len().min(4400)).unwrap_or_default().to_vec();
        let input = Input { outer: Some(outer), offload, ..Input::pod(0, bytes) };
        let (first, second) = (memory.feed(&input), memory.feed(&input));
        assert_eq!(first.ended, second.ended, "{input:?}");
    }
}

/// What another node says where questions and answers about the way are expected. The first byte says by which family, the two after it the
/// source port; the rest is the datagram.
pub fn probe(bytes: &[u8]) {
    let Some(([first, a, b], rest)) = bytes.split_first_chunk::<3>() else { return };
    let ours = IpAddr::from([10, 200, 0, 1]);
    let l3 = match (first & 1, node_underlay(0), ours) {
        (0, from, to) => L3::new(from, to),
        (_, IpAddr::V4(from), IpAddr::V4(to)) => L3::new(from.to_ipv6_mapped(), to.to_ipv6_mapped()),
        _ => return,
    };
    let l2 = L2 { src: node_vtep(0), dst: VTEP };
    let payload = &rest[..rest.len().min(1400)];
    let inner = frames::udp(l2, l3.ttl(64 - (first >> 6)), (u16::from_be_bytes([*a, *b]), PROBE_PORT), payload);
    for mode in [Mode::Routed, Mode::Bridged] {
        let mut memory = Memory::new(Tables { address: Some(ours), ..tables(mode) });
        let input = Input::node(0, &inner);
        let (question, again) = (memory.feed(&input), memory.feed(&input));
        assert_eq!(question, again, "{input:?}");
        // Whatever is said, an answer is no longer than a question may be short.
        let most = frames::udp(l2, l3, (0, 0), &[0; PROBE_LEN]).len() + 8;
        let is_answer = |sent: &crate::memory::Output| sent.outer.is_some() && sent.bytes.len() <= most;
        let answered = question.ended.contains(&DropReason::Answered);
        assert!(!answered || question.sent.iter().all(is_answer), "{question:?}");
    }
}

/// Pods that leave the cluster, and what comes back: see [`masquerading::check`].
pub fn masquerade(bytes: &[u8]) {
    masquerading::check(bytes);
}

/// Vectors to be gathered. The first byte says of what: streams as [`gathering::packets`] reads them or, if bit 7 is set, any frames as
/// [`forward`] reads them, all from one port.
pub fn gather(bytes: &[u8]) {
    if bytes.first().is_none_or(|first| first & 0x80 == 0) {
        gathering::check(&gathering::packets(bytes));
        return;
    }
    let (mut packets, mut rest) = (Vec::new(), &bytes[1..]);
    while let Some((input, tail)) = frame(rest) {
        rest = tail;
        let same_port = packets.first().is_none_or(|first: &Packet| first.outer.is_some() == input.outer.is_some());
        if same_port && packets.len() < BATCH {
            packets.push(Packet { bytes: input.bytes, offload: input.offload, outer: input.outer });
        }
    }
    gathering::check(&packets);
}

/// What a pod's virtio header says, and cutting superframes.
pub fn virtio(bytes: &[u8]) {
    exercise::virtio(bytes);
    exercise::segmentation(bytes);
    exercise::checksums(bytes);
}

/// Headers, extension headers, ARP, neighbour discovery, ICMP.
pub fn neighbour(bytes: &[u8]) {
    exercise::headers(bytes);
    exercise::extension_headers(bytes);
    exercise::neighbor(bytes);
}

/// What a client of the daemon's socket sends, through a real socket: whatever it is, it is a request or an error, and what can be read can
/// be written and read again.
pub fn api(bytes: &[u8]) {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};
    let Ok((mut client, server)) = UnixStream::pair() else { return };
    let bytes = &bytes[..bytes.len().min(64 << 10)];
    client.set_nonblocking(true).expect("a socket can be made so");
    let sent = client.write(bytes).unwrap_or(0);
    drop(client);
    let mut connection = weft_api::Connection::new(server, weft_api::MAX_REQUEST);
    let mut taken = 0;
    while let Ok(Some(line)) = connection.receive(Instant::now() + Duration::from_secs(5)) {
        taken += line.bytes.len();
        assert!(taken <= sent, "more came out than went in");
        if let Ok(incoming) = line.request() {
            let again =
                serde_json::to_vec(&weft_api::Envelope { version: weft_api::VERSION, request: incoming.request });
            let again = again.expect("a request can be written");
            serde_json::from_slice::<weft_api::Envelope>(&again).expect("what was written can be read");
        }
    }
}

/// A lease journal as it may lie on a disk: it is read or refused. What was read survives being written and read again.
pub fn journal(bytes: &[u8]) {
    let Ok(store) = weft_ipam::Store::with_disk(Box::new(disk::InMemory::new(bytes))) else { return };
    let before = store.records();
    let mut addresses = std::collections::BTreeSet::new();
    for record in &before {
        for lease in &record.leases {
            assert!(addresses.insert((record.facts.pool.clone(), lease.address)), "{} is leased twice", lease.address);
        }
    }
    let disk = disk::InMemory::new(bytes);
    let content = disk.content();
    let store = weft_ipam::Store::with_disk(Box::new(disk)).expect("it could be opened before");
    store.compact().expect("memory does not fail");
    drop(store);
    let compacted = content.lock().expect("nobody panicked").clone().expect("there is a journal");
    let store =
        weft_ipam::Store::with_disk(Box::new(disk::InMemory::new(&compacted))).expect("what was compacted can be read");
    assert_eq!(store.records(), before);
}

mod disk {
    //! A disk that is memory.

    use std::io;
    use std::sync::{Arc, Mutex};

    use weft_ipam::{Disk, Which};

    type Content = Arc<Mutex<Option<Vec<u8>>>>;

    pub struct InMemory {
        journal: Content,
        next: Option<Vec<u8>>,
    }

    impl InMemory {
        pub fn new(bytes: &[u8]) -> InMemory {
            InMemory { journal: Arc::new(Mutex::new(Some(bytes.to_vec()))), next: None }
        }

        pub fn content(&self) -> Content {
            Arc::clone(&self.journal)
        }
    }

    fn missing() -> io::Error {
        io::ErrorKind::NotFound.into()
    }

    impl Disk for InMemory {
        fn load(&mut self) -> io::Result<Option<Vec<u8>>> {
            Ok(self.journal.lock().expect("nobody panicked").clone())
        }

        fn create_next(&mut self) -> io::Result<()> {
            self.next = Some(Vec::new());
            Ok(())
        }

        fn write(&mut self, file: Which, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let mut journal = self.journal.lock().expect("nobody panicked");
            let file = match file {
                Which::Journal => journal.as_mut(),
                Which::Next => self.next.as_mut(),
            };
            let (file, offset) = (file.ok_or_else(missing)?, offset as usize);
            if file.len() < offset + bytes.len() {
                file.resize(offset + bytes.len(), 0);
            }
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn sync(&mut self, _: Which) -> io::Result<()> {
            Ok(())
        }

        fn truncate(&mut self, length: u64) -> io::Result<()> {
            let mut journal = self.journal.lock().expect("nobody panicked");
            journal.as_mut().ok_or_else(missing)?.truncate(length as usize);
            Ok(())
        }

        fn rename(&mut self) -> io::Result<()> {
            *self.journal.lock().expect("nobody panicked") = Some(self.next.take().ok_or_else(missing)?);
            Ok(())
        }

        fn sync_folder(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn remove_next(&mut self) -> io::Result<()> {
            self.next = None;
            Ok(())
        }
    }
}
