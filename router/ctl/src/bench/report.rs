//! The outcome as text: a table for each layout, and what was not measured.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::outcome::{Outcome, Path, Ratio, Row, Summary};
use super::task::{Layout, ONLY_STREAMS};
use crate::output::{Style, plain};
use crate::table::Table;

/// All of it.
pub fn render(outcome: &Outcome, style: Style) -> String {
    let mut text = format!("{}\n", outcome.machine.line());
    for layout in Layout::ALL {
        // What was measured nowhere has its place below.
        let has_value = |row: &&Row| row.results.iter().any(|result| result.summary.is_some());
        let is_shown = |row: &&Row| row.layout == layout.name() && row.figure.is_shown;
        let rows: Vec<&Row> = outcome.rows.iter().filter(is_shown).filter(has_value).collect();
        if !rows.is_empty() {
            let _ = writeln!(text, "\n{}", style.strong(&format!("── {}", layout.label())));
            text.push_str(&table(outcome, &rows, style));
        }
    }
    text.push_str(&gaps(outcome, style));
    let turns = outcome.rows.iter().flat_map(|row| &row.results).filter_map(|result| result.summary.as_ref());
    let turns = turns.map(|summary| summary.values.len()).max().unwrap_or(0);
    let _ = writeln!(
        text,
        "\nMedians of up to {turns} turns, least–greatest in brackets; ratios are formed within a turn. After a pause: \
         one request each {} s. {:.0} s, {} mode.",
        outcome.pause, outcome.seconds, outcome.mode
    );
    text
}

fn table(outcome: &Outcome, rows: &[&Row], style: Style) -> String {
    // Some are measured between nodes alone.
    let has_value = |index: usize| rows.iter().any(|row| row.results[index].summary.is_some());
    let is_shown = |(index, path): &(usize, &Path)| path.not_measured.is_none() && has_value(*index);
    let shown: Vec<_> = outcome.paths.iter().enumerate().filter(is_shown).collect();
    let wefts: Vec<_> = shown.iter().filter(|(_, path)| path.contender.is_weft()).map(|(_, path)| path).collect();
    let others = || shown.iter().filter(|(_, path)| !path.contender.is_weft()).map(|(_, path)| path);
    let pairs = wefts.iter().flat_map(|weft| others().map(move |to| (weft, to)));
    let pairs: Vec<_> = pairs.filter(|(weft, to)| are_compared(rows, weft, to)).collect();
    let mut headings = vec![String::new(), "unit".to_owned()];
    headings.extend(shown.iter().map(|(_, path)| path.label.to_owned()));
    headings.extend(pairs.iter().map(|(weft, to)| {
        let weft = if wefts.len() > 1 { format!("{} ", weft.contender.short) } else { String::new() };
        format!("{weft}÷ {}", to.contender.short)
    }));
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    let mut table = Table::new(&headings);
    for row in rows {
        let mut cells = vec![row.label.clone(), row.unit.to_owned()];
        cells.extend(shown.iter().map(|(index, _)| spread(row.results[*index].summary.as_ref())));
        cells.extend(pairs.iter().map(|(weft, to)| {
            let ratio = row.ratios.iter().find(|ratio| ratio.path == weft.id && ratio.to == to.id);
            ratio.map_or(String::new(), |ratio| format!("{:.2}", ratio.summary.median))
        }));
        table.push(cells, false);
    }
    table.render(style, "nothing")
}

/// Whether the table has a column for their ratios: they are rivals, and there is at least one.
fn are_compared(rows: &[&Row], weft: &Path, to: &Path) -> bool {
    let is_theirs = |ratio: &Ratio| ratio.path == weft.id && ratio.to == to.id;
    weft.contender.rivals.contains(&to.id) && rows.iter().flat_map(|row| &row.ratios).any(is_theirs)
}

/// Every reason once, with what it is about.
fn gaps(outcome: &Outcome, style: Style) -> String {
    let mut text = String::new();
    for path in &outcome.paths {
        if let Some(reason) = &path.not_measured {
            let _ = writeln!(text, "\n{} {}: {reason}", style.bad("not measured:"), path.label);
        }
    }
    let mut reasons: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for row in &outcome.rows {
        for (path, result) in outcome.paths.iter().zip(&row.results) {
            if let (None, Some(reason)) = (&path.not_measured, &result.not_measured)
                && reason != ONLY_STREAMS
                && !is_done(outcome, &row.task, path.id)
            {
                let names = reasons.entry((path.label, reason)).or_default();
                if !names.contains(&row.task.as_str()) {
                    names.push(&row.task);
                }
            }
        }
    }
    for ((path, reason), names) in reasons {
        let _ = writeln!(text, "\nnot measured on {path} ({reason}): {}", names.join(" "));
    }
    for failure in &outcome.failures {
        let _ = writeln!(text, "\n{} {}", style.bad("failed:"), plain(&failure.to_string()));
    }
    text
}

/// Whether anything came of a task on a path. A figure that only some paths have is no gap.
fn is_done(outcome: &Outcome, task: &str, path: &str) -> bool {
    let of_task = outcome.rows.iter().filter(|row| row.task == task);
    of_task.flat_map(|row| &row.results).any(|result| result.path == path && result.summary.is_some())
}

fn spread(summary: Option<&Summary>) -> String {
    match summary {
        None => "–".to_owned(),
        Some(summary) if summary.values.len() == 1 => short(summary.median),
        Some(summary) => format!("{} ({}–{})", short(summary.median), short(summary.low), short(summary.high)),
    }
}

/// Three digits that mean something.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::outcome::tests::example;
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let shown: Vec<String> = [12345.6, 99.97, 9.996, 1.0, 0.05].into_iter().map(short).collect();
        assert_eq!(shown, ["12346", "100", "10.0", "1.00", "0.050"]);
    }

    #[test]
    fn the_table_has_median_spread_and_ratio_and_names_what_is_not_there() {
        let text = render(&example(), Style::PLAIN);
        let line = text.lines().find(|line| line.starts_with("TCP, 1 stream ")).unwrap();
        assert!(
            line.contains("10.0 (9.00–30.0)") && line.contains("20.0 (10.0–40.0)") && line.ends_with("0.75"),
            "{text}"
        );
        assert!(text.contains("not measured: OVS AF_XDP: there is no OVS: install it"), "{text}");
        assert!(!text.contains("not measured on kernel"), "a figure that it cannot have is no gap: {text}");
        assert!(text.contains("failed: same-tcp-1 on kernel, turn 4: it broke"), "{text}");
        assert!(!text.contains("pods of two nodes"), "{text}");
    }
}
