//! The bridge starts the daemon: here, the real one.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::fake::{Lines, World, eventually, finish};

const INITIALIZE: &[u8] = b"{\"jsonrpc\":\"2.0\",\"id\":0,\"method\":\"initialize\",\"params\":{\"protocolVersion\":\"2025-06-18\",\
    \"capabilities\":{},\"clientInfo\":{\"name\":\"test\",\"version\":\"1\"}}}\n";

/// A program that becomes the real daemon and writes its process id to a file of its own.
fn daemon(world: &World) -> std::path::PathBuf {
    let script = world.root.path().join("nexusd");
    let line = format!(
        "#!/bin/sh\necho $$ >> {root}/pids\nexec {nexusd} \"$@\"\n",
        root = world.root.path().display(),
        nexusd = env!("CARGO_BIN_EXE_nexusd"),
    );
    std::fs::write(&script, line).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    script
}

fn pids(world: &World) -> Vec<Pid> {
    let text = std::fs::read_to_string(world.root.path().join("pids")).unwrap_or_default();
    text.lines().map(|line| Pid::from_raw(line.parse().unwrap()).unwrap()).collect()
}

/// Kills the daemons of a test, also when it fails.
struct Reaper<'a>(&'a World);

impl Drop for Reaper<'_> {
    fn drop(&mut self) {
        for pid in pids(self.0) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn bridge(world: &World) -> Child {
    let mut command = world.command("mcp");
    command.env("NEXUS_DAEMON", daemon(world)).env("PATH", "/usr/bin:/bin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn concurrent_bridges_start_one_daemon() {
    let world = World::new();
    let _reaper = Reaper(&world);
    let script = daemon(&world);
    let children: Vec<_> = (0..5)
        .map(|_| {
            let mut command = world.command("mcp");
            command.env("NEXUS_DAEMON", &script).env("PATH", "/usr/bin:/bin");
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut said = String::new();
    for mut child in children {
        child.stdin.as_mut().unwrap().write_all(INITIALIZE).unwrap();
        let run = finish(child);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert_eq!(run.json()["result"]["serverInfo"]["name"], "nexus");
        said.push_str(&run.stderr);
    }
    // The one that started it says where its state is.
    let state = world.root.path().join("state");
    let state = state.display();
    assert_eq!(said, format!("started nexusd: its state is in {state}, its log is {state}/nexusd.log\n"));
    let pids = pids(&world);
    assert_eq!(pids.len(), 1, "{pids:?}");
    // It outlived its starter, in a session of its own, and its output went to the log.
    assert_eq!(rustix::process::getsid(Some(pids[0])).unwrap(), pids[0]);
    let log = std::fs::read_to_string(world.root.path().join("state/nexusd.log")).unwrap();
    assert!(log.contains("serving"), "{log}");
}

#[test]
fn a_killed_daemon_is_started_again_when_it_is_needed() {
    let world = World::new();
    let _reaper = Reaper(&world);
    let mut child = bridge(&world);
    let lines = Lines::of(child.stdout.take().unwrap());
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(INITIALIZE).unwrap();
    assert_eq!(lines.next()["id"], 0);
    kill_process(pids(&world)[0], Signal::KILL).unwrap();
    std::fs::remove_file(world.runtime().join("nexus.sock")).unwrap();
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": { "name": "vm_list" } });
    let mut answer = Value::Null;
    let mut tries = 0;
    eventually("the call is answered by a new daemon", || {
        // A call that was written to the dying daemon is answered with an error; a client looks and repeats.
        tries += 1;
        stdin.write_all(format!("{call}\n").as_bytes()).unwrap();
        answer = lines.next();
        answer["result"]["isError"] != true
    });
    assert_eq!(answer["result"]["structuredContent"], json!({ "vms": [] }));
    assert!(tries <= 2, "{tries}");
    assert_eq!(pids(&world).len(), 2);
    drop(stdin);
    assert_eq!(finish(child).code, 0);
}

#[test]
fn a_daemon_that_ends_at_once_is_told_with_what_it_said() {
    let world = World::new();
    let script = world.root.path().join("nexusd");
    std::fs::write(&script, "#!/bin/sh\necho no room on the disk >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = world.command("mcp");
    command.env("NEXUS_DAEMON", &script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may have ended before it read this.
    drop(child.stdin.as_mut().unwrap().write_all(INITIALIZE));
    let run = finish(child);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("no room on the disk"), "{}", run.stderr);

    let mut command = world.command("doctor");
    command.env("NEXUS_DAEMON", &script).stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = finish(command.spawn().unwrap());
    assert_eq!(run.code, 3, "{run:?}");
    assert!(run.stderr.ends_with("no room on the disk\n"), "{}", run.stderr);
}

/// Runs a command at a terminal on which something is typed.
fn at_terminal(world: &World, line: &str, typed: &str) -> crate::fake::Run {
    let terminal = nix::pty::openpty(None, None).unwrap();
    for end in [&terminal.master, &terminal.slave] {
        // What is started is to have what it is given and nothing else: a daemon would keep the terminal open.
        rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC).unwrap();
    }
    let mut master = std::fs::File::from(terminal.master);
    let mut command = world.command(line);
    command.env("NEXUS_DAEMON", daemon(world)).env("PATH", "/usr/bin:/bin");
    let slave = |fd: &std::os::fd::OwnedFd| Stdio::from(fd.try_clone().unwrap());
    command.stdin(slave(&terminal.slave)).stdout(Stdio::piped()).stderr(slave(&terminal.slave));
    let child = command.spawn().unwrap();
    drop((command, terminal.slave));
    master.write_all(typed.as_bytes()).unwrap();
    let reader = std::thread::spawn(move || {
        let (mut said, mut bytes) = (Vec::new(), [0; 1024]);
        // The other side is closed with an error.
        while let Ok(read @ 1..) = std::io::Read::read(&mut master, &mut bytes) {
            said.extend_from_slice(&bytes[..read]);
        }
        String::from_utf8_lossy(&said).into_owned()
    });
    let run = finish(child);
    crate::fake::Run { stderr: reader.join().unwrap(), ..run }
}

#[test]
fn somebody_at_a_terminal_is_offered_a_daemon() {
    let world = World::new();
    let _reaper = Reaper(&world);
    let run = at_terminal(&world, "vm list", "n\n");
    assert_eq!((run.code, run.text()), (6, ""), "{}", run.stderr);
    assert!(run.stderr.contains("[Y/n]") && run.stderr.contains("hint:"), "{}", run.stderr);
    assert!(pids(&world).is_empty());
    // Programs and scripts are not asked.
    assert!(!at_terminal(&world, "vm list --json", "\n").stderr.contains("[Y/n]"));
    assert!(!world.run("vm list").stderr.contains("[Y/n]"));
    assert!(pids(&world).is_empty());

    let run = at_terminal(&world, "vm list", "\n");
    assert_eq!(run.code, 0, "{}", run.stderr);
    let state = world.root.path().join("state");
    assert!(run.stderr.contains(&format!("its state in {}?", state.display())), "{}", run.stderr);
    assert!(run.stderr.contains("started nexusd") && run.stderr.contains("no VMs"), "{}", run.stderr);
    assert_eq!(pids(&world).len(), 1);
}
