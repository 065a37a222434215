//! A loopback server that returns what it receives.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// How many connections all servers of the tests have accepted.
pub(crate) static ACCEPTED: AtomicUsize = AtomicUsize::new(0);

/// Starts a server that returns what it receives, followed by the length once the client has sent everything.
pub(crate) fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let port = listener.local_addr().expect("it has an address").port();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            ACCEPTED.fetch_add(1, Ordering::Relaxed);
            thread::spawn(move || -> std::io::Result<()> {
                let (mut buffer, mut count) = (vec![0; 64 << 10], 0);
                loop {
                    let read = client.read(&mut buffer)?;
                    if read == 0 {
                        break;
                    }
                    count += read;
                    client.write_all(&buffer[..read])?;
                }
                write!(client, "{count}")
            });
        }
    });
    port
}
