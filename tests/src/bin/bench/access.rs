//! What tokens, the audit log and subscriptions cost: a call's time with and without them, with many tokens and a full log, and the daemon's memory
//! with many sessions.

use std::net::SocketAddr;
use std::time::Duration;

use nexus_tests::client::Client;
use nexus_tests::daemon::Daemon;
use rusqlite::Connection;
use serde_json::json;

use super::Options;
use super::calls::{THROUGH, ask_often, create};
use super::memory::settled;
use super::samples::{Samples, show};
use super::table::Table;
use super::wires::{self, Http, Wire, check, request};

/// How much tokens and the audit log's file may add to a call.
const ON_TOP: Duration = Duration::from_micros(5);
/// How long the list of the default set may take.
const LIST: Duration = Duration::from_millis(1);
/// How much slower a call may be with many tokens and a full log.
const SLOWER: f64 = 1.05;
const TOKENS: usize = 1000;
const ROWS: usize = 1_000_000;
const SESSIONS: usize = 256;
const VMS: usize = 50;
/// The daemon's memory with these sessions, in MiB.
const MEMORY: f64 = 60.0;
/// How often the two sides alternate.
const TURNS: usize = 10;

const VM_LIST: &str = r#"{"name":"vm_list","arguments":{}}"#;
const AUDIT_LIST: &str = r#"{"name":"audit_list","arguments":{}}"#;

pub(crate) fn measure(options: &Options) -> Table {
    let mut table = Table::new("Tokens, the audit log, lists and subscriptions (p50 / p99)");
    calls(options, &mut table);
    sessions(options, &mut table);
    table.note(
        "Every call is in the audit log, which cannot be switched off: the yardstick is a call of the daemon's user, without a file for the log. \
         The list's yardstick is a `ping` on the same stream.",
    );
    table
}

/// A daemon with a VM; with a file for the audit log, many tokens and a full log. Returns the secret of a token for the VM.
fn daemon(tokens: usize, rows: usize) -> (Daemon, String) {
    let mut daemon = Daemon::start_with_processes(&[]);
    create(&daemon);
    let mut client = daemon.client();
    let mut token = |at: usize| {
        let arguments = json!({ "name": format!("token-{at}"), "scopes": ["read", "exec", "admin"], "vms": ["web-1"],
            "tools": "all", "quota": { "vms": 3 } });
        client.must("token_create", arguments)["token"].as_str().expect("a secret").to_owned()
    };
    let secrets: Vec<String> = (0..tokens.max(1)).map(&mut token).collect();
    drop(client);
    let file = daemon.state().join("audit.jsonl");
    daemon.set("NEXUS_AUDIT_FILE", file.to_str());
    daemon.stop();
    fill(&daemon, rows);
    daemon.restart();
    daemon.client().wait_for_state("web-1", "ready");
    let last = secrets.into_iter().next_back().expect("there is one");
    (daemon, last)
}

/// Adds calls to the log of a daemon that does not run.
fn fill(daemon: &Daemon, rows: usize) {
    let db = Connection::open(daemon.state().join("nexus.db")).expect("the database");
    let sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1)
        INSERT INTO calls (at, owner, tool, vm_id, duration_us, outcome, boot_id, rule, denied, bytes_in, bytes_out, traceparent)
        SELECT 1700000000000 + i, 'uid:' || (i % 50), 'run_command', 1 + i % 40, i % 5000, 'ok', 1 + i % 40, 'exec', 0, 100, 500, NULL FROM n";
    if rows > 0 {
        db.execute(sql, [i64::try_from(rows).expect("few")]).expect("rows are added");
    }
}

/// Calls of one caller: plain, with a token, and with all that there can be.
fn calls(options: &Options, table: &mut Table) {
    let plain = Daemon::start_with_processes(&[]);
    create(&plain);
    let (few, one) = daemon(1, 0);
    let (full, other) = daemon(options.times(TOKENS), options.times(ROWS));
    let mut owner = wires::upgraded(&plain.socket()).expect("a stream to the daemon");
    let mut holder =
        wires::upgraded_at(&few.socket(), "/mcp", &bearer(&one)).expect("a stream for the token");
    let mut crowded =
        wires::upgraded_at(&full.socket(), "/mcp", &bearer(&other)).expect("a stream for the token");
    let mut work =
        wires::upgraded_at(&plain.socket(), "/mcp?tools=work", "").expect("a stream to the daemon");

    let (mut off, mut on) = (Samples::default(), Samples::default());
    let kinds = [
        ("a no-op in the VM", THROUGH, 4000),
        ("`vm_list`", VM_LIST, 2000),
        ("`audit_list`", AUDIT_LIST, 500),
    ];
    let mut pairs = [(); 3].map(|()| (Samples::default(), Samples::default()));
    let (mut list, mut ping) = (Samples::default(), Samples::default());
    for _ in 0..TURNS {
        let times = options.times(5000) / TURNS;
        let no_op = request(1, "tools/call", THROUGH);
        off.extend(ask_often(&mut owner, &no_op, times));
        on.extend(ask_often(&mut holder, &no_op, times));
        for ((_, params, times), (less, more)) in kinds.iter().zip(&mut pairs) {
            let (call, times) = (request(1, "tools/call", params), options.times(*times) / TURNS);
            less.extend(ask_often(&mut holder, &call, times));
            more.extend(ask_often(&mut crowded, &call, times));
        }
        let times = options.times(1000) / TURNS;
        ping.extend(ask_often(&mut work, &request(1, "ping", "{}"), times));
        list.extend(ask_often(&mut work, &request(1, "tools/list", "{}"), times));
    }
    let on_top = on.p50().saturating_sub(off.p50());
    table.judged(
        "a no-op with a token, quotas and a file for the audit log",
        on.pair(0.5, 0.99),
        off.pair(0.5, 0.99),
        format!("+{}", show(on_top)),
        ("≤ 5 µs on top", on_top <= ON_TOP),
    );
    let (tokens, rows) = (options.times(TOKENS), options.times(ROWS));
    for ((what, _, _), (less, more)) in kinds.iter().zip(&pairs) {
        let ratio = more.p50().as_secs_f64() / less.p50().as_secs_f64();
        table.judged(
            format!("{what}, with {tokens} tokens and {rows} calls in the log"),
            more.pair(0.5, 0.99),
            less.pair(0.5, 0.99),
            format!("{ratio:.2} x"),
            ("≤ 1.05 x", ratio <= SLOWER),
        );
    }
    table.judged(
        "`tools/list` of the default set",
        list.pair(0.5, 0.99),
        ping.pair(0.5, 0.99),
        "",
        ("p50 ≤ 1 ms", list.p50() <= LIST),
    );
}

/// The daemon's memory with many sessions, each subscribed to many VMs that change.
fn sessions(options: &Options, table: &mut Table) {
    let daemon = Daemon::start_with_processes(&["--http", "127.0.0.1:0"]);
    let root = daemon.state().join("rootfs");
    std::fs::create_dir(&root)
        .and_then(|()| std::fs::write(root.join("file"), "x"))
        .expect("a root filesystem");
    let from = format!("file:{}", root.display());
    let mut client = daemon.client();
    for at in 0..VMS {
        let arguments = json!({ "name": vm(at), "from": from, "start": false, "disk": "64MiB" });
        client.to_the_end("vm_create", arguments, Duration::from_mins(1));
    }
    let before = settled(daemon.pid());
    let (url, token) = daemon.http();
    let address = url.split('/').nth(2).and_then(|address| address.parse::<SocketAddr>().ok());
    let address = address.expect("an address with a port");
    let count = options.times(SESSIONS);
    let sessions: Vec<Http> = (0..count)
        .map(|_| {
            let mut session = Http::open(address, &token).expect("a session over HTTP");
            for at in 0..VMS {
                let subscribe =
                    request(1 + at, "resources/subscribe", &format!(r#"{{"uri":"nexus://vm/{}"}}"#, vm(at)));
                check(&subscribe, session.ask(&subscribe).expect("an answer"));
            }
            session
        })
        .collect();
    for round in 0..4 {
        change_all(&mut client, round);
    }
    let with = settled(daemon.pid());
    table.judged(
        format!("nexusd with {count} sessions, each subscribed to {VMS} VMs, after changes of all, resident"),
        format!("{with:.1} MiB"),
        format!("{before:.1} MiB"),
        "",
        ("< 60 MiB", with < MEMORY),
    );
    drop(sessions);
}

fn vm(at: usize) -> String {
    format!("vm-{at}")
}

fn change_all(client: &mut Client, round: usize) {
    for at in 0..VMS {
        client.must("vm_update", json!({ "vm": vm(at), "tags": { "round": round.to_string() } }));
    }
}

/// The line of a request's head for a token.
fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}
