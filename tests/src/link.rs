//! The guest's end of the guest link, for programs that stand in for guests. They are started in their VM's directory.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

/// Says hello as a well-behaved guest does; returns the connection and the host's answer.
pub fn hello(protocol: &Value) -> io::Result<(UnixStream, Value)> {
    let mut host = UnixStream::connect("v.sock_1024")?;
    let hello = json!({ "type": "hello", "protocol": protocol, "min_protocol": protocol, "build": "0.0.0", "kernel": "6.1",
        "arch": "x86_64", "kernel_boot_id": "0", "uptime_ms": 1, "init": "agent" });
    say(&mut host, &hello)?;
    let mut line = String::new();
    BufReader::new(host.try_clone()?).read_line(&mut line)?;
    Ok((host, serde_json::from_str(&line)?))
}

/// Writes one line.
pub fn say(stream: &mut UnixStream, message: &Value) -> io::Result<()> {
    stream.write_all(format!("{message}\n").as_bytes())
}

/// Says bye.
pub fn bye(token: &Value, reason: &str, guessed: bool) -> io::Result<()> {
    let mut host = UnixStream::connect("v.sock_1024")?;
    say(&mut host, &json!({ "type": "bye", "token": token, "reason": reason, "guessed": guessed }))?;
    let mut answer = String::new();
    BufReader::new(host).read_line(&mut answer)?;
    Ok(())
}
