//! Clients that repeat a creation because its answer never arrived: one key makes one thing, however often the
//! call is repeated.

use std::thread;

use serde_json::{Value, json};

use crate::world::{SOON, World, refused};

/// A call that creates something, the list of such things, and arguments that create a different one.
fn creations(world: &World) -> [(&'static str, Value, &'static str, &'static str, Value); 3] {
    let vm = json!({ "name": "box", "from": world.from, "disk": "128MiB", "start": false });
    let image = json!({ "name": "own", "from": world.from });
    let drive = json!({ "name": "data", "size": "64MiB" });
    let other = |arguments: &Value, key: &str, value: Value| {
        let mut other = arguments.clone();
        other[key] = value;
        other
    };
    [
        ("drive_create", drive.clone(), "drive_list", "drives", other(&drive, "size", "65MiB".into())),
        ("image_create", image.clone(), "image_list", "images", other(&image, "init", "system".into())),
        ("vm_create", vm.clone(), "vm_list", "vms", other(&vm, "vcpus", 2.into())),
    ]
}

fn keyed(arguments: &Value, key: &str) -> Value {
    let mut arguments = arguments.clone();
    arguments["idempotency_key"] = key.into();
    arguments
}

#[test]
fn one_key_is_one_thing_however_often_it_is_said() {
    let mut world = World::new();
    for (tool, arguments, list, things, other) in creations(&world) {
        let name = arguments["name"].clone();
        // All at once: the first one creates it, and all get the same answer.
        let calls: Vec<_> = (0..8)
            .map(|at| {
                let (mut client, mut arguments) = (world.client(), keyed(&arguments, "k-1"));
                // The wait time does not affect the result.
                arguments["wait_s"] = (40 + at % 3).into();
                thread::spawn(move || client.call(tool, arguments))
            })
            .collect();
        let outcomes: Vec<Value> = calls
            .into_iter()
            .map(|call| call.join().expect("an answer").unwrap_or_else(|e| panic!("{tool}: {}", e.text)))
            .collect();
        for outcome in &outcomes {
            assert_eq!(
                (&outcome["done"], &outcome["op_id"]),
                (&json!(true), &outcomes[0]["op_id"]),
                "{tool}"
            );
            assert_eq!(outcome["result"]["id"], outcomes[0]["result"]["id"], "{tool}");
        }
        let count = |world: &World| {
            let listed = world.client().must(list, json!({ "limit": 500 }));
            listed[things].as_array().expect("a list").iter().filter(|thing| thing["name"] == name).count()
        };
        assert_eq!(count(&world), 1, "{tool}");

        let mut client = world.client();
        let failure = refused(&mut client, tool, keyed(&other, "k-1"));
        assert_eq!(failure.code, "idempotency_conflict", "{tool}: {}", failure.text);
        // Without the key, or with another one, it is a separate call.
        for own in [arguments.clone(), keyed(&arguments, "k-2")] {
            let failure = refused(&mut client, tool, own);
            assert_eq!(failure.code, "name_taken", "{tool}: {}", failure.text);
        }
        // An empty key is invalid.
        let failure = refused(&mut client, tool, keyed(&arguments, ""));
        assert_eq!(failure.code, "name_taken", "{tool}: {}", failure.text);
        let params = json!({ "name": tool, "arguments": keyed(&arguments, &"k".repeat(129)) });
        match client.request("tools/call", &params) {
            Ok(result) => {
                let error = &result["_meta"]["dev.nexus/error"];
                assert_eq!(error["code"], "invalid_argument", "{tool}: {result}");
                assert!(error["message"].to_string().contains("idempotency_key"), "{tool}: {result}");
            }
            Err(error) => assert!(error.to_string().contains("idempotency_key"), "{tool}: {error}"),
        }
        // The daemon may be killed meanwhile.
        world.daemon.kill();
        world.daemon.restart();
        let mut client = world.client();
        let again = client.must(tool, keyed(&arguments, "k-1"));
        assert_eq!(again["op_id"], outcomes[0]["op_id"], "{tool}");
        assert_eq!(again["result"]["id"], outcomes[0]["result"]["id"], "{tool}");
        assert_eq!(count(&world), 1, "{tool}");
        world.assert_in_order();
    }
    // The created thing can be used.
    let mut client = world.client();
    client.to_the_end("vm_start", json!({ "vm": "box" }), SOON);
    client.must("vm_delete", json!({ "vm": "box", "force": true }));
    client.must("drive_delete", json!({ "drive": "data" }));
}
