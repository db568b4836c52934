//! Why a frame ended here.
//!
//! Every frame that does not leave by a port ends with exactly one [`DropReason`]. Its name is the counter, the
//! word in the trace and the line in the documentation; its meaning is what `weft drops` prints. A reason
//! is added in this file alone.

macro_rules! reasons {
    ($($(#[$kind:ident])? $name:ident = $meaning:literal,)*) => {
        /// The end of a frame. One byte, `Copy`.
        #[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason {
            $(#[doc = $meaning] $name,)*
        }

        impl DropReason {
            /// All reasons, in order of their discriminants.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name,)*];

            /// The name: counter, trace word and documentation line.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$name => stringify!($name),)* }
            }

            /// What it means, in a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(DropReason::$name => $meaning,)* }
            }

            /// Whether something was lost. `false` for a frame that ended here as it should, for example one that was answered.
            pub fn is_loss(self) -> bool {
                match self { $(DropReason::$name => reasons!(@loss $($kind)?),)* }
            }
        }
    };
    (@loss fine) => { false };
    (@loss) => { true };
}

reasons! {
    // Ends that are no loss.
    #[fine] Answered = "the frame was for the gateway, which answered or took it",
    #[fine] NoReceiver = "a broadcast or multicast frame with nobody else in its segment to hear it",
    #[fine] Hairpin = "the destination is behind the port the frame came in on",
    #[fine] Bandwidth = "the pod is sent more than its limit of bandwidth lets through",
    #[fine] AddressPending = "the pod waits for its address: until it has one its port is open for the DHCP client alone",
    #[fine] PortAbsent = "the port has no device yet or no longer: its pod is being attached or removed",

    // Reading the frame.
    TooShort = "the frame is shorter than its headers say",
    Malformed = "a header contradicts itself or the frame",
    BadIpv4Checksum = "the IPv4 header checksum is wrong",
    TooManyHeaders = "more IPv6 extension headers, or longer headers, than the router reads",
    VlanTag = "pod ports are untagged, and the frame carries a VLAN tag",
    BadOffload = "the offload header of the frame does not fit the frame",
    Truncated = "the frame was longer than the receive buffer",
    BadDescriptor = "the kernel handed over an AF_XDP descriptor that does not name a buffer lent to it",

    // Who sent it?
    PortClosed = "the port has no policy yet, or no longer",
    SourceMac = "the source MAC is not the attachment's",
    SourceIp = "the source address is not the attachment's",
    ArpSpoof = "an ARP message claims an address or MAC that is not the attachment's",
    NdSpoof = "a neighbour discovery message claims an address or MAC that is not the sender's",
    RouterMessage = "a pod sent a router advertisement or redirect",
    DhcpServer = "a pod answered as a DHCP server",
    NotMember = "the outer source is not a node of this cluster",
    TunnelHeader = "the tunnel header is malformed or has reserved bits set",
    TunnelOption = "a Geneve option that has to be understood, and is not",
    TunnelPayload = "the tunnel carries something that this node does not take from it: IP alone in bridged mode, or neither IP nor Ethernet",
    WrongVni = "the tunnel header carries another network identifier",
    TunnelSource = "the inner source does not belong to the node that sent it",

    // Where to?
    NoRoute = "no route leads to the destination",
    NoNextHop = "the route leads to a router or node that is not known to be there, and this node has no host port to look for it",
    UnknownMac = "no port or node has the destination MAC",
    UnknownNeighbour = "the destination is in a local range, but no pod has that address",
    NotForwardable = "loopback, link-local, unspecified or multicast addresses are not routed",
    UnsupportedType = "routed mode carries only IP between nodes, and the frame is something else",
    NotForUs = "a frame from another node for a destination that is not here",
    GatewayRefused = "the gateway does not serve what was asked of it",
    NotIp = "the frame is for the gateway's MAC, but is not IP",

    // Leaving the cluster.
    NotMasqueraded = "the protocol has no ports by which answers could be told apart, so it cannot leave the cluster in the node's name",
    NoSource = "the node has no address of that family by which the packet could leave the cluster",
    MasqueradePorts = "all reserved ports towards that destination are taken (masquerade.ports; weft nat)",
    MasqueradeQuota = "the pod has as many translated conversations as it may (masquerade.per_pod; weft nat)",
    MasqueradeFull = "the node has as many translated conversations as it may (masquerade.sessions; weft nat)",
    Uninvited = "for the outer port of another pod of this node, which has not sent to that of the sender (masquerade; weft nat)",
    UnknownPiece = "a later fragment whose first one did not pass here, or of which there are too many at once",

    // On the way.
    TtlExceeded = "TTL or hop limit reached zero",
    MtuExceeded = "the packet is larger than the path's MTU; its sender is told, and nothing is fragmented here",
    FloodBudget = "the port has used up its budget of broadcast and multicast copies",

    // Leaving.
    NoBuffer = "no free buffer was left",
    QueueFull = "the transmit queue of the port was full",
    PortDown = "the port's device is down or gone",
    DeviceRefused = "the device refused this frame",
    UnderlayMtu = "the encapsulated frame is larger than the underlay's MTU",
    UnderlayUnreachable = "the kernel has no route to the node, or refused to send there",
    UnderlayBusy = "the underlay socket's buffer was full",
    Unsegmentable = "the superframe cannot be segmented in software",
    RouterFault = "the router panicked over this frame, which is a bug of its own",
}

impl DropReason {
    /// How many there are; the length of a counter array.
    pub const COUNT: usize = DropReason::ALL.len();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discriminants_index_the_list_of_all() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
    }
}
