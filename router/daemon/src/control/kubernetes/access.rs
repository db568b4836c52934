//! Who we are at the API server, and by which certificates both sides know each other: a service account's files, a kubeconfig, or what
//! the configuration names. Read anew for each connection, for tokens and certificates rotate.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;

use crate::control::config::kubernetes::KubernetesConfig;

/// Where Kubernetes puts a service account's files into each container.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// No file of these is larger.
const MAX_FILE: u64 = 1 << 20;

/// How a server is reached.
#[derive(Debug)]
pub struct Access {
    /// The server's URL, without a slash at its end.
    pub server: String,
    /// What proves who we are; `None` if that is a certificate.
    pub token: Option<Token>,
    /// Certificates of both sides.
    pub tls: ClientConfig,
}

/// A bearer token.
#[derive(Debug, Clone)]
pub enum Token {
    /// As it stands in a kubeconfig.
    Fixed(String),
    /// In a file, which somebody renews.
    File(PathBuf),
}

impl Token {
    /// The token.
    pub fn read(&self) -> Result<String> {
        match self {
            Token::Fixed(token) => Ok(token.clone()),
            Token::File(path) => {
                let token = String::from_utf8(read(path).context("there is no token")?)
                    .ok()
                    .map(|token| token.trim().to_owned())
                    .filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
                token.with_context(|| format!("{} holds no token", path.display()))
            }
        }
    }
}

impl Access {
    /// How the server of this number, if there are several, is reached.
    ///
    /// # Errors
    /// Which file is missing or not understood, and what to write.
    pub fn of(config: &KubernetesConfig, number: usize) -> Result<Access> {
        let found = Found::of(config)?;
        let own = (!config.servers.is_empty()).then(|| config.servers[number % config.servers.len()].clone());
        let server = own.or(found.server).context(
            "no server is known: weftd does not run in a pod (KUBERNETES_SERVICE_HOST is not set); write kubernetes.servers or \
             kubernetes.kubeconfig",
        )?;
        let server = server.trim_end_matches('/').to_owned();
        let mut roots = RootCertStore::empty();
        if server.starts_with("https://") {
            let ca = found
                .ca
                .context("it is not known who may have signed the server's certificate: write kubernetes.ca")?;
            for certificate in CertificateDer::pem_slice_iter(&ca.bytes) {
                let certificate = certificate.with_context(|| format!("{} is not PEM", ca.from))?;
                roots.add(certificate).with_context(|| format!("{} has a bad certificate", ca.from))?;
            }
            ensure!(!roots.is_empty(), "{} has no certificate in it", ca.from);
        }
        let builder = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .context("TLS is not available")?
            .with_root_certificates(roots);
        let tls = match found.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain: Vec<_> = CertificateDer::pem_slice_iter(&certificate.bytes)
                    .collect::<Result<_, _>>()
                    .with_context(|| format!("{} is not PEM", certificate.from))?;
                let secret = PrivateKeyDer::from_pem_slice(&key.bytes)
                    .with_context(|| format!("{} has no private key in it", key.from))?;
                builder
                    .with_client_auth_cert(chain, secret)
                    .with_context(|| format!("{} and {} cannot be used", certificate.from, key.from))?
            }
        };
        Ok(Access { server, token: found.token, tls })
    }
}

/// Some PEM, and where it comes from.
struct Pem {
    bytes: Vec<u8>,
    from: String,
}

impl Pem {
    fn read(path: &Path) -> Result<Pem> {
        Ok(Pem { bytes: read(path)?, from: path.display().to_string() })
    }
}

#[derive(Default)]
struct Found {
    server: Option<String>,
    token: Option<Token>,
    ca: Option<Pem>,
    certificate: Option<(Pem, Pem)>,
}

impl Found {
    fn of(config: &KubernetesConfig) -> Result<Found> {
        match &config.kubeconfig {
            Some(path) => from_kubeconfig(path, config.context.as_deref()),
            None => from_files(config),
        }
    }
}

/// A number for all that says who we are and whom we trust, as the files have it: another one as soon as they are renewed.
pub fn fingerprint(config: &KubernetesConfig) -> u64 {
    let mut hasher = DefaultHasher::new();
    if let Ok(found) = Found::of(config) {
        let certificates = found.certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
        let files: Vec<&[u8]> = found.ca.iter().chain(certificates).map(|pem| pem.bytes.as_slice()).collect();
        (files, &found.server, found.token.map(|token| token.read().ok())).hash(&mut hasher);
    }
    hasher.finish()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let length = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    ensure!(length <= MAX_FILE, "{} is too large to be what it should be", path.display());
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn from_files(config: &KubernetesConfig) -> Result<Found> {
    let account = Path::new(SERVICE_ACCOUNT);
    let certificate = match &config.certificate {
        Some((certificate, key)) => Some((Pem::read(certificate)?, Pem::read(key)?)),
        None => None,
    };
    // Whoever has a certificate needs no token.
    let token = match (&config.token_file, &certificate) {
        (Some(file), _) => Some(Token::File(file.clone())),
        (None, Some(_)) => None,
        (None, None) => Some(Token::File(account.join("token"))),
    };
    let ca = match &config.ca {
        Some(path) => Some(Pem::read(path)?),
        None => Pem::read(&account.join("ca.crt")).ok(),
    };
    Ok(Found { server: from_environment(), token, ca, certificate })
}

/// What the kubelet tells each container.
fn from_environment() -> Option<String> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
    let port = std::env::var("KUBERNETES_SERVICE_PORT").unwrap_or_else(|_| "443".into());
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    Some(format!("https://{host}:{port}"))
}

/// Of a kubeconfig, what is used here.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    contexts: Vec<NamedContext>,
    current_context: Option<String>,
    #[serde(default)]
    users: Vec<NamedUser>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: KubeCluster,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct KubeCluster {
    server: Option<String>,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: KubeContext,
}

#[derive(Deserialize)]
struct KubeContext {
    cluster: String,
    user: String,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default)]
    user: KubeUser,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct KubeUser {
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    exec: Option<serde::de::IgnoredAny>,
}

fn from_kubeconfig(path: &Path, context: Option<&str>) -> Result<Found> {
    let shown = path.display();
    let text = String::from_utf8(read(path)?).with_context(|| format!("{shown} is not text"))?;
    let file: Kubeconfig = serde_saphyr::from_str(&text).with_context(|| format!("{shown} is no kubeconfig"))?;
    let wanted = context.map(str::to_owned).or(file.current_context).filter(|name| !name.is_empty());
    let wanted = wanted.with_context(|| format!("{shown} has no current context: write kubernetes.context"))?;
    let context = file.contexts.into_iter().find(|each| each.name == wanted);
    let context = context.with_context(|| format!("{shown} has no context {wanted:?}"))?.context;
    let cluster = file.clusters.into_iter().find(|each| each.name == context.cluster);
    let cluster = cluster.with_context(|| format!("{shown} has no cluster {:?}", context.cluster))?.cluster;
    let user = file.users.into_iter().find(|each| each.name == context.user);
    let user = user.with_context(|| format!("{shown} has no user {:?}", context.user))?.user;
    if user.exec.is_some() {
        bail!("{shown} has a user whose credentials come from another program: use a token or a certificate");
    }
    // Paths in it are relative to it.
    let folder = path.parent().unwrap_or(Path::new("/"));
    let part = |what: &str, data: Option<String>, file: Option<PathBuf>| -> Result<Option<Pem>> {
        let Some(data) = data else { return file.map(|file| Pem::read(&folder.join(file))).transpose() };
        let from = format!("the {what} in {shown}");
        let bytes = STANDARD.decode(data.trim()).with_context(|| format!("{from} is not base64"))?;
        Ok(Some(Pem { bytes, from }))
    };
    let certificate = part("client-certificate-data", user.client_certificate_data, user.client_certificate)?;
    let key = part("client-key-data", user.client_key_data, user.client_key)?;
    let file = user.token_file.map(|file| Token::File(folder.join(file)));
    Ok(Found {
        server: cluster.server,
        token: user.token.map(Token::Fixed).or(file),
        ca: part("certificate-authority-data", cluster.certificate_authority_data, cluster.certificate_authority)?,
        certificate: certificate.zip(key),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "apiVersion: v1\nkind: Config\ncurrent-context: one\nclusters:\n- name: c\n  cluster:\n    server: http://10.0.0.1:6443/\n\
                        contexts:\n- name: one\n  context: {cluster: c, user: u}\n- name: two\n  context: {cluster: c, user: gone}\n\
                        users:\n- name: u\n  user:\n    tokenFile: token\n";

    fn config(folder: &Path, text: &str) -> KubernetesConfig {
        fs::write(folder.join("config"), text).unwrap();
        KubernetesConfig { kubeconfig: Some(folder.join("config")), ..KubernetesConfig::default() }
    }

    #[test]
    fn a_kubeconfig_says_where_and_who() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), FILE);
        fs::write(folder.path().join("token"), "first\n").unwrap();
        let access = Access::of(&config, 0).unwrap();
        assert_eq!(access.server, "http://10.0.0.1:6443");
        let token = access.token.unwrap();
        assert_eq!(token.read().unwrap(), "first");
        let before = fingerprint(&config);
        assert_eq!(before, fingerprint(&config));
        fs::write(folder.path().join("token"), "second").unwrap();
        assert_eq!(token.read().unwrap(), "second", "a token that was renewed is read again");
        assert_ne!(before, fingerprint(&config), "and is noticed");
        let servers = vec!["http://a:1".to_owned(), "http://b:1".to_owned()];
        let several = KubernetesConfig { servers, ..config };
        assert_eq!(
            [0, 1, 2].map(|number| Access::of(&several, number).unwrap().server),
            ["http://a:1", "http://b:1", "http://a:1"]
        );
    }

    #[test]
    fn what_is_wrong_with_files_is_said_with_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let said = |config: &KubernetesConfig| format!("{:#}", Access::of(config, 0).unwrap_err());
        let good = config(folder.path(), FILE);
        let context = |name: &str| KubernetesConfig { context: Some(name.into()), ..good.clone() };
        assert!(said(&context("two")).contains("has no user \"gone\""));
        assert!(said(&context("three")).contains("has no context \"three\""));
        assert!(said(&config(folder.path(), &FILE.replace("http:", "https:"))).contains("write kubernetes.ca"));
        assert!(said(&config(folder.path(), "clusters: 5")).contains("is no kubeconfig"));
        let exec = FILE.replace("tokenFile: token", "exec: {command: aws}");
        assert!(said(&config(folder.path(), &exec)).contains("another program"));
        let bad =
            FILE.replace("http:", "https:").replace("\ncontexts", "\n    certificate-authority-data: \"%\"\ncontexts");
        assert!(said(&config(folder.path(), &bad)).contains("is not base64"), "{}", said(&config(folder.path(), &bad)));
        let missing = KubernetesConfig { ca: Some("/nowhere/ca".into()), ..KubernetesConfig::default() };
        assert!(said(&missing).contains("cannot read /nowhere/ca"));
        let token = Token::File("/nowhere/token".into());
        assert!(format!("{:#}", token.read().unwrap_err()).contains("/nowhere/token"));
        fs::write(folder.path().join("empty"), " \n").unwrap();
        assert!(
            format!("{:#}", Token::File(folder.path().join("empty")).read().unwrap_err()).contains("holds no token")
        );
    }
}
