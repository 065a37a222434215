//! The yardstick of streams into a VM: serves plain connections as [`wire`] does, over vsock and on a TCP port of the guest's loopback.
//! `raw source N W` writes N bytes to its standard output instead, in writes of W. A program of one crate, for the standard library alone,
//! so that the benchmark can compile it for the guest with `rustc`.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;

mod wire;

const TCP_PORT: u16 = 300;

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [what, total, size] = &words[..]
        && let ("source", Ok(total), Ok(size)) = (&**what, total.parse(), size.parse())
    {
        // Without the buffer of the library.
        let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        return wire::source(&stdout, total, size);
    }
    let listener = wire::listener()?;
    let loopback = TcpListener::bind(("127.0.0.1", TCP_PORT))?;
    std::thread::spawn(move || {
        for connection in loopback.incoming().flatten() {
            drop(connection.set_nodelay(true));
            drop(wire::serve_apart(connection.into()));
        }
    });
    io::stdout().write_all(b"up\n")?;
    wire::accept_all(&listener)
}
