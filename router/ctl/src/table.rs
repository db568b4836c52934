//! Columns that line up.
//!
//! A cell's width is counted in characters after control characters are replaced; columns of numbers are aligned to
//! the right. A row can be marked as bad, which colours it as a whole.

use crate::output::{Style, plain};

/// A table under construction.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Row>,
}

struct Column {
    heading: String,
    right: bool,
}

struct Row {
    cells: Vec<String>,
    bad: bool,
}

impl Table {
    /// A table with these headings; one that starts with `>` is aligned to the right.
    pub fn new(headings: &[&str]) -> Table {
        let column = |heading: &&str| match heading.strip_prefix('>') {
            Some(heading) => Column { heading: heading.to_owned(), right: true },
            None => Column { heading: (*heading).to_owned(), right: false },
        };
        Table { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.push(cells.into(), false);
    }

    /// Adds a row whose length is known at run time only; missing cells are empty, surplus ones are left out.
    pub fn push(&mut self, mut cells: Vec<String>, bad: bool) {
        cells.resize(self.columns.len(), String::new());
        let cells = cells.iter().map(|cell| plain(cell)).collect();
        self.rows.push(Row { cells, bad });
    }

    /// The text; `none` if there are no rows.
    pub fn render(&self, style: Style, none: &str) -> String {
        if self.rows.is_empty() {
            return format!("{none}\n");
        }
        let headings: Vec<String> = self.columns.iter().map(|column| column.heading.clone()).collect();
        let mut text = style.strong(&self.line(&headings));
        text.push('\n');
        for row in &self.rows {
            let line = self.line(&row.cells);
            text.push_str(&if row.bad { style.bad(&line) } else { line });
            text.push('\n');
        }
        text
    }

    fn line(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (index, (column, cell)) in self.columns.iter().zip(cells).enumerate() {
            let gap = " ".repeat(self.width(index) - cell.chars().count());
            let (before, after) = if column.right { (gap.as_str(), "") } else { ("", gap.as_str()) };
            let separator = if index == 0 { "" } else { "  " };
            line.extend([separator, before, cell, after]);
        }
        line.truncate(line.trim_end().len());
        line
    }

    fn width(&self, index: usize) -> usize {
        let cells = self.rows.iter().map(|row| row.cells[index].chars().count());
        cells.max().unwrap_or(0).max(self.columns[index].heading.chars().count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_are_aligned_to_the_right() {
        let mut table = Table::new(&["name", ">count", "what"]);
        table.row(["a".into(), "7".into(), "x".into()]);
        table.push(vec!["longer".into(), "1234567".into()], true);
        let text = table.render(Style::PLAIN, "nothing");
        assert_eq!(text, "name      count  what\na             7  x\nlonger  1234567\n");
    }

    #[test]
    fn an_empty_table_says_so() {
        assert_eq!(Table::new(&["name"]).render(Style::PLAIN, "no pods"), "no pods\n");
    }

    #[test]
    fn control_characters_take_one_place_and_do_nothing() {
        let mut table = Table::new(&["name", "x"]);
        table.row(["\x1b[31m\t".into(), "y".into()]);
        assert!(!table.render(Style::PLAIN, "").contains('\x1b'));
    }

    #[test]
    fn rows_of_the_wrong_length_are_made_to_fit() {
        let mut table = Table::new(&["a", "b"]);
        table.push(vec!["1".into()], false);
        table.push(vec!["1".into(), "2".into(), "3".into()], false);
        assert_eq!(table.render(Style::PLAIN, ""), "a  b\n1\n1  2\n");
    }
}
