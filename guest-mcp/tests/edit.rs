//! Edits and patches: all of a call or nothing, and what is not changed stays.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::Duration;

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

#[test]
fn patches_are_applied_whole_or_not_at_all() {
    let guest = Guest::start();
    let mut client = guest.client();
    let root = guest.path("repo");
    std::fs::create_dir_all(format!("{root}/src")).unwrap();
    let lines: String = (1..=20).map(|line| format!("line {line}\n")).collect();
    std::fs::write(format!("{root}/src/a.txt"), &lines).unwrap();
    std::fs::write(format!("{root}/gone"), "x\n").unwrap();
    std::fs::write(format!("{root}/old name"), "same\n").unwrap();
    std::fs::set_permissions(format!("{root}/old name"), std::fs::Permissions::from_mode(0o750)).unwrap();
    let patch = "diff --git a/src/a.txt b/src/a.txt\n--- a/src/a.txt\n+++ b/src/a.txt\n@@ -1,3 +1,4 @@\n line 1\n+line 1.5\n line 2\n line 3\n\
        @@ -18,3 +19,2 @@ context\n line 18\n-line 19\n line 20\n\
        diff --git a/new/deep/b b/new/deep/b\nnew file mode 100755\n--- /dev/null\n+++ b/new/deep/b\n@@ -0,0 +1,1 @@\n+made\n\
        diff --git a/gone b/gone\ndeleted file mode 100644\n--- a/gone\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n\
        diff --git a/old name b/new name\nsimilarity index 100%\nrename from old name\nrename to new name\n";
    let call = |patch: &str| json!({ "path": root, "patch": patch });
    let tree = || {
        let mut all: Vec<String> = walk(Path::new(&root));
        all.sort();
        all
    };
    let before = tree();
    // The last hunk of the last file does not fit: nothing is changed, and it is said which.
    let bad = format!("{patch}--- a/src/a.txt\n+++ b/src/a.txt\n@@ -5,2 +5,1 @@\n line 5\n-line seven\n");
    let (code, text) = refused(&mut client, "file_patch", call(&bad));
    assert!(
        code == "edit_mismatch" && text.contains("hunk 1 (@@ -5,2 +5,1 @@)") && text.contains("line seven"),
        "{text}"
    );
    assert_eq!(tree(), before);
    let mut dry = call(patch);
    dry["dry_run"] = true.into();
    let shown = client.good("file_patch", dry);
    assert_eq!(tree(), before);

    let result = client.good("file_patch", call(patch));
    assert_eq!(stream(&result, "content"), stream(&shown, "content"));
    assert_eq!(tree(), ["new", "new name", "new/deep", "new/deep/b", "src", "src/a.txt"]);
    let content = std::fs::read_to_string(format!("{root}/src/a.txt")).unwrap();
    assert_eq!(content, lines.replace("line 1\n", "line 1\nline 1.5\n").replace("line 19\n", ""));
    let mode = |name: &str| std::fs::metadata(format!("{root}/{name}")).unwrap().mode() & 0o7777;
    assert_eq!((mode("new/deep/b"), mode("new name")), (0o755, 0o750));
    assert_eq!(
        (&facts(&result)["changes"], facts(&result)["files"].as_array().unwrap().len()),
        (&json!(4), 5)
    );
    // A second time it does not fit.
    assert_eq!(client.bad("file_patch", call(patch)), "edit_mismatch");

    // Lines of files with CR LF are meant by a patch without.
    std::fs::write(format!("{root}/dos"), "a\r\nb\r\n").unwrap();
    client.good("file_patch", call("--- dos\n+++ dos\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"));
    assert_eq!(std::fs::read_to_string(format!("{root}/dos")).unwrap(), "a\r\nc\r\n");
}

#[test]
fn patches_stay_in_their_directory() {
    let guest = Guest::start();
    let mut client = guest.client();
    let root = guest.path("repo");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(guest.path("outside"), "x\n").unwrap();
    symlink(guest.directory.path(), format!("{root}/up")).unwrap();
    symlink(guest.path("outside"), format!("{root}/link")).unwrap();
    let call = |name: &str| json!({ "path": root, "patch": format!("--- {name}\n+++ {name}\n@@ -1 +1 @@\n-x\n+y\n") });
    for name in
        ["../outside", "up/outside", "link", "up/../../outside", &guest.path("outside"), "/etc/passwd"]
    {
        assert_eq!(client.bad("file_patch", call(name)), "file_refused", "{name}");
    }
    // Below what does not exist, the target of a link may be anywhere.
    symlink("none/../../made/new", format!("{root}/far")).unwrap();
    for name in ["up/new", "../new", "far", "up/made/new"] {
        let patch = format!("--- /dev/null\n+++ {name}\n@@ -0,0 +1 @@\n+x\n");
        assert_eq!(
            client.bad("file_patch", json!({ "path": root, "patch": patch })),
            "file_refused",
            "{name}"
        );
    }
    assert_eq!(std::fs::read_to_string(guest.path("outside")).unwrap(), "x\n");
    for new in ["new", "made", "repo/none"] {
        assert!(!Path::new(&guest.path(new)).exists(), "{new}");
    }
    for bad in ["", "hello", "--- a\n+++ b\n@@ -1 +1\n"] {
        assert_eq!(
            client.bad("file_patch", json!({ "path": root, "patch": bad })),
            "invalid_argument",
            "{bad}"
        );
    }
    let strip = json!({ "path": root, "patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-x\n+y\n", "strip": 2 });
    assert_eq!(client.bad("file_patch", strip), "invalid_argument");
}

fn walk(root: &Path) -> Vec<String> {
    let mut all = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
            all.push(entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
        }
    }
    all
}

/// Whenever an agent is killed and whenever its client goes, each file is as it was or as it was to be.
#[test]
fn an_edit_that_is_cut_off_leaves_each_file_old_or_new() {
    let (old, new) = (format!("{}end", "x".repeat(4 << 20)), format!("{}END", "x".repeat(4 << 20)));
    for (round, pause) in [0, 5, 10, 20, 40, 80].into_iter().enumerate() {
        let mut guest = Guest::start();
        let files = [guest.path("a"), guest.path("b")];
        files.iter().for_each(|file| std::fs::write(file, &old).unwrap());
        let mut client = guest.client();
        let both: Vec<Value> =
            files.iter().map(|path| json!({ "path": path, "old": "end", "new": "END" })).collect();
        client.begin_call("file_edit", json!({ "edits": both }));
        std::thread::park_timeout(Duration::from_millis(pause));
        if round % 2 == 0 {
            guest.process.kill().unwrap();
            guest.wait();
        }
        drop(client);
        for file in &files {
            let now = std::fs::read_to_string(file).unwrap();
            assert!(now == old || now == new, "after {pause} ms {file} has {} bytes", now.len());
        }
    }
}
