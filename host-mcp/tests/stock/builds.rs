//! Templates and builds.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::{self, until};
use crate::place::Place;

/// How often a build is asked for that was made already.
const CACHED: usize = 10;

fn content_of(image: &Path, path: &str) -> String {
    let output = std::process::Command::new("/sbin/debugfs")
        .args(["-R", &format!("cat {path}")])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn templates_have_versions_and_mistakes_are_told_at_once() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let made = client
        .must(
            "template_create",
            json!({ "name": "web", "source": place.source(), "size": "64MiB",
                "overlays": { "/etc/motd": { "content": "one\n" } } }),
        )
        .await;
    assert_eq!((&made["version"], &made["spec"]["init"]), (&json!(1), &json!("agent")));
    let same = client.must("template_update", json!({ "template": "web", "size": "64M" })).await;
    assert_eq!(same["version"], 1, "nothing changed");
    let overlay = json!({ "/etc/issue": { "content": "aGk=", "encoding": "base64", "mode": "0600" } });
    let changed = client
        .must(
            "template_update",
            json!({ "template": made["id"], "overlays": overlay, "remove_overlays": ["/etc/motd"], "size": "0" }),
        )
        .await;
    assert_eq!((&changed["version"], &changed["spec"]["overlays"]), (&json!(2), &overlay));
    assert!(changed["spec"].get("size").is_none(), "{changed}");
    let first = client.must("template_inspect", json!({ "template": "web", "version": 1 })).await;
    assert_eq!(first["spec"], made["spec"]);
    assert_eq!(first["versions"].as_array().unwrap().len(), 2);
    let back = client.must("template_update", json!({ "template": "web", "version": 1 })).await;
    assert_eq!((&back["version"], &back["spec"]), (&json!(3), &made["spec"]));

    let services = json!({ "web": { "argv": ["httpd"], "ready": { "port": 80 } } });
    client
        .must("template_create", json!({ "name": "api", "source": place.source(), "services": services }))
        .await;
    let api = client.must("template_inspect", json!({ "template": "api" })).await;
    let file = api["spec"]["overlays"]["/etc/nexus/services.d/web.json"]["content"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(file).unwrap(), services["web"]);
    for (services, word) in [
        (json!({ "Not A Name": { "command": "x" } }), "Not A Name"),
        (json!({ "web": {} }), "neither command nor argv"),
    ] {
        let (code, text) =
            client.fails("template_update", json!({ "template": "api", "services": services })).await;
        assert!(code == "invalid_argument" && text.contains(word), "{text}");
    }
    let page = client.must("template_list", json!({ "limit": 1 })).await;
    assert_eq!(page["templates"][0]["name"], "api");
    let page = client.must("template_list", json!({ "cursor": page["next_cursor"] })).await;
    assert_eq!((&page["templates"][0]["name"], page.get("next_cursor")), (&json!("web"), None));

    let (code, text) = client
        .fails(
            "template_create",
            json!({ "name": "bad", "source": "template:web", "packages": ["-o"], "size": "1K",
                "overlays": { "relative": { "content": "" }, "/a": { "content": "" }, "/a/b": { "content": "" } } }),
        )
        .await;
    assert_eq!(code, "invalid_argument");
    for word in ["template", "-o", "size", "relative", "/a is both a file and a directory"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    for (wrong, code) in [
        (json!({ "name": "web", "source": place.source() }), "name_taken"),
        (json!({ "name": "x", "source": "nowhere" }), "image_not_found"),
        (json!({ "name": "x", "source": "file:/nonexistent" }), "file_not_found"),
        (json!({ "name": "x", "source": place.source(), "packages": ["bash"] }), "invalid_argument"),
        (
            json!({ "name": "x", "source": place.source(), "overlays": { "/a": { "content": "%", "encoding": "base64" } } }),
            "invalid_argument",
        ),
        (
            json!({ "name": "x", "source": place.source(), "overlays": { "/a": { "content": "", "mode": "rwx" } } }),
            "invalid_argument",
        ),
    ] {
        assert_eq!(client.fails("template_create", wrong.clone()).await.0, code, "{wrong}");
    }
    let missing = [
        ("template_inspect", json!({ "template": "none" }), "template_not_found"),
        ("template_inspect", json!({ "template": "web", "version": 9 }), "template_not_found"),
        ("build_start", json!({ "template": "none" }), "template_not_found"),
        ("vm_create", json!({ "from": "template:none" }), "template_not_found"),
        ("build_inspect", json!({ "build": "none" }), "build_not_found"),
        ("build_logs", json!({ "build": "aaaaaaaaaaaac" }), "build_not_found"),
    ];
    for (tool, arguments, code) in missing {
        assert_eq!(client.fails(tool, arguments.clone()).await.0, code, "{tool} {arguments}");
    }
    client.must("template_delete", json!({ "template": "web" })).await;
    assert_eq!(client.fails("template_delete", json!({ "template": "web" })).await.0, "template_not_found");
}

#[tokio::test]
async fn the_same_inputs_are_built_once_and_anything_else_anew() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let overlays = json!({ "/etc/motd": { "content": "one\n" }, "/bin/hello": { "content": "#!/bin/sh\n", "mode": "0755" } });
    client
        .must(
            "template_create",
            json!({ "name": "web", "source": place.source(), "overlays": overlays, "size": "64MiB" }),
        )
        .await;
    let build = client.finished("build_start", json!({ "template": "web" })).await;
    assert_eq!(
        (&build["status"], &build["cached"], &build["version"]),
        (&json!("success"), &json!(false), &json!(1))
    );
    let image = client.must("image_inspect", json!({ "image": build["image"]["name"] })).await;
    assert_eq!((&image["size"], &image["source"]), (&json!("64MiB"), &json!("template:web@1")));
    assert_eq!(image["distro"], "trial-1");
    assert_eq!(content_of(Path::new(image["path"].as_str().unwrap()), "/etc/motd"), "one\n");

    let log = client.0.call("build_logs", json!({ "build": "web" })).await;
    let log = common::text(&log);
    for line in ["build of template:web@1", "reading the source", "laying over /etc/motd", "done: image web-"]
    {
        assert!(log.contains(line), "{line} in {log}");
    }

    // The machine may be busy with something else; not each time.
    let mut fastest = Duration::MAX;
    for _ in 0..CACHED {
        let begun = Instant::now();
        let again = client.finished("build_start", json!({ "template": "web" })).await;
        fastest = fastest.min(begun.elapsed());
        assert_eq!(
            (&again["cached"], &again["image"], &again["digest"]),
            (&json!(true), &build["image"], &build["digest"])
        );
    }
    assert!(fastest.as_millis() < 1000, "a cached build took {fastest:?}");

    // Another content at the same path, another template, and back again.
    std::fs::write(place.root().join("etc/os-release"), b"ID=trial\nVERSION_ID=2\n").unwrap();
    let changed = client.finished("build_start", json!({ "template": "web" })).await;
    assert_eq!(changed["cached"], false);
    assert_ne!(changed["digest"], build["digest"]);
    client
        .must(
            "template_update",
            json!({ "template": "web", "init": "agent", "remove_overlays": ["/bin/hello"] }),
        )
        .await;
    let second = client.finished("build_start", json!({ "template": "web" })).await;
    assert_eq!((&second["cached"], &second["version"]), (&json!(false), &json!(2)));
    let first = client.finished("build_start", json!({ "template": "web", "version": 1 })).await;
    assert_eq!((&first["cached"], &first["image"]), (&json!(true), &changed["image"]));
    let anew = client.finished("build_start", json!({ "template": "web", "no_cache": true })).await;
    assert_eq!((&anew["cached"], &anew["digest"]), (&json!(false), &second["digest"]));
    assert_ne!(anew["image"], second["image"]);

    let all = client.must("build_list", json!({ "template": "web" })).await;
    assert_eq!(all["builds"].as_array().unwrap().len(), 5 + CACHED);
    // Builds stay as they were when their template goes.
    client.must("template_delete", json!({ "template": "web" })).await;
    let kept = client.must("build_inspect", json!({ "build": build["id"] })).await;
    assert_eq!((&kept["spec"]["overlays"], kept.get("template_id")), (&overlays, None));
}

#[tokio::test]
async fn a_tar_is_the_same_source_as_long_as_its_content_is() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let tar = place.directory.path().join("root.tar");
    let pack = || {
        let packed = std::process::Command::new("tar")
            .arg("-cf")
            .arg(&tar)
            .arg("-C")
            .arg(place.root())
            .arg(".")
            .status();
        assert!(packed.unwrap().success());
    };
    pack();
    let source = format!("file:{}", tar.display());
    client.must("template_create", json!({ "name": "web", "source": source })).await;
    let first = client.finished("build_start", json!({ "template": "web" })).await;
    pack(); // another file with the same content
    let same = client.finished("build_start", json!({ "template": "web" })).await;
    assert_eq!((&same["cached"], &same["digest"]), (&json!(true), &first["digest"]));
    std::fs::write(place.root().join("etc/new"), "x").unwrap();
    pack();
    let other = client.finished("build_start", json!({ "template": "web" })).await;
    assert_eq!(other["cached"], false);
}

#[tokio::test]
async fn vms_and_images_come_from_templates() {
    let place = Place::new();
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    client.must("template_create", json!({ "name": "web", "source": place.source() })).await;
    let (first, second) = (
        client.must("vm_create", json!({ "name": "a", "from": "template:web", "wait_s": 0 })).await,
        client.must("vm_create", json!({ "name": "b", "from": "template:web", "wait_s": 0 })).await,
    );
    for begun in [first, second] {
        let outcome = client.outcome(begun).await;
        assert_eq!(outcome["result"]["state"], "ready", "{outcome}");
        assert_eq!(outcome["result"]["image"]["source"], "template:web@1");
    }
    let built = client.must("build_list", json!({ "status": "success" })).await;
    let made = built["builds"].as_array().unwrap().iter().filter(|build| build["cached"] == false).count();
    assert_eq!(made, 1, "one image for both: {built}");

    let same = client.finished("image_create", json!({ "from": "template:web" })).await;
    assert_eq!((&same["name"], &same["used_by"]), (&built["builds"][0]["image"], &json!(2)));
    let own = client.finished("image_create", json!({ "from": "template:web", "name": "mine" })).await;
    assert_eq!(own["name"], "mine");
    // A template can start from an image, too.
    let overlays = json!({ "/etc/motd": { "content": "on top\n" } });
    client
        .must("template_create", json!({ "name": "top", "source": "image:mine", "overlays": overlays }))
        .await;
    let top = client.finished("image_create", json!({ "from": "template:top" })).await;
    let path = PathBuf::from(top["path"].as_str().unwrap());
    assert_eq!(content_of(&path, "/etc/motd"), "on top\n");
    assert!(content_of(&path, "/etc/os-release").contains("trial"));
    assert!(content_of(&path, "/etc/nexus/image.yaml").contains("name: top-"));
    for vm in ["a", "b"] {
        client.must("vm_delete", json!({ "vm": vm, "force": true })).await;
    }
}

#[tokio::test]
async fn a_build_can_be_cancelled_and_leaves_nothing() {
    let place = Place::new();
    place.fill(120);
    let _daemon = place.daemon().await;
    let mut client = place.client().await;
    let template = json!({ "name": "web", "source": place.source() });
    client.must("template_create", template.clone()).await;
    for stage in ["reading the source", "writing the filesystem"] {
        let build = loop {
            let begun = client.build_until(&place, stage).await;
            let refused = client.0.call("template_delete", json!({ "template": "web" })).await;
            match refused["isError"] == true {
                true => assert_eq!(refused["_meta"]["dev.nexus/error"]["code"], "in_use"),
                false => drop(client.must("template_create", template.clone()).await),
            }
            let log = client.0.call("build_logs", json!({ "build": begun["subject_id"] })).await;
            client.must("op_cancel", json!({ "op_id": begun["op_id"] })).await;
            let build = client.must("build_inspect", json!({ "build": begun["subject_id"] })).await;
            if build["status"] != "success" {
                // It was read while the build ran.
                let log = common::text(&log);
                assert!(log.contains(stage) && !log.contains("done: image"), "{log}");
                break build;
            }
            // It was whole before that came: once more.
            client.must("image_delete", json!({ "image": build["image"]["id"] })).await;
        };
        assert_eq!(
            (&build["status"], &build["error"]["code"]),
            (&json!("cancelled"), &json!("cancelled")),
            "{stage}"
        );
        // A thread that is reading the source ends at its next look, and takes what it made with it.
        until(stage, || place.names("images").is_empty() && place.names("scratch").is_empty()).await;
    }
    let images = client.must("image_list", json!({})).await;
    assert!(images["images"].as_array().unwrap().iter().all(|image| image["installed"] == false), "{images}");
}

#[tokio::test]
async fn a_daemon_killed_at_any_stage_leaves_nothing_half_made() {
    let place = Place::new();
    place.fill(80);
    let mut daemon = place.daemon().await;
    let mut client = place.client().await;
    client.must("template_create", json!({ "name": "web", "source": place.source() })).await;
    let stages = [
        "build of",
        "reading the inputs",
        "reading the source",
        "writing the filesystem",
        "checking the filesystem",
    ];
    for stage in stages {
        let begun = client.build_until(&place, stage).await;
        daemon.kill().await.unwrap();
        daemon = place.daemon().await;
        client = place.client().await;
        let build = client.must("build_inspect", json!({ "build": begun["subject_id"] })).await;
        if build["status"] == "success" {
            // It was whole before the kill: then it is all there.
            let image = client.must("image_inspect", json!({ "image": build["image"]["id"] })).await;
            assert!(Path::new(image["path"].as_str().unwrap()).is_file(), "{stage}");
            // Or the next build would have nothing to do.
            client.must("image_delete", json!({ "image": image["id"] })).await;
            continue;
        }
        assert_eq!(
            (&build["status"], &build["error"]["code"]),
            (&json!("failed"), &json!("shutting_down")),
            "{stage}"
        );
        let op = client.must("op_get", json!({ "op_id": begun["op_id"] })).await;
        assert_eq!(op["state"], "failed", "{stage}");
        assert!(place.names("images").is_empty() && place.names("scratch").is_empty(), "{stage}");
        let log = common::text(&client.0.call("build_logs", json!({ "build": begun["subject_id"] })).await);
        assert!(log.contains(stage), "the log is kept: {log}");
    }
    let build = client.finished("build_start", json!({ "template": "web" })).await;
    assert_eq!(build["status"], "success");
}

/// A file system of its own for the state, which is unmounted with it.
struct Small(PathBuf);

impl Small {
    fn mount(point: PathBuf, mebibytes: u32) -> Self {
        std::fs::create_dir(&point).unwrap();
        let mounted = std::process::Command::new("/bin/mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "none"])
            .arg(&point)
            .status();
        assert!(mounted.unwrap().success(), "this test has to run as root");
        Self(point)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("/bin/umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

#[tokio::test]
async fn a_build_on_a_full_disk_fails_cleanly() {
    let mut place = Place::new();
    place.fill(60);
    let small = Small::mount(place.directory.path().join("small"), 110);
    place.state = small.0.join("state");
    let mut daemon = place.daemon().await;
    let mut client = place.client().await;
    client.must("template_create", json!({ "name": "web", "source": place.source() })).await;
    let begun = client.must("build_start", json!({ "template": "web", "wait_s": 0 })).await;
    let outcome = client.outcome(begun).await;
    assert_eq!(
        (&outcome["state"], &outcome["error"]["code"]),
        (&json!("failed"), &json!("disk_full")),
        "{outcome}"
    );
    let build = client.must("build_inspect", json!({ "build": "web" })).await;
    assert_eq!((&build["status"], &build["error"]["code"]), (&json!("failed"), &json!("disk_full")));
    assert!(place.names("images").is_empty() && place.names("scratch").is_empty());
    daemon.kill().await.unwrap();
}
