//! The tool `vm_wait`: waits for something about a VM, so that no caller polls.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nexus_schema::id::{BootId, CommandId};
use nexus_schema::stream::{Open, Opening, TcpOpening, VERSION};
use nexus_schema::tools::command::{CommandOutput, CommandOutputParams, CommandState};
use nexus_schema::tools::file::{FileStat, FileStatParams};
use nexus_schema::tools::vm::{VmState, VmWaitOutput, VmWaitParams};
use nexus_schema::{ErrorCode, ToolError};
use tokio::time::timeout;

use super::{CallContext, Nexus, patience};
use crate::context::{Handle, View, not_found};
use crate::guest::{GuestStream, Link, StreamError};
use crate::vm::guest_call::{call, is_of_link};
use crate::vm::policy;

/// How long to wait between two looks into a guest: at first, and at most.
const LOOKS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long a guest may take for one look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one question to the guest waits for the end of a command.
const COMMAND_WAIT: Duration = Duration::from_secs(30);

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Goal {
    State(VmState),
    Port(u16),
    File(String),
    Command(CommandId),
}

impl Goal {
    fn of(params: &VmWaitParams) -> Result<Self, ToolError> {
        let VmWaitParams { state, port, file, command_id, .. } = params;
        let goals = [
            state.map(Self::State),
            port.map(Self::Port),
            file.clone().map(Self::File),
            command_id.map(Self::Command),
        ];
        let mut given = goals.into_iter().flatten();
        let goal = given.next().unwrap_or(Self::State(VmState::Ready));
        if given.next().is_some() {
            return Err(ToolError::invalid("state, port, file and command_id exclude each other")
                .hint("wait for one of them, then for the next"));
        }
        match &goal {
            Self::Port(0) => Err(ToolError::invalid("port is 0, not 1 to 65535")),
            Self::File(path) if !path.starts_with('/') || path.contains('\0') => {
                Err(ToolError::invalid("file must be an absolute path in the VM"))
            }
            _ => Ok(goal),
        }
    }

    /// What is missing as long as it has not come to pass.
    fn missing(&self) -> String {
        match self {
            Self::State(state) => format!("state {state}"),
            Self::Port(port) => format!("a server on port {port}"),
            Self::File(path) => format!("the file {path}"),
            Self::Command(id) => format!("the end of command {id}"),
        }
    }
}

impl Goal {
    /// The same of a VM in a state, if nothing happens in it by itself.
    fn missing_in(&self, state: VmState) -> String {
        let missing = self.missing();
        match state {
            VmState::Paused => format!("{missing}; it is paused: vm_resume lets it go on"),
            VmState::Suspended => format!("{missing}; it is suspended: vm_start wakes it"),
            _ => missing,
        }
    }
}

impl Nexus {
    /// The tool `vm_wait`.
    pub async fn vm_wait(&self, ctx: &CallContext, params: VmWaitParams) -> Result<VmWaitOutput, ToolError> {
        let wait = patience(params.wait_s)?;
        let goal = Goal::of(&params)?;
        let handle = self.shared.vms.get(&ctx.caller, &params.vm)?;
        let id = handle.view.borrow().record.id;
        // Whoever waits for a state, such as the stop of an idle VM, does not work in it.
        let _busy = (!matches!(goal, Goal::State(_))).then(|| handle.activity.begin());
        let waiting = Waiting {
            handle: &handle,
            directory: self.shared.paths.vm(id),
            client: &ctx.caller.owner,
            if_boot: params.if_boot_id,
            until: Instant::now() + wait,
        };
        let started = Instant::now();
        let reached = waiting.reach(&goal).await?;
        let (done, status) = (reached.is_some(), reached.flatten());
        let view = handle.view.borrow();
        let record = &view.record;
        Ok(VmWaitOutput {
            done,
            id,
            name: record.name.clone(),
            state: record.state,
            reason: record.reason.clone(),
            boot_id: record.boot_id,
            waited_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            status,
            waiting_for: (!done).then(|| goal.missing_in(record.state)),
        })
    }
}

/// One call that waits.
struct Waiting<'a> {
    handle: &'a Handle,
    directory: PathBuf,
    client: &'a str,
    if_boot: Option<BootId>,
    until: Instant,
}

impl Waiting<'_> {
    /// Waits until the goal is reached; `None` if it is not in time. For a command's end, returns what a shell says of it. Looks at least once.
    async fn reach(&self, goal: &Goal) -> Result<Option<Option<u8>>, ToolError> {
        if let Goal::State(state) = goal {
            let wanted = |view: &View| view.record.state == *state;
            return Ok(self.until_view(wanted).await?.then_some(None));
        }
        let mut pause = LOOKS.0;
        loop {
            let Some(link) = self.until_answering().await? else { return Ok(None) };
            let name = self.handle.view.borrow().record.name.to_string();
            let looked = match goal {
                Goal::Port(port) => self.is_open(*port, &name).await,
                Goal::File(path) => is_there(&link, path, &name).await,
                Goal::Command(id) => match self.ended(&link, *id, &name).await {
                    Ok(Some(status)) => return Ok(Some(status)),
                    Ok(None) => Ok(false),
                    Err(error) => Err(error),
                },
                Goal::State(_) => Ok(true),
            };
            match looked {
                Ok(true) => return Ok(Some(None)),
                Ok(false) => {}
                // Whether the VM still runs is looked at first.
                Err(error) if is_of_link(error.code) => {}
                Err(error) => return Err(error),
            }
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(LOOKS.1);
        }
    }

    /// Waits for a view of the VM; whether it comes in time. The VM must not be deleted meanwhile, nor boot anew where that matters.
    async fn until_view(&self, wanted: impl Fn(&View) -> bool) -> Result<bool, ToolError> {
        let mut view = self.handle.view.clone();
        let is_over = |view: &View| view.deleted || self.same_boot(view).is_err() || wanted(view);
        let left = self.until.saturating_duration_since(Instant::now());
        let Ok(view) = timeout(left, view.wait_for(is_over)).await else { return Ok(false) };
        let view = view.map_err(|_| ToolError::new(ErrorCode::ShuttingDown, "the daemon is going down"))?;
        if view.deleted {
            return Err(not_found(&nexus_schema::Reference::Id(view.record.id)));
        }
        self.same_boot(&view).map(|()| true)
    }

    fn same_boot(&self, view: &View) -> Result<(), ToolError> {
        policy::same_boot(view.record.name.as_str(), view.record.boot_id, self.if_boot)
    }

    /// Waits until the guest's tools can be called; `None` if that is not in time. Fails if somebody has to start the VM for that.
    async fn until_answering(&self) -> Result<Option<Link>, ToolError> {
        let comes_up = |state| {
            use VmState::{Creating, Running, Starting, Unreachable};
            matches!(state, Creating | Starting | Running | Unreachable)
        };
        if !self.until_view(|view| !comes_up(view.record.state)).await? {
            return Ok(None);
        }
        self.handle.view.borrow().guest_link().cloned().map(Some)
    }

    /// Whether something listens on a port.
    async fn is_open(&self, port: u16, name: &str) -> Result<bool, ToolError> {
        let open = Open::Tcp(TcpOpening { port });
        let opening = Opening { version: VERSION, client: Some(self.client.to_owned()), open };
        match timeout(LOOK_TIMEOUT, GuestStream::open(&self.directory, &opening)).await {
            Ok(Ok(_)) => Ok(true),
            Err(_) => Ok(false),
            Ok(Err(StreamError::Refused(error))) if error.code == ErrorCode::ConnectionRefused => Ok(false),
            Ok(Err(error)) => Err(error.to_tool_error(name)),
        }
    }

    /// What a shell says of the end of a command; `None` while it runs.
    async fn ended(&self, link: &Link, id: CommandId, name: &str) -> Result<Option<Option<u8>>, ToolError> {
        let left = self.until.saturating_duration_since(Instant::now()).min(COMMAND_WAIT);
        let wait_ms = u32::try_from(left.as_millis()).ok();
        let params =
            CommandOutputParams { wait_ms, until_end: true, limit: Some(1), ..CommandOutputParams::of(id) };
        let deadline = left + LOOK_TIMEOUT;
        let facts = call::<CommandOutput>(link, name, &params, Some(self.client), deadline).await?.facts;
        Ok((facts.state != CommandState::Running).then_some(facts.status))
    }
}

/// Whether a file exists.
async fn is_there(link: &Link, path: &str, name: &str) -> Result<bool, ToolError> {
    let params = FileStatParams { path: path.to_owned(), ..FileStatParams::default() };
    match call::<FileStat>(link, name, &params, None, LOOK_TIMEOUT).await {
        Ok(_) => Ok(true),
        Err(error) if error.code == ErrorCode::FileNotFound => Ok(false),
        Err(error) => Err(error),
    }
}
