//! `weft doctor`: is this node fit for Weft, and if not, what is to be changed.
//!
//! Run before installing it says what would go wrong; run afterwards, what does. Each check ([`checks`]) looks at one thing and
//! changes nothing. Everything is read below a root folder, so that the checks can be tried on made-up nodes, and so that a
//! container can examine its host.

mod checks;
mod reserved;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;
use serde::Serialize;

use crate::output::{self, Style};
use crate::table::Table;

/// Looks for what would keep Weft from working on this node.
///
/// Exits with 3 if there is a problem, with 0 if there are warnings at most.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// The root folder of the node, when it is not `/`: in a container that examines its host.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// weftd's configuration, below the root folder.
    #[arg(long, value_name = "FILE", default_value = "/etc/weft/weftd.toml")]
    config: PathBuf,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// Weft will not work, or not as it should.
    Problem,
    /// Something may fail, or be slow.
    Warning,
    /// As it should be.
    Good,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// How grave it is.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do; empty if nothing has to be done.
    pub advice: String,
}

/// The node that is examined.
pub struct Machine {
    /// Its root folder.
    root: PathBuf,
    /// weftd's configuration, below the root folder.
    config: Option<toml::Table>,
    /// What `runc --version` says.
    runc: Option<String>,
    /// What `nft list ruleset` says.
    firewall: Option<String>,
}

impl Machine {
    fn new(root: &Path, config: &Path) -> Machine {
        let mut machine = Machine { root: root.to_owned(), config: None, runc: None, firewall: None };
        machine.config = machine.read(config).and_then(|text| text.parse().ok());
        machine.runc = machine.said_by("runc", &["--version"]);
        machine.firewall = machine.said_by("nft", &["-s", "list", "ruleset"]);
        machine
    }

    /// A path of the node as seen from here.
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A text file of the node.
    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        fs::read_to_string(self.path(path)).ok()
    }

    /// Names in a folder of the node, sorted; none if it cannot be read.
    fn list(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// What a program of the node says; `None` if it is not there, or the node is not this machine as seen from here.
    fn said_by(&self, program: &str, arguments: &[&str]) -> Option<String> {
        let folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
        let path = folders.iter().map(|folder| self.path(folder).join(program)).find(|path| path.is_file())?;
        let said = Command::new(path).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        Some(String::from_utf8_lossy(&said.stdout).into_owned())
    }
}

/// Examines the node. True if there is a problem.
pub fn run(arguments: &Doctor, socket: &Path) -> Result<bool> {
    let machine = Machine::new(&arguments.root, &arguments.config);
    let mut findings: Vec<Finding> = checks::ALL.iter().flat_map(|check| check(&machine)).collect();
    findings.extend(checks::daemon(socket));
    findings.sort_by_key(|finding| finding.grade);
    if arguments.json {
        output::print_json(&findings)?;
    } else {
        output::print(&render(&findings, Style::stdout()))?;
    }
    Ok(findings.iter().any(|finding| finding.grade == Grade::Problem))
}

fn render(findings: &[Finding], style: Style) -> String {
    let mut table = Table::new(&["", "check", "found"]);
    for finding in findings {
        let (mark, bad) = match finding.grade {
            Grade::Problem => ("PROBLEM", true),
            Grade::Warning => ("warning", false),
            Grade::Good => ("ok", false),
        };
        table.push(vec![mark.into(), finding.check.into(), finding.found.clone()], bad);
        if !finding.advice.is_empty() {
            table.push(vec![String::new(), String::new(), format!("→ {}", finding.advice)], false);
        }
    }
    let count = |grade| findings.iter().filter(|finding| finding.grade == grade).count();
    let (problems, warnings) = (count(Grade::Problem), count(Grade::Warning));
    format!("{}\n{problems} problems, {warnings} warnings\n", table.render(style, "nothing was looked at"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_counted_and_advice_stands_below() {
        let finding = |grade, advice: &str| Finding { check: "tun", grade, found: "x".into(), advice: advice.into() };
        let text = render(&[finding(Grade::Problem, "load it"), finding(Grade::Good, "")], Style::PLAIN);
        assert!(text.contains("PROBLEM  tun    x\n") && text.contains("→ load it\n"), "{text}");
        assert!(text.ends_with("\n1 problems, 0 warnings\n"), "{text}");
    }
}
