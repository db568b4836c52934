//! The Kubernetes API as the source: where it is, and who we are there.
//!
//! ```toml
//! [kubernetes]
//! servers = ["https://10.0.0.1:6443", "https://10.0.0.2:6443"]
//! ```
//!
//! All keys are optional; the empty table is for a weftd that runs in a pod. `servers`: addresses of API servers, tried in turn; a service's
//! address works only as long as something else translates it, so a network should not rest on it. `kubeconfig` and `context`: a file
//! that says all the rest, too. Otherwise: `token_file` and `ca` (a service account's, where Kubernetes mounts them), `certificate` and
//! `key` for servers that ask for one. `idle` (90): seconds of silence after which a stream of changes is taken to hang; API servers
//! send a sign of life each minute. All files are read again for each connection, tokens once a minute.
//!
//! With this source the node's name may come from the environment, as [`NODE_NAME`], so that all nodes can share one file.

use std::fmt;
use std::path::PathBuf;

use super::reader::{At, Place, Reader, Section, TEXT};
use super::source::{check_absolute, is_authority};

/// The environment variable with the name of this node, for a weftd that runs in a pod.
pub const NODE_NAME: &str = "NODE_NAME";
/// Seconds of silence after which a stream of changes is taken to hang.
const IDLE: u64 = 90;
/// API servers of one cluster.
const MAX_SERVERS: usize = 16;

/// How the Kubernetes API is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// Its servers; if there are none, those of the kubeconfig or of the environment.
    pub servers: Vec<String>,
    /// A kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// Which of its contexts, if not the current one.
    pub context: Option<String>,
    /// Our token.
    pub token_file: Option<PathBuf>,
    /// Who may have signed the servers' certificates.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Seconds of silence after which a stream of changes is taken to hang.
    pub idle: u64,
}

impl fmt::Display for KubernetesConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kubeconfig {
            _ if !self.servers.is_empty() => f.write_str(&self.servers.join(" ")),
            Some(file) => write!(f, "{}", file.display()),
            None => f.write_str("as the environment says"),
        }
    }
}

/// What stands in the file.
pub struct DraftKubernetes {
    section: Place,
    servers: Vec<At<String>>,
    context: Option<At<String>>,
    idle: Option<At<u64>>,
    files: [Option<At<PathBuf>>; 5],
}

impl DraftKubernetes {
    /// Reads the table `kubernetes`.
    pub fn read<'t>(reader: &mut Reader<'t>, root: &mut Section<'t>) -> Option<DraftKubernetes> {
        let mut section = reader.table(root, "kubernetes")?;
        let files = ["kubeconfig", "token_file", "ca", "certificate", "key"];
        let draft = DraftKubernetes {
            section: section.place.clone(),
            servers: reader.list(&mut section, "servers", TEXT),
            context: reader.parsed(&mut section, "context", TEXT),
            idle: reader.number(&mut section, "idle", 1..=3600),
            files: files.map(|key| reader.parsed(&mut section, key, "a path")),
        };
        reader.finish(section);
        Some(draft)
    }

    /// Where it begins.
    pub fn place(&self) -> &Place {
        &self.section
    }

    /// Checks it.
    pub fn check(&self, reader: &mut Reader<'_>) -> KubernetesConfig {
        self.check_servers(reader);
        check_absolute(reader, &self.files);
        let key_of = |name: &str| Place { key: format!("kubernetes.{name}"), ..self.section.clone() };
        let [kubeconfig, token_file, ca, certificate, key] = &self.files;
        if certificate.is_some() != key.is_some() {
            reader.problem(&key_of("certificate"), "and key come together: write both or none");
        }
        match (kubeconfig, &self.context) {
            (None, Some(context)) => {
                reader.problem(&context.place, "is a part of a kubeconfig: write its path as kubeconfig");
            }
            (Some(_), _) => {
                for at in [token_file, ca, certificate].into_iter().flatten() {
                    reader.problem(&at.place, "stands here, but the kubeconfig says it, too: remove one of them");
                }
            }
            _ => {}
        }
        let [kubeconfig, token_file, ca, certificate, key] =
            self.files.each_ref().map(|at| at.as_ref().map(|at| at.value.clone()));
        KubernetesConfig {
            servers: self.servers.iter().map(|at| at.value.trim_end_matches('/').to_owned()).collect(),
            kubeconfig,
            context: self.context.as_ref().map(|at| at.value.clone()),
            token_file,
            ca,
            certificate: certificate.zip(key),
            idle: self.idle.as_ref().map_or(IDLE, |at| at.value),
        }
    }

    fn check_servers(&self, reader: &mut Reader<'_>) {
        if let Some(at) = self.servers.get(MAX_SERVERS) {
            reader.problem(&at.place, format!("is one too many: {MAX_SERVERS} servers are enough"));
        }
        for at in &self.servers {
            let rest = at.value.strip_prefix("https://").or_else(|| at.value.strip_prefix("http://"));
            if !rest.is_some_and(|rest| is_authority(rest.trim_end_matches('/'))) {
                let what = format!("{:?} is no server: write it as \"https://10.0.0.1:6443\"", at.value);
                reader.problem(&at.place, what);
            }
        }
    }
}
