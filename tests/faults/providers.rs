//! Providers that are added, changed and removed while the daemon runs, with servers of the tests.

use nexus_tests::client::Client;
use nexus_tests::daemon::program;
use nexus_tests::web::Web;
use serde_json::{Value, json};

use crate::downloads::{archive, digest, gzip, installed};
use crate::world::{SOON, World, refused};

/// Servers, and a daemon that has only the built-in providers and those that it is given.
struct Scene {
    first: Web,
    second: Web,
    world: World,
}

impl Scene {
    fn new() -> Self {
        Self::with(&[])
    }

    fn with(settings: &[(&str, &str)]) -> Self {
        let mut all = vec![("NEXUS_APT_ROOT", "/nonexistent"), ("NO_PROXY", "127.0.0.1")];
        all.extend(settings);
        Self { first: Web::start(), second: Web::start(), world: World::with(&all) }
    }
}

/// Serves root filesystems in these versions: a listing, a list of checksums, and archives.
fn serve(web: &Web, versions: &[&str]) {
    let (mut listing, mut sums) = (String::new(), String::new());
    for version in versions {
        let packed = gzip(&root(version));
        let name = format!("root-{version}.tar.gz");
        listing.push_str(&format!("<a href=\"{name}\">{name}</a>\n"));
        sums.push_str(&format!("{}  {name}\n", digest(&packed)));
        web.put(&format!("/r/{name}"), packed);
    }
    web.put("/r/", listing);
    web.put("/r/SHA256SUMS", sums);
}

fn root(version: &str) -> Vec<u8> {
    archive(&[("etc/os-release", format!("ID=trial\nVERSION_ID={version}\n").as_bytes())])
}

/// The fields of a provider that uses that server.
fn ours(web: &Web) -> Value {
    json!({
        "provider": "ours",
        "kind": "rootfs",
        "mirrors": [web.url("/r")],
        "versions": { "from": "listing", "url": "{mirror}/", "before": "href=\"root-", "after": ".tar.gz\"" },
        "stages": [
            { "stage": "download", "url": "{mirror}/root-{version}.tar.gz" },
            { "stage": "checksum", "document": "{mirror}/SHA256SUMS", "name": "root-{version}.tar.gz" },
            { "stage": "decompress", "format": "gzip" },
            { "stage": "store" },
        ],
    })
}

fn wanted(version: &str) -> Value {
    json!({ "kind": "rootfs", "from": "ours", "version": version, "wait_s": 45 })
}

fn inspect(client: &mut Client, provider: &str) -> Value {
    client.must("provider_inspect", json!({ "provider": provider }))
}

/// All providers, and how often they were changed.
fn everything(client: &mut Client) -> [Value; 2] {
    [
        client.must("provider_list", json!({ "limit": 500 })),
        client.must("settings_history", json!({ "limit": 500 })),
    ]
}

#[test]
fn a_provider_is_added_changed_and_removed_while_the_daemon_runs() {
    let mut scene = Scene::new();
    serve(&scene.first, &["1.0", "1.1"]);
    serve(&scene.second, &["2.0"]);
    let mut client = scene.world.client();
    let shipped = everything(&mut client);

    let added = client.must("provider_set", ours(&scene.first));
    assert_eq!(
        (&added["provider"]["origin"], &added["set"], &added["changed_by"].is_string()),
        (&json!("set"), &json!(["kind", "mirrors", "stages", "versions"]), &true),
        "{added}"
    );
    assert_eq!(added["fields"]["stages"], ours(&scene.first)["stages"]);
    // Repeating it changes nothing.
    assert_eq!(client.must("provider_set", ours(&scene.first)), added);

    let checked =
        client.to_the_end("asset_download", json!({ "kind": "rootfs", "from": "ours", "check": true }), SOON);
    assert_eq!((&checked["version"], &checked["installed"]), (&json!("1.1"), &json!(false)), "{checked}");
    let made = client.to_the_end("asset_download", wanted("1.0"), SOON);
    assert_eq!((&made["verified"], &made["sha256"]), (&json!("checksum"), &json!(digest(&root("1.0")))));

    // Another mirror has other versions, and the cached ones of the first are not used.
    let mirrors = json!({ "provider": "ours", "mirrors": [scene.second.url("/r")], "about": "ours" });
    let changed = client.must("provider_set", mirrors);
    assert_eq!(changed["fields"]["stages"], added["fields"]["stages"]);
    assert_eq!(changed["provider"]["mirrors"], json!([scene.second.url("/r")]));
    let none = refused(&mut client, "asset_download", wanted("1.1"));
    assert_eq!(none.code, "asset_not_found", "{}", none.text);
    // Its files are verified as before.
    scene.second.put("/r/root-2.0.tar.gz", gzip(b"something else"));
    assert_eq!(refused(&mut client, "asset_download", wanted("2.0")).code, "verification_failed");
    serve(&scene.second, &["2.0"]);
    client.to_the_end("asset_download", wanted("2.0"), SOON);
    assert_eq!(installed(&mut client), ["ours-1-0", "ours-2-0"]);

    // It survives a restart of the daemon.
    scene.world.daemon.kill();
    scene.world.daemon.restart();
    let mut client = scene.world.client();
    assert_eq!(inspect(&mut client, "ours"), changed);
    let whole = client.must("provider_list", json!({}));
    let names = |list: &Value| -> Vec<String> {
        let rows = list["providers"].as_array().expect("a list");
        rows.iter().map(|row| row["name"].as_str().expect("a name").to_owned()).collect()
    };
    assert!(names(&whole).contains(&"ours".to_owned()), "{whole}");

    // Its history is part of the settings' history.
    let history = client.must("settings_history", json!({ "key": "provider.ours" }));
    assert_eq!(history["changes"].as_array().map(Vec::len), Some(2), "{history}");
    let back = json!({ "revision": added["revision"], "key": "provider.ours" });
    let back = client.must("settings_rollback", back);
    assert_eq!(back["settings"][0]["key"], "provider.ours", "{back}");
    assert_eq!(inspect(&mut client, "ours")["fields"], added["fields"]);

    let without = client.must("provider_set", json!({ "provider": "ours", "reset": ["kind"] }));
    assert_eq!(without["fields"].get("kind"), None, "{without}");

    // A provider that is in use cannot be removed.
    let template = json!({ "name": "web", "source": "rootfs:ours@1.0" });
    client.must("template_create", template);
    let needed = refused(&mut client, "provider_remove", json!({ "provider": "ours" }));
    assert!(needed.code == "in_use" && needed.text.contains("the template web"), "{}", needed.text);
    let needed = refused(&mut client, "settings_rollback", json!({ "revision": 0 }));
    assert!(needed.code == "in_use" && needed.text.contains("the template web"), "{}", needed.text);
    client.must("template_delete", json!({ "template": "web" }));
    let removed = client.must("provider_remove", json!({ "provider": "ours" }));
    assert_eq!(removed.get("provider"), None, "{removed}");
    assert_eq!(client.must("provider_list", json!({ "limit": 500 })), shipped[0]);
    assert_eq!(refused(&mut client, "asset_download", wanted("1.1")).code, "asset_not_found");
    assert_eq!(
        refused(&mut client, "provider_remove", json!({ "provider": "ours" })).code,
        "asset_not_found"
    );
    assert_eq!(installed(&mut client), ["ours-1-0", "ours-2-0"], "what came from it stays");
    client.must("settings_rollback", json!({ "revision": added["revision"] }));
    assert_eq!(inspect(&mut client, "ours")["fields"], added["fields"]);
    client.must("settings_rollback", json!({ "revision": 0 }));
    assert_eq!(client.must("provider_list", json!({ "limit": 500 })), shipped[0]);
    scene.world.assert_in_order();
}

#[test]
fn what_another_provider_of_that_name_had_is_not_taken_for_its_own() {
    let scene = Scene::new();
    serve(&scene.first, &["1.0"]);
    let other = archive(&[("etc/os-release", b"ID=other\nVERSION_ID=1.0\n")]);
    let packed = gzip(&other);
    serve(&scene.second, &["1.0"]);
    scene.second.put("/r/SHA256SUMS", format!("{}  root-1.0.tar.gz\n", digest(&packed)));
    scene.second.put("/r/root-1.0.tar.gz", packed);
    let mut client = scene.world.client();
    let check = json!({ "kind": "rootfs", "from": "ours", "check": true, "wait_s": 45 });
    let statuses = |client: &mut Client| -> Vec<Value> {
        let all = client.must("asset_list", json!({ "kind": "rootfs", "limit": 500 }));
        let ours = all["assets"].as_array().expect("a list").iter().filter(|a| a["provider"] == "ours");
        ours.map(|asset| asset["installed"].clone()).collect()
    };

    client.must("provider_set", ours(&scene.first));
    let first = client.to_the_end("asset_download", wanted("1.0"), SOON);
    assert_eq!(first["sha256"], digest(&root("1.0")));
    assert_eq!(statuses(&mut client), [true]);
    client.must("provider_remove", json!({ "provider": "ours" }));
    // Without another provider of that name, it still counts as the same.
    let image = client.to_the_end("image_create", json!({ "from": "rootfs:ours@1.0", "name": "a" }), SOON);
    assert_eq!(image["distro"], "trial-1.0", "{image}");

    client.must("provider_set", ours(&scene.second));
    assert_eq!(client.to_the_end("asset_download", check.clone(), SOON)["installed"], false);
    assert_eq!(statuses(&mut client), [true, false]);
    let image = client.to_the_end("image_create", json!({ "from": "rootfs:ours@1.0", "name": "b" }), SOON);
    assert_eq!(image["distro"], "other-1.0", "{image}");
    let second = client.to_the_end("asset_download", wanted("1.0"), SOON);
    assert_eq!(second["sha256"], digest(&other));
    assert_ne!(second["name"], first["name"]);
    assert_eq!(statuses(&mut client), [true, true]);

    // An unchanged definition has its old assets again.
    client.must("provider_set", ours(&scene.first));
    assert_eq!(client.to_the_end("asset_download", wanted("1.0"), SOON)["id"], first["id"]);
    assert_eq!(client.to_the_end("asset_download", check, SOON)["id"], first["id"]);
    // An additional mirror changes nothing; a built-in provider is the same with any mirror.
    let both = json!({ "provider": "ours", "mirrors": [scene.second.url("/x"), scene.first.url("/r")] });
    client.must("provider_set", both);
    assert_eq!(client.to_the_end("asset_download", wanted("1.0"), SOON)["id"], first["id"]);
    scene.world.assert_in_order();
}

#[test]
fn a_built_in_provider_is_changed_and_made_as_shipped() {
    let scene = Scene::new();
    let arch = std::env::consts::ARCH;
    let name = format!("alpine-minirootfs-3.21.3-{arch}.tar.gz");
    let path = format!("/m/v3.21/releases/{arch}/{name}");
    let packed = gzip(&root("3.21.3"));
    scene.first.put(&format!("{path}.sha256"), format!("{}  {name}\n", digest(&packed)));
    scene.first.put(&path, packed);
    let mut client = scene.world.client();
    let shipped = inspect(&mut client, "alpine");
    assert_eq!((&shipped["provider"]["origin"], shipped.get("set")), (&json!("built_in"), None), "{shipped}");

    let mirrors = json!({ "provider": "alpine", "mirrors": [scene.first.url("/m")] });
    let changed = client.must("provider_set", mirrors);
    assert_eq!(
        (&changed["provider"]["origin"], &changed["set"], &changed["fields"]["stages"]),
        (&json!("set"), &json!(["mirrors"]), &shipped["fields"]["stages"]),
        "{changed}"
    );
    client.to_the_end("asset_download", json!({ "kind": "rootfs", "from": "alpine@3.21.3" }), SOON);
    assert_eq!(scene.first.asked(&path), [None]);

    let again = client.must("provider_remove", json!({ "provider": "alpine" }));
    assert_eq!(again["provider"], shipped["provider"], "{again}");
    assert_eq!(inspect(&mut client, "alpine")["fields"], shipped["fields"]);
    // It already has that definition.
    let revision = client.must("provider_remove", json!({ "provider": "alpine" }))["revision"].clone();
    assert_eq!(revision, again["revision"]);
}

#[test]
fn what_is_wrong_changes_nothing() {
    let scene = Scene::new();
    serve(&scene.first, &["1.0"]);
    let mut client = scene.world.client();
    client.must("provider_set", ours(&scene.first));
    let before = everything(&mut client);
    let stages = |stages: Value| json!({ "provider": "ours", "stages": stages });
    let download = json!({ "stage": "download", "url": "{mirror}/f" });
    let not_a_key = scene.world.path("not-a-key");
    std::fs::write(&not_a_key, "nothing").expect("a file is written");
    for (arguments, words) in [
        (json!({ "provider": "ours" }), vec!["nothing to change"]),
        (json!({ "provider": "Ours", "about": "x" }), vec!["provider", "is not a name"]),
        (json!({ "provider": "ours", "speed": 1 }), vec!["unknown argument `speed`"]),
        (json!({ "provider": "ours", "kind": "disk" }), vec!["kind: must be one of kernel, rootfs, vmm"]),
        (json!({ "provider": "ours", "reset": ["speed"] }), vec!["no field `speed`", "mirrors"]),
        (json!({ "provider": "ours", "reset": ["name"] }), vec!["no field `name`"]),
        (json!({ "provider": "ours", "about": "x", "reset": ["about"] }), vec!["about cannot be both"]),
        // Fields that others depend on.
        (json!({ "provider": "ours", "reset": ["stages"] }), vec!["missing field `stages`"]),
        (
            json!({ "provider": "ours", "reset": ["kind", "mirrors", "versions", "stages"] }),
            vec!["missing field `versions`"],
        ),
        (json!({ "provider": "new", "reset": ["about"] }), vec!["provider new", "missing field `versions`"]),
        (json!({ "provider": "ours", "reset": ["mirrors"] }), vec!["{mirror}", "nothing is known"]),
        (
            json!({ "provider": "ours", "mirrors": ["ftp://host.example"] }),
            vec!["mirrors", "is not an address"],
        ),
        (
            json!({ "provider": "ours", "mirrors": ["http://host.example/"] }),
            vec!["mirrors", "is not an address"],
        ),
        (json!({ "provider": "ours", "api": "host.example" }), vec!["is not an address"]),
        (json!({ "provider": "ours", "drivers": ["xen"] }), vec!["drivers[0]", "unknown driver `xen`"]),
        (json!({ "provider": "ours", "keys": ["key.asc"] }), vec!["keys", "absolute path"]),
        (json!({ "provider": "ours", "keys": ["/nonexistent/key.asc"] }), vec!["/nonexistent/key.asc"]),
        (json!({ "provider": "ours", "keys": [not_a_key] }), vec!["not-a-key"]),
        (
            json!({ "provider": "ours", "versions": { "from": "oracle" } }),
            vec!["versions", "unknown variant `oracle`"],
        ),
        (
            json!({ "provider": "ours", "versions": { "from": "list" } }),
            vec!["versions", "missing field `versions`"],
        ),
        (stages(json!([])), vec!["ends with store"]),
        (stages(json!([download])), vec!["ends with store"]),
        (
            stages(json!([download, { "stage": "frobnicate" }, { "stage": "store" }])),
            vec!["stages[1]", "`frobnicate`"],
        ),
        (
            stages(json!([{ "stage": "download", "url": "{mirrors}/f" }, { "stage": "store" }])),
            vec!["stages[0]", "{mirrors}"],
        ),
        (
            stages(json!([{ "stage": "download", "url": "x", "as": "y" }, { "stage": "store" }])),
            vec!["stages[0]", "unknown field `as`"],
        ),
        (
            stages(json!([download, { "stage": "checksum", "sha256": "12" }, { "stage": "store" }])),
            vec!["64 hexadecimal digits"],
        ),
        (json!({ "provider": "ours", "about": "x".repeat(300 << 10) }), vec!["exceeds the limit of 262144"]),
        // Nothing to start from.
        (json!({ "provider": "new", "about": "x" }), vec!["provider new", "missing field `versions`"]),
        (json!({ "provider": "alpine", "stages": [] }), vec!["provider alpine", "ends with store"]),
    ] {
        let failure = refused(&mut client, "provider_set", arguments);
        assert_eq!(failure.code, "invalid_argument", "{}", failure.text);
        for word in words {
            assert!(failure.text.contains(word), "{word} in {}", failure.text);
        }
    }
    for (tool, arguments) in [
        ("provider_inspect", json!({ "provider": "nobody" })),
        ("provider_remove", json!({ "provider": "nobody" })),
        ("provider_remove", json!({ "provider": "" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "asset_not_found", "{}", failure.text);
    }
    let set = json!({ "values": { "provider.ours": "{}" } });
    let failure = refused(&mut client, "settings_set", set);
    assert!(failure.text.contains("provider_set"), "{}", failure.text);
    assert_eq!(everything(&mut client), before);
    client.to_the_end("asset_download", wanted("1.0"), SOON);
}

#[test]
fn a_download_ends_as_it_began() {
    let scene = Scene::new();
    serve(&scene.first, &["1.0", "1.1"]);
    let mut client = scene.world.client();
    for (version, then) in [("1.0", "provider_set"), ("1.1", "provider_remove")] {
        client.must("provider_set", ours(&scene.first));
        let path = format!("/r/root-{version}.tar.gz");
        scene.first.hold(&path, 10);
        let mut arguments = wanted(version);
        arguments["wait_s"] = json!(0);
        let begun = client.must("asset_download", arguments);
        crate::world::soon("the download begins", || (!scene.first.asked(&path).is_empty()).then_some(()));
        match then {
            "provider_set" => {
                let elsewhere = json!({ "provider": "ours", "mirrors": [scene.second.url("/r")] });
                client.must(then, elsewhere)
            }
            _ => client.must(then, json!({ "provider": "ours" })),
        };
        scene.first.release(&path);
        let ended = client.must("op_get", json!({ "op_id": begun["op_id"], "wait_s": 45 }));
        assert_eq!(ended["state"], "succeeded", "{ended}");
        assert_eq!(ended["result"]["sha256"], digest(&root(version)), "{ended}");
        assert!(scene.second.asked(&path).is_empty());
    }
}

#[test]
fn what_the_configuration_says_stays() {
    let configured = json!({ "alpine": { "about": "as configured" } }).to_string();
    let mut scene = Scene::new();
    serve(&scene.first, &["1.0"]);
    let mut client = scene.world.client();
    let about = json!({ "provider": "alpine", "about": "as set" });
    let set = client.must("provider_set", about.clone());
    client.must("provider_set", ours(&scene.first));

    scene.world.daemon.set("NEXUS_PROVIDERS", Some(&configured));
    scene.world.daemon.stop();
    scene.world.daemon.restart();
    let mut client = scene.world.client();
    let now = inspect(&mut client, "alpine");
    assert_eq!(
        (&now["provider"]["origin"], &now["fields"]["about"], now.get("set")),
        (&json!("configured"), &json!("as configured"), None),
        "{now}"
    );
    assert_eq!(inspect(&mut client, "ours")["provider"]["origin"], "set");
    let revision = now["revision"].clone();
    for (tool, arguments) in [
        ("provider_set", about),
        ("provider_remove", json!({ "provider": "alpine" })),
        ("settings_rollback", json!({ "revision": 0, "key": "provider.alpine" })),
    ] {
        let failure = refused(&mut client, tool, arguments);
        assert_eq!(failure.code, "forbidden", "{tool}: {}", failure.text);
        assert!(
            failure.text.contains("nexus.toml") && failure.text.contains("[providers.alpine]"),
            "{}",
            failure.text
        );
    }
    assert_eq!(inspect(&mut client, "alpine")["revision"], revision);
    // The other settings are rolled back without it.
    client.must("settings_rollback", json!({ "revision": 0 }));
    assert_eq!(
        refused(&mut client, "provider_inspect", json!({ "provider": "ours" })).code,
        "asset_not_found"
    );
    assert_eq!(inspect(&mut client, "alpine")["fields"]["about"], "as configured");

    // The run-time settings apply again once the file no longer defines it.
    scene.world.daemon.set("NEXUS_PROVIDERS", None);
    scene.world.daemon.stop();
    scene.world.daemon.restart();
    let mut client = scene.world.client();
    assert_eq!(inspect(&mut client, "alpine")["fields"], set["fields"]);
}

#[test]
fn who_sees_one_machine_changes_no_provider() {
    let scene = Scene::new();
    let mut client = scene.world.client();
    scene.world.create(&mut client, "inner");
    let before = everything(&mut client);
    let mut scoped =
        Client::connect_at(&scene.world.daemon.socket(), "/mcp/vm/inner").expect("a scoped client");
    let listed = scoped.request("tools/list", &json!({})).expect("a list");
    assert!(
        listed.to_string().contains("run_command") && !listed.to_string().contains("provider"),
        "{listed}"
    );
    for (tool, arguments) in [
        ("provider_set", json!({ "provider": "alpine", "about": "x" })),
        ("provider_remove", json!({ "provider": "alpine" })),
        ("provider_list", json!({})),
        ("settings_rollback", json!({ "revision": 0 })),
    ] {
        let params = json!({ "name": tool, "arguments": arguments });
        let refusal = scoped.request("tools/call", &params).expect_err("a protocol error");
        assert!(refusal.to_string().contains(tool), "{refusal}");
    }
    assert_eq!(everything(&mut client), before);
    client.must("vm_delete", json!({ "vm": "inner", "force": true }));
}

#[test]
fn credentials_are_used_and_never_shown() {
    let scene = Scene::new();
    serve(&scene.first, &["1.0"]);
    let mut client = scene.world.client();
    let mut secret = ours(&scene.first);
    secret["mirrors"] = json!([scene.first.url("/r").replace("://", "://me:s3cret@")]);
    let set = client.must("provider_set", secret);
    assert_eq!(set["abridged"], json!(["mirrors"]));
    assert_eq!(set["fields"]["mirrors"], json!([scene.first.url("/r")]));
    let made = client.to_the_end("asset_download", wanted("1.0"), SOON);
    let later = client.must("provider_set", json!({ "provider": "ours", "about": "later" }));
    let back = client.must("settings_rollback", json!({ "revision": set["revision"] }));
    let history = client.must("settings_history", json!({}));
    let got = client.must("settings_get", json!({ "key": "provider.ours" }));
    let all = everything(&mut client);
    let asset = client.must("asset_inspect", json!({ "asset": made["id"] }));
    for shown in [&set, &made, &later, &back, &history, &got, &all[0], &all[1], &asset] {
        assert!(!shown.to_string().contains("s3cret"), "{shown}");
    }
    // It still exists, though.
    assert_eq!(inspect(&mut client, "ours")["abridged"], json!(["mirrors"]));
    assert!(!scene.world.daemon.log().contains("s3cret"));
}

#[test]
fn the_command_line_sets_shows_and_removes() {
    let scene = Scene::new();
    serve(&scene.first, &["1.0"]);
    let run = |arguments: &[&str], code: i32| {
        let output = std::process::Command::new(program("nexusctl"))
            .args(arguments)
            .envs(scene.world.daemon.environment())
            .output()
            .expect("nexusctl runs");
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said:?}");
        said
    };
    let file = scene.world.path("ours.json");
    let mut fields = ours(&scene.first);
    fields.as_object_mut().expect("an object").remove("provider");
    std::fs::write(&file, fields.to_string()).expect("a file is written");
    let path = file.to_str().expect("a path of UTF-8");
    let [shown, _] = run(&["provider", "set", "ours", "--file", path, "about=roots of ours"], 0);
    for words in
        ["roots of ours", "set at run time", "download url={mirror}/root-{version}.tar.gz", "listing"]
    {
        assert!(shown.contains(words), "{words} in {shown}");
    }
    // The output can be used as input, with the same result.
    let [whole, _] = run(&["provider", "show", "ours", "--json"], 0);
    std::fs::write(&file, &whole).expect("a file is written");
    let [copy, _] = run(&["provider", "set", "copy", "--file", path, "--json"], 0);
    let parse = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    assert_eq!(parse(&copy)["fields"], parse(&whole)["fields"]);
    run(&["rootfs", "download", "copy", "1.0"], 0);
    let [listed, _] = run(&["provider", "list"], 0);
    assert!(listed.contains("copy") && listed.contains("built in"), "{listed}");
    assert_eq!(run(&["asset", "providers"], 0)[0], listed);

    let [_, said] = run(&["provider", "set", "copy", "stages=[]"], 2);
    assert!(said.contains("ends with store"), "{said}");
    let [_, said] = run(&["provider", "set", "copy", "speed=1"], 2);
    assert!(said.contains("unknown field `speed`"), "{said}");
    run(&["provider", "set", "copy"], 2);
    run(&["provider", "set", "copy", "--file", "/nonexistent"], 3);
    assert_eq!(run(&["provider", "rm", "copy"], 0)[0], "copy removed\n");
    assert_eq!(run(&["provider", "reset", "alpine"], 0)[0], "alpine reset to its shipped definition\n");
    let [_, said] = run(&["provider", "rm", "copy"], 3);
    assert!(said.contains("nexusctl provider list"), "{said}");
}
