//! A client of QEMU's monitor protocol (QMP), over a private connection.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use serde_json::Value;

use super::{DriverError, PAUSE, REQUEST};
use crate::os::passing;
use crate::os::process::timespec;

const WHAT: &str = "qemu";
/// Maximum length of a line, in bytes. QEMU's lines are far shorter.
const LINE_MAX: usize = 64 << 10;

/// One line from QEMU.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Fault>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Greeting {
    version: Version,
}

#[derive(Debug, Deserialize)]
struct Version {
    qemu: Triple,
}

#[derive(Debug, Deserialize)]
struct Triple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Debug, Deserialize)]
struct Fault {
    desc: String,
}

/// The monitor of one QEMU.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: UnixStream,
    incoming: Mutex<Incoming>,
    /// Something arrived, or the connection ended.
    arrived: Condvar,
    /// Serializes requests; holds the number of the last one.
    turn: Mutex<u64>,
}

#[derive(Debug, Default)]
struct Incoming {
    buffer: Vec<u8>,
    version: Option<String>,
    reply: Option<(u64, Result<Value, String>)>,
    shutdown_reason: Option<String>,
    /// The block node that ran out of disk space, while QEMU keeps the guest paused for it.
    full_node: Option<String>,
    ended: bool,
}

impl Monitor {
    /// Returns a monitor over a connection to QEMU.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, incoming: Mutex::default(), arrived: Condvar::new(), turn: Mutex::default() })
    }

    /// Negotiates, and returns QEMU's version once the machine is set up and its processors are about to run. Only this thread may read
    /// meanwhile.
    pub(super) fn open(&self, deadline: Instant) -> Result<String, DriverError> {
        let version = self.pump_until(deadline, "the greeting", |incoming| incoming.version.take())?;
        // QEMU executes commands in its main loop, which it enters only after every device is set up.
        for command in ["qmp_capabilities", "query-status"] {
            self.ask(deadline, command, &Value::Null)?;
        }
        Ok(version)
    }

    /// Executes a command while only this thread reads.
    pub(super) fn ask(
        &self,
        deadline: Instant,
        command: &'static str,
        arguments: &Value,
    ) -> Result<Value, DriverError> {
        let mut turn = lock(&self.turn);
        *turn += 1;
        let number = *turn;
        self.send(number, command, arguments, &[])?;
        let reply = self.pump_until(deadline, command, |incoming| take_reply(incoming, number))?;
        reply.map_err(|message| DriverError::Refused { what: WHAT, request: command.into(), message })
    }

    /// Waits until something arrives, at most for `most`, while only this thread reads.
    pub(super) fn linger_alone(&self, most: Duration) {
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        // An error or an interrupt is harmless: the caller checks again.
        let _ = poll(&mut fds, Some(&timespec(most)));
    }

    /// Waits until something arrives, at most for `most`, while another thread calls [`Monitor::take`].
    pub(super) fn linger(&self, most: Duration) {
        let incoming = lock(&self.incoming);
        drop(self.arrived.wait_timeout(incoming, most).unwrap_or_else(PoisonError::into_inner));
    }

    /// Executes a command. Another thread must call [`Monitor::take`] meanwhile.
    pub(super) fn execute(&self, command: &'static str) -> Result<Value, DriverError> {
        self.execute_with(command, &Value::Null)
    }

    /// Executes `stop` or `cont`, which may take [`PAUSE`]. Another thread must call [`Monitor::take`] meanwhile.
    pub(super) fn set_paused(&self, paused: bool) -> Result<(), DriverError> {
        self.exchange(if paused { "stop" } else { "cont" }, &Value::Null, PAUSE, &[]).map(drop)
    }

    /// Executes a command with arguments, an object or null. Another thread must call [`Monitor::take`] meanwhile.
    pub(super) fn execute_with(
        &self,
        command: &'static str,
        arguments: &Value,
    ) -> Result<Value, DriverError> {
        self.exchange(command, arguments, REQUEST, &[])
    }

    /// Executes a command that takes an open file, such as `getfd`. Another thread must call [`Monitor::take`] meanwhile.
    pub(super) fn execute_passing(
        &self,
        command: &'static str,
        arguments: &Value,
        file: BorrowedFd<'_>,
    ) -> Result<Value, DriverError> {
        self.exchange(command, arguments, REQUEST, &[file])
    }

    fn exchange(
        &self,
        command: &'static str,
        arguments: &Value,
        limit: Duration,
        files: &[BorrowedFd<'_>],
    ) -> Result<Value, DriverError> {
        let mut turn = lock(&self.turn);
        *turn += 1;
        let number = *turn;
        self.send(number, command, arguments, files)?;
        let deadline = Instant::now() + limit;
        let mut incoming = lock(&self.incoming);
        loop {
            if let Some(reply) = take_reply(&mut incoming, number) {
                return reply.map_err(|message| DriverError::Refused {
                    what: WHAT,
                    request: command.into(),
                    message,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if incoming.ended || left.is_zero() {
                let kind =
                    if incoming.ended { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::TimedOut };
                return Err(unanswered(command, kind.into()));
            }
            incoming = self.arrived.wait_timeout(incoming, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Reads available bytes. Returns false once the connection has ended.
    pub(super) fn take(&self) -> bool {
        let mut incoming = lock(&self.incoming);
        let mut chunk = [0; 4096];
        while !incoming.ended {
            match (&self.stream).read(&mut chunk) {
                Ok(0) => incoming.ended = true,
                Ok(read) => incoming.accept(&chunk[..read]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => incoming.ended = true,
            }
        }
        self.arrived.notify_all();
        !incoming.ended
    }

    /// Returns QEMU's reason of its shutdown, if it reported one: `guest-reset`, `guest-shutdown`, `host-signal` and so on.
    pub(super) fn shutdown_reason(&self) -> Option<String> {
        self.take();
        lock(&self.incoming).shutdown_reason.clone()
    }

    /// Returns the block node that ran out of disk space on the host, while QEMU keeps the guest paused for it.
    pub(super) fn full_node(&self) -> Option<String> {
        lock(&self.incoming).full_node.clone()
    }

    fn send(
        &self,
        number: u64,
        command: &str,
        arguments: &Value,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), DriverError> {
        let arguments = match arguments {
            Value::Null => String::new(),
            arguments => format!("\"arguments\":{arguments},"),
        };
        let line = format!("{{\"execute\":\"{command}\",{arguments}\"id\":{number}}}\n");
        // A short line always fits, unless QEMU has stopped reading.
        let sent = passing::send(&self.stream, line.as_bytes(), files).and_then(|sent| {
            let rest = line.as_bytes().get(sent..).unwrap_or_default();
            (&self.stream).write_all(rest)
        });
        sent.map_err(|source| unanswered(command, source))
    }

    fn pump_until<T>(
        &self,
        deadline: Instant,
        request: &str,
        mut found: impl FnMut(&mut Incoming) -> Option<T>,
    ) -> Result<T, DriverError> {
        loop {
            let live = self.take();
            if let Some(found) = found(&mut lock(&self.incoming)) {
                return Ok(found);
            }
            if !live {
                return Err(DriverError::Ended { what: WHAT });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(unanswered(request, io::ErrorKind::TimedOut.into()));
            }
            let left = left.min(Duration::from_secs(1));
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
            // An error or an interrupt is harmless: the loop checks again.
            let _ = poll(&mut fds, Some(&timespec(left)));
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Incoming {
    fn accept(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(length) = self.buffer[from..].iter().position(|b| *b == b'\n') {
            let line = serde_json::from_slice::<Line>(&self.buffer[from..from + length]);
            from += length + 1;
            match line {
                Ok(line) => self.line(line),
                Err(error) => tracing::warn!(%error, "cannot parse a line of qemu's monitor"),
            }
        }
        self.buffer.drain(..from);
        if self.buffer.len() > LINE_MAX {
            self.buffer = Vec::new();
            self.ended = true;
        }
    }

    fn line(&mut self, line: Line) {
        if let Some(Greeting { version: Version { qemu } }) = line.greeting {
            self.version = Some(format!("{}.{}.{}", qemu.major, qemu.minor, qemu.micro));
        } else if let Some(number) = line.id {
            let reply = match line.error {
                Some(fault) => Err(fault.desc),
                None => Ok(line.returned.unwrap_or_default()),
            };
            self.reply = Some((number, reply));
        } else if let Some(event) = line.event {
            self.event(&event, &line.data);
        }
    }

    /// Handles an event. QEMU's `qapi/run-state.json` and `qapi/block-core.json` describe the events.
    fn event(&mut self, event: &str, data: &Value) {
        let word = |key: &str| data.get(key).and_then(Value::as_str);
        match event {
            "SHUTDOWN" => self.shutdown_reason = word("reason").map(str::to_owned),
            "BLOCK_IO_ERROR"
                if word("action") == Some("stop")
                    && data.get("nospace").and_then(Value::as_bool) == Some(true) =>
            {
                self.full_node = Some(word("node-name").unwrap_or_default().to_owned());
            }
            "RESUME" => self.full_node = None,
            _ => {}
        }
    }
}

fn take_reply(incoming: &mut Incoming, number: u64) -> Option<Result<Value, String>> {
    // Drops late replies to requests that have timed out.
    incoming.reply.take_if(|(n, _)| *n <= number).filter(|(n, _)| *n == number).map(|(_, reply)| reply)
}

fn unanswered(request: &str, source: io::Error) -> DriverError {
    DriverError::Unanswered { what: WHAT, request: request.to_owned(), source }
}

/// Locks a mutex, also after a panic of another holder: a panic leaves no half-done changes here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;

    fn deadline() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn answer(stream: &UnixStream, text: &str) {
        let mut stream = stream;
        stream.write_all(text.as_bytes()).unwrap();
        stream.write_all(b"\r\n").unwrap();
    }

    #[test]
    fn greets_executes_and_learns_why_it_ended() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let monitor = Monitor::new(ours).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut lines = BufReader::new(&theirs).lines().map(Result::unwrap);
                answer(&theirs, GREETING);
                assert_eq!(lines.next().unwrap(), r#"{"execute":"qmp_capabilities","id":1}"#);
                answer(&theirs, r#"{"return": {}, "id": 1}"#);
                assert_eq!(lines.next().unwrap(), r#"{"execute":"query-status","id":2}"#);
                answer(&theirs, r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}"#);
                answer(&theirs, r#"{"return": {"status": "running", "running": true}, "id": 2}"#);
                assert_eq!(lines.next().unwrap(), r#"{"execute":"stop","id":3}"#);
                answer(&theirs, r#"{"error": {"class": "GenericError", "desc": "no"}, "id": 3}"#);
                answer(&theirs, r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#);
                theirs.shutdown(std::net::Shutdown::Both).unwrap();
            });
            assert_eq!(monitor.open(deadline()).unwrap(), "7.2.22");
            let refused = scope.spawn(|| monitor.execute("stop").unwrap_err());
            while monitor.take() {
                let mut fds = [PollFd::new(&monitor, PollFlags::IN)];
                poll(&mut fds, None).unwrap();
            }
            assert_eq!(refused.join().unwrap().to_string(), "qemu refused stop: no");
        });
        assert_eq!(monitor.shutdown_reason().as_deref(), Some("guest-reset"));
        assert!(matches!(monitor.execute("stop"), Err(DriverError::Unanswered { .. })));
    }

    #[test]
    fn a_guest_that_is_paused_for_want_of_room_is_told_until_it_goes_on() {
        let event = |name: &str, data: &str| format!("{{\"event\": \"{name}\", \"data\": {data}}}\r\n");
        let error = |action: &str, nospace: bool| {
            let data = format!(
                r#"{{"device": "", "nospace": {nospace}, "node-name": "disk1", "reason": "x", "operation": "write", "action": "{action}"}}"#
            );
            event("BLOCK_IO_ERROR", &data)
        };
        let mut incoming = Incoming::default();
        for other in [error("report", true), error("stop", false), event("STOP", "{}")] {
            incoming.accept(other.as_bytes());
            assert_eq!(incoming.full_node, None, "{other}");
        }
        incoming.accept((error("stop", true) + &event("STOP", "{}")).as_bytes());
        assert_eq!(incoming.full_node.as_deref(), Some("disk1"));
        incoming.accept(event("RESUME", "{}").as_bytes());
        assert_eq!(incoming.full_node, None);
    }

    #[test]
    fn an_end_while_it_opens_is_told_apart() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let monitor = Monitor::new(ours).unwrap();
        assert!(matches!(monitor.open(deadline()), Err(DriverError::Ended { .. })));
    }

    #[test]
    fn an_endless_line_ends_the_connection() {
        let mut incoming = Incoming::default();
        for _ in 0..100 {
            incoming.accept(&[b'x'; 4096]);
        }
        assert!(incoming.ended);
        assert!(incoming.buffer.len() <= LINE_MAX + 4096);
    }
}
