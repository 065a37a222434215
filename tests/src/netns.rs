//! Test networks made from network namespaces: a host, and an internet of one machine behind it. Needs root and iproute2. The
//! machine's own network is not touched, and everything disappears with the test's process.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The host's address.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The internet's router and name server.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Its web server, which returns the address that a request came from.
pub const SITE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// A private network that the host can reach.
pub const PRIVATE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 7);
/// The names that the name server knows, all of them for [`SITE`].
pub const NAMES: [&str; 2] = ["site.example", "other.example"];

/// A network namespace, which exists until this is dropped.
#[derive(Debug)]
pub struct Namespace {
    /// The process that holds it; it exits when its stdin is closed.
    holder: Child,
}

impl Namespace {
    /// An empty one, with its loopback up.
    #[allow(clippy::new_without_default, reason = "it starts a process")]
    pub fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && echo up && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut line = String::new();
        let out = holder.stdout.take().expect("its stdout is a pipe");
        BufReader::new(out).read_line(&mut line).expect("it says that it is up");
        assert_eq!(line, "up\n", "a network namespace takes root and the package iproute2");
        Self { holder }
    }

    /// Its path in the filesystem.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.holder.id()).into()
    }

    /// Runs `ip` in it; returns the output.
    #[track_caller]
    pub fn ip(&self, line: &str) -> String {
        self.run("ip", line)
    }

    /// Runs `nft` in it; returns the output.
    #[track_caller]
    pub fn nft(&self, line: &str) -> String {
        self.run("nft", line)
    }

    /// A program that is to run in it, without arguments.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }

    #[track_caller]
    fn run(&self, program: &str, line: &str) -> String {
        let mut command = self.command(program);
        command.args(line.split_whitespace());
        let output = command.output().expect("nsenter starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// Its interfaces, except `lo`.
    pub fn links(&self) -> Vec<String> {
        let text = self.ip("-o link");
        let names = text.lines().filter_map(|line| line.split(':').nth(1));
        let names = names.map(|name| name.trim().split('@').next().unwrap_or_default().to_owned());
        names.filter(|name| name != "lo").collect()
    }

    /// Runs something in it, on a separate thread; sockets made there stay in it.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let file = std::fs::File::open(self.path()).expect("the namespace is there");
        let inside = thread::spawn(move || {
            use std::os::fd::AsFd;
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("root may enter it");
            work()
        });
        inside.join().expect("the work in the namespace is done")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// A host, and the internet behind it.
#[derive(Debug)]
pub struct Internet {
    /// The namespace that nexusd runs in.
    pub host: Namespace,
    /// The namespace of the machine behind it.
    pub outside: Namespace,
}

impl Internet {
    /// Makes both, with a name server, web servers and a private network.
    #[allow(clippy::new_without_default, reason = "it starts processes")]
    pub fn new() -> Self {
        let (host, outside) = (Namespace::new(), Namespace::new());
        host.ip(&format!("link add up0 type veth peer name down0 netns {}", outside.holder.id()));
        for (at, name, address) in [(&host, "up0", HOST), (&outside, "down0", ROUTER)] {
            at.ip(&format!("address add {address}/24 dev {name}"));
            at.ip(&format!("link set {name} up"));
        }
        host.ip(&format!("route add default via {ROUTER}"));
        for address in [SITE, PRIVATE] {
            outside.ip(&format!("address add {address}/32 dev lo"));
        }
        let sites = outside
            .within(|| [SITE, PRIVATE].map(|at| TcpListener::bind((at, 80)).expect("port 80 is free")));
        for site in sites {
            thread::spawn(move || serve_web(&site));
        }
        let names = outside.within(|| UdpSocket::bind((ROUTER, 53)).expect("port 53 is free"));
        thread::spawn(move || serve_names(&names));
        Self { host, outside }
    }
}

/// Answers each request with the address that it came from.
fn serve_web(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        thread::spawn(move || {
            let (mut head, mut buffer) = (Vec::new(), [0; 1024]);
            while !head.windows(4).any(|end| end == b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(read @ 1..) => head.extend_from_slice(&buffer[..read]),
                    Ok(0) | Err(_) => return,
                }
            }
            let from = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
            let body = format!("you are {from}\n");
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        });
    }
}

/// Answers queries for the IPv4 address of [`NAMES`]; for everything else the answer is empty.
fn serve_names(socket: &UdpSocket) {
    let mut packet = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut packet) {
        if let Some(answer) = answer(&packet[..length]) {
            let _ = socket.send_to(&answer, from);
        }
    }
}

fn answer(question: &[u8]) -> Option<Vec<u8>> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(std::str::from_utf8(question.get(at..at + length)?).ok()?.to_ascii_lowercase());
        at += length;
    }
    let (kind, end) = (question.get(at..at + 2)?, at + 4);
    let is_known = NAMES.contains(&labels.join(".").as_str());
    let has_answer = is_known && kind == [0, 1];
    let mut message = question.get(..2)?.to_vec();
    // A response, recursion asked for and available; no such name.
    message.extend([0x81, if is_known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(has_answer), 0, 0, 0, 0]);
    message.extend_from_slice(question.get(12..end)?);
    if has_answer {
        // The name of the query, an address of type A in class IN, a TTL of a minute.
        message.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        message.extend(SITE.octets());
    }
    Some(message)
}
