//! Walks a TOML document and notes everything that is wrong, instead of stopping at the first.
//!
//! A [`Section`] is a table whose keys are taken one by one; what nobody took is an unknown key. Every value keeps the
//! [`Place`] it came from, so that later checks can name line and key as well.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use toml::de::{DeTable, DeValue};

use super::Invalid;

/// Where something stands in the file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Line, from 1.
    pub line: usize,
    /// Key with the tables around it, e.g. `peers[2].underlay`.
    pub key: String,
}

/// Something wrong at a place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What, and what to do.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place.key.as_str() {
            "" => write!(f, "line {}: {}", self.place.line, self.what),
            key => write!(f, "line {}: {key}: {}", self.place.line, self.what),
        }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Its place.
    pub place: Place,
}

/// Something that can be named or left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switch {
    /// By its usual name.
    On,
    /// Not at all.
    Off,
    /// By this name.
    Named(String),
}

/// The document while it is read: its text for line numbers, and what was found wrong.
pub struct Reader<'t> {
    text: &'t str,
    /// What is wrong so far.
    pub problems: Vec<Problem>,
}

/// A table of the document.
pub struct Section<'t> {
    /// Where the table begins.
    pub place: Place,
    entries: BTreeMap<String, (usize, DeValue<'t>)>,
    asked: Vec<&'static str>,
}

/// The text of a file, which must be UTF-8, as TOML is.
///
/// # Errors
/// Where it is not.
pub fn decode(bytes: Vec<u8>) -> Result<String, Invalid> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        let place = Place { line, key: String::new() };
        Invalid(vec![Problem { place, what: "a character is not UTF-8: save the file in that encoding".into() }])
    })
}

impl<'t> Reader<'t> {
    /// Reads `text`.
    ///
    /// # Errors
    /// What is no TOML. What such a document contains is anyone's guess, so that further problems would be false ones.
    pub fn new(text: &'t str) -> Result<(Reader<'t>, Section<'t>), Invalid> {
        let mut reader = Reader { text, problems: Vec::new() };
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let line = reader.line(error.span().unwrap_or(0..0));
            let place = Place { line, key: String::new() };
            reader.problem(&place, error.message().to_owned());
        }
        if !reader.problems.is_empty() {
            return Err(reader.invalid());
        }
        let root = reader.section(Place { line: 1, key: String::new() }, document.into_inner());
        Ok((reader, root))
    }

    /// All problems, by line.
    pub fn invalid(mut self) -> Invalid {
        self.problems.sort();
        Invalid(self.problems)
    }

    /// Notes a problem.
    pub fn problem(&mut self, place: &Place, what: impl Into<String>) {
        self.problems.push(Problem { place: place.clone(), what: what.into() });
    }

    fn line(&self, span: Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or(self.text.as_bytes());
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    fn section(&self, place: Place, table: DeTable<'t>) -> Section<'t> {
        let entries = table
            .into_iter()
            .map(|(key, value)| (key.get_ref().to_string(), (self.line(key.span()), value.into_inner())))
            .collect();
        Section { place, entries, asked: Vec::new() }
    }

    /// A value of type `T` written as a string. `expected` says what it must be.
    pub fn parsed<T: FromStr>(
        &mut self,
        section: &mut Section<'t>,
        key: &'static str,
        expected: &str,
    ) -> Option<At<T>> {
        let (place, value) = section.take(key)?;
        let value = self.parse_string(&place, &value, expected)?;
        Some(At { value, place })
    }

    /// A list of values of type `T`, each written as a string, each with its own line.
    pub fn list<T: FromStr>(&mut self, section: &mut Section<'t>, key: &'static str, expected: &str) -> Vec<At<T>> {
        let Some((place, value)) = section.take(key) else { return Vec::new() };
        let DeValue::Array(items) = value else {
            self.problem(&place, format!("must be a list of strings, each {expected}"));
            return Vec::new();
        };
        let mut list = Vec::new();
        for item in items {
            let place = Place { line: self.line(item.span()), key: place.key.clone() };
            if let Some(value) = self.parse_string(&place, item.get_ref(), expected) {
                list.push(At { value, place });
            }
        }
        list
    }

    /// A whole number within `bounds`.
    pub fn number<T>(
        &mut self,
        section: &mut Section<'t>,
        key: &'static str,
        bounds: std::ops::RangeInclusive<T>,
    ) -> Option<At<T>>
    where
        T: TryFrom<u64> + PartialOrd + fmt::Display + Copy,
    {
        let (place, value) = section.take(key)?;
        let number = match &value {
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix()).ok(),
            _ => None,
        };
        match number.and_then(|number| T::try_from(number).ok()).filter(|number| bounds.contains(number)) {
            Some(value) => Some(At { value, place }),
            None => {
                let what = format!("must be a whole number from {} to {}", bounds.start(), bounds.end());
                self.problem(&place, what);
                None
            }
        }
    }

    /// Yes or no.
    pub fn boolean(&mut self, section: &mut Section<'t>, key: &'static str) -> Option<At<bool>> {
        let (place, value) = section.take(key)?;
        let DeValue::Boolean(value) = value else {
            self.problem(&place, "must be true or false");
            return None;
        };
        Some(At { value, place })
    }

    /// A name, or whether there is to be one at all. `expected` says so.
    pub fn switch(&mut self, section: &mut Section<'t>, key: &'static str, expected: &str) -> Option<At<Switch>> {
        let (place, value) = section.take(key)?;
        match value {
            DeValue::Boolean(true) => Some(At { value: Switch::On, place }),
            DeValue::Boolean(false) => Some(At { value: Switch::Off, place }),
            DeValue::String(name) => Some(At { value: Switch::Named(name.into_owned()), place }),
            _ => {
                self.problem(&place, format!("must be {expected}"));
                None
            }
        }
    }

    /// A table.
    pub fn table(&mut self, section: &mut Section<'t>, key: &'static str) -> Option<Section<'t>> {
        let (place, value) = section.take(key)?;
        match value {
            DeValue::Table(table) => Some(self.section(place, table)),
            _ => {
                self.problem(
                    &place,
                    format!("must be a table: write [{key}] on a line of its own, and its keys below"),
                );
                None
            }
        }
    }

    /// A list of tables; the places of the list's items say which one.
    pub fn tables(&mut self, section: &mut Section<'t>, key: &'static str) -> Vec<Section<'t>> {
        let Some((place, value)) = section.take(key) else { return Vec::new() };
        let advice = format!("must be a list of tables: write [[{key}]] on a line of its own before each of them");
        let DeValue::Array(items) = value else {
            self.problem(&place, advice);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (number, item) in items.into_iter().enumerate() {
            let place = Place { line: self.line(item.span()), key: format!("{}[{}]", place.key, number + 1) };
            match item.into_inner() {
                DeValue::Table(table) => sections.push(self.section(place, table)),
                _ => self.problem(&place, advice.clone()),
            }
        }
        sections
    }

    /// What was not taken is unknown.
    pub fn finish(&mut self, section: Section<'t>) {
        for (key, (line, _)) in &section.entries {
            let place = Place { line: *line, key: section.path(key) };
            let mut known: Vec<&str> = section.asked.clone();
            known.sort_unstable();
            self.problem(&place, format!("unknown key; known here are {}", known.join(", ")));
        }
    }

    fn parse_string<T: FromStr>(&mut self, place: &Place, value: &DeValue<'t>, expected: &str) -> Option<T> {
        let parsed = match value {
            DeValue::String(text) => text.parse().map_err(|_| format!("{text:?} is not {expected}")),
            _ => Err(format!("must be a string in quotes, {expected}")),
        };
        parsed.map_err(|what| self.problem(place, what)).ok()
    }
}

impl<'t> Section<'t> {
    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The place of a key of this table that is missing.
    pub fn missing(&self, key: &str) -> Place {
        Place { line: self.place.line, key: self.path(key) }
    }

    fn take(&mut self, key: &'static str) -> Option<(Place, DeValue<'t>)> {
        self.asked.push(key);
        let (line, value) = self.entries.remove(key)?;
        Some((Place { line, key: self.path(key) }, value))
    }

    fn path(&self, key: &str) -> String {
        if self.place.key.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place.key) }
    }
}

/// Any string.
pub const TEXT: &str = "text";
