//! Files that are written in pieces: in their place whole, or not at all.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use common::{Guest, until};
use data_encoding::BASE64;
use serde_json::{Value, json};

fn piece(path: &str, offset: Option<u64>, content: &[u8], commit: bool) -> Value {
    let mut arguments =
        json!({ "path": path, "upload_id": "up-1", "content": BASE64.encode(content), "encoding": "base64" });
    if let Some(offset) = offset {
        arguments["offset"] = offset.into();
    }
    if commit {
        arguments["commit"] = true.into();
    }
    arguments
}

#[test]
fn pieces_make_a_file_when_all_are_there() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("new/big");
    let pieces: Vec<Vec<u8>> = (0..5).map(|number| vec![number; 2 << 20]).collect();
    for (number, content) in pieces.iter().enumerate() {
        let is_last = number == 4;
        // One of them twice, as after an answer that was lost; one without an offset.
        let offset = (number != 3).then_some((number as u64) << 21);
        let arguments = piece(&path, offset, content, is_last);
        if number == 2 {
            client.good("file_write", arguments.clone());
        }
        let result = client.good("file_write", arguments)["structuredContent"].clone();
        assert_eq!(result["size_bytes"], (number + 1) << 21);
        assert_eq!(result.get("pending"), (!is_last).then_some(&Value::Bool(true)));
        assert_eq!(std::fs::exists(&path).unwrap(), is_last);
        assert_eq!(
            std::fs::read_dir(guest.path("new")).unwrap().count(),
            usize::from(is_last),
            "nothing beside it"
        );
    }
    assert_eq!(std::fs::read(&path).unwrap(), pieces.concat());
    // It is over with the commit.
    assert_eq!(client.bad("file_write", piece(&path, Some(5), b"x", true)), "changed");

    // What it replaces keeps owner and mode; until then readers see the old content.
    chown(&path, Some(12), Some(34)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    client.good("file_write", piece(&path, None, b"first ", false));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 10 << 20);
    client.good("file_write", piece(&path, None, b"second", true));
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (12, 34, 0o640));
    assert_eq!(std::fs::read(&path).unwrap(), b"first second");
}

#[test]
fn what_makes_no_file_is_refused() {
    let guest = Guest::start();
    let mut client = guest.client();
    let path = guest.path("file");
    client.good("file_write", piece(&path, None, b"12345", false));
    let with = |name: &str, value: Value| {
        let mut arguments = piece(&path, None, b"x", false);
        arguments[name] = value;
        arguments
    };
    for (arguments, code) in [
        (piece(&path, Some(6), b"x", false), "invalid_argument"),
        (piece(&guest.path("other"), None, b"x", false), "invalid_argument"),
        (piece("/dev/null", None, b"x", false), "file_refused"),
        (with("user", "54321".into()), "invalid_argument"),
        (with("append", true.into()), "invalid_argument"),
        (with("upload_id", "a/b".into()), "invalid_argument"),
        (with("upload_id", "x".repeat(65).into()), "invalid_argument"),
        (json!({ "path": path, "content": "x", "commit": true }), "invalid_argument"),
        (json!({ "path": path, "content": "x", "offset": 1 }), "invalid_argument"),
    ] {
        assert_eq!(client.bad("file_write", arguments.clone()), code, "{arguments}");
    }
    // What is given again is written over what was there.
    client.good("file_write", piece(&path, Some(0), b"12345", false));
    let result = client.good("file_write", piece(&path, Some(2), b"34", true));
    assert_eq!(result["structuredContent"]["size_bytes"], 5);
    assert_eq!(std::fs::read(&path).unwrap(), b"12345");
}

/// Whatever ends an agent, nothing is left of what was not committed.
#[test]
fn an_upload_ends_with_the_agent() {
    let mut guest = Guest::start();
    let mut client = guest.client();
    let directory = guest.path("place");
    client.good("file_write", piece(&format!("{directory}/file"), None, &[7; 1 << 20], false));
    guest.process.kill().unwrap();
    guest.wait();
    until("nothing is left", || std::fs::read_dir(&directory).unwrap().count() == 0);
}

#[test]
fn a_user_uploads_what_it_may_write() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    std::fs::set_permissions(guest.directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let home = guest.path("home");
    std::fs::create_dir(&home).unwrap();
    chown(&home, Some(54321), Some(54321)).unwrap();
    let theirs = |path: &str, content: &[u8], commit: bool| {
        let mut arguments = piece(path, None, content, commit);
        arguments["user"] = "54321".into();
        arguments
    };
    let own = format!("{home}/a/own");
    client.good("file_write", theirs(&own, b"one ", false));
    client.good("file_write", theirs(&own, b"two", true));
    assert_eq!(
        (std::fs::read(&own).unwrap(), std::fs::metadata(&own).unwrap().uid()),
        (b"one two".to_vec(), 54321)
    );
    assert_eq!(client.bad("file_write", theirs(&guest.path("x"), b"x", false)), "file_refused");
    // Another's, which all may write.
    let shared = format!("{home}/shared");
    std::fs::write(&shared, "old").unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o666)).unwrap();
    client.good("file_write", theirs(&shared, b"new", true));
    assert_eq!(
        (std::fs::read(&shared).unwrap(), std::fs::metadata(&shared).unwrap().uid()),
        (b"new".to_vec(), 0)
    );
}
