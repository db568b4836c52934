//! What Prometheus and a kubelet get.

use weft_api::{Empty, Request};

use crate::lab::*;

const LISTEN: &str = "\n[metrics]\nlisten = \"127.0.0.1:9474\"\n";

/// The answer, headers and all, to a request from within weftd's namespace.
fn ask(lab: &Lab, method: &str, path: &str) -> String {
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/9474 && printf '{method} {path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' >&3 && \
         timeout 20 cat <&3"
    );
    run(&["ip", "netns", "exec", &lab.namespaces[0], "bash", "-c", &script])
}

#[test]
fn metrics_and_probes_are_served_where_the_configuration_says() {
    let mut lab = Lab::with_daemon("metrics", &format!("{ROUTED}{LISTEN}"));
    let pod = lab.namespace("a");
    lab.add(&pod, attach("a")).unwrap();
    run(&["ip", "netns", "exec", &pod, "ping", "-c", "2", "-W", "5", "10.244.1.1"]);
    let text = ask(&lab, "GET", "/metrics");
    assert!(text.starts_with("HTTP/1.1 200 OK") && text.contains("application/openmetrics-text"), "{text}");
    assert!(text.trim_end().ends_with("# EOF"), "{text}");
    for line in ["weft_pods 1.0", "weft_ready 1.0", "weft_cni_requests_total{operation=\"add\",code=\"0\"} 1"] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    let answered = text
        .lines()
        .find_map(|line| line.strip_prefix("weft_dropped_frames_total{reason=\"Answered\",loss=\"false\"} "));
    assert!(answered.is_some_and(|count| count.parse::<u64>().unwrap() >= 2), "{text}");
    let _: Empty = lab.call(Request::Del(key("a")));
    let after = ask(&lab, "GET", "/metrics");
    let received = |text: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix("weft_received_frames_total{role=\"pod\"} "));
        line.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
    };
    assert!(received(&after) >= received(&text), "a counter does not fall when a pod leaves");
    assert!(ask(&lab, "GET", "/healthz").starts_with("HTTP/1.1 200"));
    assert!(ask(&lab, "GET", "/readyz").starts_with("HTTP/1.1 200"));
    assert!(ask(&lab, "HEAD", "/healthz").starts_with("HTTP/1.1 200"));
    assert!(ask(&lab, "POST", "/metrics").starts_with("HTTP/1.1 405"));
    assert!(ask(&lab, "GET", "/").starts_with("HTTP/1.1 404"));
}

#[test]
fn a_node_that_lost_its_underlay_is_alive_and_not_ready() {
    let lab = Lab::with_daemon("unready", &format!("{ROUTED}{LISTEN}"));
    run(&["ip", "-n", &lab.namespaces[0], "addr", "del", "10.200.0.1/24", "dev", "uplink"]);
    assert!(ask(&lab, "GET", "/healthz").starts_with("HTTP/1.1 200"));
    let answer = ask(&lab, "GET", "/readyz");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("10.200.0.1"), "{answer}");
}
