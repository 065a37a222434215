//! The stdio bridge against daemons that come and go.

use std::io::Write;
use std::process::{Child, ChildStdin, Stdio};

use serde_json::{Value, json};

use crate::fake::{Fake, Lines, Tool, World, finish, gives};

/// A bridge and both its ends.
struct Bridge {
    child: Child,
    stdin: ChildStdin,
    lines: Lines,
}

impl Bridge {
    fn start(world: &World, line: &str) -> Self {
        let mut command = world.command(line);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = Lines::of(child.stdout.take().unwrap());
        let stdin = child.stdin.take().unwrap();
        Self { child, stdin, lines }
    }

    fn send(&mut self, message: &Value) {
        self.stdin.write_all(format!("{message}\n").as_bytes()).unwrap();
    }

    fn initialize(&mut self) {
        let params = json!({ "protocolVersion": "2025-06-18", "capabilities": {},
            "clientInfo": { "name": "a client", "version": "1" } });
        self.send(&json!({ "jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params }));
        let answer = self.lines.next();
        assert_eq!((&answer["id"], &answer["result"]["protocolVersion"]), (&json!(0), &json!("2025-06-18")));
        self.send(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
    }

    fn call(&mut self, id: impl Into<Value>, tool: &str) {
        let params = json!({ "name": tool, "arguments": {} });
        self.send(&json!({ "jsonrpc": "2.0", "id": id.into(), "method": "tools/call", "params": params }));
    }

    /// The client goes away; nothing more may come.
    fn end(self) {
        let Self { child, stdin, lines } = self;
        drop(stdin);
        assert!(lines.is_at_end());
        let run = finish(child);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    }
}

fn never() -> Tool {
    Box::new(|_, _| None)
}

fn methods(fake: &Fake) -> Vec<String> {
    fake.messages().iter().filter_map(|m| Some(m["method"].as_str()?.to_owned())).collect()
}

#[test]
fn lines_pass_unchanged_and_stdout_holds_nothing_else() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("vm_list", gives(json!({ "vms": [] })))]);
    let mut bridge = Bridge::start(&world, "mcp");
    bridge.initialize();
    bridge.call("a b", "vm_list");
    let answer = bridge.lines.next();
    assert_eq!((&answer["id"], &answer["result"]["structuredContent"]["vms"]), (&json!("a b"), &json!([])));
    fake.send(&json!({ "jsonrpc": "2.0", "method": "notifications/message", "params": { "data": "ü" } }));
    assert_eq!(bridge.lines.next()["params"]["data"], "ü");
    assert_eq!(methods(&fake), ["initialize", "notifications/initialized", "tools/call"]);
    assert_eq!(fake.paths(), ["/mcp"]);
    bridge.end();
}

#[test]
fn a_burst_is_answered_in_full() {
    let world = World::new();
    let _fake = Fake::start(&world.runtime(), [("vm_list", gives(json!({ "vms": [] })))]);
    let mut bridge = Bridge::start(&world, "mcp");
    bridge.initialize();
    let burst: String = (1..=500)
        .map(|id| {
            format!(
                "{}\n",
                json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call",
            "params": { "name": "vm_list", "arguments": { "tags": { "x": "y".repeat(id) } } } })
            )
        })
        .collect();
    bridge.stdin.write_all(burst.as_bytes()).unwrap();
    let mut ids: Vec<u64> = (1..=500).map(|_| bridge.lines.next()["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(1..=500));
    bridge.end();
}

#[test]
fn a_daemon_that_restarts_takes_the_session_over() {
    let world = World::new();
    let first = Fake::start(&world.runtime(), [("vm_create", never())]);
    let mut bridge = Bridge::start(&world, "mcp --no-start");
    bridge.initialize();
    bridge.call(1, "vm_create");
    bridge.send(&json!({ "jsonrpc": "2.0", "id": 2, "method": "slow/thing" }));
    assert_eq!(bridge.lines.next()["error"]["code"], -32601);
    first.wait(|messages| messages.iter().any(|m| m["method"] == "tools/call"));
    drop(first);

    let lost = bridge.lines.next();
    assert_eq!((&lost["id"], &lost["result"]["isError"]), (&json!(1), &json!(true)));
    assert_eq!(lost["result"]["_meta"]["dev.nexus/error"]["code"], "daemon_down");
    // Sent while there is no daemon: it waits for the next one.
    bridge.call(3, "vm_list");
    let second = Fake::start(&world.runtime(), [("vm_list", gives(json!({ "vms": [] })))]);
    let answer = bridge.lines.next();
    assert_eq!((&answer["id"], answer["result"]["isError"].as_bool()), (&json!(3), None), "{answer}");
    assert_eq!(methods(&second), ["initialize", "notifications/initialized", "tools/call"]);
    let replayed = second.messages().remove(0);
    assert_eq!(replayed["params"]["clientInfo"]["name"], "a client");
    bridge.end();
}

#[test]
fn requests_are_refused_when_no_daemon_comes_back() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), []);
    let mut bridge = Bridge::start(&world, "mcp --no-start");
    bridge.initialize();
    fake.wait(|messages| messages.len() == 2);
    drop(fake);
    bridge.call(1, "vm_list");
    bridge.send(&json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/list" }));
    let answers = [bridge.lines.next(), bridge.lines.next()];
    assert_eq!(answers[0]["result"]["_meta"]["dev.nexus/error"]["code"], "daemon_down");
    assert_eq!(answers[1]["error"]["data"]["code"], "daemon_down");
    bridge.end();
}

#[test]
fn pending_answers_are_awaited_after_the_last_line() {
    let world = World::new();
    let slow: Tool = Box::new(|_, caller| {
        caller.wait_for("notifications/last");
        Some(json!({ "content": [] }))
    });
    let _fake = Fake::start(&world.runtime(), [("slow", slow)]);
    let mut bridge = Bridge::start(&world, "mcp");
    bridge.call(1, "slow");
    bridge.send(&json!({ "jsonrpc": "2.0", "method": "notifications/last" }));
    let Bridge { child, stdin, lines } = bridge;
    drop(stdin);
    assert_eq!(lines.next()["id"], 1);
    assert!(lines.is_at_end());
    assert_eq!(finish(child).code, 0);
}

#[test]
fn a_last_line_without_newline_is_sent() {
    let world = World::new();
    let _fake = Fake::start(&world.runtime(), []);
    let Bridge { child, mut stdin, lines } = Bridge::start(&world, "mcp");
    stdin.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}").unwrap();
    drop(stdin);
    assert_eq!(lines.next()["id"], 1);
    assert!(lines.is_at_end());
    assert_eq!(finish(child).code, 0);
}

#[test]
fn one_vm_has_an_endpoint_of_its_own() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), []);
    let mut bridge = Bridge::start(&world, "mcp-bridge --vm web-1");
    bridge.initialize();
    assert_eq!(fake.paths(), ["/mcp/vm/web-1"]);
    bridge.end();

    let run = world.run("mcp --vm missing");
    assert_eq!((run.code, run.text(), run.stderr.as_str()), (3, "", "error: no VM missing\n"));
}

#[test]
fn files_and_sockets_work_as_stdio_too() {
    let world = World::new();
    let _fake = Fake::start(&world.runtime(), []);
    let (input, output) = (world.root.path().join("in"), world.root.path().join("out"));
    std::fs::write(&input, "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n").unwrap();
    let mut command = world.command("mcp");
    command.stdin(std::fs::File::open(&input).unwrap()).stdout(std::fs::File::create(&output).unwrap());
    assert_eq!(finish(command.stderr(Stdio::piped()).spawn().unwrap()).code, 0);
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "{\"id\":1,\"jsonrpc\":\"2.0\",\"result\":{}}\n");

    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = world.command("mcp");
    command.stdin(std::os::fd::OwnedFd::from(theirs.try_clone().unwrap()));
    let child = command.stdout(std::os::fd::OwnedFd::from(theirs)).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    let lines = Lines::of(ours.try_clone().unwrap());
    ours.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n").unwrap();
    assert_eq!(lines.next()["id"], 1);
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(lines.is_at_end());
    assert_eq!(finish(child).code, 0);
}
