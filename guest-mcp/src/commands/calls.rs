//! The tools for commands, as the holder runs them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nexus_schema::error::ErrorCode;
use nexus_schema::limits::{
    COMMAND_TIMEOUT_DEFAULT, FILE_READ_MAX, FILE_WRITE_MAX, KEEP_DEFAULT, KEEP_MAX, OUTPUT_DEFAULT,
    OUTPUT_MAX, PAGE_DEFAULT, PAGE_MAX, WAIT_MAX, YIELD_DEFAULT,
};
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::{
    CommandInput, CommandInputParams, CommandList, CommandListOutput, CommandListParams, CommandOutput,
    CommandOutputParams, CommandSignal, CommandSignalOutput, CommandSignalParams, CommandStart,
    CommandStartParams, OutputStream, RunCommand, RunCommandParams,
};
use nexus_schema::tools::mcp::{McpCall, McpList};
use nexus_schema::{Tool, ToolError, TraceContext};
use rustix::process::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use tokio::time::{Instant, MissedTickBehavior};

use super::command::{Command, Limits, Stream, Whose};
use super::cursor::{cursor, offsets};
use super::launch::{self, Order, Started};
use super::services::SERVICES_START;
use super::show::{self, Piece, Report, Said, report, signal_name};
use super::table::Table;
use super::{Caller, newest, oom};
use crate::holder::wire::Answer;
use crate::os::reason;
use crate::tools::{agent_failed, cancelled};

/// The maximum size of base64 output of one of two streams, in bytes.
const BASE64_MAX: u64 = 256 << 10;
/// The interval of progress messages with the newest lines.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// The minimum timeout for writing input, even if the call itself should not wait.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);
/// The maximum grace period.
const GRACE_MAX: Duration = Duration::from_secs(600);

/// A call that waits for a command's end, until this is dropped.
struct LettingGo<'a>(&'a Command);

impl Drop for LettingGo<'_> {
    fn drop(&mut self) {
        self.0.is_waited_for.store(false, Ordering::SeqCst);
    }
}

impl Table {
    /// Runs one call.
    pub(crate) async fn call(
        self: &Arc<Self>,
        tool: &str,
        params: Box<RawValue>,
        caller: Caller,
    ) -> Result<Answer, ToolError> {
        match tool {
            RunCommand::NAME => self.run(decode::<RunCommand>(params)?, caller).await,
            CommandStart::NAME => self.start_only(decode::<CommandStart>(params)?, caller),
            CommandOutput::NAME => self.output(decode::<CommandOutput>(params)?).await,
            CommandInput::NAME => self.input(decode::<CommandInput>(params)?).await,
            CommandSignal::NAME => self.signal(decode::<CommandSignal>(params)?).await,
            CommandList::NAME => {
                self.look_at_left().await;
                self.list_page(&decode::<CommandList>(params)?)
            }
            McpList::NAME => self.mcp_list(decode::<McpList>(params)?, &caller).await,
            McpCall::NAME => self.mcp_call(decode::<McpCall>(params)?, &caller).await,
            SERVICES_START => {
                let orders = serde_json::from_str(params.get());
                let orders = orders.map_err(|error| agent_failed(format!("start services: {error}")))?;
                plain(String::new(), &self.start_services(orders, &caller.settings).await)
            }
            other => Err(agent_failed(format!("no such tool: {other}"))),
        }
    }

    async fn run(self: &Arc<Self>, params: RunCommandParams, caller: Caller) -> Result<Answer, ToolError> {
        if params.checkpoint {
            return Err(ToolError::invalid(
                "a checkpoint is taken by the host of this VM, which this call did not pass through",
            )
            .hint("leave checkpoint out, or call the tool through nexusd"));
        }
        let wait = seconds("yield_after_s", params.yield_after_s, YIELD_DEFAULT, WAIT_MAX)?;
        let encoding = params.encoding.unwrap_or_default();
        let most = match encoding {
            ContentEncoding::Text => OUTPUT_MAX,
            ContentEncoding::Base64 => BASE64_MAX,
        };
        let most = params.max_output_bytes.map_or(OUTPUT_DEFAULT, u64::from).min(most) as usize;
        let limits = Limits {
            kill_descendants: params.kill_descendants,
            lossless: params.lossless,
            ..Limits::of(params.timeout_s, params.kill_grace_s, params.keep_bytes)?
        };
        let order = Order {
            command: params.command,
            argv: params.argv,
            login_shell: false,
            cwd: params.cwd,
            env: in_trace(params.env, caller.trace.as_ref()),
            user: params.user,
            stdin: params.stdin,
            stdin_encoding: params.stdin_encoding.unwrap_or_default(),
            stdin_path: params.stdin_path,
            stdin_open: params.stdin_open,
            terminal: None,
            merge: params.merge,
            log: params.log,
        };
        let (cancel, tell) = (caller.cancel.clone(), caller.tell);
        let whose = Whose { client: caller.client, service: None, is_waited_for: true };
        let command = self.start(order, limits, whose, &caller.settings)?;
        // Also if this call is abandoned.
        let letting_go = LettingGo(&command);
        tokio::select! {
            biased;
            () = command.ended() => {}
            () = cancel.cancelled() => {
                command.kill_to_the_end().await?;
                return Err(cancelled());
            }
            () = tokio::time::sleep(wait) => {}
            // It only continues once its output is read, which takes another call.
            () = full(&command) => {}
            () = tell_newest(&command, tell) => {}
        }
        // First, so that its end is either in this reply or announced.
        drop(letting_go);
        let ending = command.ending();
        let left = command.left().await;
        let (pieces, offsets) = {
            let [stdout, stderr] = [command.streams[0].kept(), command.streams[1].kept()];
            (show::ends([&stdout, &stderr], most, encoding), [stdout.total(), stderr.total()])
        };
        let is_whole = pieces.iter().all(|piece| piece.omitted == 0);
        if ending.is_some() && left.is_none() && is_whole {
            command.is_delivered.store(true, Ordering::Release);
        }
        let cursor = Some(cursor(command.id, offsets));
        let said = Said { ending, left, cursor, more: false, written: None, opening: None };
        answer(report(&command, said, pieces, encoding))
    }

    fn start_only(self: &Arc<Self>, params: CommandStartParams, caller: Caller) -> Result<Answer, ToolError> {
        let (mut order, limits) = order(params)?;
        order.env = in_trace(order.env, caller.trace.as_ref());
        let whose = Whose { client: caller.client, ..Whose::default() };
        let command = self.start(order, limits, whose, &caller.settings)?;
        let said = Said {
            ending: command.ending(),
            left: None,
            cursor: Some(cursor(command.id, [0, 0])),
            more: false,
            written: None,
            opening: Some("started".to_owned()),
        };
        answer(report(&command, said, [Piece::default(), Piece::default()], ContentEncoding::Text))
    }

    /// Starts a command.
    pub(super) fn start(
        self: &Arc<Self>,
        order: Order,
        limits: Limits,
        whose: Whose,
        settings: &crate::holder::wire::Settings,
    ) -> Result<Arc<Command>, ToolError> {
        let id = self.new_id()?;
        let stdin_open = order.stdin_open;
        let memory = oom::Before::look();
        // At least as long as what is decoded. Longer input is refused when it is decoded.
        let input = order.stdin.as_ref().map_or(0, String::len).min(FILE_WRITE_MAX as usize);
        let held = Some(self.hold_input(input)?);
        let started = Started { held, ..launch::start(order, settings, self.in_vm, id.to_string())? };
        Ok(Command::live(self, id, whose, started, limits, stdin_open, memory))
    }

    async fn output(self: &Arc<Self>, params: CommandOutputParams) -> Result<Answer, ToolError> {
        let encoding = params.encoding.unwrap_or_default();
        let from = match (params.cursor, params.stream, params.offset) {
            (Some(cursor), _, None) => offsets(&cursor, params.id)?,
            (None, Some(OutputStream::Stdout), Some(offset)) => [offset, 0],
            (None, Some(OutputStream::Stderr), Some(offset)) => [0, offset],
            (None, _, None) => [0, 0],
            (_, _, Some(_)) => return Err(ToolError::invalid("offset needs stream, and excludes cursor")),
        };
        let command = self.find(params.id)?;
        command.streams.iter().zip(from).for_each(|(stream, from)| stream.was_read(from));
        let wait = milliseconds(params.wait_ms)?;
        if params.until_end {
            tokio::select! {
                () = command.ended() => {}
                () = full(&command) => {}
                () = tokio::time::sleep(wait) => {}
            }
        } else {
            wait_for_news(&command, from, params.stream, wait).await;
        }
        let look = Look { from, stream: params.stream, limit: params.limit, encoding, written: None };
        show_news(&command, look).await
    }

    async fn input(self: &Arc<Self>, params: CommandInputParams) -> Result<Answer, ToolError> {
        let encoding = params.encoding.unwrap_or_default();
        let wait = milliseconds(params.wait_ms)?;
        let from = params.cursor.map(|cursor| offsets(&cursor, params.id)).transpose()?;
        let decoded = params.input.map(|text| encoding.decode(text)).transpose();
        let bytes =
            decoded.map_err(|error| ToolError::invalid(format!("input: {error}")))?.unwrap_or_default();
        if bytes.len() as u64 > FILE_WRITE_MAX {
            let text = format!("input has {} bytes, at most {FILE_WRITE_MAX} are allowed", bytes.len());
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("send it in pieces"));
        }
        let command = self.find(params.id)?;
        if params.cols.is_some() || params.rows.is_some() {
            resize(&command, params.cols, params.rows)?;
        }
        let from = from.unwrap_or_else(|| totals(&command));
        let deadline = Instant::now() + wait.max(WRITE_TIMEOUT);
        let written = match self.hold_input(bytes.len()) {
            Ok(_held) => write(&command, &bytes, params.eof, deadline).await?,
            // As if this command did not read.
            Err(_) => 0,
        };
        drop(bytes);
        wait_for_news(&command, from, None, wait).await;
        let look = Look { from, stream: None, limit: None, encoding, written: Some(written) };
        show_news(&command, look).await
    }

    async fn signal(self: &Arc<Self>, params: CommandSignalParams) -> Result<Answer, ToolError> {
        let (signal, name) = signal(params.signal.as_deref().unwrap_or("TERM"))?;
        let command = self.find(params.id)?;
        if !command.is_running() && command.left().await.is_none() {
            let text = format!("the command {} has ended, and none of its processes are running", params.id);
            return Err(
                ToolError::new(ErrorCode::CommandEnded, text).hint("command_output shows how it ended")
            );
        }
        if matches!(signal, Signal::TERM | Signal::KILL | Signal::INT | Signal::QUIT) {
            command.was_told_to_end.store(true, Ordering::Release);
        }
        command.signal(signal).await;
        let state = command.entry().state;
        let facts = CommandSignalOutput { command_id: params.id, signal: name.clone(), state };
        plain(format!("sent {name} to command {}", params.id), &facts)
    }

    fn list_page(&self, params: &CommandListParams) -> Result<Answer, ToolError> {
        let limit = params.limit.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_MAX) as usize;
        let start = match &params.cursor {
            None => 0,
            Some(text) => text.parse::<usize>().map_err(|_| {
                ToolError::invalid("cursor is not from an earlier list of commands")
                    .hint("omit it to start at the beginning")
            })?,
        };
        let all = self.list();
        let next = start.saturating_add(limit);
        let known = all.len();
        let next_cursor = (next < known).then(|| next.to_string());
        let commands: Vec<_> = all.into_iter().skip(start).take(limit).collect();
        let mut answer = String::new();
        for entry in &commands {
            let state = match (entry.state, entry.status) {
                (nexus_schema::tools::command::CommandState::Running, _) => "running".to_owned(),
                (nexus_schema::tools::command::CommandState::Lost, _) => "lost".to_owned(),
                (_, Some(status)) => format!("status {status}"),
                (_, None) => "ended".to_owned(),
            };
            let client = match (&entry.service, &entry.client) {
                (Some(service), _) => format!("service {service}"),
                (None, Some(client)) => format!("by {client}"),
                (None, None) => "by -".to_owned(),
            };
            let left = entry
                .descendants
                .as_ref()
                .map_or(String::new(), |left| format!(", {} left behind", left.count));
            answer.push_str(&format!(
                "{} {state}{left} · {} · {client} · {}\n",
                entry.command_id, entry.started_at, entry.command
            ));
        }
        let header = match (commands.len(), known) {
            (1, 1) => "1 command".to_owned(),
            (count, known) if count == known => format!("{count} commands"),
            (count, known) => {
                let more = next_cursor.as_ref().map(|cursor| format!("; cursor of the next page: {cursor}"));
                format!("{count} of {known} commands{}", more.unwrap_or_default())
            }
        };
        let facts = CommandListOutput { commands, next_cursor };
        let mut reply = plain(header, &facts)?;
        if !answer.is_empty() {
            reply.blocks.push((None, answer));
        }
        Ok(reply)
    }
}

/// The environment of a command that belongs to a trace; what the call says itself stays.
fn in_trace(mut env: BTreeMap<String, String>, trace: Option<&TraceContext>) -> BTreeMap<String, String> {
    for (name, value) in trace.into_iter().flat_map(TraceContext::environment) {
        env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    env
}

/// Converts the parameters of `command_start`.
pub(super) fn order(params: CommandStartParams) -> Result<(Order, Limits), ToolError> {
    let limits = Limits {
        kill_descendants: params.kill_descendants,
        lossless: params.lossless,
        ..Limits::of(params.timeout_s, params.kill_grace_s, params.keep_bytes)?
    };
    if !params.tty && (params.cols.is_some() || params.rows.is_some()) {
        return Err(ToolError::invalid("cols and rows need tty"));
    }
    let order = Order {
        command: params.command,
        argv: params.argv,
        login_shell: false,
        cwd: params.cwd,
        env: params.env,
        user: params.user,
        stdin: params.stdin,
        stdin_encoding: ContentEncoding::Text,
        stdin_path: params.stdin_path,
        stdin_open: params.stdin_open,
        terminal: params.tty.then(|| (params.cols.unwrap_or(80), params.rows.unwrap_or(24))),
        merge: params.merge,
        log: params.log,
    };
    Ok((order, limits))
}

impl Limits {
    fn of(timeout: Option<f64>, grace: Option<f64>, keep: Option<u32>) -> Result<Self, ToolError> {
        let timeout = seconds("timeout_s", timeout, COMMAND_TIMEOUT_DEFAULT, Duration::MAX)?;
        let grace = seconds("kill_grace_s", grace, Duration::ZERO, GRACE_MAX)?;
        let keep = keep.map_or(KEEP_DEFAULT, u64::from);
        if keep > KEEP_MAX {
            return Err(ToolError::invalid(format!("keep_bytes must be at most {KEEP_MAX}")));
        }
        let timeout = (!timeout.is_zero()).then_some(timeout);
        Ok(Self { timeout, grace, keep: keep as usize, ..Self::default() })
    }
}

fn decode<T: Tool>(params: Box<RawValue>) -> Result<T::Params, ToolError>
where
    T::Params: DeserializeOwned,
{
    let decoded =
        serde_json::from_str(params.get()).map_err(|error| agent_failed(format!("{}: {error}", T::NAME)));
    // A call may wait long, and this may be large.
    drop(params);
    decoded
}

fn answer(report: Report) -> Result<Answer, ToolError> {
    let Report { header, blocks, facts } = report;
    Ok(Answer { blocks, ..plain(header, &facts)? })
}

pub(super) fn plain(header: String, facts: &impl Serialize) -> Result<Answer, ToolError> {
    let facts = to_raw_value(facts).map_err(|error| agent_failed(format!("write the result: {error}")))?;
    Ok(Answer { header, blocks: Vec::new(), facts })
}

fn seconds(name: &str, value: Option<f64>, default: Duration, most: Duration) -> Result<Duration, ToolError> {
    let Some(value) = value else { return Ok(default) };
    let duration = Duration::try_from_secs_f64(value).ok().filter(|duration| *duration <= most);
    duration.ok_or_else(|| {
        let range =
            if most == Duration::MAX { "0 or more".to_owned() } else { format!("0 to {}", most.as_secs()) };
        ToolError::invalid(format!("{name} must be {range}"))
    })
}

fn milliseconds(value: Option<u32>) -> Result<Duration, ToolError> {
    let wait = Duration::from_millis(value.unwrap_or(0).into());
    if wait > WAIT_MAX {
        return Err(ToolError::invalid(format!("wait_ms must be 0 to {}", WAIT_MAX.as_millis())));
    }
    Ok(wait)
}

fn totals(command: &Command) -> [u64; 2] {
    [command.streams[0].kept().total(), command.streams[1].kept().total()]
}

/// Sends the newest lines periodically; never returns.
async fn tell_newest(command: &Command, tell: Option<Box<dyn Fn(String) + Send + Sync>>) {
    let Some(tell) = tell else { return std::future::pending().await };
    let mut tick = tokio::time::interval(TELL_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = 0;
    loop {
        tick.tick().await;
        let seen = command.seen.load(Ordering::Acquire);
        if seen != told
            && let Some(text) = newest::lines(command)
        {
            told = seen;
            tell(text);
        }
    }
}

/// Waits until a command is blocked because its output is not read.
async fn full(command: &Command) {
    let mut watch = command.watch();
    let is_full = |stream: &Stream| stream.is_full(command.limits.keep);
    if watch.wait_for(|_| command.streams.iter().any(is_full)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for output after the offsets or for the end of the command, at most for `wait`.
async fn wait_for_news(command: &Command, from: [u64; 2], stream: Option<OutputStream>, wait: Duration) {
    let mut watch = command.watch();
    let is_news = || {
        let totals = totals(command);
        let [stdout, stderr] = [totals[0] > from[0], totals[1] > from[1]];
        match stream {
            None => stdout || stderr,
            Some(OutputStream::Stdout) => stdout,
            Some(OutputStream::Stderr) => stderr,
        }
    };
    let is_over = || !command.is_running() && command.streams.iter().all(Stream::is_closed);
    let news = watch.wait_for(|_| is_news() || is_over() || !command.is_running());
    // Even with a wait of zero, it checks once.
    let _ = tokio::time::timeout(wait, news).await;
}

/// The part of a command's output to show.
struct Look {
    from: [u64; 2],
    stream: Option<OutputStream>,
    limit: Option<u32>,
    encoding: ContentEncoding,
    written: Option<u64>,
}

async fn show_news(command: &Arc<Command>, look: Look) -> Result<Answer, ToolError> {
    let Look { from, stream, limit, encoding, written } = look;
    // Read before the streams, so that all output from before the end is shown with it.
    let ending = command.ending();
    let left = command.left().await;
    let most = match (encoding, stream) {
        (ContentEncoding::Text, _) => OUTPUT_MAX,
        (ContentEncoding::Base64, None) => BASE64_MAX,
        (ContentEncoding::Base64, Some(_)) => FILE_READ_MAX,
    };
    let limit = limit.map_or(OUTPUT_DEFAULT, u64::from).clamp(1, most) as usize;
    let wanted = [stream != Some(OutputStream::Stderr), stream != Some(OutputStream::Stdout)];
    let mut pieces = [0, 1].map(|at| {
        let (stream, kept) = (&command.streams[at], command.streams[at].kept());
        let limit = if wanted[at] { limit } else { 0 };
        if limit == 0 {
            return Piece {
                offset: from[at],
                total: kept.total(),
                dropped: kept.dropped(),
                ..Piece::default()
            };
        }
        Piece::from(&kept, from[at], limit, encoding, stream.is_closed())
    });
    if encoding == ContentEncoding::Text {
        let shared = show::share([pieces[0].head.len(), pieces[1].head.len()]);
        pieces.iter_mut().zip(shared).for_each(|(piece, most)| piece.shorten(most));
    }
    let ends = [pieces[0].end(), pieces[1].end()];
    let is_behind = |at: usize| ends[at] < pieces[at].total || command.streams[at].has_unread();
    let more = [0, 1].into_iter().any(|at| wanted[at] && is_behind(at));
    let cursor = Some(cursor(command.id, ends));
    let said = Said { ending, left, cursor, more, written, opening: None };
    answer(report(command, said, pieces, encoding))
}

pub(super) fn resize(command: &Command, cols: Option<u16>, rows: Option<u16>) -> Result<(), ToolError> {
    let Some(terminal) = &command.terminal else {
        return Err(ToolError::invalid("cols and rows need a terminal, but this command has none"));
    };
    let resized = terminal.size().and_then(|(old_cols, old_rows)| {
        terminal.resize((cols.unwrap_or(old_cols), rows.unwrap_or(old_rows)))
    });
    resized.map_err(|error| {
        ToolError::new(ErrorCode::CommandFailed, format!("set the terminal's size: {}", reason(&error)))
    })
}

/// Writes to a command; returns how many bytes it accepted before the deadline.
async fn write(command: &Command, bytes: &[u8], eof: bool, deadline: Instant) -> Result<u64, ToolError> {
    if bytes.is_empty() && !eof {
        return Ok(0);
    }
    let closed = |why: &str| {
        let text = format!("the standard input of command {} is closed: {why}", command.id);
        Err(ToolError::new(ErrorCode::InputClosed, text)
            .hint("command_output shows the state of the command"))
    };
    // The input from the start may still be being written.
    let Ok(mut input) = tokio::time::timeout_at(deadline, command.input.lock()).await else { return Ok(0) };
    let Some(end) = input.as_ref() else {
        return closed(if command.is_running() {
            "the command was started without it, or it was closed"
        } else {
            "the command has ended"
        });
    };
    let mut written = 0;
    let typed_eof = eof && end.is_terminal();
    let all: Cow<'_, [u8]> = if typed_eof { [bytes, b"\x04"].concat().into() } else { bytes.into() };
    while written < all.len() {
        match tokio::time::timeout_at(deadline, end.write(&all[written..])).await {
            Ok(Ok(more)) => written += more,
            Ok(Err(_)) if written == 0 => {
                *input = None;
                return closed("no process reads it any more");
            }
            Ok(Err(_)) | Err(_) => break,
        }
    }
    if eof && !typed_eof && written == all.len() {
        *input = None;
    }
    Ok(written.min(bytes.len()) as u64)
}

/// Parses a signal's name or number; also returns its name.
pub(super) fn signal(text: &str) -> Result<(Signal, String), ToolError> {
    let upper = text.trim().to_ascii_uppercase();
    let number = match upper.parse::<i32>() {
        Ok(number) => Some(number),
        Err(_) => {
            let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
            name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
        }
    };
    let named = number.and_then(|number| Some((Signal::from_named_raw(number)?, signal_name(number))));
    named.ok_or_else(|| {
        let text: String = text.chars().take(40).collect();
        ToolError::invalid(format!("no signal {text}"))
            .hint("give a name such as TERM, INT or KILL, or a number from 1 to 31")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_have_fractions_and_bounds() {
        let of = |value| seconds("x", value, Duration::from_secs(30), Duration::from_secs(45)).ok();
        assert_eq!(of(None), Some(Duration::from_secs(30)));
        assert_eq!(of(Some(0.25)), Some(Duration::from_millis(250)));
        assert_eq!(of(Some(45.0)), Some(Duration::from_secs(45)));
        for bad in [-1.0, 45.1, f64::NAN, f64::INFINITY] {
            assert_eq!(of(Some(bad)), None, "{bad}");
        }
        let limits = |timeout| Limits::of(timeout, None, None).map(|limits| limits.timeout);
        assert_eq!(limits(None), Ok(Some(COMMAND_TIMEOUT_DEFAULT)));
        assert_eq!(limits(Some(0.0)), Ok(None));
        assert!(Limits::of(None, None, Some((16 << 20) + 1)).is_err());
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["TERM", "term", "SIGTERM", "15"] {
            assert_eq!(signal(text).unwrap(), (Signal::TERM, "SIGTERM".to_owned()));
        }
        for bad in ["", "0", "65", "-9", "NOSUCH", "SIG"] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }
}
