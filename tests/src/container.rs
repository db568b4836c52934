//! weftd as the DaemonSet has it: from the image, in a container with the manifest's rights and mounts and no more.
//!
//! [`wrap`] makes a folder of programs whose `weftd` is a script that runs the container, in the network namespace in which it
//! was called itself. So a laboratory, or a test, that is given this folder uses containers without knowing. What the
//! container may do is read from `deploy/kubernetes/daemonset.yaml`, not repeated here.
//!
//! Who started the script knows podman's process id, and means weftd's: podman writes that one down, and [`first_process`] is where
//! the harness looks for it before it looks at weftd or sends it a signal.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::command::{eventually, run, run_with};
use crate::machine::{binaries, need};

/// What it takes, and the Debian packages.
const PROGRAMS: [(&str, &str); 3] = [("podman", "podman"), ("crun", "crun"), ("conmon", "conmon")];

const PATIENCE: Duration = Duration::from_secs(120);

const CONTAINERS: &str = "[containers]\ncgroups = \"disabled\"\n[network]\nnetwork_backend = \"cni\"\n[engine]\n\
    cgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"crun\"\n";

/// The folder, beside that of programs, with a file for each container: by the process id of the script that it was started by.
const PIDS: &str = "pids";

/// A folder with everything in it; removed when it is dropped.
pub struct Wrapped {
    folder: tempfile::TempDir,
}

impl Wrapped {
    /// The folder of programs.
    pub fn programs(&self) -> PathBuf {
        self.folder.path().join("bin")
    }

    /// podman, with storage of its own.
    fn podman(folder: &Path) -> Command {
        let mut podman = Command::new("podman");
        podman.env("CONTAINERS_CONF", folder.join("containers.conf"));
        for (option, name) in [("--root", "root"), ("--runroot", "run")] {
            podman.arg(option).arg(folder.join(name));
        }
        podman.args(["--storage-driver", "vfs"]);
        podman
    }
}

impl Drop for Wrapped {
    fn drop(&mut self) {
        // What is left of containers is unmounted by podman itself.
        let mut podman = Wrapped::podman(self.folder.path());
        let _ = podman.args(["rm", "--all", "--force", "--time", "0"]).output();
    }
}

/// Builds the image of the programs under test, and the folder.
#[track_caller]
pub fn wrap() -> Wrapped {
    need(&PROGRAMS);
    let wrapped = Wrapped { folder: tempfile::tempdir().expect("there is a folder for temporary files") };
    let folder = wrapped.folder.path();
    fs::write(folder.join("containers.conf"), CONTAINERS).expect("the folder is writable");
    let podman = Wrapped::podman(folder);
    let tool: Vec<String> = std::iter::once(podman.get_program())
        .chain(podman.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let mut image = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/image"));
    image.arg(binaries()).arg("localhost/weft:test").env("IMAGE_TOOL", tool.join(" "));
    image.env("CONTAINERS_CONF", folder.join("containers.conf"));
    run_with(image, &[], PATIENCE).must();

    let programs = wrapped.programs();
    fs::create_dir(&programs).and_then(|()| fs::create_dir(folder.join(PIDS))).expect("the folder is writable");
    for name in ["weft", "weft-cni"] {
        symlink(fs::canonicalize(binaries().join(name)).expect("it is there"), programs.join(name))
            .expect("the folder is writable");
    }
    // The network namespace is the caller's. `ip netns exec` has made a mount namespace, too, without cgroups; and of those the runtime
    // understands the unified hierarchy alone, whatever the machine has.
    let script = format!(
        "#!/bin/sh\nexport CONTAINERS_CONF={}\nexport PID_FILE={}/$$\nrm -f \"$PID_FILE\"\n\
         exec nsenter --mount=/proc/{}/ns/mnt -- unshare --mount sh -ec '\n\
         mkdir -p /run/weft\nmount -t cgroup2 none /sys/fs/cgroup\n\
         exec {} run --rm --quiet --network host --pull never --pidfile \"$PID_FILE\" \
         --ulimit nofile=16384:16384 --ulimit nproc=4096:4096 {} \
         -v /run/weft:/run/weft -v /tmp:/tmp localhost/weft:test \"$@\"' weftd \"$@\"\n",
        folder.join("containers.conf").display(),
        folder.join(PIDS).display(),
        std::process::id(),
        tool.join(" "),
        rights().join(" "),
    );
    let path = programs.join("weftd");
    fs::write(&path, script).expect("the folder is writable");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it was just written");
    wrapped
}

/// The process id of the weftd that was started as `started`: this one, or that of its container's first process, once there is one.
#[track_caller]
pub fn first_process(started: u32) -> u32 {
    let folder = binaries().join("..").join(PIDS);
    if !folder.is_dir() {
        return started;
    }
    let mut written = None;
    eventually("a container says which process is its first", PATIENCE, || {
        let text = fs::read_to_string(folder.join(started.to_string())).unwrap_or_default();
        written = text.trim().parse().ok();
        // One that has ended without, or that never was a container's, is itself.
        written.is_some() || !is_script_or_podman(started)
    });
    written.unwrap_or(started)
}

/// Whether a process may yet become a container, or is that of one.
fn is_script_or_podman(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let has_ended = state.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z'));
    !has_ended && ["sh", "ip", "nsenter", "unshare", "weftd", "podman"].contains(&name.trim())
}

/// What the manifest gives weftd, as options of podman.
#[track_caller]
fn rights() -> Vec<String> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes/daemonset.yaml");
    let text = fs::read_to_string(manifest).expect("the manifest is there");
    let manifest: Value = serde_saphyr::from_str(&text).expect("the manifest is YAML");
    let pod = &manifest["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let context = &container["securityContext"];
    assert_eq!(pod["hostNetwork"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "as podman has it without a word");
    assert!(context["privileged"].is_null() && pod["hostPID"].is_null(), "the manifest asks for less: {context}");
    let mut options = Vec::new();
    if context["readOnlyRootFilesystem"] == true {
        // podman would make some folders writable nevertheless.
        options.extend(["--read-only".to_owned(), "--read-only-tmpfs=false".to_owned()]);
    }
    let list = |value: &Value| -> Vec<String> {
        let words = value.as_array().into_iter().flatten();
        words.map(|word| word.as_str().expect("a capability has a name").to_owned()).collect()
    };
    options.extend(list(&context["capabilities"]["drop"]).iter().map(|name| format!("--cap-drop={name}")));
    options.extend(list(&context["capabilities"]["add"]).iter().map(|name| format!("--cap-add={name}")));
    for mount in container["volumeMounts"].as_array().into_iter().flatten() {
        let volume = pod["volumes"].as_array().into_iter().flatten().find(|volume| volume["name"] == mount["name"]);
        let volume = volume.expect("a mount names a volume");
        // What is a laboratory's own (state, sockets, configuration) is where the laboratory has it.
        let Some(path) = volume["hostPath"]["path"].as_str() else { continue };
        let target = mount["mountPath"].as_str().expect("a mount has a path");
        match path {
            "/dev/net/tun" => options.push(format!("--device={path}:{target}")),
            "/proc/sys/net" => options.push(format!("--volume={path}:{target}")),
            _ => {}
        }
    }
    options
}

/// The configuration that the manifests give every weftd.
#[track_caller]
pub fn configuration() -> String {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes/config.yaml");
    let text = fs::read_to_string(manifest).expect("the manifest is there");
    let manifest: Value = serde_saphyr::from_str(&text).expect("the manifest is YAML");
    manifest["data"]["weftd.toml"].as_str().expect("it has a configuration").to_owned()
}

/// What podman says of the image: its layers' files.
#[track_caller]
pub fn files(wrapped: &Wrapped) -> Vec<String> {
    let mut podman = Wrapped::podman(wrapped.folder.path());
    podman.env("CONTAINERS_CONF", wrapped.folder.path().join("containers.conf"));
    let archive = wrapped.folder.path().join("image.tar");
    podman.args(["save", "--quiet", "--format", "oci-dir", "--output"]).arg(&archive).arg("localhost/weft:test");
    run_with(podman, &[], PATIENCE).must();
    let blobs = fs::read_dir(archive.join("blobs/sha256")).expect("the image was saved");
    let mut files = Vec::new();
    for blob in blobs.filter_map(Result::ok).map(|entry| entry.path()) {
        let mut tar = Command::new("tar");
        tar.arg("-tf").arg(&blob);
        let listed = run(tar);
        if listed.success {
            files.extend(listed.out.lines().map(str::to_owned));
        }
    }
    files
}
