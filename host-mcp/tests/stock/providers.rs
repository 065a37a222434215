//! Where assets come from, as clients see it.

use serde_json::{Value, json};

use crate::place::Place;

#[tokio::test]
async fn providers_are_listed_with_what_was_changed_and_without_credentials() {
    let place = Place::new();
    let providers = json!({
        "alpine": { "mirrors": ["http://someone:secret@mirror.example/alpine"] },
        "own": { "kind": "kernel", "about": "kernels of our own", "mirrors": ["https://kernels.example"],
            "versions": { "from": "list", "versions": ["6.1.1"] },
            "stages": [{ "stage": "download", "url": "{mirror}/vmlinux-{version}" }, { "stage": "checksum", "given": true }, { "stage": "store" }] },
    });
    let _daemon = place.daemon_with(&[("NEXUS_PROVIDERS", &providers.to_string())]).await;
    let mut client = place.client().await;
    let listed = client.must("provider_list", json!({})).await;
    assert!(!listed.to_string().contains("secret"), "{listed}");
    let all = listed["providers"].as_array().unwrap();
    let names: Vec<&str> = all.iter().map(|provider| provider["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "alpine",
            "anvil",
            "debian",
            "file",
            "firecracker",
            "firecracker-ci",
            "kernel-org",
            "own",
            "ubuntu",
            "url"
        ]
    );
    let of = |name: &str| all.iter().find(|provider| provider["name"] == name).unwrap();
    assert_eq!(
        (&of("alpine")["origin"], &of("alpine")["mirrors"]),
        (&json!("configured"), &json!(["http://mirror.example/alpine"]))
    );
    assert_eq!(
        (&of("debian")["origin"], &of("debian")["kinds"]),
        (&json!("built_in"), &json!(["kernel", "rootfs"]))
    );
    assert_eq!(of("own")["stages"], json!(["download", "checksum", "store"]));
    assert_eq!(of("anvil")["versions"], "github_releases");

    let kernels = client.must("provider_list", json!({ "kind": "kernel", "limit": 3 })).await;
    assert_eq!(kernels["providers"].as_array().map(Vec::len), Some(3));
    let rest =
        client.must("provider_list", json!({ "kind": "kernel", "cursor": kernels["next_cursor"] })).await;
    let names: Vec<&Value> =
        rest["providers"].as_array().unwrap().iter().map(|provider| &provider["name"]).collect();
    assert_eq!(names, ["firecracker-ci", "kernel-org", "own", "url"], "{kernels}");
}

#[tokio::test]
async fn a_check_says_whether_a_version_exists_suits_and_is_here() {
    let place = Place::new();
    let archives = place.directory.path();
    for version in ["1.2", "1.3"] {
        let mut builder = tar::Builder::new(std::fs::File::create(archives.join(version)).unwrap());
        builder.append_dir_all(".", place.root()).unwrap();
        builder.finish().unwrap();
    }
    let stages = json!([{ "stage": "open", "path": archives.join("{version}") }, { "stage": "store" }]);
    let providers = json!({ "ours": { "kind": "rootfs", "drivers": ["qemu"], "min_version": "1.2",
        "versions": { "from": "list", "versions": ["1.1", "1.2", "1.3"] }, "stages": stages } });
    let _daemon = place.daemon_with(&[("NEXUS_PROVIDERS", &providers.to_string())]).await;
    let mut client = place.client().await;
    let wanted = |version: &str, check: bool| json!({ "kind": "rootfs", "from": "ours", "version": version, "check": check });

    let checked = client.finished("asset_download", wanted("1.3", true)).await;
    assert_eq!(
        (&checked["installed"], &checked["version"], &checked["drivers"]),
        (&json!(false), &json!("1.3"), &json!(["qemu"]))
    );
    let here = client.must("asset_list", json!({ "available": false })).await;
    assert_eq!(here["assets"], json!([]), "a check downloads nothing");
    let old = client.finished("asset_download", wanted("1.1", true)).await;
    assert!(old["unsuitable"].is_string(), "{old}");
    let unknown = client.fails("asset_download", wanted("2.0", true)).await;
    assert_eq!(unknown.0, "asset_not_found", "{}", unknown.1);

    let downloaded = client.finished("asset_download", wanted("1.3", false)).await;
    let checked = client.finished("asset_download", wanted("1.3", true)).await;
    assert_eq!(
        (&checked["installed"], &checked["id"], &checked["drivers"]),
        (&json!(true), &downloaded["id"], &json!(["qemu"]))
    );
}
