//! The network of a VM through its proxy, with servers of this test. A machine that is a process shares the host's loopback, so
//! its proxy can be used from here; the daemon decides what it can reach, and dials.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::daemon::kill_process;
use nexus_tests::web::Web;
use serde_json::{Value, json};

use crate::echo::{ACCEPTED, echo};
use crate::streams::{ended, nexusctl};
use crate::world::{SOON, World, refused, soon};

fn create(world: &World, client: &mut Client, network: &Value) -> Value {
    let mut arguments = world.arguments("web");
    arguments["network"] = network.clone();
    client.create(arguments)
}

/// Runs a line in the machine; returns the whole result.
pub(crate) fn run(client: &mut Client, line: &str) -> Value {
    client.call_whole("guest_run_command", json!({ "vm": "web", "command": line })).expect("it runs")
}

pub(crate) fn text(result: &Value) -> String {
    let blocks = result["content"].as_array().expect("a result has content").iter();
    blocks.map(|block| block["text"].as_str().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The address of the machine's proxy.
pub(crate) fn proxy(client: &mut Client) -> String {
    let said = text(&run(client, "echo \"at $http_proxy\""));
    let at = said.split("at http://").nth(1).unwrap_or_else(|| panic!("no proxy: {said}"));
    at.split_whitespace().next().expect("an address").to_owned()
}

fn dial(proxy: &str) -> TcpStream {
    let stream = TcpStream::connect(proxy).expect("the proxy listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout can be set");
    stream
}

/// Asks the proxy for a tunnel; returns the stream and the head of the response.
pub(crate) fn connect(proxy: &str, to: &str) -> (BufReader<TcpStream>, String) {
    let mut stream = dial(proxy);
    write!(stream, "CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").expect("the proxy reads");
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head).expect("the proxy answers") > 0 {}
    (stream, head)
}

/// Requests a URL through the proxy; returns the whole response.
fn get(proxy: &str, url: &str) -> String {
    let mut stream = dial(proxy);
    write!(stream, "GET {url} HTTP/1.1\r\nHost: x\r\nProxy-Connection: keep-alive\r\n\r\n")
        .expect("the proxy reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the proxy answers");
    answer
}

fn counts(client: &mut Client) -> Value {
    client.inspect("web")["network"]["counts"].clone()
}

#[test]
fn what_the_policy_names_is_reached_and_counted() {
    let (world, web, port) = (World::new(), Web::start(), echo());
    web.put("/hello", *b"world");
    let mut client = world.client();
    let url = web.url("/hello");
    let web_at = url.trim_start_matches("http://").trim_end_matches("/hello").to_owned();
    let allow = json!([web_at, format!("127.0.0.1:{port}")]);
    let made = create(&world, &mut client, &json!({ "allow": allow }));
    assert_eq!((&made["network"]["mode"], &made["network"]["preset"]), (&json!("proxy"), &json!("internet")));
    assert_eq!(made["network"]["allow"], allow);
    let proxy = proxy(&mut client);

    // Plain HTTP, one request per connection.
    let answer = get(&proxy, &url);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nworld"), "{answer}");

    // A tunnel with much data in both directions at once, and a half-close.
    let (stream, head) = connect(&proxy, &format!("127.0.0.1:{port}"));
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let much: Vec<u8> = (0..3_000_000_u32).map(|number| (number * 31 / 7) as u8).collect();
    let mut writing = stream.get_ref().try_clone().expect("a socket can be cloned");
    let sent = much.clone();
    let writer = thread::spawn(move || {
        writing.write_all(&sent).and_then(|()| writing.shutdown(Shutdown::Write)).expect("all is written");
    });
    let mut back = Vec::new();
    let mut stream = stream;
    stream.read_to_end(&mut back).expect("all comes back");
    writer.join().expect("the writer ends");
    assert!(back[..much.len()] == much && back[much.len()..] == *b"3000000");

    // SOCKS5 with an address.
    let mut socks = dial(&proxy);
    let [high, low] = port.to_be_bytes();
    socks.write_all(&[5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, high, low]).expect("the proxy reads");
    let mut answer = [0; 12];
    socks.read_exact(&mut answer).expect("the proxy answers");
    assert_eq!(answer, [5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    socks.write_all(b"abc").and_then(|()| socks.shutdown(Shutdown::Write)).expect("it is written");
    let mut said = String::new();
    socks.read_to_string(&mut said).expect("it is answered");
    assert_eq!(said, "abc3");

    // Nobody listens there: that is not a refusal by policy, and has a different answer.
    let closed =
        TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port is free").port();
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": ["127.0.0.1"] } }));
    let answer = get(&proxy, &format!("http://127.0.0.1:{closed}/"));
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("connection refused"), "{answer}");

    soon("the connections are counted", || {
        let counts = counts(&mut client);
        let is =
            counts["allowed"] == 3 && counts["failed"] == 1 && counts["denied"] == 0 && counts["open"] == 0;
        is.then_some(())
    });
    let bytes = counts(&mut client);
    assert!(bytes["sent_bytes"].as_u64() > Some(3_000_000), "{bytes}");
    assert!(bytes["received_bytes"].as_u64() > Some(3_000_000), "{bytes}");
    world.assert_in_order();
}

#[test]
fn a_limit_of_bandwidth_holds_and_changes_at_once() {
    let (world, port) = (World::new(), echo());
    let mut client = world.client();
    let here = format!("127.0.0.1:{port}");
    let limit = json!({ "rx": "64MiB", "tx": "2MiB" });
    let made = create(&world, &mut client, &json!({ "allow": [here], "bandwidth": limit }));
    assert_eq!(made["network"]["bandwidth"], limit);
    let refused = client
        .call("vm_update", json!({ "vm": "web", "network": { "bandwidth": { "tx": "1KiB" } } }))
        .expect_err("it is too little");
    assert!(refused.text.contains("network.bandwidth.tx is 1KiB a second"), "{}", refused.text);
    let proxy = proxy(&mut client);
    let carry = || {
        let begun = Instant::now();
        let (mut stream, head) = connect(&proxy, &here);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let mut writing = stream.get_ref().try_clone().expect("a socket can be cloned");
        let writer = thread::spawn(move || {
            let all = writing.write_all(&[7; 3 << 20]);
            all.and_then(|()| writing.shutdown(Shutdown::Write)).expect("all is written");
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("all comes back");
        writer.join().expect("the writer ends");
        assert!(back.len() > 3 << 20, "{}", back.len());
        begun.elapsed()
    };
    let slow = Duration::from_millis(1200);
    let limited = carry();
    assert!(limited >= slow, "{limited:?}");
    let changed = client.must("vm_update", json!({ "vm": "web", "network": { "bandwidth": {} } }));
    assert_eq!(changed["network"]["bandwidth"], Value::Null);
    let free = carry();
    assert!(free < slow, "{free:?}, and {limited:?} before");
    world.assert_in_order();
}

#[test]
fn what_the_policy_does_not_name_is_refused_and_the_command_says_so() {
    let (world, port) = (World::new(), echo());
    let mut client = world.client();
    create(&world, &mut client, &json!({}));
    let proxy = proxy(&mut client);
    let here = format!("127.0.0.1:{port}");
    let before = ACCEPTED.load(Ordering::Relaxed);
    let mut follower = nexusctl(&world, &["network", "log", "web", "-f"]).spawn().expect("nexusctl runs");

    let answer = get(&proxy, &format!("http://{here}/"));
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 403 "), "{answer}");
    let body: Value = serde_json::from_str(body).expect("the body is JSON");
    assert_eq!(
        (&body["error"], &body["reason"], &body["host"]),
        (&json!("denied by policy"), &json!("host"), &json!("127.0.0.1"))
    );
    let hint = format!("ask for vm_update network.allow=[\"*\",\"{here}\"]");
    assert_eq!(body["hint"], hint);

    // Who follows the log is told at once.
    let mut line = String::new();
    BufReader::new(follower.stdout.take().expect("its output")).read_line(&mut line).expect("a line");
    assert!(
        line.contains(" denied ") && line.contains(&here) && line.contains("an address of the host"),
        "{line}"
    );
    kill_process(follower.id());
    ended(&mut follower);

    // A name that resolves to a private address is refused, whether or not the list contains it.
    let (_, head) = connect(&proxy, &format!("localhost:{port}"));
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": ["localhost"] } }));
    let (_, head) = connect(&proxy, &format!("localhost:{port}"));
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    // Other names are not even resolved.
    let (_, head) = connect(&proxy, "nowhere.invalid:443");
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": [] } }));
    let (_, head) = connect(&proxy, "2130706433:80");
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");

    // SOCKS5 with a name.
    let mut socks = dial(&proxy);
    let [high, low] = port.to_be_bytes();
    socks
        .write_all(&[&[5, 1, 0, 5, 1, 0, 3, 9][..], b"localhost", &[high, low]].concat())
        .expect("the proxy reads");
    let mut answer = Vec::new();
    socks.read_to_end(&mut answer).expect("the proxy answers");
    assert_eq!(answer[..4], [5, 0, 5, 2]);
    assert_eq!(ACCEPTED.load(Ordering::Relaxed), before, "nothing is dialled before the policy allows it");

    // In the machine: a program that uses the proxy through its shell alone.
    let (host, at) = proxy.split_once(':').expect("an address");
    let line = format!(
        "exec 3<>/dev/tcp/{host}/{at}; printf 'CONNECT {here} HTTP/1.1\\r\\n\\r\\n' >&3; head -n 1 <&3"
    );
    let command = json!({ "vm": "web", "argv": ["bash", "-c", line] });
    let result = client.call_whole("guest_run_command", command).expect("it runs");
    let said = text(&result);
    let note = format!(
        "note: while it ran, 1 connection was refused by policy: {here} (an address of the host); {hint}"
    );
    assert!(said.contains(&note) && said.contains("HTTP/1.1 403"), "{said}");
    let facts = &result["_meta"]["dev.nexus/result"]["network_denied"];
    assert_eq!(*facts, json!([{ "host": "127.0.0.1", "port": port, "reason": "host", "count": 1 }]));
    assert!(!text(&run(&mut client, "true")).contains("refused"), "a later command met none");

    let log = soon("the last one is in the log", || {
        let log = client.must("network_log", json!({ "vm": "web", "limit": 2 }));
        let last = log["connections"].as_array()?.last()?;
        let is_it = last["verdict"] == "denied" && last["reason"] == "host" && last["port"] == port;
        is_it.then(|| log.clone())
    });
    let told = client.must("events_wait", json!({ "vm": "web", "kinds": ["denied"], "limit": 500 }));
    let told = told["events"].as_array().expect("a list");
    let is_told = |event: &Value| event["text"].as_str().is_some_and(|text| text.contains(&here));
    assert!(told.iter().any(is_told), "{told:?}");
    let after = client.must("network_log", json!({ "vm": "web", "cursor": log["cursor"] }));
    assert_eq!(after["connections"], json!([]));
    let network = client.inspect("web")["network"].clone();
    assert_eq!(
        (&network["counts"]["allowed"], &network["counts"]["denied"]),
        (&json!(0), &json!(6)),
        "{network}"
    );
    assert_eq!(network["denied"].as_array().map(Vec::len), Some(6));
    assert_eq!(network["denied"][0]["hint"], hint);

    // Following the hint works.
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": ["*", here] } }));
    let (mut stream, head) = connect(&proxy, &here);
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    stream.get_mut().write_all(b"x").expect("it is written");
    stream.read_exact(&mut [0]).expect("it comes back");
}

#[test]
fn a_change_cuts_what_it_does_not_allow_and_a_machine_without_network_says_so() {
    let (mut world, one, other) = (World::new(), echo(), echo());
    let mut client = world.client();
    let [here, there] = [one, other].map(|port| format!("127.0.0.1:{port}"));
    create(&world, &mut client, &json!({ "allow": [here, there] }));
    let proxy_at = proxy(&mut client);
    let open = |to: &str| {
        let (mut stream, head) = connect(&proxy_at, to);
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        stream.get_mut().write_all(b"x").expect("it is written");
        stream.read_exact(&mut [0]).expect("it comes back");
        stream
    };
    let (mut cut, mut kept) = (open(&here), open(&there));
    client.must("vm_update", json!({ "vm": "web", "network": { "deny": [here] } }));
    let ended = cut.read(&mut [0]);
    assert!(ended.is_err(), "it is reset: {ended:?}");
    kept.get_mut().write_all(b"y").expect("the other lives on");
    kept.read_exact(&mut [0]).expect("it comes back");

    // The policy survives a restart of the daemon, and the machine's proxy keeps working.
    world.daemon.kill();
    world.daemon.restart();
    let mut client = world.client();
    let network = client.inspect("web")["network"].clone();
    assert_eq!((&network["allow"], &network["deny"]), (&json!([here, there]), &json!([here])));
    let (_, head) = soon("the proxy reaches the daemon", || {
        let (stream, head) = connect(&proxy_at, &there);
        head.starts_with("HTTP/1.1 200 ").then_some((stream, head))
    });
    assert!(head.starts_with("HTTP/1.1 200 "));
    let (_, head) = connect(&proxy_at, &here);
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");

    // It also survives a restart of the machine.
    client.must("vm_stop", json!({ "vm": "web", "wait_s": 45 }));
    client.must("vm_start", json!({ "vm": "web", "wait_s": 45 }));
    let proxy_at = proxy(&mut client);
    let (_, head) = connect(&proxy_at, &here);
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");

    // Without a network, commands get no proxy variables, and the proxy refuses with a reason.
    client.must("vm_update", json!({ "vm": "web", "network": "none" }));
    soon("commands are not told of a proxy", || {
        text(&run(&mut client, "echo \"at ${http_proxy:-nowhere}\"")).contains("at nowhere").then_some(())
    });
    let answer = get(&proxy_at, &format!("http://{there}/"));
    assert!(
        answer.contains("\"reason\":\"no_network\"") && answer.contains("ask for vm_update network="),
        "{answer}"
    );
    client.must("vm_update", json!({ "vm": "web", "network": { "mode": "proxy", "deny": [] } }));
    soon("commands are told of it again", || {
        text(&run(&mut client, "echo \"at $http_proxy\"")).contains(&proxy_at).then_some(())
    });
    let (_, head) = connect(&proxy_at, &here);
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");

    // The same with an address of IPv6, also by SOCKS5.
    let six = TcpListener::bind("[::1]:0").expect("a port is free");
    let at = six.local_addr().expect("it has an address");
    let (_, head) = connect(&proxy_at, &at.to_string());
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    client.must("vm_update", json!({ "vm": "web", "network": { "allow": [at.to_string()] } }));
    let (_stream, head) = connect(&proxy_at, &at.to_string());
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let mut socks = dial(&proxy_at);
    let address = Ipv6Addr::LOCALHOST.octets();
    let asked = [&[5, 1, 0, 5, 1, 0, 4][..], &address, &at.port().to_be_bytes()].concat();
    socks.write_all(&asked).expect("the proxy reads");
    let mut answer = [0; 4];
    socks.read_exact(&mut answer).expect("the proxy answers");
    assert_eq!(answer, [5, 0, 5, 0]);
    for _ in 0..2 {
        six.accept().expect("it is connected");
    }
    world.assert_in_order();
}

#[test]
fn defaults_and_mistakes() {
    let world = World::new();
    let mut client = world.client();
    for (network, words) in [
        (json!("bridge"), "must be an object, or one of none, proxy, nat, internet, open, packages"),
        (json!({ "mode": "bridge" }), "must be one of none, proxy, nat"),
        (json!({ "groups": ["web"] }), "network.groups need network.mode nat"),
        (json!({ "preset": "all" }), "must be one of internet, open, packages"),
        (json!({ "allow": ["https://example.org"] }), "is not a name, an address or a CIDR"),
        (json!({ "mode": "none", "allow": ["example.org"] }), "cannot be combined"),
        (json!({ "deny": ["*"] }), "denies everything"),
    ] {
        let mut arguments = world.arguments("web");
        arguments["network"] = network;
        let failure = refused(&mut client, "vm_create", arguments);
        assert!(failure.code == "invalid_argument" && failure.text.contains(words), "{}", failure.text);
    }
    // Machines that are processes have no interface; what can be refused beforehand is.
    let mut arguments = world.arguments("web");
    arguments["network"] = json!({ "mode": "nat", "groups": ["app"] });
    let failure = refused(&mut client, "vm_create", arguments);
    assert!(
        failure.code == "host_unsuitable"
            && failure.text.contains("does not support network interfaces")
            && failure.text.contains("use network proxy"),
        "{}",
        failure.text
    );
    for (key, value, words) in [
        ("network.subnet", "8.8.8.0/24", "not in a private range"),
        ("network.subnet", "10.0.0.1/24", "no bit set"),
        ("network.dns", "dns.example", "not an IP address"),
    ] {
        let failure = refused(&mut client, "settings_set", json!({ "values": { key: value } }));
        assert!(failure.text.contains(words), "{}", failure.text);
    }
    let shared = client.must("network_inspect", json!({}));
    assert_eq!(
        (&shared["nat"]["pid"], &shared["vms"]),
        (&Value::Null, &json!([])),
        "nothing was made: {shared}"
    );
    client.must("settings_set", json!({ "values": { "default.network": "none" } }));
    let made = world.create(&mut client, "web");
    assert_eq!(made["network"]["mode"], "none", "{made}");
    assert!(text(&run(&mut client, "env")).to_lowercase().matches("_proxy=").next().is_none());
    let failure = refused(&mut client, "vm_update", json!({ "vm": "web", "network": { "deny": ["*"] } }));
    assert!(failure.text.contains("denies everything"), "{}", failure.text);
    // Variables of the machine or the call override it.
    let arguments = json!({ "name": "own", "from": world.from, "disk": "128MiB", "wait_s": 45, "network": "proxy", "env": { "HTTP_PROXY": "mine" } });
    client.create(arguments);
    let command = json!({ "vm": "own", "command": "env", "env": { "no_proxy": "all" } });
    let said = text(&client.call_whole("guest_run_command", command).expect("it runs"));
    assert!(said.contains("HTTP_PROXY=mine") && said.contains("no_proxy=all"), "{said}");
    assert!(!said.contains("http_proxy=") && !said.contains("NO_PROXY="), "{said}");
    assert!(
        said.contains("all_proxy=socks5h://127.0.0.1:") && said.contains("NODE_USE_ENV_PROXY=1"),
        "{said}"
    );
}

/// 200 connections at once, and garbage: a misbehaving client harms no other.
#[test]
fn many_at_once_and_garbage_cost_little() {
    let (world, port) = (World::new(), echo());
    let mut client = world.client();
    create(&world, &mut client, &json!({ "allow": ["127.0.0.1"] }));
    let proxy = proxy(&mut client);
    let here = format!("127.0.0.1:{port}");
    let vm = client.inspect("web")["process"]["directory"].as_str().expect("a directory").to_owned();

    // On the host's side: no line, an endless line, no opening, silence; all of them at once.
    let egress = || {
        let directory = std::fs::File::open(&vm).expect("the VM's directory");
        let path = format!("/proc/self/fd/{}/v.sock_1025", std::os::fd::AsRawFd::as_raw_fd(&directory));
        let stream = UnixStream::connect(path).expect("the daemon listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout can be set");
        stream
    };
    let silent: Vec<_> = (0..50).map(|_| egress()).collect();
    for garbage in [&b"GET / HTTP/1.1\n"[..], &[b'x'; 5000], b"{\"version\":9}\n", b"\n", &[0xff; 2000]] {
        let mut stream = egress();
        // It may disconnect before it has read everything.
        let _ = stream.write_all(garbage);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.is_empty() || answer.starts_with("{\"error\":{\"failure\":\"invalid\""), "{answer}");
    }
    // Invalid frames after a valid opening end the connection.
    let mut stream = egress();
    let opening = format!("{{\"version\":1,\"host\":\"127.0.0.1\",\"port\":{port},\"how\":\"connect\"}}\n");
    stream.write_all(opening.as_bytes()).expect("it is written");
    let mut answer = BufReader::new(stream.try_clone().expect("a socket can be cloned"));
    let mut line = String::new();
    answer.read_line(&mut line).expect("it answers");
    assert_eq!(line, "{\"ok\":{}}\n");
    let _ = stream.write_all(&[0xff; 64]);
    let _ = answer.read_to_end(&mut Vec::new());

    // 200 open at once.
    let mut open: Vec<_> = (0..200)
        .map(|_| {
            let (stream, head) = connect(&proxy, &here);
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            stream
        })
        .collect();
    let slowest = (0..20).map(|_| {
        let begun = Instant::now();
        client.must("vm_list", json!({}));
        begun.elapsed()
    });
    let slowest = slowest.max().expect("calls");
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    for (number, stream) in open.iter_mut().enumerate() {
        write!(stream.get_mut(), "{number}")
            .and_then(|()| stream.get_mut().shutdown(Shutdown::Write))
            .expect("it is written");
    }
    for (number, mut stream) in open.into_iter().enumerate() {
        let mut said = String::new();
        stream.read_to_string(&mut said).expect("it comes back");
        let number = number.to_string();
        assert_eq!(said, format!("{number}{}", number.len()));
    }
    drop(silent);
    soon("no connection is left", || (counts(&mut client)["open"] == 0).then_some(()));
    // They end with the machine.
    let (mut left, head) = connect(&proxy, &here);
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    client.must("vm_stop", json!({ "vm": "web", "force": true, "wait_s": 45 }));
    let ended = left.read(&mut [0]);
    assert!(!matches!(ended, Ok(1..)), "{ended:?}");
    soon("no connection is left", || (counts(&mut client)["open"] == 0).then_some(()));
    world.assert_in_order();
}
