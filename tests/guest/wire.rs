//! A guest's side of test connections: listens on the vsock port [`PORT`], and does what the first line of each connection asks for:
//! `echo`; `sink N`, which swallows N bytes and says `done`; `check N`, which compares them too; `source N W`, which sends N
//! bytes in writes of W; `half`, which counts up to the end of the stream; `hold`, which neither reads nor writes;
//! `dial PORT SOURCE`, which opens a connection to the host and tells what came of it; `pipe N`, which sends N bytes that a program
//! writes to a pipe; `run LINE`, which says `go` and gives the connection to a shell's line as its input and output; `outward WORDS`, which
//! measures the guest's network ([`outward`]); `reboot`.

use std::ffi::{c_int, c_uint, c_void};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

#[path = "outward.rs"]
mod outward;
#[path = "pattern.rs"]
mod pattern;

const PORT: u32 = 300;
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const SOCK_CLOEXEC: c_int = 0o2000000;
const RB_AUTOBOOT: c_int = 0x0123_4567;

#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const Address, length: c_uint) -> c_int;
    fn connect(fd: c_int, address: *const Address, length: c_uint) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept(fd: c_int, address: *mut c_void, length: *mut c_uint) -> c_int;
    fn reboot(what: c_int) -> c_int;
}

/// Reboots the machine.
pub fn restart() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { reboot(RB_AUTOBOOT) }).map(drop)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn at(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK as u16, reserved: 0, port, cid, flags: 0, zero: [0; 3] }
}

fn vsock() -> io::Result<File> {
    // SAFETY: no pointers; the descriptor is new and nobody else's.
    unsafe { Ok(File::from_raw_fd(check(socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0))?)) }
}

fn bind_to(socket: &File, port: u32) -> io::Result<()> {
    // SAFETY: the address lives through the call and has the length given.
    check(unsafe { bind(socket.as_raw_fd(), &at(ANY, port), size_of::<Address>() as c_uint) }).map(drop)
}

/// Connects to a port of the host, from this port (0: any).
pub fn dial(port: u32, source: u32) -> io::Result<File> {
    let socket = vsock()?;
    if source != 0 {
        bind_to(&socket, source)?;
    }
    // SAFETY: the address lives through the call and has the length given.
    check(unsafe { connect(socket.as_raw_fd(), &at(HOST, port), size_of::<Address>() as c_uint) })?;
    Ok(socket)
}

/// A listener on [`PORT`].
pub fn listener() -> io::Result<File> {
    let listener = vsock()?;
    bind_to(&listener, PORT)?;
    // SAFETY: no pointers.
    check(unsafe { listen(listener.as_raw_fd(), 128) })?;
    Ok(listener)
}

/// Serves the connections of a listener, each in a thread of its own.
pub fn accept_all(listener: &File) -> io::Result<()> {
    loop {
        // SAFETY: the address is not asked for; the descriptor is new and nobody else's.
        let socket = unsafe {
            let fd = accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
            OwnedFd::from_raw_fd(check(fd)?)
        };
        serve_apart(socket)?;
    }
}

/// Serves a connection in a thread of its own.
pub fn serve_apart(socket: OwnedFd) -> io::Result<()> {
    std::thread::Builder::new().stack_size(128 << 10).spawn(move || serve(socket)).map(drop)
}

/// Writes `total` bytes in writes of `size`.
pub fn source(mut to: &File, total: usize, size: usize) -> io::Result<()> {
    let size = size.max(1);
    let mut bytes = vec![0; size + pattern::PERIOD];
    pattern::fill(&pattern::pattern(), 0, &mut bytes);
    let mut sent = 0;
    while sent < total {
        let (from, count) = (sent % pattern::PERIOD, size.min(total - sent));
        to.write_all(&bytes[from..from + count])?;
        sent += count;
    }
    Ok(())
}

/// Does what the first line of a connection asks for.
fn serve(socket: OwnedFd) -> io::Result<()> {
    let socket = File::from(socket);
    let mut reader = BufReader::with_capacity(64, &socket);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<usize>().ok()).unwrap_or(0);
    let mut writer = &socket;
    let mut buffer = vec![0; 256 << 10];
    match words.first().copied() {
        Some("echo") => loop {
            match reader.read(&mut buffer)? {
                0 => return Ok(()),
                count => writer.write_all(&buffer[..count])?,
            }
        },
        Some(what @ ("sink" | "check")) => {
            let pattern = if what == "check" { pattern::pattern() } else { vec![] };
            let (total, mut seen) = (number(1), 0);
            while seen < total {
                let count = reader.read(&mut buffer)?;
                if count == 0 {
                    return writeln!(writer, "ended after {seen}");
                }
                if what == "check" && !pattern::matches(&pattern, seen, &buffer[..count]) {
                    return writeln!(writer, "wrong between {seen} and {}", seen + count);
                }
                seen += count;
            }
            writer.write_all(b"done\n")
        }
        Some("source") => {
            source(writer, number(1), number(2))?;
            // Keeps the connection until the host has all and closes.
            reader.read(&mut buffer).map(drop)
        }
        Some("half") => {
            let mut seen = 0;
            loop {
                match reader.read(&mut buffer)? {
                    0 => return writeln!(writer, "{seen}"),
                    count => seen += count,
                }
            }
        }
        Some("hold") => loop {
            std::thread::park();
        },
        Some("dial") => match dial(number(1) as u32, number(2) as u32) {
            Ok(host) => {
                (&host).write_all(b"hello from the guest\n")?;
                let mut answer = String::new();
                BufReader::new(&host).read_line(&mut answer)?;
                writeln!(writer, "answered {}", answer.trim_end())
            }
            Err(error) => writeln!(writer, "refused {}", error.raw_os_error().unwrap_or(0)),
        },
        Some("pipe") => {
            let mut child = Command::new("/proc/self/exe");
            let mut child =
                child.args(["source", &number(1).to_string(), "65536"]).stdout(Stdio::piped()).spawn()?;
            let mut pipe = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
            buffer.truncate(64 << 10);
            loop {
                match pipe.read(&mut buffer)? {
                    0 => break,
                    count => writer.write_all(&buffer[..count])?,
                }
            }
            child.wait().map(drop)
        }
        Some("run") => {
            let line = line.trim_end().strip_prefix("run ").unwrap_or_default();
            // The reader may hold what comes earlier.
            writer.write_all(b"go\n")?;
            let mut child = Command::new("sh");
            child.args(["-c", line]).stdin(socket.try_clone()?).stdout(socket.try_clone()?);
            child.spawn()?.wait().map(drop)
        }
        Some("outward") => outward::serve(&words[1..], writer),
        Some("reboot") => restart(),
        _ => writeln!(writer, "what? {line:?}"),
    }
}
