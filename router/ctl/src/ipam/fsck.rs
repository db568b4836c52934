//! Damage: saying what there is, and going on with what can be saved.

use serde::Serialize;
use std::net::IpAddr;
use weft_ipam::Checkup;

use super::{View, explained};
use crate::EXIT_PROBLEMS;
use crate::output::{self, Style};

/// What is told one by one, in the table; JSON has all.
const TOLD: usize = 20;

#[derive(Serialize)]
struct Report {
    sound: bool,
    bytes: Option<u64>,
    frames: u64,
    leases: usize,
    damage: Vec<Part>,
    missing_changes: u64,
    kept_addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    torn: Option<String>,
    repaired: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged_journal: Option<String>,
}

#[derive(Serialize)]
struct Part {
    offset: u64,
    bytes: u64,
    what: String,
}

/// The exit code: 3 if there is damage that was not repaired.
pub fn run(repair: bool, view: &View) -> anyhow::Result<u8> {
    let folder = view.store.folder();
    let (checkup, kept) = if repair && folder.is_dir() {
        weft_ipam::repair(&folder).map_err(explained)?
    } else {
        (weft_ipam::check(&folder)?, None)
    };
    let report = Report::of(checkup, repair, kept.map(|path| path.display().to_string()));
    if view.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.text(Style::stdout()))?;
    }
    Ok(if report.sound || report.repaired { 0 } else { EXIT_PROBLEMS })
}

impl Report {
    fn of(checkup: Checkup, repair: bool, damaged_journal: Option<String>) -> Report {
        let sound = checkup.is_sound();
        let part = |damage: weft_ipam::Damage| Part { offset: damage.offset, bytes: damage.bytes, what: damage.what };
        Report {
            sound,
            bytes: checkup.bytes,
            frames: checkup.frames,
            leases: checkup.leases.len(),
            damage: checkup.damage.into_iter().map(part).collect(),
            missing_changes: checkup.missing,
            kept_addresses: checkup.lost.into_iter().collect(),
            torn: checkup.torn.map(|torn| torn.to_string()),
            repaired: repair && !sound,
            damaged_journal,
        }
    }

    fn text(&self, style: Style) -> String {
        let Some(bytes) = self.bytes else { return "there is no lease journal, hence no lease\n".into() };
        let mut text = String::new();
        for part in self.damage.iter().take(TOLD) {
            let line = format!("DAMAGE   byte {}, {} bytes: {}", part.offset, part.bytes, output::plain(&part.what));
            text.push_str(&style.bad(&line));
            text.push('\n');
        }
        if self.damage.len() > TOLD {
            text.push_str(&format!("         and {} more (--json lists them)\n", self.damage.len() - TOLD));
        }
        if self.missing_changes > 0 {
            text.push_str(&format!("{} changes are missing: leases among them are forgotten\n", self.missing_changes));
        }
        if !self.kept_addresses.is_empty() {
            let all: Vec<String> = self.kept_addresses.iter().map(IpAddr::to_string).collect();
            text.push_str(&format!(
                "not given before the next boot, for a damaged lease has them: {}\n",
                all.join(" ")
            ));
        }
        if let Some(torn) = &self.torn {
            text.push_str(&format!("{torn}; weftd cuts it off\n"));
        }
        text.push_str(&format!("{} leases in {} changes, {bytes} bytes\n", self.leases, self.frames));
        text.push_str(&match (&self.damaged_journal, self.sound) {
            (Some(path), _) => format!("repaired; the damaged journal is {}\n", output::plain(path)),
            (None, true) => style.good("the lease store is sound\n"),
            (None, false) => {
                "nothing was changed: `weft ipam fsck --repair` writes a journal of what can be saved\n".into()
            }
        });
        text
    }
}
