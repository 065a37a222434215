//! The file tools and `os_info` on a real process.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use common::{Guest, facts, header, stream};
use serde_json::{Value, json};

fn mode(path: &str) -> u32 {
    std::fs::metadata(path).expect("its metadata").mode() & 0o7777
}

#[test]
fn what_is_written_can_be_read() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("a/b/c.txt");
    let result = client.good("file_write", json!({ "path": path, "content": "grün\n" }));
    let expected = json!({ "path": path, "written_bytes": 6, "size_bytes": 6, "created": true });
    assert_eq!(result["structuredContent"], expected);
    assert!(header(&result).starts_with("web-1 · "), "{result}");
    assert_eq!(mode(&path), 0o644);

    let result = client.good("file_read", json!({ "path": path }));
    assert_eq!(stream(&result, "content"), "grün\n");
    let expected = json!({ "size_bytes": 6, "offset": 0, "read_bytes": 6, "eof": true, "lossy": false });
    assert_eq!(*facts(&result), expected);
    assert!(result["structuredContent"].is_null());

    let bytes = json!({ "path": path, "content": "AP8=", "encoding": "base64", "mode": "0600" });
    assert_eq!(client.good("file_write", bytes)["structuredContent"]["created"], false);
    assert_eq!(mode(&path), 0o600);
    assert_eq!(
        stream(&client.good("file_read", json!({ "path": path, "encoding": "base64" })), "content"),
        "AP8="
    );
    let result = client.good("file_read", json!({ "path": path }));
    assert_eq!((stream(&result, "content"), &facts(&result)["lossy"]), ("\0\u{fffd}", &Value::Bool(true)));
    // Nothing else is left beside it.
    assert_eq!(std::fs::read_dir(guest.path("a/b")).unwrap().count(), 1);
}

#[test]
fn replacing_keeps_owner_mode_and_links() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let (path, link) = (guest.path("file"), guest.path("link"));
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o4750)).unwrap();
    std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o4750)).unwrap();
    symlink("file", &link).unwrap();
    client.good("file_write", json!({ "path": link, "content": "new" }));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (12, 34, 0o4750));

    symlink("not-yet", guest.path("dangling")).unwrap();
    client.good("file_write", json!({ "path": guest.path("dangling"), "content": "x" }));
    assert_eq!(std::fs::read_to_string(guest.path("not-yet")).unwrap(), "x");
    symlink("loop", guest.path("loop")).unwrap();
    assert_eq!(
        client.bad("file_write", json!({ "path": guest.path("loop"), "content": "x" })),
        "file_refused"
    );
}

#[test]
fn what_is_made_in_a_home_belongs_to_its_owner() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let home = guest.path("home");
    std::fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(54321), Some(54322)).unwrap();
    let owner = |path: &str| std::fs::metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    client.good("file_write", json!({ "path": format!("{home}/proj/src/a.py"), "content": "x\n" }));
    client.good("file_write", json!({ "path": format!("{home}/log/b"), "content": "x\n", "append": true }));
    for path in ["proj", "proj/src", "proj/src/a.py", "log", "log/b"] {
        assert_eq!(owner(&format!("{home}/{path}")), (54321, 54322), "{path}");
    }
    assert_eq!(mode(&format!("{home}/proj/src/a.py")), 0o644);
    assert_eq!(mode(&format!("{home}/proj")), 0o755);
    // What was there keeps its owner, whoever wrote it and whosever its directory is.
    std::fs::write(format!("{home}/roots"), "").unwrap();
    for append in [true, false] {
        client
            .good("file_write", json!({ "path": format!("{home}/roots"), "content": "x", "append": append }));
        assert_eq!(owner(&format!("{home}/roots")), (0, 0));
    }
}

/// The kernel takes the value and has no disk to sync it to.
#[test]
fn appending_to_a_file_of_the_kernel_succeeds() {
    let guest = Guest::start();
    let mut client = guest.client();
    for append in [true, false] {
        let path = format!("/proc/{}/oom_score_adj", guest.process.id());
        let content = if append { "7\n" } else { "8\n" };
        client.good("file_write", json!({ "path": path, "content": content, "append": append }));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
}

#[test]
fn append_adds_to_the_end() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("log");
    let line = json!({ "path": path, "content": "line\n", "append": true });
    assert_eq!(client.good("file_write", line.clone())["structuredContent"]["created"], true);
    let result = client.good("file_write", line);
    assert_eq!(result["structuredContent"]["size_bytes"], 10);
    assert_eq!(result["structuredContent"]["written_bytes"], 5);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "line\nline\n");
}

#[test]
fn what_cannot_be_written_is_said() {
    let guest = Guest::start();
    let mut client = guest.client();
    std::fs::write(guest.path("file"), "").unwrap();
    let fifo = guest.path("fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (arguments, code) in [
        (json!({ "path": "relative", "content": "" }), "invalid_argument"),
        (json!({ "path": "", "content": "" }), "invalid_argument"),
        (json!({ "path": "/a\0b", "content": "" }), "invalid_argument"),
        (json!({ "path": guest.path("x") }), "invalid_argument"),
        (json!({ "path": guest.path("x"), "content": "", "mode": "rwx" }), "invalid_argument"),
        (json!({ "path": guest.path("x"), "content": "!", "encoding": "base64" }), "invalid_argument"),
        (json!({ "path": guest.path("x"), "content": "x".repeat((2 << 20) + 1) }), "too_large"),
        (json!({ "path": guest.path("no/dir/x"), "content": "", "create_parents": false }), "file_not_found"),
        (json!({ "path": guest.path("file/x"), "content": "" }), "file_refused"),
        (json!({ "path": guest.path(""), "content": "" }), "file_refused"),
        (json!({ "path": guest.path("new/"), "content": "" }), "file_refused"),
        (json!({ "path": "/", "content": "" }), "file_refused"),
        (json!({ "path": "/dev/null", "content": "" }), "file_refused"),
        (json!({ "path": fifo, "content": "" }), "file_refused"),
        (json!({ "path": fifo, "content": "", "append": true }), "file_refused"),
        (json!({ "path": "/proc/version", "content": "x" }), "file_refused"),
        (json!({ "path": guest.path(&"n".repeat(300)), "content": "x" }), "file_refused"),
        (json!({ "path": "/dev/full", "content": "x", "append": true }), "file_refused"),
    ] {
        let shown: String = arguments.to_string().chars().take(100).collect();
        assert_eq!(client.bad("file_write", arguments), code, "{shown}");
    }
    let content = "x".repeat(2 << 20);
    client.good("file_write", json!({ "path": guest.path("most"), "content": content }));
}

#[test]
fn a_full_disk_leaves_the_old_file() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let small = guest.path("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = rustix::mount::mount(
        "tmpfs",
        small.as_str(),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        Some(c"size=64k"),
    );
    mounted.expect("mount a tmpfs");
    let path = guest.path("small/file");
    client.good("file_write", json!({ "path": path, "content": "old" }));
    let big = "x".repeat(200 << 10);
    let replaced = client.bad("file_write", json!({ "path": path, "content": big }));
    let appended = client.bad("file_write", json!({ "path": path, "content": big, "append": true }));
    let content = std::fs::read_to_string(&path).unwrap();
    let count = std::fs::read_dir(&small).unwrap().count();
    let deleted = client.bad("file_delete", json!({ "path": guest.directory.path(), "recursive": true }));
    rustix::mount::unmount(small.as_str(), rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!((replaced.as_str(), appended.as_str()), ("disk_full", "disk_full"));
    assert_eq!((content.as_str(), count), ("old", 1));
    // The filesystem below it was not emptied.
    assert_eq!(deleted, "file_refused");
}

#[test]
fn files_are_read_in_parts_that_add_up() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("text");
    let text = "äöü€😀".repeat(4000);
    std::fs::write(&path, &text).unwrap();
    let (mut all, mut offset) = (String::new(), 0);
    loop {
        let result = client.good("file_read", json!({ "path": path, "offset": offset, "limit": 1001 }));
        assert_eq!(facts(&result)["lossy"], false);
        all.push_str(stream(&result, "content"));
        offset += facts(&result)["read_bytes"].as_u64().unwrap();
        if facts(&result)["eof"] == true {
            break;
        }
    }
    assert_eq!(all, text);

    let result = client.good("file_read", json!({ "path": path, "limit": 720_896 }));
    assert!(stream(&result, "content").len() <= 48_000);
    let result = client.good("file_read", json!({ "path": path, "limit": 720_896, "encoding": "base64" }));
    assert_eq!(facts(&result)["read_bytes"], text.len());
    assert_eq!(facts(&result)["eof"], true);
    let result = client.good("file_read", json!({ "path": path, "offset": 1_u64 << 62 }));
    assert_eq!((stream(&result, "content"), &facts(&result)["eof"]), ("", &Value::Bool(true)));
    assert_eq!(client.bad("file_read", json!({ "path": path, "offset": u64::MAX })), "invalid_argument");
    assert_eq!(client.bad("file_read", json!({ "path": path, "limit": 0 })), "invalid_argument");

    std::fs::write(guest.path("huge"), vec![0xff; 800 << 10]).unwrap();
    let result = client
        .good("file_read", json!({ "path": guest.path("huge"), "encoding": "base64", "limit": 720_896 }));
    assert!(result.to_string().len() < 1 << 20);
    assert_eq!(facts(&result)["eof"], false);
}

#[test]
fn only_regular_files_are_read() {
    let guest = Guest::start();
    let mut client = guest.client();
    let result = client.good("file_read", json!({ "path": "/proc/version" }));
    assert!(stream(&result, "content").starts_with("Linux version"));
    assert_eq!((&facts(&result)["size_bytes"], &facts(&result)["eof"]), (&json!(0), &json!(true)));
    let fifo = guest.path("fifo");
    nix::unistd::mkfifo(fifo.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, code) in [
        ("/dev/zero", "file_refused"),
        ("/dev/tty", "file_refused"),
        ("/etc", "file_refused"),
        (fifo.as_str(), "file_refused"),
        (guest.path("v.sock").as_str(), "file_refused"),
        ("/no/such", "file_not_found"),
        ("/etc/passwd/x", "file_refused"),
        ("relative", "invalid_argument"),
    ] {
        assert_eq!(client.bad("file_read", json!({ "path": path })), code, "{path}");
    }
}

#[test]
fn stat_shows_links_or_what_they_point_to() {
    let guest = Guest::start();
    let mut client = guest.client();
    let (path, link) = (guest.path("file"), guest.path("link"));
    std::fs::write(&path, "12345").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    symlink("file", &link).unwrap();
    let result = client.good("file_stat", json!({ "path": path }));
    let entry = &result["structuredContent"];
    assert_eq!(
        (&entry["type"], &entry["size_bytes"], &entry["mode"]),
        (&json!("file"), &json!(5), &json!("0640"))
    );
    let entry = client.good("file_stat", json!({ "path": link }))["structuredContent"].clone();
    assert_eq!((&entry["type"], &entry["target"]), (&json!("symlink"), &json!("file")));
    let entry =
        client.good("file_stat", json!({ "path": link, "follow": true }))["structuredContent"].clone();
    assert_eq!((&entry["type"], &entry["target"]), (&json!("file"), &Value::Null));
    assert_eq!(
        client.good("file_stat", json!({ "path": "/dev/null" }))["structuredContent"]["type"],
        "char_device"
    );
    assert_eq!(client.bad("file_stat", json!({ "path": guest.path("no") })), "file_not_found");
    assert_eq!(client.bad("file_stat", json!({ "path": "x" })), "invalid_argument");
}

#[test]
fn delete_takes_links_not_targets_and_trees_only_when_told() {
    let guest = Guest::start();
    let mut client = guest.client();
    let outside = guest.path("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(guest.path("outside/kept"), "").unwrap();
    std::fs::create_dir_all(guest.path("tree/a/b")).unwrap();
    std::fs::write(guest.path("tree/a/b/file"), "").unwrap();
    symlink(&outside, guest.path("tree/a/link")).unwrap();
    symlink(&outside, guest.path("link")).unwrap();

    assert_eq!(client.bad("file_delete", json!({ "path": guest.path("tree") })), "file_refused");
    let result = client.good("file_delete", json!({ "path": guest.path("tree"), "recursive": true }));
    assert_eq!(result["structuredContent"]["deleted"], 5);
    client.good("file_delete", json!({ "path": guest.path("link"), "recursive": true }));
    assert!(std::path::Path::new(&guest.path("outside/kept")).exists());
    client.good("file_delete", json!({ "path": guest.path("outside/kept") }));
    client.good("file_delete", json!({ "path": guest.path("outside/") }));
    assert!(!std::path::Path::new(&outside).exists());
    assert_eq!(client.bad("file_delete", json!({ "path": outside })), "file_not_found");
    for path in ["/", "//", "/.", "/..", "/proc", "/dev", "/tmp/.", "/tmp/.."] {
        assert_eq!(
            client.bad("file_delete", json!({ "path": path, "recursive": true })),
            "file_refused",
            "{path}"
        );
    }
}

#[test]
fn lists_come_in_pages() {
    let guest = Guest::start();
    let mut client = guest.client();
    let directory = guest.path("many");
    std::fs::create_dir(&directory).unwrap();
    for number in 0..3000 {
        std::fs::write(format!("{directory}/{number:04}-{}", "n".repeat(60)), "").unwrap();
    }
    std::fs::write(
        std::path::Path::new(&directory)
            .join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff")),
        "",
    )
    .unwrap();
    let (mut count, mut cursor, mut lossy) = (0, Value::Null, 0);
    loop {
        let mut arguments = json!({ "path": directory, "limit": 2000 });
        if !cursor.is_null() {
            arguments["cursor"] = cursor;
        }
        let result = client.good("file_list", arguments);
        assert!(result.to_string().len() < 1 << 20);
        let text: usize =
            result["content"].as_array().unwrap().iter().map(|b| b["text"].as_str().unwrap().len()).sum();
        assert!(text < 50_000, "{text}");
        let entries = result["structuredContent"]["entries"].as_array().unwrap();
        count += entries.len();
        lossy += entries.iter().filter(|entry| entry["lossy"] == true).count();
        cursor = result["structuredContent"]["next_cursor"].clone();
        if cursor.is_null() {
            break;
        }
    }
    assert_eq!((count, lossy), (3001, 1));
    for (arguments, code) in [
        (json!({ "path": guest.path("no") }), "file_not_found"),
        (json!({ "path": "/etc/passwd" }), "file_refused"),
        (json!({ "path": "/etc", "depth": 0 }), "invalid_argument"),
        (json!({ "path": "/etc", "depth": 17 }), "invalid_argument"),
        (json!({ "path": "/etc", "limit": 0 }), "invalid_argument"),
        (json!({ "path": "/etc", "limit": 2001 }), "invalid_argument"),
        (json!({ "path": "/etc", "cursor": "?" }), "invalid_argument"),
    ] {
        assert_eq!(client.bad("file_list", arguments.clone()), code, "{arguments}");
    }
}

#[test]
fn structured_results_keep_to_their_schemas() {
    let guest = Guest::start();
    let mut client = guest.client();
    let result = client.good("os_info", json!({}));
    let parsed: nexus_schema::tools::os::OsInfoOutput =
        serde_json::from_value(result["structuredContent"].clone()).unwrap();
    assert!(parsed.cpus >= 1 && parsed.memory_total_bytes > 0 && parsed.uptime_s > 0.0);
    assert!(header(&result).starts_with("web-1 · "));
    assert_eq!(client.bad("os_info", json!({ "extra": 1 })), "invalid_argument");
}
