//! From a template to a machine.

use std::time::Duration;

use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::wait::until;
use serde_json::{Value, json};

#[test]
fn a_template_becomes_an_image_and_that_a_machine() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.must(
        "template_create",
        json!({ "name": "greeter", "source": "busybox", "size": "48MiB", "overlays": {
            "/etc/motd": { "content": "made by a template\n" },
            "/usr/local/bin/greet": { "content": "#!/bin/sh\necho hello from $(hostname)\n", "mode": "0755" },
        }, "services": {
            "count": { "command": "echo boot >> /var/boots; touch /run/counted; exec sleep 100000",
                "ready": { "command": "test -e /run/counted" } },
            "broken": { "argv": ["/no/such/program"], "restart": "no" },
        } }),
    );
    let build = client.to_the_end(
        "build_start",
        json!({ "template": "greeter", "wait_s": 0 }),
        Duration::from_mins(5),
    );
    assert_eq!((&build["status"], &build["cached"]), (&json!("success"), &json!(false)));

    client.create(json!({ "name": "made", "from": "template:greeter" }));
    let vm = client.inspect("made");
    assert_eq!(vm["image"]["id"], build["image"]["id"], "the image is the one that was built: {vm}");
    assert_eq!(
        client.run("made", "cat /etc/motd; /usr/local/bin/greet").stdout,
        "made by a template\nhello from made\n"
    );
    let said = client.run("made", "cat /etc/nexus/image.yaml").stdout;
    assert!(said.contains("name: greeter-"), "{said}");

    // Its services run once it is ready, and again after the next start.
    assert_eq!(vm["guest"]["problems"].as_array().expect("one does not start").len(), 1, "{vm}");
    assert!(vm["guest"]["problems"][0].to_string().contains("service broken: "), "{vm}");
    assert_eq!(client.run("made", "cat /var/boots").stdout, "boot\n");
    let listed = client.call_whole("guest_command_list", json!({ "vm": "made" })).expect("it is listed");
    assert!(listed.to_string().contains("service count"), "{listed}");
    client.to_the_end("vm_stop", json!({ "vm": "made" }), Duration::from_mins(3));
    client.to_the_end("vm_start", json!({ "vm": "made" }), Duration::from_mins(5));
    assert_eq!(client.run("made", "cat /var/boots").stdout, "boot\nboot\n");
}

#[test]
fn a_package_that_there_is_not_is_named_and_nothing_is_left() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let images = client.must("image_list", json!({}))["images"].clone();
    let packages = json!(["hello", "no-such-package-anywhere"]);
    client.must(
        "template_create",
        json!({ "name": "wishful", "source": "debian-minimal", "packages": packages }),
    );
    client.must("build_start", json!({ "template": "wishful", "wait_s": 0 }));
    let build = until(Duration::from_mins(10), || {
        let builds = client.must("build_list", json!({ "template": "wishful" }));
        Some(builds["builds"][0].clone()).filter(|build| build["status"] != "building")
    });
    let build = build.expect("the build ends");
    let build = client.must("build_inspect", json!({ "build": build["id"] }));
    assert_eq!((&build["status"], &build["image"]), (&json!("failed"), &Value::Null), "{build}");
    let (text, hint) = (build["error"]["message"].to_string(), build["error"]["hint"].to_string());
    assert!(text.contains("Unable to locate package no-such-package-anywhere"), "{text}");
    assert!(
        hint.contains("no package no-such-package-anywhere: ") && hint.contains("template_update"),
        "{hint}"
    );
    assert_eq!(client.must("image_list", json!({}))["images"], images);
    assert_in_order(&daemon);
}

#[test]
fn a_dry_run_of_busybox_knows_the_size_of_its_package() {
    let daemon = Daemon::start();
    let planned = json!({ "from": "busybox", "name": "another", "dry_run": true });
    let plan = daemon.client().must("image_create", planned)["plan"].take();
    let package = &plan["steps"][0];
    assert_eq!((&package["what"], &package["name"]), (&json!("packages"), &json!("busybox-static")));
    assert!(package["bytes"].as_u64().is_some_and(|bytes| bytes > 100_000), "{plan}");
    assert_eq!(plan["download_bytes"], package["bytes"]);
}

#[test]
fn memory_beyond_the_hosts_is_refused_before_anything_changes() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let text = std::fs::read_to_string("/proc/meminfo").expect("what the host has");
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let total: u64 = total.expect("its memory").trim().parse().expect("a number of KiB");
    let memory = format!("{}MiB", total / 1024 + 1);
    for dry_run in [true, false] {
        let wanted = json!({ "name": "big", "from": "busybox", "memory": memory, "dry_run": dry_run });
        let failure = client.call("vm_create", wanted).expect_err("more than there is");
        assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
        assert!(failure.text.contains("memory"), "{}", failure.text);
    }
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
}
