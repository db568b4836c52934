//! Writes the corpora that the fuzz targets start from: `cargo run -p weft-tests --example corpora`.

use std::path::Path;

use weft_encap::virtio;
use weft_ipam::{Facts, Owner, Range, RangeSet, Store};
use weft_tests::frames::{self, L2, L3};
use weft_tests::gathering::RECORD;
use weft_tests::hostile::seeds;
use weft_tests::memory::{Input, pod_mac, pod4, remote4};
use weft_tests::random::Random;

fn main() -> std::io::Result<()> {
    let forward: Vec<Vec<u8>> = seeds().chunks(40).map(|group| group.iter().flat_map(framed).collect()).collect();
    write("forward", &forward.iter().map(|bytes| bytes[..bytes.len().min(6000)].to_vec()).collect::<Vec<_>>())?;
    let tunnelled: Vec<Vec<u8>> =
        seeds().into_iter().filter(|seed| seed.outer.is_some()).map(|seed| seed.bytes).step_by(9).collect();
    write("underlay", &[tunnelled, vec![train()]].concat())?;
    write_tunnels()?;
    write("probe", &probes())?;
    write("masquerade", &scenes())?;
    write("gather", &vectors())?;
    write("virtio", &superframes())?;
    let link: Vec<Vec<u8>> = seeds().into_iter().filter(|seed| seed.outer.is_none()).map(|seed| seed.bytes).collect();
    let upper =
        link.iter().filter(|bytes| bytes.len() > 54).map(|bytes| bytes[54..].to_vec()).filter(|bytes| bytes.len() < 60);
    write("neighbour", &link.iter().map(|bytes| bytes[14..].to_vec()).chain(upper).step_by(17).collect::<Vec<_>>())?;
    write("api", &requests())?;
    write("journal", &journals())?;
    write("cni", &CNI.map(|text| text.as_bytes().to_vec()))?;
    write("config", &CONFIG.map(|text| text.as_bytes().to_vec()))
}

/// The other tunnels' headers in front of what comes by VXLAN.
fn write_tunnels() -> std::io::Result<()> {
    let inner = || seeds().into_iter().filter(|seed| seed.outer.is_some() && seed.bytes.len() > 8 + 54).step_by(41);
    let with = |header: &[u8], skip: usize| -> Vec<Vec<u8>> {
        let wrap = |seed: Input| [header, seed.bytes.get(8 + skip..).unwrap_or_default()].concat();
        inner().map(wrap).filter(|bytes| bytes.len() < 600).collect()
    };
    let options = [4, 0, 0x65, 0x58, 0, 0, 1, 0, 1, 2, 3, 1, 9, 9, 9, 9, 0, 1, 0x80, 1, 7, 7, 7, 7];
    write("geneve", &[with(&[0, 0, 0x65, 0x58, 0, 0, 1, 0], 0), with(&options, 0)].concat())?;
    let key = [0xb0, 0, 0x65, 0x58, 1, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9];
    let ethernet = [with(&[0, 0, 0x65, 0x58], 0), with(&key, 0)].concat();
    write("gre", &[ethernet, with(&[0, 0, 0x08, 0x00], 14), with(&[0, 0, 0x86, 0xdd], 14)].concat())?;
    write("ipip", &[with(&[4], 14), with(&[41], 14)].concat())
}

fn write(name: &str, inputs: &[Vec<u8>]) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    std::fs::create_dir_all(&folder)?;
    for (number, input) in inputs.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number:03}")), input)?;
    }
    Ok(())
}

/// A question, an answer, and what is almost one.
fn probes() -> Vec<Vec<u8>> {
    let with = |family: u8, version: u8, kind: u8, len: usize| -> Vec<u8> {
        let numbers = [&1450_u32.to_be_bytes()[..], &7_u32.to_be_bytes(), &9_u64.to_be_bytes(), &[0x5a; 8]].concat();
        let mut bytes = [&[family, 0xc0, 7][..], b"WFTP", &[version, kind, 0, 0], &numbers].concat();
        bytes.resize(3 + len, 0);
        bytes
    };
    vec![
        with(0, 1, 1, 32),
        with(0, 1, 1, 1400),
        with(0, 1, 2, 32),
        with(1, 1, 1, 32),
        with(0, 2, 1, 32),
        with(0, 1, 1, 31),
    ]
}

/// Steps as [`weft_tests::masquerading`] reads them: each kind of packet with its answer, two pods that reach each other, a crowd, anything.
fn scenes() -> Vec<Vec<u8>> {
    let mut random = Random::new(0x6d);
    let talk = |kind: u8| -> Vec<u8> {
        (0..12).flat_map(|n| [[kind | n << 3, n, n, 20], [3, 0, 0, 0x20], [6, 0, 0, 0]].concat()).collect()
    };
    let each = (0..3).map(talk);
    // Two sockets that are known outside, and then to each other.
    let turns = [[0, 4, 0, 9], [8, 5, 0, 9], [4, 4, 0, 9], [12, 5, 1, 9], [4, 4, 0, 9], [12, 5, 1, 9]].concat();
    let crowd: Vec<u8> = (0..100).flat_map(|n: u8| [1 | (n % 3) << 3, n, n / 8, 0x20]).collect();
    let anything = (0..6).map(|_| random.bytes(400));
    each.chain([turns, crowd]).chain(anything).collect()
}

/// As the target `forward` reads it.
fn framed(input: &Input) -> Vec<u8> {
    let mut header = [0; virtio::LEN];
    virtio::write(&input.offload, &mut header);
    let bytes = &input.bytes[..input.bytes.len().min(400)];
    [&[input.port.0 as u8][..], &header, &(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

/// Three segments of one TCP stream, as `UDP_GRO` hands them over, behind stride and tunnel length.
fn train() -> Vec<u8> {
    let l2 = L2 { src: pod_mac(1), dst: pod_mac(2) };
    let segment = |number: u32| {
        let frame = frames::tcp(l2, L3::new(remote4(0, 1), pod4(1)), (1, 2), 1 + number * 100, &[number as u8; 100]);
        [&frames::vxlan(1)[..], &frame].concat()
    };
    let stride = (segment(0).len() as u16).to_be_bytes();
    [&stride[..], &[8], &segment(0), &segment(1), &segment(2)].concat()
}

/// Streams from a pod and from nodes, undisturbed and in which anything happens; and frames for the raw form.
fn vectors() -> Vec<Vec<u8>> {
    let mut random = Random::new(0x6a);
    let mut all = Vec::new();
    for from_nodes in [0, 1] {
        let undisturbed = (0..24).flat_map(|number| [number % 3, 0x80, 0, 255, 0, 128, 0, 0]);
        all.push([from_nodes].into_iter().chain(undisturbed).collect());
        all.push([&[from_nodes][..], &random.bytes(30 * RECORD)].concat());
    }
    let l2 = L2 { src: pod_mac(1), dst: pod_mac(2) };
    let segment = |number: u32| {
        let bytes = frames::tcp(l2, L3::new(pod4(1), pod4(2)), (1, 2), 1 + number * 600, &[number as u8; 600]);
        [&[1][..], &[0; virtio::LEN], &(bytes.len() as u16).to_be_bytes(), &bytes].concat()
    };
    all.push([vec![0x80], segment(0), segment(1), segment(2)].concat());
    all
}

fn superframes() -> Vec<Vec<u8>> {
    let l2 = L2 { src: pod_mac(1), dst: pod_mac(2) };
    let tcp = frames::tcp(l2, L3::new(pod4(1), pod4(2)), (1, 2), 1, &[]);
    let udp = frames::udp(l2, L3::new(pod4(1), pod4(2)), (1, 2), &[]);
    let cut = |kind: u8, l4: u8, headers: &[u8]| [&[kind, 14, l4, 0, 100, 3, 232, 7], headers].concat();
    let whole = [&[1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0][..], &tcp, &[5; 500]].concat();
    vec![cut(0, 34, &tcp), cut(2, 34, &udp), whole]
}

fn requests() -> Vec<Vec<u8>> {
    let lines = [
        r#"{"version":1,"op":"status"}"#,
        r#"{"version":1,"op":"ready"}"#,
        r#"{"version":1,"op":"add","network":"pods","container":"c1","ifname":"eth0","netns":"/run/netns/x","requested":["10.244.1.9"],"ranges":[[{"subnet":"10.244.1.0/24","rangeStart":"10.244.1.9"}]],"mac":"02:00:00:00:00:01","mtu":1400,"labels":{"K8S_POD_NAME":"x"}}"#,
        r#"{"version":1,"op":"del","network":"pods","container":"c1","ifname":"eth0"}"#,
        r#"{"version":1,"op":"gc","network":"pods","valid":[["c1","eth0"]]}"#,
        r#"{"version":1,"op":"check","network":"pods","container":"c1","ifname":"eth0","expected":{"ifname":"eth0","mac":"","mtu":0,"addresses":[{"address":"10.244.1.2/24","gateway":"10.244.1.1"}],"routes":[]}}"#,
        r#"{"version":2,"op":"status"}"#,
    ];
    let mut all: Vec<Vec<u8>> = lines.iter().map(|line| format!("{line}\n").into_bytes()).collect();
    all.push(all.concat());
    all
}

fn journals() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for count in [0u8, 1, 5, 12] {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).expect("a store");
        let set = |text: &str| -> RangeSet { Range::whole(text.parse().expect("a prefix")).expect("a range").into() };
        let sets = [set("10.244.1.0/24"), set("fd00:10:244:1::/64")];
        for number in 0..count {
            let owner = Owner { network: "pods".into(), container: format!("c{number}"), ifname: "eth0".into() };
            store.lease(&owner, &sets, &[], Facts { time: 1_700_000_000, ..Facts::default() }, 0).expect("a lease");
            if number % 3 == 2 {
                store.release(&owner, 0);
            }
        }
        if count == 12 {
            store.compact().expect("a disk");
        }
        drop(store);
        all.push(std::fs::read(folder.path().join(weft_ipam::JOURNAL_FILE)).expect("a journal"));
    }
    all
}

const CNI: [&str; 6] = [
    "\n{\"cniVersion\":\"1.1.0\",\"name\":\"pods\",\"type\":\"weft-cni\"}",
    "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b;IP=10.244.1.9\n{\"cniVersion\":\"0.3.1\",\"name\":\"pods\",\"socket\":\"/run/weft/weftd.sock\"}",
    "MAC=02:00:00:00:00:01;IgnoreUnknown=1\n{\"cniVersion\":\"1.0.0\",\"name\":\"pods\",\"mtu\":1400,\"wait\":2.5,\"stateDir\":\"/var/lib/weft\"}",
    "\n{\"cniVersion\":\"0.4.0\",\"name\":\"pods\",\"ipam\":{\"type\":\"weft\",\"ranges\":[[{\"subnet\":\"10.244.1.0/24\",\"rangeStart\":\"10.244.1.9\",\"gateway\":\"10.244.1.1\"}],[{\"subnet\":\"fd00::/64\"}]],\"routes\":[{\"dst\":\"0.0.0.0/0\"}]}}",
    "\n{\"cniVersion\":\"1.1.0\",\"name\":\"pods\",\"runtimeConfig\":{\"ips\":[\"10.244.1.9/24\"],\"mac\":\"02:00:00:00:00:02\",\"ipRanges\":[[{\"subnet\":\"10.9.0.0/16\"}]]},\"args\":{\"cni\":{\"ips\":[\"10.244.1.8\"]}}}",
    "\n{\"cniVersion\":\"1.1.0\",\"name\":\"pods\",\"cni.dev/valid-attachments\":[{\"containerID\":\"c1\",\"ifname\":\"eth0\"}],\"prevResult\":{\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"/x\"}],\"ips\":[{\"address\":\"10.244.1.2/24\",\"interface\":0}]}}",
];

const CONFIG: [&str; 4] = [
    "node = \"n1\"\nranges = [\"10.244.1.0/24\", \"fd00:10:244:1::/64\"]\n\n[underlay]\naddress = \"10.200.0.1\"\n",
    "node = \"n1\"\nmode = \"routed\"\nvni = 1\nmtu = 1450\nranges = [\"10.244.1.0/24\"]\nvtep_mac = \"02:00:00:00:00:01\"\n[underlay]\naddress = \"10.200.0.1\"\nport = 8472\ndevice = \"uplink\"\n[[peers]]\nname = \"n2\"\nunderlay = \"10.200.0.2\"\nranges = [\"10.244.2.0/24\"]\nvtep_mac = \"02:00:00:00:00:02\"\n",
    "node = \"n1\"\nmode = \"bridged\"\nsegment = [\"10.244.0.0/16\"]\ngateway = [\"10.244.0.1\"]\ngateway_mac = \"02:00:00:00:00:09\"\nranges = [\"10.244.1.0/24\"]\n[underlay]\naddress = \"10.200.0.1\"\n[limits]\nfdb_limit = 10\nfdb_age = 300\nflows = 1024\nflood_rate = 10\nicmp_rate = 10\n",
    "node = 7\nranges = [\"10.244.1.0/33\"]\nunknown = true\n[underlay]\naddress = \"x\"\nport = 0\n",
];
