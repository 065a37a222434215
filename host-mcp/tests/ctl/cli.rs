//! Commands that end after a call or two.

use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::fake::{Caller, Fake, Tool, World, fails, finish, gives};

fn vm(name: &str, state: &str) -> Value {
    json!({ "id": "bbbbbbbbbbbbe", "name": name, "state": state, "image": "busybox", "vcpus": 1, "memory": "512MiB",
        "created_at": "2026-01-02T03:04:05Z", "protected": false, "tags": {} })
}

/// A tool whose result is a text with facts.
fn writes(text: &'static str, facts: Value) -> Tool {
    Box::new(move |_: &Value, _: &Caller| {
        let content = json!({ "type": "text", "text": text, "_meta": { "dev.nexus/stream": "content" } });
        Some(json!({ "_meta": { "dev.nexus/result": facts }, "content": [content] }))
    })
}

#[test]
fn a_daemon_that_is_down_is_told_with_what_to_do() {
    let world = World::new();
    let run = world.run("vm list");
    assert_eq!(run.code, 6);
    assert_eq!(run.text(), "");
    assert!(run.stderr.starts_with("error: no daemon is listening on"), "{}", run.stderr);
    assert!(run.stderr.contains("\nhint: start it with `nexusd &`"), "{}", run.stderr);

    let run = world.run("vm list --json");
    let error: Value = serde_json::from_str(&run.stderr).unwrap();
    assert_eq!((run.code, &error["error"]["code"]), (6, &json!("daemon_down")));
}

#[test]
fn lists_are_plain_in_pipes_and_complete() {
    let world = World::new();
    let pages = Box::new(|arguments: &Value, _: &crate::fake::Caller| {
        let page = match arguments["cursor"].as_str() {
            None => json!({ "vms": [vm("a", "ready"), vm("b", "stopped")], "next_cursor": "2" }),
            Some(_) => json!({ "vms": [vm("c", "failed")] }),
        };
        Some(crate::fake::structured(&page))
    });
    let fake = Fake::start(&world.runtime(), [("vm_list", pages)]);
    let run = world.run("ls --tag team=a --state ready");
    assert_eq!(run.code, 0, "{run:?}");
    let lines: Vec<_> = run.text().lines().collect();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    assert!(lines[0].starts_with("NAME  ID             STATE    IMAGE"), "{lines:#?}");
    assert!(lines[3].starts_with("c     bbbbbbbbbbbbe  failed   busybox"), "{lines:#?}");
    assert!(!run.text().contains(['\t', '\u{1b}']), "{lines:#?}");
    assert_eq!(
        fake.calls("vm_list"),
        [
            json!({ "limit": 500, "state": "ready", "tags": { "team": "a" } }),
            json!({ "limit": 500, "state": "ready", "tags": { "team": "a" }, "cursor": "2" }),
        ]
    );

    let all = world.run("vm list --json").json();
    assert_eq!(all["vms"].as_array().unwrap().len(), 3);
    assert_eq!(all.get("next_cursor"), None);
    let some = world.run("vm list --json --limit 2").json();
    assert_eq!((some["vms"].as_array().unwrap().len(), &some["next_cursor"]), (2, &json!("2")));
    assert_eq!(world.run("vm list -q").text(), "bbbbbbbbbbbbe\nbbbbbbbbbbbbe\nbbbbbbbbbbbbe\n");
}

#[test]
fn what_there_is_not_is_said_and_no_heading_is_shown() {
    let world = World::new();
    let none = |key: &str| gives(json!({ key: [] }));
    let verified = json!({ "op_id": "bbbbbbbbbbbbe", "done": true, "state": "succeeded",
        "progress": { "step": "" }, "result": { "ok": true, "assets": [] } });
    let _fake = Fake::start(
        &world.runtime(),
        [
            ("vm_list", none("vms")),
            ("asset_list", none("assets")),
            ("asset_verify", gives(verified)),
            ("drive_list", none("drives")),
            ("build_list", none("builds")),
            ("template_list", none("templates")),
            ("image_list", none("images")),
            ("op_list", none("ops")),
            ("settings_history", none("changes")),
            ("network_log", gives(json!({ "connections": [], "cursor": "0" }))),
            ("vm_delete", gives(json!({ "done": true, "deleted": [], "failed": [] }))),
            ("vm_logs", writes("", json!({ "cursor": "0", "lost_bytes": 0 }))),
            ("build_logs", writes("", json!({ "cursor": "0", "status": "success" }))),
        ],
    );
    for (words, key, said) in [
        ("vm list", "vms", "no VMs; create one with `nexusctl vm create`\n"),
        ("vm list --state ready", "vms", "no matching VMs\n"),
        ("asset list --installed", "assets", "no asset is installed\n"),
        ("kernel installed", "assets", "no kernel is installed\n"),
        ("firecracker list", "assets", "no vmm is installed or available\n"),
        ("drive list", "drives", "no drives; create one with `nexusctl drive create`\n"),
        ("drive list --free", "drives", "no detached drives\n"),
        ("drive list --vm web", "drives", "this VM has no drives\n"),
        ("build list", "builds", "no builds; start one with `nexusctl build start TEMPLATE`\n"),
        ("template list", "templates", "no templates; create one with `nexusctl template create`\n"),
        ("image list", "images", "no images; create one with `nexusctl image create`\n"),
        ("op list", "ops", "no operations\n"),
        ("settings history", "changes", "no changes yet: all settings have their built-in values\n"),
    ] {
        let run = world.run(words);
        assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "", said), "{words}");
        let run = world.run(&format!("{words} -q"));
        assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "", ""), "{words} -q");
        assert_eq!(world.run(&format!("{words} --json")).json(), json!({ key: [] }), "{words} --json");
    }
    for (words, said) in [
        ("network log web-1", "no connections are logged\n"),
        ("rm --tag a=b", "no VM has all of these labels\n"),
    ] {
        let run = world.run(words);
        assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "", said), "{words}");
        let run = world.run(&format!("{words} --json"));
        assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "[]\n", ""), "{words} --json");
        let run = world.run(&format!("{words} -q"));
        assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "", ""), "{words} -q");
    }
    for words in ["vm logs web-1", "build logs web"] {
        let run = world.run(words);
        assert_eq!((run.code, run.text()), (0, ""), "{words}");
        assert!(run.stderr.starts_with("nothing was written to the "), "{words}: {}", run.stderr);
        assert_eq!(world.run(&format!("{words} --json")).json()["text"], "", "{words} --json");
    }
    for (words, said) in [
        ("asset verify", "nothing to verify: no asset is installed\n"),
        ("rootfs verify", "nothing to verify: no rootfs is installed\n"),
    ] {
        let run = world.run(words);
        assert_eq!((run.code, run.text(), run.stderr.as_str()), (0, "", said), "{words}");
        assert_eq!(world.run(&format!("{words} --json")).json()["result"]["assets"], json!([]), "{words}");
    }
}

#[test]
fn json_is_the_structured_result_as_it_came() {
    let world = World::new();
    let result = json!({ "vms": [], "something_new": { "z": 1, "a": [1.5] } });
    let _fake = Fake::start(&world.runtime(), [("vm_list", gives(result.clone()))]);
    assert_eq!(world.run("vm list --json").text(), format!("{result}\n"));
    assert_eq!(world.run("call vm_list").text(), format!("{result}\n"));
    let whole = world.run("call vm_list --json").json();
    assert_eq!(whole["structuredContent"], result);
}

#[test]
fn errors_have_text_hint_and_a_code_by_kind() {
    for (code, exit) in [
        ("vm_not_found", 3),
        ("vm_not_running", 4),
        ("boot_failed", 1),
        ("timeout", 5),
        ("busy", 6),
        ("invalid_argument", 2),
        ("forbidden", 77),
        ("internal", 70),
    ] {
        let world = World::new();
        let _fake =
            Fake::start(&world.runtime(), [("vm_inspect", fails(code, "web-1 is odd", "look at it"))]);
        let run = world.run("vm inspect web-1");
        assert_eq!(run.stderr, "error: web-1 is odd\nhint: look at it\n");
        assert_eq!((run.code, run.text()), (exit, ""), "{code}");
    }
}

#[test]
fn several_vms_are_deleted_and_the_first_failure_decides() {
    let world = World::new();
    let delete =
        Box::new(|arguments: &Value, caller: &crate::fake::Caller| match arguments["vm"].as_str().unwrap() {
            "bad" => fails("vm_protected", "bad is protected", "take the protection away")(arguments, caller),
            name => Some(crate::fake::structured(
                &json!({ "done": true, "deleted": [{ "id": "bbbbbbbbbbbbe", "name": name, "drives": [] }] }),
            )),
        });
    let _fake = Fake::start(&world.runtime(), [("vm_delete", delete)]);
    insta::assert_snapshot!(world.run("rm a bad c").shown(), @"
    exit 4
    --- stdout
    a deleted
    c deleted
    --- stderr
    error: bad is protected
    hint: take the protection away
    ");
}

#[test]
fn files_of_ones_own_are_given_by_their_paths() {
    let world = World::new();
    let tools = ["vm_create", "image_create", "drive_create"];
    let fake = Fake::start(&world.runtime(), tools.map(|tool| (tool, fails("busy", "not now", "later"))));
    let here = std::env::current_dir().unwrap();
    let path = |name: &str| format!("file:{}", here.join(name).display());
    for (line, tool, expected) in [
        ("vm create --kernel ./vmlinux --rootfs root", "vm_create", json!([path("vmlinux"), path("root")])),
        ("vm create --kernel fast --from file:a.tar", "vm_create", json!(["fast", path("a.tar")])),
        ("image create ../b.ext4", "image_create", json!([null, path("../b.ext4")])),
        ("drive create --from debian", "drive_create", json!([null, "debian"])),
    ] {
        assert_eq!(world.run(line).code, 6, "{line}");
        let call = fake.calls(tool).pop().unwrap();
        assert_eq!(json!([call["kernel"], call["from"]]), expected, "{line}");
    }
    assert_eq!(world.run("vm create --rootfs a --from b").code, 2);
}

#[test]
fn several_drives_and_images_are_deleted_like_vms() {
    let world = World::new();
    let delete = |key: &'static str| {
        Box::new(move |arguments: &Value, caller: &crate::fake::Caller| {
            match arguments[key].as_str().unwrap() {
                "bad" => fails("in_use", "bad is in use", "leave it alone")(arguments, caller),
                name => {
                    let gone = json!({ "id": "bbbbbbbbbbbbe", "name": name, "freed_bytes": 1024 });
                    Some(crate::fake::structured(&gone))
                }
            }
        })
    };
    let _fake =
        Fake::start(&world.runtime(), [("drive_delete", delete("drive")), ("image_delete", delete("image"))]);
    for (words, freed) in [("drive rm a bad c", ""), ("image rm a bad c", " (1 KiB)")] {
        let run = world.run(words);
        assert_eq!(
            (run.code, run.text()),
            (4, format!("a deleted{freed}\nc deleted{freed}\n").as_str()),
            "{words}"
        );
        assert_eq!(run.stderr, "error: bad is in use\nhint: leave it alone\n", "{words}");
    }
}

#[test]
fn raw_calls_take_arguments_from_stdin() {
    let world = World::new();
    let fake = Fake::start(&world.runtime(), [("vm_inspect", gives(json!({ "x": 1 })))]);
    assert_eq!(world.run_with("call vm_inspect -", b"{\"vm\":\"a\"}").json(), json!({ "x": 1 }));
    assert_eq!(fake.calls("vm_inspect"), [json!({ "vm": "a" })]);
    assert_eq!(world.run("call vm_inspect [1]").code, 2);
    let unknown = world.run("call no_such_tool");
    assert_eq!((unknown.code, unknown.stderr.as_str()), (2, "error: unknown tool\n"));
}

#[test]
fn files_are_read_and_written_in_pieces() {
    let world = World::new();
    let content: Vec<u8> = (0..1_300_000_u32).map(|i| (i % 251) as u8).collect();
    let served = content.clone();
    let read = Box::new(move |arguments: &Value, _: &crate::fake::Caller| {
        let offset = arguments["offset"].as_u64().unwrap() as usize;
        let end = (offset + arguments["limit"].as_u64().unwrap() as usize).min(served.len());
        let facts = json!({ "size_bytes": served.len(), "offset": offset, "read_bytes": end - offset,
            "eof": end == served.len(), "lossy": false });
        Some(json!({ "_meta": { "dev.nexus/result": facts }, "content": [
            { "type": "text", "text": "web-1 · /f" },
            { "type": "text", "text": BASE64.encode(&served[offset..end]), "_meta": { "dev.nexus/stream": "content" } },
        ]}))
    });
    let written = std::sync::Mutex::new(Vec::<u8>::new());
    let write = Box::new(move |arguments: &Value, _: &crate::fake::Caller| {
        let mut written = written.lock().unwrap();
        let piece = BASE64.decode(arguments["content"].as_str().unwrap().as_bytes()).unwrap();
        let created = arguments.get("append").is_none();
        if created {
            written.clear();
        }
        written.extend(&piece);
        Some(crate::fake::structured(&json!({ "path": arguments["path"], "written_bytes": piece.len(),
            "size_bytes": written.len(), "created": created })))
    });
    let fake = Fake::start(&world.runtime(), [("guest_file_read", read), ("guest_file_write", write)]);
    assert_eq!(world.run("guest read web-1 /f").stdout, content);
    assert_eq!(world.run("guest cat web-1 /f --offset 10 --limit 600000").stdout, content[10..600_010]);

    let large: Vec<u8> = content.iter().chain(&content).copied().collect();
    let run = world.run_with("guest write web-1 /g --mode 0600 --json", &large);
    assert_eq!((run.code, run.json()["size_bytes"].as_u64()), (0, Some(2_600_000)), "{run:?}");
    let calls = fake.calls("guest_file_write");
    assert_eq!(calls.len(), 2);
    assert_eq!((calls[0].get("append"), &calls[1]["append"]), (None, &json!(true)));
    let run = world.run("guest write web-1 /g --content hello");
    assert_eq!((run.text(), run.stderr.as_str()), ("", "created /g (5 B)\n"));
    assert_eq!(world.run_with("guest write web-1 /empty", b"").code, 0);
    assert_eq!(world.run("guest write web-1 /g /no/such/file").code, 3);
}

#[test]
fn the_console_is_followed() {
    let world = World::new();
    let logs = Box::new(|arguments: &Value, caller: &crate::fake::Caller| {
        let (text, cursor, lost) = match arguments["cursor"].as_str() {
            None => ("booting\n", "1", 0),
            Some("1") => ("ready\n", "2", 7),
            Some(_) => return fails("vm_not_found", "web-1 is gone", "")(arguments, caller),
        };
        let facts = json!({ "text": text, "cursor": cursor, "lost_bytes": lost });
        Some(json!({ "_meta": { "dev.nexus/result": facts }, "content": [{ "type": "text", "text": text }] }))
    });
    let fake = Fake::start(&world.runtime(), [("vm_logs", logs)]);
    assert_eq!(world.run("vm logs web-1").text(), "booting\n");
    let followed = world.run("vm logs -f web-1");
    assert_eq!((followed.code, followed.text()), (3, "booting\nready\n"));
    assert!(followed.stderr.contains("7 bytes were lost"), "{}", followed.stderr);
    assert_eq!(fake.calls("vm_logs")[2]["wait_s"], 20);
}

#[test]
fn what_follows_ends_with_its_reader() {
    let world = World::new();
    // Something at first, then nothing for ever.
    let once = |key: &'static str, first: Tool| -> Tool {
        Box::new(move |arguments: &Value, caller: &Caller| {
            let is_first = arguments.get(key).is_none_or(|value| *value == 0);
            if is_first { first(arguments, caller) } else { None }
        })
    };
    let connection = json!({ "at": "2026-01-02T03:04:05Z", "verdict": "denied", "protocol": "tcp", "host": "a.example", "port": 80 });
    let going = json!({ "done": false, "op_id": "ccccccccccccc", "state": "running", "progress": { "step": "booting" } });
    let tools = [
        ("vm_logs", once("wait_s", writes("booting\n", json!({ "cursor": "1", "lost_bytes": 0 })))),
        ("build_logs", once("cursor", writes("unpacking\n", json!({ "cursor": "1", "status": "building" })))),
        ("network_log", once("cursor", gives(json!({ "connections": [connection], "cursor": "1" })))),
        ("audit_list", once("after", gives(json!({ "calls": [], "last": 7 })))),
        ("op_get", once("wait_s", gives(going))),
    ];
    let fake = Fake::start(&world.runtime(), tools);
    for (line, tool) in [
        ("vm console web-1", "vm_logs"),
        ("logs -f web-1", "vm_logs"),
        ("build logs -f web", "build_logs"),
        ("network log -f web-1", "network_log"),
        ("audit -f", "audit_list"),
        ("op wait ccccccccccccc", "op_get"),
    ] {
        let before = fake.calls(tool).len();
        let mut command = world.command(line);
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The second call waits for what does not come.
        fake.wait(|messages| messages.iter().filter(|m| m["params"]["name"] == tool).count() >= before + 2);
        drop(child.stdout.take());
        let run = finish(child);
        assert_eq!(run.code, 141, "{line}: {run:?}");
        assert!(!run.stderr.contains("error"), "{line}: {}", run.stderr);
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let world = World::new();
    let vms: Vec<_> = (0..5000).map(|i| vm(&format!("vm-{i}"), "ready")).collect();
    let _fake = Fake::start(&world.runtime(), [("vm_list", gives(json!({ "vms": vms })))]);
    let mut child = world.command("vm list");
    let mut child =
        child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let run = crate::fake::finish(child);
    assert_eq!((run.code, run.stderr.as_str()), (141, ""));
}

#[test]
fn usage_is_told_before_anything_is_dialled() {
    let world = World::new();
    let run = world.run("vm create --memory much");
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("`much` is not a size"), "{}", run.stderr);
    assert_eq!(world.run("--help").code, 0);
    assert!(world.run("version").text().contains("nexusd is not running"));
}

#[test]
fn a_dry_run_shows_the_plan_and_follows_nothing() {
    let world = World::new();
    let plan = json!({ "plan": {
        "makes": "drive", "name": "copy", "download_bytes": 0, "free_bytes": 3_000_000_000_u64,
        "steps": [
            { "action": "use", "what": "drive", "name": "data", "size": "2GiB" },
            { "action": "clone", "what": "drive", "name": "copy", "size": "2GiB" },
        ],
    } });
    let fake = Fake::start(&world.runtime(), [("drive_create", gives(plan.clone()))]);
    let run = world.run("drive from-drive data copy --dry-run");
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.text().contains("clone  drive  copy"), "{}", run.text());
    assert!(run.text().contains("dry run: would create the drive copy"), "{}", run.text());
    assert_eq!(world.run("drive from-drive data copy -n --json").json(), plan);
    assert_eq!(world.run("drive from-drive data copy -n -q").text(), "");
    let asked = json!({ "name": "copy", "from": "drive:data", "dry_run": true, "wait_s": 0 });
    assert_eq!(fake.calls("drive_create"), [asked.clone(), asked.clone(), asked]);
    assert_eq!(fake.calls("op_get"), Vec::<Value>::new());
}
