//! A pod's network namespace.

use std::process::Command;

use crate::folder::unique_name;

pub struct Pod {
    name: String,
}

impl Pod {
    pub fn new() -> Pod {
        let name = unique_name();
        let output = Command::new("ip").args(["netns", "add", &name]).output();
        let output = output.expect("`ip` cannot be run: install it with `apt-get install iproute2`");
        assert!(
            output.status.success(),
            "`ip netns add {name}` failed: run this test as root (sudo). {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Pod { name }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As a runtime gives it in `CNI_NETNS`.
    pub fn netns(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// What tells a namespace from another: device and inode.
    pub fn identity(&self) -> (u64, u64) {
        let status = rustix::fs::stat(self.netns()).unwrap();
        (status.st_dev, status.st_ino)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}
