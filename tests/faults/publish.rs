//! Published ports of guests. A machine that is a process shares the host's loopback, so the tests' servers are "in the guest".

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;

use serde_json::{Value, json};

use crate::echo::echo;
use crate::world::{SOON, World, soon};

/// An unused port.
fn free() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port is free").port()
}

fn dial(published: &Value) -> TcpStream {
    let stream = TcpStream::connect(published["address"].as_str().expect("an address")).expect("it listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    stream
}

/// Sends a text, closes that direction, and reads to the end.
fn say(mut stream: impl Read + Write, close: impl Fn(), text: &str) -> String {
    stream.write_all(text.as_bytes()).expect("the guest's server reads");
    close();
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("the guest's server answers");
    said
}

fn ask(published: &Value, text: &str) -> String {
    let stream = dial(published);
    let closing = stream.try_clone().expect("a socket can be cloned");
    say(stream, move || closing.shutdown(Shutdown::Write).expect("half of it can be closed"), text)
}

#[test]
fn a_published_port_is_that_of_the_guest() {
    let (world, port) = (World::new(), echo());
    let mut client = world.client();
    world.create(&mut client, "web");
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port }));
    assert_eq!(published["guest_port"], port);
    assert_ne!(published["host_port"], port, "that one is the guest's own");
    assert_eq!(ask(&published, "hello"), "hello5");
    // Publishing again has the same result; another host port is an additional way to it.
    assert_eq!(client.must("vm_publish", json!({ "vm": "web", "guest_port": port })), published);
    assert_eq!(client.inspect("web")["published"], json!([published]));

    // Much data in both directions at once, and a half-close.
    let stream = dial(&published);
    let mut reading = stream.try_clone().expect("a socket can be cloned");
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        reading.read_to_end(&mut bytes).map(|_| bytes)
    });
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    for _ in 0..24 {
        (&stream).write_all(&block).expect("the guest's server reads");
    }
    stream.shutdown(Shutdown::Write).expect("half of it can be closed");
    let bytes = reader.join().expect("the reader lives").expect("all of it comes");
    let total = 24 << 20;
    assert_eq!(bytes.len(), total + total.to_string().len());
    assert!(bytes[..total].chunks(1 << 20).all(|chunk| chunk == block));
    assert_eq!(bytes[total..], *total.to_string().as_bytes());

    // Many at once, each with its own stream.
    let streams: Vec<_> = (0..200).map(|_| dial(&published)).collect();
    for (number, mut stream) in streams.iter().enumerate() {
        write!(stream, "{number:04}").expect("the guest's server reads");
    }
    for (number, mut stream) in streams.iter().enumerate() {
        let mut said = [0; 4];
        stream.read_exact(&mut said).expect("the guest's server answers");
        assert_eq!(said, *format!("{number:04}").as_bytes());
    }
    drop(streams);

    // Nobody listens there: only that connection ends. The host port must differ, or the listener would connect to itself.
    let [guest_port, host_port] = [free(), free()];
    let wanted = json!({ "vm": "web", "guest_port": guest_port, "host_port": host_port });
    let deaf = client.must("vm_publish", wanted);
    let mut rest = Vec::new();
    let _ = dial(&deaf).read_to_end(&mut rest);
    assert_eq!(rest, b"");
    assert_eq!(ask(&published, "still"), "still5");

    let gone = client.must("vm_unpublish", json!({ "vm": "web", "guest_port": port }));
    assert_eq!(gone["unpublished"], json!([published]));
    soon("the port is closed", || {
        TcpStream::connect(published["address"].as_str().expect("an address")).err()
    });
    let failure =
        client.call("vm_unpublish", json!({ "vm": "web", "guest_port": port })).expect_err("it is gone");
    assert_eq!(failure.code, "not_published");
}

#[test]
fn a_published_socket_works_as_a_port_does() {
    let (world, port) = (World::new(), echo());
    let mut client = world.client();
    world.create(&mut client, "web");
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port, "socket": true }));
    let path = published["address"].as_str().expect("a path").to_owned();
    let stream = UnixStream::connect(&path).expect("it listens");
    let closing = stream.try_clone().expect("a socket can be cloned");
    let said =
        say(stream, move || closing.shutdown(Shutdown::Write).expect("half of it can be closed"), "hello");
    assert_eq!(said, "hello5");
    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    soon("the socket is gone", || (!std::path::Path::new(&path).exists()).then_some(()));
}

#[test]
fn what_is_published_stays_over_restarts_and_ends_with_its_vm() {
    let (mut world, port) = (World::new(), echo());
    let mut client = world.client();
    world.create(&mut client, "web");
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port }));
    let host_port = published["host_port"].clone();
    world.create(&mut client, "other");
    let taken = json!({ "vm": "other", "guest_port": 80, "host_port": host_port });
    let failure = client.call("vm_publish", taken.clone()).expect_err("it is taken");
    assert_eq!(failure.code, "in_use");
    assert!(failure.text.contains("of the VM web"), "{}", failure.text);
    for wrong in [json!({ "guest_port": 0 }), json!({ "guest_port": 80, "host_port": 81, "socket": true })] {
        let mut arguments = wrong;
        arguments["vm"] = "web".into();
        assert_eq!(client.call("vm_publish", arguments).expect_err("it is wrong").code, "invalid_argument");
    }

    client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON);
    let waiting = dial(&published);
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    drop(waiting);
    assert_eq!(ask(&published, "again"), "again5");

    // A connection that is busy when the daemon is killed ends.
    let mut busy = dial(&published);
    busy.write_all(b"x").and_then(|()| busy.read_exact(&mut [0])).expect("the guest's server answers");
    world.daemon.kill();
    let ended = busy.read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(ended, Ok(0) | Err(ErrorKind::ConnectionReset)), "{ended:?}");
    // No other program may have taken the port meanwhile.
    let holder = TcpListener::bind(published["address"].as_str().expect("an address")).expect("it is free");
    world.daemon.restart();
    let mut client = world.client();
    let problem = client.inspect("web")["published"][0]["problem"].clone();
    assert!(problem.as_str().is_some_and(|text| text.contains("cannot listen")), "{problem}");
    drop(holder);
    soon("it listens again", || client.inspect("web")["published"][0].get("problem").is_none().then_some(()));
    assert_eq!(ask(&published, "anew"), "anew4");

    client.must("vm_delete", json!({ "vm": "web", "force": true }));
    soon("its port is free", || client.call("vm_publish", taken.clone()).ok());
}

#[test]
fn a_stop_ends_connections_that_are_busy_and_the_port_serves_the_next_boot() {
    let (world, port) = (World::new(), echo());
    let mut client = world.client();
    world.create(&mut client, "web");
    let published = client.must("vm_publish", json!({ "vm": "web", "guest_port": port }));
    // Eight clients write without a pause and read what comes back, until their connection ends.
    let talkers: Vec<_> = (0..8)
        .map(|_| {
            let stream = dial(&published);
            let mut reading = stream.try_clone().expect("a socket can be cloned");
            let (begun, has_begun) = std::sync::mpsc::channel();
            let reader = thread::spawn(move || {
                let (mut buffer, mut total) = (vec![0; 64 << 10], 0_u64);
                loop {
                    match reading.read(&mut buffer) {
                        Ok(count) if count > 0 => {
                            total += count as u64;
                            // Nobody listens any more after the first one.
                            let _ = begun.send(());
                        }
                        Ok(_) => return total,
                        Err(error) => {
                            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "it hangs");
                            return total;
                        }
                    }
                }
            });
            let writer = thread::spawn(move || {
                let block = [b'x'; 32 << 10];
                while (&stream).write_all(&block).is_ok() {}
            });
            (has_begun, reader, writer)
        })
        .collect();
    for (has_begun, ..) in &talkers {
        has_begun.recv_timeout(SOON).expect("the guest's server answers");
    }
    client.to_the_end("vm_stop", json!({ "vm": "web" }), SOON);
    for (_, reader, writer) in talkers {
        assert!(reader.join().expect("the connection ends") > 0);
        writer.join().expect("the connection ends");
    }
    client.to_the_end("vm_start", json!({ "vm": "web" }), SOON);
    assert_eq!(ask(&published, "again"), "again5");
}
