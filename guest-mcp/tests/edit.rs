//! Edits and patches: all of a call or nothing, and what is not changed stays.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use common::{Client, Guest, facts, header, stream};
use serde_json::{Value, json};

fn edits(path: &str, edits: &[(&str, &str)]) -> Value {
    let edits: Vec<Value> =
        edits.iter().map(|(old, new)| json!({ "path": path, "old": old, "new": new })).collect();
    json!({ "edits": edits })
}

/// The error of a call that must fail: its code, and message with hint.
fn refused(client: &mut Client, tool: &str, arguments: Value) -> (String, String) {
    let result = client.call(tool, arguments);
    assert_eq!(result["isError"], true, "{result}");
    let error = &result["_meta"]["dev.nexus/error"];
    (error["code"].as_str().unwrap().to_owned(), result["content"][0]["text"].as_str().unwrap().to_owned())
}

#[test]
fn text_is_replaced_exactly() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("a.txt");
    std::fs::write(&path, b"one\ntwo\nthree \xff\nfour\n").unwrap();
    let result = client.good("file_edit", edits(&path, &[("two\n", "2\n"), ("2\nthree", "2 and three")]));
    assert_eq!(std::fs::read(&path).unwrap(), b"one\n2 and three \xff\nfour\n");
    let diff = stream(&result, "content");
    assert!(diff.starts_with(&format!("--- {path}\n+++ {path}\n@@ -1,4 +1,3 @@\n one\n-two\n")), "{diff}");
    let file = &facts(&result)["files"][0];
    assert_eq!(
        (&file["added"], &file["removed"], &facts(&result)["changes"]),
        (&json!(1), &json!(2), &json!(2))
    );
    assert!(header(&result).contains("2 replacements"), "{}", header(&result));

    // The hash of what it holds now is that which the next edit may expect.
    let mut next = edits(&path, &[("one", "1")]);
    next["edits"][0]["expect_sha256"] = file["sha256"].clone();
    client.good("file_edit", next.clone());
    let (code, text) = refused(&mut client, "file_edit", next);
    assert!(code == "edit_mismatch" && text.contains("SHA-256"), "{text}");

    let mut dry = edits(&path, &[("1", "I")]);
    dry["dry_run"] = true.into();
    let result = client.good("file_edit", dry);
    assert!(stream(&result, "content").contains("-1\n+I\n"), "{result}");
    assert!(std::fs::read(&path).unwrap().starts_with(b"1\n"));
}

#[test]
fn the_count_must_match() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("a.txt");
    std::fs::write(&path, "x\nx\n  y\n").unwrap();
    let (code, text) = refused(&mut client, "file_edit", edits(&path, &[("x", "z")]));
    assert!(code == "edit_mismatch" && text.contains("2 times") && text.contains("line 1, 2"), "{text}");
    let (code, text) = refused(&mut client, "file_edit", edits(&path, &[("\ty", "z")]));
    assert!(code == "edit_mismatch" && text.contains("line 3 differs in white space"), "{text}");
    let mut counted = edits(&path, &[("x", "z")]);
    counted["edits"][0]["expect_count"] = 3.into();
    assert_eq!(client.bad("file_edit", counted.clone()), "edit_mismatch");
    counted["edits"][0]["expect_count"] = 2.into();
    client.good("file_edit", counted);
    let mut all = edits(&path, &[("z", "w")]);
    all["edits"][0]["replace_all"] = true.into();
    assert_eq!(facts(&client.good("file_edit", all.clone()))["changes"], 2);
    assert_eq!(client.bad("file_edit", all), "edit_mismatch");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "w\nw\n  y\n");
    for wrong in [json!({ "edits": [] }), edits(&path, &[("", "x")]), edits("a.txt", &[("x", "y")])] {
        assert_eq!(client.bad("file_edit", wrong.clone()), "invalid_argument", "{wrong}");
    }
    assert_eq!(client.bad("file_edit", edits(&guest.path("no"), &[("x", "y")])), "file_not_found");
    assert_eq!(client.bad("file_edit", edits("/dev/zero", &[("x", "y")])), "file_refused");
}

#[test]
fn what_is_not_changed_stays() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let (path, link) = (guest.path("dos.txt"), guest.path("link"));
    std::fs::write(&path, "one\r\ntwo\r\nthree\r\n").unwrap();
    chown(&path, Some(12), Some(34)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o4751)).unwrap();
    let has_attributes =
        rustix::fs::setxattr(path.as_str(), "user.note", b"kept", rustix::fs::XattrFlags::empty()).is_ok();
    symlink("dos.txt", &link).unwrap();
    client.good("file_edit", edits(&link, &[("one\ntwo", "1\n2\n2.5")]));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\r\n2\r\n2.5\r\nthree\r\n");
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (12, 34, 0o4751));
    if has_attributes {
        let mut value = [0; 16];
        let length = rustix::fs::getxattr(path.as_str(), "user.note", &mut value).unwrap();
        assert_eq!(&value[..length], b"kept");
    }
    // CR is a character like any other once it is given.
    client.good("file_edit", edits(&path, &[("2\r\n2.5\r\n", "2\n")]));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\r\n2\nthree\r\n");
    assert_eq!(
        std::fs::read_dir(guest.directory.path())
            .unwrap()
            .filter(|e| { e.as_ref().unwrap().file_name().to_string_lossy().starts_with(".nexus-") })
            .count(),
        0
    );
}

#[test]
fn all_files_are_edited_or_none() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let names = ["a", "b", "c"].map(|name| guest.path(name));
    for name in &names {
        std::fs::write(name, "old\n").unwrap();
    }
    let all = |last: &str| {
        let edit = |path: &String, old: &str| json!({ "path": path, "old": old, "new": "new" });
        json!({ "edits": [edit(&names[0], "old"), edit(&names[1], "old"), edit(&names[2], last)] })
    };
    let read = || names.each_ref().map(|name| std::fs::read_to_string(name).unwrap());
    assert_eq!(client.bad("file_edit", all("other")), "edit_mismatch");
    assert_eq!(read(), ["old\n"; 3]);

    // A filesystem without room for the last one.
    let small = guest.path("small");
    std::fs::create_dir(&small).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", small.as_str(), "tmpfs", flags, Some(c"size=64k")).expect("mount a tmpfs");
    let last = guest.path("small/file");
    std::fs::write(&last, "old\n").unwrap();
    let full = json!({ "edits": [
        { "path": names[0], "old": "old", "new": "new" },
        { "path": last, "old": "old", "new": "x".repeat(200 << 10) },
    ] });
    let code = client.bad("file_edit", full);
    let (content, count) =
        (std::fs::read_to_string(&last).unwrap(), std::fs::read_dir(&small).unwrap().count());
    rustix::mount::unmount(small.as_str(), rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!((code.as_str(), content.as_str(), count), ("disk_full", "old\n", 1));
    assert_eq!(read(), ["old\n"; 3]);

    // One that a user may not write.
    std::fs::set_permissions(guest.directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    for name in &names[..2] {
        chown(name, Some(54321), Some(54321)).unwrap();
    }
    let mut theirs = all("old");
    theirs["user"] = "54321".into();
    assert_eq!(client.bad("file_edit", theirs), "file_refused");
    assert_eq!(read(), ["old\n"; 3]);

    let result = client.good("file_edit", all("old"));
    assert_eq!(read(), ["new\n"; 3]);
    assert!(header(&result).contains("3 files · 3 replacements"), "{}", header(&result));
    assert!(Path::new(&guest.path("a")).exists());
}
