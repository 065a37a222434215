//! A minimal DNS client and server for the tests.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use crate::vm::Guest;
use crate::world::{METADATA, Ns, PATIENCE, PRIVATE, PUBLIC, PUBLIC_TOO, PUBLIC_V6, RESOLVER};

pub const A: u16 = 1;
pub const CNAME: u16 = 5;
pub const PTR: u16 = 12;
pub const AAAA: u16 = 28;
pub const HTTPS: u16 = 65;
const OPT: u16 = 41;
pub const OK: u8 = 0;
pub const SERVER_FAILURE: u8 = 2;
pub const NO_SUCH_NAME: u8 = 3;
pub const REFUSED: u8 = 5;
const TTL: u32 = 300;

/// An answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub code: u8,
    pub addresses: Vec<IpAddr>,
    /// The type of each record.
    pub kinds: Vec<u16>,
    pub names: Vec<String>,
    /// The extended error.
    pub error: Option<(u16, String)>,
    pub is_truncated: bool,
    /// The length of the message, in bytes.
    pub length: usize,
}

fn write_name(bytes: &mut Vec<u8>, name: &str) {
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
}

fn read_name(bytes: &[u8], mut at: usize) -> (String, usize) {
    let mut name = String::new();
    let mut end = None;
    loop {
        match bytes[at] {
            0 => return (name, end.unwrap_or(at + 1)),
            length @ 0xc0.. => {
                end = end.or(Some(at + 2));
                at = usize::from(length & 0x3f) << 8 | usize::from(bytes[at + 1]);
            }
            length => {
                if !name.is_empty() {
                    name.push('.');
                }
                let length = usize::from(length);
                name.push_str(&String::from_utf8_lossy(&bytes[at + 1..at + 1 + length]));
                at += 1 + length;
            }
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Encodes a query that allows an answer of this many bytes over UDP.
fn question(name: &str, kind: u16, room: u16) -> Vec<u8> {
    let mut bytes = vec![0x4e, 0x58, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
    write_name(&mut bytes, name);
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1, 0]);
    bytes.extend(OPT.to_be_bytes());
    bytes.extend(room.to_be_bytes());
    bytes.extend([0; 6]);
    bytes
}

fn read_reply(bytes: &[u8]) -> Reply {
    let mut reply = Reply {
        code: bytes[3] & 0xf,
        is_truncated: bytes[2] & 2 != 0,
        length: bytes.len(),
        ..Reply::default()
    };
    let (_, mut at) = read_name(bytes, 12);
    at += 4;
    let answers = u16_at(bytes, 6);
    for number in 0..answers + u16_at(bytes, 8) + u16_at(bytes, 10) {
        let (_, behind) = read_name(bytes, at);
        let (kind, length) = (u16_at(bytes, behind), usize::from(u16_at(bytes, behind + 8)));
        let data = behind + 10;
        let value = &bytes[data..data + length];
        at = data + length;
        if kind == OPT {
            if value.len() > 6 && u16_at(value, 0) == 15 {
                let text = String::from_utf8_lossy(&value[6..]).into_owned();
                reply.error = Some((u16_at(value, 4), text));
            }
            continue;
        }
        if number < answers {
            reply.kinds.push(kind);
        }
        match kind {
            A => reply.addresses.push(IpAddr::from(<[u8; 4]>::try_from(value).unwrap())),
            AAAA => reply.addresses.push(IpAddr::from(<[u8; 16]>::try_from(value).unwrap())),
            CNAME | PTR => reply.names.push(read_name(bytes, data).0),
            _ => {}
        }
    }
    reply
}

impl Guest {
    /// Looks up a name at the gateway.
    pub fn look_up(&self, name: &str, kind: u16) -> Reply {
        self.look_up_at(self.gateway, name, kind).unwrap_or_else(|| panic!("{name} is answered"))
    }

    /// Looks up a name at a server over UDP.
    pub fn look_up_at(&self, server: IpAddr, name: &str, kind: u16) -> Option<Reply> {
        self.look_up_with(server, name, kind, 1232)
    }

    pub fn look_up_with(&self, server: IpAddr, name: &str, kind: u16, room: u16) -> Option<Reply> {
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.ns.run(move || UdpSocket::bind(any)).unwrap();
        socket.connect((server, 53)).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(&question(name, kind, room)).ok()?;
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).ok()?;
        Some(read_reply(&buffer[..length]))
    }

    /// Looks up a name at the gateway over TCP.
    pub fn look_up_by_tcp(&self, name: &str, kind: u16) -> Reply {
        let to = SocketAddr::new(self.gateway, 53);
        let mut stream = self.ns.run(move || TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let question = question(name, kind, 1232);
        stream.write_all(&(question.len() as u16).to_be_bytes()).unwrap();
        stream.write_all(&question).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut bytes).unwrap();
        read_reply(&bytes)
    }
}

/// The names of the internet.
fn records(name: &str) -> Vec<(u16, String)> {
    let one = |kind, data: &str| vec![(kind, data.to_owned())];
    match name {
        "a.example" | "shared.example" | "deep.list.example" => one(A, PUBLIC),
        "b.example" | "target.cdn.example" => one(A, PUBLIC_TOO),
        "six.example" => one(AAAA, PUBLIC_V6),
        "alias.example" => one(CNAME, "middle.cdn.example"),
        "middle.cdn.example" => one(CNAME, "target.cdn.example"),
        "rebind.example" => one(A, PRIVATE),
        "wander.example" => one(CNAME, "stray.cdn.example"),
        "stray.cdn.example" => one(CNAME, "rebind.example"),
        // Addresses of IPv4 within those of IPv6: a private one behind a translator and mapped, and that of metadata behind a tunnel.
        "translated.example" => one(AAAA, "64:ff9b::a63:1"),
        "mapped.example" => one(AAAA, "::ffff:10.99.0.1"),
        "tunnelled.example" => one(AAAA, "2002:a9fe:a9fe::1"),
        "cloud.example" => one(A, METADATA),
        "local.example" => one(A, "127.0.0.1"),
        "vm.example" => one(A, "10.77.0.3"),
        "mixed.example" => vec![(A, PRIVATE.to_owned()), (A, PUBLIC.to_owned())],
        "many.example" => (1..=60).map(|last| (A, format!("203.0.113.{last}"))).collect(),
        "web.example" => one(HTTPS, ""),
        _ => Vec::new(),
    }
}

fn answer(question: &[u8], room: usize) -> Vec<u8> {
    let (name, end) = read_name(question, 12);
    let kind = u16_at(question, end);
    let mut found = Vec::new();
    let mut next = name.to_ascii_lowercase();
    loop {
        let all = records(&next);
        let Some((_, target)) = all.iter().find(|(kind, _)| *kind == CNAME).cloned() else {
            found.extend(
                all.into_iter().filter(|(of, _)| *of == kind).map(|(of, data)| (next.clone(), of, data)),
            );
            break;
        };
        found.push((next, CNAME, target.clone()));
        next = target;
    }
    let is_known = !records(&name.to_ascii_lowercase()).is_empty();
    let mut bytes = question[..2].to_vec();
    bytes.extend([0x81, if is_known { 0x80 } else { 0x83 }, 0, 1]);
    bytes.extend((found.len() as u16).to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(&question[12..end + 4]);
    for (owner, kind, data) in &found {
        write_name(&mut bytes, owner);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(TTL.to_be_bytes());
        let data = match (kind, data.parse::<IpAddr>()) {
            (_, Ok(IpAddr::V4(v4))) => v4.octets().to_vec(),
            (_, Ok(IpAddr::V6(v6))) => v6.octets().to_vec(),
            (&HTTPS, _) => vec![0, 1, 0],
            _ => {
                let mut name = Vec::new();
                write_name(&mut name, data);
                name
            }
        };
        bytes.extend((data.len() as u16).to_be_bytes());
        bytes.extend(data);
    }
    if bytes.len() > room {
        bytes.truncate(end + 4);
        bytes[2] |= 2;
        bytes[6..8].copy_from_slice(&[0, 0]);
    }
    bytes
}

/// Runs the internet's server.
pub fn serve_names(internet: &Ns) {
    let at: SocketAddr = format!("{RESOLVER}:53").parse().unwrap();
    let (udp, tcp) = internet.run(move || (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap()));
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(&answer(&buffer[..length], 512), from);
        }
    });
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
                    if stream.read_exact(&mut bytes).is_err() {
                        return;
                    }
                    let answer = answer(&bytes, usize::MAX);
                    let mut framed = (answer.len() as u16).to_be_bytes().to_vec();
                    framed.extend(answer);
                    if stream.write_all(&framed).is_err() {
                        return;
                    }
                }
            });
        }
    });
}
