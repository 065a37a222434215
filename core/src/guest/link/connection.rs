//! The task behind a link: connects, performs the handshake, reads, and enforces deadlines and the limit of silence.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nexus_schema::limits::GUEST_RESULT_MAX;
use nexus_schema::link::{COMMAND_ENDED, CUT_OFF, CommandEnded};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::greeting::{Dialled, Reader, dial, shake_hands};
use super::{GuestProgress, LinkError, LinkState, Shared, again, passing};
use crate::guest::lines::{Line, LineReader, Outbox};
use crate::guest::wire::{self, Envelope};
use crate::guest::{result, scan};
use crate::os::busy_poll::{BusyPoll, Crowd};

const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// Time after which a lost connection counts as stable: the pause before the next try is the shortest one again.
const STABLE: Duration = Duration::from_secs(10);
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Time limits for a guest that sends nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// Time without a frame after which the guest is pinged.
    pub(super) ping_after: Duration,
    /// Time without a frame after which the link counts as lost.
    pub(super) silence_max: Duration,
}

/// Delay of an alarm or a deadline from which on the daemon counts as stalled: it cannot know whether the guest was silent meanwhile.
pub(crate) const STANDSTILL: Duration = Duration::from_secs(1);

impl Default for Patience {
    fn default() -> Self {
        Self { ping_after: Duration::from_secs(10), silence_max: Duration::from_secs(30) }
    }
}

/// Maximum number of lines of one connection that answer nothing.
pub(super) const GARBAGE_MAX: u32 = 100;
/// Maximum length of a line: the largest result and its envelope, in bytes.
const LINE_MAX: usize = GUEST_RESULT_MAX + 4096;
/// Length from which on a line counts as endless, in bytes.
const ENDLESS: u64 = 64 << 20;
/// Number of bytes waiting to be written above which requests of the guest are not answered.
const ANSWER_BACKLOG: usize = 64 << 10;
/// Maximum length of an error or progress message, in characters.
const MESSAGE_MAX: usize = 500;
/// Maximum length of the data of an error, in bytes; more is dropped.
const DATA_MAX: usize = 4 << 10;
/// All guests, which are busy-polled only while a single one of them is active.
static GUESTS: Crowd = Crowd::new();

/// Connects, and reconnects until the link is closed.
pub(super) async fn run(shared: Arc<Shared>, directory: PathBuf, port: u32, patience: Patience) {
    let closed = shared.closed.clone();
    let mut backoff = BACKOFF_MIN;
    loop {
        let started = Instant::now();
        let why = tokio::select! {
            biased;
            () = closed.cancelled() => break,
            () = shared.redial.notified() => {
                backoff = BACKOFF_MIN;
                "it is dialled anew".to_owned()
            }
            why = connect_and_serve(&shared, &directory, port, patience) => why,
        };
        again::interrupted(&shared, &why);
        if started.elapsed() > STABLE {
            backoff = BACKOFF_MIN;
        }
        tracing::debug!(%why, ?backoff, directory = %directory.display(), "guest link lost");
        tokio::select! {
            () = closed.cancelled() => break,
            () = sleep(backoff) => backoff = (backoff * 2).min(BACKOFF_MAX),
        }
    }
    let why = shared.close_reason.lock().unwrap_or_else(PoisonError::into_inner).clone();
    shared.lost(if why.is_empty() { "closed" } else { &why });
}

/// Runs one connection from start to end; returns why it ended.
async fn connect_and_serve(shared: &Arc<Shared>, directory: &Path, port: u32, patience: Patience) -> String {
    let Dialled { reader, writer: write, read } = match dial(directory, port, &[]).await {
        Ok(dialled) => dialled,
        Err(e) => return format!("cannot connect: {e}"),
    };
    let outbox = Outbox::of(write.peer());
    let writer = tokio::spawn(outbox.clone().run(write));
    let _writer = AbortOnDrop(writer);
    let mut reader = LineReader::with_prefix(reader, &read, LINE_MAX, ENDLESS);
    let offers = match timeout(HANDSHAKE_MAX, shake_hands(&mut reader, &outbox, &shared.name)).await {
        Ok(Ok(offers)) => offers,
        Ok(Err(why)) => return why,
        Err(_) => return "the guest's MCP server does not answer".into(),
    };
    if !again::go_on(shared, &outbox, offers) {
        return "closed".into();
    }
    shared.state.send_replace(LinkState::Up);
    let serving = Serving {
        shared,
        outbox,
        patience,
        garbage: 0,
        heard: Instant::now(),
        pinged: false,
        sent: None,
        busy_poll: BusyPoll::of(&GUESTS),
    };
    serving.run(reader).await
}

struct AbortOnDrop(tokio::task::JoinHandle<std::io::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Serving<'a> {
    shared: &'a Arc<Shared>,
    outbox: Outbox,
    patience: Patience,
    garbage: u32,
    /// Time of the last frame.
    heard: Instant,
    /// Whether a ping was sent since then.
    pinged: bool,
    /// When the call was written, if it is the only one under way.
    sent: Option<std::time::Instant>,
    busy_poll: BusyPoll,
}

impl Serving<'_> {
    async fn run(mut self, mut reader: Reader) -> String {
        // One timer is reset for each frame; creating a new one each time would cost more.
        let alarm = sleep_until(Instant::now());
        tokio::pin!(alarm);
        loop {
            while let Some(line) = reader.take() {
                self.line(line);
                if self.garbage > GARBAGE_MAX {
                    return "the guest sends garbage".into();
                }
            }
            let more = tokio::select! {
                more = reader.fill() => more,
                () = self.outbox.written() => match self.look(&mut reader) {
                    Some(more) => more,
                    None => continue,
                },
                () = &mut alarm => match self.on_alarm(alarm.deadline()) {
                    Ok(next) => {
                        alarm.as_mut().reset(next);
                        continue;
                    }
                    Err(why) => return why,
                },
                () = self.shared.rearm.notified() => {
                    if let Some(armed) = self.shared.calls().armed {
                        alarm.as_mut().reset(armed);
                    }
                    continue;
                }
            };
            match more {
                Ok(true) => {}
                Ok(false) => return "the guest hung up".into(),
                Err(e) => return format!("cannot read from the guest: {e}"),
            }
        }
    }

    /// Called after a request was written: polls for its answer for a moment if no other call is under way.
    fn look(&mut self, reader: &mut Reader) -> Option<std::io::Result<bool>> {
        self.sent = (self.shared.calls().pending.len() == 1).then(std::time::Instant::now);
        self.sent?;
        reader.fill_by(|read, buffer| self.busy_poll.receive(read, buffer))
    }

    /// Checks deadlines and silence; the check was `due` at this time. Returns when to check again.
    fn on_alarm(&mut self, due: Instant) -> Result<Instant, String> {
        let now = Instant::now();
        if self.outbox.is_closed() {
            return Err("cannot write to the guest".into());
        }
        if let Some(next) = self.while_held(now) {
            return Ok(next);
        }
        if now - due >= STANDSTILL {
            // Frames that the guest sent during the stall wait to be read. They are read first, and the guest is pinged again.
            self.heard = self.heard.max(now.checked_sub(self.patience.ping_after).unwrap_or(now));
            self.pinged = true;
            self.ping();
            let next = now + STANDSTILL;
            self.shared.calls().armed = Some(next);
            return Ok(next);
        }
        if now - self.heard >= self.patience.silence_max {
            return Err(format!("the guest has been silent for {} s", self.patience.silence_max.as_secs()));
        }
        let mut next = if now - self.heard >= self.patience.ping_after {
            if !self.pinged {
                self.pinged = true;
                self.ping();
            }
            (self.heard + self.patience.silence_max).min(now + self.patience.ping_after)
        } else {
            self.heard + self.patience.ping_after
        };
        let late: Vec<_> = {
            let mut calls = self.shared.calls();
            let late: Vec<_> = calls
                .pending
                .iter()
                .filter(|(_, pending)| pending.deadline <= now)
                .map(|(id, pending)| (*id, pending.deadline - pending.started))
                .collect();
            let soonest = calls.pending.values().map(|p| p.deadline).filter(|d| *d > now).min();
            next = next.min(soonest.unwrap_or(next));
            calls.armed = Some(next);
            late
        };
        for (id, after) in late {
            self.shared.give_up(id, CUT_OFF, LinkError::Deadline { after });
        }
        Ok(next)
    }

    /// When to look again if the guest is paused; it is not silent then, and no call is late.
    fn while_held(&mut self, now: Instant) -> Option<Instant> {
        let mut calls = self.shared.calls();
        calls.held_since?;
        (self.heard, self.pinged) = (now, false);
        let next = now + self.patience.ping_after / 2;
        calls.armed = Some(next);
        Some(next)
    }

    fn ping(&self) {
        let id = {
            let mut calls = self.shared.calls();
            calls.last_id += 1;
            calls.last_id
        };
        // The answer only counts as a frame; nothing waits for it.
        self.outbox.push(|out| {
            out.extend_from_slice(format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"ping"}}"#).as_bytes());
        });
    }

    fn line(&mut self, line: Line<'_>) {
        match line {
            Line::Whole([]) => {}
            Line::Whole(line) => match Envelope::parse(line) {
                Some(message) => self.message(&message),
                None => self.garbage += 1,
            },
            // The call fails as soon as its id is known, not when the line has ended.
            Line::TooLong(head) => {
                self.garbage += 1;
                self.fail_too_large(wire::id_at_start(head));
            }
            Line::TooLongEnd { tail, .. } => self.fail_too_large(wire::id_at_end(&tail)),
        }
    }

    fn fail_too_large(&self, id: Option<&str>) {
        let pending =
            id.and_then(|id| id.parse().ok()).and_then(|id: u64| self.shared.calls().pending.remove(&id));
        if let Some(pending) = pending {
            pending.sink.done(Err(LinkError::TooLarge));
        }
    }

    fn message(&mut self, message: &Envelope<'_>) {
        match (&message.method, message.id) {
            (None, Some(id)) => self.response(id, message),
            (Some(method), None) if method == "notifications/progress" => {
                if message.params.is_none_or(|params| self.progress(params).is_none()) {
                    self.garbage += 1;
                }
            }
            (Some(method), None) if method == COMMAND_ENDED => {
                let ended: Option<CommandEnded> =
                    message.params.and_then(|params| serde_json::from_str(params.get()).ok());
                match (ended, self.shared.ended.get()) {
                    (Some(ended), Some(hear)) => hear(ended),
                    (Some(_), None) => {}
                    (None, _) => self.garbage += 1,
                }
            }
            (Some(method), None) if method == "notifications/message" => self.log(message.params),
            // Other notifications of a guest are ignored.
            (Some(_), None) => {}
            (Some(method), Some(id)) => self.asked(method, id, message.params),
            (None, None) => {
                self.garbage += 1;
                return;
            }
        }
        self.heard = Instant::now();
        self.pinged = false;
    }

    fn response(&mut self, id: &RawValue, message: &Envelope<'_>) {
        let Ok(id) = id.get().parse::<u64>() else {
            self.garbage += 1;
            return;
        };
        // Late, unknown and duplicate answers are dropped.
        let Some(pending) = self.shared.calls().pending.remove(&id) else { return };
        if let Some(sent) = self.sent.take() {
            self.busy_poll.took(sent.elapsed());
        }
        pending.sink.done(outcome(message));
    }

    fn progress(&self, params: &RawValue) -> Option<()> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Params<'a> {
            #[serde(borrow)]
            progress_token: &'a RawValue,
            progress: f64,
            #[serde(default)]
            total: Option<f64>,
            #[serde(borrow, default)]
            message: Option<Cow<'a, str>>,
        }
        let params: Params<'_> = serde_json::from_str(params.get()).ok()?;
        let id: u64 = params.progress_token.get().parse().ok()?;
        let mut calls = self.shared.calls();
        // Progress that is late or does not increase is dropped.
        if let Some(pending) = calls.pending.get_mut(&id)
            && pending.wants_progress
            && params.progress.is_finite()
            && pending.progress.is_none_or(|last| params.progress > last)
        {
            pending.progress = Some(params.progress);
            let message =
                params.message.map(|m| m.chars().filter(|c| !c.is_control()).take(MESSAGE_MAX).collect());
            let total = params.total.filter(|t| t.is_finite());
            pending.sink.progress(GuestProgress { progress: params.progress, total, message });
        }
        Some(())
    }

    /// Passes a log message to the call that it belongs to.
    fn log(&self, params: Option<&RawValue>) {
        if let Some((params, id)) = params.and_then(|params| Some((params, passing::call_of(params)?)))
            && let Some(pending) = self.shared.calls().pending.get_mut(&id)
        {
            pending.sink.log(params);
        }
    }

    /// Passes a question of the guest to the call that it belongs to, or answers the request.
    fn asked(&self, method: &str, id: &RawValue, params: Option<&RawValue>) {
        let Some((call, question)) = passing::question(method, id, params, &self.outbox) else {
            return self.answer(method, id);
        };
        if let Some(pending) = self.shared.calls().pending.get_mut(&call) {
            pending.sink.ask(question);
        }
    }

    /// Answers a request of the guest to the host: only `ping` is supported.
    fn answer(&self, method: &str, id: &RawValue) {
        if self.outbox.len() > ANSWER_BACKLOG || id.get().len() > 200 {
            return;
        }
        self.outbox.push(|out| {
            out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
            out.extend_from_slice(id.get().as_bytes());
            out.extend_from_slice(match method {
                "ping" => br#","result":{}}"#.as_slice(),
                _ => br#","error":{"code":-32601,"message":"not offered to guests"}}"#,
            });
        });
    }
}

/// Returns the result or error of a response.
fn outcome<'a>(message: &Envelope<'a>) -> Result<&'a RawValue, LinkError> {
    match (message.result, message.error) {
        (Some(result), None) if !result.get().starts_with('{') => {
            Err(LinkError::Misbehaved { what: "not an object" })
        }
        (Some(result), None) if result.get().len() > GUEST_RESULT_MAX => Err(LinkError::TooLarge),
        (Some(result), None) => Ok(result),
        (None, Some(error)) => {
            #[derive(Deserialize)]
            struct ErrorObject<'a> {
                code: i64,
                #[serde(borrow, default)]
                message: Cow<'a, str>,
                #[serde(borrow, default)]
                data: Option<&'a RawValue>,
            }
            let error: ErrorObject<'_> = serde_json::from_str(error.get())
                .map_err(|_| LinkError::Misbehaved { what: "a malformed error" })?;
            let message = result::words(error.message, MESSAGE_MAX)?.into_owned();
            let sound = |data: &&RawValue| data.get().len() <= DATA_MAX && scan::check(data).is_ok();
            let data = error.data.filter(sound).map(|data| data.get().into());
            Err(LinkError::Refused { code: error.code, message, data })
        }
        (Some(_), Some(_)) => Err(LinkError::Misbehaved { what: "both a result and an error" }),
        (None, None) => Err(LinkError::Misbehaved { what: "neither a result nor an error" }),
    }
}
