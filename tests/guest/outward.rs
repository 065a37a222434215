//! A guest's side of measurements of its network. Each answers with a line: how long it took, in nanoseconds, or `failed` and why.
//! `fetch PLACE N [PROXY]` and `push PLACE N [PROXY]` carry N bytes over TCP, from a server that is asked to `source` them and to one that
//! is asked to `sink` them; `connect PLACE TIMES [PROXY]`; `look-up SERVER NAME TIMES`; `ping ADDRESS TIMES`. `interface ADDRESS GATEWAY`
//! gives `eth0` an address in a /24 network and a default route.

use std::ffi::{c_int, c_ulong, c_void};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// The timeout of everything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two connections, in which both ends finish with the one before.
const PAUSE: Duration = Duration::from_millis(2);
const BLOCK: usize = 256 << 10;
const AF_INET: c_int = 2;
const SOCK_DGRAM: c_int = 2;
const SOCK_RAW: c_int = 3;
const ICMP: c_int = 1;
/// Requests of linux/sockios.h: add a route; set flags, address and mask of an interface.
const SIOCADDRT: c_ulong = 0x890b;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const SIOCSIFADDR: c_ulong = 0x8916;
const SIOCSIFNETMASK: c_ulong = 0x891c;

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int;
}

/// Does what the words say, and answers.
pub fn serve(words: &[&str], mut to: impl Write) -> io::Result<()> {
    match measure(words) {
        Ok(times) => {
            let times: Vec<String> = times.iter().map(|time| time.as_nanos().to_string()).collect();
            writeln!(to, "{}", times.join(" "))
        }
        Err(error) => writeln!(to, "failed {error}"),
    }
}

fn measure(words: &[&str]) -> io::Result<Vec<Duration>> {
    match words {
        ["fetch", place, bytes, proxy @ ..] => Ok(vec![fetch(place, number(bytes)?, proxy.first())?]),
        ["push", place, bytes, proxy @ ..] => Ok(vec![push(place, number(bytes)?, proxy.first())?]),
        ["connect", place, times, proxy @ ..] => repeat(times, |_| open(place, proxy.first()).map(drop)),
        ["look-up", server, name, times] => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((*server, 53))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            repeat(times, |at| look_up(&socket, name, at))
        }
        ["ping", address, times] => {
            let socket = UdpSocket::from(inet(SOCK_RAW, ICMP)?);
            socket.connect((*address, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            repeat(times, |at| ping(&socket, at))
        }
        ["interface", address, gateway] => {
            set_up(parse(address)?, parse(gateway)?)?;
            Ok(Vec::new())
        }
        _ => Err(invalid("unknown words")),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

fn number(word: &str) -> io::Result<usize> {
    word.parse().map_err(|_| invalid("not a number"))
}

fn parse(word: &str) -> io::Result<Ipv4Addr> {
    word.parse().map_err(|_| invalid("not an address"))
}

fn repeat(times: &str, mut work: impl FnMut(u16) -> io::Result<()>) -> io::Result<Vec<Duration>> {
    let once = |at: usize| {
        std::thread::park_timeout(PAUSE);
        let start = Instant::now();
        work(at as u16)?;
        Ok(start.elapsed())
    };
    (0..number(times)?).map(once).collect()
}

/// Connects, directly or through a proxy.
fn open(place: &str, proxy: Option<&&str>) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(proxy.map_or(place, |proxy| *proxy))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    if proxy.is_some() {
        stream.write_all(format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n").as_bytes())?;
        let (mut answer, mut buffer) = (Vec::new(), [0; 1024]);
        // The server says nothing before it is asked, so nothing of it is read here.
        while !answer.ends_with(b"\r\n\r\n") {
            match stream.read(&mut buffer)? {
                0 if answer.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
                // A refusal has a body, and ends the connection.
                0 => break,
                count => answer.extend_from_slice(&buffer[..count]),
            }
        }
        if !answer.starts_with(b"HTTP/1.1 200") || !answer.ends_with(b"\r\n\r\n") {
            return Err(io::Error::other(String::from_utf8_lossy(&answer).replace(['\r', '\n'], " ")));
        }
    }
    Ok(stream)
}

fn fetch(place: &str, bytes: usize, proxy: Option<&&str>) -> io::Result<Duration> {
    let mut stream = open(place, proxy)?;
    let (mut buffer, mut seen) = (vec![0; BLOCK], 0);
    let start = Instant::now();
    stream.write_all(format!("source {bytes}\n").as_bytes())?;
    while seen < bytes {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => seen += count,
        }
    }
    Ok(start.elapsed())
}

fn push(place: &str, bytes: usize, proxy: Option<&&str>) -> io::Result<Duration> {
    let mut stream = open(place, proxy)?;
    let (block, mut sent) = (vec![7; BLOCK], 0);
    let start = Instant::now();
    stream.write_all(format!("sink {bytes}\n").as_bytes())?;
    while sent < bytes {
        let count = BLOCK.min(bytes - sent);
        stream.write_all(&block[..count])?;
        sent += count;
    }
    stream.read_exact(&mut [0; 5])?;
    Ok(start.elapsed())
}

/// Asks for the IPv4 address of a name.
fn look_up(socket: &UdpSocket, name: &str, id: u16) -> io::Result<()> {
    let mut question = id.to_be_bytes().to_vec();
    // Recursion is desired; one question.
    question.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend_from_slice(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    socket.send(&question)?;
    let mut answer = [0; 1500];
    loop {
        let length = socket.recv(&mut answer)?;
        if length < 12 || answer[..2] != id.to_be_bytes() {
            continue;
        }
        let (code, answers) = (answer[3] & 0xf, u16::from_be_bytes([answer[6], answer[7]]));
        return if code == 0 && answers > 0 {
            Ok(())
        } else {
            Err(io::Error::other(format!("DNS code {code}")))
        };
    }
}

/// Sends an ICMP echo request, and waits for the answer.
fn ping(socket: &UdpSocket, sequence: u16) -> io::Result<()> {
    let [high, low] = sequence.to_be_bytes();
    let mut packet = [8, 0, 0, 0, b'n', b'x', high, low];
    let sum = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    socket.send(&packet)?;
    let mut answer = [0; 1500];
    loop {
        let length = socket.recv(&mut answer)?;
        // After the header of IP.
        let body = &answer[usize::from(answer[0] & 0xf) * 4..length];
        if body.len() >= 8 && body[0] == 0 && body[4..8] == packet[4..8] {
            return Ok(());
        }
    }
}

fn inet(kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor is new and nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(check(socket(AF_INET, kind, protocol))?)) }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A `struct sockaddr_in`.
fn socket_address(address: Ipv4Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&(AF_INET as u16).to_ne_bytes());
    bytes[4..8].copy_from_slice(&address.octets());
    bytes
}

/// Gives the interface an address in a /24 network and the default route.
fn set_up(address: Ipv4Addr, gateway: Ipv4Addr) -> io::Result<()> {
    let control = inet(SOCK_DGRAM, 0)?;
    let ask = |request: c_ulong, argument: &mut [u8]| {
        // SAFETY: the argument lives through the call, and is as long as the structure of this request.
        check(unsafe { ioctl(control.as_raw_fd(), request, argument.as_mut_ptr().cast()) }).map(drop)
    };
    // `struct ifreq`: a name and a value.
    let about = |value: &[u8]| {
        let mut request = [0; 40];
        request[..4].copy_from_slice(b"eth0");
        request[16..16 + value.len()].copy_from_slice(value);
        request
    };
    ask(SIOCSIFADDR, &mut about(&socket_address(address)))?;
    ask(SIOCSIFNETMASK, &mut about(&socket_address(Ipv4Addr::new(255, 255, 255, 0))))?;
    // IFF_UP and IFF_RUNNING.
    ask(SIOCSIFFLAGS, &mut about(&0x41_u16.to_ne_bytes()))?;
    // `struct rtentry`: destination, gateway and mask, and the flags RTF_UP and RTF_GATEWAY.
    let mut route = [0; 120];
    for (at, of) in [(8, Ipv4Addr::UNSPECIFIED), (24, gateway), (40, Ipv4Addr::UNSPECIFIED)] {
        route[at..at + 16].copy_from_slice(&socket_address(of));
    }
    route[56..58].copy_from_slice(&3_u16.to_ne_bytes());
    ask(SIOCADDRT, &mut route)
}
