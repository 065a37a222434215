//! `nexusctl vm wait`: waits for something about a VM, however long that takes.

use std::time::{Duration, Instant};

use nexus_schema::id::{CommandId, VmKind};
use nexus_schema::limits::WAIT_MAX;
use nexus_schema::tools::vm::{VmState, VmWait, VmWaitOutput, VmWaitParams};
use nexus_schema::{ErrorCode, Reference, TimeSpan, Tool, ToolError};

use crate::ctl::App;
use crate::ctl::args::word;
use crate::ctl::client::Options;
use crate::ctl::error::Error;
use crate::ctl::hint::About;
use crate::ctl::moment;
use crate::ctl::ui::Format;

/// What to wait for.
#[derive(Debug, clap::Args)]
#[group(id = "goal", multiple = false)]
pub(crate) struct Goal {
    /// Until it is in this state [default: ready]
    #[arg(long, value_parser = word::<VmState>(&["creating", "created", "starting", "running", "ready", "unreachable", "paused",
        "stopping", "suspended", "stopped", "crashed", "failed"]))]
    state: Option<VmState>,
    /// Until a server in it listens on this TCP port
    #[arg(long)]
    port: Option<u16>,
    /// Until this path exists in it
    #[arg(long, value_name = "PATH")]
    file: Option<String>,
    /// Until this command in it has ended; prints its exit code
    #[arg(long = "command", value_name = "COMMAND_ID")]
    command_id: Option<CommandId>,
}

/// Which VM to wait for, and how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    #[command(flatten)]
    goal: Goal,
    /// For how long at most, such as 5m; then the exit code is 5 [default: for ever]
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    timeout: Option<TimeSpan>,
}

/// Waits.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let deadline = args.timeout.map(|timeout| Instant::now() + timeout.duration());
    let Goal { state, port, file, command_id } = args.goal;
    let (mut is_first, mut is_told) = (true, false);
    loop {
        // The first call only looks, so that what keeps a VM from going on is told at once.
        let longest = if is_first { Duration::from_secs(1) } else { WAIT_MAX };
        is_first = false;
        let left = deadline.map_or(WAIT_MAX, |at| at.saturating_duration_since(Instant::now()));
        // A part of a second is a second: what comes in time is not missed.
        let wait_s = left.min(longest).as_millis().div_ceil(1000);
        let wait_s = u32::try_from(wait_s).unwrap_or(0);
        let params = VmWaitParams {
            vm: args.vm.clone(),
            state,
            port,
            file: file.clone(),
            command_id,
            wait_s: Some(wait_s),
            if_boot_id: None,
        };
        let options = Options::waiting(Duration::from_secs(wait_s.into()));
        let reply = client.call_with::<VmWait>(&params, options).await?;
        let said: VmWaitOutput = reply.facts(VmWait::NAME, VmWait::SHAPE)?;
        if !said.done {
            if left.is_zero() || deadline.is_some_and(|at| at <= Instant::now()) {
                return Err(too_late(&said, args.timeout));
            }
            if matches!(said.state, VmState::Paused | VmState::Suspended) && !is_told {
                let VmWaitOutput { name, state, .. } = &said;
                app.ui.say(&format!("{name} is {state}; to go on: nexusctl resume {name}"));
                is_told = true;
            }
            continue;
        }
        match (app.ui.format, command_id) {
            (Format::Json, _) => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
            (Format::Quiet, _) => app.ui.line(&said.id.to_string())?,
            (Format::Human, Some(_)) => {
                let status = said.status.map_or("unknown".into(), |status| status.to_string());
                app.ui.line(&status)?;
            }
            (Format::Human, None) => app.ui.line(&format!("{} {}", said.name, said.state))?,
        }
        return Ok(0);
    }
}

fn too_late(said: &VmWaitOutput, timeout: Option<TimeSpan>) -> Error {
    let missing = said.waiting_for.as_deref().unwrap_or("it");
    let timeout = timeout.unwrap_or_default();
    let text = format!("{} is {}: waited {timeout} for {missing} in vain", said.name, said.state);
    let error = ToolError::new(ErrorCode::Timeout, text).hint("call vm_inspect to see how it is");
    Error::from(error).about(&About::subject(VmWait::NAME, Some(said.name.as_str())))
}
