//! What a client can rely on whatever happens: the list of tools is the same to the byte, and stdout of a stdio server holds JSON lines
//! and nothing else.

use std::io::Write;
use std::process::{Command, Stdio};

use nexus_tests::client::Client;
use nexus_tests::daemon::program;
use serde_json::{Value, json};

use crate::world::World;

/// The tools that an endpoint lists, in both eras, to the byte.
fn lists(world: &World) -> Vec<String> {
    let meta = json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {} });
    let mut lists = Vec::new();
    for path in ["/mcp", "/mcp?tools=work", "/mcp?tools=read-only,drives", "/mcp/vm/v-1"] {
        let mut client = Client::connect_at(&world.daemon.socket(), path).expect("a connection");
        for params in [json!({}), json!({ "_meta": meta })] {
            let id = client.start("tools/list", &params).expect("a request");
            let line = client.answer(id).expect("an answer");
            let result = line.split_once("\"result\":").expect("a result").1.to_owned();
            assert!(result.contains("run_command") || path.contains("read-only"), "{path}: {result}");
            lists.push(result);
        }
    }
    lists
}

#[test]
fn the_list_of_tools_is_the_same_to_the_byte_whatever_happens() {
    let mut world = World::new();
    let mut client = world.client();
    world.create(&mut client, "v-1");
    let before = lists(&world);
    world.create(&mut client, "v-2");
    client.must("vm_stop", json!({ "vm": "v-2" }));
    client.must("vm_delete", json!({ "vm": "v-2" }));
    client.must("vm_restart", json!({ "vm": "v-1" }));
    assert!(lists(&world) == before, "events of VMs change the list");
    drop(client);
    world.daemon.stop();
    world.daemon.restart();
    assert!(lists(&world) == before, "a restart of the daemon changes the list");
}

#[test]
fn stdout_of_a_stdio_server_is_json_lines() {
    let world = World::new();
    world.create(&mut world.client(), "v-1");
    let alone = tempfile::tempdir().expect("a directory");
    let beside = world.daemon.environment().map(|(name, value)| (name, value.into_os_string()));
    let own =
        [("NEXUS_STATE_DIR", alone.path().join("state")), ("NEXUS_RUNTIME_DIR", alone.path().join("run"))]
            .map(|(name, value)| (name, value.into_os_string()));
    let run = r#"{"name":"guest_run_command","arguments":{"vm":"v-1","command":"echo hi; echo no >&2"},"_meta":{"progressToken":7}}"#;
    let opening =
        r#"{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"0"}}"#;
    let mut lines = vec![
        format!(r#"{{"jsonrpc":"2.0","id":1,"method":"initialize","params":{opening}}}"#),
        r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#.to_owned(),
    ];
    let requests = [
        format!(r#""method":"tools/call","params":{run}"#),
        r#""method":"tools/list""#.into(),
        r#""method":"no/such""#.into(),
        r#""method":"tools/call","params":{"name":"system_info","arguments":{}}"#.into(),
        r#""method":"tools/call","params":7"#.into(),
    ];
    lines.extend(
        requests.iter().zip(2..).map(|(rest, id)| format!(r#"{{"jsonrpc":"2.0","id":{id},{rest}}}"#)),
    );
    lines.extend(["no json at all".to_owned(), String::new(), "[]".into(), "{}".into()]);
    for (name, arguments, environment) in [
        ("nexusctl", &["mcp"][..], &beside),
        ("nexusctl", &["mcp", "--no-start", "--tools", "all"], &beside),
        ("nexusd", &["--stdio"], &beside),
        ("nexusd", &["--stdio"], &own),
    ] {
        let mut command = Command::new(program(name));
        command.env_remove("NEXUS_SOCKET").envs(environment.iter().map(|(name, value)| (name, value)));
        command.env("NEXUS_LOG", "debug").args(arguments);
        let mut server = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut stdin = server.stdin.take().expect("a pipe");
        stdin.write_all((lines.join("\n") + "\n").as_bytes()).expect("lines are written");
        drop(stdin);
        let output = server.wait_with_output().expect("it ends");
        let said = String::from_utf8(output.stdout).expect("stdout is text");
        assert!(said.ends_with('\n'), "{name} {arguments:?}: {said}");
        let mut answered = Vec::new();
        for line in said.lines() {
            let message: Value = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{name} {arguments:?}: {error}: {line}"));
            assert_eq!(message["jsonrpc"], "2.0", "{name} {arguments:?}: {line}");
            answered.extend(message.get("method").is_none().then(|| message["id"].as_u64()).flatten());
        }
        answered.sort_unstable();
        assert_eq!(answered, [1, 2, 3, 4, 5, 6], "{name} {arguments:?}: {said}");
    }
}
