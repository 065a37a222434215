//! A guest with an MCP server of its own: the tools, prompts and resources that the conformance suite asks for, and some that no guest
//! should have. For the driver `process`: it is started as `fixture-guest --unix .` in its VM's directory.
#![expect(clippy::disallowed_methods, reason = "a guest that goes away with its VM")]

mod offers;
mod session;
mod tools;

use std::io::{self, BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::exit;
use std::sync::Arc;
use std::thread;

use nexus_tests::link::{bye, hello, say};
use serde_json::{Value, json};

use session::{Request, Session};

/// An error of a request: what JSON-RPC calls `error`.
type Failure = Value;

fn failure(code: i32, message: &str) -> Failure {
    json!({ "code": code, "message": message })
}

fn main() -> io::Result<()> {
    let listener = UnixListener::bind("v.sock")?;
    let (mut host, configure) = hello(&json!(1))?;
    say(&mut host, &json!({ "type": "ack", "token": configure["token"], "problems": [] }))?;
    for stream in listener.incoming() {
        let (stream, token) = (stream?, configure["token"].clone());
        // A host that hangs up ends its connection, not the guest.
        thread::spawn(move || drop(serve(stream, &token)));
    }
    Ok(())
}

/// Serves one connection of the host.
fn serve(mut stream: UnixStream, token: &Value) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    lines.read_line(&mut line)?;
    io::Write::write_all(&mut stream, b"OK 1073741824\n")?;
    if line != "CONNECT 200\n" {
        return Ok(());
    }
    let session = Arc::new(Session::new(stream));
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let message: Value = serde_json::from_str(&line)?;
        let Some(method) = message["method"].as_str().map(str::to_owned) else {
            session.answered(message);
            continue;
        };
        if message.get("id").is_none() {
            if method == "notifications/cancelled" {
                session.cancelled(&message["params"]["requestId"]);
            }
            continue;
        }
        let (session, token) = (Arc::clone(&session), token.clone());
        thread::spawn(move || {
            let is_last = method == "nexus/shutdown";
            let id = message["id"].clone();
            let request = Request { id: id.clone(), params: message["params"].clone(), session: &session };
            let outcome = answer(&method, &request);
            let written = session.say(&match outcome {
                Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
                Err(error) => json!({ "jsonrpc": "2.0", "id": id, "error": error }),
            });
            if is_last && written.is_ok() && bye(&token, "poweroff", false).is_ok() {
                exit(0);
            }
        });
    }
}

fn answer(method: &str, request: &Request<'_>) -> Result<Value, Failure> {
    let params = &request.params;
    match method {
        "initialize" => Ok(json!({
            "protocolVersion": "2025-11-25",
            "capabilities": { "tools": {}, "prompts": {}, "resources": {}, "completions": {}, "logging": {} },
            "serverInfo": { "name": "fixture", "version": "0" },
        })),
        "ping" | "nexus/shutdown" => Ok(json!({})),
        "tools/list" => Ok(json!({ "tools": tools::list() })),
        "tools/call" => tools::call(params["name"].as_str().unwrap_or_default(), request),
        "prompts/list" => Ok(json!({ "prompts": offers::prompts() })),
        "prompts/get" => offers::prompt(params),
        "resources/list" => Ok(json!({ "resources": offers::resources() })),
        "resources/templates/list" => Ok(json!({ "resourceTemplates": offers::templates() })),
        "resources/read" => offers::read(params["uri"].as_str().unwrap_or_default()),
        "completion/complete" => Ok(json!({ "completion": { "values": [], "total": 0, "hasMore": false } })),
        _ => Err(failure(-32601, method)),
    }
}
