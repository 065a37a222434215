//! `nexusctl shell`: a login shell in a VM, which can be detached from and reattached to.

use nexus_schema::Reference;
use nexus_schema::id::{CommandId, VmKind};
use nexus_schema::stream::{AttachOpening, ExecOpening, Open};
use nexus_schema::tools::command::CommandStartParams;

use super::App;
use super::error::Error;
use super::exec::{code, variable, variables};
use super::stream::{self, Attached, DetachKeys, detach_keys};

/// How a guest is asked for the image's user.
const IMAGE_USER: &str = "image";

/// Whose shell where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The user: a name or a number [default: the image's user, else root]
    #[arg(short, long, conflicts_with = "attach")]
    user: Option<String>,
    /// The directory to start in [default: the user's home]
    #[arg(short = 'w', long, value_name = "DIR", conflicts_with = "attach")]
    workdir: Option<String>,
    /// An environment variable; without a value, the local one
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = variable, conflicts_with = "attach")]
    env: Vec<(String, Option<String>)>,
    /// Reattach to a detached command, such as a shell: its id; `nexusctl call guest_command_list` shows them
    #[arg(short, long, value_name = "ID")]
    attach: Option<CommandId>,
    /// With --attach: only watch, even if no other client is writing
    #[arg(long, requires = "attach")]
    watch: bool,
    /// With --attach: take over from the client that is writing, which is detached
    #[arg(long, requires = "attach", conflicts_with = "watch")]
    take_over: bool,
    /// With --attach: how much of the earlier output to show, in bytes [default: all that is kept]
    #[arg(long, value_name = "BYTES", requires = "attach")]
    scroll_back: Option<u64>,
    /// The keys that detach from the shell, which keeps running
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = detach_keys)]
    detach_keys: DetachKeys,
    /// The VM: its name or id
    vm: Reference<VmKind>,
}

/// Opens a shell or reattaches to one; returns the exit code of the shell.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    if app.ui.is_json() {
        return Err(Error::usage("--json does not work with a shell: use `exec`"));
    }
    let is_terminal = stream::is_terminal();
    let open = match args.attach {
        Some(id) => Open::Attach(AttachOpening {
            id,
            write: !args.watch,
            take_over: args.take_over,
            scroll_back: args.scroll_back,
        }),
        None => {
            let size = stream::size().filter(|_| is_terminal);
            let start = CommandStartParams {
                cwd: args.workdir,
                env: variables(app, args.env).into_iter().collect(),
                user: Some(args.user.unwrap_or_else(|| IMAGE_USER.to_owned())),
                tty: is_terminal,
                cols: size.map(|(cols, _)| cols),
                rows: size.map(|(_, rows)| rows),
                stdin_open: !is_terminal,
                timeout_s: Some(0.0),
                ..CommandStartParams::default()
            };
            Open::Exec(Box::new(ExecOpening { start, login_shell: true }))
        }
    };
    let mut client = app.connect().await?;
    let stream = stream::open(app, &mut client, &args.vm, open).await?;
    // The stream no longer needs it.
    drop(client);
    let vm = args.vm.to_string();
    let opened = &stream.opened;
    if args.attach.is_some() && !opened.writer && !args.watch {
        app.ui
            .say("another client is writing, or the command takes no input: only watching (`--take-over` to write)");
    }
    let input = opened.writer || is_terminal;
    let tty = opened.tty && is_terminal;
    let attached = Attached { app, vm: vm.clone(), stream, input, tty, keys: args.detach_keys };
    Ok(code(app, &vm, attached.run().await?, 0))
}
