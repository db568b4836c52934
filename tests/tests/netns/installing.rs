//! The plugin where runtimes look for it, and the file by which weftd tells them of the network.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use weft_tests::cluster::Cluster;
use weft_tests::command::{PATIENCE, eventually, run, run_with};
use weft_tests::machine::{binary, turn};
use weft_tests::plugin::Answer;

#[test]
fn weftd_tells_the_runtime_of_the_network_and_the_file_stays() {
    let _turn = turn();
    let cluster = Cluster::new("tell");
    let folder = cluster.folder.path().join("net.d");
    let more = format!("[cni]\nnetwork = \"mine\"\nconf_dir = \"{}\"\n", folder.display());
    let mut node = cluster.weft_node(1, "routed", &more);
    let file = folder.join("05-weft.conflist");
    eventually("the file is written", Duration::from_secs(20), || file.exists());
    let list: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!((&list["name"], &list["cniVersion"]), (&json!("mine"), &json!("1.0.0")));
    // What it says is enough for a runtime: the plugin is called with it and nothing else.
    let mut config = list["plugins"][0].clone();
    (config["name"], config["cniVersion"]) = (list["name"].clone(), "1.1.0".into());
    let pod = cluster.sandbox("pod");
    let answer = node.runtime.call_with("ADD", "c1", Some(&pod.path()), &config.to_string());
    assert_eq!(answer.must()["ips"].as_array().unwrap().len(), 2);
    let written = std::fs::metadata(&file).unwrap().modified().unwrap();
    node.stop();
    assert!(file.exists());
    node.start_again();
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), written, "it is the same, so it is left");
}

#[test]
fn a_weftd_in_a_namespace_of_its_own_tells_nobody() {
    let _turn = turn();
    let cluster = Cluster::new("quiet");
    let before = std::path::Path::new("/etc/cni/net.d/05-weft.conflist").exists();
    let node = cluster.weft_node(1, "routed", "");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!node.log().contains("05-weft.conflist"), "{}", node.log());
    assert_eq!(std::path::Path::new("/etc/cni/net.d/05-weft.conflist").exists(), before);
}

#[test]
fn the_plugin_is_installed_also_as_loopback_and_does_its_job() {
    let _turn = turn();
    let cluster = Cluster::new("lo");
    let folder = cluster.folder.path().join("bin");
    for _ in 0..2 {
        let mut weft = Command::new(binary("weft"));
        weft.arg("install-cni").arg("--from").arg(binary("weft-cni")).arg("--bin-dir").arg(&folder);
        run(weft).must();
    }
    let pod = cluster.sandbox("pod");
    pod.ip("link set lo down");
    let call = |command: &str, version: &str| {
        let mut plugin = Command::new(folder.join("loopback"));
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_CONTAINERID", "c1").env("CNI_IFNAME", "lo");
        plugin.env("CNI_NETNS", pod.path()).env("CNI_PATH", &folder).env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=x");
        // As containerd has it.
        let config = json!({ "cniVersion": version, "name": "cni-loopback", "type": "loopback" });
        Answer::of(&run_with(plugin, config.to_string().as_bytes(), PATIENCE))
    };
    for version in ["0.3.1", "1.0.0", "1.1.0"] {
        let result = call("ADD", version).must();
        assert!(pod.ip("link show lo").contains("UP") && result["ips"][0]["address"] == "127.0.0.1/8", "{result}");
        assert_eq!((&result["cniVersion"], &result["interfaces"][0]["name"]), (&json!(version), &json!("lo")));
        if version > "0.3.1" {
            call("CHECK", version).must();
        }
        for _ in 0..2 {
            call("DEL", version).must();
        }
        assert!(!pod.ip("link show lo").contains("UP"));
    }
    call("CHECK", "1.0.0").refused(103);
    assert!(call("VERSION", "1.0.0").must()["supportedVersions"].as_array().unwrap().len() >= 5);
}
