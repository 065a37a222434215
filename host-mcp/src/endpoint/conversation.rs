//! One session over HTTP, between rmcp's loop for it and the requests that belong to it.
//!
//! rmcp's own sessions pass each message through channels. A channel has room for 32 messages at a time, whatever its capacity, and a message
//! takes some 400 bytes: that alone would be 90 KiB for each session. Here messages wait in queues that are as long as what waits.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use rmcp::RoleServer;
use rmcp::model::{
    ClientJsonRpcMessage, ClientNotification, GetExtensions, GetMeta, JsonRpcMessage, ProgressToken,
    RequestId, ServerJsonRpcMessage, ServerNotification,
};
use rmcp::service::{OriginatingRequestId, RxJsonRpcMessage, TxJsonRpcMessage};
use rmcp::transport::Transport;
use rmcp::transport::common::server_side_http::ServerSseMessage;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::offers::{Hearing, Reader};
use crate::tasks;

/// How many messages wait in one direction, and how many of a stream are kept for a client that resumes it.
const WAITING_MAX: usize = 16;
/// How many streams without a request one session has besides the one that is told.
const IDLE_MAX: usize = 32;
/// After which time a client whose stream ended should resume it.
const RETRY: Duration = Duration::from_secs(3);

/// Why a session does not take a message.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("there is no such session")]
    Unknown,
    #[error("the session has ended")]
    Ended,
    #[error("this is no id of an event that can be resumed from")]
    Event,
}

/// A stream of events to a client.
#[derive(Debug)]
pub(super) struct Told {
    events: mpsc::Receiver<ServerSseMessage>,
    /// If it is of no request.
    _reader: Option<Reader>,
}

impl Stream for Told {
    type Item = ServerSseMessage;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_recv(context)
    }
}

/// An event that waits until its client has read earlier ones.
type Late = (mpsc::Sender<ServerSseMessage>, ServerSseMessage);

/// The events of one stream.
#[derive(Debug, Default)]
struct Lane {
    /// The number of its request; the stream of a session has none.
    number: Option<u64>,
    to: Option<mpsc::Sender<ServerSseMessage>>,
    /// The newest events.
    kept: VecDeque<ServerSseMessage>,
    /// The number of the next one.
    count: usize,
}

impl Lane {
    fn push(&mut self, mut event: ServerSseMessage) -> Option<Late> {
        event.event_id = Some(match self.number {
            Some(number) => format!("{}/{number}", self.count),
            None => self.count.to_string(),
        });
        self.count += 1;
        if self.kept.len() >= WAITING_MAX {
            self.kept.pop_front();
        }
        self.kept.push_back(event.clone());
        let to = self.to.as_ref()?;
        match to.try_send(event) {
            Ok(()) | Err(TrySendError::Closed(_)) => None,
            Err(TrySendError::Full(event)) => Some((to.clone(), event)),
        }
    }

    fn is_heard(&self) -> bool {
        self.to.as_ref().is_some_and(|to| !to.is_closed())
    }

    /// Opens it, with what is kept of the events from `first` on.
    fn open(&mut self, first: usize) -> Result<Told, Failure> {
        if first > self.count {
            return Err(Failure::Event);
        }
        let (to, told) = mpsc::channel(WAITING_MAX);
        let gone = self.count.saturating_sub(self.kept.len());
        for event in self.kept.iter().skip(first.saturating_sub(gone)) {
            // There is room for all that are kept.
            let _ = to.try_send(event.clone());
        }
        self.to = Some(to);
        Ok(Told { events: told, _reader: None })
    }
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Asked {
    lane: Lane,
    id: RequestId,
    token: Option<ProgressToken>,
}

#[derive(Debug)]
struct State {
    /// What rmcp has not taken yet.
    waiting: VecDeque<ClientJsonRpcMessage>,
    /// Takes the answer to the first message.
    greeting: Option<oneshot::Sender<ServerJsonRpcMessage>>,
    asked: HashMap<u64, Asked>,
    ids: HashMap<RequestId, u64>,
    tokens: HashMap<ProgressToken, u64>,
    /// The number of the next request.
    next: u64,
    /// What belongs to no request.
    common: Lane,
    /// Streams that a client opened although it has one.
    idle: Vec<mpsc::Sender<ServerSseMessage>>,
    /// When the last message came or went.
    used: Instant,
}

impl State {
    /// The request to whose stream a message belongs.
    fn number_of(&self, message: &ServerJsonRpcMessage) -> Option<u64> {
        let id = match message {
            JsonRpcMessage::Request(request) => {
                request.request.extensions().get::<OriginatingRequestId>().map(|of| &of.0)
            }
            JsonRpcMessage::Notification(notification) => match &notification.notification {
                ServerNotification::ProgressNotification(progress) => {
                    return self.tokens.get(&progress.params.progress_token).copied();
                }
                ServerNotification::CancelledNotification(cancelled) => cancelled.params.request_id.as_ref(),
                _ => None,
            },
            JsonRpcMessage::Response(response) => Some(&response.id),
            JsonRpcMessage::Error(error) => error.id.as_ref(),
        };
        self.ids.get(id?).copied()
    }

    /// Ends the stream of a request.
    fn forget(&mut self, number: u64) {
        let Some(asked) = self.asked.remove(&number) else { return };
        if self.ids.get(&asked.id) == Some(&number) {
            self.ids.remove(&asked.id);
        }
        if let Some(token) = asked.token
            && self.tokens.get(&token) == Some(&number)
        {
            self.tokens.remove(&token);
        }
    }

    /// A stream for what belongs to no request. If the client reads one already, the new one stays silent.
    fn open_common(&mut self, first: usize) -> Result<Told, Failure> {
        if !self.common.is_heard() {
            return self.common.open(first);
        }
        self.idle.retain(|idle| !idle.is_closed());
        if self.idle.len() >= IDLE_MAX {
            self.idle.remove(0);
        }
        let (to, told) = mpsc::channel(1);
        self.idle.push(to);
        Ok(Told { events: told, _reader: None })
    }
}

/// A session.
#[derive(Debug)]
pub(super) struct Conversation {
    state: Mutex<State>,
    /// A message is waiting.
    arrived: Notify,
    /// There is room for one more.
    room: Notify,
    hearing: Hearing,
    /// Whether the client said at first that it can deal with tasks.
    takes_tasks: AtomicBool,
    over: CancellationToken,
    /// How long it lasts without messages.
    keep_alive: Duration,
}

impl Conversation {
    pub(super) fn new(keep_alive: Duration) -> Arc<Self> {
        let state = State {
            waiting: VecDeque::new(),
            greeting: None,
            asked: HashMap::new(),
            ids: HashMap::new(),
            tokens: HashMap::new(),
            next: 0,
            // rmcp begins such a stream with an event 0 of its own, which a client may resume from.
            common: Lane { count: 1, ..Lane::default() },
            idle: Vec::new(),
            used: Instant::now(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            arrived: Notify::new(),
            room: Notify::new(),
            hearing: Hearing::default(),
            takes_tasks: AtomicBool::new(false),
            over: CancellationToken::new(),
            keep_alive,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it, with all its streams.
    pub(super) fn end(&self) {
        let mut state = self.state();
        self.over.cancel();
        state.waiting.clear();
        state.greeting = None;
        state.asked.clear();
        state.ids.clear();
        state.tokens.clear();
        state.common.to = None;
        state.idle.clear();
    }

    /// Passes the first message on; returns its answer.
    pub(super) async fn greet(&self, message: ClientJsonRpcMessage) -> Result<ServerJsonRpcMessage, Failure> {
        let (to, answer) = oneshot::channel();
        self.takes_tasks.store(tasks::are_declared_by(&message), Ordering::Relaxed);
        self.state().greeting = Some(to);
        self.pass(message).await?;
        answer.await.map_err(|_| Failure::Ended)
    }

    pub(super) fn takes_tasks(&self) -> bool {
        self.takes_tasks.load(Ordering::Relaxed)
    }

    /// Passes a message on, once there is room for it.
    async fn pass(&self, message: ClientJsonRpcMessage) -> Result<(), Failure> {
        loop {
            {
                let mut state = self.state();
                // Under the lock, so that nothing is left in a session that has ended.
                if self.over.is_cancelled() {
                    return Err(Failure::Ended);
                }
                if state.waiting.len() < WAITING_MAX {
                    state.used = Instant::now();
                    state.waiting.push_back(message);
                    self.arrived.notify_one();
                    return Ok(());
                }
            }
            tokio::select! {
                () = self.room.notified() => {}
                () = self.over.cancelled() => return Err(Failure::Ended),
            }
        }
    }

    /// Passes a message on that is no request.
    pub(super) async fn accept(&self, message: ClientJsonRpcMessage) -> Result<(), Failure> {
        if let JsonRpcMessage::Notification(notification) = &message
            && let ClientNotification::CancelledNotification(cancelled) = &notification.notification
            && let Some(id) = &cancelled.params.request_id
        {
            // It gets no answer.
            let mut state = self.state();
            if let Some(number) = state.ids.get(id).copied() {
                state.forget(number);
            }
        }
        self.pass(message).await
    }

    /// Passes a request on; returns the stream of what belongs to it, which ends with its answer.
    pub(super) async fn ask(&self, message: ClientJsonRpcMessage) -> Result<Told, Failure> {
        let told = {
            let mut state = self.state();
            if self.over.is_cancelled() {
                return Err(Failure::Ended);
            }
            let number = state.next;
            state.next = number.wrapping_add(1);
            let mut lane = Lane { number: Some(number), ..Lane::default() };
            let told = lane.open(0)?;
            // The first event says how the stream can be resumed; there is room for it.
            let _ = lane.push(ServerSseMessage::retry(RETRY));
            if let JsonRpcMessage::Request(request) = &message {
                let (id, token) = (request.id.clone(), request.request.get_meta().get_progress_token());
                if let Some(token) = &token {
                    state.tokens.insert(token.clone(), number);
                }
                state.ids.insert(id.clone(), number);
                state.asked.insert(number, Asked { lane, id, token });
            }
            told
        };
        self.pass(message).await?;
        Ok(told)
    }

    /// A stream of what belongs to no request.
    pub(super) fn listen(&self) -> Result<Told, Failure> {
        self.open_common(&mut self.state(), 0)
    }

    fn open_common(&self, state: &mut State, first: usize) -> Result<Told, Failure> {
        if self.over.is_cancelled() {
            return Err(Failure::Ended);
        }
        Ok(Told { _reader: Some(self.hearing.begin()), ..state.open_common(first)? })
    }

    /// Who reads what belongs to no request.
    pub(super) fn hearing(&self) -> &Hearing {
        &self.hearing
    }

    /// Opens a stream again, after the last event that the client got.
    pub(super) fn resume(&self, last: &str) -> Result<Told, Failure> {
        let (event, number) = match last.split_once('/') {
            Some((event, number)) => (event, Some(number.parse::<u64>().map_err(|_| Failure::Event)?)),
            None => (last, None),
        };
        let first = event.parse::<usize>().ok().and_then(|last| last.checked_add(1)).ok_or(Failure::Event)?;
        let mut state = self.state();
        if self.over.is_cancelled() {
            return Err(Failure::Ended);
        }
        match number {
            Some(number) => state.asked.get_mut(&number).ok_or(Failure::Event)?.lane.open(first),
            None => self.open_common(&mut state, first),
        }
    }

    /// Puts a message into the stream that it belongs to, if there is room.
    fn tell(&self, message: ServerJsonRpcMessage) -> Result<Option<Late>, Failure> {
        let mut state = self.state();
        if self.over.is_cancelled() {
            return Err(Failure::Ended);
        }
        state.used = Instant::now();
        if let Some(greeting) = state.greeting.take() {
            return greeting.send(message).map(|()| None).map_err(|_| Failure::Ended);
        }
        let is_last = matches!(message, JsonRpcMessage::Response(_) | JsonRpcMessage::Error(_));
        let number = state.number_of(&message);
        let event = ServerSseMessage::from_message(message);
        let Some(number) = number else { return Ok(state.common.push(event)) };
        let late = state.asked.get_mut(&number).and_then(|asked| asked.lane.push(event));
        if is_last {
            state.forget(number);
        }
        Ok(late)
    }

    /// The next message for rmcp; `None` at the end.
    async fn next(&self) -> Option<ClientJsonRpcMessage> {
        loop {
            let ends = {
                let mut state = self.state();
                if let Some(message) = state.waiting.pop_front() {
                    if state.waiting.is_empty() {
                        // Most sessions wait for long, and there may be many.
                        state.waiting = VecDeque::new();
                    }
                    self.room.notify_one();
                    return Some(message);
                }
                state.used + self.keep_alive
            };
            if ends <= Instant::now() {
                return None;
            }
            tokio::select! {
                () = self.arrived.notified() => {}
                () = sleep_until(ends) => {}
                () = self.over.cancelled() => return None,
            }
        }
    }
}

/// rmcp's end of a session.
#[derive(Debug)]
pub(super) struct Line(pub(super) Arc<Conversation>);

impl Transport<RoleServer> for Line {
    type Error = Failure;

    fn send(
        &mut self,
        message: TxJsonRpcMessage<RoleServer>,
    ) -> impl Future<Output = Result<(), Failure>> + Send + 'static {
        // Here and not in the future, so that messages keep their order.
        let told = self.0.tell(message);
        let over = self.0.over.clone();
        async move {
            let Some((to, event)) = told? else { return Ok(()) };
            tokio::select! {
                // A client that is gone has no use for it.
                _ = to.send(event) => Ok(()),
                () = over.cancelled() => Err(Failure::Ended),
            }
        }
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleServer>> {
        self.0.next().await
    }

    async fn close(&mut self) -> Result<(), Failure> {
        self.0.end();
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use serde_json::{Value, json};

    use super::*;

    fn client(message: Value) -> ClientJsonRpcMessage {
        serde_json::from_value(message).unwrap()
    }

    fn server(message: Value) -> ServerJsonRpcMessage {
        serde_json::from_value(message).unwrap()
    }

    fn ping(id: u64) -> ClientJsonRpcMessage {
        client(json!({ "jsonrpc": "2.0", "id": id, "method": "ping" }))
    }

    fn pong(id: u64) -> ServerJsonRpcMessage {
        server(json!({ "jsonrpc": "2.0", "id": id, "result": {} }))
    }

    fn changed(at: usize) -> ServerJsonRpcMessage {
        let params = json!({ "uri": format!("nexus://vm/{at}") });
        server(json!({ "jsonrpc": "2.0", "method": "notifications/resources/updated", "params": params }))
    }

    async fn id_of(told: &mut Told) -> Option<String> {
        told.next().await.and_then(|event| event.event_id)
    }

    #[tokio::test]
    async fn an_answer_ends_the_stream_of_its_request() {
        let this = Conversation::new(Duration::from_secs(60));
        let mut line = Line(Arc::clone(&this));
        let (mut first, mut second) = (this.ask(ping(7)).await.unwrap(), this.ask(ping(8)).await.unwrap());
        assert!(line.receive().await.is_some() && line.receive().await.is_some());
        line.send(pong(8)).await.unwrap();
        assert_eq!(id_of(&mut second).await.unwrap(), "0/1");
        assert_eq!(id_of(&mut second).await.unwrap(), "1/1");
        assert!(second.next().await.is_none());
        assert!(matches!(this.resume("0/1"), Err(Failure::Event)), "answered");
        // One that is not answered can be resumed.
        assert_eq!(id_of(&mut first).await.unwrap(), "0/0");
        drop(first);
        let mut first = this.resume("0/0").unwrap();
        line.send(pong(7)).await.unwrap();
        assert_eq!(id_of(&mut first).await.unwrap(), "1/0");
        assert!(first.next().await.is_none());
        let state = this.state();
        assert!(state.ids.is_empty() && state.asked.is_empty());
    }

    #[tokio::test]
    async fn the_newest_events_are_told_to_who_listens_later() {
        let this = Conversation::new(Duration::from_secs(60));
        let mut line = Line(Arc::clone(&this));
        for at in 0..WAITING_MAX + 4 {
            line.send(changed(at)).await.unwrap();
        }
        let mut told = this.listen().unwrap();
        for at in 4..WAITING_MAX + 4 {
            assert_eq!(id_of(&mut told).await.unwrap(), (at + 1).to_string());
        }
        let mut idle = this.listen().unwrap();
        drop(told);
        let mut told = this.resume(&(WAITING_MAX + 3).to_string()).unwrap();
        assert_eq!(id_of(&mut told).await.unwrap(), (WAITING_MAX + 4).to_string());
        assert!(this.resume("1000").is_ok(), "a silent one, for there is one already");
        this.end();
        assert!(told.next().await.is_none() && idle.next().await.is_none());
        assert!(line.receive().await.is_none());
        assert!(line.send(changed(0)).await.is_err() && this.accept(ping(1)).await.is_err());
    }

    #[tokio::test]
    async fn a_stream_that_only_began_is_resumed_with_all_that_came() {
        let this = Conversation::new(Duration::from_secs(60));
        let mut line = Line(Arc::clone(&this));
        drop(this.listen().unwrap());
        drop(this.resume("0").unwrap());
        line.send(changed(0)).await.unwrap();
        let mut told = this.resume("0").unwrap();
        assert_eq!(id_of(&mut told).await.unwrap(), "1");
        drop(told);
        for wrong in ["2", "x", "", "0/0", "1/x", "-1"] {
            assert!(this.resume(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_its_own_session_up() {
        let this = Conversation::new(Duration::from_secs(60));
        let mut line = Line(Arc::clone(&this));
        let mut told = this.listen().unwrap();
        for at in 0..WAITING_MAX {
            line.send(changed(at)).await.unwrap();
        }
        let mut late = tokio::spawn(line.send(changed(WAITING_MAX)));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut late).await.is_err());
        for at in 0..=WAITING_MAX {
            assert_eq!(id_of(&mut told).await.unwrap(), (at + 1).to_string());
        }
        late.await.unwrap().unwrap();
        for id in 0..WAITING_MAX as u64 {
            this.accept(ping(id)).await.unwrap();
        }
        let full = tokio::time::timeout(Duration::from_millis(50), this.accept(ping(99)));
        assert!(full.await.is_err());
        assert!(line.receive().await.is_some());
        this.accept(ping(99)).await.unwrap();
    }

    #[tokio::test]
    async fn an_unused_session_ends() {
        let keep_alive = Duration::from_millis(50);
        let started = Instant::now();
        assert!(Line(Conversation::new(keep_alive)).receive().await.is_none());
        assert!(started.elapsed() >= keep_alive);
    }
}
