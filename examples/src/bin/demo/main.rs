//! The first virtual machine: starts `nexusd --stdio` with its own state directory, speaks MCP with it like any other
//! client, and prints the conversation. `make demo` runs it; `demo NEXUSD DIRECTORY [IMAGE]` does too.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this program's output is its purpose")]

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use nexus_examples::show::{self, Timings};
use nexus_examples::{Client, ClientError};
use serde_json::{Value, json};

const VM: &str = "demo";
const SCRIPT: &str = "\
import os, platform
print('hello from', platform.node())
print('kernel', platform.release(), 'on', os.cpu_count(), 'cpu')
";
/// The same for images without Python.
const SHELL_SCRIPT: &str = "echo hello from $(hostname)\necho kernel $(uname -r) on $(nproc) cpu\n";

/// What the page of this program says.
const PAGE: &str = "a page of the host";
/// Reads from the archive that the image's apt uses what it says of itself.
const ARCHIVE: &str = "list=$(sed -n 's#^deb .*\\(https\\?://[^ ]*\\) \\([^ ]*\\) .*#\\1/dists/\\2/InRelease#p' /etc/apt/sources.list | head -n 1)\n\
    curl -sSf -m 30 \"$list\" | grep -aE '^(Origin|Codename):'";

/// The timeout for the first virtual machine of a host, which downloads a kernel and makes an image.
const FIRST_VM: Duration = Duration::from_mins(20);

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(nexusd), Some(directory)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: demo NEXUSD DIRECTORY [IMAGE]");
        return ExitCode::from(2);
    };
    let image = arguments.next().map(|image| image.to_string_lossy().into_owned());
    match run(PathBuf::from(nexusd), PathBuf::from(directory), image.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\ndemo: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(nexusd: PathBuf, directory: PathBuf, image: Option<&str>) -> Result<(), ClientError> {
    let mut timings = Timings::default();

    show::step("start a daemon of its own and greet it, as any MCP client would");
    let mut client = Client::start(&nexusd, &directory)?;
    let started = Instant::now();
    let hello = client.greet("nexus-demo")?;
    timings.note("daemon started, MCP initialized", started.elapsed());
    show::answer(&hello["serverInfo"], started.elapsed());
    let tools = client.request("tools/list", json!({}))?;
    let names: Vec<&str> =
        tools["tools"].as_array().into_iter().flatten().filter_map(|tool| tool["name"].as_str()).collect();
    show::notes(&format!("{} tools", names.len()), &names);

    // Remains of an interrupted demo.
    let listed = client.call("vm_list", json!({}))?;
    let left = |vm: &Value| vm["name"] == VM;
    if listed["structuredContent"]["vms"].as_array().into_iter().flatten().any(left) {
        show::note("a demo before this one was interrupted: its virtual machine goes first");
        client.call("vm_delete", json!({ "vm": VM, "force": true }))?;
    }

    show::step("create a virtual machine");
    show::note("the first one on this host downloads a kernel and makes the image; later ones find both");
    let started = Instant::now();
    let arguments = match image {
        Some(image) => json!({ "name": VM, "from": image }),
        None => json!({ "name": VM }), // everything has a default
    };
    let made = client.call_to_the_end("vm_create", arguments, FIRST_VM)?;
    timings.note("vm_create: image, drive, boot, ready", started.elapsed());
    let made = client.call("vm_inspect", json!({ "vm": made["result"]["id"] }))?;
    show::boot(&made["structuredContent"], &mut timings);

    show::step("work inside it: run a command, write a program, run it, read a file");
    let timed = |client: &mut Client, timings: &mut Timings, what: &str, tool: &str, arguments: Value| {
        let started = Instant::now();
        let result = client.call(tool, arguments)?;
        timings.note(what, started.elapsed());
        Ok::<_, ClientError>(result)
    };
    timed(
        &mut client,
        &mut timings,
        "guest_run_command, the first",
        "guest_run_command",
        json!({ "vm": VM, "command": "uname -srm; head -n 1 /etc/os-release; id -un" }),
    )?;
    let (path, program, argv) = if image == Some("busybox") {
        ("/opt/demo/hello.sh", SHELL_SCRIPT, json!(["sh", "/opt/demo/hello.sh"]))
    } else {
        ("/opt/demo/hello.py", SCRIPT, json!(["python3", "/opt/demo/hello.py"]))
    };
    timed(
        &mut client,
        &mut timings,
        "guest_file_write",
        "guest_file_write",
        json!({ "vm": VM, "path": path, "content": program, "create_parents": true }),
    )?;
    let ran = timed(
        &mut client,
        &mut timings,
        "guest_run_command",
        "guest_run_command",
        json!({ "vm": VM, "argv": argv }),
    )?;
    expect_text(&ran, &format!("hello from {VM}"))?;
    let read = timed(
        &mut client,
        &mut timings,
        "guest_file_read",
        "guest_file_read",
        json!({ "vm": VM, "path": path }),
    )?;
    expect_text(&read, program.lines().next().unwrap_or_default())?;

    reach_out(&mut client, image)?;

    show::step("stop it and delete it");
    let started = Instant::now();
    client.call_to_the_end("vm_stop", json!({ "vm": VM }), Duration::from_mins(2))?;
    timings.note("vm_stop, a clean shutdown", started.elapsed());
    let started = Instant::now();
    client.call("vm_delete", json!({ "vm": VM }))?;
    timings.note("vm_delete", started.elapsed());
    client.finish()?;

    timings.print();
    println!(
        "\nThat was an agent's view of Nexus. To give it to your own: README.md, \"Connect your client\"."
    );
    Ok(())
}

/// What a virtual machine reaches through the network that it has: the internet, and of this host only what is allowed.
fn reach_out(client: &mut Client, image: Option<&str>) -> Result<(), ClientError> {
    show::step("fetch something through the network that it has");
    if image.is_none() {
        show::note("the internet is open to it; the archive of its packages answers if this host reaches it");
        client.call("guest_run_command", json!({ "vm": VM, "command": ARCHIVE }))?;
    }
    let at = serve_page()?;
    show::note("this host is closed to it, and the result says so; then one port is allowed");
    // Programs would not ask the proxy for an address of the loopback by themselves.
    let fetch = match image {
        Some("busybox") => format!("wget -Y on -q -O - http://{at}/"),
        _ => format!("curl -sS --noproxy '' http://{at}/"),
    };
    let run = json!({ "vm": VM, "command": fetch });
    expect_text(&client.call("guest_run_command", run.clone())?, "refused by policy")?;
    client.call("vm_update", json!({ "vm": VM, "network": { "allow": ["*", at] } }))?;
    expect_text(&client.call("guest_run_command", run)?, PAGE)
}

/// Serves a page on this host as long as this program runs; returns its address and port.
fn serve_page() -> Result<String, ClientError> {
    let failed = |source| ClientError::Io { what: "serve a page on this host".to_owned(), source };
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?.to_string();
    thread::spawn(move || {
        // A client that hangs up has no page.
        listener.incoming().flatten().for_each(|client| drop(answer(&client)));
    });
    Ok(at)
}

fn answer(mut client: &TcpStream) -> io::Result<()> {
    let mut lines = BufReader::new(client).lines();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let length = PAGE.len() + 1;
    write!(client, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{PAGE}\n")
}

/// Fails unless one of a result's text blocks contains `text`.
fn expect_text(result: &Value, text: &str) -> Result<(), ClientError> {
    let mut blocks = result["content"].as_array().into_iter().flatten();
    if blocks.any(|block| block["text"].as_str().is_some_and(|said| said.contains(text))) {
        return Ok(());
    }
    Err(ClientError::Unexpected { wanted: text.to_owned(), got: result.to_string() })
}
