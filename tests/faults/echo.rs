//! A server on the loopback that sends back what it is sent.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// How often anything was accepted by a server of a test.
pub(crate) static ACCEPTED: AtomicUsize = AtomicUsize::new(0);

/// A server that sends back what it is sent, and its length behind it once the client has no more.
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
