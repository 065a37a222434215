//! The guest's proxy, against a host that this test is.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use common::{Client, Guest, PATIENCE, facts, stream, until};
use nexus_schema::link::ProxyParams;
use serde_json::{Value, json};

/// The host's end of its port 1025.
struct Host(UnixListener);

impl Host {
    /// Takes the next connection on which anything is asked for: it, and what that is.
    fn next(&self) -> (BufReader<UnixStream>, Value) {
        loop {
            let mut stream = self.next_silent();
            let mut line = String::new();
            // Those that are made for the next program end if there is none.
            if stream.read_line(&mut line).unwrap() > 0 {
                return (stream, serde_json::from_str(&line).unwrap());
            }
        }
    }

    /// Takes the next connection.
    fn next_silent(&self) -> BufReader<UnixStream> {
        let (stream, _) = self.0.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    }
}

fn start(enabled: bool) -> (Guest, Host) {
    start_with(enabled, |_| {})
}

/// The same with what `prepare` makes in the guest's directory.
fn start_with(enabled: bool, prepare: impl FnOnce(&Path)) -> (Guest, Host) {
    let mut listener = None;
    let guest = Guest::start_configured(|directory, configure| {
        prepare(directory);
        let handle = std::fs::File::open(directory).unwrap();
        let path = format!("/proc/self/fd/{}/v.sock_1025", handle.as_raw_fd());
        listener = Some(UnixListener::bind(path).unwrap());
        configure.proxy = Some(ProxyParams { enabled });
    });
    assert_eq!(guest.said.ack.problems, Vec::<String>::new());
    (guest, Host(listener.unwrap()))
}

fn variable(client: &mut Client, name: &str) -> String {
    let result = client.good("run_command", json!({ "command": format!("echo \"${name}\"") }));
    stream(&result, "stdout").trim().to_owned()
}

fn dial(client: &mut Client) -> TcpStream {
    let address = variable(client, "http_proxy");
    let stream = TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let [.., high, middle, low] = payload.len().to_be_bytes();
    [&[kind, high, middle, low], payload].concat()
}

fn read_frame(stream: &mut impl Read) -> (u8, Vec<u8>) {
    let mut head = [0; 4];
    stream.read_exact(&mut head).unwrap();
    let mut payload = vec![0; usize::from(head[2]) << 8 | usize::from(head[3])];
    stream.read_exact(&mut payload).unwrap();
    (head[0], payload)
}

fn head(stream: &mut BufReader<TcpStream>) -> String {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(stream.read_line(&mut head).unwrap(), 0, "{head}");
    }
    head
}

/// The answers of hosts that give credit, and of those that do not.
const MADE: [&[u8]; 2] = [b"{\"ok\":{}}\n", b"{\"ok\":{\"without_credit\":true}}\n"];
const DENIED: &[u8] = b"{\"error\":{\"failure\":\"denied\",\"reason\":\"name_not_allowed\",\"message\":\"no\",\"hint\":\"ask\",\"allow\":[\"a\",\"b.example:443\"]}}\n";

#[test]
fn a_tunnel_carries_both_directions_to_their_own_ends() {
    let (guest, host) = start(true);
    let mut client = guest.client();
    for (how, request, answer) in [
        (
            "connect",
            &b"CONNECT b.example:443 HTTP/1.0\r\n\r\nearly"[..],
            &b"HTTP/1.1 200 Connection established\r\n\r\n"[..],
        ),
        (
            "socks5",
            b"\x05\x01\x00\x05\x01\x00\x03\x09b.example\x01\xbbearly",
            b"\x05\x00\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00",
        ),
    ] {
        for made in MADE {
            let mut program = dial(&mut client);
            program.write_all(request).unwrap();
            let (mut at_host, asked) = host.next();
            assert_eq!(
                asked,
                json!({ "version": 1, "host": "b.example", "port": 443, "how": how, "without_credit": true })
            );
            at_host.get_mut().write_all(made).unwrap();
            let mut said = vec![0; answer.len()];
            program.read_exact(&mut said).unwrap();
            assert_eq!(said, answer);
            assert_eq!(read_frame(&mut at_host), (1, b"early".to_vec()));
            program.shutdown(Shutdown::Write).unwrap();
            assert_eq!(read_frame(&mut at_host), (3, Vec::new()));
            at_host.get_mut().write_all(&[frame(1, b"late"), frame(3, b"")].concat()).unwrap();
            let mut said = String::new();
            program.read_to_string(&mut said).unwrap();
            assert_eq!(said, "late");
        }
    }
    // One that the host hangs up on is reset, and does not just end.
    for made in MADE {
        let mut program = dial(&mut client);
        program.write_all(b"CONNECT b.example:443 HTTP/1.1\r\n\r\n").unwrap();
        let (mut at_host, _) = host.next();
        at_host.get_mut().write_all(made).unwrap();
        let mut program = BufReader::new(program);
        head(&mut program);
        drop(at_host);
        assert!(program.read(&mut [0]).is_err());
    }
}

#[test]
fn the_next_connection_to_the_host_is_made_before_a_program_asks_for_it() {
    let (guest, host) = start(true);
    let mut client = guest.client();
    let proxy = variable(&mut client, "http_proxy");
    let ask = || {
        let mut program = TcpStream::connect(proxy.strip_prefix("http://").unwrap()).unwrap();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        program.write_all(b"CONNECT b.example:443 HTTP/1.1\r\n\r\n").unwrap();
        BufReader::new(program)
    };
    let made = |mut at_host: BufReader<UnixStream>, program: &mut BufReader<TcpStream>| {
        at_host.get_mut().write_all(MADE[1]).unwrap();
        assert!(head(program).starts_with("HTTP/1.1 200 "));
    };
    let mut program = ask();
    made(host.next().0, &mut program);
    let mut spare = host.next_silent();
    let mut program = ask();
    let mut line = String::new();
    spare.read_line(&mut line).unwrap();
    assert!(line.contains("b.example"), "{line}");
    made(spare, &mut program);
    // One that the host has given up is not used.
    drop(host.next_silent());
    let mut program = ask();
    made(host.next().0, &mut program);
    // If nobody asks, it ends.
    assert_eq!(host.next_silent().read_line(&mut line).unwrap(), 0);
}

#[test]
fn a_plain_request_is_one_a_connection() {
    let (guest, host) = start(true);
    let mut client = guest.client();
    let mut program = dial(&mut client);
    program
        .write_all(b"POST http://b.example/x HTTP/1.1\r\nHost: b.example\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nbodyGET http://c.example/ HTTP/1.1\r\n\r\n")
        .unwrap();
    let (mut at_host, asked) = host.next();
    assert_eq!(
        asked,
        json!({ "version": 1, "host": "b.example", "port": 80, "how": "http", "without_credit": true })
    );
    at_host.get_mut().write_all(MADE[1]).unwrap();
    let expected =
        "POST /x HTTP/1.1\r\nHost: b.example\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody";
    let mut said = String::new();
    while said.len() < expected.len() {
        let (kind, payload) = read_frame(&mut at_host);
        assert_eq!(kind, 1);
        said.push_str(std::str::from_utf8(&payload).unwrap());
    }
    assert_eq!(said, expected);
    let answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nfine";
    at_host.get_mut().write_all(&[frame(1, answer), frame(3, b"")].concat()).unwrap();
    let mut said = Vec::new();
    // What it sent too much may make of the end a reset.
    let _ = program.read_to_end(&mut said);
    assert_eq!(said, answer);
    assert_eq!(read_frame(&mut at_host), (3, Vec::new()));
}

#[test]
fn a_refusal_reaches_the_program_and_the_result_of_its_command() {
    let (guest, host) = start(true);
    let mut client = guest.client();
    let address = variable(&mut client, "http_proxy");
    let (ip, port) = address.strip_prefix("http://").unwrap().split_once(':').unwrap();
    let line = format!(
        "exec 3<>/dev/tcp/{ip}/{port}; printf 'GET http://b.example:443/ HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    );
    let answering = std::thread::spawn(move || {
        let (mut at_host, _) = host.next();
        at_host.get_mut().write_all(DENIED).unwrap();
        host
    });
    let result = client.good("run_command", json!({ "argv": ["bash", "-c", line] }));
    let host = answering.join().unwrap();
    let said = stream(&result, "stdout");
    assert!(said.starts_with("HTTP/1.1 403 ") && said.contains("\"reason\":\"name_not_allowed\""), "{said}");
    let header = result["content"][0]["text"].as_str().unwrap();
    let note = "\nnote: while it ran, 1 connection was refused by policy: b.example:443 (name not allowed); ask for vm_update \
                network.allow=[\"a\",\"b.example:443\"]";
    assert!(header.ends_with(note), "{header}");
    assert_eq!(facts(&result)["network_denied"][0]["count"], 1);
    assert!(facts(&client.good("run_command", json!({ "command": "true" })))["network_denied"].is_null());

    // The codes of SOCKS5 and HTTP.
    for (failure, reply, status) in [
        ("denied", 2, "403"),
        ("refused", 5, "502"),
        ("no_such_name", 4, "502"),
        ("unreachable", 3, "502"),
        ("timeout", 4, "504"),
        ("invalid", 1, "400"),
        ("failed", 1, "502"),
    ] {
        let error = format!("{{\"error\":{{\"failure\":\"{failure}\",\"message\":\"no\"}}}}\n");
        let mut program = dial(&mut client);
        program.write_all(b"\x05\x01\x00\x05\x01\x00\x01\x01\x02\x03\x04\x00\x50").unwrap();
        let (mut at_host, asked) = host.next();
        assert_eq!((&asked["host"], &asked["port"]), (&json!("1.2.3.4"), &json!(80)));
        at_host.get_mut().write_all(error.as_bytes()).unwrap();
        let mut said = Vec::new();
        program.read_to_end(&mut said).unwrap();
        assert_eq!(said[..4], [5, 0, 5, reply], "{failure}");
        let mut program = dial(&mut client);
        program.write_all(b"CONNECT b.example:443 HTTP/1.1\r\n\r\n").unwrap();
        let (mut at_host, _) = host.next();
        at_host.get_mut().write_all(error.as_bytes()).unwrap();
        let mut said = String::new();
        program.read_to_string(&mut said).unwrap();
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{failure}: {said}");
    }
}

#[test]
fn what_is_no_request_is_refused_without_asking_the_host() {
    let (guest, _host) = start(true);
    let mut client = guest.client();
    for (bytes, answer) in [
        (&b"\x05\x01\x02"[..], &b"\x05\xff"[..]),
        (b"\x05\x01\x00\x05\x02\x00\x01\x01\x02\x03\x04\x00\x50", b"\x05\x00\x05\x07"),
        (b"\x05\x01\x00\x05\x01\x00\x02\x01\x02\x03\x04\x00\x50", b"\x05\x00\x05\x08"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\x00\x01\x02\r\n\r\n", b"HTTP/1.1 400 "),
    ] {
        let mut program = dial(&mut client);
        program.write_all(bytes).unwrap();
        let mut said = Vec::new();
        program.read_to_end(&mut said).unwrap();
        assert!(said.starts_with(answer), "{bytes:?}: {said:?}");
    }
    // A head without an end.
    let mut program = dial(&mut client);
    let long = [b"GET http://a/ HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 100_000]].concat();
    let _ = program.write_all(&long);
    let mut said = Vec::new();
    let _ = program.read_to_end(&mut said);
    assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 431 "));
}

#[test]
fn services_find_it_as_commands_do() {
    let (guest, _host) = start_with(true, |directory| {
        let place = directory.join("services.d");
        std::fs::create_dir(&place).unwrap();
        let line = format!("echo $http_proxy $HTTP_PROXY > '{}'", directory.join("seen").display());
        std::fs::write(place.join("look.json"), json!({ "command": line, "restart": "no" }).to_string())
            .unwrap();
    });
    let address = variable(&mut guest.client(), "http_proxy");
    assert!(address.starts_with("http://127.0.0.1:"), "{address}");
    until("the service has written", || {
        std::fs::read_to_string(guest.path("seen")).is_ok_and(|seen| seen == format!("{address} {address}\n"))
    });
}

#[test]
fn the_host_switches_it_on_and_off() {
    let (guest, _host) = start(false);
    let mut client = guest.client();
    assert_eq!(variable(&mut client, "http_proxy"), "");
    assert_eq!(client.request("nexus/proxy", json!({ "enabled": true }))["result"], json!({}));
    let address = variable(&mut client, "http_proxy");
    assert!(address.starts_with("http://127.0.0.1:"), "{address}");
    assert_eq!(variable(&mut client, "ALL_PROXY"), address.replace("http://", "socks5h://"));
    assert_eq!(client.request("nexus/proxy", json!({ "enabled": false }))["result"], json!({}));
    assert_eq!(variable(&mut client, "http_proxy"), "");
    assert_eq!(client.request("nexus/proxy", json!({ "enabled": true }))["result"], json!({}));
    until("it listens where it did", || variable(&mut client, "http_proxy") == address);
    assert_eq!(client.request("nexus/proxy", json!({}))["error"]["code"], -32602);
}
