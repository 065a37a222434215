//! Dials the host from within a guest: `dial PORT SOURCE LINE` connects from a source port (0: any) to a port of the host,
//! sends the line, and prints `answered TEXT`, `hung up`, or `refused ERRNO`. For the standard library alone, so that the
//! tests can compile it for the guest with `rustc`.

use std::ffi::{c_int, c_uint};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd};

const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;

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
}

fn at(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK as u16, reserved: 0, port, cid, flags: 0, zero: [0; 3] }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn dial(port: u32, source: u32) -> io::Result<File> {
    let length = size_of::<Address>() as c_uint;
    // SAFETY: the descriptor is new and nobody else's; the addresses live through the calls and have the length given.
    unsafe {
        let socket = File::from_raw_fd(check(socket(AF_VSOCK, SOCK_STREAM, 0))?);
        if source != 0 {
            check(bind(socket.as_raw_fd(), &at(ANY, source), length))?;
        }
        check(connect(socket.as_raw_fd(), &at(HOST, port), length))?;
        Ok(socket)
    }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0);
    let line = words.get(3).map_or("", String::as_str);
    let answer = dial(number(1), number(2)).and_then(|mut host| {
        writeln!(host, "{line}")?;
        let mut answer = String::new();
        BufReader::new(&host).read_line(&mut answer)?;
        Ok(answer)
    });
    match answer {
        Ok(answer) if answer.is_empty() => println!("hung up"),
        Ok(answer) => println!("answered {}", answer.trim_end()),
        Err(error) => println!("refused {}", error.raw_os_error().unwrap_or(0)),
    }
}
