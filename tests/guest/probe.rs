//! `/init` of a guest that tests the vsock device: a program of one crate, for the standard library alone, so that the tests
//! can compile it for the guest with `rustc`.
//!
//! It loads the kernel modules, listens, dials the host's port 1024 to say that it is up, and then serves connections as [`wire`] does.

use std::ffi::{CString, c_char, c_int, c_long, c_void};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

mod wire;

const HELLO_PORT: u32 = 1024;
#[cfg(target_arch = "x86_64")]
const SYS_FINIT_MODULE: c_long = 313;
#[cfg(target_arch = "aarch64")]
const SYS_FINIT_MODULE: c_long = 273;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: u64,
        data: *const c_void,
    ) -> c_int;
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

fn run() -> io::Result<()> {
    // SAFETY: all strings end with a zero; no data.
    unsafe { mount(c"dev".as_ptr(), c"/dev".as_ptr(), c"devtmpfs".as_ptr(), 0, std::ptr::null()) };
    load_modules()?;
    let listener = wire::listener()?;
    println!("probe: up");
    std::thread::spawn(|| match wire::dial(HELLO_PORT, HELLO_PORT - 1) {
        Ok(mut host) => drop(host.write_all(b"up\n")),
        Err(error) => println!("probe: nobody to greet: {error}"),
    });
    wire::accept_all(&listener)
}

fn main() {
    if let Err(error) = run() {
        println!("probe failed: {error}");
    }
    // PID 1 may not end: that would be a kernel panic without the last line on the console.
    drop(wire::restart());
}
