//! Refused requests: wrong names, wrong states, impossible sizes. They leave no trace.

use std::{fs, thread};

use nexus_tests::daemon::Daemon;
use serde_json::{Value, json};

use crate::world::{World, is_alive, process, refused, soon};

/// The tools that work on one VM, with the other arguments that they need.
const OF_ONE_VM: [(&str, &str); 11] = [
    ("vm_inspect", "{}"),
    ("vm_start", "{}"),
    ("vm_stop", "{}"),
    ("vm_delete", r#"{ "force": true }"#),
    ("vm_update", r#"{ "protected": true }"#),
    ("vm_logs", "{}"),
    ("vm_history", "{}"),
    ("guest_run_command", r#"{ "command": "true" }"#),
    ("guest_file_read", r#"{ "path": "/etc/hostname" }"#),
    ("guest_file_write", r#"{ "path": "/tmp/x", "content": "x" }"#),
    ("guest_os_info", "{}"),
];

fn with_vm(arguments: &str, vm: &str) -> Value {
    let mut arguments: Value = serde_json::from_str(arguments).expect("arguments are JSON");
    arguments["vm"] = vm.into();
    arguments
}

#[test]
fn an_unknown_vm_is_said_to_be_unknown() {
    let world = World::new();
    let mut client = world.client();
    for vm in ["nobody", "aaaaaaaaaaaac"] {
        for (tool, arguments) in OF_ONE_VM {
            let failure = refused(&mut client, tool, with_vm(arguments, vm));
            assert_eq!(failure.code, "vm_not_found", "{tool}: {}", failure.text);
            assert!(failure.text.contains(vm) && failure.text.contains("vm_list"), "{}", failure.text);
        }
    }
    world.assert_in_order();
}

#[test]
fn names_are_refused_that_are_taken_or_none() {
    let world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "web");
    let failure = refused(&mut client, "vm_create", world.arguments("web"));
    assert_eq!(failure.code, "name_taken", "{}", failure.text);
    assert!(failure.text.contains("web"), "{}", failure.text);
    // A text in the form of an id is never a name, neither of a VM nor of anything else.
    let id = vm["id"].as_str().expect("an id").to_owned();
    for name in [&id, "aaaaaaaaaaaac", "Web", "1st", "a_b", "a/b", "-a", "a b", &"a".repeat(64), "ä"] {
        let params = json!({ "name": "vm_create", "arguments": world.arguments(name) });
        // For a malformed argument there is either a tool error or a protocol error, and never a VM.
        match client.request("tools/call", &params) {
            Ok(result) => assert_eq!(result["isError"], true, "{name:?} is taken: {result}"),
            Err(error) => assert!(error.to_string().contains("name"), "{name:?}: {error}"),
        }
    }
    let listed = client.must("vm_list", json!({}));
    assert_eq!(listed["vms"].as_array().map(Vec::len), Some(1), "{listed}");
    world.assert_in_order();
}

#[test]
fn impossible_sizes_are_refused_before_anything_is_made() {
    let world = World::new();
    let mut client = world.client();
    for (key, values) in [
        ("vcpus", vec![json!(0), json!(33), json!(-1), json!(1.5), json!("two")]),
        (
            "memory",
            vec![json!("0"), json!("1KiB"), json!("2EiB"), json!("100000001"), json!("lots"), json!("-1")],
        ),
        ("disk", vec![json!("0"), json!("1MiB"), json!("64TiB"), json!("33554433"), json!("1e3")]),
        ("wait_s", vec![json!(46), json!(-1)]),
    ] {
        for value in values {
            let mut arguments = world.arguments("odd");
            arguments[key] = value.clone();
            let params = json!({ "name": "vm_create", "arguments": arguments });
            match client.request("tools/call", &params) {
                Ok(result) => {
                    assert_eq!(result["isError"], true, "{key} {value} is taken: {result}");
                    let error = &result["_meta"]["dev.nexus/error"];
                    assert_eq!(error["code"], "invalid_argument", "{key} {value}: {result}");
                    assert!(error["message"].to_string().contains(key), "{key} {value}: {result}");
                }
                Err(error) => assert!(error.to_string().contains(key), "{key} {value}: {error}"),
            }
        }
    }
    // Smaller than its image: reported as soon as that is known, and nothing is left.
    let mut arguments = world.arguments("tight");
    arguments["disk"] = "16MiB".into();
    fill(&world, 20 << 20);
    let failure = refused(&mut client, "vm_create", arguments);
    assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
    assert!(failure.text.contains("disk"), "{}", failure.text);
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    world.assert_in_order();
}

/// Puts a file of this many non-zero bytes into the image's source.
fn fill(world: &World, bytes: usize) {
    std::fs::write(world.path("image/large"), vec![b'x'; bytes]).expect("a file is written");
}

#[test]
fn wrong_states_are_refused_with_what_to_do() {
    let world = World::new();
    let mut client = world.client();
    let mut arguments = world.arguments("box");
    arguments["start"] = false.into();
    client.to_the_end("vm_create", arguments, crate::world::SOON);
    for (tool, arguments) in OF_ONE_VM.iter().filter(|(tool, _)| tool.starts_with("guest_")) {
        let failure = refused(&mut client, tool, with_vm(arguments, "box"));
        assert_eq!(failure.code, "vm_not_running", "{tool}: {}", failure.text);
        assert!(failure.text.contains("vm_start"), "{tool}: {}", failure.text);
    }
    // Stopping a stopped VM and starting a running one succeed at once.
    assert_eq!(client.to_the_end("vm_stop", json!({ "vm": "box" }), crate::world::SOON)["state"], "created");
    let first = client.to_the_end("vm_start", json!({ "vm": "box" }), crate::world::SOON);
    let second = client.to_the_end("vm_start", json!({ "vm": "box" }), crate::world::SOON);
    assert_eq!((&first["boot_id"], &second["state"]), (&second["boot_id"], &json!("ready")));

    let failure = refused(&mut client, "vm_delete", json!({ "vm": "box" }));
    assert_eq!(failure.code, "vm_wrong_state", "{}", failure.text);
    assert!(failure.text.contains("force") && failure.text.contains("vm_stop"), "{}", failure.text);
    client.must("vm_update", json!({ "vm": "box", "protected": true }));
    for force in [false, true] {
        let failure = refused(&mut client, "vm_delete", json!({ "vm": "box", "force": force }));
        assert_eq!(failure.code, "vm_protected", "{}", failure.text);
        assert!(failure.text.contains("vm_update"), "{}", failure.text);
    }
    assert_eq!(client.inspect("box")["boot_id"], first["boot_id"], "it runs on untouched");

    let (pid, shim) = (process(&first, "pid"), process(&first, "shim_pid"));
    client.must_confirmed("vm_update", json!({ "vm": "box", "protected": false }));
    client.must("vm_delete", json!({ "vm": "box", "force": true }));
    assert!(!is_alive(pid), "its process runs on");
    soon("the end of the shim", || (!is_alive(shim)).then_some(()));
    world.assert_in_order();
}

#[test]
fn stops_of_one_vm_agree() {
    let world = World::hostile(&[("NEXUS_STOP_TIMEOUT_S", "2")]);
    let mut client = world.client();
    // Its guest says bye but stays.
    let vm = world.create(&mut client, "stays-1");
    let stops: Vec<_> = (0..4)
        .map(|at| {
            let mut client = world.client();
            let arguments = json!({ "vm": "stays-1", "force": at == 3, "wait_s": 45 });
            thread::spawn(move || client.to_the_end("vm_stop", arguments, crate::world::SOON))
        })
        .collect();
    for stop in stops {
        let stopped = stop.join().expect("a stop ends well");
        assert_eq!(stopped["state"], "stopped", "{stopped}");
    }
    assert!(!is_alive(process(&vm, "pid")));
    let again = client.to_the_end("vm_stop", json!({ "vm": "stays-1" }), crate::world::SOON);
    assert_eq!(again["state"], "stopped");
    let stops = client.must("vm_history", json!({ "vm": "stays-1" }));
    let stops =
        stops["transitions"].as_array().expect("a list").iter().filter(|t| t["to"] == "stopped").count();
    assert_eq!(stops, 1, "one machine is stopped once");
    world.assert_in_order();
}

#[test]
fn the_history_of_a_deleted_vm_stays() {
    let world = World::new();
    let mut client = world.client();
    let vm = world.create(&mut client, "past");
    client.must("vm_delete", json!({ "vm": "past", "force": true }));
    for reference in [json!("past"), vm["id"].clone()] {
        let history = client.must("vm_history", json!({ "vm": reference }));
        assert_eq!(history["id"], vm["id"]);
        let transitions = history["transitions"].as_array().expect("a list");
        assert_eq!(transitions[0]["reason"], "deleted", "newest first: {history}");
        assert!(transitions[0].get("to").is_none(), "{history}");
        let states: Vec<_> = transitions.iter().rev().filter_map(|t| t["to"].as_str()).collect();
        assert_eq!(states, ["creating", "created", "starting", "running", "ready"]);
    }
    // The name refers to the current VM; the id still refers to the one that had the name before.
    let mut arguments = world.arguments("past");
    arguments["start"] = false.into();
    let next = client.to_the_end("vm_create", arguments, crate::world::SOON);
    assert_eq!(client.must("vm_history", json!({ "vm": "past" }))["id"], next["id"]);
    assert_eq!(client.must("vm_history", json!({ "vm": vm["id"] }))["id"], vm["id"]);
    world.assert_in_order();
}

#[test]
fn a_pipe_or_device_as_a_source_is_refused_and_stops_nothing() {
    let world = World::new();
    let mut client = world.client();
    let pipe = world.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .expect("a pipe is made");
    for path in [pipe.display().to_string(), "/dev/zero".to_owned()] {
        for (tool, arguments) in [
            ("image_create", json!({ "name": "x", "from": format!("file:{path}") })),
            ("image_create", json!({ "name": "x", "from": format!("oci-archive:{path}") })),
            ("image_create", json!({ "name": "x", "from": format!("oci-layout:{path}#a") })),
            ("image_create", json!({ "name": "x", "from": format!("file:{path}"), "dry_run": true })),
            ("vm_create", json!({ "name": "x", "from": format!("file:{path}") })),
            ("settings_set", json!({ "values": { "default.kernel": format!("file:{path}") } })),
            ("asset_download", json!({ "kind": "kernel", "from": format!("file:{path}") })),
            ("template_create", json!({ "name": "x", "source": format!("file:{path}") })),
        ] {
            let failure = refused(&mut client, tool, arguments);
            assert_eq!(failure.code, "invalid_argument", "{tool} {path}: {}", failure.text);
        }
    }
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    world.assert_in_order();
}

#[test]
fn vms_with_a_label_are_deleted_together() {
    let world = World::new();
    let mut client = world.client();
    for (name, tags) in [
        ("a", json!({ "of": "test", "kind": "x" })),
        ("b", json!({ "of": "test" })),
        ("kept", json!({ "of": "test", "kind": "x" })),
        ("other", json!({ "of": "work", "kind": "x" })),
    ] {
        let mut arguments = world.arguments(name);
        arguments["tags"] = tags;
        client.create(arguments);
    }
    client.must("vm_update", json!({ "vm": "kept", "protected": true }));
    for wrong in [json!({}), json!({ "vm": "a", "tags": { "of": "test" } }), json!({ "tags": {} })] {
        assert_eq!(refused(&mut client, "vm_delete", wrong).code, "invalid_argument");
    }
    let names = |list: &Value| -> Vec<String> {
        let rows = list.as_array().cloned().unwrap_or_default();
        rows.iter().map(|row| row["name"].as_str().expect("a name").to_owned()).collect()
    };
    let of = json!({ "of": "test", "kind": "x" });
    // They are running: each gets an error, and none is deleted.
    let gone = client.must("vm_delete", json!({ "tags": of }));
    assert_eq!(
        (&gone["done"], names(&gone["deleted"]), names(&gone["failed"])),
        (&json!(true), vec![], vec!["a".into(), "kept".into()])
    );
    let gone = client.must("vm_delete", json!({ "tags": of, "force": true }));
    assert_eq!((names(&gone["deleted"]), names(&gone["failed"])), (vec!["a".into()], vec!["kept".into()]));
    assert_eq!(gone["failed"][0]["error"]["code"], "vm_protected");
    assert_eq!(names(&client.must("vm_list", json!({}))["vms"]), ["b", "kept", "other"]);
    assert_eq!(client.must("vm_delete", json!({ "tags": { "of": "nobody" } }))["deleted"], json!([]));
    client.must_confirmed("vm_update", json!({ "vm": "kept", "protected": false }));
}

/// Each `vm_create` without `memory` would be refused.
#[test]
fn a_default_of_more_memory_than_the_host_has_is_refused() {
    /// The most memory that any VM may have, in MiB.
    const LARGEST: u64 = 1 << 20;
    let daemon = Daemon::start_bare(&[]);
    let mut client = daemon.client();
    let meminfo = fs::read_to_string("/proc/meminfo").expect("the host's memory");
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("it is told");
    let total = total.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10;
    let set = |mebibytes: u64| json!({ "values": { "default.memory": format!("{mebibytes}MiB"), "default.vcpus": "2" } });
    if total + 1024 > LARGEST {
        eprintln!("SKIPPED: this host has {total} MiB, and no VM may have more than {LARGEST} MiB");
    } else {
        let failure = refused(&mut client, "settings_set", set(total + 1024));
        assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
        for words in ["default.memory: memory is", "more than this host has in all", "nothing was changed"] {
            assert!(failure.text.contains(words), "{words} in {}", failure.text);
        }
    }
    let all = client.must("settings_get", json!({}));
    let settings = all["settings"].as_array().expect("a list");
    assert!(settings.iter().all(|setting| setting["value"] == setting["default"]), "{all}");
    client.must("settings_set", set(total.min(LARGEST)));
}
