//! `run_command` on a real process.

mod common;

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Instant;

use common::{Guest, PATIENCE, facts, header, processes_with, stream, until};
use serde_json::json;

#[test]
fn a_line_for_the_shell_and_words_without_one() {
    let guest = Guest::start();
    let mut client = guest.client();
    let result = client.good("run_command", json!({ "command": "echo out; echo err >&2; exit 3" }));
    assert!(header(&result).starts_with("web-1 · exit 3 · "), "{result}");
    assert!(header(&result).ends_with(" · 8 B"), "{result}");
    assert_eq!((stream(&result, "stdout"), stream(&result, "stderr")), ("out\n", "err\n"));
    assert_eq!(result["content"][2]["text"], "stderr:");
    assert!(result["structuredContent"].is_null());
    assert_eq!(facts(&result)["exit_code"], 3);
    assert_eq!(facts(&result)["timed_out"], false);
    assert_eq!(facts(&result)["stdout"], json!({ "total_bytes": 4, "omitted_bytes": 0, "lossy": false }));

    let result = client.good("run_command", json!({ "argv": ["printf", "%s|", "a b", "$HOME", "*"] }));
    assert_eq!(stream(&result, "stdout"), "a b|$HOME|*|");

    let result = client.good("run_command", json!({ "argv": ["true"] }));
    assert_eq!(result["content"].as_array().unwrap().len(), 1);
}

#[test]
fn environment_directory_and_input() {
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "echo $FROM_HOST $MINE $FROM_CALLER; pwd; cat; env | grep -c ^SECRET_OF_HOST= || true";
    let arguments = json!({
        "command": line, "cwd": "/usr", "stdin": "in\n", "env": { "MINE": "1", "FROM_CALLER": "a b" },
    });
    assert_eq!(stream(&client.good("run_command", arguments), "stdout"), "yes 1 a b\n/usr\nin\n0\n");
    let result = client
        .good("run_command", json!({ "argv": ["wc", "-c"], "stdin": "/wD+", "stdin_encoding": "base64" }));
    assert_eq!(stream(&result, "stdout").trim(), "3");
    // Without input there is none to wait for.
    assert_eq!(facts(&client.good("run_command", json!({ "argv": ["cat"] })))["exit_code"], 0);
    // Input that nobody reads, and output that nobody waits to be asked for.
    let big = "x".repeat(1 << 20);
    assert_eq!(facts(&client.good("run_command", json!({ "argv": ["true"], "stdin": big })))["exit_code"], 0);
    let result = client.good("run_command", json!({ "argv": ["cat"], "stdin": big }));
    assert_eq!(facts(&result)["stdout"]["total_bytes"], 1 << 20);
}

/// The agent has streams and programs' connections, and the holder has pipes: more than the usual limit. Commands do not get theirs.
#[test]
fn commands_get_the_limit_of_descriptors_that_the_guest_was_started_with() {
    let guest = Guest::start();
    let mut client = guest.client();
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let (now, most) = (limits.current.unwrap_or(u64::MAX), limits.maximum.unwrap_or(u64::MAX));
    let shown = |limit: u64| if limit == u64::MAX { "unlimited".to_owned() } else { limit.to_string() };
    let result = client.good("run_command", json!({ "command": "ulimit -Sn; ulimit -Hn" }));
    assert_eq!(stream(&result, "stdout"), format!("{}\n{}\n", shown(now), shown(most)));
    for process in [guest.process.id(), common::holder(&guest)] {
        let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let own = line.split_whitespace().next().unwrap();
        assert_eq!(own, shown(now.max(most.min(65_536))));
    }
}

#[test]
fn users_by_name_and_number() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "id -u; id -g; id -G; echo $HOME $USER";
    let result = client.good("run_command", json!({ "command": line, "user": "daemon", "cwd": "/" }));
    assert_eq!(stream(&result, "stdout"), "1\n1\n1\n/usr/sbin daemon\n");
    let result = client.good("run_command", json!({ "command": line, "user": "54321" }));
    assert_eq!(stream(&result, "stdout"), "54321\n54321\n54321\n/ 54321\n");
    assert_eq!(
        client.bad("run_command", json!({ "command": line, "user": "nobody-knows" })),
        "user_not_found"
    );
    for (user, ids) in
        [("54321:54322", "54321\n54322\n54322\n"), ("daemon:54322", "1\n54322\n54322\n"), ("image", "0\n0\n")]
    {
        let result =
            client.good("run_command", json!({ "command": "id -u; id -g; id -G", "user": user, "cwd": "/" }));
        assert!(stream(&result, "stdout").starts_with(ids), "{user}: {result}");
    }
}

/// The directory of a command is entered with the rights of its user.
#[test]
fn a_directory_is_entered_as_the_user() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start_configured(|_, configure| configure.image_user = Some("54321:54322".to_owned()));
    let mut client = guest.client();
    std::fs::set_permissions(guest.directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (own, closed) = (guest.path("own"), guest.path("closed"));
    for (path, owner) in [(&own, 54321), (&closed, 0)] {
        std::fs::create_dir(path).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(path, Some(owner), Some(owner)).unwrap();
    }
    let result =
        client.good("run_command", json!({ "command": "pwd; id -u; id -g", "user": "image", "cwd": own }));
    assert_eq!(stream(&result, "stdout"), format!("{own}\n54321\n54322\n"));
    for (cwd, errno, class) in [
        (closed.as_str(), "EACCES", "permission"),
        ("/no/such", "ENOENT", "not_found"),
        ("/etc/passwd", "ENOTDIR", "not_found"),
    ] {
        let result = client.call("run_command", json!({ "argv": ["true"], "user": "image", "cwd": cwd }));
        let error = &result["_meta"]["dev.nexus/error"];
        assert_eq!(
            (&error["code"], &error["errno"], &error["class"]),
            (&json!("cwd_not_found"), &json!(errno), &json!(class)),
            "{cwd}: {result}"
        );
        // What is there is not to be created.
        let says_so = error["hint"].as_str().is_some_and(|hint| hint.contains("may not enter it"));
        assert_eq!(says_so, errno == "EACCES", "{cwd}: {result}");
    }
    // What its user may not read is no standard input, and a log is its user's.
    let secret = guest.path("secret");
    std::fs::write(&secret, "x").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let as_user =
        |more: &str, path: &str| json!({ "argv": ["true"], "user": "image", "cwd": "/", more: path });
    assert_eq!(client.bad("run_command", as_user("stdin_path", &secret)), "file_refused");
    client.good("run_command", as_user("log", &format!("{own}/log")));
    assert_eq!(std::fs::metadata(format!("{own}/log")).unwrap().uid(), 54321);
}

#[test]
fn what_cannot_be_started_is_said() {
    let guest = Guest::start();
    let mut client = guest.client();
    let long_in_all = [vec!["true".to_owned()], vec!["x".repeat(100_000); 100]].concat();
    for (arguments, code) in [
        (json!({}), "invalid_argument"),
        (json!({ "command": "x", "argv": ["x"] }), "invalid_argument"),
        (json!({ "argv": [] }), "invalid_argument"),
        (json!({ "argv": [""] }), "invalid_argument"),
        (json!({ "argv": ["a\0b"] }), "invalid_argument"),
        (json!({ "command": "x", "unknown": 1 }), "invalid_argument"),
        (json!({ "command": "x", "checkpoint": true }), "invalid_argument"),
        (json!({ "command": ["x"] }), "invalid_argument"),
        (json!({ "command": "x", "yield_after_s": 45.5 }), "invalid_argument"),
        (json!({ "command": "x", "yield_after_s": -1 }), "invalid_argument"),
        (json!({ "command": "x", "kill_grace_s": 601 }), "invalid_argument"),
        (json!({ "command": "x", "keep_bytes": 16_777_217 }), "invalid_argument"),
        (json!({ "command": "x", "stdin_path": "relative" }), "invalid_argument"),
        (json!({ "command": "x", "stdin_path": "/etc/passwd", "stdin": "x" }), "invalid_argument"),
        (json!({ "command": "x", "stdin_path": "/no/such" }), "file_not_found"),
        (json!({ "command": "x", "stdin_path": "/etc" }), "file_refused"),
        (json!({ "command": "x", "stdin_path": "/dev/zero" }), "file_refused"),
        (json!({ "command": "x", "log": "relative" }), "invalid_argument"),
        (json!({ "command": "x", "log": "/no/such/log" }), "file_not_found"),
        (json!({ "command": "x", "log": "/dev/full" }), "file_refused"),
        (json!({ "command": "x", "timeout_s": -1 }), "invalid_argument"),
        (json!({ "command": "x", "cwd": "relative" }), "invalid_argument"),
        (json!({ "command": "x", "cwd": "/no/such" }), "cwd_not_found"),
        (json!({ "command": "x", "cwd": "/etc/passwd" }), "cwd_not_found"),
        (json!({ "command": "x", "env": { "A=B": "1" } }), "invalid_argument"),
        (json!({ "command": "x", "stdin": "!", "stdin_encoding": "base64" }), "invalid_argument"),
        (json!({ "command": "x", "stdin": "x".repeat(3 << 20) }), "too_large"),
        (json!({ "argv": ["no-such-program"] }), "program_not_found"),
        (json!({ "argv": ["/etc/passwd"] }), "program_not_executable"),
        (json!({ "argv": ["/etc"] }), "program_not_executable"),
        (json!({ "argv": ["echo", "x".repeat(131_072)] }), "too_large"),
        (json!({ "argv": long_in_all }), "too_large"),
        (json!({ "argv": ["true"], "env": { "LONG": "x".repeat(131_072) } }), "too_large"),
        (json!({ "command": "x".repeat((2 << 20) + 1) }), "too_large"),
    ] {
        let shown: String = arguments.to_string().chars().take(100).collect();
        assert_eq!(client.bad("run_command", arguments), code, "{shown}");
    }
    // The shell's own failure is a result.
    assert_eq!(facts(&client.good("run_command", json!({ "command": "no-such-program" })))["exit_code"], 127);
}

/// As `docker exec` does it: each of the two is the pipe that the caller reads.
#[test]
fn another_user_opens_its_standard_streams_by_name() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let guest = Guest::start();
    let line = "cat /dev/stdin; echo a > /dev/stdout; echo b > /dev/stderr";
    let arguments = json!({ "command": line, "user": "daemon", "cwd": "/", "stdin": "in\n" });
    let result = guest.client().good("run_command", arguments);
    assert_eq!((stream(&result, "stdout"), stream(&result, "stderr")), ("in\na\n", "b\n"), "{result}");
    // What is no pipe keeps its owner.
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/dev/null").unwrap());
    assert_eq!(owner, 0);
}

#[test]
fn a_line_that_is_too_long_for_an_argument_runs_all_the_same() {
    let guest = Guest::start();
    let mut client = guest.client();
    for length in [131_071, 131_072, 1 << 20] {
        let end = "'; echo ${#x}; id -u; exit 3";
        let line = format!("x='{}{end}", "a".repeat(length - end.len() - 3));
        assert_eq!(line.len(), length);
        for (user, uid) in [("root", "0"), ("daemon", "1")] {
            let result = client.good("run_command", json!({ "command": line, "user": user, "cwd": "/" }));
            assert_eq!(stream(&result, "stdout"), format!("{}\n{uid}\n", length - end.len() - 3), "{length}");
            assert_eq!(facts(&result)["exit_code"], 3);
        }
    }
    // Which argument is too long is said.
    let result = client.call("run_command", json!({ "argv": ["echo", "x".repeat(200_000)] }));
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("argv[1] has 200000 bytes") && text.contains("131071"), "{text}");
}

#[test]
fn the_working_directory_of_the_image_is_made() {
    let guest = Guest::start_configured(|root, configure| {
        let parent = root.join("srv");
        std::fs::create_dir(&parent).unwrap();
        std::os::unix::fs::chown(&parent, Some(54321), Some(54321)).unwrap();
        configure.working_dir = Some(parent.join("app/x").to_str().unwrap().to_owned());
    });
    let mut client = guest.client();
    let result = client.good("run_command", json!({ "command": "pwd; stat -c %u:%g . .." }));
    assert_eq!(stream(&result, "stdout"), format!("{}\n54321:54321\n54321:54321\n", guest.path("srv/app/x")));
    // What a call says comes first.
    assert_eq!(
        stream(&client.good("run_command", json!({ "argv": ["pwd"], "cwd": "/usr" })), "stdout"),
        "/usr\n"
    );

    // A relative one starts at the root.
    let guest =
        Guest::start_configured(|_, configure| configure.working_dir = Some("usr/lib/../share".to_owned()));
    let result = guest.client().good("run_command", json!({ "argv": ["pwd", "-P"] }));
    assert_eq!(stream(&result, "stdout"), "/usr/share\n");

    // One that cannot be made is no reason to run somewhere else.
    let guest =
        Guest::start_configured(|_, configure| configure.working_dir = Some("/etc/passwd/x".to_owned()));
    let mut client = guest.client();
    assert_eq!(client.bad("run_command", json!({ "argv": ["pwd"] })), "file_refused");
    client.good("run_command", json!({ "argv": ["pwd"], "cwd": "/" }));
}

/// The kernel of this machine is asked to kill, in a memory cgroup of the test's own.
#[test]
fn who_was_killed_for_want_of_memory_is_said() {
    let Some(group) = MemoryGroup::make(32 << 20) else {
        eprintln!(
            "SKIPPED: no memory cgroup can be made here (it takes root, and cgroups that are writable)"
        );
        return;
    };
    let guest = Guest::start();
    let mut client = guest.client();
    // The pipe hides it: the exit code is that of `wc`.
    let line = format!("(echo 0 > {}/cgroup.procs && exec tail /dev/zero) | wc -c", group.path.display());
    let result = client.good("run_command", json!({ "command": line }));
    assert_eq!(facts(&result)["exit_code"], 0, "{result}");
    let killed =
        facts(&result)["oom_killed"].as_array().unwrap_or_else(|| panic!("nothing is said: {result}"));
    assert!(killed[0].as_str().unwrap().starts_with("tail (pid "), "{result}");
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("ran out of memory") && text.contains("tail (pid "), "{text}");
    let result = client.good("run_command", json!({ "argv": ["true"] }));
    assert!(facts(&result)["oom_killed"].is_null(), "{result}");
}

/// A cgroup with little memory; either version.
struct MemoryGroup {
    path: std::path::PathBuf,
}

impl MemoryGroup {
    fn make(bytes: u64) -> Option<Self> {
        for (root, files) in [
            ("/sys/fs/cgroup/memory", &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"][..]),
            ("/sys/fs/cgroup", &["memory.max", "memory.swap.max"]),
        ] {
            let path = std::path::Path::new(root).join(format!("nexus-test-{}", std::process::id()));
            if std::fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Self { path };
            let limit = |file: &str| {
                let file = std::fs::File::options().write(true).open(group.path.join(file));
                file.and_then(|mut file| file.write_all(bytes.to_string().as_bytes()))
            };
            if limit(files[0]).is_ok() {
                // Only where swap is counted.
                let _ = limit(files[1]);
                return Some(group);
            }
        }
        None
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        until("its processes are gone", || std::fs::remove_dir(&self.path).is_ok());
    }
}

#[test]
fn signals_have_names() {
    let guest = Guest::start();
    let result = guest.client().good("run_command", json!({ "command": "kill -SEGV $$" }));
    assert!(header(&result).starts_with("web-1 · killed by SIGSEGV · "), "{result}");
    assert_eq!(facts(&result)["signal"], "SIGSEGV");
    assert!(facts(&result)["exit_code"].is_null());
}

#[test]
fn commands_begin_with_clean_signals() {
    let guest = Guest::start();
    let mut client = guest.client();
    let result = client.good("run_command", json!({ "argv": ["cat", "/proc/self/status"] }));
    let status = stream(&result, "stdout");
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        // Without the two that C libraries keep to themselves.
        u64::from_str_radix(line.trim(), 16).unwrap() & !(3 << 31)
    };
    assert_eq!((mask("SigBlk:"), mask("SigIgn:")), (0, 0), "{status}");
    let result = client.good("run_command", json!({ "command": "yes | head -1" }));
    assert_eq!((stream(&result, "stdout"), stream(&result, "stderr")), ("y\n", ""));
}

#[test]
fn when_its_time_is_up_all_that_it_started_is_killed() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.5", 60_000 + std::process::id());
    let line = format!(
        "sleep {mark} & (setsid sleep {mark} &) ; (setsid sh -c 'sleep {mark} & wait' &) ; trap '' TERM; echo said; sleep {mark}"
    );
    let begun = Instant::now();
    // Long enough for all of it to begin.
    let result = client.good("run_command", json!({ "command": line, "timeout_s": 6 }));
    assert!(begun.elapsed() < PATIENCE, "it does not wait for what it kills");
    assert!(header(&result).starts_with("web-1 · timed out after 6 s and was killed · "), "{result}");
    assert_eq!(stream(&result, "stdout"), "said\n");
    assert_eq!(facts(&result)["timed_out"], true);
    assert_eq!((&facts(&result)["signal"], &facts(&result)["status"]), (&json!("SIGKILL"), &json!(137)));
    until("all of it is gone", || processes_with(&mark) == 0);
}

#[test]
fn a_cancelled_call_is_killed_and_not_answered() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.75", 70_000 + std::process::id());
    let line = format!("sleep {mark} & (setsid sleep {mark} &); sleep {mark}");
    let id = client.begin_call("run_command", json!({ "command": line, "timeout_s": 600 }));
    until("it runs", || processes_with(&format!("sleep\0{mark}")) == 3);
    let params = json!({ "requestId": id, "reason": "changed my mind" });
    client.send(&json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": params }));
    until("all of it is gone", || processes_with(&mark) == 0);
    // The next answer is that of the next request.
    client.good("os_info", json!({}));
}

#[test]
fn a_process_in_the_background_does_not_keep_the_call_and_lives_on() {
    let guest = Guest::start();
    let mut client = guest.client();
    let mark = format!("{}.875", 80_000 + std::process::id());
    let begun = Instant::now();
    let result = client.good("run_command", json!({ "command": format!("sleep {mark} & echo started") }));
    assert!(begun.elapsed() < PATIENCE);
    assert_eq!(stream(&result, "stdout"), "started\n");
    let text = result["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("1 of its processes are still running in the background: sleep (pid "), "{text}");
    assert_eq!(facts(&result)["descendants"]["count"], 1, "{result}");
    until("it runs alone", || processes_with(&mark) == 1);
    // What it writes later is thrown away instead of ending it.
    let path = guest.path("done");
    let line = format!("(sleep 0.3; seq 1 200000; touch {path}) & echo started");
    client.good("run_command", json!({ "command": line }));
    until("it wrote all and went on", || std::path::Path::new(&path).exists());
    // A list knows of its end, although nobody asked for that command.
    until("only the first one is left", || {
        let listed = client.good("command_list", json!({}));
        let commands = facts(&listed)["commands"].as_array().unwrap();
        commands.iter().filter(|command| command["descendants"].is_object()).count() == 1
    });
    let id = facts(&result)["command_id"].clone();
    client.good("command_signal", json!({ "id": id }));
    until("a signal reaches it", || processes_with(&mark) == 0);
    assert_eq!(client.bad("command_signal", json!({ "id": id })), "command_ended");
    // A signal that ends the command itself ends all that it started.
    let line = format!("setsid sleep {mark} & exec sleep {mark}");
    let started = client.good("command_start", json!({ "command": line }));
    until("both run", || processes_with(&format!("sleep\0{mark}")) == 2);
    client.good("command_signal", json!({ "id": facts(&started)["command_id"], "signal": "TERM" }));
    until("neither does", || processes_with(&format!("sleep\0{mark}")) == 0);
    let line = format!("sleep {mark} & setsid sleep {mark} & echo started");
    let result = client.good("run_command", json!({ "command": line, "kill_descendants": true }));
    assert!(facts(&result)["descendants"].is_null(), "{result}");
    assert_eq!(processes_with(&mark), 0);
}

#[test]
fn long_output_keeps_head_and_tail() {
    let guest = Guest::start();
    let mut client = guest.client();
    let result = client.good("run_command", json!({ "command": "seq 1 1000000" }));
    let shown = stream(&result, "stdout");
    assert!(shown.starts_with("1\n2\n3\n") && shown.ends_with("999999\n1000000\n"));
    assert!(shown.len() < 34_000, "{}", shown.len());
    let omitted = facts(&result)["stdout"]["omitted_bytes"].as_u64().unwrap();
    assert_eq!(facts(&result)["stdout"]["total_bytes"], 6_888_896);
    assert_eq!(omitted, 6_888_896 - 32_768);
    assert!(shown.contains(&format!("{omitted} bytes left out")));

    let result = client.good("run_command", json!({ "command": "seq 1 1000", "max_output_bytes": 10 }));
    assert!(stream(&result, "stdout").starts_with("1\n2\n3\n["), "{result}");
    let result = client.good("run_command", json!({ "command": "seq 1 1000", "max_output_bytes": 0 }));
    assert_eq!(facts(&result)["stdout"]["omitted_bytes"], 3893);
    // Both streams at their most stay under what a result may show.
    let line = "seq 1 100000; seq 1 100000 >&2";
    let result = client.good("run_command", json!({ "command": line, "max_output_bytes": 262_144 }));
    let text: usize = result["content"]
        .as_array()
        .unwrap()
        .iter()
        .map(|b| b["text"].as_str().unwrap().chars().count())
        .sum();
    assert!(text < 50_000, "{text}");
}

#[test]
fn bytes_that_are_no_text() {
    let guest = Guest::start();
    let mut client = guest.client();
    let line = "printf '\\377\\000a'";
    let result = client.good("run_command", json!({ "command": line }));
    assert_eq!(stream(&result, "stdout"), "\u{fffd}\0a");
    assert_eq!(facts(&result)["stdout"]["lossy"], true);
    assert!(result["content"][0]["text"].as_str().unwrap().contains("not UTF-8"));
    let result = client.good("run_command", json!({ "command": line, "encoding": "base64" }));
    assert_eq!(stream(&result, "stdout"), "/wBh");
    assert_eq!(facts(&result)["stdout"]["lossy"], false);
    // Zero bytes grow sixfold in JSON; the result stays under the cap of the link.
    let line = "head -c 300000 /dev/zero; head -c 300000 /dev/zero >&2";
    let result = client.good("run_command", json!({ "command": line, "max_output_bytes": 262_144 }));
    assert!(result.to_string().len() < 1 << 20);
    let result = client
        .good("run_command", json!({ "command": line, "max_output_bytes": 262_144, "encoding": "base64" }));
    assert!(result.to_string().len() < 1 << 20);
    assert_eq!(facts(&result)["stdout"]["omitted_bytes"], 300_000 - 262_144);
    assert_eq!(facts(&result)["stdout"]["omitted_at"], 131_072, "the tail is there, too");
}
