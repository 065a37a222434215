//! The other end of a monitor, for tests: answers as recorded from QEMU, and keeps the commands.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::os::passing;
use crate::vmm::driver::qmp::Monitor;

/// What is done with a command.
pub(super) enum Answer {
    /// Its result.
    Return(Value),
    /// It is refused, with the reason.
    Refuse(&'static str),
    /// The connection ends, as if QEMU did.
    End,
}

/// Answers without a result.
pub(super) fn done() -> Answer {
    Answer::Return(json!({}))
}

/// Returns a status, as `query-status` and `query-migrate` have it.
pub(super) fn status(word: &str) -> Answer {
    Answer::Return(json!({ "status": word }))
}

/// Runs `client` with a monitor whose commands `answer` answers: it gets the command's name, and the file that came with it. With `is_pumped`
/// another thread reads from the monitor, as the shim's does once a guest runs. Returns the commands, with their arguments, and the result.
pub(super) fn with_monitor<T>(
    is_pumped: bool,
    answer: impl FnMut(&str, Option<OwnedFd>) -> Answer + Send,
    client: impl FnOnce(&Monitor) -> T,
) -> (Vec<String>, T) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let monitor = Monitor::new(ours).unwrap();
    std::thread::scope(|scope| {
        let served = scope.spawn(move || serve(&theirs, answer));
        if is_pumped {
            scope.spawn(|| pump(&monitor));
        }
        let result = client(&monitor);
        rustix::net::shutdown(monitor.as_fd(), rustix::net::Shutdown::Both).ok();
        (served.join().unwrap(), result)
    })
}

/// Reads from a monitor until its connection ends.
pub(super) fn pump(monitor: &Monitor) {
    while monitor.take() {
        poll(&mut [PollFd::new(monitor, PollFlags::IN)], None).unwrap();
    }
}

fn serve(stream: &UnixStream, mut answer: impl FnMut(&str, Option<OwnedFd>) -> Answer) -> Vec<String> {
    let (mut commands, mut received, mut files) = (Vec::new(), Vec::new(), Vec::new());
    let mut chunk = [0; 4096];
    loop {
        let read = passing::receive(stream, &mut chunk, &mut files).unwrap();
        if read == 0 {
            return commands;
        }
        received.extend_from_slice(&chunk[..read]);
        while let Some(end) = received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = received.drain(..=end).collect();
            let command: Value = serde_json::from_slice(&line).unwrap();
            let name = command["execute"].as_str().unwrap();
            commands.push(match command.get("arguments") {
                Some(arguments) => format!("{name} {arguments}"),
                None => name.to_owned(),
            });
            let id = &command["id"];
            let reply = match answer(name, files.pop()) {
                Answer::Return(value) => json!({ "return": value, "id": id }),
                Answer::Refuse(why) => json!({ "error": { "class": "GenericError", "desc": why }, "id": id }),
                Answer::End => return commands,
            };
            let mut stream = stream;
            stream.write_all(format!("{reply}\r\n").as_bytes()).unwrap();
        }
    }
}
