//! Who may know whom, checked on the text of the sources.
//!
//! ```text
//! worker control                     threads, clocks, devices
//! forward  + tables                  the way of a frame
//! bridge … gateway                   steps: they never import each other, nor anything above
//! packet flow path … port            what steps speak of
//! frame pool port/sys                the only unsafe code
//! ```
//!
//! A compiler would enforce this only between crates, and a crate per step would buy nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const STEPS: [&str; 13] = [
    "bridge",
    "budget",
    "neigh",
    "route",
    "policy",
    "conntrack",
    "returns",
    "snat",
    "nat",
    "tunnel",
    "icmp",
    "gateway",
    "probing",
];

/// What a step may import from this crate: values to speak of. Of `port` that is the number of one, of `tables` everything but
/// the snapshot as a whole.
const BELOW_STEPS: [&str; 7] = ["drop_reason", "flow", "frame", "packet", "path", "pool", "time"];

/// Modules that steps stand on, and which therefore know no step.
const BELOW: [&str; 10] =
    ["drop_reason", "flow", "frame", "glimpse", "packet", "path", "pool", "port", "stats", "time"];

/// What reads clocks and moves bytes.
const SHELL: [&str; 4] = ["worker", "control", "time", "port"];

/// Imports that break the rule, each with the reason for which it stays. One that is gone must go from here too.
const EXCEPTIONS: [(&str, &str, &str); 1] = [(
    "tunnel",
    "tables::Tables",
    "the VNI, the members and the nodes belong together, and stand next to each other there",
)];

#[test]
fn a_step_imports_no_other_step_and_nothing_above_it() {
    let mut wrong = Vec::new();
    for step in STEPS {
        let imports = imports_of(step);
        assert!(!imports.is_empty(), "the imports of `{step}` were not understood");
        for import in imports {
            let (module, rest) = import.split_once("::").unwrap_or((&import, ""));
            let below = match module {
                "port" => rest == "PortId",
                "tables" => rest != "Tables" && rest != "*" && !rest.is_empty(),
                module => BELOW_STEPS.contains(&module) || module == step,
            };
            if !below && !is_exception(step, &import) {
                wrong.push(format!("{step} imports crate::{import}"));
            }
        }
    }
    assert!(wrong.is_empty(), "a step takes what it needs as arguments:\n{}", wrong.join("\n"));
}

#[test]
fn what_steps_stand_on_knows_neither_steps_nor_what_is_above_them() {
    let mut wrong = Vec::new();
    for module in BELOW {
        for import in imports_of(module) {
            let first = import.split("::").next().unwrap_or_default();
            let above = STEPS.contains(&first) || ["forward", "worker", "control"].contains(&first);
            if above && !is_exception(module, &import) {
                wrong.push(format!("{module} imports crate::{import}"));
            }
        }
    }
    assert!(wrong.is_empty(), "these stand above what imports them:\n{}", wrong.join("\n"));
}

#[test]
fn every_exception_is_still_needed() {
    for (module, import, _) in EXCEPTIONS {
        assert!(imports_of(module).contains(import), "{module} no longer imports {import}: remove the exception");
    }
}

#[test]
fn the_core_reads_no_clock_and_does_no_io() {
    let forbidden = [
        "Instant::now",
        "SystemTime",
        "boottime(",
        "std::fs",
        "std::env",
        "std::thread",
        "std::process",
        "std::os",
        "mio::",
        "rustix::",
        "libc::",
        "socket2::",
        "tokio",
        "serde",
        "tracing",
        "println!",
        "eprintln!",
    ];
    let mut wrong = Vec::new();
    for file in rust_files(&src()) {
        let module = module_of(&file);
        if SHELL.contains(&module.as_str()) {
            continue;
        }
        let code = code_of(&file);
        wrong.extend(forbidden.iter().filter(|word| code.contains(**word)).map(|word| format!("{module}: {word}")));
    }
    assert!(wrong.is_empty(), "the core gets time, tables and frames as arguments:\n{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_lives_where_it_is_looked_for() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace");
    let mut wrong = Vec::new();
    let mut seen = 0;
    for folder in ["encap", "ipam", "router", "benches", "tests"] {
        for file in rust_files(&workspace.join(folder)) {
            seen += 1;
            let path = file.strip_prefix(workspace).expect("it was found below").to_string_lossy().into_owned();
            let allowed =
                path.starts_with("router/src/port/sys/") || path.ends_with("/src/sys.rs") || path.contains("/fuzz/");
            if !allowed && words(&code_of(&file)).any(|word| word == "unsafe") {
                wrong.push(path);
            }
        }
    }
    assert!(seen > 50, "only {seen} files were found");
    assert!(wrong.is_empty(), "unsafe code outside port/sys and a crate's sys.rs:\n{}", wrong.join("\n"));
}

#[test]
fn paths_are_read_out_of_groups() {
    let code = "use crate::a::{B, c::{D as E, self}};\nuse crate::{f, g::h};\nfn x() { crate::i::J; super::k::l(); subcrate::m }";
    let found: Vec<String> = paths(code).into_iter().collect();
    assert_eq!(found, ["a::B", "a::c::D", "a::c::self", "f", "g::h", "i::J", "k::l"]);
}

fn is_exception(module: &str, import: &str) -> bool {
    EXCEPTIONS.iter().any(|(by, what, _)| *by == module && import == *what)
}

/// What a module of the crate imports from others, tests left out.
fn imports_of(module: &str) -> BTreeSet<String> {
    let mut files = rust_files(&src().join(module));
    let file = src().join(format!("{module}.rs"));
    if file.exists() {
        files.push(file);
    }
    assert!(!files.is_empty(), "there is no module `{module}`: adapt the lists of this test");
    files.iter().flat_map(|file| paths(&code_of(file))).collect()
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The first part of a module's path.
fn module_of(file: &Path) -> String {
    let relative = file.strip_prefix(src()).expect("it was found below").with_extension("");
    let first = relative.iter().next().expect("a file has a name");
    first.to_string_lossy().into_owned()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files = Vec::new();
    for path in entries.map(|entry| entry.expect("a folder of sources can be read").path()) {
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// A file's code without comments, string literals, and its test module, which stands last.
fn code_of(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let mut code = String::new();
    for line in text.lines() {
        let mut in_string = false;
        let mut before = ' ';
        for (at, c) in line.char_indices() {
            if !in_string && line[at..].starts_with("//") {
                break;
            }
            if c == '"' && before != '\\' && before != '\'' {
                in_string = !in_string;
            } else if !in_string {
                code.push(c);
            }
            before = if before == '\\' && c == '\\' { ' ' } else { c };
        }
        code.push('\n');
    }
    code
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// All paths that begin with `crate::` or `super::`, groups taken apart.
fn paths(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for root in ["crate::", "super::"] {
        for (at, _) in code.match_indices(root) {
            let inside_word = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if !inside_word {
                read_tree(&code[at + root.len()..], "", &mut found);
            }
        }
    }
    found
}

/// Reads one path or group from the front of `code`; returns what follows it.
fn read_tree<'a>(code: &'a str, prefix: &str, found: &mut BTreeSet<String>) -> &'a str {
    let mut code = code.trim_start();
    if let Some(group) = code.strip_prefix('{') {
        code = group;
        loop {
            code = read_tree(code, prefix, found).trim_start();
            let Some(next) = code.strip_prefix(',') else { break };
            code = next.trim_start();
        }
        return code.strip_prefix('}').unwrap_or(code);
    }
    let end = code.find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*').unwrap_or(code.len());
    let (name, rest) = code.split_at(end);
    if name.is_empty() {
        return rest;
    }
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    match rest.strip_prefix("::") {
        Some(rest) if rest.starts_with(|c: char| c.is_alphabetic() || c == '{' || c == '_' || c == '*') => {
            read_tree(rest, &path, found)
        }
        _ => {
            found.insert(path);
            let alias = rest
                .strip_prefix(" as ")
                .map(|rest| rest.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_'));
            alias.unwrap_or(rest)
        }
    }
}
