//! `file_search` on a real process.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::fs::{PermissionsExt, chown, symlink};

use common::{Guest, facts, header, within};
use serde_json::{Value, json};

fn text(result: &Value) -> &str {
    result["content"][1]["text"].as_str().unwrap_or_default()
}

/// A guest with a small repository.
fn start() -> (Guest, String) {
    let guest = Guest::start();
    let root = guest.path("repo");
    for (path, content) in [
        (".gitignore", "target/\n*.log\n"),
        (".hidden", "needle\n"),
        ("src/a.rs", "fn a() {}\n// one\n// two\nlet needle = 1;\n// four\n// five\nNeedle\n"),
        ("src/b.txt", "needle.x\nneedleyx\n"),
        ("target/out", "needle\n"),
        ("noise.log", "needle\n"),
        ("binary", "needle\0needle\n"),
        ("esc\u{1b}[2J.txt", "needle \u{1b}[31m\n"),
    ] {
        let path = format!("{root}/{path}");
        std::fs::create_dir_all(std::path::Path::new(&path).parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    symlink("src/a.rs", format!("{root}/link")).unwrap();
    (guest, root)
}

#[test]
fn lines_are_found_with_what_is_around_them() {
    let (guest, root) = start();
    let mut client = guest.client();
    let result = client.good("file_search", json!({ "path": root, "pattern": "needle" }));
    assert_eq!(
        text(&result),
        "esc\u{fffd}[2J.txt\n1:needle \u{fffd}[31m\nsrc/a.rs\n4:let needle = 1;\nsrc/b.txt\n1:needle.x\n2:needleyx"
    );
    assert_eq!(*facts(&result), json!({ "matches": 4, "files": 3, "searched": 4, "shown": 4, "links": 1 }));
    assert!(header(&result).contains("4 lines match in 3 files"), "{}", header(&result));

    let arguments = json!({ "path": format!("{root}/src"), "pattern": "NEEDLE", "ignore_case": true, "context": 1, "globs": ["*.rs"] });
    let result = client.good("file_search", arguments);
    assert_eq!(text(&result), "a.rs\n3-// two\n4:let needle = 1;\n5-// four\n6-// five\n7:Needle");

    let literal = json!({ "path": root, "pattern": "needle.x", "literal": true, "show": "counts" });
    assert_eq!(text(&client.good("file_search", literal)), "src/b.txt: 1");
    let files =
        json!({ "path": root, "pattern": "^needle$", "show": "files", "all": true, "globs": ["!*.log"] });
    assert_eq!(text(&client.good("file_search", files)), ".hidden\ntarget/out");
    // One file, also an ignored one.
    let one = json!({ "path": format!("{root}/noise.log"), "pattern": "needle" });
    assert_eq!(text(&client.good("file_search", one)), "noise.log\n1:needle");
    let none = client.good("file_search", json!({ "path": root, "pattern": "nowhere" }));
    assert_eq!((text(&none), &facts(&none)["matches"]), ("", &json!(0)));

    for (arguments, code) in [
        (json!({ "path": root, "pattern": "(" }), "invalid_argument"),
        (json!({ "path": root, "pattern": "x", "globs": ["a["] }), "invalid_argument"),
        (json!({ "path": root, "pattern": "x", "limit": 0 }), "invalid_argument"),
        (json!({ "path": root, "pattern": "x", "context": 21 }), "invalid_argument"),
        (json!({ "path": guest.path("no"), "pattern": "x" }), "file_not_found"),
        (json!({ "path": "/dev/zero", "pattern": "x" }), "file_refused"),
    ] {
        assert_eq!(client.bad("file_search", arguments.clone()), code, "{arguments}");
    }
}

#[test]
fn what_is_shown_is_capped_and_all_is_counted() {
    let guest = Guest::start();
    let mut client = guest.client();
    let root = guest.path("many");
    std::fs::create_dir(&root).unwrap();
    for number in 0..300 {
        let long = format!("{}needle{}\n", "x".repeat(5000), "y".repeat(5000));
        std::fs::write(format!("{root}/{number:03}"), format!("needle\nother\nneedle\n{long}")).unwrap();
    }
    for limit in [1, 7, 100, 1000] {
        let result = client.good("file_search", json!({ "path": root, "pattern": "needle", "limit": limit }));
        let found = facts(&result);
        assert_eq!((&found["matches"], &found["files"]), (&json!(900), &json!(300)));
        assert!(text(&result).starts_with("000\n1:needle\n") || limit == 1, "{limit}");
        assert!(text(&result).len() < 48_000 && text(&result).lines().all(|line| line.len() < 500));
        assert!(found["shown"].as_u64().unwrap() >= limit.min(100), "{limit}: {found}");
        assert!(text(&result).contains("…x") || limit == 1, "{limit}");
        assert!(header(&result).contains("are shown"), "{}", header(&result));
    }
}

#[test]
fn a_search_follows_nothing_out_and_hangs_on_nothing() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let (guest, root) = start();
    std::fs::set_permissions(guest.directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/etc", format!("{root}/src/etc")).unwrap();
    nix::unistd::mkfifo(format!("{root}/pipe").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::set_permissions(format!("{root}/src/b.txt"), std::fs::Permissions::from_mode(0o600)).unwrap();
    chown(format!("{root}/src/a.rs"), Some(54321), Some(54321)).unwrap();
    let mut client = guest.client();
    within(common::PATIENCE, move || {
        let result =
            client.good("file_search", json!({ "path": root, "pattern": "root:|needle", "show": "files" }));
        assert_eq!(facts(&result)["files"], 3, "{result}");
        // As a user: what that one may not read is not searched.
        let theirs = json!({ "path": root, "pattern": "needle", "show": "files", "user": "54321" });
        let result = client.good("file_search", theirs);
        assert_eq!(
            (&facts(&result)["files"], &facts(&result)["unreadable"]),
            (&json!(2), &json!(1)),
            "{result}"
        );
        // Files of the kernel under the root are passed over.
        let proc = format!("{root}/proc");
        std::fs::create_dir(&proc).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        if rustix::mount::mount("proc", proc.as_str(), "proc", flags, None).is_err() {
            eprintln!("SKIPPED: /proc cannot be mounted here");
            return;
        }
        let result = client.call("file_search", json!({ "path": root, "pattern": "Linux version" }));
        rustix::mount::unmount(proc.as_str(), rustix::mount::UnmountFlags::DETACH).unwrap();
        assert_eq!(facts(&result)["files"], 0, "{result}");
    });
}

/// What has the name of a file of patterns is read only if it is one: a pipe would never end, a device fill the memory.
#[test]
fn patterns_are_read_from_files_only() {
    let (guest, root) = start();
    for directory in ["pipe", "zero", "kernel", "large", "tame"] {
        std::fs::create_dir_all(format!("{root}/{directory}/inner")).unwrap();
        std::fs::write(format!("{root}/{directory}/inner/file"), "haystack\n").unwrap();
    }
    let pipe = format!("{root}/pipe/.gitignore");
    nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/dev/zero", format!("{root}/zero/.ignore")).unwrap();
    symlink("/proc/kmsg", format!("{root}/kernel/.gitignore")).unwrap();
    std::fs::File::create(format!("{root}/large/.gitignore")).unwrap().set_len(2 << 20).unwrap();
    // A link to a file is as good as one.
    symlink("../src/b.txt", format!("{root}/tame/.gitignore")).unwrap();
    let mut client = guest.client();
    within(common::PATIENCE, move || {
        let mut search = |path: &str, all: bool| {
            let path = format!("{root}{path}");
            client.call("file_search", json!({ "path": path, "pattern": "haystack", "all": all }))
        };
        let result = search("", false);
        assert_eq!(text(&result), "tame/inner/file\n1:haystack", "{result}");
        assert_eq!(facts(&result)["unreadable"], 4, "{result}");
        assert_eq!(facts(&search("", true))["files"], 5);
        let refused = search("/pipe", false);
        assert_eq!(refused["_meta"]["dev.nexus/error"]["code"], "file_refused", "{refused}");
        assert_eq!(facts(&search("/pipe", true))["files"], 1);
        // Those of a directory above are left out instead; all others are still heeded.
        std::fs::write(format!("{root}/pipe/inner/.gitignore"), "ignored\n").unwrap();
        std::fs::write(format!("{root}/pipe/inner/ignored"), "haystack\n").unwrap();
        std::fs::write(format!("{root}/pipe/inner/as-the.log"), "haystack\n").unwrap();
        for above in ["pipe", "zero", "kernel", "large"] {
            assert_eq!(facts(&search(&format!("/{above}/inner"), false))["files"], 1, "{above}");
        }
    });
}
