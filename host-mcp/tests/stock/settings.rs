//! Settings: the defaults for new VMs.

use serde_json::{Value, json};

use crate::place::{Client, Place};

async fn value(client: &mut Client, key: &str) -> Value {
    client.must("settings_get", json!({ "key": key })).await["settings"][0]["value"].take()
}

#[tokio::test]
async fn vms_honour_the_settings_and_rollback_takes_them_back() {
    let place = Place::new();
    let mut daemon = place.daemon().await;
    let mut client = place.client().await;
    let all = client.must("settings_get", json!({})).await;
    assert_eq!(all["revision"], 0);
    for setting in all["settings"].as_array().unwrap() {
        assert_eq!(setting["value"], setting["default"], "{setting}");
    }
    let set = client
        .must(
            "settings_set",
            json!({ "values": { "default.image": place.source(), "default.memory": "256M", "default.vcpus": "2",
                "default.disk": "1GiB" } }),
        )
        .await;
    assert_eq!(set["settings"].as_array().unwrap().len(), 4);
    let first = set["revision"].as_u64().unwrap();
    let vm = client.finished("vm_create", json!({ "name": "plain" })).await;
    assert_eq!((&vm["vcpus"], &vm["memory"], &vm["state"]), (&json!(2), &json!("256MiB"), &json!("ready")));
    assert_eq!(vm["image"]["source"], place.source());
    assert_eq!(vm["drives"][0]["size"], "1GiB");
    let asked = client.finished("vm_create", json!({ "name": "asked", "vcpus": 1, "start": false })).await;
    assert_eq!((&asked["vcpus"], &asked["memory"]), (&json!(1), &json!("256MiB")));

    // All or nothing, and every mistake at once.
    let wrong = json!({ "values": { "default.memory": "1GiB", "default.vcpus": "99", "dns": "nowhere", "default.image": "none" } });
    let (code, text) = client.fails("settings_set", wrong).await;
    assert_eq!(code, "invalid_argument");
    for word in ["default.vcpus", "dns", "default.image", "nothing was changed"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    assert_eq!(value(&mut client, "default.memory").await, "256M");
    let (code, text) = client.fails("settings_set", json!({ "values": { "default.memori": "1G" } })).await;
    assert!(code == "invalid_argument" && text.contains("default.memory"), "{text}");

    client.must("settings_set", json!({ "values": { "default.memory": "1GiB", "dns": "9.9.9.9" } })).await;
    client.must("settings_set", json!({ "reset": ["default.vcpus"] })).await;
    let history = client.must("settings_history", json!({ "key": "default.memory" })).await;
    let values: Vec<_> =
        history["changes"].as_array().unwrap().iter().map(|change| &change["value"]).collect();
    assert_eq!(values, ["1GiB", "256M"]);
    let page = client.must("settings_history", json!({ "limit": 2 })).await;
    assert!(page["changes"][0].get("value").is_none() && page["next_cursor"].is_string(), "{page}");

    daemon.kill().await.unwrap();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let back = client.must("settings_rollback", json!({ "revision": first })).await;
    let mut keys: Vec<_> =
        back["settings"].as_array().unwrap().iter().map(|s| s["key"].as_str().unwrap()).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["default.memory", "default.vcpus", "dns"]);
    assert_eq!(value(&mut client, "default.memory").await, "256M");
    assert_eq!(value(&mut client, "default.vcpus").await, "2");
    assert_eq!(value(&mut client, "dns").await, "");
    client.must("settings_rollback", json!({ "revision": 0, "key": "default.vcpus" })).await;
    assert_eq!(value(&mut client, "default.vcpus").await, "1");
    assert_eq!(value(&mut client, "default.memory").await, "256M", "only the one");
    assert_eq!(
        client.fails("settings_rollback", json!({ "revision": 1_000_000 })).await.0,
        "invalid_argument"
    );
    for vm in ["plain", "asked"] {
        client.must("vm_delete", json!({ "vm": vm, "force": true })).await;
    }
}

#[tokio::test]
async fn a_drive_is_as_large_as_its_image_unless_another_size_is_asked_for() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    client.must("settings_set", json!({ "values": { "default.disk": "32MiB" } })).await;
    client.must("template_create", json!({ "name": "big", "source": place.source(), "size": "96MiB" })).await;
    let vm =
        client.finished("vm_create", json!({ "name": "a", "from": "template:big", "start": false })).await;
    assert_eq!(vm["drives"][0]["size"], "96MiB");
    let small = json!({ "name": "b", "from": "template:big", "disk": "64MiB", "start": false, "wait_s": 30 });
    let (code, text) = client.fails("vm_create", small).await;
    assert!(code == "invalid_argument" && text.contains("96MiB"), "{text}");
}
