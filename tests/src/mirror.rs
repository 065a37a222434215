//! The package archives that this host's apt is configured for, behind a server with TLS on the loopback interface whose CA nobody
//! knows. Who gets through it has been told of that CA.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, thread};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

/// The name in its certificate.
const NAME: &str = "localhost";
/// Where apt keeps its configuration.
const APT: &str = "etc/apt";

/// A running server; it ends with the test's process.
#[derive(Debug)]
pub struct Mirror {
    root: TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// What was asked for.
    pub path: String,
    /// Who asked, as it calls itself.
    pub agent: String,
}

impl Mirror {
    /// Starts one.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let (server, authority) = identity();
        let root = tempfile::Builder::new().prefix("nexus-mirror-").tempdir().expect("a temporary directory");
        fs::write(root.path().join("ca.pem"), authority).expect("the CA's certificate is written");
        configure(root.path(), address);
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let (noted, proxy) = (asked.clone(), apt_proxy());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (server, noted, proxy) = (server.clone(), noted.clone(), proxy.clone());
                // A client that goes away, or does not trust the server, is no concern of it.
                thread::spawn(move || serve(stream, server, &noted, proxy.as_deref()).ok());
            }
        });
        Self { root, asked }
    }

    /// A root directory whose apt takes everything from here.
    pub fn apt_root(&self) -> &Path {
        self.root.path()
    }

    /// The certificate of the CA.
    pub fn ca_file(&self) -> PathBuf {
        self.root.path().join("ca.pem")
    }

    /// What was asked for so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A certificate of a CA of its own, and that CA's.
fn identity() -> (Arc<ServerConfig>, String) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().expect("a key");
    let authority = params.self_signed(&key).expect("a certificate").pem();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new([NAME.to_owned()]).expect("a name");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate").der().clone();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = config.expect("versions of TLS").with_no_client_auth();
    (Arc::new(config.with_single_cert(vec![certificate], key).expect("a key and its certificate")), authority)
}

/// The sources of this host's apt, with this server in front of each.
fn configure(root: &Path, address: SocketAddr) {
    let (own, apt) = (Path::new("/").join(APT), root.join(APT));
    let parts = apt.join("sources.list.d");
    fs::create_dir_all(&parts).expect("a directory for sources");
    for trusted in ["keyrings", "trusted.gpg", "trusted.gpg.d"] {
        std::os::unix::fs::symlink(own.join(trusted), apt.join(trusted)).expect("a link to keys");
    }
    std::os::unix::fs::symlink("/usr", root.join("usr")).expect("a link to keyrings");
    let behind = |scheme: &str| format!("https://{NAME}:{}/{scheme}/", address.port());
    let rewrite = |from: &Path, to: &Path| {
        let Ok(text) = fs::read_to_string(from) else { return };
        // In one pass: what is put in has a scheme too.
        let text = text.replace("https://", "\0s/").replace("http://", &behind("http"));
        fs::write(to, text.replace("\0s/", &behind("https"))).expect("sources are written");
    };
    rewrite(&own.join("sources.list"), &apt.join("sources.list"));
    for entry in fs::read_dir(own.join("sources.list.d")).into_iter().flatten().flatten() {
        rewrite(&entry.path(), &parts.join(entry.file_name()));
    }
}

/// The proxy of this host's apt, where it has one.
fn apt_proxy() -> Option<String> {
    let told = Command::new("apt-config").args(["shell", "PROXY", "Acquire::http::Proxy"]).output().ok()?;
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    let proxy = text.split('\'').nth(1)?.to_owned();
    (!proxy.is_empty() && proxy != "DIRECT").then_some(proxy)
}

fn serve(
    stream: TcpStream,
    server: Arc<ServerConfig>,
    asked: &Mutex<Vec<Asked>>,
    proxy: Option<&str>,
) -> io::Result<()> {
    let connection = ServerConnection::new(server).map_err(io::Error::other)?;
    let mut lines = BufReader::new(StreamOwned::new(connection, stream));
    let mut line = String::new();
    lines.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut agent, mut range) = (String::new(), Vec::new());
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let header = line.trim();
        match header.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("user-agent") => value.clone_into(&mut agent),
            Some((name, _))
                if name.eq_ignore_ascii_case("range") || name.eq_ignore_ascii_case("if-range") =>
            {
                range.extend(["-H".to_owned(), header.to_owned()]);
            }
            _ => {}
        }
    }
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { path: path.clone(), agent });
    let mut stream = lines.into_inner();
    let Some((scheme, rest)) = path.trim_start_matches('/').split_once('/') else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let mut fetch = Command::new("curl")
        .args(["-sS", "-L", "-i", "--raw", "--http1.1", "--suppress-connect-headers", "--max-time", "300"])
        .args(range)
        .args(proxy.iter().flat_map(|proxy| ["-x", proxy]))
        .args(["--", &format!("{scheme}://{rest}")])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let answer = fetch.stdout.take().ok_or_else(|| io::Error::other("no pipe"))?;
    let passed = pass(BufReader::new(answer), &mut stream);
    let ended = fetch.wait()?;
    passed?;
    stream.conn.send_close_notify();
    stream.flush()?;
    if ended.success() { Ok(()) } else { Err(io::Error::other("curl failed")) }
}

/// Passes the last answer on, those that only lead there not, and says that no other will come on the connection.
fn pass(mut from: impl BufRead, to: &mut impl Write) -> io::Result<()> {
    let head = loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if from.read_line(&mut head)? == 0 {
                let gone = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                return to.write_all(gone);
            }
        }
        if !head.split(' ').nth(1).is_some_and(|status| status.starts_with(['1', '3'])) {
            break head;
        }
    };
    for line in head.lines().filter(|line| !line.is_empty()) {
        if !line.to_ascii_lowercase().starts_with("connection:") {
            write!(to, "{line}\r\n")?;
        }
    }
    to.write_all(b"Connection: close\r\n\r\n")?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            return to.flush();
        }
        to.write_all(&buffer[..read])?;
    }
}
