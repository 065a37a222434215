//! Files that are read by lines, listed as a tree, copied, moved and made room for.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use common::{Guest, facts, header, stream, within};
use serde_json::{Value, json};

fn chmod(path: &str, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn fifo(path: &str) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

#[test]
fn files_are_read_by_lines() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("text");
    let text: String = (1..=5000).map(|line| format!("line {line} ä\n")).collect();
    std::fs::write(&path, &text).unwrap();
    let result = client.good("file_read", json!({ "path": path, "from_line": 4000, "lines": 2 }));
    assert_eq!(stream(&result, "content"), "line 4000 ä\nline 4001 ä\n");
    let found = facts(&result);
    let offset = text.find("line 4000 ").unwrap();
    assert_eq!(
        (&found["offset"], &found["from_line"], &found["lines"]),
        (&json!(offset), &json!(4000), &json!(2))
    );
    assert!(header(&result).contains("continues at from_line 4002 (offset "), "{}", header(&result));

    // Parts of lines add up to the whole.
    let (mut all, mut line) = (String::new(), 1);
    loop {
        let result = client.good("file_read", json!({ "path": path, "from_line": line, "limit": 3000 }));
        all.push_str(stream(&result, "content"));
        line += facts(&result)["lines"].as_u64().unwrap();
        if facts(&result)["eof"] == true {
            break;
        }
    }
    assert_eq!((all, line), (text, 5001));

    let result =
        client.good("file_read", json!({ "path": path, "from_line": 9, "lines": 2, "numbered": true }));
    assert_eq!(stream(&result, "content"), "     9\tline 9 ä\n    10\tline 10 ä\n");
    assert_eq!(facts(&result)["read_bytes"], "line 9 ä\nline 10 ä\n".len());
    let result = client.good("file_read", json!({ "path": path, "from_line": 6000 }));
    assert!(header(&result).contains("no line 6000: the file has 5000 lines"), "{}", header(&result));
    std::fs::write(&path, "\n".repeat(100_000)).unwrap();
    let result = client.good("file_read", json!({ "path": path, "numbered": true, "limit": 48_000 }));
    assert!(stream(&result, "content").len() <= 48_000);
    let version = client.good("file_read", json!({ "path": "/proc/version", "lines": 1 }));
    assert!(stream(&version, "content").starts_with("Linux version"));
    for wrong in [
        json!({ "path": path, "from_line": 1, "offset": 1 }),
        json!({ "path": path, "from_line": 0 }),
        json!({ "path": path, "lines": 0 }),
        json!({ "path": path, "numbered": true, "encoding": "base64" }),
    ] {
        assert_eq!(client.bad("file_read", wrong.clone()), "invalid_argument", "{wrong}");
    }
}

/// What a client shows a model of a listing: the text, and the structured form.
fn sizes(result: &Value) -> (usize, usize) {
    let blocks = result["content"].as_array().unwrap().iter();
    (
        blocks.map(|block| block["text"].as_str().unwrap().len()).sum(),
        result["structuredContent"].to_string().len(),
    )
}

#[test]
fn two_thousand_entries_fit_a_reply() {
    let guest = Guest::start();
    let mut client = guest.client();
    let root = guest.path("tree");
    for directory in 0..40 {
        let place = format!("{root}/packages/module-{directory:02}/src");
        std::fs::create_dir_all(&place).unwrap();
        for file in 0..47 {
            std::fs::write(format!("{place}/component{file:02}.rs"), "").unwrap();
        }
    }
    symlink("/etc", format!("{root}/etc")).unwrap();
    for note in 0..38 {
        std::fs::write(format!("{root}/readme-{note:02}.md"), "").unwrap();
    }
    let compact = json!({ "path": root, "recursive": true, "compact": true });
    let result = client.good("file_list", compact.clone());
    let structured = &result["structuredContent"];
    let tree = structured["tree"].as_str().unwrap();
    assert_eq!(structured["next_cursor"], Value::Null);
    // 1,918 files, 81 directories and a link.
    assert_eq!(tree.lines().count(), 2000);
    let (text, facts) = sizes(&result);
    assert!(text <= 48_000 && facts <= 48_000, "{text} {facts}");
    assert!(tree.starts_with("etc -> /etc\npackages/\n module-00/\n  src/\n   component00.rs\n"), "{tree}");
    assert_eq!(structured["entries"], json!([]));

    // Names as long as may be end a page early, and pages go on inside the tree.
    for number in 0..300 {
        std::fs::write(format!("{root}/packages/module-00/{number:03}{}", "\"".repeat(200)), "").unwrap();
    }
    let (mut lines, mut cursor, mut pages) = (0, Value::Null, 0);
    loop {
        let mut arguments = compact.clone();
        if !cursor.is_null() {
            arguments["cursor"] = cursor;
        }
        let result = client.good("file_list", arguments);
        let (text, facts) = sizes(&result);
        assert!(text <= 48_000 && facts <= 48_000, "{text} {facts}");
        let tree = result["structuredContent"]["tree"].as_str().unwrap();
        lines += tree.lines().filter(|line| !line.ends_with('/')).count();
        pages += 1;
        cursor = result["structuredContent"]["next_cursor"].clone();
        if cursor.is_null() {
            break;
        }
        assert!(pages > 1 || tree.contains("packages/"), "{tree}");
    }
    assert_eq!((lines, pages > 2), (40 * 47 + 38 + 1 + 300, true));

    let glob = |client: &mut common::Client, glob: &str| {
        let result =
            client.good("file_list", json!({ "path": root, "recursive": true, "glob": glob, "limit": 2000 }));
        let entries = result["structuredContent"]["entries"].as_array().unwrap().clone();
        entries.iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(glob(&mut client, "component07.rs").len(), 40);
    assert_eq!(glob(&mut client, "packages/module-1*/src/*0.rs").len(), 50);
    assert_eq!(glob(&mut client, "module-39"), ["packages/module-39"]);
    assert_eq!(glob(&mut client, "passwd"), [""; 0], "links are not followed");
    // No deeper than is asked for.
    for (depth, count) in [(1, 40), (2, 80)] {
        let listed = client.good("file_list", json!({ "path": root, "depth": depth, "limit": 2000 }));
        assert_eq!(listed["structuredContent"]["entries"].as_array().unwrap().len(), count, "{depth}");
    }
    // Few of many, on pages that are smaller than what is passed over.
    let result =
        client.good("file_list", json!({ "path": root, "recursive": true, "glob": "*46.rs", "limit": 3 }));
    assert_eq!(result["structuredContent"]["entries"].as_array().unwrap().len(), 3);
    assert_eq!(client.bad("file_list", json!({ "path": root, "glob": "a[" })), "invalid_argument");
}

#[test]
fn directories_are_made() {
    let guest = Guest::start();
    let mut client = guest.client();
    let (home, deep) = (guest.path("home"), guest.path("home/a/b"));
    std::fs::create_dir(&home).unwrap();
    chown(&home, Some(54321), Some(54322)).unwrap();
    let result = client.good("file_mkdir", json!({ "path": deep, "mode": "0700" }));
    assert_eq!(result["structuredContent"], json!({ "path": deep, "created": true }));
    let of = |path: &str| std::fs::metadata(path).map(|m| (m.uid(), m.mode() & 0o7777)).unwrap();
    assert_eq!((of(&deep), of(&guest.path("home/a"))), ((54321, 0o700), (54321, 0o755)));
    assert_eq!(client.good("file_mkdir", json!({ "path": deep }))["structuredContent"]["created"], false);
    std::fs::write(guest.path("file"), "").unwrap();
    for (arguments, code) in [
        (json!({ "path": deep, "parents": false }), "file_refused"),
        (json!({ "path": guest.path("x/y"), "parents": false }), "file_not_found"),
        (json!({ "path": guest.path("file") }), "file_refused"),
        (json!({ "path": guest.path("file/x") }), "file_refused"),
        (json!({ "path": guest.path("x"), "mode": "rwx" }), "invalid_argument"),
        (json!({ "path": "x" }), "invalid_argument"),
    ] {
        assert_eq!(client.bad("file_mkdir", arguments.clone()), code, "{arguments}");
    }
}

#[test]
fn files_are_moved() {
    let guest = Guest::start();
    let mut client = guest.client();
    std::fs::create_dir_all(guest.path("tree/a")).unwrap();
    std::fs::write(guest.path("tree/a/file"), "x").unwrap();
    symlink("file", guest.path("tree/a/link")).unwrap();
    let call = |from: &str, to: &str| json!({ "from": guest.path(from), "to": guest.path(to) });
    client.good("file_move", call("tree", "new/place/tree"));
    assert_eq!(std::fs::read_to_string(guest.path("new/place/tree/a/link")).unwrap(), "x");
    assert!(!Path::new(&guest.path("tree")).exists());
    client.good("file_move", call("new/place/tree/a/link", "new/link"));
    assert!(std::fs::symlink_metadata(guest.path("new/link")).unwrap().is_symlink());
    std::fs::write(guest.path("there"), "old").unwrap();
    for (from, to, code) in [
        ("new/place/tree/a/file", "there", "file_refused"),
        ("there", "new", "file_refused"),
        ("new", "new/place/x", "file_refused"),
        ("no", "x", "file_not_found"),
        ("there", "there/x", "file_refused"),
    ] {
        assert_eq!(client.bad("file_move", call(from, to)), code, "{from} {to}");
    }
    assert_eq!(std::fs::read_to_string(guest.path("there")).unwrap(), "old");
    let mut arguments = call("new/place/tree/a/file", "there");
    arguments["overwrite"] = true.into();
    client.good("file_move", arguments);
    assert_eq!(std::fs::read_to_string(guest.path("there")).unwrap(), "x");
    for path in ["/proc", "/", "/dev"] {
        assert_eq!(
            client.bad("file_move", json!({ "from": path, "to": guest.path("x") })),
            "file_refused",
            "{path}"
        );
    }
}

#[test]
fn moves_between_filesystems_are_copies() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let other = guest.path("other");
    std::fs::create_dir(&other).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", other.as_str(), "tmpfs", flags, Some(c"size=1m")).expect("mount a tmpfs");
    std::fs::create_dir(guest.path("tree")).unwrap();
    std::fs::write(guest.path("tree/small"), "x").unwrap();
    std::fs::write(guest.path("big"), vec![1; 2 << 20]).unwrap();
    let moved =
        client.call("file_move", json!({ "from": guest.path("tree"), "to": guest.path("other/tree") }));
    let full = client.call("file_move", json!({ "from": guest.path("big"), "to": guest.path("other/big") }));
    let content = std::fs::read_to_string(guest.path("other/tree/small"));
    let left = std::fs::read_dir(&other).unwrap().count();
    rustix::mount::unmount(other.as_str(), rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!((&moved["structuredContent"]["copied"], content.unwrap().as_str()), (&json!(true), "x"));
    assert!(!Path::new(&guest.path("tree")).exists());
    let error = &full["_meta"]["dev.nexus/error"];
    assert_eq!((&error["code"], &error["errno"]), (&json!("disk_full"), &json!("ENOSPC")), "{full}");
    assert!(Path::new(&guest.path("big")).exists());
    assert_eq!(left, 1, "nothing is left of what did not fit");
}

#[test]
fn trees_are_copied_as_they_are() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    std::fs::create_dir_all(guest.path("tree/a/empty")).unwrap();
    std::fs::write(guest.path("tree/a/file"), "content").unwrap();
    chown(guest.path("tree/a/file"), Some(12), Some(34)).unwrap();
    chmod(&guest.path("tree/a/file"), 0o4750);
    chmod(&guest.path("tree/a"), 0o500);
    symlink("/etc", guest.path("tree/a/link")).unwrap();
    fifo(&guest.path("tree/pipe"));
    let call =
        |from: &str, to: &str| json!({ "from": guest.path(from), "to": guest.path(to), "recursive": true });
    let arguments = call("tree", "copies/tree");
    let result = client.good("file_copy", arguments.clone());
    let mut facts = result["structuredContent"].clone();
    facts.as_object_mut().unwrap().retain(|name, _| !["from", "to"].contains(&name.as_str()));
    assert_eq!(facts, json!({ "files": 1, "directories": 3, "links": 1, "skipped": 1, "bytes": 7 }));
    let (old, new) =
        ["tree/a/file", "copies/tree/a/file"].map(|p| std::fs::metadata(guest.path(p)).unwrap()).into();
    assert_eq!((new.uid(), new.gid(), new.mode(), new.mtime()), (12, 34, old.mode(), old.mtime()));
    assert_eq!(std::fs::metadata(guest.path("copies/tree/a")).unwrap().mode() & 0o7777, 0o500);
    assert_eq!(std::fs::read_link(guest.path("copies/tree/a/link")).unwrap(), Path::new("/etc"));
    assert!(Path::new(&guest.path("copies/tree/a/empty")).is_dir());

    assert_eq!(client.bad("file_copy", arguments), "file_refused", "it is there already");
    for (from, to, recursive, code) in [
        ("tree", "x", false, "file_refused"),
        ("tree", "tree/a/b/c", true, "file_refused"),
        ("tree/pipe", "x", true, "file_refused"),
        ("tree/a/file", "copies", true, "file_refused"),
        ("no", "x", true, "file_not_found"),
    ] {
        let mut arguments = call(from, to);
        arguments["recursive"] = recursive.into();
        assert_eq!(client.bad("file_copy", arguments), code, "{from} {to}");
    }
    assert!(!Path::new(&guest.path("x")).exists() && !Path::new(&guest.path("tree/a/b")).exists());
    assert_eq!(client.bad("file_copy", call("tree/a/file", "copies/tree/a/file")), "file_refused");
    let mut arguments = call("tree/a/file", "copies/tree/a/file");
    arguments["overwrite"] = true.into();
    client.good("file_copy", arguments);
    // Nothing is left beside them.
    assert_eq!(std::fs::read_dir(guest.path("copies")).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(guest.path("copies/tree/a")).unwrap().count(), 3);

    // A user's copy is the user's, without the rights of others.
    chmod(guest.directory.path().to_str().unwrap(), 0o777);
    for path in ["tree/a/file", "tree/a"] {
        chmod(&guest.path(path), 0o4755);
    }
    let mut arguments = call("tree", "theirs");
    arguments["user"] = "54321".into();
    client.good("file_copy", arguments);
    let file = std::fs::metadata(guest.path("theirs/a/file")).unwrap();
    assert_eq!((file.uid(), file.mode() & 0o7777), (54321, 0o755));
}

/// Pipes, devices and files of the kernel are answered at once, whatever is asked of them.
#[test]
fn nothing_that_is_no_file_hangs_a_call() {
    let guest = Guest::start();
    let pipe = guest.path("pipe");
    fifo(&pipe);
    let mut client = guest.client();
    let copy = guest.path("copy");
    within(common::PATIENCE, move || {
        for path in [pipe.as_str(), "/dev/zero", "/dev/tty", "/proc/kmsg", "/dev/kmsg"] {
            for (tool, arguments) in [
                ("file_read", json!({ "path": path })),
                ("file_read", json!({ "path": path, "lines": 1 })),
                ("file_stat", json!({ "path": path })),
                ("file_copy", json!({ "from": path, "to": copy, "overwrite": true })),
            ] {
                client.call(tool, arguments);
            }
        }
    });
}
