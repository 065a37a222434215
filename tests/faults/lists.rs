//! Lists: exactly what was requested, page by page; and labels for finding things.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

fn make(world: &World, client: &mut Client, name: &str, tags: Value) {
    let mut arguments = world.arguments(name);
    arguments["start"] = false.into();
    arguments["tags"] = tags;
    client.to_the_end("vm_create", arguments, SOON);
}

/// The names of a page of VMs.
fn names(page: &Value) -> Vec<&str> {
    page["vms"].as_array().expect("a list").iter().filter_map(|vm| vm["name"].as_str()).collect()
}

/// All entries of a list, `limit` at a time; no page may have more.
#[track_caller]
fn paged(client: &mut Client, tool: &str, mut arguments: Value, key: &str, limit: usize) -> Vec<Value> {
    let mut all = Vec::new();
    arguments["limit"] = limit.into();
    loop {
        let page = client.must(tool, arguments.clone());
        let entries = page[key].as_array().expect("a list");
        assert!(!entries.is_empty() && entries.len() <= limit, "{tool}: {page}");
        all.extend(entries.iter().cloned());
        match page["next_cursor"].as_str() {
            Some(cursor) => arguments["cursor"] = cursor.into(),
            None => return all,
        }
    }
}

#[test]
fn vms_are_found_by_labels_and_states_page_by_page() {
    let mut world = World::new();
    let mut client = world.client();
    for (at, team) in ["red", "blue", "red", "blue", "red"].into_iter().enumerate() {
        make(&world, &mut client, &format!("vm-{at}"), json!({ "team": team, "at": at.to_string() }));
    }
    client.to_the_end("vm_start", json!({ "vm": "vm-0" }), SOON);
    let all = paged(&mut client, "vm_list", json!({}), "vms", 2);
    let different: BTreeSet<_> = all.iter().map(|vm| vm["id"].to_string()).collect();
    assert_eq!((all.len(), different.len()), (5, 5), "{all:?}");

    let mut list = |arguments: Value| client.must("vm_list", arguments);
    assert_eq!(names(&list(json!({ "tags": { "team": "red" } }))), ["vm-0", "vm-2", "vm-4"]);
    assert_eq!(names(&list(json!({ "tags": { "team": "red", "at": "2" } }))), ["vm-2"]);
    assert_eq!(names(&list(json!({ "tags": { "team": "green" } }))), [""; 0]);
    assert_eq!(names(&list(json!({ "state": "ready" }))), ["vm-0"]);
    assert_eq!(names(&list(json!({ "state": "created", "tags": { "team": "red" } }))), ["vm-2", "vm-4"]);
    let first = list(json!({ "tags": { "team": "red" }, "limit": 2 }));
    let rest = list(json!({ "tags": { "team": "red" }, "limit": 2, "cursor": first["next_cursor"] }));
    assert_eq!((names(&first), names(&rest)), (vec!["vm-0", "vm-2"], vec!["vm-4"]));

    // Labels are added, changed and removed; an invalid change has no effect.
    client.must(
        "vm_update",
        json!({ "vm": "vm-1", "tags": { "team": "red", "new": "" }, "remove_tags": ["at"] }),
    );
    assert_eq!(client.inspect("vm-1")["tags"], json!({ "team": "red", "new": "" }));
    let many: Value =
        (0..65).map(|at| (format!("k{at}"), json!("v"))).collect::<serde_json::Map<_, _>>().into();
    for tags in [many, json!({ "k".repeat(64): "v" }), json!({ "k": "v".repeat(256) }), json!({ "": "v" })] {
        let failure = refused(&mut client, "vm_update", json!({ "vm": "vm-1", "tags": tags }));
        assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
    }
    world.daemon.kill();
    world.daemon.restart();
    let mut client = world.client();
    assert_eq!(client.inspect("vm-1")["tags"], json!({ "team": "red", "new": "" }));
    let red = client.must("vm_list", json!({ "tags": { "team": "red" } }));
    assert_eq!(names(&red), ["vm-0", "vm-1", "vm-2", "vm-4"]);
    world.assert_in_order();
}

#[test]
fn histories_and_operations_come_newest_first_page_by_page() {
    let world = World::new();
    let mut client = world.client();
    make(&world, &mut client, "box", json!({}));
    client.to_the_end("vm_start", json!({ "vm": "box" }), SOON);
    client.to_the_end("vm_stop", json!({ "vm": "box" }), SOON);

    let history = paged(&mut client, "vm_history", json!({ "vm": "box" }), "transitions", 3);
    let states: Vec<_> = history.iter().filter_map(|step| step["to"].as_str()).collect();
    let expected = ["stopped", "stopping", "ready", "running", "starting", "created", "creating"];
    assert_eq!(states, expected, "{history:?}");
    // Each step begins where the one before ended, and says who caused it and why.
    for pair in history.windows(2) {
        assert_eq!(pair[0]["from"], pair[1]["to"], "{pair:?}");
    }
    assert!(history.iter().all(|step| step["who"].is_string() && step["reason"].is_string()), "{history:?}");

    let ops = paged(&mut client, "op_list", json!({}), "ops", 1);
    let tools: Vec<_> = ops.iter().filter_map(|op| op["tool"].as_str()).collect();
    assert_eq!(tools, ["vm_stop", "vm_start", "vm_create"], "{ops:?}");
    assert_eq!(client.must("op_list", json!({ "state": "failed" }))["ops"], json!([]));
    // An operation that has ended cannot be cancelled; the answer says how it ended.
    let ended = client.must("op_cancel", json!({ "op_id": ops[0]["op_id"] }));
    assert_eq!(ended["state"], "succeeded", "{ended}");
    let failure = refused(&mut client, "op_get", json!({ "op_id": "aaaaaaaaaaaac" }));
    assert_eq!(failure.code, "op_not_found", "{}", failure.text);
    // The id of something else is told apart.
    let vm = client.inspect("box");
    let failure = refused(&mut client, "op_cancel", json!({ "op_id": vm["id"] }));
    assert_eq!(failure.code, "op_not_found", "{}", failure.text);
    assert!(failure.text.contains("that is the id of the VM box"), "{}", failure.text);
    let failure = refused(&mut client, "op_get", json!({ "op_id": "one" }));
    assert!(failure.text.contains("`one` is not an op id: an op id has the form"), "{}", failure.text);
}

#[test]
fn each_resource_is_what_its_tool_says_at_once() {
    let world = World::new();
    let mut client = world.client();
    world.create(&mut client, "web");
    let run =
        json!({ "name": "once", "from": world.from, "disk": "128MiB", "run": "sleep 7654", "wait_s": 0 });
    let op = client.must("vm_create", run)["op_id"].as_str().expect("an id").to_owned();
    let read = |client: &mut Client, uri: &str| {
        let read = client.request("resources/read", &json!({ "uri": uri })).expect(uri);
        let content = &read["contents"][0];
        (content["mimeType"].clone(), content["text"].as_str().expect("a text").to_owned())
    };
    client.wait_for_state("once", "ready");
    let started = Instant::now();
    for (uri, tool, arguments) in [
        ("nexus://vms", "vm_list", json!({})),
        ("nexus://vm/web/history", "vm_history", json!({ "vm": "web" })),
    ] {
        let (kind, text) = read(&mut client, uri);
        let told: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((kind, told), (json!("application/json"), client.must(tool, arguments)), "{uri}");
    }
    for (uri, key, value) in [
        ("nexus://vm/web", "name", json!("web")),
        ("nexus://vm/web", "state", json!("ready")),
        (&format!("nexus://op/{op}"), "done", json!(false)),
    ] {
        let told: Value = serde_json::from_str(&read(&mut client, uri).1).expect("JSON");
        assert_eq!(told[key], value, "{uri}: {told}");
    }
    assert!(started.elapsed() < Duration::from_secs(20), "what an operation is doing is waited for");
    let log = client.inspect("web")["console_log"].as_str().expect("a path").to_owned();
    let mut log = std::fs::OpenOptions::new().append(true).open(log).expect("its console");
    log.write_all(b"said on the console\n").expect("it is written");
    let (kind, text) = read(&mut client, "nexus://vm/web/console");
    assert!(kind == "text/plain" && text.contains("said on the console"), "{text}");
    client.must("op_cancel", json!({ "op_id": op }));
}

#[test]
fn impossible_pages_are_refused() {
    let world = World::new();
    let mut client = world.client();
    for tool in
        ["vm_list", "image_list", "asset_list", "op_list", "drive_list", "template_list", "build_list"]
    {
        for limit in [json!(0), json!(501), json!(-1), json!("ten")] {
            let params = json!({ "name": tool, "arguments": { "limit": limit } });
            match client.request("tools/call", &params) {
                Ok(result) => {
                    let error = &result["_meta"]["dev.nexus/error"];
                    assert_eq!(error["code"], "invalid_argument", "{tool} {limit}: {result}");
                }
                Err(error) => assert!(error.to_string().contains("limit"), "{tool} {limit}: {error}"),
            }
        }
    }
    for tool in ["op_list", "build_list"] {
        let failure = refused(&mut client, tool, json!({ "cursor": "what" }));
        assert_eq!(failure.code, "invalid_argument", "{tool}: {}", failure.text);
    }
}
