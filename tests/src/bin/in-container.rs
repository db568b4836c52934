//! `in-container COMMAND ARGUMENT...`: runs a command whose laboratories have their weftd in containers, from the image and with the
//! rights that the DaemonSet gives it ([`weft_tests::container`]). Ends with the command's exit code.

use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let Some(program) = words.next() else {
        eprintln!("usage: in-container COMMAND ARGUMENT...");
        return ExitCode::from(2);
    };
    let wrapped = weft_tests::container::wrap();
    let status = Command::new(&program).args(words).env("WEFT_BIN_DIR", wrapped.programs()).status();
    match status {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("cannot start {}: {error}", program.display());
            ExitCode::FAILURE
        }
    }
}
