//! The network preset `packages`: what the host's own configuration and the setting `network.packages` name is reached, and nothing else.

use std::fs;

use nexus_tests::web::Web;
use serde_json::{Value, json};

use crate::network::{connect, proxy, run, text};
use crate::world::{World, refused};

/// The address of a server, as in an allow list.
fn at(web: &Web) -> String {
    web.url("/").trim_start_matches("http://").trim_end_matches('/').to_owned()
}

#[test]
fn the_preset_packages_is_what_the_host_names() {
    let host = tempfile::tempdir().expect("a directory");
    let (root, home) = (host.path().join("root"), host.path().join("home"));
    fs::create_dir_all(home.join(".config/pip")).expect("a home");
    fs::create_dir_all(root.join("etc/apt")).expect("a directory for apt");
    let settings = [("NEXUS_APT_ROOT", root.to_str()), ("HOME", home.to_str())];
    let settings = settings.map(|(key, value)| (key, value.expect("a path of UTF-8")));
    let world = World::with(&settings);
    let mut client = world.client();
    let [set, apt, pip, other] = [(); 4].map(|()| Web::start());

    // --- a host that names none
    let mut arguments = world.arguments("web");
    arguments["network"] = json!("packages");
    let failure = refused(&mut client, "vm_create", arguments.clone());
    assert_eq!(failure.code, "host_unsuitable");
    assert!(failure.text.contains("allows nothing on this host"), "{}", failure.text);
    assert!(failure.text.contains("nexusctl settings set network.packages="), "{}", failure.text);
    assert_eq!(client.must("vm_list", json!({}))["vms"], json!([]));
    for wrong in ["*", "https://a.example/simple"] {
        refused(&mut client, "settings_set", json!({ "values": { "network.packages": wrong } }));
    }

    // --- those of the setting, and of apt's sources
    client.must("settings_set", json!({ "values": { "network.packages": at(&set) } }));
    let line = format!("deb http://{}/debian bookworm main\n", at(&apt));
    fs::write(root.join("etc/apt/sources.list"), line).expect("apt's sources are written");
    let made = client.create(arguments);
    assert_eq!(made["network"]["preset"], "packages");
    assert_eq!(made["network"]["packages"], json!([at(&set), at(&apt)]), "{made}");
    let through = proxy(&mut client);
    let may = |web: &Web| {
        let (_, head) = connect(&through, &at(web));
        assert!(head.starts_with("HTTP/1.1 200 ") || head.starts_with("HTTP/1.1 403 "), "{head}");
        head.starts_with("HTTP/1.1 200 ")
    };
    assert_eq!([may(&set), may(&apt), may(&pip), may(&other)], [true, true, false, false]);

    // --- what a refusal says can be done keeps the preset's names
    let denied = client.inspect("web")["network"]["denied"][0].clone();
    let hint = denied["hint"].as_str().expect("a hint").to_owned();
    assert_eq!(hint, format!("ask for vm_update network.allow=[\"*\",\"{}\"]", at(&other)), "{denied}");
    let allow = json!(["*", at(&other)]);
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": allow } }));
    assert_eq!([may(&set), may(&pip), may(&other)], [true, false, true]);

    // --- the host's configuration changes: it takes effect with the next change or start
    let index = format!("[global]\nindex-url = http://{}/simple\n", at(&pip));
    fs::write(home.join(".config/pip/pip.conf"), index).expect("pip's configuration is written");
    assert!(!may(&pip));
    client.must("vm_update", json!({ "vm": "web", "network": { "preset": "packages", "allow": [] } }));
    assert_eq!([may(&set), may(&apt), may(&pip), may(&other)], [true, true, true, false]);
    client.must("settings_set", json!({ "reset": ["network.packages"] }));
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.must("vm_start", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "ready");
    let mut names = vec![at(&apt), at(&pip)];
    names.sort();
    assert_eq!(client.inspect("web")["network"]["packages"], json!(names));

    // --- another preset has none of them
    let open = client.must("vm_update", json!({ "vm": "web", "network": "internet" }));
    assert_eq!(open["network"]["packages"], Value::Null);
    assert!(!text(&run(&mut client, "true")).contains("refused"));
    world.assert_in_order();
}
