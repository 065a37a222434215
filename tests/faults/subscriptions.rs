//! Subscriptions to resources, in both eras: each client is told of what it sees, changes are coalesced, and whoever does not read harms nobody.

use std::io::Read;
use std::time::{Duration, Instant};

use nexus_tests::client::Client;
use nexus_tests::wait::stay;
use serde_json::{Value, json};

use crate::tokens::{http, send, session};
use crate::world::World;

/// The least time between two notifications about one resource.
const COALESCE: Duration = Duration::from_millis(250);
/// The time in which a notification that is not wanted would come.
const A_WHILE: Duration = Duration::from_millis(800);

fn all_tools(world: &World) -> Client {
    Client::connect_at(&world.daemon.socket(), "/mcp?tools=all").expect("the owner connects")
}

fn meta() -> Value {
    json!({ "io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {},
        "io.modelcontextprotocol/clientInfo": { "name": "test", "version": "0" } })
}

fn subscribe(client: &mut Client, uri: &str) {
    let answer = client.request("resources/subscribe", &json!({ "uri": uri })).expect("it is subscribed");
    assert_eq!(answer, json!({}));
}

fn change(owner: &mut Client, vm: &str, value: usize) {
    owner.must("vm_update", json!({ "vm": vm, "tags": { "n": value.to_string() } }));
}

/// Reads until an update comes; returns its URI.
#[track_caller]
fn updated(client: &mut Client) -> Value {
    loop {
        let message = client.next_message().expect("the daemon is there");
        if message["method"] == "notifications/resources/updated" {
            return message["params"]["uri"].clone();
        }
    }
}

/// The updates that came before the answer to a request that is sent now.
fn updates_until_now(client: &mut Client) -> Vec<Value> {
    let id = client.start("resources/templates/list", &json!({})).expect("it is sent");
    let mut found = Vec::new();
    loop {
        let message = client.next_message().expect("an answer");
        if message["id"] == id {
            return found;
        }
        if message["method"] == "notifications/resources/updated" {
            found.push(message["params"]["uri"].clone());
        }
    }
}

#[test]
fn two_clients_are_told_of_a_hundred_changes_in_a_few_notifications() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    world.create(&mut owner, "good-1");
    world.create(&mut owner, "good-2");
    let mut clients = [all_tools(&world), all_tools(&world)];
    let uri = "nexus://vm/good-1";
    for client in &mut clients {
        subscribe(client, uri);
        subscribe(client, uri);
    }
    subscribe(&mut clients[1], "nexus://vms");
    let begun = Instant::now();
    (0..100).for_each(|value| change(&mut owner, "good-1", value));
    stay(A_WHILE);
    let most = usize::try_from(begun.elapsed().as_millis() / COALESCE.as_millis()).expect("few") + 2;
    for (client, uris) in
        clients.iter_mut().zip([&["nexus://vm/good-1"][..], &["nexus://vm/good-1", "nexus://vms"]])
    {
        let told = updates_until_now(client);
        for uri in uris {
            let count = told.iter().filter(|told| *told == uri).count();
            assert!((1..=most).contains(&count), "{count} of at most {most}: {told:?}");
        }
        assert!(told.iter().all(|told| uris.iter().any(|uri| told == uri)), "{told:?}");
    }
    // The other VM is in the list alone; and nothing is told of what a client is not subscribed to any more.
    change(&mut owner, "good-2", 1);
    assert_eq!(updated(&mut clients[1]), "nexus://vms");
    clients[0].request("resources/unsubscribe", &json!({ "uri": uri })).expect("it is unsubscribed");
    change(&mut owner, "good-1", 100);
    stay(A_WHILE);
    assert_eq!(updates_until_now(&mut clients[0]), [0; 0]);
    // What cannot be watched is refused.
    for uri in ["nexus://vm/nowhere", "nexus://vm/good-1/console", "nexus://vm/good-1/file/etc/passwd", "x"] {
        let error =
            clients[0].request("resources/subscribe", &json!({ "uri": uri })).expect_err("it is refused");
        assert!(error.to_string().contains("-32002"), "{uri}: {error}");
    }
}

#[test]
fn a_session_over_http_is_told_of_what_changed_before_it_reads() {
    let world = World::hostile(&[("NEXUS_HTTP", "127.0.0.1:0")]);
    let mut owner = all_tools(&world);
    let (_, secret) = world.daemon.http();
    let session = session(&world, &secret, &json!({}));
    let uris = ["nexus://vm/good-1", "nexus://vm/good-2"];
    for (uri, id) in uris.iter().zip(2..) {
        world.create(&mut owner, uri.trim_start_matches("nexus://vm/"));
        let params = json!({ "uri": uri });
        let request =
            json!({ "jsonrpc": "2.0", "id": id, "method": "resources/subscribe", "params": params });
        let answer = http(&world, "POST /mcp", &secret, &session, &request.to_string());
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(r#""result":{}"#), "{answer}");
    }
    for value in 0..20 {
        change(&mut owner, "good-1", value);
    }
    change(&mut owner, "good-2", 1);
    stay(A_WHILE);
    let mut stream = send(&world, "GET /mcp", &secret, &session, "");
    let (mut told, mut piece) = (String::new(), [0; 4096]);
    while !uris.iter().all(|uri| told.contains(uri)) {
        let length = stream.read(&mut piece).expect("it is told");
        assert!(length > 0, "the stream ends: {told}");
        told.push_str(&String::from_utf8_lossy(&piece[..length]));
    }
    let count = told.matches("notifications/resources/updated").count();
    assert_eq!(count, uris.len(), "one for each resource, however often it changed: {told}");
}

#[test]
fn a_client_without_a_session_listens_until_it_cancels() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    world.create(&mut owner, "good-1");
    let mut client = all_tools(&world);
    let wanted = ["nexus://vm/good-1", "nexus://vm/good-1/console", "nexus://vm/nowhere"];
    let params = json!({ "notifications": { "resourceSubscriptions": wanted, "toolsListChanged": true }, "_meta": meta() });
    let id = client.start("subscriptions/listen", &params).expect("it is sent");
    let acknowledged = client.next_message().expect("it is acknowledged");
    assert_eq!(acknowledged["method"], "notifications/subscriptions/acknowledged", "{acknowledged}");
    assert_eq!(
        acknowledged["params"]["notifications"],
        json!({ "resourceSubscriptions": ["nexus://vm/good-1"] }),
        "{acknowledged}"
    );
    change(&mut owner, "good-1", 1);
    let told = client.next_message().expect("it is told");
    assert_eq!(told["params"]["uri"], "nexus://vm/good-1", "{told}");
    assert_eq!(told["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"], id, "{told}");
    let cancel =
        json!({ "jsonrpc": "2.0", "method": "notifications/cancelled", "params": { "requestId": id } });
    client.send_line(&cancel.to_string()).expect("it is sent");
    stay(COALESCE);
    change(&mut owner, "good-1", 2);
    stay(A_WHILE);
    let left = client.request("tools/call", &json!({ "name": "vm_list", "arguments": {}, "_meta": meta() }));
    left.expect("the client is served all the same");
}

#[test]
fn a_token_is_told_of_nothing_of_others_and_of_nothing_once_it_is_revoked() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    world.create(&mut owner, "good-1");
    world.create(&mut owner, "good-2");
    let made = owner.must("token_create", json!({ "vms": ["good-1"], "tools": "all" }));
    let secret = made["token"].as_str().expect("a secret");
    let mut agent = Client::connect_with(&world.daemon.socket(), secret).expect("the holder connects");
    subscribe(&mut agent, "nexus://vms");
    subscribe(&mut agent, "nexus://vm/good-1");
    let refused = |agent: &mut Client, vm: &str| {
        let uri = format!("nexus://vm/{vm}");
        let error = agent.request("resources/subscribe", &json!({ "uri": uri })).expect_err("it is refused");
        error.to_string().replace(vm, "X")
    };
    assert_eq!(refused(&mut agent, "good-2"), refused(&mut agent, "nowhere"));
    change(&mut owner, "good-2", 1);
    stay(A_WHILE);
    assert_eq!(updates_until_now(&mut agent), [0; 0]);
    change(&mut owner, "good-1", 1);
    let mut told = [updated(&mut agent), updated(&mut agent)].map(|uri| uri.to_string());
    told.sort();
    assert_eq!(told, [r#""nexus://vm/good-1""#, r#""nexus://vms""#]);
    owner.must_confirmed("token_revoke", json!({ "token": made["id"] }));
    change(&mut owner, "good-1", 2);
    while let Ok(message) = agent.next_message() {
        assert_ne!(message["method"], "notifications/resources/updated", "{message}");
    }
}

#[test]
fn a_subscriber_that_never_reads_slows_nothing() {
    let world = World::hostile(&[]);
    let mut owner = all_tools(&world);
    world.create(&mut owner, "good-1");
    let mut deaf: Vec<Client> = (0..20).map(|_| all_tools(&world)).collect();
    for client in &mut deaf {
        subscribe(client, "nexus://vms");
        subscribe(client, "nexus://vm/good-1");
    }
    let mut reader = all_tools(&world);
    subscribe(&mut reader, "nexus://vm/good-1");
    let memory = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", world.daemon.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    // Warm, so that only what subscribers cost is measured.
    (0..50).for_each(|value| change(&mut owner, "good-1", value));
    updated(&mut reader);
    let before = memory();
    for value in 0..500 {
        change(&mut owner, "good-1", value);
    }
    assert_eq!(updated(&mut reader), "nexus://vm/good-1");
    let grown = memory().saturating_sub(before);
    assert!(grown < 16 << 10, "the daemon has grown by {grown} KiB");
}
