use std::time::Duration;
use weft_benches::frames::udp;
use weft_benches::node::{Bed, Template};
use weft_encap::offload::Offload;
fn main() {
    let what = std::env::args().nth(1).unwrap_or("switch".into());
    let rounds: u64 = std::env::args().nth(2).map_or(7, |x| x.parse().unwrap());
    let each: u64 = std::env::args().nth(3).map_or(2_000_000, |x| x.parse().unwrap());
    let mut bed = if std::env::var_os("SMALL").is_some() { Bed::forgetful() } else { Bed::new() };
    let plain = Offload::default();
    let templates: Vec<Template> = (0..256u16)
        .map(|n| match what.as_str() {
            "switch" => Bed::from_pod(udp(Bed::neighbours(), 1000 + n, 60), plain),
            "encap" => Bed::from_pod(udp(Bed::outwards(), 1000 + n, 60), plain),
            _ => bed.from_node(&udp(Bed::inwards(), 1000 + n, 60), plain),
        })
        .collect();
    if each < 200_000 {
        bed.forward(10_240, false, templates.iter().cycle(), |w| w());
        bed.forward(each, false, templates.iter().cycle(), counted);
        return;
    }
    let mut best = Duration::MAX;
    let mut all = Vec::new();
    bed.time(10000.min(each), false, templates.iter().cycle());
    for _ in 0..rounds {
        let spent = bed.time(each, false, templates.iter().cycle());
        best = best.min(spent);
        all.push(spent.as_nanos() as f64 / each as f64);
    }
    all.sort_by(f64::total_cmp);
    println!("{what} min {:.1} med {:.1} ns = {:.0} clocks", all[0], all[all.len() / 2], all[all.len() / 2] * 2.6);
}

#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
}
