//! The payload of a journal frame: operations, as length-prefixed fields.
//!
//! Everything is little-endian. A payload is one or more operations, each `kind: u8, length: u32, body`; a body is
//! fields, each `tag: u8, length: u32, value`. Strings are UTF-8 without terminator. An IP address is 4 or 16 bytes,
//! told apart by the length.
//!
//! | operation | kind | fields |
//! |---|---|---|
//! | lease | 1 | owner (1, 2, 3), pool 4, time 5, then MAC 6, boot 12, netns 13, label 8 (repeated), address 9 (repeated) |
//! | release | 2 | owner (1, 2, 3), since 14 |
//! | round | 3 | pool 4, set 10, last 11 |
//! | boot | 4 | boot 12, since 14 |
//! | rest | 5 | pool 4, last 11, since 14 |
//!
//! | tag | field | value |
//! |---|---|---|
//! | 1, 2, 3, 4 | network, container, ifname, pool | string |
//! | 5 | time | u64 |
//! | 6 | MAC | 6 bytes |
//! | 7 | what version 1 knew of the namespace | string; passed over |
//! | 8 | label | `length of the key: u32, key, value` |
//! | 9 | address | `prefix length: u8, address, gateway, set`, three IP addresses of one family |
//! | 10, 11 | set, last | IP address |
//! | 12 | boot | string |
//! | 13 | netns | `cookie: u64, inode: u64`, and if it has a number `home: u64, id: i32` |
//! | 14 | since | u64, milliseconds since the boot; absent in a release of version 1 |
//!
//! This is written by hand, and not JSON, because a reader has to refuse whatever it does not fully understand: an
//! unknown tag, a field twice, a byte too many. One field more costs one line on each side, and a lease is a fifth
//! of its size in JSON, which is what every restart reads.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::range::is_v4;
use crate::record::{Facts, Lease, Netns, NetnsNumber, Owner, Record};

/// A change of the leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// The attachment has these addresses from here on.
    Lease(Box<Record>),
    /// The attachment has none any more, and they rest since then.
    Release { owner: Owner, since: u64 },
    /// The address last given from a set of a pool.
    Round { pool: String, set: IpAddr, last: IpAddr },
    /// It is another boot, and its clock says so much.
    Boot { id: String, now: u64 },
    /// An address rests since then.
    Rest { pool: String, address: IpAddr, since: u64 },
}

const LEASE: u8 = 1;
const RELEASE: u8 = 2;
const ROUND: u8 = 3;
const BEGIN_BOOT: u8 = 4;
const REST: u8 = 5;

const NETWORK: u8 = 1;
const CONTAINER: u8 = 2;
const IFNAME: u8 = 3;
const POOL: u8 = 4;
const TIME: u8 = 5;
const MAC: u8 = 6;
const OLD_NETNS: u8 = 7;
const LABEL: u8 = 8;
const ADDRESS: u8 = 9;
const SET: u8 = 10;
const LAST: u8 = 11;
const BOOT: u8 = 12;
const NETNS: u8 = 13;
const SINCE: u8 = 14;

/// Appends a lease.
pub(crate) fn put_lease(out: &mut Vec<u8>, record: &Record) {
    put(out, LEASE, |out| {
        put_owner(out, &record.owner);
        let facts = &record.facts;
        put(out, POOL, |out| out.extend(facts.pool.as_bytes()));
        put(out, TIME, |out| out.extend(facts.time.to_le_bytes()));
        if let Some(mac) = facts.mac {
            put(out, MAC, |out| out.extend(mac));
        }
        if !facts.boot.is_empty() {
            put(out, BOOT, |out| out.extend(facts.boot.as_bytes()));
        }
        if let Some(netns) = &facts.netns {
            put(out, NETNS, |out| put_netns(out, netns));
        }
        for (key, value) in &facts.labels {
            put(out, LABEL, |out| {
                out.extend((key.len() as u32).to_le_bytes());
                out.extend(key.as_bytes());
                out.extend(value.as_bytes());
            });
        }
        for lease in &record.leases {
            put(out, ADDRESS, |out| {
                out.push(lease.prefix_len);
                for address in [lease.address, lease.gateway, lease.set] {
                    put_ip(out, address);
                }
            });
        }
    });
}

/// Appends a release.
pub(crate) fn put_release(out: &mut Vec<u8>, owner: &Owner, since: u64) {
    put(out, RELEASE, |out| {
        put_owner(out, owner);
        put(out, SINCE, |out| out.extend(since.to_le_bytes()));
    });
}

/// Appends another boot.
pub(crate) fn put_boot(out: &mut Vec<u8>, id: &str, now: u64) {
    put(out, BEGIN_BOOT, |out| {
        put(out, BOOT, |out| out.extend(id.as_bytes()));
        put(out, SINCE, |out| out.extend(now.to_le_bytes()));
    });
}

/// Appends the rest of an address.
pub(crate) fn put_rest(out: &mut Vec<u8>, pool: &str, address: IpAddr, since: u64) {
    put(out, REST, |out| {
        put(out, POOL, |out| out.extend(pool.as_bytes()));
        put(out, LAST, |out| put_ip(out, address));
        put(out, SINCE, |out| out.extend(since.to_le_bytes()));
    });
}

/// Appends the place of a round.
pub(crate) fn put_round(out: &mut Vec<u8>, pool: &str, set: IpAddr, last: IpAddr) {
    put(out, ROUND, |out| {
        put(out, POOL, |out| out.extend(pool.as_bytes()));
        put(out, SET, |out| put_ip(out, set));
        put(out, LAST, |out| put_ip(out, last));
    });
}

fn put_owner(out: &mut Vec<u8>, owner: &Owner) {
    put(out, NETWORK, |out| out.extend(owner.network.as_bytes()));
    put(out, CONTAINER, |out| out.extend(owner.container.as_bytes()));
    put(out, IFNAME, |out| out.extend(owner.ifname.as_bytes()));
}

fn put_netns(out: &mut Vec<u8>, netns: &Netns) {
    out.extend(netns.cookie.to_le_bytes());
    out.extend(netns.inode.to_le_bytes());
    if let Some(number) = netns.number {
        out.extend(number.home.to_le_bytes());
        out.extend(number.id.to_le_bytes());
    }
}

fn put_ip(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(a) => out.extend(a.octets()),
        IpAddr::V6(a) => out.extend(a.octets()),
    }
}

/// Tag, length and what `value` appends. A length that does not fit is refused with its frame, which is far smaller.
fn put(out: &mut Vec<u8>, tag: u8, value: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    let at = out.len();
    out.extend([0; 4]);
    value(out);
    let length = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&length.to_le_bytes());
}

/// The operations of a payload, all of them or the reason why not.
pub(crate) fn parse(payload: &[u8]) -> Result<Vec<Op>, &'static str> {
    let mut ops = Vec::new();
    for field in Fields(payload) {
        let (kind, body) = field?;
        ops.push(match kind {
            LEASE => Op::Lease(Box::new(parse_lease(body)?)),
            RELEASE => parse_release(body)?,
            ROUND | BEGIN_BOOT | REST => parse_other(kind, body)?,
            _ => return Err("an operation is of a kind that this version does not know"),
        });
    }
    if ops.is_empty() { Err("a frame is empty") } else { Ok(ops) }
}

fn parse_lease(body: &[u8]) -> Result<Record, &'static str> {
    let mut owner = OwnerFields::default();
    let (mut pool, mut time, mut mac, mut boot, mut netns, mut old_netns) = (None, None, None, None, None, None);
    let (mut labels, mut leases) = (BTreeMap::new(), Vec::new());
    for field in Fields(body) {
        let (tag, value) = field?;
        match tag {
            POOL => once(&mut pool, string(value)?)?,
            TIME => once(&mut time, moment(value)?)?,
            MAC => once(&mut mac, value.try_into().map_err(|_| "a MAC is not 6 bytes")?)?,
            OLD_NETNS => once(&mut old_netns, string(value)?)?,
            BOOT => once(&mut boot, string(value)?)?,
            NETNS => once(&mut netns, parse_netns(value)?)?,
            LABEL => {
                let (key, value) = label(value)?;
                if labels.insert(key, value).is_some() {
                    return Err(TWICE);
                }
            }
            ADDRESS => leases.push(parse_address(value)?),
            _ => owner.take(tag, value)?,
        }
    }
    if leases.is_empty() {
        return Err("a lease has no address");
    }
    let (pool, time, boot) = (pool.ok_or(MISSING)?, time.ok_or(MISSING)?, boot.unwrap_or_default());
    let facts = Facts { pool, time, mac, boot, netns, labels };
    Ok(Record { owner: owner.whole()?, leases, facts })
}

fn parse_release(body: &[u8]) -> Result<Op, &'static str> {
    let (mut owner, mut since) = (OwnerFields::default(), None);
    for field in Fields(body) {
        let (tag, value) = field?;
        match tag {
            SINCE => once(&mut since, moment(value)?)?,
            _ => owner.take(tag, value)?,
        }
    }
    Ok(Op::Release { owner: owner.whole()?, since: since.unwrap_or(0) })
}

/// What is not about an attachment.
fn parse_other(kind: u8, body: &[u8]) -> Result<Op, &'static str> {
    let (mut pool, mut set, mut last, mut boot, mut since) = (None, None, None, None, None);
    for field in Fields(body) {
        let (tag, value) = field?;
        match (kind, tag) {
            (ROUND | REST, POOL) => once(&mut pool, string(value)?)?,
            (ROUND, SET) => once(&mut set, ip(value)?)?,
            (ROUND | REST, LAST) => once(&mut last, ip(value)?)?,
            (BEGIN_BOOT, BOOT) => once(&mut boot, string(value)?)?,
            (BEGIN_BOOT | REST, SINCE) => once(&mut since, moment(value)?)?,
            _ => return Err(UNKNOWN),
        }
    }
    Ok(match kind {
        ROUND => Op::Round { pool: pool.ok_or(MISSING)?, set: set.ok_or(MISSING)?, last: last.ok_or(MISSING)? },
        BEGIN_BOOT => Op::Boot { id: boot.ok_or(MISSING)?, now: since.ok_or(MISSING)? },
        _ => Op::Rest { pool: pool.ok_or(MISSING)?, address: last.ok_or(MISSING)?, since: since.ok_or(MISSING)? },
    })
}

const TWICE: &str = "a field is there twice";
const MISSING: &str = "a field is missing";
const UNKNOWN: &str = "a field is of a kind that this version does not know";

#[derive(Default)]
struct OwnerFields([Option<String>; 3]);

impl OwnerFields {
    fn take(&mut self, tag: u8, value: &[u8]) -> Result<(), &'static str> {
        let place = match tag {
            NETWORK => 0,
            CONTAINER => 1,
            IFNAME => 2,
            _ => return Err(UNKNOWN),
        };
        once(&mut self.0[place], string(value)?)
    }

    fn whole(self) -> Result<Owner, &'static str> {
        match self.0 {
            [Some(network), Some(container), Some(ifname)] => Ok(Owner { network, container, ifname }),
            _ => Err(MISSING),
        }
    }
}

fn once<T>(place: &mut Option<T>, value: T) -> Result<(), &'static str> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(TWICE),
    }
}

fn moment(value: &[u8]) -> Result<u64, &'static str> {
    Ok(u64::from_le_bytes(value.try_into().map_err(|_| "a time is not 8 bytes")?))
}

fn string(value: &[u8]) -> Result<String, &'static str> {
    String::from_utf8(value.to_vec()).map_err(|_| "a string is not UTF-8")
}

fn label(value: &[u8]) -> Result<(String, String), &'static str> {
    let (length, rest) = value.split_first_chunk::<4>().ok_or(SHORT)?;
    let (key, value) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(SHORT)?;
    Ok((string(key)?, string(value)?))
}

fn parse_netns(value: &[u8]) -> Result<Netns, &'static str> {
    let (cookie, rest) = value.split_first_chunk().ok_or(SHORT)?;
    let (inode, rest) = rest.split_first_chunk().ok_or(SHORT)?;
    let number = match rest.split_first_chunk() {
        None if rest.is_empty() => None,
        None => return Err(SHORT),
        Some((home, id)) => Some(NetnsNumber {
            home: u64::from_le_bytes(*home),
            id: i32::from_le_bytes(id.try_into().map_err(|_| "a namespace's number is not 4 bytes")?),
        }),
    };
    Ok(Netns { cookie: u64::from_le_bytes(*cookie), inode: u64::from_le_bytes(*inode), number })
}

fn ip(value: &[u8]) -> Result<IpAddr, &'static str> {
    if let Ok(v4) = <[u8; 4]>::try_from(value) {
        Ok(IpAddr::V4(Ipv4Addr::from(v4)))
    } else if let Ok(v6) = <[u8; 16]>::try_from(value) {
        Ok(IpAddr::V6(Ipv6Addr::from(v6)))
    } else {
        Err("an IP address is neither 4 nor 16 bytes")
    }
}

fn parse_address(value: &[u8]) -> Result<Lease, &'static str> {
    let (&prefix_len, rest) = value.split_first().ok_or(SHORT)?;
    if rest.len() % 3 != 0 || rest.is_empty() {
        return Err("an address is not three IP addresses");
    }
    let mut parts = rest.chunks_exact(rest.len() / 3).map(ip);
    let mut next = || parts.next().ok_or(SHORT)?;
    let lease = Lease { address: next()?, prefix_len, gateway: next()?, set: next()? };
    if prefix_len > if is_v4(lease.address) { 32 } else { 128 } {
        return Err("a prefix is longer than its address");
    }
    Ok(lease)
}

const SHORT: &str = "a field is shorter than it says";

/// The addresses of what looks like leases in bytes that cannot be trusted.
pub(crate) fn addresses_in(bytes: &[u8]) -> impl Iterator<Item = IpAddr> + '_ {
    (0..bytes.len()).filter_map(|at| {
        let (header, rest) = bytes[at..].split_first_chunk::<5>()?;
        let length = [1 + 3 * 4, 1 + 3 * 16].into_iter().find(|length| *header == [ADDRESS, *length, 0, 0, 0])?;
        Some(parse_address(rest.get(..usize::from(length))?).ok()?.address)
    })
}

/// Tag and value of each field.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u8, &'a [u8]), &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&tag, rest) = self.0.split_first()?;
        let split = rest
            .split_first_chunk::<4>()
            .and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
        // Whatever follows a field that does not fit means nothing.
        self.0 = split.map_or(&[][..], |(_, rest)| rest);
        Some(split.map(|(value, _)| (tag, value)).ok_or(SHORT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease() -> Lease {
        let gateway = "10.0.0.1".parse().unwrap();
        Lease { address: "10.0.0.2".parse().unwrap(), prefix_len: 24, gateway, set: gateway }
    }

    /// Every byte of a lease, so that the format cannot change by accident.
    #[test]
    fn a_lease_is_these_bytes() {
        let record = Record {
            owner: Owner { network: "n".into(), container: "c".into(), ifname: "e".into() },
            leases: vec![lease()],
            facts: Facts {
                pool: "p".into(),
                time: 0x0102,
                mac: Some([2, 0, 0, 0, 0, 9]),
                boot: "x".into(),
                netns: Some(Netns { cookie: 7, inode: 8, number: Some(NetnsNumber { home: 9, id: -1 }) }),
                labels: BTreeMap::from([("k".into(), "v".into())]),
            },
        };
        let mut bytes = Vec::new();
        put_lease(&mut bytes, &record);
        let fields: [&[u8]; 10] = [
            b"\x01\x01\0\0\0n",
            b"\x02\x01\0\0\0c",
            b"\x03\x01\0\0\0e",
            b"\x04\x01\0\0\0p",
            b"\x05\x08\0\0\0\x02\x01\0\0\0\0\0\0",
            b"\x06\x06\0\0\0\x02\0\0\0\0\x09",
            b"\x0c\x01\0\0\0x",
            b"\x0d\x1c\0\0\0\x07\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\xff\xff\xff\xff",
            b"\x08\x06\0\0\0\x01\0\0\0kv",
            b"\x09\x0d\0\0\0\x18\x0a\0\0\x02\x0a\0\0\x01\x0a\0\0\x01",
        ];
        let body = fields.concat();
        assert_eq!(bytes, [&[1, body.len() as u8, 0, 0, 0], &body[..]].concat());
        assert_eq!(parse(&bytes), Ok(vec![Op::Lease(Box::new(record))]));
    }

    #[test]
    fn a_lease_of_version_1_is_read_without_what_it_knew_of_the_namespace() {
        let mut record = Record { owner: Owner::default(), leases: vec![lease()], facts: Facts::default() };
        let mut bytes = Vec::new();
        put_lease(&mut bytes, &record);
        bytes.extend(b"\x07\x03\0\0\x004:9");
        bytes[1] += 8;
        assert_eq!(parse(&bytes), Ok(vec![Op::Lease(Box::new(record.clone()))]));
        record.facts.netns = Some(Netns { cookie: 1, inode: 2, number: None });
        let mut bytes = Vec::new();
        put_lease(&mut bytes, &record);
        assert_eq!(parse(&bytes), Ok(vec![Op::Lease(Box::new(record))]));
    }

    #[test]
    fn releases_and_rounds_go_both_ways_and_several_fit_into_one_payload() {
        let owner = Owner { network: "n".into(), container: String::new(), ifname: "é".into() };
        let (set, last) = ("fd00::1".parse().unwrap(), "fd00::7".parse().unwrap());
        let mut bytes = Vec::new();
        put_release(&mut bytes, &owner, 77);
        put_round(&mut bytes, "p", set, last);
        put_boot(&mut bytes, "b", 78);
        put_rest(&mut bytes, "q", last, 79);
        let ops = [
            Op::Release { owner, since: 77 },
            Op::Round { pool: "p".into(), set, last },
            Op::Boot { id: "b".into(), now: 78 },
            Op::Rest { pool: "q".into(), address: last, since: 79 },
        ];
        assert_eq!(parse(&bytes), Ok(ops.to_vec()));
    }

    #[test]
    fn what_is_not_fully_understood_is_refused() {
        let mut release = Vec::new();
        put(&mut release, RELEASE, |out| put_owner(out, &Owner::default()));
        let with = |field: &[u8]| {
            let mut bytes = [&release[..], field].concat();
            bytes[1] += field.len() as u8;
            parse(&bytes)
        };
        assert!(with(b"").is_ok());
        assert_eq!(with(b"\x63\0\0\0\0"), Err(UNKNOWN));
        assert_eq!(with(b"\x01\0\0\0\0"), Err(TWICE));
        assert_eq!(with(b"\x01\x05\0\0\0"), Err(SHORT));
        assert_eq!(with(b"\x01"), Err(SHORT));
        assert_eq!(parse(&[RELEASE, 0, 0, 0, 0]), Err(MISSING));
        assert!(parse(&[99, 0, 0, 0, 0]).is_err() && parse(&[]).is_err());
    }

    proptest! {
        #[test]
        fn no_payload_makes_it_panic(bytes in prop::collection::vec(prop_oneof![0_u8..12, any::<u8>()], 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
