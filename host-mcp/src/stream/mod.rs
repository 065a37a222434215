//! MCP on a plain stream: JSON lines, parsed once. Calls of guest tools are forwarded as they are in the line; rmcp handles
//! everything else.

mod tap;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_core::Caller;
use nexus_core::host::busy_poll::{BusyPoll, Crowd};
use nexus_core::host::duplex;
use nexus_core::host::lines::{Line, LineReader};
use nexus_core::link::Outbox;
use nexus_schema::limits::LINE_MAX;
use rmcp::model::{ClientJsonRpcMessage, JsonRpcMessage, ServerJsonRpcMessage, ServerResult};
use rmcp::transport::{Transport, TransportAdapterIdentity};
use rmcp::{RoleServer, ServerHandler, service};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use self::tap::Tap;
use crate::forward::{BEAT_CHECK, Client};
use crate::host::{Host, View};
use crate::own::Own;
use crate::server::Server;

/// A line longer than this is considered endless, in bytes.
const ENDLESS: u64 = 256 << 20;
/// How much output may be buffered for a client before no more of its lines are read, in bytes.
const BACKLOG: usize = 4 << 20;
/// How much output may be buffered for a client that does not read before it is disconnected, in bytes.
const UNREAD_MAX: usize = 32 << 20;

/// All clients that call.
static CLIENTS: Crowd = Crowd::new();

/// The reading end of a stream; it can tell whether its peer is gone or has only stopped writing.
pub trait ReadEnd: AsyncRead + Unpin + Send + Sync + 'static {
    /// Whether nobody will read further output.
    fn is_gone(&self) -> bool;

    /// Busy-polls for more input; `None` if the caller should wait instead.
    fn look(&self, _poll: &BusyPoll, _buffer: &mut Vec<u8>) -> Option<io::Result<usize>> {
        None
    }
}

impl ReadEnd for duplex::Reader {
    fn is_gone(&self) -> bool {
        // A Unix socket reports a hangup when both directions are shut down.
        duplex::is_unread(self)
    }

    fn look(&self, poll: &BusyPoll, buffer: &mut Vec<u8>) -> Option<io::Result<usize>> {
        poll.receive(self, buffer)
    }
}

impl ReadEnd for rmcp::transport::StdioReader {
    fn is_gone(&self) -> bool {
        duplex::is_unread(io::stdout())
    }
}

/// A stream's writing end.
pub trait WriteEnd: AsyncWrite + Unpin + Send + 'static {
    /// Output that is queued in front of it.
    fn outbox(&self) -> Outbox {
        Outbox::default()
    }
}

impl WriteEnd for duplex::Writer {
    fn outbox(&self) -> Outbox {
        Outbox::of(self.peer())
    }
}

impl WriteEnd for rmcp::transport::StdioWriter {}

/// Serves one client until it disconnects, writing fails, or `stop` is cancelled, which concerns only this client. `prefix` was
/// already read from the stream.
pub async fn serve<R: ReadEnd, W: WriteEnd>(
    host: Host,
    view: View,
    caller: Caller,
    (read, write): (R, W),
    prefix: &[u8],
    stop: CancellationToken,
) {
    host.counters().streams.add();
    let stop = until_ended(stop, &caller);
    let outbox = write.outbox().with_limit(UNREAD_MAX);
    // Stops reading from a client that is gone, or was disconnected because it reads nothing.
    let (writing, unread) = (outbox.clone().run(write), stop.clone());
    let writer = tokio::spawn(async move { writing.await.map_err(|_| unread.cancel()) });
    let mut beat = interval(BEAT_CHECK);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let client = Client::new(host.clone(), view, caller);
    let finished = stop.clone().drop_guard();
    let tap = Tap::new(client.clone(), outbox.clone());
    let transport = Lines {
        reader: LineReader::with_prefix(read, prefix, LINE_MAX, ENDLESS),
        tap: Arc::clone(&tap),
        beat,
        decoded: VecDeque::new(),
        at_end: false,
        answered: None,
        busy_poll: BusyPoll::of(&CLIENTS),
    };
    match view {
        View::Whole(_) | View::Vm(_) => answer(Server::new(client), transport, stop).await,
        View::Own(_) => answer(Own::new(client), transport, stop).await,
    }
    drop(finished);
    tap.leave_all();
    outbox.close();
    let _ = tokio::time::timeout(Duration::from_secs(5), writer).await;
    host.counters().streams.remove();
}

/// Answers what comes through `transport` until it ends.
async fn answer<R: ReadEnd>(server: impl ServerHandler, transport: Lines<R>, stop: CancellationToken) {
    match service::serve_server_with_ct::<_, _, io::Error, TransportAdapterIdentity>(server, transport, stop)
        .await
    {
        Ok(running) => {
            // The result does not matter: either the client or the daemon is gone.
            let _ = running.waiting().await;
        }
        Err(error) => tracing::debug!(%error, "a client left before it said what it is"),
    }
}

/// A token that is also cancelled when the caller's own token stops working.
fn until_ended(stop: CancellationToken, caller: &Caller) -> CancellationToken {
    if caller.grant().is_none() {
        return stop;
    }
    let (stop, ended) = (stop.child_token(), caller.ended());
    let watched = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = ended.cancelled() => watched.cancel(),
            () = watched.cancelled() => {}
        }
    });
    stop
}

/// The transport under rmcp.
struct Lines<R> {
    reader: LineReader<R>,
    tap: Arc<Tap>,
    beat: Interval,
    /// Messages of a batch that rmcp must handle.
    decoded: VecDeque<ClientJsonRpcMessage>,
    at_end: bool,
    /// When the last running call was answered, if nothing was read since.
    answered: Option<Instant>,
    /// Whether this client calls again immediately.
    busy_poll: BusyPoll,
}

impl<R: ReadEnd> Lines<R> {
    /// Waits for more bytes, or for a reason to look at the lines or the backlog again; returns whether the client may continue to write.
    async fn fill(&mut self) -> io::Result<bool> {
        let more = tokio::select! {
            more = self.reader.fill() => more,
            () = self.tap.answered.notified() => {
                self.answered = Some(Instant::now());
                let poll = &self.busy_poll;
                match self.reader.fill_by(|read, buffer| read.look(poll, buffer)) {
                    Some(more) => {
                        // Other tasks may have waited for this thread.
                        tokio::task::yield_now().await;
                        more
                    }
                    None => return Ok(true),
                }
            }
            _ = self.beat.tick(), if self.tap.has_calls() => {
                self.tap.beat();
                return Ok(true);
            }
        };
        if let Some(answered) = self.answered.take() {
            self.busy_poll.took(answered.elapsed());
        }
        more
    }
}

impl<R: ReadEnd> Transport<RoleServer> for Lines<R> {
    type Error = io::Error;

    fn send(&mut self, item: ServerJsonRpcMessage) -> impl Future<Output = io::Result<()>> + Send + 'static {
        if let JsonRpcMessage::Response(response) = &item
            && matches!(response.result, ServerResult::InitializeResult(_))
        {
            self.tap.is_initialized.store(true, Ordering::Release);
        }
        let outbox = self.tap.outbox.clone();
        let mut line = Ok(());
        let pushed = outbox.push(|out| line = serde_json::to_writer(out, &item).map_err(io::Error::from));
        async move {
            line?;
            if !pushed {
                return Err(io::ErrorKind::NotConnected.into());
            }
            outbox.drained_to(BACKLOG).await;
            Ok(())
        }
    }

    async fn receive(&mut self) -> Option<ClientJsonRpcMessage> {
        loop {
            // Calls that arrive together are written together.
            while self.decoded.is_empty()
                && let Some(line) = self.reader.take()
            {
                self.tap.line(line, &mut self.decoded);
            }
            if self.at_end
                && self.decoded.is_empty()
                && let Some(last) = self.reader.take_rest()
            {
                self.tap.line(Line::Whole(last), &mut self.decoded);
            }
            self.tap.flush();
            if let Some(message) = self.decoded.pop_front() {
                return Some(message);
            }
            if self.at_end {
                self.tap.finish(|| self.reader.get_ref().is_gone()).await;
                return None;
            }
            self.tap.outbox.drained_to(BACKLOG).await;
            match self.fill().await {
                Ok(more) => self.at_end = !more,
                Err(error) => {
                    tracing::debug!(%error, "cannot read from a client");
                    return None;
                }
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        self.tap.outbox.close();
        Ok(())
    }
}
