//! Access tokens: what others have does not exist for them, they do no more than they may, and what uses one that is revoked ends.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use nexus_schema::access::{Scope, scope_of};
use nexus_tests::client::Client;
use nexus_tests::daemon::program;
use nexus_tests::wait::stay;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused, soon};

/// Makes a token; returns its secret and its id.
#[track_caller]
fn token(client: &mut Client, arguments: Value) -> (String, String) {
    let made = client.must("token_create", arguments);
    let text = |key: &str| made[key].as_str().expect("a text").to_owned();
    (text("token"), text("id"))
}

fn all_tools(world: &World) -> Client {
    Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects")
}

fn with(world: &World, secret: &str) -> Client {
    Client::connect_with(&world.daemon.socket(), secret).expect("the token's holder connects")
}

/// Sends one HTTP request on a new connection; returns the answer.
/// The answer to a request over HTTP, with its head.
pub(crate) fn http(world: &World, line: &str, token: &str, more: &str, body: &str) -> String {
    let mut stream = send(world, line, token, &format!("Connection: close\r\n{more}"), body);
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

/// Opens a session over HTTP for a client with these capabilities; returns the line that names it in the head of a request.
#[track_caller]
pub(crate) fn session(world: &World, token: &str, capabilities: &Value) -> String {
    let opening = json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": { "protocolVersion": "2025-11-25",
        "capabilities": capabilities, "clientInfo": { "name": "test", "version": "0" } } });
    let answer = http(world, "POST /mcp", token, "", &opening.to_string());
    let id = answer.lines().find_map(|line| line.strip_prefix("mcp-session-id: ")).expect("a session");
    format!("Mcp-Session-Id: {}\r\n", id.trim())
}

/// Sends a request over HTTP; returns the connection, for its answer.
pub(crate) fn send(world: &World, line: &str, token: &str, more: &str, body: &str) -> TcpStream {
    let (url, _) = world.daemon.http();
    let address = url.trim_start_matches("http://").trim_end_matches("/mcp");
    let mut stream = TcpStream::connect(address).expect("connect by HTTP");
    stream.set_read_timeout(Some(Duration::from_mins(1))).expect("a limit");
    let head = format!(
        "{line} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\n{more}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("a request is sent");
    stream
}

#[test]
fn what_others_have_does_not_exist_for_a_token() {
    let world = World::with(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    let mut owner = all_tools(&world);
    let theirs = world.create(&mut owner, "theirs");
    owner.must("vm_update", json!({ "vm": "theirs", "tags": { "team": "b" } }));
    owner.must("drive_create", json!({ "name": "their-data", "size": "16MiB", "wait_s": 45 }));
    let their_op = owner.must("op_list", json!({}))["ops"][0]["op_id"].clone();
    let their_drive = owner.inspect("theirs")["drives"][0]["name"].clone();

    let (secret, id) = token(&mut owner, json!({ "name": "agent", "tools": "all", "tags": { "team": "a" } }));
    let mut agent = with(&world, &secret);
    // A token may not name files of the host, so it takes the image that is there.
    let image = owner.inspect("theirs")["image"]["name"].clone();
    agent.create(json!({ "name": "ours", "from": image, "disk": "128MiB", "wait_s": 45 }));
    assert_eq!(agent.inspect("ours")["owner"], format!("token:{id}"));
    assert_eq!(agent.run("ours", "echo hello").stdout, "hello\n");

    // Lists hold its own things only.
    for (tool, key, names) in [
        ("vm_list", "vms", &["ours"][..]),
        ("network_inspect", "vms", &["ours"]),
        ("token_list", "tokens", &[]),
    ] {
        let list = agent.must(tool, json!({}));
        let found: Vec<_> =
            list[key].as_array().expect("a list").iter().map(|row| row["name"].clone()).collect();
        assert_eq!(found, names, "{tool}");
    }
    let drives = agent.must("drive_list", json!({}));
    assert_eq!(drives["drives"].as_array().expect("a list").len(), 1, "{drives}");
    let used_by = |client: &mut Client| {
        let listed = client.must("image_list", json!({}));
        let mut images = listed["images"].as_array().expect("a list").iter();
        let of_list = images.find(|row| row["name"] == image).expect("the image")["used_by"].clone();
        let details = client.must("image_inspect", json!({ "image": image }));
        assert_eq!(details["used_by"], of_list);
        of_list
    };
    assert_eq!((used_by(&mut owner), used_by(&mut agent)), (json!(2), json!(1)), "both VMs, and its own");
    let ops = agent.must("op_list", json!({})).to_string();
    assert!(!ops.contains("theirs") && ops.contains("ours"), "{ops}");
    let info = agent.must("system_info", json!({}));
    assert_eq!((&info["vms"], &info["disk"]), (&json!({ "ready": 1 }), &json!([])), "{info}");

    // What is asked for by name or id is answered as if it did not exist, and no hint names it.
    let their_id = theirs["id"].as_str().expect("an id").to_owned();
    let unknown = |text: &str, name: &str| text.replace(name, "X");
    for name in ["theirs", &their_id, "their"] {
        for (tool, mut arguments) in [
            ("vm_inspect", json!({})),
            ("vm_start", json!({})),
            ("vm_stop", json!({ "force": true })),
            ("vm_delete", json!({ "force": true })),
            ("vm_update", json!({ "tags": { "team": "a" } })),
            ("vm_logs", json!({})),
            ("vm_history", json!({})),
            ("vm_publish", json!({ "guest_port": 80 })),
            ("network_log", json!({})),
            ("guest_run_command", json!({ "command": "true" })),
            ("guest_file_read", json!({ "path": "/etc/passwd" })),
            ("guest_copy_in", json!({ "from": "x", "to": "/x" })),
            ("guest_stream_open", json!({ "open": { "tcp": { "port": 1 } } })),
            ("drive_attach", json!({ "drive": "their-data" })),
            ("drive_list", json!({})),
            ("token_create", json!({})),
        ] {
            arguments["vm"] = name.into();
            if tool == "token_create" {
                arguments = json!({ "vms": [name] });
            }
            if tool == "vm_publish" {
                // It lacks the scope, and is told so whether the VM exists or not.
                assert_eq!(refused(&mut agent, tool, arguments).code, "forbidden");
                continue;
            }
            let failure = refused(&mut agent, tool, arguments.clone());
            if arguments.get("vm").is_some() {
                arguments["vm"] = "nowhere".into();
            } else {
                arguments["vms"] = json!(["nowhere"]);
            }
            let nowhere = refused(&mut agent, tool, arguments);
            assert_eq!(failure.code, "vm_not_found", "{tool} {name}: {}", failure.text);
            assert_eq!(unknown(&failure.text, name), unknown(&nowhere.text, "nowhere"), "{tool} {name}");
        }
        let all = agent.must("vm_delete", json!({ "tags": { "team": "b" }, "force": true }));
        assert_eq!(all["deleted"], json!([]));
    }
    for (tool, arguments, code) in [
        ("op_get", json!({ "op_id": their_op, "wait_s": 0 }), "op_not_found"),
        ("op_cancel", json!({ "op_id": their_op }), "op_not_found"),
        ("drive_inspect", json!({ "drive": their_drive }), "drive_not_found"),
        ("drive_delete", json!({ "drive": "their-data" }), "drive_not_found"),
        ("drive_create", json!({ "from": "drive:their-data" }), "drive_not_found"),
        ("token_revoke", json!({ "token": "agent" }), "token_not_found"),
        ("token_revoke", json!({ "token": id }), "token_not_found"),
    ] {
        let failure = refused(&mut agent, tool, arguments);
        assert_eq!(failure.code, code, "{tool}: {}", failure.text);
    }

    // Nor do resources and completions know it.
    let resources = agent.request("resources/list", &json!({})).expect("a list").to_string();
    assert!(resources.contains("nexus://vm/ours") && !resources.contains("theirs"), "{resources}");
    let reference = json!({ "type": "ref/resource", "uri": "nexus://vm/{vm}" });
    let typed = json!({ "ref": reference, "argument": { "name": "vm", "value": "" } });
    let completed = agent.request("completion/complete", &typed).expect("names").to_string();
    assert!(completed.contains("ours") && !completed.contains("theirs"), "{completed}");
    let their_op = their_op.as_str().expect("an id");
    for uri in [
        "nexus://vm/theirs",
        "nexus://vm/%74heirs",
        "nexus://vm/theirs/file/etc/passwd",
        "nexus://vm/theirs/console",
    ] {
        let error = agent.request("resources/read", &json!({ "uri": uri })).expect_err(uri).to_string();
        assert!(error.contains("vm_not_found") || error.contains("there is no resource"), "{uri}: {error}");
    }
    agent
        .request("resources/read", &json!({ "uri": format!("nexus://op/{their_op}") }))
        .expect_err("another's operation");

    // The endpoint of a VM, however it is written; and the ticket of somebody else.
    for path in ["theirs", "%74heirs", &their_id, "ours/../theirs", "../vm/theirs", "theirs?tools=all"] {
        let answer = http(&world, &format!("GET /mcp/vm/{path}"), &secret, "", "");
        assert!(answer.starts_with("HTTP/1.1 40"), "{path}: {answer}");
        assert!(!answer.contains(&their_id) || path == their_id, "{path}: {answer}");
    }
    let scoped = "/mcp/vm/ours";
    let lines = format!("Authorization: Bearer {secret}\r\n");
    let mut inside =
        Client::connect_as(&world.daemon.socket(), scoped, &lines, json!({})).expect("its own VM");
    inside.call_whole("run_command", json!({ "command": "true" })).expect("it may exec in it");
    let ticket = owner.must("guest_stream_open", json!({ "vm": "theirs", "open": { "tcp": { "port": 1 } } }));
    let path = ticket["path"].as_str().expect("a path");
    let mut stream = world.upgrade(path, &lines);
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 403", "a foreign ticket");

    // A VM that gets the label exists from then on, and no longer when it loses it.
    owner.must("vm_update", json!({ "vm": "theirs", "tags": { "team": "a" } }));
    assert_eq!(agent.run("theirs", "echo seen").stdout, "seen\n");
    owner.must("vm_update", json!({ "vm": "theirs", "tags": { "team": "b" } }));
    assert_eq!(refused(&mut agent, "vm_inspect", json!({ "vm": "theirs" })).code, "vm_not_found");

    // The past is no more than the present.
    owner.must("vm_delete", json!({ "vm": "theirs", "force": true }));
    assert_eq!(refused(&mut agent, "vm_history", json!({ "vm": "theirs" })).code, "vm_not_found");
    assert_eq!(refused(&mut agent, "vm_history", json!({ "vm": their_id })).code, "vm_not_found");
    agent.must("vm_delete", json!({ "vm": "ours", "force": true }));
    agent.must("vm_history", json!({ "vm": "ours" }));
    owner.must("drive_delete", json!({ "drive": "their-data" }));
    world.assert_in_order();
}

#[test]
fn a_token_does_what_its_scopes_and_tools_allow_and_hands_out_no_more() {
    let world = World::with(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    let mut owner = all_tools(&world);
    world.create(&mut owner, "web");
    let (reader, _) = token(&mut owner, json!({ "scopes": ["read"], "all_vms": true, "tools": "all" }));
    let mut reads = with(&world, &reader);
    reads.must("vm_inspect", json!({ "vm": "web" }));
    reads.call_whole("guest_file_stat", json!({ "vm": "web", "path": "/" })).expect("reading is allowed");
    for (tool, arguments) in [
        ("guest_run_command", json!({ "vm": "web", "command": "true" })),
        ("guest_file_write", json!({ "vm": "web", "path": "/tmp/x", "content": "x" })),
        ("vm_stop", json!({ "vm": "web" })),
        ("vm_publish", json!({ "vm": "web", "guest_port": 80 })),
        ("image_create", json!({ "from": "busybox" })),
        ("settings_set", json!({ "values": { "default.vcpus": "2" } })),
        ("prune", json!({})),
        ("audit_list", json!({})),
        // Until now: it would hold the VM.
        ("checkpoint_diff", json!({ "from": "any" })),
    ] {
        let failure = refused(&mut reads, tool, arguments);
        assert_eq!(failure.code, "forbidden", "{tool}: {}", failure.text);
    }
    let listed = reads.request("tools/list", &json!({})).expect("a list");
    let names: Vec<_> = listed["tools"].as_array().expect("tools").iter().map(|tool| &tool["name"]).collect();
    assert!(names.contains(&&json!("vm_list")) && !names.contains(&&json!("vm_create")), "{names:?}");

    // Its set of tools is fixed.
    let (worker, _) =
        token(&mut owner, json!({ "scopes": ["exec", "lifecycle"], "tools": "work", "name": "worker" }));
    assert!(http(&world, "GET /mcp?tools=all", &worker, "", "").starts_with("HTTP/1.1 403"));
    assert!(http(&world, "GET /metrics", &worker, "", "").starts_with("HTTP/1.1 403"));
    let mut works = with(&world, &worker);
    let params = json!({ "name": "guest_file_stat", "arguments": { "vm": "web", "path": "/" } });
    assert!(works.request("tools/call", &params).is_err(), "not in the set");

    // What would read the host, or open the network, takes more.
    let from = world.from.clone();
    for arguments in [
        json!({ "from": from }),
        json!({ "from": format!("rootfs:{from}") }),
        json!({ "from": "busybox", "kernel": "file:/boot/vmlinuz" }),
        json!({ "from": "oci:127.0.0.1:9/a/b:1" }),
        json!({ "from": "oci:localhost:9/a/b:1" }),
        json!({ "from": "busybox", "network": { "preset": "open" } }),
        json!({ "from": "busybox", "network": { "allow": ["*", "10.0.0.1"] } }),
    ] {
        let failure = refused(&mut works, "vm_create", arguments.clone());
        assert_eq!(failure.code, "forbidden", "{arguments}: {}", failure.text);
    }

    // The CLI uses a token, and that hands out less but not more.
    let (maker, _) = token(&mut owner, json!({ "scopes": ["exec"], "tools": "all", "vms": ["web"] }));
    let nexusctl = |secret: &str, arguments: &[&str]| {
        let mut command = Command::new(program("nexusctl"));
        command.args(arguments).envs(world.daemon.environment()).env("NEXUS_SOCKET", world.daemon.socket());
        let output = command.env("NEXUS_TOKEN", secret).output().expect("nexusctl runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8").trim().to_owned();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, _, error) = nexusctl(&maker, &["token", "create", "sub", "-s", "lifecycle,admin"]);
    assert!(
        code == Some(77) && error.contains("scope lifecycle") && error.contains("scope admin"),
        "{error}"
    );
    let (_, sub, error) = nexusctl(&maker, &["-q", "token", "create", "sub", "-s", "exec", "--vm", "web"]);
    assert!(sub.starts_with("nexus_"), "{error}");
    let (code, output, error) = nexusctl(&sub, &["guest", "run", "web", "--", "echo", "by a sub-agent"]);
    assert_eq!((code, &*output), (Some(0), "by a sub-agent"), "{error}");
    let (_, output, error) = nexusctl(&sub, &["exec", "web", "echo", "by a stream"]);
    assert_eq!(output, "by a stream", "{error}");
    let (code, ..) = nexusctl(&sub, &["rm", "-f", "web"]);
    assert_eq!(code, Some(77));
    let (code, _, error) = nexusctl("nexus_wrong", &["ls"]);
    assert!(code == Some(77) && error.contains("NEXUS_TOKEN"), "{error}");
    let (_, list, _) = nexusctl(&maker, &["token", "ls"]);
    assert!(list.contains("sub") && !list.contains("worker") && !list.contains(&sub), "{list}");
}

#[test]
fn each_scope_allows_its_tools_and_no_others() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    let tools = nexus_schema::tools::host().into_iter().chain(nexus_schema::tools::guest_on_host());
    let tools: Vec<String> = tools.map(|tool| tool.name).collect();
    let mut denied = 0;
    for scope in Scope::ALL {
        let (secret, _) = token(&mut owner, json!({ "scopes": [scope], "all_vms": true, "tools": "all" }));
        let mut holder = with(&world, &secret);
        let listed = holder.request("tools/list", &json!({})).expect("a list");
        let listed = listed["tools"].as_array().expect("tools");
        for tool in &tools {
            let needs = scope_of(tool);
            let is_allowed = needs == Scope::Read || needs == scope;
            let is_listed = listed.iter().any(|one| one["name"] == tool.as_str());
            assert_eq!(is_listed, is_allowed, "{scope}: {tool}");
            if !is_allowed {
                let failure = refused(&mut holder, tool, json!({ "vm": "nowhere" }));
                let words = format!("{tool} needs the scope {needs}");
                assert!(
                    failure.code == "forbidden" && failure.text.contains(&words),
                    "{scope}: {tool}: {}",
                    failure.text
                );
                denied += 1;
            }
        }
    }
    let recorded = soon("all is recorded", || {
        let calls = owner.must("audit_list", json!({ "outcome": "denied", "limit": 500 }))["calls"].take();
        let calls = calls.as_array().expect("a list").clone();
        (calls.len() >= denied).then_some(calls)
    });
    assert_eq!(recorded.len(), denied);
    assert!(recorded.iter().all(|call| call["rule"] == "no scope"), "{recorded:?}");
}

#[test]
fn nexusctl_has_the_tools_of_its_token_whatever_others_are_offered() {
    let world = World::with(&[("NEXUS_TOOLS", "work")]);
    let mut owner = all_tools(&world);
    for (tools, works) in [("all", true), ("work,drives", true), ("work", false)] {
        let (secret, _) = token(&mut owner, json!({ "scopes": ["read"], "tools": tools }));
        let mut nexusctl = Command::new(program("nexusctl"));
        nexusctl.args(["drive", "list", "-q"]).envs(world.daemon.environment());
        let output = nexusctl.env("NEXUS_TOKEN", secret).output().expect("nexusctl runs");
        assert_eq!(output.status.success(), works, "{tools}: {output:?}");
    }
}

#[test]
fn creates_at_once_do_not_exceed_a_quota() {
    let world = World::new();
    let mut owner = all_tools(&world);
    world.create(&mut owner, "first");
    let image = owner.inspect("first")["image"]["name"].as_str().expect("an image").to_owned();
    let quota = json!({ "vms": 3, "memory": "4GiB", "disk": "1GiB" });
    let (secret, _) = token(&mut owner, json!({ "tools": "all", "quota": quota }));
    let attempts: Vec<_> = std::thread::scope(|scope| {
        let attempt = |number: usize| {
            let mut client = with(&world, &secret);
            let arguments = json!({ "name": format!("q-{number}"), "from": image, "disk": "128MiB", "start": false, "wait_s": 45 });
            client.call("vm_create", arguments).map(|_| ()).map_err(|failure| failure.code)
        };
        let threads: Vec<_> = (0..20).map(|number| scope.spawn(move || attempt(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let made = attempts.iter().filter(|attempt| attempt.is_ok()).count();
    let denied = attempts.iter().filter(|attempt| **attempt == Err("quota_exceeded".into())).count();
    assert_eq!((made, denied), (3, 17), "{attempts:?}");
    let mut client = with(&world, &secret);
    let own = client.must("vm_list", json!({}))["vms"].as_array().expect("a list").clone();
    assert_eq!(own.len(), 3);
    // Disk: three drives of 128 MiB are there.
    let failure = refused(&mut client, "drive_create", json!({ "size": "700MiB" }));
    assert_eq!(failure.code, "quota_exceeded", "{}", failure.text);
    client.must("drive_create", json!({ "name": "data", "size": "64MiB", "wait_s": 45 }));
    assert_eq!(
        refused(&mut client, "drive_resize", json!({ "drive": "data", "size": "1GiB" })).code,
        "quota_exceeded"
    );
    client.must("drive_resize", json!({ "drive": "data", "size": "128MiB" }));
    // What is deleted is free again; a token that this one makes counts for both.
    client.must("vm_delete", json!({ "vm": own[0]["name"] }));
    let (secret, id) = token(&mut client, json!({}));
    let mut sub = with(&world, &secret);
    let create =
        |name: &str| json!({ "name": name, "from": image, "disk": "128MiB", "start": false, "wait_s": 45 });
    sub.must("vm_create", create("of-sub"));
    for client in [&mut sub, &mut client] {
        assert_eq!(refused(client, "vm_create", create("one-more")).code, "quota_exceeded");
    }
    // So does the growth of what a revoked one made, and of what others made.
    owner.must_confirmed("token_revoke", json!({ "token": id }));
    let sees = json!({ "tools": "all", "vms": ["first"], "quota": { "disk": "64MiB" } });
    let (secret, _) = token(&mut owner, sees);
    for (mut client, vm) in [(client, "of-sub"), (with(&world, &secret), "first")] {
        let drive = client.inspect(vm)["drives"][0]["name"].clone();
        let failure = refused(&mut client, "drive_resize", json!({ "drive": drive, "size": "1GiB" }));
        assert_eq!(failure.code, "quota_exceeded", "{}", failure.text);
    }
    // Growth of what others made adds up, until it is deleted.
    owner.must("vm_stop", json!({ "vm": "first", "force": true, "wait_s": 45 }));
    let mut client = with(&world, &secret);
    let drive = client.inspect("first")["drives"][0]["name"].clone();
    let mut grow = |size: &str| {
        let grown = client.call("drive_resize", json!({ "drive": drive, "size": size }));
        grown.map(|_| ()).map_err(|failure| failure.code)
    };
    assert_eq!(grow("160MiB"), Ok(()));
    assert_eq!(grow("192MiB"), Ok(()));
    assert_eq!(grow("193MiB"), Err("quota_exceeded".to_owned()));
    owner.must_confirmed("vm_delete", json!({ "vm": "first" }));
    client.must("drive_create", json!({ "name": "own", "size": "64MiB", "wait_s": 45 }));
}

#[test]
fn images_made_at_once_do_not_exceed_a_quota() {
    let world = World::new();
    let mut owner = all_tools(&world);
    owner.to_the_end("image_create", json!({ "from": world.from, "name": "small" }), SOON);
    let copy = owner.to_the_end("image_create", json!({ "from": "image:small", "name": "copy" }), SOON);
    let used = copy["used_bytes"].as_u64().expect("a size");
    let scopes = json!(["read", "lifecycle", "images"]);
    let quota = json!({ "disk": format!("{}B", 3 * used + used / 2) });
    let (secret, _) = token(&mut owner, json!({ "scopes": scopes, "tools": "all", "quota": quota }));
    let make = |client: &mut Client, name: String| {
        let started =
            client.call("image_create", json!({ "from": "image:small", "name": name, "wait_s": 0 }))?;
        let op = started["op_id"].clone();
        client.call("op_get", json!({ "op_id": op, "wait_s": 45 })).map(|op| op["error"]["code"].clone())
    };
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let attempt = |number: usize| {
            let mut client = with(&world, &secret);
            match make(&mut client, format!("q-{number}")) {
                Ok(code) => code,
                Err(failure) => json!(failure.code),
            }
        };
        let threads: Vec<_> = (0..20).map(|number| scope.spawn(move || attempt(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let denied = outcomes.iter().filter(|code| **code == "quota_exceeded").count();
    let made = outcomes.iter().filter(|code| code.is_null()).count();
    assert_eq!((made, denied), (3, 17), "{outcomes:?}");
    let mut client = with(&world, &secret);
    let own: Vec<Value> = crate::builds::installed(&mut client)
        .into_iter()
        .filter(|image| image["name"].as_str().is_some_and(|name| name.starts_with("q-")))
        .collect();
    assert_eq!(own.len(), 3, "{own:?}");
    // They count with drives, and for a token that this one makes.
    let failure = refused(&mut client, "drive_create", json!({ "size": "64MiB" }));
    assert_eq!(failure.code, "quota_exceeded", "{}", failure.text);
    let (secret, _) = token(&mut client, json!({ "scopes": scopes }));
    let mut sub = with(&world, &secret);
    let code = make(&mut sub, "of-sub".to_owned()).expect("an outcome");
    assert_eq!(code, "quota_exceeded");
    // So does what a build makes. What is deleted is free again.
    sub.must("template_create", json!({ "name": "web", "source": "image:small" }));
    let build = |client: &mut Client| {
        let started = client.must("build_start", json!({ "template": "web", "no_cache": true, "wait_s": 0 }));
        client.must("op_get", json!({ "op_id": started["op_id"], "wait_s": 45 }))
    };
    let failed = build(&mut sub);
    assert_eq!(failed["error"]["code"], "quota_exceeded", "{failed}");
    for image in &own {
        client.must("image_delete", json!({ "image": image["name"] }));
    }
    assert_eq!(build(&mut sub)["state"], "succeeded");
    world.assert_in_order();
}

#[test]
fn a_revoked_token_ends_what_uses_it_within_a_second() {
    let mut world = World::with(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    let mut owner = all_tools(&world);
    world.create(&mut owner, "web");
    let (secret, id) = token(&mut owner, json!({ "scopes": ["exec"], "tools": "all", "vms": ["web"] }));
    let socket = world.daemon.socket();

    // A stream of lines with a waiting call and a command; a stream into the guest; a session with an event stream; a waiting HTTP call.
    let mut lines = with(&world, &secret);
    let cursor = lines.call_whole("vm_logs", json!({ "vm": "web" })).expect("the console")["_meta"]["dev.nexus/result"]["cursor"].clone();
    let wait = json!({ "name": "vm_logs", "arguments": { "vm": "web", "cursor": cursor, "wait_s": 45 } });
    lines.start("tools/call", &wait).expect("a waiting call");
    lines
        .start(
            "tools/call",
            &json!({ "name": "guest_run_command", "arguments": { "vm": "web", "command": "sleep 60" } }),
        )
        .expect("a command");
    let mut opener = with(&world, &secret);
    let open = json!({ "vm": "web", "open": { "exec": { "start": { "argv": ["sleep", "60"] } } } });
    let path = opener.must("guest_stream_open", open)["path"].as_str().expect("a path").to_owned();
    let mut stream = world.upgrade(&path, &format!("Authorization: Bearer {secret}\r\n"));
    let session = session(&world, &secret, &json!({}));
    let mut events = send(&world, "GET /mcp", &secret, &session, "");
    let call = json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": wait }).to_string();
    let mut waiting = send(&world, "POST /mcp", &secret, &format!("{session}Connection: close\r\n"), &call);
    stay(Duration::from_millis(500));

    let revoked = Instant::now();
    let gone = owner.must("token_revoke", json!({ "token": id }));
    assert_eq!(gone["revoked"][0]["id"], json!(id));
    while lines.next_message().is_ok() {}
    assert!(opener.next_message().is_err());
    for ending in [&mut events, &mut waiting] {
        let mut rest = Vec::new();
        // The event stream's connection stays open for other requests, but its response ends: by a last chunk.
        let mut piece = [0; 4096];
        while !rest.ends_with(b"0\r\n\r\n") {
            match ending.read(&mut piece) {
                Ok(0) | Err(_) => break,
                Ok(length) => rest.extend_from_slice(&piece[..length]),
            }
        }
    }
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the stream ends");
    assert!(revoked.elapsed() < Duration::from_secs(1), "{:?}", revoked.elapsed());

    // It stays revoked; the session is closed; the owner works on.
    assert!(http(&world, "POST /mcp", &secret, &session, &call).starts_with("HTTP/1.1 401"));
    assert!(Client::connect_with(&socket, &secret).is_err());
    assert_eq!(owner.run("web", "echo on").stdout, "on\n");
    let (kept, _) = token(&mut owner, json!({}));
    drop(owner);
    world.daemon.kill();
    world.daemon.restart();
    assert!(Client::connect_with(&world.daemon.socket(), &secret).is_err());
    with(&world, &kept).must("vm_list", json!({}));
}

#[test]
fn ten_thousand_wrong_tokens_do_not_keep_the_right_one_out() {
    let world = World::with(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    let (url, right) = world.daemon.http();
    let address = url.trim_start_matches("http://").trim_end_matches("/mcp").to_owned();
    let wrong = format!(
        "GET /metrics HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {}\r\n\r\n",
        "x".repeat(64)
    );
    let stream = TcpStream::connect(&address).expect("connect by HTTP");
    let mut writing = stream.try_clone().expect("a second handle");
    let writer = std::thread::spawn(move || {
        let hundred = wrong.repeat(100);
        (0..100).for_each(|_| writing.write_all(hundred.as_bytes()).expect("requests are sent"));
    });
    let mut reading = stream;
    let (mut text, mut piece, mut asked) = (Vec::new(), vec![0; 1 << 16], false);
    let count = |text: &[u8], what: &[u8]| text.windows(what.len()).filter(|part| *part == what).count();
    while count(&text, b"HTTP/1.1 4") < 10_000 {
        let length = reading.read(&mut piece).expect("answers");
        assert!(length > 0, "the connection ended");
        text.extend_from_slice(&piece[..length]);
        if !asked && text.len() > 200_000 {
            asked = true;
            let before = Instant::now();
            let answer = http(&world, "GET /metrics", &right, "", "");
            assert!(
                answer.starts_with("HTTP/1.1 200") && before.elapsed() < Duration::from_secs(2),
                "{answer}"
            );
        }
    }
    writer.join().expect("all are sent");
    assert!(asked && count(&text, b"HTTP/1.1 401") < 200 && count(&text, b"HTTP/1.1 429") > 9_000);
    // Few of them are in the audit log.
    let denied = all_tools(&world)
        .must("audit_list", json!({ "caller": "unknown", "outcome": "denied", "limit": 500 }));
    let rows = denied["calls"].as_array().expect("a list").len();
    assert!((1..200).contains(&rows), "{rows}");
}
