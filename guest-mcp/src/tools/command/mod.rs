//! `run_command`: what is to be run ([`launch`]), what it writes ([`capture`]), and how all of it is ended ([`tree`]).
//!
//! ```text
//! spawn ─> runs ─┬─> ended by itself ─> drain what is in the pipes ─> result
//!                ├─> its time is up  ─> kill the whole tree ───────> result with `timed_out`
//!                └─> cancelled, or the connection is gone ─> kill the whole tree
//! ```
//! Processes that a command leaves behind on purpose live on after it, and what they still write is thrown away.

mod capture;
mod cgroup;
mod launch;
mod oom;
mod tree;

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::{COMMAND_TIMEOUT_DEFAULT, COMMAND_TIMEOUT_MAX, OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::{RunCommand, RunCommandOutput, RunCommandParams};
use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin};

use self::capture::{Collector, Shown};
pub(crate) use self::launch::PATH;
pub(crate) use self::tree::Running;
use super::{Block, Call, Reply, Run, cancelled, human_bytes};
use crate::agent::Agent;

/// The most that base64 output may hold of one stream, in bytes.
const BASE64_MAX: u64 = 256 << 10;
/// How long a process may take to be gone once it was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

impl Run for RunCommand {
    async fn run(call: Call, params: RunCommandParams) -> Result<Reply<RunCommandOutput>, ToolError> {
        let timeout = timeout(params.timeout_s)?;
        let encoding = params.encoding.unwrap_or_default();
        let most = match encoding {
            ContentEncoding::Text => OUTPUT_MAX,
            ContentEncoding::Base64 => BASE64_MAX,
        };
        let cap = params.max_output_bytes.map_or(OUTPUT_DEFAULT, u64::from).min(most) as usize;
        let memory = oom::Before::look();
        let mut started = launch::start(&call, params)?;
        let running = Registered::new(&call.agent, started.running.clone());
        if let (Some(stdin), Some(input)) = (started.child.stdin.take(), started.input.take()) {
            tokio::spawn(feed(stdin, input));
        }
        let keep_tail = encoding == ContentEncoding::Text;
        let stdout = Collector::start(started.child.stdout.take(), cap, keep_tail);
        let stderr = Collector::start(started.child.stderr.take(), cap, keep_tail);

        let begun = Instant::now();
        let end = watch(&mut started.child, timeout, &call).await;
        let duration = begun.elapsed();
        let (status, timed_out) = match end {
            End::ByItself(status) => (status, false),
            End::TimedOut => (kill(&mut started.child, &running).await?, true),
            End::Cancelled => {
                kill(&mut started.child, &running).await?;
                return Err(cancelled());
            }
        };
        capture::drain([&stdout, &stderr]).await;
        let killed = memory.killed_since().await;
        let open = !stdout.is_closed() || !stderr.is_closed();
        Ok(report(
            status,
            timed_out.then_some(timeout),
            duration,
            open,
            killed,
            [stdout.take(), stderr.take()],
            encoding,
        ))
    }
}

fn timeout(seconds: Option<u32>) -> Result<Duration, ToolError> {
    let Some(seconds) = seconds else { return Ok(COMMAND_TIMEOUT_DEFAULT) };
    let timeout = Duration::from_secs(seconds.into());
    if timeout.is_zero() || timeout > COMMAND_TIMEOUT_MAX {
        return Err(ToolError::invalid(format!("timeout_s is 1 to {}", COMMAND_TIMEOUT_MAX.as_secs())));
    }
    Ok(timeout)
}

/// How a command came to its end.
enum End {
    ByItself(ExitStatus),
    TimedOut,
    Cancelled,
}

async fn watch(child: &mut Child, timeout: Duration, call: &Call) -> End {
    tokio::select! {
        // A command that ended in time has ended in time.
        biased;
        status = child.wait() => match status {
            Ok(status) => End::ByItself(status),
            // Only if something else reaped it: there is no status then, but it is gone.
            Err(_) => End::ByItself(ExitStatus::default()),
        },
        () = call.cancel.cancelled() => End::Cancelled,
        () = tokio::time::sleep(timeout) => End::TimedOut,
    }
}

async fn kill(child: &mut Child, running: &Registered<'_>) -> Result<ExitStatus, ToolError> {
    let tree = running.running.clone();
    // Walking /proc may take a moment on a busy machine.
    let killed = tokio::task::spawn_blocking(move || tree.kill());
    let gone = tokio::time::timeout(KILL_TIMEOUT, async {
        let _ = killed.await;
        child.wait().await
    });
    match gone.await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(_)) | Err(_) => {
            Err(ToolError::new(ErrorCode::Timeout, "the command hangs in the kernel and could not be killed"))
        }
    }
}

/// Writes what a command reads; one that does not want it is no failure.
async fn feed(mut stdin: ChildStdin, input: Vec<u8>) {
    let _ = stdin.write_all(&input).await;
}

/// A command in the agent's list of running ones; killed if its call is dropped before its end.
struct Registered<'a> {
    agent: &'a Agent,
    running: Arc<Running>,
}

impl<'a> Registered<'a> {
    fn new(agent: &'a Agent, running: Arc<Running>) -> Self {
        agent.running.lock().unwrap_or_else(PoisonError::into_inner).push(running.clone());
        Self { agent, running }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.agent
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|other| !Arc::ptr_eq(other, &self.running));
        self.running.release();
    }
}

fn report(
    status: ExitStatus,
    timed_out: Option<Duration>,
    duration: Duration,
    open: bool,
    oom_killed: Vec<String>,
    streams: [capture::Captured; 2],
    encoding: ContentEncoding,
) -> Reply<RunCommandOutput> {
    let signal = status.signal().map(signal_name);
    let total: u64 = streams.iter().map(capture::Captured::total).sum();
    let mut header = match (timed_out, status.code(), &signal) {
        (Some(limit), _, _) => format!("timed out after {} s and was killed", limit.as_secs()),
        (None, Some(code), _) => format!("exit {code}"),
        (None, None, Some(signal)) => format!("killed by {signal}"),
        (None, None, None) => "ended".to_owned(),
    };
    header.push_str(&format!(" · {} · {}", human_duration(duration), human_bytes(total)));
    if open {
        header.push_str(" · a process in the background still holds its output open");
    }
    if !oom_killed.is_empty() {
        let who = oom_killed.join(", ");
        header.push_str(&format!(
            "\nthe VM ran out of memory, and the kernel killed {who}; results may be wrong"
        ));
    }
    let [stdout, stderr] = capture::show(streams, encoding);
    for (name, shown) in [("stdout", &stdout), ("stderr", &stderr)] {
        note(&mut header, name, shown, encoding);
    }
    let facts = RunCommandOutput {
        exit_code: status.code(),
        signal,
        timed_out: timed_out.is_some(),
        duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
        stdout: stdout.facts,
        stderr: stderr.facts,
        oom_killed,
    };
    let mut reply = Reply::new(header, facts);
    if !stdout.text.is_empty() {
        reply.blocks.push(Block::stream("stdout", stdout.text));
    }
    if !stderr.text.is_empty() {
        reply.blocks.push(Block::talk("stderr:"));
        reply.blocks.push(Block::stream("stderr", stderr.text));
    }
    reply
}

/// Says in the header what a stream does not show exactly.
fn note(header: &mut String, name: &str, shown: &Shown, encoding: ContentEncoding) {
    if shown.facts.omitted_bytes > 0 {
        let place = match encoding {
            ContentEncoding::Text => "middle",
            ContentEncoding::Base64 => "end",
        };
        header.push_str(&format!("\n{name}: {} bytes left out of the {place}", shown.facts.omitted_bytes));
    }
    if shown.facts.lossy {
        header.push_str(&format!(
            "\n{name}: not UTF-8, bytes were replaced; encoding base64 gives them exactly"
        ));
    }
}

fn signal_name(number: i32) -> String {
    Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.as_str().to_owned())
}

fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", (duration.as_millis() / 100) as f64 / 10.0),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_for_people() {
        for (millis, text) in
            [(0, "0 ms"), (999, "999 ms"), (1_250, "1.2 s"), (59_999, "59.9 s"), (61_000, "1 min 1 s")]
        {
            assert_eq!(human_duration(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn timeouts_have_bounds() {
        assert_eq!(timeout(None), Ok(COMMAND_TIMEOUT_DEFAULT));
        assert_eq!(timeout(Some(3600)), Ok(COMMAND_TIMEOUT_MAX));
        assert!(timeout(Some(0)).is_err() && timeout(Some(3601)).is_err());
    }

    #[test]
    fn signals_have_names() {
        assert_eq!(signal_name(9), "SIGKILL");
        assert_eq!(signal_name(40), "signal 40");
    }
}
