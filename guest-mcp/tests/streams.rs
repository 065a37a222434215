//! Streams of their own: commands and TCP, each on a connection to port 201.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/frames.rs"]
mod host;

mod common;

use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::{Guest, configure, facts, spawn, stream, wait};
use host::{Output, attach, exec, line, open, open_raw, read_all, try_open, until};
use nexus_schema::ErrorCode;
use nexus_schema::stream::{
    Answer, AttachOpening, Control, Done, Ended, ExecOpening, Open, Opened, TcpOpening,
};
use nexus_schema::tools::command::CommandStartParams;
use nexus_wire::frames::{Incoming, Kind, WINDOW};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn numbers(last: u32) -> Vec<u8> {
    (1..=last).map(|n| format!("{n}\n")).collect::<String>().into_bytes()
}

/// The request for a TCP stream, and a frame of data behind it. The newline that is sent after all this belongs to the frame.
fn with_early_data(port: u16, bytes: &[u8]) -> Vec<u8> {
    let line = format!("{}\n", json!({ "version": 1, "open": { "tcp": { "port": port } } }));
    [line.as_bytes(), &Kind::Data.header(bytes.len() + 1), bytes].concat()
}

fn ok(status: u8) -> Ended {
    Ended { status: Some(status), ..Ended::default() }
}

#[tokio::test]
async fn an_attached_command_is_exact_to_the_byte_in_both_directions() {
    let guest = Guest::start();
    // Far more than is kept of any command, on both streams at once.
    let text = "seq 1 2000000 & seq 1 500000 >&2 & wait; exit 3";
    let mut stream = open(guest.directory.path(), exec(line(text))).await;
    let (output, ended) = stream.all().await;
    assert!(output.stdout == numbers(2_000_000), "{} bytes", output.stdout.len());
    assert!(output.stderr == numbers(500_000), "{} bytes", output.stderr.len());
    assert_eq!(ended, ok(3));

    let cat = CommandStartParams { stdin_open: true, ..line("cat; echo over") };
    let mut stream = open(guest.directory.path(), exec(cat)).await;
    assert!(stream.opened.writer && !stream.opened.tty);
    let (sender, sent) = (stream.sender.clone(), numbers(2_000_000));
    let sending = tokio::spawn(async move {
        sender.data(&sent).await.unwrap();
        sender.end().await.unwrap();
    });
    let (output, ended) = stream.all().await;
    sending.await.unwrap();
    assert!(output.stdout == [&numbers(2_000_000), &b"over\n"[..]].concat());
    assert_eq!(ended, ok(0));
}

#[tokio::test]
async fn a_command_that_wants_no_input_ends_all_the_same() {
    let guest = Guest::start();
    for stdin_open in [true, false] {
        let start = CommandStartParams { stdin_open, ..line("exec <&-; echo closed; sleep 0.2; exit 7") };
        let mut stream = open(guest.directory.path(), exec(start)).await;
        let sender = stream.sender.clone();
        let sending = tokio::spawn(async move { sender.data(&vec![7; 8 << 20]).await });
        let (output, ended) = stream.all().await;
        assert_eq!((&*output.stdout, ended), (&b"closed\n"[..], ok(7)));
        drop(stream);
        // All of it was thrown away, or nobody wants it any more.
        let _ = sending.await.unwrap();
    }
}

#[tokio::test]
async fn how_a_command_ended_is_told_as_by_a_shell() {
    let guest = Guest::start();
    let mut killed = open(guest.directory.path(), exec(line("kill -9 $$"))).await;
    let ended = killed.all().await.1;
    assert_eq!((ended.status, ended.signal.as_deref()), (Some(137), Some("SIGKILL")));
    let short = CommandStartParams { timeout_s: Some(0.2), ..line("sleep 60") };
    let ended = open(guest.directory.path(), exec(short)).await.all().await.1;
    assert!(ended.timed_out, "{ended:?}");
    let mut told = open(
        guest.directory.path(),
        exec(line("trap 'echo got it; exit 4' USR1; echo up; while :; do sleep 0.05; done")),
    )
    .await;
    let mut output = Output::default();
    told.wait_for(&mut output, "up\n").await;
    told.control(&Control::Signal { signal: "USR1".into() }).await;
    let (output, ended) = told.all().await;
    assert_eq!((&*output.stdout, ended), (&b"got it\n"[..], ok(4)));
    // A process that is left behind holds the pipe; the command has ended all the same.
    let mut left = open(guest.directory.path(), exec(line("echo one; setsid sleep 30 & exit 0"))).await;
    let (output, ended) = left.all().await;
    assert_eq!((&*output.stdout, ended), (&b"one\n"[..], ok(0)));
}

#[tokio::test]
async fn a_stream_that_nobody_reads_stops_its_command_and_nothing_else() {
    let guest = Guest::start();
    let done = guest.path("done");
    let mut idle = open(guest.directory.path(), exec(line(format!("seq 1 2000000; touch {done}")))).await;
    // The first bytes are there, so it runs; then nobody reads.
    let Some(Incoming::Data(first)) = idle.next().await else { panic!("output comes first") };
    let path = guest.directory.path().to_owned();
    let slowest = tokio::task::spawn_blocking(move || {
        let mut client = common::Client::connect(&path);
        let calls = (0..20).map(|_| {
            let begun = Instant::now();
            client.good("run_command", json!({ "argv": ["true"] }));
            begun.elapsed()
        });
        calls.max().unwrap()
    });
    let slowest = slowest.await.unwrap();
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    assert!(!std::path::Path::new(&done).exists(), "it waits for its reader");
    idle.sender.took(first.len()).await.unwrap();
    let (output, ended) = idle.all().await;
    assert!([&first[..], &output.stdout].concat() == numbers(2_000_000), "nothing was dropped");
    assert_eq!(ended, ok(0));
}

#[tokio::test]
async fn a_command_goes_on_when_its_client_is_gone() {
    let guest = Guest::start();
    let go = guest.path("go");
    let text = format!("echo first; until [ -e {go} ]; do sleep 0.02; done; seq 1 1000000; exit 5");
    let mut gone = open(guest.directory.path(), exec(line(text))).await;
    let id = gone.id();
    gone.wait_for(&mut Output::default(), "first").await;
    drop(gone);
    std::fs::write(&go, "").unwrap();
    let mut client = guest.client();
    let mut result = json!(null);
    until("it has ended", || {
        result = client.good("command_output", json!({ "id": id }));
        facts(&result)["state"] == "ended"
    })
    .await;
    assert_eq!(
        (&facts(&result)["exit_code"], &facts(&result)["stdout"]["total_bytes"]),
        (&json!(5), &json!(6_888_902))
    );
    assert!(stream(&result, "stdout").starts_with("first\n1\n2\n"));
    let list = client.good("command_list", json!({}));
    assert_eq!(facts(&list)["commands"][0]["client"], "tester");
    // The same while it is stuck in its output, of which nobody read anything.
    let stuck = open(guest.directory.path(), exec(line("seq 1 1000000; exit 6"))).await;
    let id = stuck.id();
    drop(stuck);
    until("it has ended", || {
        result = client.good("command_output", json!({ "id": id }));
        facts(&result)["state"] == "ended"
    })
    .await;
    assert_eq!(facts(&result)["exit_code"], 6);
}

#[tokio::test]
async fn an_attached_command_and_its_stream_outlive_the_agent() {
    let mut guest = Guest::start();
    let go = guest.path("go");
    let text = format!("echo first; until [ -e {go} ]; do sleep 0.02; done; seq 1 1000000; cat; exit 5");
    let start = CommandStartParams { stdin_open: true, ..line(text) };
    let mut attached = open(guest.directory.path(), exec(start)).await;
    let mut output = Output::default();
    attached.wait_for(&mut output, "first").await;
    guest.process.kill().unwrap();
    wait(&mut guest.process);
    guest.process = spawn(guest.directory.path(), &[]);
    guest.host.welcome(configure());
    std::fs::write(&go, "").unwrap();
    attached.sender.data(b"typed").await.unwrap();
    attached.sender.end().await.unwrap();
    let (output, ended) = attached.all().await;
    assert!(output.stdout == [&numbers(1_000_000), &b"typed"[..]].concat());
    assert_eq!(ended, ok(5));
}

#[tokio::test]
async fn a_terminal_is_watched_by_many_written_by_one_and_left_again() {
    let guest = Guest::start();
    let directory = guest.directory.path();
    let start = CommandStartParams {
        tty: true,
        cols: Some(71),
        rows: Some(13),
        ..line("stty -echo; stty size; cat; echo end")
    };
    let mut first = open(directory, exec(start)).await;
    assert!(first.opened.tty && first.opened.writer);
    let mut output = Output::default();
    first.wait_for(&mut output, "13 71\r\n").await;
    let id = first.id();

    // The second wants to write, and may only watch; what it sends goes nowhere.
    let mut second = open(directory, Open::Attach(attach(id, true))).await;
    assert!(!second.opened.writer);
    second.sender.data(b"of nobody\n").await.unwrap();
    second.control(&Control::Signal { signal: "KILL".into() }).await;
    let mut seen = Output::default();
    second.until(&mut seen, |output| !output.notices.is_empty()).await;
    assert!(seen.notices[0].contains("input_closed"), "{:?}", seen.notices);
    first.sender.data("näher\n".as_bytes()).await.unwrap();
    first.wait_for(&mut output, "näher\r\n").await;
    second.wait_for(&mut seen, "näher\r\n").await;
    assert_eq!(
        String::from_utf8(seen.stdout).unwrap(),
        "13 71\r\nnäher\r\n",
        "what was before, and what comes"
    );

    // The third takes over; the first is let go, and the second watches on.
    let mut third =
        open(directory, Open::Attach(AttachOpening { take_over: true, ..attach(id, true) })).await;
    assert!(third.opened.writer);
    assert_eq!(first.all().await.1, Ended { detached: true, ..Ended::default() });
    third.control(&Control::Resize { cols: 100, rows: 40 }).await;
    third.sender.data(b"third\n").await.unwrap();
    let mut output = Output::default();
    third.wait_for(&mut output, "third\r\n").await;
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "13 71\r\nnäher\r\nthird\r\n");
    let mut seen = Output::default();
    second.wait_for(&mut seen, "third\r\n").await;

    third.control(&Control::Detach {}).await;
    assert_eq!(third.all().await.1, Ended { detached: true, ..Ended::default() });
    // It goes on, and comes back with as much of what was before as is wanted.
    let back = AttachOpening { scroll_back: Some(7), ..attach(id, true) };
    let mut fourth = open(directory, Open::Attach(back)).await;
    assert!(fourth.opened.writer);
    fourth.sender.end().await.unwrap();
    let (output, ended) = fourth.all().await;
    assert_eq!((&*output.stdout, ended), (&b"third\r\nend\r\n"[..], ok(0)));
    assert_eq!(second.all().await, (Output { stdout: b"end\r\n".to_vec(), ..Output::default() }, ok(0)));
    // One that has ended can be looked at.
    let mut late = open(directory, Open::Attach(attach(id, false))).await;
    assert!(late.all().await.0.stdout.ends_with(b"third\r\nend\r\n"));
}

#[tokio::test]
async fn who_watches_slowly_is_told_what_was_missed_and_slows_nothing() {
    let guest = Guest::start();
    let go = guest.path("go");
    let start = line(format!("until [ -e {go} ]; do sleep 0.02; done; seq 1 2000000"));
    let mut exact = open(guest.directory.path(), exec(start)).await;
    let mut watcher = open(guest.directory.path(), Open::Attach(attach(exact.id(), false))).await;
    std::fs::write(&go, "").unwrap();
    // The watcher reads nothing meanwhile.
    let (output, _) = exact.all().await;
    assert!(output.stdout == numbers(2_000_000));
    let (seen, ended) = watcher.all().await;
    assert_eq!(ended, ok(0));
    let missed: u64 = seen
        .notices
        .iter()
        .map(|text| {
            let notice: serde_json::Value = serde_json::from_str(text).unwrap();
            notice["missed"]["bytes"].as_u64().unwrap()
        })
        .sum();
    assert!(missed > 0);
    assert_eq!(missed as usize + seen.stdout.len(), output.stdout.len());
    assert!(output.stdout.starts_with(&seen.stdout[..WINDOW as usize / 2]));
    assert!(seen.stdout.ends_with(b"1999999\n2000000\n"));
}

#[tokio::test]
async fn a_login_shell_is_the_users_own() {
    let guest = Guest::start();
    let open_shell =
        |start: CommandStartParams| Open::Exec(Box::new(ExecOpening { start, login_shell: true }));
    let start = CommandStartParams { stdin_open: true, ..CommandStartParams::default() };
    let mut shell = open(guest.directory.path(), open_shell(start)).await;
    shell.sender.data(b"echo $- $0; pwd; echo $HOME; exit 9\n").await.unwrap();
    let (output, ended) = shell.all().await;
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().rev().take(2).collect();
    assert_eq!(ended, ok(9), "{text}");
    assert_eq!(lines[0], lines[1], "it starts at home: {text}");
    let error = try_open(guest.directory.path(), open_shell(line("true"))).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn what_cannot_be_opened_is_refused_with_a_code() {
    let guest = Guest::start();
    let directory = guest.directory.path();
    let argv =
        |word: &str| CommandStartParams { argv: Some(vec![word.into()]), ..CommandStartParams::default() };
    let id = nexus_schema::id::CommandId::of_boot(77, 7).unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    for (open, code) in [
        (exec(argv("/no/such/program")), ErrorCode::ProgramNotFound),
        (exec(argv("/etc/passwd")), ErrorCode::ProgramNotExecutable),
        (exec(CommandStartParams::default()), ErrorCode::InvalidArgument),
        (exec(CommandStartParams { cwd: Some("/no/such".into()), ..line("true") }), ErrorCode::CwdNotFound),
        (Open::Attach(attach(id, false)), ErrorCode::CommandNotFound),
        (Open::Tcp(TcpOpening { port }), ErrorCode::ConnectionRefused),
    ] {
        let error = try_open(directory, open.clone()).await.err();
        assert_eq!(error.as_ref().map(|error| error.code), Some(code), "{open:?}: {error:?}");
    }
    for bad in [
        &b""[..],
        b"GET / HTTP/1.1\r",
        br#"{"version":9,"open":{"tcp":{"port":1}}}"#,
        br#"{"version":1,"open":{"sftp":{}}}"#,
        b"\xff\xfe",
        // Only frames of a TCP connection may come before the answer.
        b"{\"version\":1,\"open\":{\"exec\":{\"start\":{\"argv\":[\"true\"]}}}}\n\x01\0\0\x01x",
        &[b'x'; 80_000],
    ] {
        match open_raw(directory, bad).await {
            Some((Answer::Error(error), _)) => assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}"),
            Some((Answer::Ok(_), _)) => panic!("it was opened"),
            None => panic!("it was hung up on without a word"),
        }
    }
    // Whoever hangs up, or says nothing, keeps nobody.
    drop(common::dial(directory, b"CONNECT 201\n"));
    let mut silent = common::dial(directory, b"CONNECT 201\n").unwrap();
    let (output, _) = open(directory, exec(line("echo works"))).await.all().await;
    assert_eq!(output.stdout, b"works\n");
    // It has only so long to say what it wants.
    let begun = Instant::now();
    assert_eq!(std::io::Read::read(&mut silent, &mut [0]).unwrap(), 0);
    assert!(begun.elapsed() <= 3 * nexus_schema::stream::OPENING_TIMEOUT, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_host_that_breaks_the_rules_is_hung_up_on_and_the_command_goes_on() {
    let guest = Guest::start();
    for (bytes, what) in [
        (&b"\x09\0\0\x01x"[..], "an unknown kind"),
        (b"\x01\xff\xff\xff", "too long a frame"),
        (b"\x04\0\0\x04\xff\xff\xff\xff", "credit without an end"),
        (b"\x03\0\0\0\x01\0\0\x01x", "data after the end"),
    ] {
        let start = CommandStartParams { stdin_open: true, ..line("sleep 60") };
        let opened = open(guest.directory.path(), exec(start)).await;
        let id = opened.id();
        let stream = common::dial(guest.directory.path(), b"CONNECT 201\n").unwrap();
        let opening = json!({ "version": 1, "open": { "attach": { "id": id } } });
        let (mut reader, mut writer) = nexus_wire::duplex::split(stream.into_inner().into()).unwrap();
        writer.write_all(format!("{opening}\n").as_bytes()).await.unwrap();
        let mut buffer = BytesMut::new();
        let answer = nexus_wire::frames::read_line(&mut reader, &mut buffer, 65_536).await.unwrap();
        assert_eq!(&answer.unwrap()[..5], b"{\"ok\"");
        writer.write_all(bytes).await.unwrap();
        read_all(&mut reader).await;
        let list = guest.client().good("command_list", json!({}));
        let commands = facts(&list)["commands"].as_array().unwrap();
        let command = commands.iter().find(|command| command["command_id"] == json!(id)).unwrap();
        assert_eq!(command["state"], "running", "{what}");
        opened.control(&Control::Signal { signal: "KILL".into() }).await;
    }
}

#[tokio::test]
async fn tcp_goes_both_ways_with_half_close() {
    let guest = Guest::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let got = read_all(&mut connection).await;
        // Its other direction is open still.
        connection.write_all(&got).await.unwrap();
        listener
    });
    let mut tcp = open(guest.directory.path(), Open::Tcp(TcpOpening { port })).await;
    let sent = numbers(1_000_000);
    let (sender, bytes) = (tcp.sender.clone(), sent.clone());
    let sending = tokio::spawn(async move {
        sender.data(&bytes).await.unwrap();
        sender.end().await.unwrap();
    });
    let (output, _) = tcp.all().await;
    sending.await.unwrap();
    assert!(output.stdout == sent);
    let listener = server.await.unwrap();

    // A host that is gone resets the connection; a server that resets it is told as an error.
    let tcp = open(guest.directory.path(), Open::Tcp(TcpOpening { port })).await;
    let (mut connection, _) = listener.accept().await.unwrap();
    drop(tcp);
    let error = connection.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let mut tcp = open(guest.directory.path(), Open::Tcp(TcpOpening { port })).await;
    let (connection, _) = listener.accept().await.unwrap();
    connection.set_zero_linger().unwrap();
    drop(connection);
    let done = tcp.until(&mut Output::default(), |_| false).await.unwrap();
    assert!(matches!(&done, Done::Error(error) if error.code == ErrorCode::GuestFailed), "{done:?}");

    // What comes with the request is passed on.
    let early = with_early_data(port, b"early");
    let (answer, (mut receiver, sender)) = open_raw(guest.directory.path(), &early).await.unwrap();
    assert_eq!(answer, Answer::Ok(Opened::default()));
    let (mut connection, _) = listener.accept().await.unwrap();
    sender.end().await.unwrap();
    assert_eq!(read_all(&mut connection).await, b"early\n");
    drop(connection);
    while let Some(Incoming::Data(_) | Incoming::End) = receiver.next().await.unwrap() {}
    let refused = open_raw(guest.directory.path(), &with_early_data(1, b"early")).await.unwrap().0;
    assert!(matches!(refused, Answer::Error(error) if error.code == ErrorCode::ConnectionRefused));

    let six = TcpListener::bind("[::1]:0").await.unwrap();
    let port = six.local_addr().unwrap().port();
    let tcp = open(guest.directory.path(), Open::Tcp(TcpOpening { port })).await;
    six.accept().await.unwrap();
    drop(tcp);
}

#[tokio::test]
async fn two_hundred_connections_are_carried_at_once() {
    let guest = Guest::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let mut all = Vec::new();
        for _ in 0..200 {
            all.push(listener.accept().await.unwrap().0);
        }
        for connection in &mut all {
            let mut byte = [0; 2];
            connection.read_exact(&mut byte).await.unwrap();
            connection.write_all(&byte).await.unwrap();
        }
    });
    let mut streams = Vec::new();
    for number in 0..200_u16 {
        let tcp = open(guest.directory.path(), Open::Tcp(TcpOpening { port })).await;
        tcp.sender.data(&number.to_be_bytes()).await.unwrap();
        tcp.sender.end().await.unwrap();
        streams.push(tcp);
    }
    for (number, tcp) in streams.iter_mut().enumerate() {
        let (output, _) = tcp.all().await;
        assert_eq!(output.stdout, (number as u16).to_be_bytes());
    }
    server.await.unwrap();
}
