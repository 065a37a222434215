//! `nexusctl mcp`: forwards between an MCP client's stdio and the daemon's stream, and survives restarts of the daemon.
//!
//! ```text
//!            ┌── online ──┐   lost: pending requests are answered with an error
//!  connect ──┤            ├──────────────────────────────────────────────┐
//!            └────────────┘                                              v
//!                  ^            dialled: session replayed, queue sent    offline: lines are queued,
//!                  └──────────────────────────────────────────────────── dial with backoff; start the daemon
//!                                                                        when a request waits for it
//! ```
//! The two directions are independent. stdout contains only JSON lines.

mod session;
mod stdio;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use nexus_schema::limits::LINE_MAX;
use nexus_schema::{ErrorCode, ToolError};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::session::{Fate, Session};
use self::stdio::{Input, Output};
use super::App;
use super::connect::{self, Seen, Stream};
use super::error::Error;
use super::launch;
use crate::busy_poll::{BusyPoll, Crowd};
use crate::duplex;
use crate::lines::{Line, LineReader};
use crate::rpc::Envelope;

/// The only peer.
static DAEMON: Crowd = Crowd::new();

/// The longest line that is read. It exceeds the daemon's limit, so that longer lines can still be answered.
const READ_MAX: usize = 4 * LINE_MAX;
/// Lines that are available together are written together, up to this many bytes.
const BATCH: usize = 64 << 10;
/// How much is queued while there is no daemon, in bytes; beyond that, the client is not read.
const QUEUE_MAX: usize = 2 * LINE_MAX;
/// How long a daemon that disconnected may take to return before a new one is started.
const GRACE: Duration = Duration::from_secs(2);
/// How long a request waits for a daemon that somebody else must start: as long as for one that is started here.
const PATIENCE: Duration = GRACE.saturating_add(launch::DEADLINE);
/// The shortest and the longest pause between two connection attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// How long a daemon may take to answer the replayed `initialize`.
const REPLAY: Duration = Duration::from_secs(15);
/// How long running requests may take after the client closed its side.
const FAREWELL: Duration = Duration::from_secs(60);

/// How often to check for a client that has sent its last line.
const GONE_CHECK: Duration = Duration::from_millis(50);

/// The reader of the daemon's lines.
type DaemonReader = LineReader<duplex::Reader>;

/// Runs the bridge until the client disconnects.
pub(super) async fn run(
    app: &App,
    vm: Option<String>,
    tools: Option<String>,
    start: bool,
) -> Result<u8, Error> {
    let stdio = stdio::take().map_err(|source| Error::Input { source })?;
    let bridge = Bridge {
        app,
        vm,
        tools,
        start,
        session: RefCell::default(),
        queue: RefCell::default(),
        daemon: RefCell::default(),
        output: Mutex::new(stdio.output),
        closed: CancellationToken::new(),
        reached: CancellationToken::new(),
        drained: Notify::new(),
        settled: Notify::new(),
    };
    let result = tokio::select! {
        result = bridge.serve() => result,
        result = bridge.read_client(stdio.input) => result,
        () = bridge.farewell() => Ok(()),
        () = bridge.gone() => Ok(()),
    };
    match result {
        Ok(()) => Ok(0),
        // The client disconnected without closing its side first.
        Err(error) if error.is_silent() => Ok(0),
        Err(error) => Err(error),
    }
}

struct Bridge<'a> {
    app: &'a App,
    vm: Option<String>,
    /// The set of tools to offer, if the client chose one.
    tools: Option<String>,
    start: bool,
    session: RefCell<Session>,
    queue: RefCell<VecDeque<Vec<u8>>>,
    daemon: RefCell<Option<Rc<Daemon>>>,
    output: Mutex<Output>,
    /// The client closed its side.
    closed: CancellationToken,
    /// Set once the first daemon was reached: until then it is unknown whether this bridge works at all.
    reached: CancellationToken,
    /// The queue has space again.
    drained: Notify,
    /// An answer arrived, or a line was sent.
    settled: Notify,
}

/// A connected daemon.
struct Daemon {
    writer: Mutex<duplex::Writer>,
    lost: CancellationToken,
    /// When the only waiting request was written.
    sent: Cell<Option<Instant>>,
    busy_poll: RefCell<BusyPoll>,
}

impl Daemon {
    /// Writes; false if the connection is lost.
    async fn write(&self, bytes: &[u8]) -> bool {
        let write = async { self.writer.lock().await.write_all(bytes).await };
        let is_written = tokio::select! {
            result = write => result.is_ok(),
            () = self.lost.cancelled() => false,
        };
        if !is_written {
            self.lost.cancel();
        }
        is_written
    }

    /// After a request was written: busy-polls for its answer if it is the only one.
    async fn look(&self, is_alone: bool) {
        self.sent.set(is_alone.then(Instant::now));
        if is_alone {
            let writer = self.writer.lock().await;
            self.busy_poll.borrow().watch(&*writer);
        }
    }

    /// An answer arrived.
    fn answered(&self) {
        if let Some(sent) = self.sent.take() {
            self.busy_poll.borrow_mut().took(sent.elapsed());
        }
    }
}

fn same(a: Option<&Rc<Daemon>>, b: Option<&Rc<Daemon>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Rc::ptr_eq(a, b),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

impl Bridge<'_> {
    /// Forwards from the client to the daemon. Ends only with an error: after the client's last line, [`Bridge::farewell`] decides.
    async fn read_client(&self, input: Input) -> Result<(), Error> {
        let mut reader = LineReader::new(input, READ_MAX, u64::MAX);
        let mut batch = Vec::new();
        let mut batch_for: Option<Rc<Daemon>> = None;
        loop {
            let more = reader.has_line() || reader.fill().await.map_err(|source| Error::Input { source })?;
            let line = match reader.take() {
                Some(Line::Whole(line)) => line,
                Some(Line::TooLong(_)) => {
                    self.tell_client(&session::refuse_unread()).await?;
                    continue;
                }
                Some(Line::TooLongEnd { .. }) => continue,
                None if more => continue,
                None => match reader.take_rest() {
                    Some(line) => line,
                    None => {
                        self.closed.cancel();
                        std::future::pending::<&[u8]>().await
                    }
                },
            };
            let daemon = self.daemon.borrow().clone();
            if !same(daemon.as_ref(), batch_for.as_ref()) {
                // These lines were for the lost daemon, and have already been answered.
                batch.clear();
                batch_for.clone_from(&daemon);
            }
            let Some(daemon) = daemon else {
                self.enqueue(line.to_owned()).await;
                continue;
            };
            self.admit(line, &mut batch).await?;
            if batch.len() < BATCH && reader.has_line() {
                continue;
            }
            // A failure means that the daemon is lost, which the reading side handles.
            daemon.write(&batch).await;
            batch.clear();
            let is_alone = self.session.borrow().waits_for_one();
            daemon.look(is_alone).await;
        }
    }

    /// Puts a line that is about to be sent into a batch, or answers it.
    async fn admit(&self, line: &[u8], batch: &mut Vec<u8>) -> Result<(), Error> {
        if line.is_empty() {
            return Ok(());
        }
        let fate = self.session.borrow_mut().client_says(line);
        match fate {
            Fate::Forward => {
                batch.extend_from_slice(line);
                batch.push(b'\n');
                Ok(())
            }
            Fate::Drop => Ok(()),
            Fate::Answer(answer) => self.tell_client(&answer).await,
        }
    }

    async fn enqueue(&self, line: Vec<u8>) {
        self.queue.borrow_mut().push_back(line);
        while self.queue.borrow().iter().map(Vec::len).sum::<usize>() > QUEUE_MAX {
            self.drained.notified().await;
        }
    }

    /// Ends when the client has closed its side and nothing is left to answer.
    async fn farewell(&self) {
        self.closed.cancelled().await;
        self.reached.cancelled().await;
        let deadline = Instant::now() + FAREWELL;
        loop {
            let settled = self.settled.notified();
            if self.queue.borrow().is_empty() && self.session.borrow().is_idle() {
                // The last answer may still be on its way: its writer holds the output lock since it was received.
                drop(tokio::time::timeout_at(deadline, self.output.lock()).await);
                return;
            }
            if tokio::time::timeout_at(deadline, settled).await.is_err() {
                return;
            }
        }
    }

    /// Ends when the client is gone: it has closed its side, and does not read answers either.
    async fn gone(&self) {
        self.closed.cancelled().await;
        while !duplex::is_unread(std::io::stdout()) {
            tokio::time::sleep(GONE_CHECK).await;
        }
    }

    /// Forwards from the daemon to the client, one daemon after another.
    async fn serve(&self) -> Result<(), Error> {
        let mut stream = match self.first().await {
            Ok(stream) => stream,
            Err(error) => {
                self.refuse_queue(&error.to_tool_error()).await?;
                return Err(error);
            }
        };
        self.reached.cancel();
        loop {
            self.serve_one(stream).await?;
            stream = self.reconnect().await?;
        }
    }

    async fn first(&self) -> Result<Stream, Error> {
        match self.dial().await {
            Err(Error::DaemonDown { .. }) if self.start => {
                launch::ensure(self.app).await?;
                self.dial().await
            }
            result => result,
        }
    }

    async fn dial(&self) -> Result<Stream, Error> {
        let tools = self.tools.as_deref();
        let seen = self.vm.as_deref().map_or(Seen::Daemon(tools), |vm| Seen::Vm(vm, tools));
        connect::open(&self.app.socket()?, self.app.token()?, seen).await
    }

    /// Serves one daemon until it disconnects.
    async fn serve_one(&self, stream: Stream) -> Result<(), Error> {
        let (read, write) = (stream.socket.into_std())
            .and_then(|socket| duplex::split(socket.into()))
            .map_err(|source| Error::Lost { during: "its start".into(), source: Some(source) })?;
        let mut reader = LineReader::with_prefix(read, &stream.head, READ_MAX, u64::MAX);
        let daemon = Rc::new(Daemon {
            writer: Mutex::new(write),
            lost: CancellationToken::new(),
            sent: Cell::default(),
            busy_poll: RefCell::new(BusyPoll::of(&DAEMON)),
        });
        let pump = async {
            if self.hand_over(&daemon, &mut reader).await? {
                self.read_daemon(&mut reader).await?;
            }
            Ok::<_, Error>(())
        };
        let result = tokio::select! {
            result = pump => result,
            () = daemon.lost.cancelled() => Ok(()),
        };
        daemon.lost.cancel();
        self.daemon.replace(None);
        result?;
        let error =
            ToolError::new(ErrorCode::DaemonDown, "the connection to the daemon was lost during this call")
                .hint("the call may have been executed: check before you retry");
        let (answers, again) = self.session.borrow_mut().lost(&error);
        if let Some(initialize) = again {
            self.queue.borrow_mut().push_front(initialize);
        }
        for answer in answers {
            self.tell_client(&answer).await?;
        }
        self.settled.notify_waiters();
        Ok(())
    }

    /// Restores the session on a new daemon, then sends what was queued. False if the daemon was lost meanwhile.
    async fn hand_over(&self, daemon: &Rc<Daemon>, reader: &mut DaemonReader) -> Result<bool, Error> {
        let replay = self.session.borrow_mut().replay();
        if let Some((mut line, id)) = replay {
            line.push(b'\n');
            if !daemon.write(&line).await {
                return Ok(false);
            }
            let answered = tokio::time::timeout(REPLAY, self.await_answer(reader, &id)).await;
            if !answered.unwrap_or(Ok(false))? {
                return Ok(false);
            }
            let rest = self.session.borrow_mut().replay_rest();
            for mut line in rest {
                line.push(b'\n');
                if !daemon.write(&line).await {
                    return Ok(false);
                }
            }
        }
        loop {
            let Some(line) = self.queue.borrow_mut().pop_front() else { break };
            self.drained.notify_waiters();
            let mut batch = Vec::with_capacity(line.len() + 1);
            self.admit(&line, &mut batch).await?;
            if !daemon.write(&batch).await {
                return Ok(false);
            }
        }
        // There was no await since the queue was empty, so no line can overtake another.
        self.daemon.replace(Some(daemon.clone()));
        self.settled.notify_waiters();
        Ok(true)
    }

    /// Reads until the answer to the bridge's own request arrives; other lines are passed to the client. False if it was
    /// refused or the daemon was lost.
    async fn await_answer(&self, reader: &mut DaemonReader, id: &str) -> Result<bool, Error> {
        loop {
            let line = match reader.next().await {
                Ok(Some(Line::Whole(line))) => line,
                Ok(Some(Line::TooLong(_) | Line::TooLongEnd { .. })) => continue,
                Ok(None) | Err(_) => return Ok(false),
            };
            if let Some(envelope) = Envelope::parse(line)
                && envelope.method.is_none()
                && envelope.id() == Some(id)
            {
                return Ok(envelope.result.is_some());
            }
            let fate = self.session.borrow_mut().daemon_says(line);
            if fate == Fate::Forward {
                self.write_client(&[line, b"\n"].concat()).await?;
            }
        }
    }

    /// Forwards the daemon's lines until it disconnects.
    async fn read_daemon(&self, reader: &mut DaemonReader) -> Result<(), Error> {
        let mut batch = Vec::new();
        loop {
            let line = match reader.next().await {
                Ok(Some(Line::Whole(line))) => line,
                Ok(Some(Line::TooLong(_))) => {
                    self.app.ui.warn("dropped a line of the daemon that is too long");
                    continue;
                }
                Ok(Some(Line::TooLongEnd { .. })) => continue,
                Ok(None) | Err(_) => return Ok(()),
            };
            if let Some(daemon) = &*self.daemon.borrow() {
                daemon.answered();
            }
            if self.session.borrow_mut().daemon_says(line) == Fate::Forward {
                batch.extend_from_slice(line);
                batch.push(b'\n');
            }
            if batch.len() < BATCH && reader.has_line() {
                continue;
            }
            self.write_client(&batch).await?;
            batch.clear();
            self.settled.notify_waiters();
        }
    }

    /// Connects to the next daemon. Meanwhile requests wait, and after a while they are answered with an error.
    async fn reconnect(&self) -> Result<Stream, Error> {
        let lost = Instant::now();
        let mut pause = BACKOFF.0;
        loop {
            let error = match self.dial().await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let is_wanted = !self.queue.borrow().is_empty();
            let is_down = matches!(error, Error::DaemonDown { .. });
            let waited = lost.elapsed();
            if is_wanted && is_down && self.start && waited > GRACE {
                match launch::ensure(self.app).await {
                    Ok(()) => continue,
                    Err(error) => self.refuse_queue(&error.to_tool_error()).await?,
                }
            } else if is_wanted && (waited > PATIENCE || matches!(error, Error::Tool(_))) {
                self.refuse_queue(&error.to_tool_error()).await?;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// Answers every queued request with an error. Other lines stay queued for the next daemon.
    async fn refuse_queue(&self, error: &ToolError) -> Result<(), Error> {
        let lines = std::mem::take(&mut *self.queue.borrow_mut());
        let mut kept = VecDeque::new();
        for line in lines {
            match session::refuse(&line, error) {
                Some(answer) => self.tell_client(&answer).await?,
                None => kept.push_back(line),
            }
        }
        let mut queue = self.queue.borrow_mut();
        kept.append(&mut queue);
        *queue = kept;
        drop(queue);
        self.drained.notify_waiters();
        self.settled.notify_waiters();
        Ok(())
    }

    async fn tell_client(&self, line: &str) -> Result<(), Error> {
        self.write_client(format!("{line}\n").as_bytes()).await
    }

    async fn write_client(&self, bytes: &[u8]) -> Result<(), Error> {
        let mut output = self.output.lock().await;
        let write = async {
            output.write_all(bytes).await?;
            output.flush().await
        };
        write.await.map_err(|source| Error::Output { source })
    }
}
