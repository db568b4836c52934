//! The outcome as a picture: each data path's figures beside the kernel's, as one self-contained SVG.
//!
//! Bars begin at the line of the kernel and show how many times better (to the right) or worse (to the left) a path is;
//! where less is better, the quotient is turned round. The scale is logarithmic, so that twice as good and half as good
//! are as far from the line.

use std::fmt::Write;

use super::contender::Kind;
use super::outcome::{Outcome, Path, Row};
use super::report::short;
use super::task::Layout;

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 330.0;
const RIGHT: f64 = 60.0;
const TOP: f64 = 120.0;
const BAR: f64 = 11.0;
const GAP: f64 = 9.0;
const HEADING: f64 = 34.0;
/// How far the scale reaches to each side at least and at most, as powers of two. A bar that reaches further is cut.
const LEAST: f64 = 1.0;
const MOST: f64 = 5.0;
/// Told apart by people who do not tell red from green (Okabe and Ito's palette).
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#d55e00"];

/// A bar to be drawn.
struct Bar<'a> {
    colour: &'static str,
    /// How many times better than the kernel.
    better: f64,
    /// The figure itself.
    value: String,
    path: &'a Path,
}

/// The whole file.
pub fn render(outcome: &Outcome) -> String {
    let paths: Vec<&Path> = compared(outcome);
    let groups: Vec<(&Row, Vec<Bar>)> = outcome.rows.iter().filter_map(|row| group(outcome, &paths, row)).collect();
    let reach = |side: f64| {
        let powers = groups.iter().flat_map(|(_, bars)| bars).map(|bar| bar.better.log2() * side);
        powers.fold(LEAST, f64::max).ceil().min(MOST)
    };
    let scale = Scale { worse: reach(-1.0), better: reach(1.0) };
    let mut body = String::new();
    let mut y = TOP;
    for layout in Layout::ALL {
        let mut of_layout = groups.iter().filter(|(row, _)| row.layout == layout.name()).peekable();
        if of_layout.peek().is_some() {
            y += HEADING;
            let _ = writeln!(body, r#"<text class="h" x="20" y="{:.1}">{}</text>"#, y - 10.0, escape(layout.label()));
        }
        for (row, bars) in of_layout {
            y += draw_group(&mut body, row, bars, scale, y);
        }
    }
    let height = y + 40.0;
    let mut text = head(outcome, height);
    text.push_str(&legend(&paths));
    text.push_str(&scale.grid(height - 30.0));
    text.push_str(&body);
    text.push_str("</svg>\n");
    text
}

/// The paths that have bars: all that were built but the kernel's.
fn compared(outcome: &Outcome) -> Vec<&Path> {
    outcome
        .paths
        .iter()
        .filter(|path| path.not_measured.is_none() && !matches!(path.contender.kind, Kind::Kernel))
        .collect()
}

fn group<'a>(outcome: &Outcome, paths: &[&'a Path], row: &'a Row) -> Option<(&'a Row, Vec<Bar<'a>>)> {
    if !row.figure.is_charted {
        return None;
    }
    let median = |id: &str| row.results.iter().find(|result| result.path == id)?.summary.as_ref().map(|of| of.median);
    let kernel = outcome.paths.iter().find(|path| matches!(path.contender.kind, Kind::Kernel))?;
    let kernel = median(kernel.id).filter(|value| *value > 0.0)?;
    let bar = |(place, path): (usize, &&'a Path)| {
        let value = median(path.id).filter(|value| *value > 0.0)?;
        let better = if row.more_is_better { value / kernel } else { kernel / value };
        let value = format!("{} {}", short(value), row.unit);
        Some(Bar { colour: COLOURS[place % COLOURS.len()], better, value, path })
    };
    let bars: Vec<Bar> = paths.iter().enumerate().filter_map(bar).collect();
    (!bars.is_empty()).then_some((row, bars))
}

fn draw_group(body: &mut String, row: &Row, bars: &[Bar], scale: Scale, y: f64) -> f64 {
    let height = bars.len() as f64 * BAR + GAP;
    let middle = y + (height - GAP) / 2.0 + 4.0;
    let _ = writeln!(body, r#"<text class="l" x="{:.1}" y="{middle:.1}">{}</text>"#, LEFT - 40.0, escape(&row.label));
    for (place, bar) in bars.iter().enumerate() {
        let (from, to) = (scale.x(1.0), scale.x(bar.better));
        let top = y + place as f64 * BAR;
        let _ = writeln!(
            body,
            r#"<rect x="{:.1}" y="{top:.1}" width="{:.1}" height="{:.1}" fill="{}"><title>{}: {}, {:.2} × the kernel</title></rect>"#,
            from.min(to),
            (to - from).abs().max(1.0),
            BAR - 1.0,
            bar.colour,
            escape(bar.path.label),
            escape(&bar.value),
            bar.better,
        );
        // There is no room beside a bar that was cut, but inside.
        let is_cut = bar.better.log2() < -scale.worse;
        let (x, anchor) = if to < from && !is_cut { (to - 3.0, "end") } else { (to + 3.0, "start") };
        let baseline = top + BAR - 2.5;
        let _ = writeln!(
            body,
            r#"<text class="v" x="{x:.1}" y="{baseline:.1}" text-anchor="{anchor}">{}</text>"#,
            quotient(bar.better)
        );
    }
    height
}

fn head(outcome: &Outcome, height: f64) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0} {height:.0}" width="{WIDTH:.0}" height="{height:.0}" role="img">"#
    );
    text.push_str(
        "<style>text{font-family:sans-serif;font-size:12px;fill:#222}.t{font-size:18px;font-weight:bold}\
         .h{font-size:14px;font-weight:bold}.l{text-anchor:end}.v{font-size:9px;fill:#444}.a{text-anchor:middle;fill:#555}\
         .g{stroke:#ddd}.k{stroke:#222;stroke-width:1.5}</style>\n",
    );
    let _ = writeln!(text, r##"<rect width="100%" height="100%" fill="#fff"/>"##);
    let _ = writeln!(text, r#"<text class="t" x="20" y="30">Weft beside other data paths; the kernel's is 1</text>"#);
    let machine = &outcome.machine;
    let line = format!("{}; Weft {}, {} mode", machine.line(), outcome.weft, outcome.mode);
    let _ = writeln!(text, r#"<text x="20" y="52">{}</text>"#, escape(&line));
    text
}

fn legend(paths: &[&Path]) -> String {
    let mut text = String::new();
    let mut x = 20.0;
    for (place, path) in paths.iter().enumerate() {
        let colour = COLOURS[place % COLOURS.len()];
        let _ = writeln!(text, r#"<rect x="{x:.1}" y="66" width="11" height="11" fill="{colour}"/>"#);
        let _ = writeln!(text, r#"<text x="{:.1}" y="76">{}</text>"#, x + 16.0, escape(path.label));
        x += 36.0 + path.label.chars().count() as f64 * 7.0;
    }
    text
}

#[derive(Clone, Copy)]
struct Scale {
    /// Powers of two to the left of the kernel's line.
    worse: f64,
    /// And to the right.
    better: f64,
}

impl Scale {
    fn x(self, better: f64) -> f64 {
        let power = better.log2().clamp(-self.worse, self.better);
        LEFT + (WIDTH - LEFT - RIGHT) * (power + self.worse) / (self.worse + self.better)
    }

    fn grid(self, bottom: f64) -> String {
        let mut text = String::new();
        for power in -(self.worse as i32)..=self.better as i32 {
            let better = 2_f64.powi(power);
            let x = self.x(better);
            let class = if power == 0 { "k" } else { "g" };
            let _ = writeln!(
                text,
                r#"<line class="{class}" x1="{x:.1}" x2="{x:.1}" y1="{:.1}" y2="{bottom:.1}"/>"#,
                TOP - 4.0
            );
            let name = if power < 0 { format!("1/{}", 1 << -power) } else { format!("{}", 1 << power) };
            let _ = writeln!(text, r#"<text class="a" x="{x:.1}" y="{:.1}">{name}</text>"#, TOP - 10.0);
        }
        let (left, right) = (self.x(2_f64.powf(-self.worse)), self.x(2_f64.powf(self.better)));
        let y = TOP - 26.0;
        let _ = writeln!(text, r#"<text class="a" x="{left:.1}" y="{y:.1}">← worse</text>"#);
        let _ = writeln!(text, r#"<text class="a" x="{right:.1}" y="{y:.1}">better →</text>"#);
        text
    }
}

fn quotient(value: f64) -> String {
    if value < 0.1 { format!("{value:.3}") } else { format!("{value:.2}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::outcome::tests::example;
    use super::*;

    #[test]
    fn a_worse_path_has_its_bar_left_of_the_kernels_line() {
        let scale = Scale { worse: 2.0, better: 3.0 };
        assert!(scale.x(0.5) < scale.x(1.0) && scale.x(1.0) < scale.x(2.0));
        assert!((scale.x(1.0) - scale.x(0.5) - (scale.x(2.0) - scale.x(1.0))).abs() < 1e-9);
        assert!((scale.x(1000.0) - (WIDTH - RIGHT)).abs() < 1e-9, "what is beyond the scale ends at its edge");
    }

    #[test]
    fn less_is_better_where_it_is() {
        let svg = render(&example());
        // 10 Gb/s of 20, and 0.5 s/GB where the kernel needs 0.25.
        assert!(svg.contains("Weft, TAP and UDP: 10.0 Gb/s, 0.50 × the kernel"), "{svg}");
        assert!(svg.contains("Weft, TAP and UDP: 0.500 s/GB, 0.50 × the kernel"), "{svg}");
    }

    #[test]
    fn the_file_is_well_formed_and_names_machine_and_date() {
        let svg = render(&example());
        assert!(svg.contains("some CPU &lt;fast&gt;") && svg.contains("2026-11-22T05:00:00Z"), "{svg}");
        let count = |what: &str| svg.matches(what).count();
        assert_eq!(count("<svg"), count("</svg>"));
        assert_eq!(count("<text"), count("</text>"));
        assert_eq!(count("<title"), count("</title>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
