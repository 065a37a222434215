//! The main use: creating a machine, working in it, and deleting it.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use data_encoding::HEXLOWER;
use nexus_tests::client::{Ran, stream};
use nexus_tests::daemon::Daemon;
use nexus_tests::web::Web;
use serde_json::json;
use sha2::{Digest, Sha256};

#[test]
fn a_machine_is_made_used_and_deleted() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.create(json!({ "name": "first", "from": "busybox", "tags": { "for": "test" } }));
    assert_eq!(vm["name"], "first");
    assert!(
        vm["boot_id"].is_string() && vm["process"]["pid"].is_u64() && vm["cid"].as_u64() >= Some(3),
        "{vm}"
    );
    assert!(vm["guest"]["kernel"].is_string() && vm["timings"]["total_ms"].as_u64() > Some(0), "{vm}");
    // The paths that it reports exist.
    let place = |value: &serde_json::Value| PathBuf::from(value.as_str().expect("a path"));
    let (vsock, console) = (place(&vm["process"]["vsock_socket"]), place(&vm["console_log"]));
    assert!(std::fs::metadata(&vsock).is_ok_and(|meta| meta.file_type().is_socket()), "{vm}");
    assert!(std::fs::metadata(&console).is_ok_and(|meta| meta.is_file()), "{vm}");
    assert!(vsock.starts_with(place(&vm["process"]["directory"])), "{vm}");
    assert_eq!(vm["image"]["name"], "busybox", "{vm}");

    let ran = client.run("first", "echo out; echo err >&2; exit 3");
    assert_eq!(ran, Ran { exit_code: Some(3), stdout: "out\n".to_owned(), stderr: "err\n".to_owned() });
    assert_eq!(client.run("first", "hostname; cat /etc/hostname").stdout, "first\nfirst\n");
    assert_eq!(client.run("first", "id -u").stdout, "0\n");

    // All byte values, to the guest and back.
    let all: Vec<u8> = (0..=255).collect();
    let encoded = base64(&all);
    let written = json!({ "vm": "first", "path": "/srv/a/b/bytes", "content": encoded, "encoding": "base64", "create_parents": true });
    client.call_whole("guest_file_write", written).expect("the file is written");
    let read = json!({ "vm": "first", "path": "/srv/a/b/bytes", "encoding": "base64" });
    let read = client.call_whole("guest_file_read", read).expect("the file is read");
    assert_eq!(stream(&read, "content").trim(), encoded);
    assert_eq!(client.run("first", "wc -c < /srv/a/b/bytes").stdout.trim(), "256");

    // The kernel's modules are available in every VM, read-only.
    let loads = "modprobe overlay && grep -c overlay /proc/filesystems";
    assert_eq!(client.run("first", loads).stdout, "1\n");
    let mounted = client.run("first", "grep /lib/modules /proc/mounts").stdout;
    assert!(mounted.contains("/lib/modules/") && mounted.contains(" ext4 ro,"), "{mounted}");
    assert_ne!(client.run("first", "touch /lib/modules/$(uname -r)/x").exit_code, Some(0));

    // Its filesystem has grown to the size of its drive.
    let kib: u64 = client
        .run("first", "df -k / | tail -n 1 | awk '{print $2}'")
        .stdout
        .trim()
        .parse()
        .expect("a number");
    assert!(kib > 7 << 20, "the root file system has {kib} KiB");
    // Its read-ahead is larger than Linux's default.
    assert_eq!(client.run("first", "cat /sys/block/vda/queue/read_ahead_kb").stdout, "512\n");

    // The console is text first; its cursor continues where it ended.
    let console = client.call_whole("vm_logs", json!({ "vm": "first" })).expect("the console is read");
    assert!(!stream(&console, "content").is_empty(), "{console}");
    client.run("first", "echo 'written later' > /dev/console");
    let mut cursor = console["_meta"]["dev.nexus/result"]["cursor"].clone();
    let mut later = String::new();
    while !later.contains("written later") {
        let more = json!({ "vm": "first", "cursor": cursor, "wait_s": 20 });
        let more = client.call_whole("vm_logs", more).expect("the console is read on");
        cursor = more["_meta"]["dev.nexus/result"]["cursor"].clone();
        assert_ne!(stream(&more, "content"), "", "nothing more on the console: {later}");
        later.push_str(&stream(&more, "content"));
    }

    // Through the proxy it reaches what its policy allows, and is told about the rest.
    let web = Web::start();
    web.put("/hello", *b"world\n");
    let url = web.url("/hello");
    let line = format!("wget -Y on -q -O - {url}");
    let run = json!({ "vm": "first", "command": line });
    let refused = client.call_whole("guest_run_command", run).expect("it runs").to_string();
    assert!(refused.contains("1 connection was refused by policy") && refused.contains("403"), "{refused}");
    let place = url.trim_start_matches("http://").trim_end_matches("/hello");
    client.must("vm_update", json!({ "vm": "first", "network": { "allow": [place] } }));
    let ran = client.run("first", &line);
    assert_eq!((ran.stdout.as_str(), ran.exit_code), ("world\n", Some(0)), "{}", ran.stderr);
    let counts = client.inspect("first")["network"]["counts"].take();
    assert_eq!((&counts["allowed"], &counts["denied"]), (&json!(1), &json!(1)), "{counts}");
    assert_eq!(client.run("first", "ls /sys/class/net").stdout.trim(), "lo");

    let stopped = client.to_the_end("vm_stop", json!({ "vm": "first" }), Duration::from_mins(2));
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    let failure = client
        .call("guest_run_command", json!({ "vm": "first", "command": "true" }))
        .expect_err("it is stopped");
    assert_eq!(failure.code, "vm_not_running");
    assert!(failure.text.contains("vm_start"), "{}", failure.text);

    // Written data survives another start, which is a new boot.
    client.to_the_end("vm_start", json!({ "vm": "first" }), nexus_tests::client::BOOT);
    let again = client.wait_for_state("first", "ready");
    assert_ne!(again["boot_id"], vm["boot_id"]);
    assert_eq!(client.run("first", "wc -c < /srv/a/b/bytes").stdout.trim(), "256");

    // A server is waited for, and a new name is the guest's at once.
    let port = json!({ "vm": "first", "port": 8181, "wait_s": 0 });
    assert_eq!(client.must("vm_wait", port)["done"], false);
    client.run("first", "httpd -p 127.0.0.1:8181 -h /srv");
    assert_eq!(client.must("vm_wait", json!({ "vm": "first", "port": 8181, "wait_s": 45 }))["done"], true);
    client.must("vm_rename", json!({ "vm": "first", "name": "last" }));
    let is_new =
        || (client.run("last", "hostname; cat /etc/hostname").stdout == "last\nlast\n").then_some(());
    assert!(nexus_tests::wait::until(Duration::from_secs(30), is_new).is_some(), "it has its old hostname");
    client.must("vm_rename", json!({ "vm": "last", "name": "first" }));

    let refused = client.call("vm_delete", json!({ "vm": "first" })).expect_err("it runs");
    assert_eq!(refused.code, "vm_wrong_state", "{}", refused.text);
    client.must("vm_update", json!({ "vm": "first", "protected": true }));
    let refused =
        client.call("vm_delete", json!({ "vm": "first", "force": true })).expect_err("it is protected");
    assert_eq!(refused.code, "vm_protected", "{}", refused.text);
    client.must_confirmed("vm_update", json!({ "vm": "first", "protected": false }));
    client.must("vm_delete", json!({ "vm": "first", "force": true }));
    let gone = client.call("vm_inspect", json!({ "vm": "first" })).expect_err("it is deleted");
    assert_eq!(gone.code, "vm_not_found");
}

/// The default: the host's own distribution, made from its archive.
#[test]
fn the_default_machine_is_debian() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let vm = client.to_the_end("vm_create", json!({ "network": "none" }), Duration::from_mins(15));
    let name = vm["name"].as_str().expect("a VM has a name").to_owned();
    client.wait_for_state(&name, "ready");
    assert_eq!(client.run(&name, "python3 -c 'print(6 * 7)'").stdout, "42\n");
    // It is ready for work at once.
    let tools = "for tool in bash apt-get git curl ps less patch unzip pip3; do command -v $tool >/dev/null || echo $tool; done";
    assert_eq!(client.run(&name, tools).stdout, "", "what lacks");
    let python = "import ensurepip, json, sqlite3, ssl, venv; print(len(ssl.create_default_context().get_ca_certs()) > 50)";
    let ran = client
        .run(&name, &format!("python3 -c '{python}'; ls /etc/ssl/certs/ca-certificates.crt >/dev/null"));
    assert_eq!((ran.stdout.as_str(), ran.exit_code), ("True\n", Some(0)), "{}", ran.stderr);
    // Commands that need a network fail, and the result says why.
    for command in ["curl -sS http://mirror.example/", "apt-get -qq update", "true"] {
        let ran = client.call_whole("guest_run_command", json!({ "vm": name, "command": command }));
        let told = ran.expect("it runs").to_string();
        assert_eq!(told.contains("note: this VM has no network"), command != "true", "{command}: {told}");
        assert_eq!(told.contains("vm_update"), command != "true", "what to do: {told}");
    }
    let os = client.must("vm_inspect", json!({ "vm": name }))["guest"]["os"].to_string();
    assert!(os.contains("Debian"), "{os}");
    let image = client.must("vm_inspect", json!({ "vm": name }))["image"].take();
    assert!(image["distro"].to_string().contains("debian"), "{image}");
    drop(client);
    crate::apt::installs_through_proxy_and_nat(&mut daemon, &name);
}

#[test]
fn a_long_path_is_no_obstacle() {
    let daemon = Daemon::start_with_long_path(150);
    assert_eq!(daemon.state().as_os_str().len(), 150);
    let mut client = daemon.client();
    client.create(json!({ "name": "deep", "from": "busybox" }));
    assert_eq!(client.run("deep", "echo up").stdout, "up\n");
}

#[test]
fn a_machine_runs_the_guest_that_the_configuration_names() {
    let directory = tempfile::tempdir().expect("a directory");
    let guest = directory.path().join("nexus-guest");
    // The same program, told by its digest: what follows an ELF program's sections is not loaded.
    let bytes = [nexus_host::daemon::AGENT, b"changed".as_slice()].concat();
    std::fs::write(&guest, &bytes).expect("write the guest");
    std::fs::set_permissions(&guest, std::fs::Permissions::from_mode(0o644))
        .expect("nobody else may change it");
    let daemon = Daemon::start_set(&[("NEXUS_GUEST_BINARY", &guest.display().to_string())]);
    let mut client = daemon.client();
    client.create(json!({ "name": "own-guest", "from": "busybox" }));
    let runs = client.run("own-guest", "sha256sum < /proc/1/exe").stdout;
    assert_eq!(runs.split_whitespace().next(), Some(HEXLOWER.encode(&Sha256::digest(&bytes)).as_str()));
}

#[test]
fn a_machine_of_its_own_init_works_beside_it() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.create(json!({ "name": "own-init", "from": "busybox", "init": "system" }));
    let init = client.run("own-init", "cat /proc/1/comm").stdout;
    assert!(!init.contains("nexus"), "PID 1 is {init}");
    assert_eq!(client.run("own-init", "modprobe overlay").exit_code, Some(0));
    assert_eq!(client.run("own-init", "ls /lib/modules/$(uname -r)/modules.dep").exit_code, Some(0));
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        (0..4)
            .map(move |at| (18 - 6 * at, at))
            .map(
                |(shift, at)| {
                    if at > chunk.len() { '=' } else { char::from(DIGITS[(word >> shift & 63) as usize]) }
                },
            )
            .collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}
