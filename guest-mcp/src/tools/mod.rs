//! The guest's tools: each implements [`Run`] for its tool type, and one generic function calls them all.
//!
//! A tool does not know MCP: it returns a [`Reply`] or a [`ToolError`]. Work that blocks on the filesystem runs through [`Call::blocking`].

mod command;
mod export;
mod file;
mod http;
mod os_info;
mod reply;
pub(crate) mod text;

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, LazyLock, OnceLock};
use std::task::Poll;

use nexus_schema::arguments::Takes;
use nexus_schema::error::ErrorCode;
use nexus_schema::tool::{self, Effect, ToolInfo};
use nexus_schema::{Tool, ToolError, TraceContext, for_each_guest_tool};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

pub(crate) use file::Uploads;
pub(crate) use reply::{Block, CallResult, Reply, human_bytes};

use crate::agent::rpc::{Failure, INVALID_PARAMS};
use crate::agent::{Agent, Settings};
use crate::identity::Identity;
use crate::os::Users;
use crate::places::Owner;

/// One call of one tool.
pub(crate) struct Call {
    /// The agent that was called.
    pub(crate) agent: Arc<Agent>,
    /// The configuration at the time of the call.
    pub(crate) settings: Arc<Settings>,
    /// Cancelled when the caller no longer wants the result.
    pub(crate) cancel: CancellationToken,
    /// Whether cancelling should also kill what the call started.
    pub(crate) wants_kill: Arc<AtomicBool>,
    /// The caller's name, if the host gave it.
    pub(crate) client: Option<String>,
    /// The trace that the call belongs to.
    pub(crate) trace: Option<TraceContext>,
    /// Sends progress to the caller, if it wants that.
    pub(crate) tell: Option<Tell>,
}

/// Sends the progress of a call, as a line of text, to a waiting caller.
pub(crate) type Tell = Arc<dyn Fn(&str) + Send + Sync>;

impl Call {
    /// Runs work that may block on a disk on the thread pool.
    pub(crate) async fn blocking<T, F>(&self, work: F) -> Result<T, ToolError>
    where
        T: Send + 'static,
        F: FnOnce(&CancellationToken) -> Result<T, ToolError> + Send + 'static,
    {
        let cancel = self.cancel.clone();
        let work = tokio::task::spawn_blocking(move || work(&cancel));
        tokio::select! {
            done = work => done.unwrap_or_else(|_| Err(panicked())),
            // Work that hangs in the kernel continues; its caller stops waiting.
            () = self.cancel.cancelled() => Err(cancelled()),
        }
    }

    /// Runs work that may block with the rights of a user: a name, a number, `USER:GROUP`, or `image`. Without a user it runs as the agent, and new
    /// files get the owner of their directory.
    pub(crate) async fn blocking_as<T, F>(&self, user: Option<String>, work: F) -> Result<T, ToolError>
    where
        T: Send + 'static,
        F: FnOnce(Owner, &CancellationToken) -> Result<T, ToolError> + Send + 'static,
    {
        let settings = self.settings.clone();
        self.blocking(move |cancel| match user {
            None => work(Owner::OfDirectory, cancel),
            Some(user) => {
                let who = Identity::resolve(Some(&user), settings.image_user.as_deref(), &Users::read())?;
                who.run(|| work(Owner::Maker, cancel))?
            }
        })
        .await
    }
}

/// Returns the error of a cancelled call.
pub(crate) fn cancelled() -> ToolError {
    ToolError::new(ErrorCode::Cancelled, "the call was cancelled")
}

/// Returns the error for a failure of the agent itself.
pub(crate) fn agent_failed(message: impl Into<String>) -> ToolError {
    ToolError::new(ErrorCode::GuestFailed, message)
}

/// Returns the error for a tool that panicked.
fn panicked() -> ToolError {
    agent_failed("the tool failed; see the console")
}

/// Runs a tool's work. A panic in it is an error of the agent, so that its call is answered.
pub(crate) async fn caught<T>(work: impl Future<Output = Result<T, ToolError>>) -> Result<T, ToolError> {
    let mut work = pin!(work);
    // Shared state is behind locks that ignore poisoning. After a panic the work is not polled again.
    poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)));
        polled.unwrap_or_else(|_| Poll::Ready(Err(panicked())))
    })
    .await
}

/// A tool that can be called.
pub(crate) trait Run: Tool {
    /// Runs the tool.
    fn run(
        call: Call,
        params: Self::Params,
    ) -> impl Future<Output = Result<Reply<Self::Output>, ToolError>> + Send;
}

type Answer = Pin<Box<dyn Future<Output = CallResult> + Send>>;

/// A tool in [`ENTRIES`].
struct Entry {
    name: &'static str,
    info: fn() -> ToolInfo,
    call: fn(Call, Map<String, Value>) -> Answer,
}

macro_rules! entries {
    ($($tool:path => $method:ident,)*) => { &[$({
        // Built on first use, because a boot does not need it.
        static TAKES: LazyLock<Takes> = LazyLock::new(Takes::of::<$tool>);
        Entry {
            name: <$tool as Tool>::NAME,
            info: tool::info::<$tool>,
            call: |call, arguments| Box::pin(answer::<$tool>(call, &TAKES, arguments)),
        }
    }),*] };
}

/// All tools, by name.
static ENTRIES: &[Entry] = for_each_guest_tool!(entries);

async fn answer<T: Run>(call: Call, takes: &Takes, arguments: Map<String, Value>) -> CallResult {
    let settings = call.settings.clone();
    let outcome = match takes.decode::<T>(arguments) {
        Ok(params) => T::run(call, params).await,
        Err(error) => Err(error),
    };
    match outcome.and_then(|reply| reply.into_result::<T>(settings.name())) {
        Ok(result) => result,
        Err(error) => reply::failed(error),
    }
}

/// Calls a tool by name. Only an unknown name is a protocol error.
pub(crate) async fn call(
    name: &str,
    call: Call,
    arguments: Map<String, Value>,
) -> Result<CallResult, Failure> {
    match ENTRIES.iter().find(|entry| entry.name == name) {
        Some(entry) => {
            let answer = (entry.call)(call, arguments);
            Ok(caught(async { Ok(answer.await) }).await.unwrap_or_else(reply::failed))
        }
        None => {
            let name: String = name.chars().take(64).collect();
            Err(Failure::new(INVALID_PARAMS, format!("unknown tool: {name}")))
        }
    }
}

/// A tool in MCP's list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listed {
    name: String,
    title: String,
    description: String,
    input_schema: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_schema: Option<Map<String, Value>>,
    annotations: Annotations,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Annotations {
    title: String,
    read_only_hint: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    destructive_hint: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idempotent_hint: Option<bool>,
    open_world_hint: bool,
}

/// Returns MCP's list of all tools; built on first use, because a boot does not need it.
pub(crate) fn list() -> &'static [Listed] {
    static LIST: OnceLock<Vec<Listed>> = OnceLock::new();
    LIST.get_or_init(|| ENTRIES.iter().map(|entry| describe((entry.info)())).collect())
}

fn describe(info: ToolInfo) -> Listed {
    let (destructive_hint, idempotent_hint) = match info.effect {
        Effect::ReadOnly => (None, None),
        Effect::Additive { idempotent } => (Some(false), Some(idempotent)),
        Effect::Destructive { idempotent } => (Some(true), Some(idempotent)),
    };
    Listed {
        name: info.name,
        title: info.title.clone(),
        description: info.description,
        input_schema: info.input_schema,
        output_schema: info.output_schema,
        annotations: Annotations {
            title: info.title,
            read_only_hint: matches!(info.effect, Effect::ReadOnly),
            destructive_hint,
            idempotent_hint,
            open_world_hint: info.open_world,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tool_that_panics_is_answered() {
        assert_eq!(caught(async { Ok(1) }).await, Ok(1));
        assert_eq!(caught(async { Err::<(), _>(cancelled()) }).await, Err(cancelled()));
        for waits in [false, true] {
            let work = caught::<()>(async {
                if waits {
                    tokio::task::yield_now().await;
                }
                panic!("a bug")
            });
            let error = work.await.unwrap_err();
            assert_eq!(error.code, ErrorCode::GuestFailed, "{error}");
            assert!(error.code.may_be_of_guest(), "the host does not accept others");
        }
    }

    #[test]
    fn the_table_is_sorted_and_described() {
        let names: Vec<_> = list().iter().map(|tool| tool.name.as_str()).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        assert_eq!(names, sorted);
        assert_eq!(names.len(), nexus_schema::tools::guest().len());
    }
}
