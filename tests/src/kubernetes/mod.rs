//! A double of the Kubernetes API: enough of it that a weftd cannot tell the difference, and everything that can go wrong with it.
//!
//! It speaks HTTP/1.1, with TLS if wanted, and knows Nodes and Pods: get, list with pages, watch with bookmarks and field selectors, merge
//! and strategic patches, the subresource `status`. Versions, a history that can be forgotten (410), the refusal of a patch for another
//! UID and patches that change nothing are as behind a real server. [`Faults`] are what a test can do to it; [`Api::asked`] is what was
//! asked of it, request by request.
//!
//! The objects are whole ones, in the shape that a kubelet of a kubeadm cluster gives them: `node.json` and `pod.json` beside this file.

mod patch;
mod server;
mod store;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use store::Store;

const NODE: &str = include_str!("node.json");
const POD: &str = include_str!("pod.json");

/// A request that was made.
#[derive(Debug, Clone)]
pub struct Asked {
    /// When.
    pub when: Instant,
    /// The API's verb.
    pub verb: &'static str,
    /// The API's resource: `nodes`, `nodes/status`, `pods`.
    pub what: String,
    /// The field manager that it names.
    pub manager: String,
}

/// What is wrong with the double.
#[derive(Debug, Clone)]
pub struct Faults {
    /// Streams send nothing any more, and do not end.
    pub hang_streams: bool,
    /// Requests are not answered.
    pub hang_requests: bool,
    /// So many requests are refused with [`Faults::fail_with`].
    pub fail: usize,
    /// Their status; 429 comes with `Retry-After: 1`.
    pub fail_with: u16,
    /// Lists and streams come in pieces of so many bytes, with a pause after each.
    pub slow: Option<(usize, Duration)>,
    /// How often streams have a bookmark.
    pub bookmark_every: Duration,
    /// The only good token, if one is needed.
    pub token: Option<String>,
    /// Verbs and resources that are refused with 403.
    pub forbidden: Vec<(&'static str, String)>,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults {
            hang_streams: false,
            hang_requests: false,
            fail: 0,
            fail_with: 500,
            slow: None,
            bookmark_every: Duration::from_secs(60),
            token: None,
            forbidden: Vec::new(),
        }
    }
}

/// What the server's tasks and the test share.
struct Shared {
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    changed: watch::Sender<u64>,
    log: Mutex<Vec<Asked>>,
}

impl Shared {
    fn faults(&self) -> Faults {
        self.faults.lock().expect("nobody panics with it").clone()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store.lock().expect("nobody panics with it");
        let done = change(&mut store);
        self.changed.send_replace(store.version());
        done
    }
}

/// A running double.
pub struct Api {
    shared: Arc<Shared>,
    bind: Box<dyn Fn() -> TcpListener + Send + Sync>,
    address: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    runtime: Option<Runtime>,
}

impl Api {
    /// Starts one on this machine's loopback, without TLS.
    pub fn start() -> Api {
        let first = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = first.local_addr().expect("it is bound");
        let mut api =
            Api::new(Box::new(move || TcpListener::bind(address).expect("the port is still free")), address, None);
        api.serve(first);
        api
    }

    /// Starts one where `bind` says, which is asked again after each stop; with a server's certificate and key in PEM files it speaks TLS.
    pub fn start_at(
        bind: impl Fn() -> TcpListener + Send + Sync + 'static,
        certificate: Option<(&Path, &Path)>,
    ) -> Api {
        let first = bind();
        let address = first.local_addr().expect("it is bound");
        let tls = certificate.map(|(certificate, key)| Arc::new(server_config(certificate, key)));
        let mut api = Api::new(Box::new(bind), address, tls);
        api.serve(first);
        api
    }

    fn new(
        bind: Box<dyn Fn() -> TcpListener + Send + Sync>,
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
    ) -> Api {
        let shared = Shared {
            store: Mutex::default(),
            faults: Mutex::default(),
            changed: watch::channel(0).0,
            log: Mutex::default(),
        };
        Api { shared: Arc::new(shared), bind, address, tls, runtime: None }
    }

    fn serve(&mut self, listener: TcpListener) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a thread is free");
        listener.set_nonblocking(true).expect("a socket can be that");
        let (shared, tls) = (Arc::clone(&self.shared), self.tls.clone().map(TlsAcceptor::from));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("it is a socket");
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(Arc::clone(&shared), tls.clone(), stream));
            }
        });
        self.runtime = Some(runtime);
    }

    /// Serves a connection that somebody else has taken, by that one's runtime and clock; with a certificate and its key, by TLS.
    pub fn connection(
        &self,
        stream: TcpStream,
        certificate: Option<(&Path, &Path)>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let tls = certificate.map(|(certificate, key)| TlsAcceptor::from(Arc::new(server_config(certificate, key))));
        connection(Arc::clone(&self.shared), tls, stream)
    }

    /// Its URL.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Ends it: all connections break, and nobody listens.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// Starts it again with the objects that it has.
    pub fn start_again(&mut self) {
        assert!(self.runtime.is_none(), "it runs");
        let listener = (self.bind)();
        self.serve(listener);
    }

    /// Changes what is wrong with it.
    pub fn spoil(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.faults.lock().expect("nobody panics with it"));
        self.shared.changed.send_replace(0);
    }

    /// Makes a Node out of the recorded one: `n<number>`, made in the order of their numbers, with ranges and an address that have the number in them.
    pub fn add_node(&self, number: u16) -> Value {
        self.put("nodes", node(number))
    }

    /// Makes or replaces an object.
    pub fn put(&self, resource: &str, object: Value) -> Value {
        self.shared.change(|store| store.put(resource, object))
    }

    /// Changes an object, as somebody else does.
    #[track_caller]
    pub fn edit(&self, resource: &str, name: &str, edit: impl FnOnce(&mut Value)) -> Value {
        let mut object = self.object(resource, name);
        edit(&mut object);
        self.put(resource, object)
    }

    /// Removes an object.
    #[track_caller]
    pub fn delete(&self, resource: &str, name: &str) {
        assert!(self.shared.change(|store| store.delete(resource, name)), "there is no {name} among the {resource}");
    }

    /// Forgets the history, as after a compaction: 410 for whoever begins in the past.
    pub fn forget(&self) {
        self.shared.change(Store::forget);
    }

    /// Sets everything back to how it was so many versions ago, as when etcd is restored.
    pub fn set_back(&self, versions: u64) {
        self.shared.change(|store| store.set_back(versions));
    }

    /// An object.
    #[track_caller]
    pub fn object(&self, resource: &str, name: &str) -> Value {
        let store = self.shared.store.lock().expect("nobody panics with it");
        store.get(resource, name).unwrap_or_else(|| panic!("there is no {name} among the {resource}")).clone()
    }

    /// What weftd says about its node: its annotation.
    pub fn announced(&self, node: &str) -> Option<Value> {
        let node = self.object("nodes", node);
        serde_json::from_str(node.pointer("/metadata/annotations/weft.internal~1node")?.as_str()?).ok()
    }

    /// The status of a Node's condition.
    pub fn condition(&self, node: &str, kind: &str) -> Option<String> {
        let node = self.object("nodes", node);
        let found =
            node["status"]["conditions"].as_array()?.iter().find(|each| each["type"] == kind)?["status"].clone();
        found.as_str().map(str::to_owned)
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.log.lock().expect("nobody panics with it").clone()
    }

    /// How many requests of this kind there were: `list nodes`.
    pub fn count(&self, what: &str) -> usize {
        self.asked().iter().filter(|asked| format!("{} {}", asked.verb, asked.what) == what).count()
    }

    /// The most requests within a second.
    pub fn busiest_second(&self) -> usize {
        let asked = self.asked();
        let within = |first: usize| {
            asked[first..]
                .iter()
                .take_while(|later| later.when.duration_since(asked[first].when) < Duration::from_secs(1))
                .count()
        };
        (0..asked.len()).map(within).max().unwrap_or(0)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn connection(shared: Arc<Shared>, tls: Option<TlsAcceptor>, stream: TcpStream) {
    let service = service_fn(move |request| server::answer(Arc::clone(&shared), request));
    let http = hyper::server::conn::http1::Builder::new();
    let _ = stream.set_nodelay(true);
    // Whoever does not speak TLS, or leaves, is heard of no more.
    match tls {
        None => drop(http.serve_connection(TokioIo::new(stream), service).await),
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                drop(http.serve_connection(TokioIo::new(stream), service).await);
            }
        }
    }
}

/// A Node out of the recorded one; see [`Api::add_node`].
pub fn node(number: u16) -> Value {
    let mut node: Value = serde_json::from_str(NODE).expect("it is JSON");
    let [high, low] = number.to_be_bytes();
    let name = format!("n{number}");
    node["metadata"]["name"] = json!(name);
    node["metadata"]["labels"]["kubernetes.io/hostname"] = json!(name);
    node["metadata"]["uid"] = json!(format!("5f6c1c7e-52b1-4f0c-9c57-{number:012}"));
    node["metadata"]["creationTimestamp"] =
        json!(format!("2026-11-20T{:02}:{:02}:{:02}Z", number / 3600 % 24, number / 60 % 60, number % 60));
    let range =
        if high == 0 { format!("10.244.{low}.0/24") } else { format!("10.{}.{low}.0/24", 100 + u16::from(high)) };
    node["spec"]["podCIDR"] = json!(range);
    node["spec"]["podCIDRs"] = json!([range, format!("fd00:10:244:{number:x}::/64")]);
    node["status"]["addresses"] = json!([
        {"type": "InternalIP", "address": format!("10.200.{high}.{low}")},
        {"type": "Hostname", "address": name},
    ]);
    node
}

/// A Pod out of the recorded one: `default/<name>` on that node, with this address.
pub fn pod(name: &str, node: &str, address: &str) -> Value {
    let mut pod: Value = serde_json::from_str(POD).expect("it is JSON");
    pod["metadata"]["name"] = json!(name);
    pod["metadata"]["uid"] = json!("");
    pod["spec"]["nodeName"] = json!(node);
    pod["status"]["podIP"] = json!(address);
    pod["status"]["podIPs"] = json!([{"ip": address}]);
    pod
}

fn server_config(certificate: &Path, key: &Path) -> ServerConfig {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate).expect("the file is there").collect();
    let key = PrivateKeyDer::from_pem_file(key).expect("the file has a key");
    ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("it has some")
        .with_no_client_auth()
        .with_single_cert(chain.expect("certificates"), key)
        .expect("they belong together")
}
