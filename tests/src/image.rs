//! A container image without a registry: a static busybox and a folder for its web server.
//!
//! It is an archive as `docker save` writes it, which every runtime reads. What it runs by default waits for ever, so it
//! serves as the image of sandboxes as well; and since a first process ignores signals that it has no handler for, it
//! asks to be killed.

use std::path::Path;
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::command::run;
use crate::machine::find;

/// Its name.
pub const IMAGE: &str = "localhost/weft-box:latest";

const APPLETS: [&str; 11] = ["cat", "echo", "hostname", "httpd", "ip", "ls", "nc", "ping", "sed", "sh", "sleep"];

/// `fetch ADDRESS PORT` prints what a web server says. The applet for it looks names up in ways that a static program
/// cannot.
const FETCH: &str = "#!/bin/sh\nprintf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 3 $1 $2 | sed '1,/^\\r$/d'\n";

/// Writes the archive.
#[track_caller]
pub fn write(archive: &Path) {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let (root, bin, www) = (folder.path().join("root"), folder.path().join("root/bin"), folder.path().join("root/www"));
    std::fs::create_dir_all(&bin).and_then(|()| std::fs::create_dir_all(&www)).expect("the folder is writable");
    let busybox = find("busybox").expect("busybox is missing: `apt-get install busybox-static`");
    std::fs::copy(busybox, bin.join("busybox")).expect("the folder is writable");
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).expect("the folder is writable");
    }
    std::fs::write(bin.join("fetch"), FETCH).expect("the folder is writable");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bin.join("fetch"), executable).expect("it was written");
    tar(&root, &folder.path().join("layer.tar"), &["bin", "www"]);
    let layer = std::fs::read(folder.path().join("layer.tar")).expect("it was written");
    let digest: String = Sha256::digest(&layer).iter().map(|byte| format!("{byte:02x}")).collect();
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": { "Cmd": ["/bin/sleep", "infinity"], "Env": ["PATH=/bin"], "StopSignal": "SIGKILL" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    let write = |name: &str, json: serde_json::Value| std::fs::write(folder.path().join(name), json.to_string());
    write("config.json", config).and_then(|()| write("manifest.json", manifest)).expect("the folder is writable");
    tar(folder.path(), archive, &["manifest.json", "config.json", "layer.tar"]);
}

/// Makes a folder of one page for a web server.
#[track_caller]
pub fn write_page(folder: &Path, text: &str) {
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(folder.join("index.html"), text))
        .expect("the folder is writable");
}

#[track_caller]
fn tar(folder: &Path, archive: &Path, files: &[&str]) {
    let mut command = Command::new("tar");
    command.args(["--owner=0", "--group=0", "-C"]).arg(folder).arg("-cf").arg(archive).args(files);
    run(command).must();
}
