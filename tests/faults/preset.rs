//! The network preset `packages`: what the host's own configuration and the setting `network.packages` name is reached, and nothing else.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use nexus_tests::client::Client;
use nexus_tests::web::Web;
use serde_json::{Value, json};

use crate::network::{connect, proxy, run, text};
use crate::world::{World, refused};

/// The address of a server, as in an allow list.
fn at(web: &Web) -> String {
    web.url("/").trim_start_matches("http://").trim_end_matches('/').to_owned()
}

/// A daemon on a host that names no registries; with the directories of its configuration, and of its user's.
fn on(host: &Path) -> (World, PathBuf, PathBuf) {
    let (root, home) = (host.join("root"), host.join("home"));
    fs::create_dir_all(home.join(".config/pip")).expect("a home");
    fs::create_dir_all(root.join("etc/apt")).expect("a directory for apt");
    let settings = [("NEXUS_APT_ROOT", root.to_str()), ("HOME", home.to_str())];
    let settings = settings.map(|(key, value)| (key, value.expect("a path of UTF-8")));
    (World::with(&settings), root, home)
}

#[test]
fn the_preset_packages_is_what_the_host_names() {
    let host = tempfile::tempdir().expect("a directory");
    let (world, root, home) = on(host.path());
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

    // --- the setting changes: what it no longer names is closed at once, also what is open
    let (mut open, head) = connect(&through, &at(&set));
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    client.must("settings_set", json!({ "reset": ["network.packages"] }));
    let ended = open.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
    assert!(!matches!(ended, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "it stays open");
    assert_eq!([may(&set), may(&apt), may(&pip), may(&other)], [false, true, true, false]);
    client.must("settings_set", json!({ "values": { "network.packages": at(&other) } }));
    assert_eq!([may(&set), may(&apt), may(&other)], [false, true, true]);
    client.must("settings_set", json!({ "reset": ["network.packages"] }));
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.must("vm_start", json!({ "vm": "web", "wait_s": 45 }));
    client.wait_for_state("web", "ready");
    let mut names = vec![at(&apt), at(&pip)];
    names.sort();
    assert_eq!(client.inspect("web")["network"]["packages"], json!(names));

    // --- a host that names none any more opens nothing, and neither does the next start
    fs::remove_file(root.join("etc/apt/sources.list")).expect("apt's sources are removed");
    fs::remove_file(home.join(".config/pip/pip.conf")).expect("pip's configuration is removed");
    for is_started_again in [false, true] {
        if is_started_again {
            client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
            client.must("vm_start", json!({ "vm": "web", "wait_s": 45 }));
            client.wait_for_state("web", "ready");
        } else {
            client.must("settings_set", json!({ "reset": ["network.packages"] }));
        }
        let through = proxy(&mut client);
        for web in [&set, &apt, &pip] {
            let (_, head) = connect(&through, &at(web));
            assert!(head.starts_with("HTTP/1.1 403 "), "{is_started_again}: {head}");
        }
        assert_eq!(client.inspect("web")["network"]["packages"], Value::Null);
    }

    // --- another preset has none of them
    let open = client.must("vm_update", json!({ "vm": "web", "network": "internet" }));
    assert_eq!(open["network"]["packages"], Value::Null);
    assert!(!text(&run(&mut client, "true")).contains("refused"));
    world.assert_in_order();
}

#[test]
fn a_list_beside_the_preset_packages_does_not_leave_the_registries_out() {
    let world = World::new();
    let mut client = world.client();
    client.must("settings_set", json!({ "values": { "network.packages": "registry.example:443" } }));
    let mut arguments = world.arguments("web");
    arguments["network"] = json!({ "preset": "packages", "allow": ["other.example"] });
    let failure = refused(&mut client, "vm_create", arguments.clone());
    assert_eq!(failure.code, "invalid_argument");
    assert!(failure.text.contains("network.allow without `*`"), "{}", failure.text);
    arguments["network"]["allow"] = json!(["*", "other.example"]);
    client.create(arguments);
    let narrower = json!({ "vm": "web", "network": { "allow": ["other.example"] } });
    assert_eq!(refused(&mut client, "vm_update", narrower).code, "invalid_argument");
    client.must(
        "vm_update",
        json!({ "vm": "web", "network": { "preset": "internet", "allow": ["other.example"] } }),
    );
    world.assert_in_order();
}

#[test]
fn a_token_without_the_scope_network_opens_no_registry_with_an_address() {
    let host = tempfile::tempdir().expect("a directory");
    let (world, ..) = on(host.path());
    let mut owner = Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects");
    let web = Web::start();
    owner.must("settings_set", json!({ "values": { "network.packages": at(&web) } }));
    world.create(&mut owner, "first");
    let image = owner.inspect("first")["image"]["name"].clone();
    let made = owner.must(
        "token_create",
        json!({ "name": "agent", "scopes": ["read", "exec", "lifecycle"], "tools": "all" }),
    );
    let secret = made["token"].as_str().expect("a token");
    let mut agent = Client::connect_with(&world.daemon.socket(), secret).expect("its holder connects");
    let create = |name: &str, network: Value| json!({ "name": name, "from": image, "disk": "128MiB", "network": network, "wait_s": 45 });

    let failure = refused(&mut agent, "vm_create", create("web", json!("packages")));
    assert_eq!(failure.code, "forbidden");
    let opens = format!("allow the package registries with the addresses {}", at(&web));
    assert!(failure.text.contains(&opens), "{}", failure.text);
    agent.create(create("web", json!("internet")));
    let change = json!({ "vm": "web", "network": "packages" });
    let failure = refused(&mut agent, "vm_update", change.clone());
    assert!(failure.text.contains(&opens), "{}", failure.text);
    assert_eq!(agent.inspect("web")["network"]["preset"], "internet");
    agent.must_confirmed("vm_update", change);
    assert_eq!(agent.inspect("web")["network"]["packages"], json!([at(&web)]));
    world.assert_in_order();
}
