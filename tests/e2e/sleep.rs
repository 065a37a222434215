//! Real machines that sleep: their memory is on the disk and no VMM runs, and whoever calls them wakes them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nexus_tests::client::{BOOT, Client};
use nexus_tests::daemon::{Daemon, kill_process};
use nexus_tests::order::assert_in_order;
use nexus_tests::saved::{clock_is_right, is_on_console, signal_agent};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// Makes a machine that can be suspended, with a loop that counts and a server.
fn create(client: &mut Client, name: &str) -> Value {
    let vm = client.create(json!({
        "name": name, "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "256MiB", "wait_s": 45
    }));
    let counting = "i=0; while true; do i=$((i+1)); echo $i > /run/count; sleep 0.1; done";
    client.must("guest_command_start", json!({ "vm": name, "command": counting }));
    client.run(name, "mkdir -p /srv/www; echo served > /srv/www/page; httpd -p 127.0.0.1:8080 -h /srv/www");
    client.run(name, "until [ -s /run/count ]; do sleep 0.1; done; echo unsynced > /srv/file");
    vm
}

fn count(client: &mut Client, vm: &str) -> u64 {
    client.run(vm, "cat /run/count").stdout.trim().parse().unwrap_or_default()
}

fn suspend(client: &mut Client, vm: &str) -> Value {
    let slept = client.must("vm_pause", json!({ "vm": vm, "suspend": true }));
    assert_eq!(slept["state"], "suspended", "{slept}");
    assert!(slept.get("process").is_none(), "{slept}");
    slept
}

/// The saved memories.
fn memories(daemon: &Daemon) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(daemon.state().join("suspended")).expect("the directory");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

/// The memory of a VM that is awake is removed, soon after that is told.
#[track_caller]
fn assert_gone(daemon: &Daemon, when: &str) {
    let gone = until(BOOT, || memories(daemon).is_empty().then_some(()));
    assert!(gone.is_some(), "{when}: {:?}", memories(daemon));
}

/// How often a VM was woken.
fn wakes(client: &mut Client, vm: &str) -> usize {
    let history = client.must("vm_history", json!({ "vm": vm, "limit": 200 }));
    let lines = history["transitions"].as_array().expect("a list").iter();
    lines.filter(|line| line["from"] == "suspended" && line["to"] == "starting").count()
}

/// Has the daemon end at a point within a call, and starts it again.
fn kill_at(daemon: &mut Daemon, point: &str, tool: &str, arguments: &Value) -> Client {
    daemon.kill_at(point, |client| {
        client.request("tools/call", &json!({ "name": tool, "arguments": arguments })).ok();
    })
}

/// Has a call wake a suspended machine, and kills a process of it as soon as that is there. Returns the state that it is in then.
fn kill_waking(daemon: &Daemon, which: &str) -> String {
    let (mut client, mut other) = (daemon.client(), daemon.client());
    let wake = json!({ "vm": "web", "command": "true" });
    let waking = thread::spawn(move || drop(other.call_whole("guest_run_command", wake)));
    let deadline = Instant::now() + BOOT;
    let pid = loop {
        if let Some(pid) = client.inspect("web")["process"][which].as_u64() {
            break u32::try_from(pid).expect("a process id");
        }
        assert!(Instant::now() < deadline, "it is not woken: {}", client.inspect("web"));
        // Not longer, since a small memory is read soon.
        thread::park_timeout(Duration::from_millis(1));
    };
    kill_process(pid);
    waking.join().expect("no panic");
    let ended = client.wait_for("web", "its end", |vm| {
        ["suspended", "crashed", "failed"].contains(&vm["state"].as_str().unwrap_or_default())
    });
    ended["state"].as_str().expect("a state").to_owned()
}

/// Has a machine suspended, and kills a process of it while its memory is written. Returns whether it was not asleep yet.
fn kill_saving(daemon: &Daemon, which: &str) -> bool {
    let (mut client, mut other) = (daemon.client(), daemon.client());
    let pid = client.inspect("web")["process"][which].as_u64().and_then(|pid| u32::try_from(pid).ok());
    let saving = thread::spawn(move || other.call("vm_pause", json!({ "vm": "web", "suspend": true })));
    let deadline = Instant::now() + BOOT;
    while !memories(daemon).iter().any(|memory| memory.join("ram").exists()) {
        assert!(Instant::now() < deadline, "no memory is saved\n{}", daemon.log());
        // Not longer, since a small memory is written soon.
        thread::park_timeout(Duration::from_millis(1));
    }
    kill_process(pid.expect("a running VM has it"));
    saving.join().expect("no panic").is_err()
}

#[test]
fn a_machine_sleeps_without_a_vmm_and_one_of_many_callers_wakes_it() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let first = create(&mut client, "web");
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": 8080 }));
    let machine = client.run("web", "cat /etc/machine-id 2>/dev/null; hostname").stdout;
    let before = count(&mut client, "web");
    let vmm = first["process"]["pid"].as_u64().expect("it runs");
    let slept = suspend(&mut client, "web");
    assert!(!PathBuf::from(format!("/proc/{vmm}")).exists(), "its VMM is gone");
    assert_eq!((memories(&daemon).len(), &slept["boot_id"]), (1, &first["boot_id"]));
    assert!(slept["usage"].get("memory_bytes").is_none(), "{slept}");

    // It stays so over a restart, and who only looks wakes nothing.
    daemon.stop();
    daemon.restart();
    let mut client = daemon.client();
    client.must("vm_list", json!({}));
    let still = client.must("vm_wait", json!({ "vm": "web", "state": "ready", "wait_s": 1 }));
    assert_eq!((&still["done"], &still["state"]), (&json!(false), &json!("suspended")), "{still}");

    // Many at once.
    thread::scope(|threads| {
        for _ in 0..20 {
            threads.spawn(|| {
                let mut caller = daemon.client();
                let call = json!({ "vm": "web", "command": "cat /srv/file" });
                let result =
                    caller.call_whole("guest_run_command", call).unwrap_or_else(|e| panic!("{}", e.text));
                assert!(result.to_string().contains("unsynced"), "{result}");
                let vm = &result["_meta"]["dev.nexus/vm"];
                assert_ne!(vm["boot_id"], first["boot_id"], "{vm}");
                // One that came when it was awake is not told.
                assert!(vm.get("woken").is_none_or(|woken| woken == true), "{vm}");
            });
        }
    });
    assert_eq!(wakes(&mut client, "web"), 1);
    assert_gone(&daemon, "");
    assert!(count(&mut client, "web") >= before, "the loop goes on");
    let then = count(&mut client, "web");
    client.run("web", "sleep 1");
    assert!(count(&mut client, "web") > then);
    assert_eq!(client.run("web", "cat /etc/machine-id 2>/dev/null; hostname").stdout, machine);
    // What means the boot before is refused, commands of before are there.
    let stale = client.call("vm_stop", json!({ "vm": "web", "if_boot_id": first["boot_id"] }));
    assert_eq!(stale.expect_err("another boot").code, "boot_changed");
    let commands = client.call_whole("guest_command_list", json!({ "vm": "web" })).expect("a list");
    assert!(commands.to_string().contains("i=$((i+1))"), "{commands}");

    // The one call is told that it woke it, and the clock is right.
    suspend(&mut client, "web");
    // Its clock stands still meanwhile.
    client.must("vm_wait", json!({ "vm": "web", "state": "ready", "wait_s": 5 }));
    let result = client.call_whole("guest_run_command", json!({ "vm": "web", "command": "true" }));
    let result = result.unwrap_or_else(|e| panic!("{}", e.text));
    assert_eq!(result["_meta"]["dev.nexus/vm"]["woken"], true, "{result}");
    assert!(result.to_string().contains("web was suspended, and was woken in"), "{result}");
    clock_is_right(&mut client, "web");

    // A connection of a published port wakes it, too.
    suspend(&mut client, "web");
    let address = published["address"].as_str().expect("an address");
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(BOOT)).expect("a timeout");
    stream.write_all(b"GET /page HTTP/1.0\r\n\r\n").expect("it is read");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("it answers");
    assert!(page.contains("served"), "{page}");
    assert_eq!(client.inspect("web")["state"], "ready");
    // An open connection keeps it awake.
    drop(stream);

    // One that is idle goes to sleep by itself.
    client.must("vm_update", json!({ "vm": "web", "idle_stop": "1s", "idle_action": "suspend" }));
    client.run("web", "killall httpd");
    let listed = client.call_whole("guest_command_list", json!({ "vm": "web" })).expect("a list");
    let commands = listed["_meta"]["dev.nexus/result"]["commands"].as_array().expect("commands").clone();
    for command in commands.iter().filter(|command| command["state"] == "running") {
        let kill = json!({ "vm": "web", "id": command["command_id"], "signal": "KILL" });
        client.call_whole("guest_command_signal", kill).expect("it is killed");
    }
    let slept = client.wait_for_state("web", "suspended");
    assert_eq!((&slept["idle_action"], slept.get("idle_stop_at")), (&json!("suspend"), None), "{slept}");
    assert_eq!(client.run("web", "cat /srv/file").stdout, "unsynced\n");
}

#[test]
fn a_memory_for_which_its_owners_quota_has_no_room_is_not_saved() {
    let daemon = Daemon::start();
    let quota = json!({ "name": "small", "tools": "all", "quota": { "disk": "260MiB" } });
    let made = daemon.client().must("token_create", quota);
    let secret = made["token"].as_str().expect("a secret");
    let mut holder = Client::connect_with(&daemon.socket(), secret).expect("its holder");
    holder.create(json!({
        "name": "web", "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "192MiB",
        "disk": "256MiB", "wait_s": 45
    }));
    let failure = holder.call("vm_pause", json!({ "vm": "web", "suspend": true })).expect_err("no room");
    assert_eq!(failure.code, "quota_exceeded", "{}", failure.text);
    assert_gone(&daemon, "");
    assert_eq!(holder.run("web", "echo up").stdout, "up\n");
}

/// What the memories of suspended machines occupy, in bytes.
fn suspended_bytes(client: &mut Client) -> u64 {
    let info = client.must("system_info", json!({}));
    let kinds = info["disk"].as_array().expect("a list").iter();
    let mut suspended = kinds.filter(|kind| kind["what"] == "suspended");
    suspended.next().and_then(|kind| kind["bytes"].as_u64()).unwrap_or_else(|| panic!("{info}"))
}

#[test]
fn suspensions_at_once_do_not_exceed_their_owners_quota() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let machine = |name: &str| {
        json!({
            "name": name, "from": "busybox", "driver": "qemu", "checkpoints": true, "memory": "192MiB",
            "disk": "256MiB", "wait_s": 45
        })
    };
    client.create(machine("alike"));
    suspend(&mut client, "alike");
    let each = suspended_bytes(&mut client);
    client.must_confirmed("vm_delete", json!({ "vm": "alike", "force": true }));
    // Room for two drives, and for one memory and a half.
    let disk = format!("{}B", 2 * (256 << 20) + each + each / 2);
    let made =
        client.must("token_create", json!({ "name": "small", "tools": "all", "quota": { "disk": disk } }));
    let secret = made["token"].as_str().expect("a secret");
    let holder = || Client::connect_with(&daemon.socket(), secret).expect("its holder");
    for name in ["one", "two"] {
        holder().create(machine(name));
    }
    let outcomes = thread::scope(|threads| {
        let both = ["one", "two"].map(|vm| {
            let mut caller = holder();
            threads.spawn(move || caller.call("vm_pause", json!({ "vm": vm, "suspend": true })))
        });
        both.map(|one| one.join().expect("no panic"))
    });
    let refused = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
    let refused: Vec<&str> = refused.map(|failure| failure.code.as_str()).collect();
    assert_eq!(refused, ["quota_exceeded"], "{outcomes:?}");
    assert_eq!(memories(&daemon).len(), 1);
    let awake = if outcomes[0].is_err() { "one" } else { "two" };
    assert_eq!(client.inspect(awake)["state"], "ready");
    assert_eq!(holder().run(awake, "echo up").stdout, "up\n");
}

#[test]
fn a_daemon_that_is_killed_leaves_a_machine_that_runs_or_is_suspended_whole() {
    let mut daemon = Daemon::start();
    let mut boot = create(&mut daemon.client(), "web")["boot_id"].clone();
    let (sleep, wake) = (json!({ "vm": "web", "suspend": true }), json!({ "vm": "web", "command": "true" }));
    // Until its row says so, it runs on.
    for point in
        ["suspend-quiet", "suspend-saved", "checkpoint-written", "checkpoint-named", "suspend-paused"]
    {
        kill_at(&mut daemon, point, "vm_pause", &sleep);
        let mut client = daemon.client();
        client.wait_for_state("web", "ready");
        let before = count(&mut client, "web");
        client.run("web", "sleep 1");
        assert!(count(&mut client, "web") > before, "{point}");
        assert_eq!(client.inspect("web")["boot_id"], boot, "{point}");
        assert_gone(&daemon, point);
    }
    // From then on it is suspended.
    let mut before = count(&mut daemon.client(), "web");
    for point in ["suspend-recorded", "suspend-killed", "suspended"] {
        kill_at(&mut daemon, point, "vm_pause", &sleep);
        let mut client = daemon.client();
        let slept = client.wait_for_state("web", "suspended");
        assert_eq!(slept["boot_id"], boot, "{point}");
        assert_eq!(memories(&daemon).len(), 1, "{point}");
        let now = count(&mut client, "web");
        assert!(now >= before, "{point}: {now} and {before}");
        (before, boot) = (now, client.inspect("web")["boot_id"].clone());
    }
    // A wake is not begun, or is undone; the memory is still there.
    suspend(&mut daemon.client(), "web");
    for point in ["wake-checked", "starting", "wake-launched"] {
        kill_at(&mut daemon, point, "guest_run_command", &wake);
        let slept = daemon.client().wait_for_state("web", "suspended");
        assert_eq!(slept["boot_id"], boot, "{point}");
        assert_eq!(memories(&daemon).len(), 1, "{point}");
    }
    // Once it is ready, what was saved is of the past.
    kill_at(&mut daemon, "wake-ready", "guest_run_command", &wake);
    let mut client = daemon.client();
    client.wait_for_state("web", "ready");
    assert_gone(&daemon, "");
    assert!(count(&mut client, "web") >= before);
    assert_eq!(client.run("web", "cat /srv/file").stdout, "unsynced\n");
    // A VMM or a shim that is killed before it is awake leaves it suspended. Where that was too late, it is tried again.
    for which in ["pid", "shim_pid"] {
        let is_caught = (0..5).any(|_| {
            suspend(&mut client, "web");
            let is_caught = kill_waking(&daemon, which) == "suspended";
            if !is_caught {
                client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
                client.wait_for_state("web", "ready");
            }
            is_caught
        });
        assert!(is_caught, "{which}: it was always awake too soon");
        assert_eq!(memories(&daemon).len(), 1, "{which}");
        if let Err(failure) = client.call_whole("guest_run_command", wake.clone()) {
            // It had begun to write.
            assert_eq!(failure.code, "changed", "{which}: {}", failure.text);
            client.to_the_end("vm_start", json!({ "vm": "web", "cold": true }), BOOT);
        }
        assert_eq!(client.run("web", "cat /srv/file").stdout, "unsynced\n", "{which}");
        assert_gone(&daemon, which);
    }
    // A memory that is damaged is not restored; the disk has what was synced.
    suspend(&mut client, "web");
    let ram = memories(&daemon)[0].join("ram");
    let mut bytes = std::fs::read(&ram).expect("the memory");
    bytes[4096 * 100] ^= 1;
    std::fs::write(&ram, bytes).expect("it is written");
    let failure = client.call_whole("guest_run_command", wake).expect_err("it is damaged");
    assert_eq!(failure.code, "verification_failed", "{}", failure.text);
    assert_eq!(client.inspect("web")["state"], "suspended");
    client.to_the_end("vm_start", json!({ "vm": "web", "cold": true }), BOOT);
    assert_eq!(client.run("web", "cat /srv/file").stdout, "unsynced\n");
    assert_gone(&daemon, "");
}

#[test]
fn a_vmm_or_a_shim_that_is_killed_while_its_machine_falls_asleep_leaves_one_that_starts() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    create(&mut client, "web");
    for which in ["pid", "shim_pid"] {
        client.run("web", &format!("echo {which} > /srv/mark; sync"));
        let is_caught = (0..5).any(|_| {
            let is_caught = kill_saving(&daemon, which);
            if !is_caught {
                // All of its memory is there.
                assert_eq!(client.run("web", "cat /srv/mark").stdout, format!("{which}\n"));
            }
            is_caught
        });
        assert!(is_caught, "{which}: it was always asleep too soon");
        client.wait_for("web", "its end", |vm| {
            ["crashed", "failed", "stopped"].contains(&vm["state"].as_str().unwrap_or_default())
        });
        assert_gone(&daemon, which);
        assert_in_order(&daemon);
        client.to_the_end("vm_start", json!({ "vm": "web" }), BOOT);
        client.wait_for_state("web", "ready");
        assert_eq!(client.run("web", "cat /srv/mark").stdout, format!("{which}\n"));
    }
}

#[test]
fn a_guest_that_does_not_prove_what_it_renewed_sleeps_on() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let boot = create(&mut client, "web")["boot_id"].clone();
    client.run("web", "echo synced > /srv/mark; sync");
    // Its agent is stopped when its memory is saved, so it says nothing after the wake.
    let stop = format!("{}; echo it stands still > /dev/console", signal_agent("STOP"));
    client.must("guest_command_start", json!({ "vm": "web", "command": format!("sleep 1; {stop}") }));
    assert!(is_on_console(&mut client, "web", "it stands still"), "the agent is not stopped");
    suspend(&mut client, "web");
    let call = json!({ "vm": "web", "command": "true" });
    client.call_whole("guest_run_command", call).expect_err("it is not awake");
    let slept =
        client.wait_for("web", "its sleep", |vm| vm["state"] == "suspended" && vm["reason"].is_string());
    assert!(slept["reason"].as_str().is_some_and(|why| why.contains("could not be woken")), "{slept}");
    assert_eq!(slept["boot_id"], boot, "{slept}");
    assert_eq!(memories(&daemon).len(), 1);
    assert_in_order(&daemon);
    client.to_the_end("vm_start", json!({ "vm": "web", "cold": true }), BOOT);
    assert_eq!(client.run("web", "cat /srv/mark").stdout, "synced\n");
    assert_gone(&daemon, "it is awake");
}
