//! Trees between the host and machines: a repository is copied in and exported as a patch, nothing outside the allowed places
//! is accessed, and an interrupted copy leaves only complete files.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use nexus_tests::client::Client;
use nexus_tests::daemon::signal;
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::world::{World, process, refused, soon};

/// The size of a file that takes a while, in bytes.
const BIG: u64 = 1 << 30;

/// A world whose clients may copy from and to `host`; the machines' files are in `vm` there.
struct Copies {
    world: World,
    host: TempDir,
}

impl Copies {
    fn new() -> Self {
        let host = tempfile::Builder::new().prefix("nexus-copies-").tempdir().expect("a directory");
        for name in ["allowed", "vm", "outside"] {
            fs::create_dir(host.path().join(name)).expect("a directory");
        }
        let allowed = host.path().join("allowed");
        let world = World::with(&[("NEXUS_COPY_ROOTS", allowed.to_str().expect("UTF-8"))]);
        Self { world, host }
    }

    fn at(&self, path: &str) -> String {
        self.host.path().join(path).to_str().expect("UTF-8").to_owned()
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.host.path().join(path);
        fs::create_dir_all(path.parent().expect("it is below the directory")).expect("directories");
        fs::write(path, text).expect("a file");
    }
}

/// Every file below a directory, with its mode and content.
fn contents(root: &Path) -> Vec<(String, u32, Vec<u8>)> {
    fn add(root: &Path, at: &Path, all: &mut Vec<(String, u32, Vec<u8>)>) {
        for entry in fs::read_dir(at).expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = format!("{:?}", path.strip_prefix(root).expect("it is below"));
            let meta = fs::symlink_metadata(&path).expect("its facts");
            if meta.is_dir() {
                if !name.starts_with("\".git\"") {
                    add(root, &path, all);
                }
            } else if meta.is_symlink() {
                let target = fs::read_link(&path).expect("its target");
                all.push((name, 0, target.as_os_str().as_bytes().to_vec()));
            } else {
                all.push((name, meta.permissions().mode() & 0o111, fs::read(&path).expect("its content")));
            }
        }
    }
    let mut all = Vec::new();
    add(root, root, &mut all);
    all.sort();
    all
}

fn git(directory: &Path, arguments: &[&str]) {
    let mut git = Command::new("git");
    git.args(["-c", "safe.directory=*"]).args(arguments).current_dir(directory);
    let output = git.output().expect("git runs");
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The content of a text-first result.
fn content(result: &Value) -> &str {
    let blocks = result["content"].as_array().expect("blocks");
    let content = blocks.iter().find(|block| block["_meta"]["dev.nexus/stream"] == "content");
    content.map_or("", |block| block["text"].as_str().expect("text"))
}

#[test]
fn a_repository_goes_in_and_what_changed_comes_back_as_a_patch() {
    let copies = Copies::new();
    let mut client = copies.world.client();
    copies.world.create(&mut client, "work-1");
    let repo = copies.host.path().join("allowed/repo");
    for (path, text) in [
        ("src/main.rs", "fn main() {\n    println!(\"one\");\n}\n"),
        ("src/with space.txt", "a\nb\nc\n"),
        ("run.sh", "#!/bin/sh\necho hi\n"),
        ("gone.txt", "to be deleted\n"),
        ("no-newline", "last line without its end"),
        ("becomes-a-link", "text\n"),
        ("latin1.txt", "plain\n"),
        (".gitignore", "/target\n*.log\n"),
        ("target/debug/big", "not wanted"),
        ("note.log", "not wanted"),
    ] {
        copies.write(&format!("allowed/repo/{path}"), text);
    }
    copies.write("allowed/repo/picture.bin", [0, 1, 2, 3]);
    fs::write(repo.join(OsStr::from_bytes(b"every\x01\xff\"\\name\n")), "odd\n").expect("a file");
    fs::write(repo.join("latin1.txt"), b"gr\xfc\xdfe\n").expect("a file");
    git(&repo, &["init", "-q"]);

    let (from, to) = (copies.at("allowed/repo"), copies.at("vm/srv/repo"));
    let plan = client.must(
        "guest_copy_in",
        json!({ "vm": "work-1", "from": from, "to": to, "gitignore": true, "dry_run": true }),
    );
    assert_eq!(plan["plan"]["skipped"]["ignored"], 2, "{plan}");
    assert!(!Path::new(&to).exists());
    let done = client.must(
        "guest_copy_in",
        json!({ "vm": "work-1", "from": from, "to": to, "gitignore": true, "wait_s": 45 }),
    );
    assert_eq!((&done["done"], &done["result"]["tracked"]), (&json!(true), &json!(true)), "{done}");
    assert_eq!(done["result"]["files"], plan["plan"]["files"], "{done}");
    let vm = Path::new(&to);
    assert!(vm.join(".git/HEAD").exists() && !vm.join("target").exists() && !vm.join("note.log").exists());
    let nothing = client.call_whole("guest_export", json!({ "vm": "work-1", "path": to })).expect("a patch");
    assert_eq!(content(&nothing), "");

    // What an agent does there.
    fs::write(vm.join("src/main.rs"), "fn main() {\n    println!(\"two\");\n    println!(\"three\");\n}\n")
        .expect("a file");
    fs::write(vm.join("src/with space.txt"), "a\nb\nc\nd\n").expect("a file");
    fs::set_permissions(vm.join("run.sh"), PermissionsExt::from_mode(0o755)).expect("a mode");
    fs::remove_file(vm.join("gone.txt")).expect("it is gone");
    fs::write(vm.join("no-newline"), "now with its end\n").expect("a file");
    fs::remove_file(vm.join("becomes-a-link")).expect("it is gone");
    symlink("run.sh", vm.join("becomes-a-link")).expect("a link");
    fs::write(vm.join(OsStr::from_bytes(b"every\x01\xff\"\\name\n")), "odd\nand more\n").expect("a file");
    fs::create_dir(vm.join("new")).expect("a directory");
    fs::write(vm.join("new/file"), "new\n").expect("a file");
    fs::write(vm.join("new/empty"), "").expect("a file");
    fs::write(vm.join("ignored.log"), "not wanted").expect("a file");
    fs::write(vm.join("picture.bin"), [0, 9]).expect("a file");
    let patch = client.call_whole("guest_export", json!({ "vm": "work-1", "path": to })).expect("a patch");
    let facts = &patch["_meta"]["dev.nexus/result"];
    assert_eq!((&facts["whole"], &facts["files"]), (&json!(true), &json!(9)), "{patch}");
    assert_eq!(facts["not_in_patch"][0]["path"], "picture.bin", "{facts}");
    assert_eq!(facts["not_in_patch_count"], 1, "{facts}");
    assert!(!content(&patch).contains("not wanted"), "{patch}");

    copies.write("allowed/work.patch", content(&patch));
    git(&repo, &["apply", "--check", "../work.patch"]);
    git(&repo, &["apply", "../work.patch"]);
    let wanted = |root: &Path| -> Vec<_> {
        let all = contents(root).into_iter();
        all.filter(|(name, ..)| {
            !name.ends_with(".log\"") && !name.contains("target") && !name.contains("picture")
        })
        .collect()
    };
    assert_eq!(wanted(&repo), wanted(vm));

    // If the patch contains text that is not UTF-8, only the file has all of it.
    fs::write(vm.join("latin1.txt"), b"gr\xfc\xdfe!\n").expect("a file");
    let patch = client.call_whole("guest_export", json!({ "vm": "work-1", "path": to })).expect("a patch");
    let file = patch["_meta"]["dev.nexus/result"]["patch_file"].as_str().expect("a file").to_owned();
    assert!(Path::new(&file).is_absolute() && Path::new(&file).is_file(), "{file}");
    let patch = client
        .call_whole("guest_export", json!({ "vm": "work-1", "path": to, "to": copies.at("vm/whole.patch") }))
        .expect("a patch");
    let facts = &patch["_meta"]["dev.nexus/result"];
    assert_eq!(facts["whole"], false, "{facts}");
    let file = facts["patch_file"].as_str().expect("a file").to_owned();
    let out = copies.at("allowed/second.patch");
    client.must("guest_copy_out", json!({ "vm": "work-1", "from": file, "to": out, "wait_s": 45 }));
    assert!(
        fs::read(&out).expect("it is there").ends_with(b"-gr\xfc\xdfe\n+gr\xfc\xdfe!\n") || {
            // It is followed in the patch by the others, which the repository already has.
            fs::read(&out).expect("it is there").windows(7).any(|part| part == b"+gr\xfc\xdfe!")
        }
    );
    let failure = refused(&mut client, "guest_export", json!({ "vm": "work-1", "path": copies.at("vm") }));
    assert_eq!(failure.code, "file_not_found", "{}", failure.text);
    copies.world.assert_in_order();
}

#[test]
fn nothing_is_copied_from_or_to_places_that_are_not_allowed() {
    let copies = Copies::new();
    let mut client = copies.world.client();
    copies.world.create(&mut client, "work-1");
    copies.write("outside/secret", "mine");
    copies.write("vm/result", "theirs");
    symlink("../outside", copies.host.path().join("allowed/up")).expect("a link");
    let (inside, result) = (copies.at("vm/x"), copies.at("vm/result"));
    for from in [copies.at("outside/secret"), copies.at("allowed/up/secret"), copies.at("allowed/up/")] {
        let failure =
            refused(&mut client, "guest_copy_in", json!({ "vm": "work-1", "from": from, "to": inside }));
        assert_eq!(failure.code, "forbidden", "{}", failure.text);
    }
    for to in [copies.at("outside/new"), copies.at("allowed/up/new")] {
        let arguments = json!({ "vm": "work-1", "from": result, "to": to, "overwrite": true, "wait_s": 45 });
        let failure = refused(&mut client, "guest_copy_out", arguments);
        assert_eq!(failure.code, "forbidden", "{}", failure.text);
    }
    for (from, code) in [("../x", "invalid_argument"), ("no-such-file", "file_not_found")] {
        let failure =
            refused(&mut client, "guest_copy_in", json!({ "vm": "work-1", "from": from, "to": inside }));
        assert_eq!(failure.code, code, "{}", failure.text);
    }
    assert_eq!(fs::read_dir(copies.host.path().join("outside")).expect("a directory").count(), 1);
    assert!(!Path::new(&inside).exists());

    // A client's own folder always exists.
    let scratch =
        client.must("system_info", json!({}))["copy"]["scratch"].as_str().expect("a path").to_owned();
    assert_eq!(fs::metadata(&scratch).expect("it is made").permissions().mode() & 0o777, 0o700);
    let out = json!({ "vm": "work-1", "from": result, "to": "a/b", "wait_s": 45 });
    client.must("guest_copy_out", out.clone());
    assert_eq!(fs::read(Path::new(&scratch).join("a/b")).expect("it is there"), b"theirs");
    let failure = refused(&mut client, "guest_copy_out", out);
    assert!(failure.text.contains("overwrite: true"), "{}", failure.text);
    client.must(
        "guest_copy_in",
        json!({ "vm": "work-1", "from": "a", "to": copies.at("vm/in/"), "wait_s": 45 }),
    );
    assert_eq!(fs::read(copies.at("vm/in/a/b")).expect("it is there"), b"theirs");
    let again =
        json!({ "vm": "work-1", "from": "a", "to": copies.at("vm/in/"), "overwrite": false, "wait_s": 45 });
    assert_eq!(refused(&mut client, "guest_copy_in", again).code, "file_refused");

    // A token has the directories that it was given, and not what is beside them.
    copies.write("allowed/own/file", "for a token");
    copies.write("allowed/beside", "for others");
    let rights =
        json!({ "scopes": ["exec"], "vms": ["work-1"], "tools": "all", "roots": [copies.at("allowed/own")] });
    let made = client.must("token_create", rights);
    let secret = made["token"].as_str().expect("a secret");
    let mut agent = Client::connect_with(&copies.world.daemon.socket(), secret).expect("the holder connects");
    let copy = |from: &str, to: &str| json!({ "vm": "work-1", "from": copies.at(from), "to": copies.at(to), "wait_s": 45 });
    agent.must("guest_copy_in", copy("allowed/own/file", "vm/own"));
    assert_eq!(fs::read(copies.at("vm/own")).expect("it is there"), b"for a token");
    for from in ["allowed/beside", "allowed/own/../beside", "outside/secret"] {
        let failure = refused(&mut agent, "guest_copy_in", copy(from, "vm/x"));
        assert!(matches!(&*failure.code, "forbidden" | "invalid_argument"), "{from}: {}", failure.text);
    }
    assert_eq!(refused(&mut agent, "guest_copy_out", copy("vm/own", "allowed/new")).code, "forbidden");
    assert!(!Path::new(&copies.at("allowed/new")).exists() && !Path::new(&inside).exists());
    let beside = json!({ "scopes": ["exec"], "roots": [copies.at("allowed")] });
    assert_eq!(refused(&mut agent, "token_create", beside).code, "forbidden", "more than it has itself");
    copies.world.assert_in_order();
}

#[test]
fn a_token_copies_from_and_to_its_own_directories_only() {
    let copies = Copies::new();
    let socket = copies.world.daemon.socket();
    let mut owner = Client::connect_at(&socket, "/mcp?tools=all").expect("the owner connects");
    copies.world.create(&mut owner, "work-1");
    for name in ["mine", "theirs"] {
        copies.write(&format!("allowed/{name}/file"), name);
    }
    let token = |name: &str, roots: Value| json!({ "name": name, "scopes": ["read", "exec"], "all_vms": true, "tools": "all", "roots": roots });
    let failure = refused(&mut owner, "token_create", token("wide", json!([copies.at("outside")])));
    assert!(failure.text.contains("not in copy_roots of the configuration"), "{}", failure.text);
    let mut agent = |name: &str, roots: Value| {
        let made = owner.must("token_create", token(name, roots));
        let secret = made["token"].as_str().expect("a token");
        Client::connect_with(&socket, secret).expect("its holder connects")
    };
    let copy = |from: &str, to: &str| json!({ "vm": "work-1", "from": copies.at(from), "to": copies.at(to), "wait_s": 45 });

    let mut mine = agent("mine", json!([copies.at("allowed/mine")]));
    assert_eq!(mine.must("system_info", json!({}))["copy"]["roots"], json!([copies.at("allowed/mine")]));
    mine.must("guest_copy_in", copy("allowed/mine/file", "vm/in"));
    assert_eq!(fs::read(copies.at("vm/in")).expect("it is there"), b"mine");
    mine.must("guest_copy_out", copy("vm/in", "allowed/mine/out"));
    assert_eq!(fs::read(copies.at("allowed/mine/out")).expect("it is there"), b"mine");
    // One without directories has its own folder, and no other token's.
    let mut none = agent("none", json!([]));
    let info = none.must("system_info", json!({}))["copy"].take();
    assert_eq!(info["roots"], json!([]), "{info}");
    let others = mine.must("system_info", json!({}))["copy"]["scratch"].take();
    assert_ne!(info["scratch"], others);
    for (client, place) in [(&mut mine, "allowed/theirs"), (&mut none, "allowed/mine")] {
        let failure = refused(client, "guest_copy_in", copy(&format!("{place}/file"), "vm/new"));
        assert_eq!(failure.code, "forbidden", "{}", failure.text);
        let failure = refused(client, "guest_copy_out", copy("vm/in", &format!("{place}/new")));
        assert_eq!(failure.code, "forbidden", "{}", failure.text);
    }
    let into = json!({ "vm": "work-1", "from": copies.at("vm/in"), "to": others, "wait_s": 45 });
    assert_eq!(refused(&mut none, "guest_copy_out", into).code, "forbidden");
    assert!(!Path::new(&copies.at("vm/new")).exists() && !Path::new(&copies.at("allowed/mine/new")).exists());
    copies.world.assert_in_order();
}

#[test]
fn a_copy_has_the_owner_that_is_asked_for_and_leaves_out_what_is_named() {
    let copies = Copies::new();
    let mut client = copies.world.client();
    copies.world.create(&mut client, "work-1");
    for name in ["file", "left.o", "deep/also.o", "deep/kept"] {
        copies.write(&format!("allowed/tree/{name}"), name);
    }
    chown(copies.at("allowed/tree/file"), Some(1234), Some(2345)).expect("another owner");
    // Not the owner of the directory that the copies are put in.
    chown(copies.at("vm"), Some(54321), Some(7)).expect("another owner");
    fs::set_permissions(copies.host.path(), PermissionsExt::from_mode(0o755)).expect("a mode");
    let copy = |to: &str, name: &str, value: Value| {
        let (from, to) = (copies.at("allowed/tree"), copies.at(to));
        let mut arguments =
            json!({ "vm": "work-1", "from": from, "to": to, "exclude": ["*.o"], "wait_s": 45 });
        arguments[name] = value;
        arguments
    };
    for (to, name, value, owner) in [
        ("vm/default", "overwrite", json!(true), (54321, 7)),
        ("vm/theirs", "user", json!("54321:7"), (54321, 7)),
        ("vm/roots", "user", json!("root"), (0, 0)),
        ("vm/same", "same_owner", json!(true), (1234, 2345)),
    ] {
        let done = client.must("guest_copy_in", copy(to, name, value));
        assert_eq!(done["result"]["skipped"]["excluded"], 2, "{done}");
        let meta = fs::metadata(copies.at(&format!("{to}/file"))).expect("it is there");
        assert_eq!((meta.uid(), meta.gid()), owner, "{to}");
        let deep = fs::read_dir(copies.at(&format!("{to}/deep"))).expect("a directory").count();
        assert_eq!((deep, Path::new(&copies.at(&format!("{to}/left.o"))).exists()), (1, false), "{to}");
    }
    // With the rights of that user.
    let failure = refused(&mut client, "guest_copy_in", copy("vm/no", "user", json!("54322")));
    assert!(failure.code == "file_refused" && failure.text.contains("ermission denied"), "{}", failure.text);
    copies.world.assert_in_order();
}

#[test]
fn a_copy_that_breaks_off_leaves_whole_files() {
    let mut copies = Copies::new();
    let mut client = copies.world.client();
    let vm = copies.world.create(&mut client, "work-1");
    for number in 0..40 {
        copies.write(&format!("allowed/tree/{number:02}"), vec![number; 300_000]);
    }
    // Large enough to take a while; the source's disk need not store the zeros.
    let big = copies.host.path().join("allowed/tree/zz-big");
    let file = fs::File::create(&big).expect("a file");
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BIG).expect("room on the disk");
    let guest = process(&vm, "pid");
    let (from, to) = (copies.at("allowed/tree"), copies.at("vm/tree"));
    // A copy that is stopped in the middle of the large file.
    let begin_with = |client: &mut Client, guest: u32| {
        let begun =
            client.must("guest_copy_in", json!({ "vm": "work-1", "from": from, "to": to, "wait_s": 0 }));
        soon("the large file", || {
            let op = client.must("op_get", json!({ "op_id": begun["op_id"], "wait_s": 0 }));
            assert_eq!(op["done"], false, "{op}");
            (op["progress"]["done"].as_u64() > Some(20 << 20)).then_some(())
        });
        signal(guest, Signal::STOP);
        begun["op_id"].clone()
    };
    let begin = |client: &mut Client| begin_with(client, guest);
    // The small files are complete, and nothing of the large one is left.
    let is_whole = || {
        let entries = fs::read_dir(&to).expect("the tree");
        let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
        let mut names: Vec<String> = names.collect();
        names.sort();
        let expected: Vec<String> = (0..40).map(|number| format!("{number:02}")).collect();
        names == expected
            && (0..40).all(|number| {
                fs::read(format!("{to}/{number:02}")).is_ok_and(|content| content == vec![number; 300_000])
            })
    };
    // The copy is cancelled.
    let op = begin(&mut client);
    client.must("op_cancel", json!({ "op_id": op }));
    signal(guest, Signal::CONT);
    let ended = client.must("op_get", json!({ "op_id": op, "wait_s": 45 }));
    assert_eq!(ended["state"], "cancelled", "{ended}");
    soon("whole files only", || is_whole().then_some(()));
    // The VM is stopped during the copy.
    let op = begin(&mut client);
    client.must("vm_stop", json!({ "vm": "work-1", "force": true, "wait_s": 45 }));
    let ended = client.must("op_get", json!({ "op_id": op, "wait_s": 45 }));
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&json!("failed"), &json!("guest_unreachable")),
        "{ended}"
    );
    client.must("vm_start", json!({ "vm": "work-1", "wait_s": 45 }));
    // The daemon is killed during the copy.
    let vm = client.inspect("work-1");
    let guest = process(&vm, "pid");
    let op = begin_with(&mut client, guest);
    copies.world.daemon.kill();
    signal(guest, Signal::CONT);
    copies.world.daemon.restart();
    let mut client = copies.world.client();
    let ended = client.must("op_get", json!({ "op_id": op, "wait_s": 45 }));
    assert_eq!(ended["state"], "failed", "{ended}");
    soon("whole files only", || is_whole().then_some(()));
    // Another copy works as if nothing had happened.
    fs::remove_file(&big).expect("it is gone");
    let done = client.must("guest_copy_in", json!({ "vm": "work-1", "from": from, "to": to, "wait_s": 45 }));
    assert_eq!(done["result"]["files"], 40, "{done}");
    assert_eq!(fs::read(copies.at("vm/tree/39")).expect("it is there"), vec![39; 300_000]);
    // The client goes away during the copy, which goes on.
    let newest = |client: &mut Client| client.must("op_list", json!({ "limit": 1 }))["ops"][0].take();
    let before = newest(&mut client);
    let mut hasty = copies.world.client();
    let later = json!({ "vm": "work-1", "from": from, "to": copies.at("vm/later"), "wait_s": 45 });
    hasty.start("tools/call", &json!({ "name": "guest_copy_in", "arguments": later })).expect("it is sent");
    soon("the copy begins", || (newest(&mut client) != before).then_some(()));
    drop(hasty);
    soon("the copy ends", || (newest(&mut client)["state"] == "succeeded").then_some(()));
    assert_eq!(fs::read_dir(copies.at("vm/later")).expect("it is there").count(), 40);
    copies.world.assert_in_order();
}

/// A small in-memory filesystem; unmounted when dropped.
pub(crate) struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    pub(crate) fn mount(place: &Path) -> Self {
        fs::create_dir_all(place).expect("a directory");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(place).status();
        assert!(mounted.expect("mount runs").success(), "mounting takes root");
        Self(place.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A directory that is still mounted shows up when it is removed.
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_on_either_side_is_told_and_what_came_is_whole() {
    let copies = Copies::new();
    let mut client = copies.world.client();
    copies.world.create(&mut client, "work-1");
    for number in 0..40 {
        copies.write(&format!("allowed/tree/{number:02}"), vec![number; 300_000]);
    }
    let _disks = ["vm/small", "allowed/small"].map(|place| SmallDisk::mount(&copies.host.path().join(place)));
    let (tree, small) = (copies.at("allowed/tree"), copies.at("vm/small/tree"));
    let arguments = json!({ "vm": "work-1", "from": tree, "to": small, "wait_s": 45 });
    let failure = refused(&mut client, "guest_copy_in", arguments);
    assert_eq!(failure.code, "disk_full", "{}", failure.text);
    assert!(failure.text.contains("entries were copied completely"), "{}", failure.text);
    let mut came = 0;
    for entry in fs::read_dir(&small).expect("the tree") {
        let entry = entry.expect("an entry");
        let number: u8 = entry.file_name().to_str().expect("UTF-8").parse().expect("a file of the tree");
        assert_eq!(fs::read(entry.path()).expect("its content"), vec![number; 300_000]);
        came += 1;
    }
    assert!((1..40).contains(&came), "{came}");
    // After an incomplete copy there is nothing to compare with.
    let failure = refused(&mut client, "guest_export", json!({ "vm": "work-1", "path": small }));
    assert_eq!(failure.code, "file_not_found", "{}", failure.text);
    // On the host, some of the disk must stay free.
    let arguments =
        json!({ "vm": "work-1", "from": tree, "to": copies.at("allowed/small/tree"), "wait_s": 45 });
    let failure = refused(&mut client, "guest_copy_out", arguments);
    assert_eq!(failure.code, "disk_full", "{}", failure.text);
    copies.world.assert_in_order();
}
