//! VMs that can be checkpointed: they have serial ports in place of the vsock device, and everything works over these alike.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::{Daemon, program};
use nexus_tests::wait::until;
use nexus_tests::web::Web;
use serde_json::{Value, json};

fn nexusctl(daemon: &Daemon, words: &[&str]) -> Child {
    let mut command = Command::new(program("nexusctl"));
    command.args(words).envs(daemon.environment()).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().expect("nexusctl runs")
}

/// Sends bytes through a command of the VM and back.
fn bytes_come_back(daemon: &Daemon, length: u32) {
    let sent: Vec<u8> = (0..length).map(|n| (n * 31 / 7) as u8).collect();
    let mut cat = nexusctl(daemon, &["exec", "-i", "saved", "cat"]);
    let (mut stdin, input) = (cat.stdin.take().expect("its input"), sent.clone());
    let writing = std::thread::spawn(move || stdin.write_all(&input));
    let output = cat.wait_with_output().expect("it ends");
    writing.join().expect("the writer ends").expect("all is written");
    assert!(output.stdout == sent && output.status.success(), "{} bytes came back", output.stdout.len());
}

/// Fetches a file from a server in the VM by its published port.
fn published_answers(address: &str) {
    let answer = until(Duration::from_mins(1), || {
        let mut connection = TcpStream::connect(address).ok()?;
        connection.write_all(b"GET /big HTTP/1.0\r\n\r\n").ok()?;
        connection.shutdown(Shutdown::Write).ok()?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).ok()?;
        answer.ends_with(b"the end\n").then_some(answer)
    });
    assert!(answer.is_some_and(|answer| answer.len() > 3_000_000), "the published port answers");
}

/// Calls are answered while bulk goes both ways, also with a stream that nobody reads.
fn calls_are_answered_beside_bulk(daemon: &Daemon, client: &mut Client) {
    let mut unread = nexusctl(daemon, &["exec", "saved", "cat", "/dev/zero"]);
    std::thread::scope(|scope| {
        let bulk = scope.spawn(|| bytes_come_back(daemon, 4_000_000));
        while !bulk.is_finished() {
            assert_eq!(client.run("saved", "echo beside").stdout, "beside\n");
        }
        bulk.join().expect("the bulk comes through");
    });
    unread.kill().expect("it is ended");
    unread.wait().expect("it ends");
}

#[test]
fn a_machine_without_vsock_is_the_same_to_everybody() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let vm =
        client.create(json!({ "name": "saved", "from": "busybox", "memory": "256MiB", "checkpoints": true }));
    assert_eq!(vm["guest"]["problems"], Value::Null, "{vm}");
    assert_eq!(client.run("saved", "ls /dev/vsock").exit_code, Some(1), "it has no vsock device");
    let ports = client.run("saved", "cat /sys/class/virtio-ports/*/name").stdout;
    assert_eq!(ports, "nexus.ctl\nnexus.calls\nnexus.bulk\n");
    let ran = client.run("saved", "echo out; echo err >&2; exit 3");
    assert_eq!((ran.exit_code, &*ran.stdout, &*ran.stderr), (Some(3), "out\n", "err\n"));
    // Only root can open the ports, and they are in use.
    assert_eq!(client.run("saved", "stat -c '%u %a' /dev/vport*p1").stdout, "0 600\n");
    assert_ne!(client.run("saved", "cat < $(ls /dev/vport*p2)").exit_code, Some(0));

    // Its memory is a file without a name, as large as the memory.
    let pid = vm["process"]["pid"].as_u64().expect("a running VM has a process");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
    let is_shared = |line: &str| {
        line.contains("rw-s") && (line.contains("/guest") || line.contains("memfd:guest-memory"))
    };
    assert!(maps.lines().any(is_shared), "{maps}");

    bytes_come_back(&daemon, 8_000_000);
    calls_are_answered_beside_bulk(&daemon, &mut client);

    client.run(
        "saved",
        "mkdir /srv/www; (seq 1 500000; echo the end) > /srv/www/big; httpd -p 127.0.0.1:8080 -h /srv/www",
    );
    let published = client.must("vm_publish", json!({ "vm": "saved", "guest_port": 8080 }));
    let address = published["address"].as_str().expect("its address").to_owned();
    published_answers(&address);

    let web = Web::start();
    web.put("/hello", *b"world\n");
    let url = web.url("/hello");
    let place = url.trim_start_matches("http://").trim_end_matches("/hello");
    client.must("vm_update", json!({ "vm": "saved", "network": { "allow": [place] } }));
    let fetch = format!("wget -Y on -q -O - {url}");
    assert_eq!(client.run("saved", &fetch).stdout, "world\n");

    // The daemon ends and comes back; so does the agent.
    client.run("saved", "(sleep 300 > /dev/null 2>&1 &)");
    daemon.kill();
    daemon.restart();
    let mut client = daemon.client();
    let after = client.wait_for_state("saved", "ready");
    assert_eq!(after["boot_id"], vm["boot_id"]);
    assert_eq!(after["process"]["shim_pid"], vm["process"]["shim_pid"]);
    assert_eq!(client.run("saved", "ps -o args | grep -cx 'sleep 300'").stdout, "1\n");
    bytes_come_back(&daemon, 1_000_000);
    published_answers(&address);
    assert_eq!(client.run("saved", &fetch).stdout, "world\n");

    let kill = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | \
        grep -q '^[^ ]*nexus-guest agent' && kill -9 ${p#/proc/} && echo killed; done";
    let killed = client.call_whole("guest_run_command", json!({ "vm": "saved", "command": kill }));
    drop(killed);
    let answers = until(Duration::from_mins(2), || {
        let run = json!({ "vm": "saved", "command": "ps -o args | grep -cx 'sleep 300'" });
        client.call_whole("guest_run_command", run).is_ok().then_some(())
    });
    assert!(answers.is_some(), "the agent is back");
    bytes_come_back(&daemon, 1_000_000);

    // A pause, and an orderly end; another start is another boot.
    client.must("vm_pause", json!({ "vm": "saved" }));
    client.must("vm_resume", json!({ "vm": "saved" }));
    assert_eq!(client.run("saved", "echo again").stdout, "again\n");
    let stopped = client.to_the_end("vm_stop", json!({ "vm": "saved" }), Duration::from_mins(2));
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    client.to_the_end("vm_start", json!({ "vm": "saved" }), nexus_tests::client::BOOT);
    let again = client.wait_for_state("saved", "ready");
    assert_ne!(again["boot_id"], vm["boot_id"]);
    assert_eq!(client.run("saved", "tail -n 1 /srv/www/big").stdout, "the end\n");
}

#[test]
fn it_works_outside_a_jail_too_and_under_its_own_init() {
    let daemon = Daemon::start_set(&[("NEXUS_JAIL", "false")]);
    let mut client = daemon.client();
    client.must("settings_set", json!({ "values": { "default.checkpoints": "true" } }));
    let vm =
        client.create(json!({ "name": "saved", "from": "busybox", "memory": "256MiB", "init": "system" }));
    assert_eq!(client.run("saved", "ls /dev/vsock").exit_code, Some(1), "{vm}");
    bytes_come_back(&daemon, 2_000_000);
}
