//! Links into guests that break while calls are under way.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::world::{World, soon};

/// Stands between the daemon and a guest: it takes the place of the guest's socket, and can cut all connections.
struct Between {
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl Between {
    /// Takes the place of the socket in a VM's directory. The daemon must not run.
    fn stand(directory: &Path) -> Self {
        let handle = std::fs::File::open(directory).expect("the VM has a directory");
        std::fs::rename(directory.join("v.sock"), directory.join("r.sock")).expect("the guest listens");
        // The path of a socket holds 107 bytes.
        let name = |name: &str| format!("/proc/self/fd/{}/{name}", handle.as_raw_fd());
        let listener = UnixListener::bind(name("v.sock")).expect("there is room for a socket");
        let open = Arc::<Mutex<Vec<UnixStream>>>::default();
        let connections = open.clone();
        std::thread::spawn(move || {
            let name = format!("/proc/self/fd/{}/r.sock", handle.as_raw_fd());
            for host in listener.incoming().map_while(Result::ok) {
                let Ok(guest) = UnixStream::connect(&name) else { continue };
                carry(&host, &guest).expect("threads can be started");
                connections.lock().expect("nobody panicked").extend([host, guest]);
            }
        });
        Self { open }
    }

    /// Cuts all connections, and returns how many there were.
    fn cut(&self) -> usize {
        let cut = std::mem::take(&mut *self.open.lock().expect("nobody panicked"));
        // One that has ended already is none to end.
        cut.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
        cut.len()
    }
}

/// Copies both directions until they end.
fn carry(host: &UnixStream, guest: &UnixStream) -> io::Result<()> {
    for (from, to) in [(host, guest), (guest, host)] {
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut piece)
                && to.write_all(&piece[..read]).is_ok()
            {}
            drop(to.shutdown(Shutdown::Both));
        });
    }
    Ok(())
}

#[test]
fn a_call_under_way_is_answered_once_although_its_link_breaks() {
    let mut world = World::new();
    let vm = world.create(&mut world.client(), "web");
    let id = vm["id"].as_str().expect("an id").to_owned();
    world.daemon.stop();
    let between = Between::stand(&world.daemon.state().join("vms").join(id));
    world.daemon.restart();
    let (mut client, mut other) = (world.client(), world.client());
    client.wait_for_state("web", "ready");
    let (go, ran) = (world.path("go"), world.path("ran"));
    let line =
        format!("echo x >> {}; until [ -e {} ]; do sleep 0.05; done; echo done", ran.display(), go.display());
    let call = json!({ "name": "guest_run_command", "arguments": { "vm": "web", "command": line } });
    let under_way = other.start("tools/call", &call).expect("it is sent");
    soon("the command runs", || ran.exists().then_some(()));
    for _ in 0..3 {
        assert!(between.cut() >= 2, "there was no link");
        // Over the next link.
        soon("the VM answers again", || {
            client.call_whole("guest_run_command", json!({ "vm": "web", "command": "true" })).ok()
        });
    }
    std::fs::write(&go, "").expect("a file is written");
    let answer = other.answer(under_way).expect("it is answered");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert!(answer["error"].is_null() && answer.to_string().contains("done\\n"), "{answer}");
    // The command ran once, and there is no second answer before the next one.
    assert_eq!(std::fs::read_to_string(&ran).expect("it ran"), "x\n");
    let next = other.start("ping", &json!({})).expect("it is sent");
    let pong = loop {
        let message = other.next_message().expect("it is answered");
        if !message["id"].is_null() {
            break message;
        }
    };
    assert_eq!(pong["id"], next, "{pong}");
    assert_eq!(client.inspect("web")["state"], "ready");
}
