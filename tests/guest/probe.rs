//! `/init` of a guest that tests the vsock device: a program of one file, for the standard library alone, so that the tests
//! can compile it for the guest with `rustc`.
//!
//! It loads the kernel modules, listens on [`PORT`], dials the host's port 1024 to say that it is up, and then does what the
//! first line of each connection asks for:
//! `echo`; `sink N`, which swallows N bytes and says `done`; `check N`, which compares them too; `source N W`, which sends N
//! bytes in writes of W; `half`, which counts up to the end of the stream; `hold`, which neither reads nor writes;
//! `dial PORT SOURCE`, which opens a connection to the host and tells what came of it; `reboot`.

use std::ffi::{CString, c_char, c_int, c_long, c_uint, c_void};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

mod pattern;

const PORT: u32 = 300;
const HELLO_PORT: u32 = 1024;
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const SOCK_CLOEXEC: c_int = 0o2000000;
const RB_AUTOBOOT: c_int = 0x0123_4567;
#[cfg(target_arch = "x86_64")]
const SYS_FINIT_MODULE: c_long = 313;
#[cfg(target_arch = "aarch64")]
const SYS_FINIT_MODULE: c_long = 273;

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
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(what: c_int) -> c_int;
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: u64,
        data: *const c_void,
    ) -> c_int;
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

fn dial(port: u32, source: u32) -> io::Result<File> {
    let socket = vsock()?;
    if source != 0 {
        bind_to(&socket, source)?;
    }
    // SAFETY: the address lives through the call and has the length given.
    check(unsafe { connect(socket.as_raw_fd(), &at(HOST, port), size_of::<Address>() as c_uint) })?;
    Ok(socket)
}

fn load_modules() -> io::Result<()> {
    let order = std::fs::read_to_string("/modules/order")?;
    for name in order.lines() {
        let file = File::open(format!("/modules/{name}"))?;
        let parameters = CString::default();
        // SAFETY: the descriptor is open and the string ends with a zero.
        if unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), parameters.as_ptr(), 0 as c_int) } < 0 {
            return Err(io::Error::other(format!("{name}: {}", io::Error::last_os_error())));
        }
    }
    Ok(())
}

fn serve(socket: File) -> io::Result<()> {
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
            let (total, size) = (number(1), number(2).max(1));
            let mut bytes = vec![0; size + pattern::PERIOD];
            pattern::fill(&pattern::pattern(), 0, &mut bytes);
            let mut sent = 0;
            while sent < total {
                let (from, count) = (sent % pattern::PERIOD, size.min(total - sent));
                writer.write_all(&bytes[from..from + count])?;
                sent += count;
            }
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
        Some("reboot") => {
            // SAFETY: no pointers.
            check(unsafe { reboot(RB_AUTOBOOT) }).map(drop)
        }
        _ => writeln!(writer, "what? {line:?}"),
    }
}

fn run() -> io::Result<()> {
    // SAFETY: all strings end with a zero; no data.
    unsafe { mount(c"dev".as_ptr(), c"/dev".as_ptr(), c"devtmpfs".as_ptr(), 0, std::ptr::null()) };
    load_modules()?;
    let listener = vsock()?;
    bind_to(&listener, PORT)?;
    // SAFETY: no pointers.
    check(unsafe { listen(listener.as_raw_fd(), 128) })?;
    println!("probe: up");
    std::thread::spawn(|| match dial(HELLO_PORT, HELLO_PORT - 1) {
        Ok(mut host) => drop(host.write_all(b"up\n")),
        Err(error) => println!("probe: nobody to greet: {error}"),
    });
    loop {
        // SAFETY: the address is not asked for; the descriptor is new and nobody else's.
        let socket = unsafe {
            let fd = accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut());
            File::from_raw_fd(check(fd)?)
        };
        let thread = std::thread::Builder::new().stack_size(128 << 10);
        thread.spawn(move || serve(socket))?;
    }
}

fn main() {
    if let Err(error) = run() {
        println!("probe failed: {error}");
    }
    // PID 1 may not end: that would be a kernel panic without the last line on the console.
    // SAFETY: no pointers.
    unsafe { reboot(RB_AUTOBOOT) };
}
