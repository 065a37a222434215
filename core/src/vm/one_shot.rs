//! VMs that exist for one command: it is run once they are ready, and they are deleted when it has ended, or cannot be run.
//!
//! The command is the guest's: it survives the daemon and its link. A later daemon finds it by the name of the client that started it.

use std::sync::Arc;
use std::time::Duration;

use nexus_schema::id::{CommandId, OpId};
use nexus_schema::tools::command::{
    CommandList, CommandListParams, CommandOutput, CommandOutputParams, CommandStart, CommandStartParams,
    CommandState, OutputStream, RunCommandOutput, StreamFacts,
};
use nexus_schema::tools::vm::{VmDetails, VmRun, VmState};
use nexus_schema::{ErrorCode, Name, Reference, ToolError};

use super::actor::DAEMON;
use super::guest_call::{self, Said, is_of_link};
use super::view::details;
use super::wait::ask;
use crate::context::{Command, Handle, Shared};
use crate::guest::Link;
use crate::os::failpoint;
use crate::progress::Progress;

/// How much of each stream is kept for the result, in bytes: half of it is its tail.
const KEPT: u32 = 16 << 10;
/// How long one question to the guest waits for the command's end.
const WAIT: Duration = Duration::from_secs(30);
/// How long the guest has for an answer besides.
const SLACK: Duration = Duration::from_secs(15);
/// How long to wait until a guest that could not be asked is asked again.
const AGAIN: Duration = Duration::from_millis(300);

/// Runs the command of a VM that is ready or about to be, and deletes the VM however that ends.
pub(crate) async fn run(
    shared: &Arc<Shared>,
    handle: &Handle,
    op: OpId,
    line: &str,
    progress: &Progress,
) -> Result<VmDetails, ToolError> {
    progress.step("running the command");
    let id = handle.view.borrow().record.id;
    let work = async {
        let details = details(shared, &Reference::Id(id)).await?;
        Ok((details, follow(handle, op, line).await?))
    };
    let ended = tokio::select! {
        ended = work => ended,
        () = progress.cancelled() => Err(ToolError::new(
            ErrorCode::Cancelled,
            format!("the run in {} was cancelled", handle.view.borrow().record.name),
        )),
    };
    failpoint::reach("run-ended");
    let why = match &ended {
        Ok(_) => "deleted: its command has ended",
        Err(_) => "deleted: its command could not be run to its end",
    };
    delete(handle, why).await;
    let (details, run) = ended?;
    Ok(VmDetails {
        state: VmState::Stopped,
        reason: Some(why.to_owned()),
        process: None,
        published: Vec::new(),
        idle_stop_at: None,
        run: Some(run),
        ..details
    })
}

/// Deletes the VM of a run.
pub(crate) async fn delete(handle: &Handle, why: &'static str) {
    let who = DAEMON.to_owned();
    let deleted = ask(handle, |reply| Command::Delete { who, force: true, if_boot: None, why, reply }).await;
    match deleted {
        Err(error) if error.code != ErrorCode::VmNotFound => {
            let vm = handle.view.borrow().record.name.clone();
            tracing::warn!(%vm, %error, "the vm of a run was not deleted");
        }
        _ => {}
    }
}

/// Runs the command to its end, across lost links and earlier daemons.
async fn follow(handle: &Handle, op: OpId, line: &str) -> Result<VmRun, ToolError> {
    let boot = handle.view.borrow().record.boot_id;
    let mut command = None;
    loop {
        let (name, link) = until_answering(handle).await?;
        if handle.view.borrow().record.boot_id != boot {
            let text = format!("{name} was restarted while its command ran");
            return Err(ToolError::new(ErrorCode::VmGone, text));
        }
        match step(&name, &link, op, line, &mut command).await {
            Ok(Some(run)) => return Ok(run),
            Ok(None) => {}
            Err(error) if is_of_link(error.code) => {
                tracing::debug!(vm = %name, %error, "the guest of a run is asked again");
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Waits until the guest's tools can be called; fails once they never can be again.
async fn until_answering(handle: &Handle) -> Result<(Name, Link), ToolError> {
    let mut view = handle.view.clone();
    let found = view
        .wait_for(|view| view.deleted || !view.record.state.may_run() || view.record.state == VmState::Ready)
        .await
        .map_err(|_| ToolError::new(ErrorCode::ShuttingDown, "the daemon is going down"))?;
    let name = found.record.name.clone();
    if found.deleted || !found.record.state.may_run() {
        let why = found.record.reason.as_deref().unwrap_or("it was stopped or deleted");
        return Err(ToolError::new(ErrorCode::VmGone, format!("{name} ended before its command: {why}")));
    }
    Ok((name, found.guest_link()?.clone()))
}

/// Starts the command or finds it, and waits for its end for a while.
async fn step(
    name: &Name,
    link: &Link,
    op: OpId,
    line: &str,
    command: &mut Option<CommandId>,
) -> Result<Option<VmRun>, ToolError> {
    let vm = name.as_str();
    let id = match *command {
        Some(id) => id,
        None => {
            let id = start(vm, link, op, line).await?;
            failpoint::reach("run-started");
            *command.insert(id)
        }
    };
    let wait_ms = u32::try_from(WAIT.as_millis()).ok();
    let params =
        CommandOutputParams { wait_ms, until_end: true, limit: Some(KEPT), ..CommandOutputParams::of(id) };
    let said = guest_call::call::<CommandOutput>(link, vm, &params, None, WAIT + SLACK).await?;
    if said.facts.state == CommandState::Running {
        return Ok(None);
    }
    let (stdout, less) = ends(vm, link, &said, OutputStream::Stdout, &said.facts.stdout).await?;
    let (stderr, lesser) = ends(vm, link, &said, OutputStream::Stderr, &said.facts.stderr).await?;
    let RunCommandOutput { status, duration_ms, .. } = said.facts;
    Ok(Some(VmRun { status, stdout, stderr, omitted_bytes: less + lesser, duration_ms }))
}

/// The command of this operation: the one that was started before, or a new one.
async fn start(vm: &str, link: &Link, op: OpId, line: &str) -> Result<CommandId, ToolError> {
    let client = format!("vm_create {op}");
    let params = CommandListParams { limit: Some(500), cursor: None };
    let there = guest_call::call::<CommandList>(link, vm, &params, None, SLACK).await?.facts.commands;
    if let Some(known) = there.iter().find(|command| command.client.as_deref() == Some(&client)) {
        return Ok(known.command_id);
    }
    let params = CommandStartParams {
        command: Some(line.to_owned()),
        timeout_s: Some(0.0),
        ..CommandStartParams::default()
    };
    let started = guest_call::call::<CommandStart>(link, vm, &params, Some(&client), SLACK).await?;
    let lost = || ToolError::new(ErrorCode::GuestMisbehaved, format!("{vm}: its command has no id"));
    started.facts.command_id.ok_or_else(lost)
}

/// Head and tail of a stream, and how many bytes of it are left out.
async fn ends(
    vm: &str,
    link: &Link,
    said: &Said<RunCommandOutput>,
    stream: OutputStream,
    facts: &StreamFacts,
) -> Result<(String, u64), ToolError> {
    let name = match stream {
        OutputStream::Stdout => "stdout",
        OutputStream::Stderr => "stderr",
    };
    let (shown, half) = (said.stream(name), u64::from(KEPT / 2));
    if facts.total_bytes <= u64::from(KEPT) {
        return Ok((shown, 0));
    }
    let Some(id) = said.facts.command_id else { return Ok((shown, facts.omitted_bytes)) };
    let params = CommandOutputParams {
        stream: Some(stream),
        offset: Some(facts.total_bytes - half),
        limit: Some(KEPT / 2),
        ..CommandOutputParams::of(id)
    };
    let tail = guest_call::call::<CommandOutput>(link, vm, &params, None, SLACK).await?.stream(name);
    let head: String = {
        let end = (0..=shown.len().min(KEPT as usize / 2)).rev().find(|at| shown.is_char_boundary(*at));
        shown[..end.unwrap_or(0)].to_owned()
    };
    let omitted = facts.total_bytes.saturating_sub(2 * half);
    Ok((format!("{head}\n... {omitted} bytes left out ...\n{tail}"), omitted))
}
