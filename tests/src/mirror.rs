//! The package archives that this host's apt uses, behind a TLS server on the loopback interface with an unknown CA and a
//! password, and a proxy to it with a password too. Only clients with all of that configuration get through.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::{fs, thread};

use data_encoding::BASE64;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

/// The name in its certificate.
const NAME: &str = "localhost";
/// The user name for both.
const USER: &str = "someone";
/// The password of the mirror and of the proxy.
pub const PASSWORD: &str = "s3cret-of-the-host";
/// Where apt keeps its configuration.
const APT: &str = "etc/apt";

/// A running server; it stops with the test's process.
#[derive(Debug)]
pub struct Mirror {
    root: TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// A request; for one to the proxy the path is the server's address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The requested path.
    pub path: String,
    /// The user agent.
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
        let gate = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let conf = root.path().join(APT).join("apt.conf.d");
        fs::create_dir_all(&conf).expect("a directory for options");
        let through = gate.local_addr().expect("a listener has an address");
        let option = format!("Acquire::https::Proxy \"http://{USER}:{PASSWORD}@{through}\";\n");
        fs::write(conf.join("80proxy"), option).expect("options are written");
        let noted = asked.clone();
        thread::spawn(move || {
            for stream in gate.incoming().flatten() {
                let noted = noted.clone();
                thread::spawn(move || lead(stream, address, &noted).ok());
            }
        });
        let (noted, proxy) = (asked.clone(), apt_proxy());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (server, noted, proxy) = (server.clone(), noted.clone(), proxy.clone());
                // A client may disconnect, or refuse to trust the server.
                thread::spawn(move || serve(stream, server, &noted, proxy.as_deref()).ok());
            }
        });
        Self { root, asked }
    }

    /// A root directory whose apt downloads everything from here.
    pub fn apt_root(&self) -> &Path {
        self.root.path()
    }

    /// The certificate of the CA.
    pub fn ca_file(&self) -> PathBuf {
        self.root.path().join("ca.pem")
    }

    /// The requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The same archives over plain HTTP, without a password. The server stops with the test's process.
#[derive(Debug)]
pub struct Archive {
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Archive {
    /// Serves them on a socket, which may be in another network namespace; they are fetched from that of the test. The path of a file is its
    /// URL without the colon: `/http/HOST/PATH`.
    pub fn serve(listener: TcpListener) -> Self {
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let (noted, proxy) = (asked.clone(), apt_proxy());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (noted, proxy) = (noted.clone(), proxy.clone());
                // A client may disconnect.
                thread::spawn(move || {
                    let head = Head::read(&mut BufReader::new(stream.try_clone()?))?;
                    fetch(head, &mut &stream, &noted, proxy.as_deref())
                });
            }
        });
        Self { asked }
    }

    /// The requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A certificate issued by a new CA, and the CA's certificate.
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

/// The sources of this host's apt, redirected through this server.
fn configure(root: &Path, address: SocketAddr) {
    let (own, apt) = (Path::new("/").join(APT), root.join(APT));
    let parts = apt.join("sources.list.d");
    fs::create_dir_all(&parts).expect("a directory for sources");
    for trusted in ["keyrings", "trusted.gpg", "trusted.gpg.d"] {
        std::os::unix::fs::symlink(own.join(trusted), apt.join(trusted)).expect("a link to keys");
    }
    std::os::unix::fs::symlink("/usr", root.join("usr")).expect("a link to keyrings");
    // The first address contains the password, the others get it from a file of apt's.
    let place = format!("{NAME}:{}", address.port());
    let login = format!("machine {place} login {USER} password {PASSWORD}\n");
    let logins = apt.join("auth.conf.d");
    fs::create_dir_all(&logins).expect("a directory for passwords");
    fs::write(logins.join("mirror.conf"), login).expect("a password is written");
    let rewrite = |from: &Path, to: &Path| {
        let Ok(text) = fs::read_to_string(from) else { return };
        // In one pass, because the replacement contains a scheme too.
        let text = text.replace("https://", "\0https/").replace("http://", "\0http/");
        let text = text.replacen('\0', &format!("https://{USER}:{PASSWORD}@{place}/"), 1);
        fs::write(to, text.replace('\0', &format!("https://{place}/"))).expect("sources are written");
    };
    rewrite(&own.join("sources.list"), &apt.join("sources.list"));
    for entry in fs::read_dir(own.join("sources.list.d")).into_iter().flatten().flatten() {
        rewrite(&entry.path(), &parts.join(entry.file_name()));
    }
}

/// The proxy of this host's apt, if it has one.
pub(crate) fn apt_proxy() -> Option<String> {
    let told = Command::new("apt-config").args(["shell", "PROXY", "Acquire::http::Proxy"]).output().ok()?;
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    let proxy = text.split('\'').nth(1)?.to_owned();
    (!proxy.is_empty() && proxy != "DIRECT").then_some(proxy)
}

/// The head of a request.
#[derive(Debug, Default)]
struct Head {
    path: String,
    agent: String,
    /// Arguments for curl.
    range: Vec<String>,
    /// Whether the password is right.
    is_allowed: bool,
}

impl Head {
    fn read(lines: &mut impl BufRead) -> io::Result<Self> {
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let mut head =
            Self { path: line.split(' ').nth(1).unwrap_or_default().to_owned(), ..Self::default() };
        let login = format!("Basic {}", BASE64.encode(format!("{USER}:{PASSWORD}").as_bytes()));
        loop {
            line.clear();
            if lines.read_line(&mut line)? == 0 || line.trim().is_empty() {
                return Ok(head);
            }
            let Some((name, value)) = line.trim().split_once(": ") else { continue };
            match name.to_ascii_lowercase().as_str() {
                "user-agent" => value.clone_into(&mut head.agent),
                "range" | "if-range" => head.range.extend(["-H".to_owned(), line.trim().to_owned()]),
                "authorization" | "proxy-authorization" => head.is_allowed = value == login,
                _ => {}
            }
        }
    }
}

/// Connects a client of the proxy to the mirror, and refuses everything else.
fn lead(client: TcpStream, mirror: SocketAddr, asked: &Mutex<Vec<Asked>>) -> io::Result<()> {
    let mut lines = BufReader::new(client.try_clone()?);
    let Head { path, agent, is_allowed, .. } = Head::read(&mut lines)?;
    let mut to_client = client;
    if !is_allowed || path != format!("{NAME}:{}", mirror.port()) {
        return to_client
            .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n");
    }
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { path, agent });
    let mut server = TcpStream::connect(mirror)?;
    to_client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let mut answers = server.try_clone()?;
    thread::spawn(move || {
        let passed = io::copy(&mut answers, &mut to_client);
        to_client.shutdown(std::net::Shutdown::Both).ok();
        passed
    });
    let passed = io::copy(&mut lines, &mut server);
    server.shutdown(std::net::Shutdown::Both)?;
    passed.map(|_| ())
}

fn serve(
    stream: TcpStream,
    server: Arc<ServerConfig>,
    asked: &Mutex<Vec<Asked>>,
    proxy: Option<&str>,
) -> io::Result<()> {
    let connection = ServerConnection::new(server).map_err(io::Error::other)?;
    let mut lines = BufReader::new(StreamOwned::new(connection, stream));
    let head = Head::read(&mut lines)?;
    let mut stream = lines.into_inner();
    if !head.is_allowed {
        let realm = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"mirror\"\r\n";
        return write!(stream, "{realm}Content-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let fetched = fetch(head, &mut stream, asked, proxy);
    stream.conn.send_close_notify();
    stream.flush()?;
    fetched
}

/// Answers a request with the file of the archive.
fn fetch(
    head: Head,
    stream: &mut impl Write,
    asked: &Mutex<Vec<Asked>>,
    proxy: Option<&str>,
) -> io::Result<()> {
    let Head { path, agent, range, .. } = head;
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { path: path.clone(), agent });
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
    let passed = pass(BufReader::new(answer), stream);
    let ended = fetch.wait()?;
    passed?;
    if ended.success() { Ok(()) } else { Err(io::Error::other("curl failed")) }
}

/// Passes on only the final response, without redirects, and announces that the connection will be closed.
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
