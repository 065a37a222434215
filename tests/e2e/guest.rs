//! What only a real machine shows about the guest: its mounts, limits, clock, and the image's own init.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use nexus_tests::client::{Client, stream};
use nexus_tests::daemon::{Daemon, program, signal};
use nexus_tests::registry::{Entry, Registry};
use nexus_tests::wait::until;
use serde_json::{Value, json};

/// The BusyBox applets in the images of these tests.
const APPLETS: [&str; 16] = [
    "sh", "cat", "cut", "date", "df", "grep", "head", "id", "ls", "readlink", "rm", "stat", "tail", "touch",
    "tty", "wc",
];

/// The static BusyBox of the image that is in every state directory of these tests.
pub(crate) fn busybox(client: &mut Client) -> Vec<u8> {
    let image = client.must("image_inspect", json!({ "image": "busybox" }));
    let path = image["path"].as_str().expect("it is here");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("busybox");
    let dump = format!("dump /bin/busybox {}", file.display());
    let done = std::process::Command::new("/sbin/debugfs").args(["-R", &dump, path]).output();
    let bytes = fs::read(&file).unwrap_or_default();
    assert!(bytes.starts_with(b"\x7fELF"), "{done:?}");
    bytes
}

/// Makes a root directory with unusual entries.
fn populate(root: &Path, busybox: &[u8]) {
    let put = |path: &str, text: &[u8], mode: u32, owner: u32| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a file is in a directory")).expect("its directory");
        fs::write(&path, text).expect("a file");
        chown(&path, Some(owner), Some(owner)).expect("root gives files away");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("its mode");
    };
    let own = |path: &str, uid, gid, mode| {
        let path = root.join(path);
        fs::create_dir_all(&path).expect("a directory");
        chown(&path, Some(uid), Some(gid)).expect("root gives directories away");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("its mode");
    };
    put("bin/busybox", busybox, 0o755, 0);
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).expect("a link");
    }
    put("etc/passwd", b"root:x:0:0::/root:/bin/sh\ndev:x:1000:1000::/home/dev:/bin/sh\n", 0o644, 0);
    own("tmp", 0, 0, 0o1777);
    put("tmp/seed.txt", b"seeded\n", 0o640, 7);
    put("run/postgresql/note", b"noted\n", 0o600, 999);
    own("run/postgresql", 999, 998, 0o2775);
    own("home/dev", 1000, 1000, 0o755);
    symlink("var/dev", root.join("dev")).expect("a link");
}

#[test]
fn what_an_image_holds_is_what_its_machine_has() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let root = tempfile::tempdir().expect("a temporary directory");
    populate(root.path(), &busybox(&mut client));
    let from = format!("file:{}", root.path().display());
    let files = json!({
        "/srv/new/plain.txt": "plain\n",
        "/home/dev/.config/key": { "content": "secret\n", "mode": "0600", "user": "dev" },
        "/opt/tool": { "content": "IyEvYmluL3NoCmVjaG8gAP8K", "encoding": "base64", "mode": "0755" },
    });
    let vm = client.create(json!({ "name": "held", "from": from, "memory": "128MiB", "files": files }));
    assert_eq!(vm["guest"]["problems"], Value::Null, "{vm}");

    let held = "stat -c '%u:%g %a' /run/postgresql /run/postgresql/note /tmp /tmp/seed.txt; cat /run/postgresql/note /tmp/seed.txt";
    let is = "999:998 2775\n999:999 600\n0:0 1777\n7:7 640\nnoted\nseeded\n";
    assert_eq!(client.run("held", held).stdout, is);
    let mounts = client.run("held", "cat /proc/mounts").stdout;
    assert!(mounts.contains(" /run tmpfs ") && mounts.contains(" /var/dev devtmpfs "), "{mounts}");
    assert!(!mounts.contains(" /tmp "), "{mounts}");
    assert_eq!(
        client.run("held", "touch /tmp/kept; stat -c %F /dev/null /dev/shm").stdout.lines().count(),
        2
    );

    let given = "cd /srv/new && stat -c '%u %a' plain.txt /home/dev/.config/key /opt/tool; cat plain.txt /home/dev/.config/key";
    let once = "0 644\n1000 600\n0 755\nplain\nsecret\n";
    assert_eq!(client.run("held", given).stdout, once);
    let tool = json!({ "vm": "held", "path": "/opt/tool", "encoding": "base64" });
    let tool = client.call_whole("guest_file_read", tool).expect("it is read").to_string();
    assert!(tool.contains("IyEvYmluL3NoCmVjaG8gAP8K"), "{tool}");
    // They are written only once; afterwards they are the guest's.
    client.run("held", "echo mine > /srv/new/plain.txt; rm /opt/tool");

    another_user_is_at_home(&mut client);
    commands_live(&mut client);
    streams_come_through(&daemon);
    commands_leave_the_agent_room(&mut client);
    the_clock_is_kept_right(&mut client, &vm);

    client.to_the_end("vm_stop", json!({ "vm": "held" }), Duration::from_mins(2));
    client.to_the_end("vm_start", json!({ "vm": "held" }), nexus_tests::client::BOOT);
    client.wait_for_state("held", "ready");
    assert_eq!(client.run("held", held).stdout, is);
    assert_eq!(client.run("held", "ls /tmp").stdout, "kept\nseed.txt\n");
    assert_eq!(client.run("held", "cat /srv/new/plain.txt; ls /opt").stdout, "mine\n");
}

fn another_user_is_at_home(client: &mut Client) {
    let line = "echo a > /dev/stdout; echo b > /dev/stderr";
    let said = json!({ "vm": "held", "command": line, "user": "dev" });
    let said = client.call_whole("guest_run_command", said).expect("it runs");
    assert_eq!(
        (stream(&said, "stdout").as_str(), stream(&said, "stderr").as_str()),
        ("a\n", "b\n"),
        "{said}"
    );

    let file = json!({ "vm": "held", "path": "/home/dev/proj/src/a.py", "content": "x\n" });
    client.must("guest_file_write", file);
    let line = "cd ~/proj && echo y >> src/a.py && touch b && cat src/a.py && stat -c %u . src/a.py";
    let ran = json!({ "vm": "held", "command": line, "user": "dev" });
    let ran = client.call_whole("guest_run_command", ran).expect("it runs");
    assert_eq!(stream(&ran, "stdout"), "x\ny\n1000\n1000\n", "{ran}");

    let value = json!({ "vm": "held", "path": "/proc/sys/vm/swappiness", "content": "7\n", "append": true });
    client.must("guest_file_write", value);
    assert_eq!(client.run("held", "cat /proc/sys/vm/swappiness").stdout, "7\n");
    let long = format!("x={}; echo ${{#x}}", "a".repeat(200_000));
    assert_eq!(client.run("held", &long).stdout, "200000\n");
}

/// A terminal, leftover processes that a cgroup ends, and a client of the daemon that looks later.
fn commands_live(client: &mut Client) {
    let start = json!({ "vm": "held", "command": "tty; stat -c %u $(tty); read l; echo got $l", "tty": true, "user": "dev" });
    let started = client.call_whole("guest_command_start", start).expect("it starts");
    let id = started["_meta"]["dev.nexus/result"]["command_id"].clone();
    let read = json!({ "vm": "held", "id": id, "wait_ms": 20_000 });
    // A terminal echoes input at once, in the middle of other output.
    let asks = until(Duration::from_mins(2), || {
        let result = client.call_whole("guest_command_output", json!({ "vm": "held", "id": id }));
        stream(&result.expect("it is read"), "stdout").contains("\n1000\n").then_some(())
    });
    assert!(asks.is_some(), "it says whose terminal it is");
    client
        .call_whole("guest_command_input", json!({ "vm": "held", "id": id, "input": "typed\n" }))
        .expect("it is typed");
    let ended = until(Duration::from_mins(2), || {
        let result = client.call_whole("guest_command_output", read.clone()).expect("it is read");
        (result["_meta"]["dev.nexus/result"]["status"] == 0).then_some(result)
    });
    let said = stream(&ended.expect("it ends"), "stdout");
    assert!(said.contains("/dev/pts/") && said.contains("\n1000\n"), "{said}");
    assert!(said.ends_with("got typed\n"), "{said}");

    let left = json!({ "vm": "held", "command": "(tail -f /dev/null > /dev/null 2>&1 &); echo done" });
    let result = client.call_whole("guest_run_command", left).expect("it runs");
    let facts = &result["_meta"]["dev.nexus/result"];
    assert_eq!(facts["descendants"]["count"], 1, "{result}");
    let signal = json!({ "vm": "held", "id": facts["command_id"], "signal": "KILL" });
    client.call_whole("guest_command_signal", signal.clone()).expect("it is killed");
    let gone = until(Duration::from_mins(1), || client.call("guest_command_signal", signal.clone()).err());
    assert_eq!(gone.expect("nothing is left").code, "command_ended");
}

/// Streams over vsock: both directions at once, beyond the end of the agent, and to the guest's loopback.
fn streams_come_through(daemon: &Daemon) {
    let nexusctl = |words: &[&str]| {
        let mut command = Command::new(program("nexusctl"));
        command.args(words).envs(daemon.environment()).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().expect("nexusctl runs")
    };
    let sent: Vec<u8> = (0..8_000_000_u32).map(|n| (n * 31 / 7) as u8).collect();
    let mut cat = nexusctl(&["exec", "-i", "held", "cat"]);
    let (mut stdin, input) = (cat.stdin.take().expect("its input"), sent.clone());
    let writing = std::thread::spawn(move || stdin.write_all(&input));
    let output = cat.wait_with_output().expect("it ends");
    writing.join().expect("the writer ends").expect("all is written");
    assert!(output.stdout == sent && output.status.success(), "{} bytes came back", output.stdout.len());

    let line = "echo up; read l; busybox seq 1 100000; echo $l; exit 5";
    let mut attached = nexusctl(&["exec", "-i", "held", "-c", line]);
    let mut lines = BufReader::new(attached.stdout.take().expect("its output"));
    let mut up = String::new();
    lines.read_line(&mut up).expect("it starts");
    let kill = "for p in /proc/[0-9]*; do busybox tr '\\0' ' ' < $p/cmdline 2>/dev/null | \
        grep -q '^[^ ]*nexus-guest agent' && kill -9 ${p#/proc/} && echo killed; done";
    let killed = nexusctl(&["exec", "held", "-c", kill]).wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&killed.stdout), "killed\n");
    attached.stdin.take().expect("its input").write_all(b"typed\n").expect("it is typed");
    let mut rest = String::new();
    lines.read_to_string(&mut rest).expect("it goes on");
    assert!(
        up == "up\n" && rest.len() == 588_895 + 6 && rest.ends_with("100000\ntyped\n"),
        "{} bytes",
        rest.len()
    );
    assert_eq!(attached.wait().expect("it ends").code(), Some(5));

    let ready = until(Duration::from_mins(2), || {
        let started =
            nexusctl(&["exec", "-d", "held", "--", "busybox", "nc", "-ll", "-p", "7777", "-e", "cat"]);
        started.wait_with_output().is_ok_and(|output| output.status.success()).then_some(())
    });
    assert!(ready.is_some(), "the agent is back");
    let mut forward = nexusctl(&["-q", "forward", "held", "0:7777"]);
    let mut address = String::new();
    BufReader::new(forward.stdout.take().expect("its output"))
        .read_line(&mut address)
        .expect("it says where");
    let answer = until(Duration::from_mins(1), || {
        let mut connection = TcpStream::connect(address.trim()).expect("it is connected");
        connection.write_all(&sent[..100_000]).and_then(|()| connection.shutdown(Shutdown::Write)).ok()?;
        let mut answer = Vec::new();
        // Until the server listens, the connection is reset.
        connection.read_to_end(&mut answer).ok().filter(|length| *length > 0).map(|_| answer)
    });
    assert!(answer.expect("it is answered") == sent[..100_000]);
    signal(forward.id(), rustix::process::Signal::INT);
    assert_eq!(forward.wait().expect("it ends").code(), Some(0));
}

/// Starts a command and calls another tool again and again until it ends; returns its end. Each call is answered; how soon is measured by
/// the bench `streams`.
fn answering_until_it_ends(client: &mut Client, start: Value) -> Value {
    let started = client.call_whole("guest_command_start", start.clone()).expect("it starts");
    let id = started["_meta"]["dev.nexus/result"]["command_id"].clone();
    let ended = until(Duration::from_mins(4), || {
        let result =
            client.call_whole("guest_command_output", json!({ "vm": "held", "id": id, "limit": 1000 }));
        let result = result.expect("the agent answers");
        (result["_meta"]["dev.nexus/result"]["state"] == "ended").then_some(result)
    });
    ended.unwrap_or_else(|| panic!("{start} does not end"))
}

fn commands_leave_the_agent_room(client: &mut Client) {
    let limits = client.run("held", "cd /sys/fs/cgroup/nexus && cat memory.high memory.max pids.max").stdout;
    let limits: Vec<u64> = limits.lines().map(|line| line.parse().expect("a limit")).collect();
    assert!(limits.len() == 3 && limits[0] < limits[1] && limits[1] < 128 << 20, "{limits:?}");

    let much = json!({ "vm": "held", "argv": ["busybox", "dd", "if=/dev/zero", "bs=1M", "count=512"] });
    let ran = answering_until_it_ends(client, much);
    assert_eq!(ran["_meta"]["dev.nexus/result"]["stdout"]["total_bytes"], 512 << 20, "{ran}");

    // The exit code is that of the last program of the pipe, so it says nothing.
    let hungry = json!({ "vm": "held", "command": "tail /dev/zero | wc -c", "timeout_s": 120 });
    let ran = answering_until_it_ends(client, hungry);
    let facts = &ran["_meta"]["dev.nexus/result"];
    assert_eq!(facts["exit_code"], 0, "{ran}");
    assert!(facts["oom_killed"][0].as_str().is_some_and(|who| who.starts_with("tail (pid ")), "{ran}");
    assert!(
        ran["content"][0]["text"].as_str().is_some_and(|text| text.contains("ran out of memory")),
        "{ran}"
    );

    let processes = |client: &mut Client| {
        let current = client.run("held", "cat /sys/fs/cgroup/nexus/pids.current").stdout;
        current.trim().parse::<u32>().ok()
    };
    // The processes of this command itself, and those left running before.
    let calm = processes(client).expect("a number");
    // Its first process may fail to fork and so end before the others.
    let bomb = "bomb() { bomb | bomb; }; bomb";
    let bomb = json!({ "vm": "held", "command": bomb, "timeout_s": 5, "kill_descendants": true });
    client.call_whole("guest_run_command", bomb).ok();
    // On a busy host with one emulated processor it may not respond for a while, but it must recover.
    let mut said = Vec::new();
    let alive = until(Duration::from_mins(5), || {
        match client.call("guest_run_command", json!({ "vm": "held", "command": "echo alive" })) {
            Ok(_) => Some(()),
            Err(failure) => {
                said.push(failure.text);
                None
            }
        }
    });
    assert!(alive.is_some(), "the agent is alive: {said:?}");
    let left = until(Duration::from_mins(3), || processes(client).filter(|left| *left <= calm));
    if left.is_none() {
        let commands = client.call_whole("guest_command_list", json!({ "vm": "held" }));
        let groups = client.call("guest_run_command", json!({ "vm": "held", "command": "busybox ps; cd /sys/fs/cgroup/nexus; for g in *; do test -d $g && echo $g $(cat $g/cgroup.procs) $(cat $g/cgroup.events) $(cat $g/cgroup.freeze); done" }));
        panic!("the bomb goes on: more than {calm}; {commands:?}; {groups:?}");
    }
}

fn the_clock_is_kept_right(client: &mut Client, vm: &Value) {
    let off = |client: &mut Client| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
        let theirs = client.run("held", "date +%s").stdout.trim().parse::<u64>().expect("a time");
        theirs.abs_diff(now)
    };
    assert!(off(client) <= 2, "it is right after the boot");
    client.run("held", "date -s '2001-02-03 04:05:06'");
    let right = until(Duration::from_secs(60), || (off(client) <= 2).then_some(()));
    assert!(right.is_some(), "after date -s the clock is off by {} s", off(client));

    let vmm = vm["process"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("a VMM");
    signal(vmm, rustix::process::Signal::STOP);
    std::thread::park_timeout(Duration::from_secs(12));
    signal(vmm, rustix::process::Signal::CONT);
    let right = until(Duration::from_secs(60), || (off(client) <= 2).then_some(()));
    assert!(right.is_some(), "after a stop of the VMM the clock is off by {} s", off(client));
    let told = until(Duration::from_secs(30), || {
        let info = client.must("guest_os_info", json!({ "vm": "held" }));
        info["clock_skew_ms"].as_i64().filter(|skew| skew.abs() <= 1000)
    });
    assert!(told.is_some(), "{}", client.must("guest_os_info", json!({ "vm": "held" })));
}

#[test]
fn links_lead_where_the_image_means_and_its_directory_is_made() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let registry = Registry::start();
    let busybox = busybox(&mut client);
    let layer: &[_] = &[
        ("bin", Entry::Directory),
        ("bin/busybox", Entry::Program(&busybox)),
        ("bin/sh", Entry::Link("busybox")),
        ("run", Entry::Link("/var/run")),
        ("tmp", Entry::Directory),
        ("tmp/seed.txt", Entry::Text("seeded\n")),
    ];
    registry.put("team/linked", "1.0", &[layer], &json!({ "WorkingDir": "wh" }));
    client.must("settings_set", json!({ "values": { "default.tmp": "tmpfs" } }));
    let from = format!("oci:{}/team/linked:1.0", registry.address());
    let vm = client.create(json!({ "name": "linked", "from": from }));
    assert_eq!((&vm["memory"], &vm["guest"]["problems"]), (&json!("1GiB"), &Value::Null), "{vm}");
    let said = client.run(
        "linked",
        "pwd; busybox cat /tmp/seed.txt; busybox ls /var/run/nexus/bin; busybox cat /proc/mounts",
    );
    let lines = ["/wh\nseeded\nhalt\n", " /var/run tmpfs ", " /tmp tmpfs "];
    assert!(
        said.stdout.starts_with(lines[0]) && lines.iter().all(|line| said.stdout.contains(line)),
        "{said:?}"
    );
    client.to_the_end("vm_stop", json!({ "vm": "linked" }), Duration::from_mins(2));
    assert_eq!(client.inspect("linked")["state"], "stopped");
}

#[test]
fn packages_of_a_template_are_in_its_machine_which_is_ready_when_its_systemd_is() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let packages = ["systemd-sysv", "dbus", "hello"];
    let template =
        json!({ "name": "sysd", "source": "debian-minimal", "packages": packages, "init": "system" });
    client.must("template_create", template);
    let build = json!({ "template": "sysd", "wait_s": 0 });
    let build = client.to_the_end("build_start", build, Duration::from_mins(15));
    assert_eq!((&build["status"], &build["cached"]), (&json!("success"), &json!(false)));
    // Machines of it do not need the archive.
    let plan = json!({ "name": "sysd", "from": "template:sysd", "dry_run": true });
    let plan = client.must("vm_create", plan);
    assert_eq!(plan["plan"]["download_bytes"], 0, "{plan}");
    let vm = client.to_the_end(
        "vm_create",
        json!({ "name": "sysd", "from": "template:sysd", "wait_s": 0 }),
        Duration::from_mins(10),
    );
    assert_eq!((&vm["state"], &vm["guest"]["problems"]), (&json!("ready"), &Value::Null), "{vm}");
    let said = client.run("sysd", "systemctl is-system-running; systemctl --failed --no-legend").stdout;
    assert_eq!(said, "running\n");
    let info = client.must("guest_os_info", json!({ "vm": "sysd" }));
    assert_eq!(info["system"], json!({ "state": "running" }), "{info}");

    assert_eq!(client.run("sysd", "hello").stdout, "Hello, world!\n");
    assert_eq!(client.run("sysd", "apt-mark showmanual hello").stdout, "hello\n");

    // Failed units are listed by name.
    client.run("sysd", "systemd-run --unit=broken --wait false");
    let info = client.must("guest_os_info", json!({ "vm": "sysd" }));
    assert_eq!(info["system"], json!({ "state": "degraded", "failed": ["broken.service"] }), "{info}");

    // A client that does not want to wait sees the progress.
    client.must("vm_delete", json!({ "vm": "sysd", "force": true }));
    client.must("settings_set", json!({ "values": { "default.wait_for_init": "false" } }));
    let arguments = json!({ "name": "early", "from": "template:sysd", "wait_s": 0 });
    let vm = client.to_the_end("vm_create", arguments, Duration::from_mins(10));
    assert_eq!(vm["guest"]["problems"], json!(["system: starting"]), "{vm}");
}
