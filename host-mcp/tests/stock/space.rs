//! Room on the disk: what is in use stays, what nothing refers to can go.

use std::path::Path;

use serde_json::{Value, json};

use crate::place::{Client, Place};

fn names(pruned: &Value) -> Vec<&str> {
    pruned["removed"].as_array().unwrap().iter().map(|thing| thing["name"].as_str().unwrap()).collect()
}

async fn images(client: &mut Client) -> Vec<String> {
    let listed = client.must("image_list", json!({})).await;
    let installed = listed["images"].as_array().unwrap().iter().filter(|image| image["installed"] == true);
    installed.map(|image| image["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn an_image_in_use_is_not_deleted_and_its_users_are_named() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let image = client.finished("image_create", json!({ "from": place.source(), "name": "base" })).await;
    client.finished("vm_create", json!({ "name": "user", "from": "base", "start": false })).await;
    client.must("template_create", json!({ "name": "derived", "source": "image:base" })).await;
    client.must("settings_set", json!({ "values": { "default.image": "base" } })).await;
    let (code, text) = client.fails("image_delete", json!({ "image": "base" })).await;
    assert_eq!(code, "in_use");
    for user in ["the VM user", "the template derived", "the setting default.image"] {
        assert!(text.contains(user), "{user} in {text}");
    }
    assert!(!text.contains("the drive"), "a VM's drive is the VM's: {text}");
    assert_eq!(client.must("image_inspect", json!({ "image": "base" })).await["used_by"], 1);

    client.must("vm_delete", json!({ "vm": "user" })).await;
    client.must("template_delete", json!({ "template": "derived" })).await;
    client.must("settings_set", json!({ "reset": ["default.image"] })).await;
    let gone = client.must("image_delete", json!({ "image": image["id"] })).await;
    assert_eq!((&gone["name"], &gone["freed_bytes"]), (&json!("base"), &image["used_bytes"]));
    assert!(!Path::new(image["path"].as_str().unwrap()).exists() && place.names("images").is_empty());
    assert_eq!(client.fails("image_delete", json!({ "image": "base" })).await.0, "image_not_found");
}

#[tokio::test]
async fn pruning_removes_what_nothing_refers_to_and_nothing_else() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    client.must("template_create", json!({ "name": "web", "source": place.source() })).await;
    let mut built = Vec::new();
    for content in ["one", "two", "three"] {
        let overlays = json!({ "/etc/motd": { "content": content } });
        client.must("template_update", json!({ "template": "web", "overlays": overlays })).await;
        let build = client.finished("build_start", json!({ "template": "web" })).await;
        built.push(build["image"]["name"].as_str().unwrap().to_owned());
    }
    client.finished("image_create", json!({ "from": place.source(), "name": "mine" })).await;
    let of_first = json!({ "name": "user", "from": format!("image:{}", built[0]), "start": false });
    client.finished("vm_create", of_first).await;
    client.must("template_create", json!({ "name": "old", "source": place.source(), "size": "40MiB" })).await;
    let old = client.finished("build_start", json!({ "template": "old" })).await;
    client.must("template_delete", json!({ "template": "old" })).await;
    let old_image = old["image"]["name"].as_str().unwrap().to_owned();

    let (cache, scratch) = (place.state.join("cache"), place.state.join("scratch"));
    std::fs::write(cache.join("initramfs-old.cpio"), vec![1; 100_000]).unwrap();
    let aged = std::process::Command::new("touch")
        .args(["-d", "2 days ago"])
        .arg(cache.join("initramfs-old.cpio"))
        .status();
    assert!(aged.unwrap().success());
    std::fs::write(cache.join("initramfs-new.cpio"), "x").unwrap();
    std::fs::create_dir(scratch.join("left")).unwrap();

    let old_build = old["id"].as_str().unwrap().to_owned();
    let mut expected = vec![built[1].as_str(), &old_image, &old_build, "initramfs-old.cpio", "left"];
    expected.sort_unstable();
    let before = images(&mut client).await;
    let dry = client.finished("prune", json!({ "dry_run": true })).await;
    let mut planned = names(&dry);
    planned.sort_unstable();
    assert_eq!((planned, &dry["dry_run"]), (expected.clone(), &json!(true)));
    assert!(dry["freed_bytes"].as_u64().unwrap() > 100_000);
    assert_eq!(images(&mut client).await, before, "nothing was removed yet");
    assert!(scratch.join("left").exists() && cache.join("initramfs-old.cpio").exists());

    let pruned = client.finished("prune", json!({})).await;
    let mut removed = names(&pruned);
    removed.sort_unstable();
    assert_eq!(removed, expected);
    let mut left = vec![built[0].clone(), built[2].clone(), "mine".into()];
    left.sort_unstable();
    assert_eq!(images(&mut client).await, left, "used, newest, and made on purpose");
    assert!(cache.join("initramfs-new.cpio").exists() && place.names("scratch").is_empty());
    assert_eq!(place.names("images").len(), 3);

    // What is left of a build went with its image.
    assert_eq!(client.fails("build_inspect", json!({ "build": old_build })).await.0, "build_not_found");
    let again = client.finished("prune", json!({ "images": true })).await;
    let kinds: Vec<_> =
        again["removed"].as_array().unwrap().iter().map(|thing| thing["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["image", "image"], "{again}");
    assert_eq!(images(&mut client).await, [built[0].clone()], "only what is in use");
    assert_eq!(client.finished("prune", json!({})).await["removed"], json!([]));

    let info = client.must("system_info", json!({})).await;
    let used = |what: &str| {
        let disk = info["disk"].as_array().unwrap();
        disk.iter()
            .find(|used| used["what"] == what)
            .map(|used| (used["items"].clone(), used["bytes"].as_u64()))
            .unwrap()
    };
    assert_eq!((used("images").0, used("drives").0), (json!(1), json!(1)));
    assert!(used("images").1 > Some(10_000) && used("drives").1 > Some(10_000), "{}", info["disk"]);
}

async fn assets(client: &mut Client) -> Vec<String> {
    let listed = client.must("asset_list", json!({ "available": false })).await;
    listed["assets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|asset| asset["name"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn assets_go_when_nothing_refers_to_them_and_nothing_is_about_to() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    for name in ["of-template", "of-image", "of-nothing"] {
        let file = place.directory.path().join(format!("{name}.tar"));
        let mut tar = tar::Builder::new(std::fs::File::create(&file).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_size(name.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        tar.append_data(&mut header, "name", name.as_bytes()).unwrap();
        tar.into_inner().unwrap();
        let from = format!("file:{}", file.display());
        client.finished("asset_download", json!({ "kind": "rootfs", "from": from, "name": name })).await;
    }
    for (name, program) in [("vmm-chosen", "/bin/true"), ("vmm-other", "/bin/false")] {
        let from = format!("file:{}", std::fs::canonicalize(program).unwrap().display());
        let wanted =
            json!({ "kind": "vmm", "from": from, "name": name, "make_default": name == "vmm-chosen" });
        client.finished("asset_download", wanted).await;
    }
    client.must("template_create", json!({ "name": "user", "source": "rootfs:of-template" })).await;
    client.finished("image_create", json!({ "from": "rootfs:of-image", "name": "made" })).await;
    let all = ["of-image", "of-nothing", "of-template", "vmm-chosen", "vmm-other"];
    assert_eq!(assets(&mut client).await, all);

    // Only who asks for it has assets removed, and a dry run removes nothing.
    assert_eq!(client.finished("prune", json!({})).await["removed"], json!([]));
    let dry = client.finished("prune", json!({ "assets": true, "dry_run": true })).await;
    assert_eq!(names(&dry), ["of-nothing", "vmm-other"], "{dry}");
    assert!(dry["removed"].as_array().unwrap().iter().all(|thing| thing["kind"] == "asset"), "{dry}");
    assert_eq!(assets(&mut client).await, all);

    // While something is being made, nobody knows what it will need.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let from = format!("url:http://{}/", silent.local_addr().unwrap());
    let wanted = json!({ "kind": "rootfs", "from": from, "unverified": true, "wait_s": 0 });
    let under_way = client.must("asset_download", wanted).await;
    let nothing = client.finished("prune", json!({ "assets": true })).await;
    assert_eq!(
        (&nothing["removed"], nothing["kept"].as_array().map(Vec::len)),
        (&json!([]), Some(2)),
        "{nothing}"
    );
    assert_eq!(assets(&mut client).await, all);
    client.must("op_cancel", json!({ "op_id": under_way["op_id"] })).await;

    let pruned = client.finished("prune", json!({ "assets": true })).await;
    assert_eq!(names(&pruned), ["of-nothing", "vmm-other"], "{pruned}");
    assert_eq!(pruned["removed"], dry["removed"]);
    assert_eq!(assets(&mut client).await, ["of-image", "of-template", "vmm-chosen"]);
    assert_eq!(place.names("assets").len(), 3);
    let linked = std::fs::canonicalize(place.state.join("bin/firecracker")).unwrap();
    assert_eq!(std::fs::read(linked).unwrap(), std::fs::read("/bin/true").unwrap());

    // Without their users they can go, too; with those that go at the same time in one run, which a dry one foretells.
    client.must("template_delete", json!({ "template": "user" })).await;
    let both = json!({ "images": true, "assets": true });
    let dry = client.finished("prune", json!({ "images": true, "assets": true, "dry_run": true })).await;
    assert_eq!(names(&dry), ["made", "of-image", "of-template"], "{dry}");
    client.must("settings_set", json!({ "values": { "default.image": "image:made" } })).await;
    let kept = client.finished("prune", json!({ "images": true, "assets": true, "dry_run": true })).await;
    assert_eq!(names(&kept), ["of-template"], "{kept}");
    client.must("settings_set", json!({ "values": { "default.image": "rootfs:of-image" } })).await;
    let pruned = client.finished("prune", both.clone()).await;
    assert_eq!(
        names(&pruned),
        ["made", "of-template"],
        "the default's asset stays without the image: {pruned}"
    );
    client.must("settings_set", json!({ "reset": ["default.image"] })).await;
    client.finished("image_create", json!({ "from": "rootfs:of-image", "name": "made" })).await;
    let pruned = client.finished("prune", both.clone()).await;
    assert_eq!(names(&pruned), ["made", "of-image"], "{pruned}");
    assert_eq!(client.finished("prune", both).await["removed"], json!([]));
}
