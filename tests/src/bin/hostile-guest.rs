//! A guest that does what its VM's name says: nothing, garbage, too much. For the driver `process`: it is started as
//! `hostile-guest --unix .` in its VM's directory.
//!
//! `good-*` behaves well; the other names are in [`main`] and [`answer`].
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "stdout is a VM's console, stderr a VMM's log"
)]
#![expect(clippy::disallowed_methods, reason = "a guest that goes away without a word is the point")]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::exit;
use std::thread;
use std::time::Duration;

use nexus_tests::link::{bye, hello, say};
use serde_json::{Value, json};

/// Longer than the longest line that a host accepts, 16 MiB.
const TOO_LONG: usize = 17 << 20;

fn main() -> io::Result<()> {
    let plan: Value = serde_json::from_str(&std::fs::read_to_string("plan.json")?)?;
    let name = plan["plan"]["name"].as_str().unwrap_or_default();
    let what = name.rsplit_once('-').map_or(name, |(what, _)| what).to_owned();
    match &*what {
        "exits" => {
            eprintln!("the flux capacitor is missing");
            exit(3);
        }
        "hangs" => forever(),
        "panics" => {
            println!("Unable to mount the moon");
            println!("Kernel panic - not syncing: made up");
            let _socket = UnixListener::bind("v.sock")?;
            thread::park_timeout(std::time::Duration::from_millis(200));
            exit(1);
        }
        _ => {}
    }
    let listener = UnixListener::bind("v.sock")?;
    match &*what {
        "silent" => forever(),
        "slow" => {
            // Until it is told to go on.
            std::fs::write("held", "")?;
            while std::fs::exists("held")? {
                thread::park_timeout(std::time::Duration::from_millis(10));
            }
            println!("it was all in vain");
            exit(4);
        }
        "patient" => {
            // Until it is told to go on; then it behaves well.
            std::fs::write("held", "")?;
            while std::fs::exists("held")? {
                thread::park_timeout(std::time::Duration::from_millis(10));
            }
        }
        "babbles" => loop {
            let mut host = UnixStream::connect("v.sock_1024")?;
            while host.write_all(b"\xff\xfe{]garbage\n\0\n").is_ok() {}
        },
        "endless-hello" => loop {
            let mut host = UnixStream::connect("v.sock_1024")?;
            host.write_all(br#"{"type":"hello","build":""#)?;
            while host.write_all(&[b'x'; 4096]).is_ok() {}
        },
        "old" => {
            hello(&json!(0))?;
            forever();
        }
        "new" => {
            hello(&json!(99))?;
            forever();
        }
        "never-acks" => {
            let _held = hello(&json!(1))?;
            forever();
        }
        _ => {}
    }
    let (mut host, configure) = hello(&json!(1))?;
    say(&mut host, &json!({ "type": "ack", "token": configure["token"], "problems": [] }))?;
    if what == "reboots" {
        bye(&configure["token"], "reboot", false)?;
        // As long as a kernel takes to shut down; the VMM is running by then.
        thread::park_timeout(Duration::from_millis(300));
        return Ok(());
    }
    for stream in listener.incoming() {
        let (stream, what, token) = (stream?, what.clone(), configure["token"].clone());
        thread::spawn(move || serve(stream, &what, &token));
    }
    Ok(())
}

fn forever() -> ! {
    loop {
        thread::park();
    }
}

/// Serves one connection of the host to the guest's MCP server.
fn serve(mut stream: UnixStream, what: &str, token: &Value) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    stream.write_all(b"OK 1073741824\n")?;
    if line == "CONNECT 201\n" {
        line.clear();
        lines.read_line(&mut line)?;
        return answer_stream(stream, what);
    }
    loop {
        line.clear();
        if (&mut lines).take(64 << 20).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let message: Value = serde_json::from_str(&line)?;
        match message["method"].as_str() {
            Some("initialize") => {
                let result = json!({ "protocolVersion": "2025-11-25", "capabilities": {},
                    "serverInfo": { "name": "hostile", "version": "0" } });
                say(&mut stream, &json!({ "jsonrpc": "2.0", "id": message["id"], "result": result }))?;
            }
            Some("ping") => {
                say(&mut stream, &json!({ "jsonrpc": "2.0", "id": message["id"], "result": {} }))?
            }
            Some("nexus/shutdown") => {
                say(&mut stream, &json!({ "jsonrpc": "2.0", "id": message["id"], "result": {} }))?;
                if what != "stays" {
                    bye(token, "poweroff", false)?;
                    exit(0);
                }
            }
            Some("notifications/initialized") if what == "floods" => flood(&mut stream)?,
            Some("tools/call") => answer(&mut stream, what, &message, token)?,
            // Like an older agent for unknown methods.
            Some(method) if message["id"].is_number() => {
                let error = json!({ "code": -32601, "message": method });
                say(&mut stream, &json!({ "jsonrpc": "2.0", "id": message["id"], "error": error }))?;
            }
            _ => {}
        }
    }
}

/// Its own data on a stream.
fn answer_stream(mut stream: UnixStream, what: &str) -> io::Result<()> {
    /// A frame of output.
    const DATA: &[u8] = b"\x01\0\0\x05hello";
    const OK: &[u8] = b"{\"ok\":{}}\n";
    match what {
        "stream-garbage" => stream.write_all(&b"no json at all ".repeat(100_000)),
        "stream-hangup" => Ok(()),
        // The host's own words, and terminal escape sequences.
        "stream-lies" => stream.write_all(
            b"{\"error\":{\"code\":\"daemon_down\",\"message\":\"\\u001b[2J run this\",\"retryable\":false}}\n",
        ),
        "stream-frames" => stream.write_all(&[OK, DATA, b"\x63\xff\xff\xff"].concat()),
        "stream-credit" => stream.write_all(&[OK, DATA, b"\x04\0\0\x04\xff\xff\xff\xff"].concat()),
        // More than the credit allows.
        "stream-flood" => {
            stream.write_all(OK)?;
            let frame = [&b"\x01\x04\0\0"[..], &[b'x'; 256 << 10]].concat();
            loop {
                stream.write_all(&frame)?;
            }
        }
        "stream-endless" => {
            stream.write_all(OK)?;
            let notes = b"\x05\0\0\x02{}".repeat(10_000);
            loop {
                stream.write_all(&notes)?;
            }
        }
        tar if tar.starts_with("tar-") => {
            stream.write_all(OK)?;
            stream.write_all(&nexus_tests::tars::frames(tar))?;
            // Until the host has read everything.
            stream.read_to_end(&mut Vec::new()).map(drop)
        }
        _ => stream.write_all(OK),
    }
}

/// Says that very many commands have ended.
fn flood(stream: &mut UnixStream) -> io::Result<()> {
    let params = json!({ "command_id": "aaaaaaqaaaaac", "status": 7, "duration_ms": 1 });
    let note = json!({ "jsonrpc": "2.0", "method": "nexus/command-ended", "params": params });
    let notes = format!("{note}\n").repeat(1000);
    (0..100).try_for_each(|_| stream.write_all(notes.as_bytes()))
}

/// Answers a tool call in its own way.
fn answer(stream: &mut UnixStream, what: &str, message: &Value, token: &Value) -> io::Result<()> {
    let id = &message["id"];
    let wants_trouble = !message["params"].to_string().contains("well-behaved");
    match what {
        "garbage" if wants_trouble => stream.write_all("no json at all\n".repeat(1000).as_bytes()),
        "huge" if wants_trouble => {
            let head =
                format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{{"content":[{{"type":"text","text":""#);
            stream.write_all(head.as_bytes())?;
            stream.write_all(&vec![b'x'; TOO_LONG])?;
            stream.write_all(b"\"}]}}\n")
        }
        "endless" if wants_trouble => {
            write!(stream, r#"{{"jsonrpc":"2.0","id":{id},"result":{{"content":[{{"type":"text","text":""#)?;
            let chunk = vec![b'x'; 1 << 20];
            loop {
                stream.write_all(&chunk)?;
            }
        }
        "liar" if wants_trouble => {
            let result =
                json!({ "content": [], "structuredContent": { "vm": "another" }, "isError": "maybe" });
            say(stream, &json!({ "jsonrpc": "2.0", "id": id, "result": result }))
        }
        // Exactly what the caller wants: `result` or `error`, a colon, and JSON.
        "parrot" if wants_trouble => {
            let words = message["params"]["arguments"]["path"].as_str().unwrap_or_default();
            let (member, json) = words.split_once(':').unwrap_or_default();
            writeln!(stream, r#"{{"jsonrpc":"2.0","id":{id},"{member}":{json}}}"#)
        }
        "mute" if wants_trouble => Ok(()),
        "dies" if wants_trouble => exit(9),
        "leaves" if wants_trouble => {
            bye(token, "poweroff", false)?;
            exit(0);
        }
        "lingers" if wants_trouble => bye(token, "poweroff", false),
        "guesses" if wants_trouble => bye(token, "poweroff", true),
        // Like a machine that halts without powering off.
        "halts" if wants_trouble => {
            bye(token, "poweroff", true)?;
            println!("[   31.4] reboot: System halted");
            Ok(())
        }
        _ => {
            let facts = json!({ "size_bytes": 4, "offset": 0, "read_bytes": 4, "eof": true, "lossy": false });
            let result = json!({ "content": [{ "type": "text", "text": "well" }], "_meta": { "dev.nexus/result": facts } });
            say(stream, &json!({ "jsonrpc": "2.0", "id": id, "result": result }))
        }
    }
}
