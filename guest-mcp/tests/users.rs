//! The file tools as a user: what that one may not do is refused, and what it makes is its own. And the errors as data.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use common::{Client, Guest, facts, header, stream};
use data_encoding::BASE64;
use serde_json::{Value, json};

const USER: &str = "54321:54322";

fn chmod(path: &str, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A guest whose directory everyone may enter, with a directory of the user's own in it.
fn start() -> (Guest, String) {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start_configured(|_, configure| configure.image_user = Some(USER.to_owned()));
    chmod(guest.directory.path().to_str().unwrap(), 0o755);
    let home = guest.path("home");
    std::fs::create_dir(&home).unwrap();
    chown(&home, Some(54321), Some(54322)).unwrap();
    (guest, home)
}

fn owner(path: &str) -> (u32, u32) {
    std::fs::symlink_metadata(path).map(|metadata| (metadata.uid(), metadata.gid())).unwrap()
}

/// The error of a call that must fail: code, errno and class.
fn error(client: &mut Client, tool: &str, arguments: Value) -> [String; 3] {
    let result = client.call(tool, arguments);
    assert_eq!(result["isError"], true, "{result}");
    let error = &result["_meta"]["dev.nexus/error"];
    ["code", "errno", "class"].map(|name| error[name].as_str().unwrap_or_default().to_owned())
}

#[test]
fn what_a_user_makes_is_its_own() {
    let (guest, home) = start();
    let mut client = guest.client();
    for user in [USER, "image"] {
        let path = format!("{home}/{user}/src/a");
        client.good("file_write", json!({ "path": path, "content": "x\n", "user": user }));
        for made in [path.as_str(), &format!("{home}/{user}/src"), &format!("{home}/{user}")] {
            assert_eq!(owner(made), (54321, 54322), "{made}");
        }
        assert_eq!(
            stream(&client.good("file_read", json!({ "path": path, "user": user })), "content"),
            "x\n"
        );
        let log = format!("{home}/{user}/log");
        client.good("file_write", json!({ "path": log, "content": "x", "append": true, "user": user }));
        assert_eq!(owner(&log), (54321, 54322));
    }
    // Its own also where the directory is somebody else's.
    let shared = guest.path("shared");
    std::fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o1777);
    client.good("file_write", json!({ "path": format!("{shared}/a/b"), "content": "x", "user": USER }));
    assert_eq!(
        (owner(&format!("{shared}/a")), owner(&format!("{shared}/a/b"))),
        ((54321, 54322), (54321, 54322))
    );
    // A directory, a copy and what is moved, with their parents.
    client.good("file_mkdir", json!({ "path": format!("{home}/made/deep"), "user": USER }));
    let from = format!("{home}/image/src/a");
    client.good("file_copy", json!({ "from": from, "to": format!("{home}/copied/a"), "user": USER }));
    let (from, to) = (format!("{home}/copied/a"), format!("{home}/moved/a"));
    client.good("file_move", json!({ "from": from, "to": to, "user": USER }));
    for made in ["made", "made/deep", "copied", "moved", "moved/a"] {
        assert_eq!(owner(&format!("{home}/{made}")), (54321, 54322), "{made}");
    }
    // Root who is named owns what it makes, too.
    client.good("file_write", json!({ "path": format!("{home}/roots/x"), "content": "x", "user": "root" }));
    assert_eq!(owner(&format!("{home}/roots")), (0, 0));
    let result = client
        .good("file_delete", json!({ "path": format!("{home}/image"), "recursive": true, "user": USER }));
    assert_eq!(result["structuredContent"]["deleted"], 4);
}

#[test]
fn what_a_user_may_not_do_is_refused() {
    let (guest, home) = start();
    let mut client = guest.client();
    let secret = guest.path("secret");
    std::fs::write(&secret, "x").unwrap();
    chmod(&secret, 0o600);
    let closed = guest.path("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::write(guest.path("closed/file"), "x").unwrap();
    chmod(&closed, 0o700);
    // Its own file, which it may replace and not write.
    let guarded = format!("{home}/guarded");
    std::fs::write(&guarded, "old").unwrap();
    chown(&guarded, Some(54321), Some(54322)).unwrap();
    chmod(&guarded, 0o444);
    let inside = guest.path("closed/file");
    let readable = guest.path("readable");
    std::fs::write(&readable, "x\n").unwrap();
    let edit = |path: &str| json!({ "edits": [{ "path": path, "old": "x", "new": "y" }] });
    let patch = "--- readable\n+++ readable\n@@ -1 +1 @@\n-x\n+y\n";
    for (tool, arguments) in [
        ("file_read", json!({ "path": secret })),
        ("file_read", json!({ "path": inside })),
        ("file_stat", json!({ "path": inside })),
        ("file_list", json!({ "path": closed })),
        ("file_write", json!({ "path": secret, "content": "new" })),
        ("file_write", json!({ "path": secret, "content": "new", "append": true })),
        ("file_write", json!({ "path": guest.path("new"), "content": "new" })),
        ("file_write", json!({ "path": guest.path("new/dir/file"), "content": "new" })),
        ("file_write", json!({ "path": guarded, "content": "new" })),
        ("file_edit", edit(&secret)),
        ("file_edit", edit(&readable)),
        ("file_patch", json!({ "path": guest.directory.path(), "patch": patch })),
        ("file_mkdir", json!({ "path": guest.path("new") })),
        ("file_mkdir", json!({ "path": guest.path("closed/new") })),
        ("file_copy", json!({ "from": secret, "to": format!("{home}/copy") })),
        ("file_copy", json!({ "from": readable, "to": guest.path("new") })),
        ("file_move", json!({ "from": secret, "to": format!("{home}/moved") })),
        ("file_move", json!({ "from": guarded, "to": guest.path("new") })),
        ("file_delete", json!({ "path": secret })),
        ("file_read", json!({ "path": "/proc/1/environ" })),
        ("file_read", json!({ "path": "/proc/1/maps" })),
    ] {
        let mut arguments = arguments;
        arguments["user"] = USER.into();
        let expected = ["file_refused", "EACCES", "permission"].map(str::to_owned);
        assert_eq!(error(&mut client, tool, arguments.clone()), expected, "{tool} {arguments}");
    }
    // Here the kernel looks at the effective user alone. Where these files are read-only it says that first.
    let arguments = json!({ "path": "/proc/sys/kernel/domainname", "content": "x", "user": USER });
    assert_eq!(error(&mut client, "file_write", arguments)[2], "permission");
    assert_eq!(std::fs::read_to_string(&guarded).unwrap(), "old");
    assert_eq!(std::fs::read_to_string(&readable).unwrap(), "x\n");
    assert!(!std::fs::exists(guest.path("new")).unwrap());
    assert_eq!(std::fs::read_dir(&home).unwrap().count(), 1, "nothing is left of what was refused");
    // The agent's own rights are what they were.
    client.good("file_read", json!({ "path": secret }));
    client.good("file_write", json!({ "path": guest.path("new/dir/file"), "content": "new" }));
    assert_eq!(owner(&guest.path("new")), (0, 0));
    for bad in ["no-such-user", "1:no-such-group", ""] {
        let arguments = json!({ "path": secret, "user": bad });
        // An empty argument that is optional is one that is not given.
        if bad.is_empty() {
            client.good("file_read", arguments);
        } else {
            assert_eq!(client.bad("file_read", arguments), "user_not_found", "{bad}");
        }
    }
}

/// Whoever may write a file may do so, also where it cannot make another one beside it or give that one away.
#[test]
fn files_of_others_are_written_in_place() {
    let (guest, home) = start();
    let mut client = guest.client();
    for path in [guest.path("shared"), format!("{home}/shared")] {
        std::fs::write(&path, "old").unwrap();
        chmod(&path, 0o666);
        let number = std::fs::metadata(&path).unwrap().ino();
        client.good("file_write", json!({ "path": path, "content": "new", "user": USER }));
        let after = std::fs::metadata(&path).unwrap();
        assert_eq!((after.uid(), after.ino(), after.mode() & 0o7777), (0, number, 0o666), "{path}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
    }
    assert_eq!(std::fs::read_dir(&home).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn errors_are_data() {
    let guest = Guest::start();
    let mut client = guest.client();
    let (loops, long) = (guest.path("loop"), guest.path(&"n".repeat(300)));
    symlink("loop", &loops).unwrap();
    std::fs::create_dir_all(guest.path("full/of")).unwrap();
    for (tool, arguments, expected) in [
        ("file_read", json!({ "path": "/no/such" }), ["file_not_found", "ENOENT", "not_found"]),
        ("file_read", json!({ "path": "/etc" }), ["file_refused", "EISDIR", "is_a_directory"]),
        ("file_read", json!({ "path": "/etc/passwd/x" }), ["file_refused", "ENOTDIR", "conflict"]),
        ("file_read", json!({ "path": "/dev/zero" }), ["file_refused", "", "conflict"]),
        ("file_read", json!({ "path": "etc" }), ["invalid_argument", "", "usage"]),
        ("file_read", json!({ "path": loops }), ["file_refused", "ELOOP", "conflict"]),
        ("file_list", json!({ "path": "/etc/passwd" }), ["file_refused", "ENOTDIR", "conflict"]),
        ("file_stat", json!({ "path": long }), ["file_refused", "ENAMETOOLONG", "too_large"]),
        ("file_delete", json!({ "path": guest.path("full") }), ["file_refused", "ENOTEMPTY", "conflict"]),
        ("file_delete", json!({ "path": "/proc" }), ["file_refused", "EBUSY", "conflict"]),
        ("run_command", json!({ "argv": ["/no/such"] }), ["program_not_found", "ENOENT", "not_found"]),
        (
            "run_command",
            json!({ "argv": ["/etc/passwd"] }),
            ["program_not_executable", "EACCES", "permission"],
        ),
        ("run_command", json!({ "command": "x", "user": "no-such" }), ["user_not_found", "", "not_found"]),
        (
            "run_command",
            json!({ "command": "x", "log": "/etc" }),
            ["file_refused", "EISDIR", "is_a_directory"],
        ),
    ] {
        assert_eq!(
            error(&mut client, tool, arguments.clone()),
            expected.map(str::to_owned),
            "{tool} {arguments}"
        );
    }
    for (path, expected) in [
        ("/etc/passwd/x", ["file_refused", "ENOTDIR", "conflict"]),
        ("/etc/passwd/x/y", ["file_refused", "ENOTDIR", "conflict"]),
        ("/etc", ["file_refused", "EISDIR", "is_a_directory"]),
        ("/", ["file_refused", "EISDIR", "is_a_directory"]),
        ("/tmp/new/", ["file_refused", "EISDIR", "is_a_directory"]),
        (loops.as_str(), ["file_refused", "ELOOP", "conflict"]),
    ] {
        let arguments = json!({ "path": path, "content": "x" });
        assert_eq!(error(&mut client, "file_write", arguments), expected.map(str::to_owned), "{path}");
    }
}

/// Names may hold every byte but zero and the slash: they can be read, used, and never move a terminal's cursor.
#[test]
fn names_of_every_byte_survive_and_are_shown_tamely() {
    let guest = Guest::start();
    let mut client = guest.client();
    let directory = guest.path("names");
    std::fs::create_dir(&directory).unwrap();
    for byte in (1..=u8::MAX).filter(|byte| *byte != b'/') {
        let name = [b'n', byte, b'm'];
        std::fs::write(std::path::Path::new(&directory).join(OsStr::from_bytes(&name)), [byte]).unwrap();
    }
    symlink("to\u{1b}[2J", format!("{directory}/link")).unwrap();
    let result = client.good("file_list", json!({ "path": directory, "limit": 2000 }));
    let is_tame = |text: &str| !text.chars().any(|c| c.is_control() && c != '\n');
    for block in result["content"].as_array().unwrap() {
        assert!(is_tame(block["text"].as_str().unwrap()), "{block}");
    }
    let entries = result["structuredContent"]["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 255);
    let encoded = |directory: &str, name: &[u8]| {
        format!("base64:{}", BASE64.encode(&[directory.as_bytes(), b"/", name].concat()))
    };
    let (copies, moved) = (guest.path("copies"), guest.path("moved"));
    for entry in entries.iter().filter(|entry| entry["type"] == "file") {
        let shown = entry["path"].as_str().unwrap();
        let (name, path) = match entry["path_base64"].as_str() {
            Some(exact) => {
                let exact = BASE64.decode(exact.as_bytes()).unwrap();
                let path = encoded(&directory, &exact);
                (exact, path)
            }
            None => (shown.as_bytes().to_vec(), format!("{directory}/{shown}")),
        };
        let result = client.good("file_read", json!({ "path": path, "encoding": "base64" }));
        let content = BASE64.decode(stream(&result, "content").as_bytes()).unwrap();
        assert!(is_tame(header(&result)), "{result}");
        let result = client.good("file_stat", json!({ "path": path }));
        assert!(is_tame(header(&result)), "{result}");
        client.good("file_write", json!({ "path": path, "content": "x" }));
        let (copy, there) = (encoded(&copies, &name), encoded(&moved, &name));
        client.good("file_copy", json!({ "from": path, "to": copy }));
        client.good("file_move", json!({ "from": copy, "to": there }));
        let edit = json!({ "edits": [{ "path": there, "old": "x", "new": "y" }] });
        let result = client.good("file_edit", edit);
        assert!(is_tame(header(&result)) && is_tame(stream(&result, "content")), "{result}");
        let there = std::path::Path::new(&moved).join(OsStr::from_bytes(&name));
        assert_eq!(std::fs::read(there).unwrap(), b"y");
        client.good("file_delete", json!({ "path": path }));
        assert_eq!(content.len(), 1);
    }
    assert_eq!(std::fs::read_dir(&copies).unwrap().count(), 0);
    let found = client.good("file_search", json!({ "path": moved, "pattern": "y", "show": "files" }));
    assert_eq!(facts(&found)["files"], 254, "{found}");
    assert!(is_tame(found["content"][1]["text"].as_str().unwrap()), "{found}");
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1, "all but the link are gone");
}
