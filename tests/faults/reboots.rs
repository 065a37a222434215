//! A guest that only reboots.

use nexus_tests::wait::stay;
use serde_json::json;

use crate::world::{World, refused, soon};

#[test]
fn a_guest_that_reboots_in_a_loop_is_slowed_down_and_fails() {
    let world = World::hostile(&[]);
    let mut client = world.client();
    let mut arguments = world.arguments("reboots-1");
    arguments["wait_s"] = 0.into();
    client.must("vm_create", arguments);
    let failed = client.wait_for_state("reboots-1", "failed");
    let reason = failed["reason"].as_str().unwrap_or_default();
    assert!(reason.starts_with("the guest rebooted 8 times in a row within 60 s of its start"), "{failed}");
    let history = client.must("vm_history", json!({ "vm": "reboots-1", "limit": 500 }));
    let lines = history["transitions"].as_array().expect("a history");
    assert!(lines.len() < 50, "{} lines", lines.len());
    assert!(lines.iter().any(|line| line["reason"].to_string().contains("next start in 8 s")));
    world.assert_in_order();

    // While it waits, it can be stopped.
    client.must("vm_start", json!({ "vm": "reboots-1", "wait_s": 0 }));
    soon("a pause", || {
        client.inspect("reboots-1")["reason"].to_string().contains("next start in 4 s").then_some(())
    });
    client.must("vm_stop", json!({ "vm": "reboots-1", "wait_s": 45 }));
    stay(std::time::Duration::from_secs(6));
    let stopped = client.inspect("reboots-1");
    assert_eq!((&stopped["state"], &stopped["reason"]), (&json!("stopped"), &json!(null)), "{stopped}");
    client.must("vm_delete", json!({ "vm": "reboots-1" }));
    assert_eq!(refused(&mut client, "vm_inspect", json!({ "vm": "reboots-1" })).code, "vm_not_found");
    world.assert_in_order();
}
