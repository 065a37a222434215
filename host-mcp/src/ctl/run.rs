//! `nexusctl run`: a VM for one command, like `docker run --rm`. The VM has a short time to live, which is renewed as long as this process
//! lives: even if it is killed, nothing is left behind.

use std::convert::Infallible;
use std::time::Instant;

use nexus_schema::id::{ImageKind, OpId};
use nexus_schema::link::ImageConfig;
use nexus_schema::tools::image::{ImageInspect, ImageInspectParams};
use nexus_schema::tools::op::{OpCancel, OpCancelParams};
use nexus_schema::tools::vm::{
    VmCreate, VmCreateParams, VmDelete, VmDeleteParams, VmDetails, VmUpdate, VmUpdateParams,
};
use nexus_schema::{ByteSize, ErrorCode, Name, Reference, TimeSpan, Tool, ToolError};
use tokio::signal::unix::{SignalKind, signal};

use super::client::Client;
use super::error::Error;
use super::follow;
use super::guest::{How, Program, run_program};
use super::hint::About;
use super::source::{located, pulled_or_named};
use super::ui::Format;
use super::vm::NetworkArgs;
use super::{App, mistakes, moment};

/// What to run in what.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep the VM [default: delete it when the command has ended]
    #[arg(long)]
    keep: bool,
    /// No effect: this is the default
    #[arg(long, hide = true, conflicts_with = "keep")]
    rm: bool,
    /// How long the VM outlives this process if that is killed
    #[arg(long, value_name = "TIME", default_value = "2m", hide = true, conflicts_with = "keep")]
    lease: TimeSpan,
    /// The VM's name [default: generated]
    #[arg(long)]
    name: Option<Name>,
    /// Virtual CPUs [default: 1]
    #[arg(long, visible_alias = "cpus")]
    vcpus: Option<u32>,
    /// Memory [default: 1GiB]
    #[arg(short, long, value_name = "SIZE", value_parser = mistakes::memory)]
    memory: Option<ByteSize>,
    /// Size of the root drive, sparse [default: 8GiB]
    #[arg(long, value_name = "SIZE", value_parser = mistakes::disk)]
    disk: Option<ByteSize>,
    /// The kernel: an installed one's name or id, or a file's path [default: the distribution's]
    #[arg(long)]
    kernel: Option<String>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Delete the VM so long from now, such as 2h, even while the command runs; with --keep, how long it is kept [default: never]
    #[arg(long, value_name = "TIME", value_parser = moment::span)]
    ttl: Option<TimeSpan>,
    /// A line for the VM's shell, instead of a program with arguments
    #[arg(short = 'c', long = "command", value_name = "LINE", conflicts_with = "argv")]
    line: Option<String>,
    /// Replaces the image's entrypoint; empty for none
    #[arg(long, value_name = "PROGRAM", conflicts_with = "line")]
    entrypoint: Option<String>,
    #[command(flatten)]
    how: How,
    /// What to create the VM from: debian, busybox, an image's name, or an image in a registry with its tag, such as python:3.12
    image: String,
    /// The program and its arguments, after the image's entrypoint [default: the image's own command]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    argv: Vec<String>,
}

/// Creates a VM, runs the command in it, and deletes the VM, even after a failure or an interrupt.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let given = match args.line {
        Some(line) => Given::Line(line),
        None => Given::Arguments { entrypoint: args.entrypoint, argv: args.argv },
    };
    refuse_nothing(&mut client, &given, &args.image).await?;
    let life = args.ttl.filter(|ttl| !ttl.is_zero());
    let end = life.map(|life| Instant::now() + life.duration());
    let params = VmCreateParams {
        name: args.name,
        from: Some(located(pulled_or_named(args.image.clone()))),
        kernel: args.kernel.map(located),
        vcpus: args.vcpus,
        memory: args.memory,
        disk: args.disk,
        network: args.network.params(),
        ttl: Some(match (args.keep, life) {
            // Without a limit of its own, whatever the default is.
            (true, life) => life.unwrap_or_default(),
            (false, life) => life.map_or(args.lease, |life| life.min(args.lease)),
        }),
        idle_stop: Some(TimeSpan::default()),
        wait_s: Some(0),
        ..VmCreateParams::default()
    };
    let listen = |kind| signal(kind).map_err(|source| Error::Input { source });
    let (mut terminated, mut hung_up) = (listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    let begun = follow::begin::<VmCreate, VmDetails>(&mut client, &params).await?;
    let made = Made {
        op: begun.outcome.op_id,
        vm: begun.outcome.subject_id.clone().unwrap_or_default(),
        name: begun.outcome.subject_name.clone().unwrap_or_default(),
    };
    let about = About::subject(VmCreate::NAME, Some(&made.name));
    let work = async {
        let created = follow::to_end(&mut client, &app.ui, begun, &about).await?;
        let vm = created.outcome.result.as_ref();
        let (program, user) = given.program(&mut client, vm, &args.image).await?;
        run_program(app, &mut client, &made.name, program, args.how.or_user(user)).await
    };
    let ended = tokio::select! {
        ended = work => ended,
        _ = terminated.recv() => Err(Error::Interrupted),
        _ = hung_up.recv() => Err(Error::Interrupted),
        never = renew(app, &made.vm, args.lease, end), if !args.keep => match never {},
    };
    match args.keep {
        true => app.ui.say(&format!(
            "VM {name} is kept: `nexusctl guest run {name} -- COMMAND`, `nexusctl rm -f {name}`",
            name = made.name
        )),
        false => clean_up(app, &made).await,
    }
    ended
}

/// Renews the VM's time to live until its end, over a connection of its own. A failure is tried again: the daemon may just be restarting.
async fn renew(app: &App, vm: &str, lease: TimeSpan, end: Option<Instant>) -> Infallible {
    let mut connected = None;
    loop {
        tokio::time::sleep(lease.duration() / 4).await;
        let left = end.map(|end| TimeSpan::seconds(end.saturating_duration_since(Instant::now()).as_secs()));
        if left.is_some_and(TimeSpan::is_zero) {
            return std::future::pending().await;
        }
        let lease = left.map_or(lease, |left| left.min(lease));
        let renewed = async {
            let mut client = match connected.take() {
                Some(client) => client,
                None => app.connect_if_up().await?,
            };
            let vm = vm.parse().map_err(|e| ToolError::internal(format!("the VM's id: {e}")))?;
            let params = VmUpdateParams { ttl: Some(lease), ..VmUpdateParams::of(vm) };
            client.call::<VmUpdate>(&params).await?;
            Ok::<_, Error>(client)
        };
        connected = renewed.await.ok();
    }
}

/// A VM that is being made.
struct Made {
    op: OpId,
    vm: String,
    name: String,
}

/// What to run, as given.
enum Given {
    Line(String),
    Arguments { entrypoint: Option<String>, argv: Vec<String> },
}

impl Given {
    /// The program and its user, with the image's defaults.
    async fn program(
        self,
        client: &mut Client,
        vm: Option<&VmDetails>,
        image: &str,
    ) -> Result<(Program, Option<String>), Error> {
        let config = match vm.and_then(|vm| vm.image.id) {
            Some(id) => {
                let params = ImageInspectParams { image: Reference::Id(id) };
                client.call::<ImageInspect>(&params).await?.config.unwrap_or_default()
            }
            None => ImageConfig::default(),
        };
        // The group is dropped: the user's own is used.
        let user = config.user.as_deref().and_then(|user| user.split(':').next()).map(str::to_owned);
        let user = user.filter(|user| !user.is_empty());
        match self.of(config) {
            Program::Argv(argv) if argv.is_empty() => Err(no_command(image)),
            program => Ok((program, user)),
        }
    }

    /// Combines the given program with the image's configuration.
    fn of(self, config: ImageConfig) -> Program {
        let (entrypoint, argv) = match self {
            Self::Line(line) => return Program::Line(line),
            Self::Arguments { entrypoint, argv } => (entrypoint, argv),
        };
        let (first, rest) = match (entrypoint, argv.is_empty()) {
            (Some(program), _) if program.is_empty() => (Vec::new(), argv),
            (Some(program), _) => (vec![program], argv),
            (None, true) => (config.entrypoint, config.cmd),
            (None, false) => (config.entrypoint, argv),
        };
        Program::Argv(first.into_iter().chain(rest).collect())
    }
}

/// Refuses to make a VM if the image is already known to have nothing to run.
async fn refuse_nothing(client: &mut Client, given: &Given, image: &str) -> Result<(), Error> {
    let Given::Arguments { entrypoint, argv } = given else { return Ok(()) };
    if !argv.is_empty() || entrypoint.as_ref().is_some_and(|program| !program.is_empty()) {
        return Ok(());
    }
    let Ok(reference) = image.parse::<Reference<ImageKind>>() else { return Ok(()) };
    match client.call::<ImageInspect>(&ImageInspectParams { image: reference }).await {
        Ok(image) if image.config.as_ref().is_none_or(|c| c.entrypoint.is_empty() && c.cmd.is_empty()) => {
            Err(no_command(image.name.as_str()))
        }
        // A missing image is refused by vm_create.
        _ => Ok(()),
    }
}

fn no_command(image: &str) -> Error {
    Error::Usage {
        message: format!("image {image} has no default command: give one"),
        hint: Some(format!("`nexusctl run {image} -- COMMAND`")),
    }
}

/// Cancels running work and deletes the VM. Uses a new connection, because the other may be in the middle of an answer.
async fn clean_up(app: &App, made: &Made) {
    let cleaned = async {
        let mut client = app.connect_if_up().await?;
        client.call::<OpCancel>(&OpCancelParams { op_id: made.op }).await?;
        let vm = made.vm.parse().map_err(|e| ToolError::internal(format!("the VM's id: {e}")))?;
        match client
            .call::<VmDelete>(&VmDeleteParams {
                vm: Some(vm),
                force: Some(true),
                ..VmDeleteParams::default()
            })
            .await
        {
            Err(Error::Tool(refusal)) if refusal.error.code == ErrorCode::VmNotFound => Ok(()),
            deleted => deleted.map(drop),
        }
    };
    let result: Result<(), Error> = cleaned.await;
    match result {
        Ok(()) if app.ui.format == Format::Human && app.ui.stderr_is_terminal => {
            app.ui.say(&format!("VM {} deleted", made.name));
        }
        Ok(()) => {}
        Err(error) => app.ui.warn(&format!(
            "VM {name} could not be deleted ({}); delete it with `nexusctl rm -f {name}`",
            error.message(),
            name = made.name
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_mean_to_be_run_as_by_docker() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        for (entrypoint, argv, of_image, cmd, run) in [
            (None, "", "", "python3", "python3"),
            (None, "python -V", "", "python3", "python -V"),
            (None, "", "entry.sh", "postgres", "entry.sh postgres"),
            (None, "psql -l", "entry.sh", "postgres", "entry.sh psql -l"),
            (Some("/bin/sh"), "-c true", "entry.sh", "postgres", "/bin/sh -c true"),
            (Some(""), "id", "entry.sh", "postgres", "id"),
            (Some(""), "", "entry.sh", "postgres", ""),
        ] {
            let given = Given::Arguments { entrypoint: entrypoint.map(str::to_owned), argv: words(argv) };
            let config =
                ImageConfig { entrypoint: words(of_image), cmd: words(cmd), ..ImageConfig::default() };
            let Program::Argv(argv) = given.of(config) else { panic!("a line") };
            assert_eq!(argv, words(run));
        }
    }
}
