//! Operations and commands as tasks of MCP (extension `io.modelcontextprotocol/tasks`), for requests that declare it, and in sessions whose client
//! declared it when it opened them.
//!
//! ```text
//! tools/call ──> done within SOON_S: its result
//!        └────── otherwise: a task ── tasks/get ──> op_get, command_output
//!                                  └─ tasks/cancel ─> op_cancel, command_signal KILL
//! ```
//! A task is no object of its own: its id is that of the operation, or of the command with its VM and the time of its start. Each request about
//! one is a call of the tool that says the same, authorised and recorded like any other. So a task lives as long as what it stands for, and those
//! of others do not exist.

mod silence;

use std::fmt;
use std::str::FromStr;
use std::time::{Instant, SystemTime};

use nexus_schema::error::{ERROR_META, RESULT_META, VM_META};
use nexus_schema::id::{CommandId, OpId, VmId};
use nexus_schema::tool::VM_ARGUMENT;
use nexus_schema::tools::command::{CommandOutput, CommandSignal, CommandState, RunCommandOutput};
use nexus_schema::tools::op::{OpCancel, OpGet, OpProgress, OpState};
use nexus_schema::{ErrorCode, Timestamp, Tool, ToolError};
use rmcp::model::{
    CallToolResponse, CallToolResult, ClientJsonRpcMessage, ClientRequest, CreateTaskResult, DetailedTask,
    GetTaskResult, JsonObject, JsonRpcMessage, Task, TaskPayload, TaskStatus,
};
use rmcp::service::RequestContext;
use rmcp::{ErrorData, RoleServer};
use serde_json::{Value, json};

use crate::host::View;
use crate::notes::describe;
use crate::server::Server;
use crate::tools::error_result;

pub(crate) use silence::Silences;
use silence::given_up;

/// How long a call that may become a task is waited for first, in seconds.
const SOON_S: u32 = 2;
/// How often a client should ask about a task, in milliseconds.
const POLL_MS: u64 = 1000;
/// How a cancelled command is ended: with all that it started.
const KILL: &str = "KILL";
/// The latest start of a command in an id, in milliseconds since 1970: the end of the year 9999.
const STARTED_MAX: i64 = 253_402_300_799_999;
/// What makes a command one that its caller deals with by itself, or that the result of a task would not suit.
const NO_TASK: [&str; 3] = ["stdin_open", "lossless", "encoding"];

/// What a task stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Id {
    Op(OpId),
    Command { command: CommandId, vm: VmId, started: Timestamp },
}

impl FromStr for Id {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('.');
        let (Some(first), second, third, None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(());
        };
        match (second, third) {
            (None, None) => first.parse().map(Self::Op).map_err(drop),
            (Some(vm), Some(started)) => {
                let started = started.parse().map_err(drop)?;
                if !(0..=STARTED_MAX).contains(&started) {
                    return Err(());
                }
                Ok(Self::Command {
                    command: first.parse().map_err(drop)?,
                    vm: vm.parse().map_err(drop)?,
                    started: Timestamp::from_millis(started),
                })
            }
            _ => Err(()),
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Op(op) => op.fmt(f),
            Self::Command { command, vm, started } => write!(f, "{command}.{vm}.{}", started.as_millis()),
        }
    }
}

/// Whether a request says that its client can deal with a task, or the client said so when it opened the session. What it said in other
/// requests does not count.
pub(crate) fn are_declared(context: &RequestContext<RoleServer>) -> bool {
    context.client_capabilities().is_some_and(|can| can.supports_tasks())
}

/// Whether a message opens a session of a client that can deal with tasks.
pub(crate) fn are_declared_by(message: &ClientJsonRpcMessage) -> bool {
    let JsonRpcMessage::Request(request) = message else { return false };
    let ClientRequest::InitializeRequest(opening) = &request.request else { return false };
    opening.params.capabilities.supports_tasks()
}

/// Prepares a call that may become a task: unless its caller says how long to wait (in the argument `wait`), it is not waited for long. `false` if it
/// cannot become one; then it is as without tasks. Whoever waits not at all wants the id at once, to go on with something else.
pub(crate) fn prepare(wait: &str, arguments: &mut JsonObject) -> bool {
    if NO_TASK.iter().any(|name| arguments.contains_key(*name)) {
        return false;
    }
    match arguments.get(wait) {
        None | Some(Value::Null) => {
            arguments.insert(wait.to_owned(), SOON_S.into());
            true
        }
        Some(given) => {
            let seconds = given.as_f64().or_else(|| given.as_str()?.trim().parse().ok());
            seconds.is_none_or(|seconds| seconds > 0.0)
        }
    }
}

/// The answer to a call of one of the host's tools: a task, if its operation has not ended.
pub(crate) async fn of_operation(server: &Server, result: CallToolResult) -> CallToolResponse {
    let unfinished = |facts: &Value| {
        let op = facts.get("op_id")?.as_str()?.parse::<OpId>().ok()?;
        (facts.get("done")? == false).then_some(op)
    };
    let Some(op) = result.structured_content.as_ref().and_then(unfinished) else { return result.into() };
    let client = server.client();
    let Ok((started, _)) = client.host().nexus().op_times(client.caller(), op).await else {
        return result.into();
    };
    let message = result.structured_content.as_ref().and_then(of_progress);
    created(Id::Op(op), started, message, result)
}

/// The answer to a call of `run_command`: a task, if the command is still running.
pub(crate) fn of_command(result: CallToolResult) -> CallToolResponse {
    let found = result.meta.as_ref().and_then(|meta| {
        let facts: RunCommandOutput = serde_json::from_value(meta.get(RESULT_META)?.clone()).ok()?;
        let vm = meta.get(VM_META)?.get("id")?.as_str()?.parse().ok()?;
        let command = facts.command_id.filter(|_| facts.state == CommandState::Running)?;
        let ran = i64::try_from(facts.duration_ms).unwrap_or(i64::MAX);
        let started = Timestamp::from_millis(now().as_millis().saturating_sub(ran));
        Some((Id::Command { command, vm, started }, started))
    });
    match found {
        Some((id, started)) => created(id, started, None, result),
        None => result.into(),
    }
}

fn created(id: Id, started: Timestamp, message: Option<String>, result: CallToolResult) -> CallToolResponse {
    let task = CreateTaskResult::new(task(id, TaskStatus::Working, started, now(), message));
    match result.meta {
        Some(meta) => task.with_meta(meta).into(),
        None => task.into(),
    }
}

fn task(id: Id, status: TaskStatus, started: Timestamp, updated: Timestamp, message: Option<String>) -> Task {
    let task = Task::new(id.to_string(), status, started.to_string(), updated.to_string())
        .with_poll_interval_ms(POLL_MS);
    match message {
        Some(message) => task.with_status_message(message),
        None => task,
    }
}

/// What `tasks/get` says.
pub(crate) async fn get(
    server: &Server,
    text: &str,
    context: &RequestContext<RoleServer>,
) -> Result<GetTaskResult, ErrorData> {
    let id = text.parse::<Id>().map_err(|()| missing(text))?;
    let detailed = match id {
        Id::Op(op) => get_operation(server, op, context).await?,
        Id::Command { vm, command, started } => {
            let silences = server.client().host().silences();
            let arguments = json!({ "id": command });
            let result = call_in(server, vm, CommandOutput::NAME, arguments, context).await?;
            let (payload, message) = match of_output(text, result)? {
                Said::Of(payload) if !silences.ends(id) => (payload, None),
                Said::Of(_) => given_up("its VM could not be asked"),
                Said::Nothing(why) if silences.lasts(id, Instant::now()) => given_up(&why),
                Said::Nothing(why) => (TaskPayload::Working, Some(why)),
            };
            DetailedTask::new(task(id, payload.status(), started, now(), message), payload)
        }
    };
    Ok(GetTaskResult::new(detailed))
}

async fn get_operation(
    server: &Server,
    op: OpId,
    context: &RequestContext<RoleServer>,
) -> Result<DetailedTask, ErrorData> {
    let (id, client) = (Id::Op(op), server.client());
    if !matches!(client.view(), View::Whole(_)) {
        return Err(missing(&id.to_string()));
    }
    let mut arguments = JsonObject::new();
    arguments.insert("op_id".into(), json!(op));
    arguments.insert("wait_s".into(), 0.into());
    let result = server.call_unlisted(OpGet::NAME, false, arguments, context).await?;
    if let Some(error) = error_of(&result) {
        return Err(refused(&id.to_string(), &error));
    }
    let facts = result.structured_content.clone().unwrap_or_default();
    let times = client.host().nexus().op_times(client.caller(), op).await;
    let (started, ended) = times.map_err(|error| refused(&id.to_string(), &error))?;
    let state = facts.get("state").and_then(Value::as_str).and_then(|state| state.parse().ok());
    let payload = match state {
        Some(OpState::Succeeded) => TaskPayload::Completed { result: object(&result)? },
        // The call itself would have ended with this error.
        Some(OpState::Failed) => {
            let error = facts.get("error").cloned().and_then(|error| serde_json::from_value(error).ok());
            let error: ToolError = error.unwrap_or_else(|| ToolError::internal("the operation failed"));
            TaskPayload::Completed { result: object(&error_result(&error))? }
        }
        Some(OpState::Cancelled) => TaskPayload::Cancelled,
        Some(OpState::Running) | None => TaskPayload::Working,
    };
    let updated = ended.filter(|_| payload.status().is_terminal()).unwrap_or_else(now);
    Ok(DetailedTask::new(task(id, payload.status(), started, updated, of_progress(&facts)), payload))
}

/// What `command_output` says of a command's task.
#[derive(Debug)]
enum Said {
    /// Its state.
    Of(TaskPayload),
    /// Nothing: its VM cannot be asked now, for this reason, and has the command all the same.
    Nothing(String),
}

/// The state of a command's task in the result of `command_output`.
fn of_output(text: &str, result: CallToolResult) -> Result<Said, ErrorData> {
    if let Some(error) = error_of(&result) {
        if is_missing(error.code) {
            return Err(refused(text, &error));
        }
        let is_over = error.code == ErrorCode::VmGone;
        if (error.retryable && !is_over) || error.code == ErrorCode::VmPaused {
            return Ok(Said::Nothing(error.to_string().replace('\n', "; ")));
        }
        return Ok(Said::Of(TaskPayload::Completed { result: object(&result)? }));
    }
    let state = result.meta.as_ref().and_then(|meta| meta.get(RESULT_META)?.get("state")?.as_str());
    match state {
        Some("running") => Ok(Said::Of(TaskPayload::Working)),
        _ => Ok(Said::Of(TaskPayload::Completed { result: object(&result)? })),
    }
}

/// What `tasks/cancel` does. That it has an effect shows in the task.
pub(crate) async fn cancel(
    server: &Server,
    text: &str,
    context: &RequestContext<RoleServer>,
) -> Result<(), ErrorData> {
    let result = match text.parse::<Id>().map_err(|()| missing(text))? {
        Id::Op(op) => {
            if !matches!(server.client().view(), View::Whole(_)) {
                return Err(missing(text));
            }
            server.check_offered(OpCancel::NAME)?;
            let mut arguments = JsonObject::new();
            arguments.insert("op_id".into(), json!(op));
            server.call_unlisted(OpCancel::NAME, false, arguments, context).await?
        }
        Id::Command { vm, command, .. } => {
            server.check_offered(&format!("{}{}", nexus_schema::tool::GUEST_PREFIX, CommandSignal::NAME))?;
            let arguments = json!({ "id": command, "signal": KILL });
            call_in(server, vm, CommandSignal::NAME, arguments, context).await?
        }
    };
    match error_of(&result) {
        // What has ended cannot be cancelled, and need not be.
        Some(error) if error.code == ErrorCode::CommandEnded => Ok(()),
        Some(error) => Err(refused(text, &error)),
        None => Ok(()),
    }
}

/// Calls a guest's tool in the VM of a task.
async fn call_in(
    server: &Server,
    vm: VmId,
    tool: &str,
    arguments: Value,
    context: &RequestContext<RoleServer>,
) -> Result<CallToolResult, ErrorData> {
    let Value::Object(mut arguments) = arguments else { return Err(missing(tool)) };
    match server.client().view() {
        View::Whole(_) => drop(arguments.insert(VM_ARGUMENT.into(), json!(vm))),
        // The endpoint of another VM knows nothing of this one.
        View::Vm(own) | View::Own(own) if own != vm => {
            return Err(missing(&format!("of the VM {vm}")));
        }
        View::Vm(_) | View::Own(_) => {}
    }
    server.call_unlisted(tool, true, arguments, context).await
}

/// The error in a failed result.
fn error_of(result: &CallToolResult) -> Option<ToolError> {
    if result.is_error != Some(true) {
        return None;
    }
    let error = result.meta.as_ref().and_then(|meta| meta.get(ERROR_META)).cloned();
    let error = error.and_then(|error| serde_json::from_value(error).ok());
    Some(error.unwrap_or_else(|| ToolError::internal("the call failed without an error")))
}

fn is_missing(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::OpNotFound
            | ErrorCode::VmNotFound
            | ErrorCode::CommandNotFound
            | ErrorCode::Forbidden
            | ErrorCode::InvalidArgument
    )
}

/// A request about a task that failed.
fn refused(id: &str, error: &ToolError) -> ErrorData {
    match error.code {
        // The holder of a token is told what it lacks, but not of whom the task is.
        ErrorCode::Forbidden => ErrorData::invalid_params(error.to_string(), None),
        code if is_missing(code) => missing(id),
        _ => ErrorData::internal_error(error.to_string(), None),
    }
}

/// There is no such task for this caller: it never was, is over and forgotten, or is of somebody else.
fn missing(id: &str) -> ErrorData {
    let shown: String = id.chars().take(64).collect();
    ErrorData::invalid_params(format!("there is no task {shown}"), None)
}

/// What an operation is doing, for people.
fn of_progress(facts: &Value) -> Option<String> {
    let progress: OpProgress = serde_json::from_value(facts.get("progress")?.clone()).ok()?;
    let name = facts.get("subject_name").and_then(Value::as_str);
    Some(name.map_or_else(|| describe(&progress), |name| format!("{name}: {}", describe(&progress))))
}

fn object(result: &CallToolResult) -> Result<JsonObject, ErrorData> {
    match serde_json::to_value(result) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) | Err(_) => Err(ErrorData::internal_error("a result without a form in JSON", None)),
    }
}

fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use rmcp::model::{ContentBlock, MetaObject};

    use super::*;

    const OP: &str = "bbbbbbbbbbbbe";

    fn with_meta(mut result: CallToolResult, meta: Value) -> CallToolResult {
        let Value::Object(meta) = meta else { panic!("an object") };
        result.meta = Some(MetaObject(meta));
        result
    }

    #[test]
    fn ids_say_what_they_stand_for() {
        let op: Id = OP.parse().unwrap();
        assert_eq!((op, op.to_string()), (Id::Op(OP.parse().unwrap()), OP.to_owned()));
        let text = format!("{OP}.bbbbbbbbbbbbi.1700000000123");
        let command: Id = text.parse().unwrap();
        assert!(matches!(command, Id::Command { started, .. } if started.as_millis() == 1_700_000_000_123));
        assert_eq!(command.to_string(), text);
        let [too_late, too_early] = [i64::MAX, -1].map(|time| format!("{OP}.bbbbbbbbbbbbi.{time}"));
        for other in
            ["", ".", "x", "bbbbbbbbbbbbe.", "bbbbbbbbbbbbe.bbbbbbbbbbbbi", "a.b.c", &format!("{text}.1")]
                .into_iter()
                .chain([too_late.as_str(), too_early.as_str()])
        {
            assert!(other.parse::<Id>().is_err(), "{other}");
        }
    }

    #[test]
    fn calls_are_waited_for_as_their_callers_say() {
        let prepared = |arguments: Value| {
            let Value::Object(mut arguments) = arguments else { panic!("an object") };
            (prepare("wait_s", &mut arguments), Value::Object(arguments))
        };
        assert_eq!(prepared(json!({ "a": 1 })), (true, json!({ "a": 1, "wait_s": SOON_S })));
        for (arguments, may_be) in [
            (json!({ "wait_s": 45 }), true),
            (json!({ "wait_s": "45" }), true),
            (json!({ "wait_s": 0 }), false),
            (json!({ "wait_s": "0" }), false),
            (json!({ "wait_s": 0.0 }), false),
            (json!({ "stdin_open": true }), false),
            (json!({ "encoding": "base64" }), false),
        ] {
            assert_eq!(prepared(arguments.clone()), (may_be, arguments.clone()), "{arguments}");
        }
    }

    #[test]
    fn only_a_running_command_becomes_a_task() {
        let output = |state: CommandState| {
            let command_id = Some(OP.parse().unwrap());
            let facts = RunCommandOutput { state, command_id, duration_ms: 5, ..RunCommandOutput::default() };
            let result = CallToolResult::success(vec![ContentBlock::text("web-1")]);
            with_meta(
                result,
                json!({ RESULT_META: facts, VM_META: { "id": "bbbbbbbbbbbbi", "name": "web-1" } }),
            )
        };
        let CallToolResponse::Task(task) = of_command(output(CommandState::Running)) else {
            panic!("a task")
        };
        let shown = serde_json::to_value(&task).unwrap();
        assert!(shown["taskId"].as_str().unwrap().starts_with("bbbbbbbbbbbbe.bbbbbbbbbbbbi."), "{shown}");
        assert_eq!((&shown["resultType"], &shown["status"]), (&json!("task"), &json!("working")));
        assert_eq!((&shown["ttlMs"], &shown["_meta"][VM_META]["name"]), (&Value::Null, &json!("web-1")));
        assert!(matches!(of_command(output(CommandState::Ended)), CallToolResponse::Complete(_)));
    }

    #[test]
    fn a_guest_that_cannot_be_asked_now_has_its_command_all_the_same() {
        let failed = |code| error_result(&ToolError::new(code, "x"));
        let of = |code| {
            of_output("t", failed(code)).map(|said| match said {
                Said::Of(payload) => Some(payload.status()),
                Said::Nothing(_) => None,
            })
        };
        for code in [ErrorCode::GuestUnreachable, ErrorCode::VmPaused, ErrorCode::DiskFull] {
            assert_eq!(of(code).unwrap(), None, "{code}");
        }
        for code in [ErrorCode::VmNotRunning, ErrorCode::VmGone] {
            assert_eq!(of(code).unwrap(), Some(TaskStatus::Completed), "{code}");
        }
        let gone = of(ErrorCode::CommandNotFound).unwrap_err();
        assert_eq!((gone.code.0, &*gone.message), (-32602, "there is no task t"));
    }
}
