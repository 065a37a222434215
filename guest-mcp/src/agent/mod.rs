//! The agent: says hello to the host, applies its configuration, and serves MCP to it.
//!
//! ```text
//! serial ── the ports of a virtio-serial device, where there is one in place of vsock
//! listen ── port 201 ──> open ── streams: those of commands go to the holder, all others are served here
//!        ── port 200 ──> mcp ── tool calls ──> calls ──> crate::tools
//! proxy  ── 127.0.0.1:3128, for programs ──> crate::proxy ── host port 1025
//! hello  ── host port 1024: hello, configure, ack, welcome; and bye before the guest shuts down
//! ```
//! It runs on one thread; work that may block on a disk runs on a small thread pool. Only PID 1 shuts the guest down; the agent asks it to.

mod calls;
mod clock;
mod configure;
mod hello;
mod lease;
mod listen;
mod mcp;
mod mounts;
mod network;
mod open;
mod processes;
mod resume;
pub(crate) mod rpc;
mod serial;
mod services;
mod session;
mod stream;
mod tcp;

pub(crate) use configure::replace;
pub(crate) use network::bring_up_loopback;
pub(crate) use open::{Sender, accept, finish, refuse};
pub(crate) use stream::{SOCKET, ShortPath, privileged_socket};
pub(crate) use tcp::OfProgram;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use nexus_schema::link::{ByeReason, InitMode};
use nix::sys::signal::SigSet;
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::commands::descriptors_of_commands;
use crate::console::say;
use crate::holder::client::{self, Holder};
use crate::holder::wire;
use crate::init::power;
use crate::proxy::Proxy;
use crate::runtime;
use crate::tools::Uploads;

/// Where an agent runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a VM: it listens on vsock, and manages the whole system.
    Vm {
        /// Which program is PID 1.
        init: InitMode,
    },
    /// On a host, as an ordinary process: it listens on Unix sockets in a directory, and does not change the system.
    Process {
        /// The directory of the sockets.
        directory: PathBuf,
    },
}

/// The parts of the host's configuration that later calls use.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    /// The VM's name; empty before the configuration has arrived.
    pub(crate) name: String,
    /// Environment variables of every command.
    pub(crate) env: BTreeMap<String, String>,
    /// The default working directory of commands.
    pub(crate) working_dir: Option<String>,
    /// The user that the image names.
    pub(crate) image_user: Option<String>,
    /// The token of this boot.
    token: Option<String>,
}

impl Settings {
    /// Returns the settings that commands need.
    pub(crate) fn of_commands(&self, proxy: &Proxy) -> wire::Settings {
        wire::Settings {
            env: self.env.clone(),
            proxy_env: proxy.environment(),
            working_dir: self.working_dir.clone(),
            image_user: self.image_user.clone(),
        }
    }

    /// Returns the VM's name, or a placeholder before it is known.
    pub(crate) fn name(&self) -> &str {
        if self.name.is_empty() { "vm" } else { &self.name }
    }
}

/// How an agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The guest is shutting down. Bye was sent, or could not be sent.
    Down,
    /// A signal told the agent to exit.
    Terminated,
}

/// The state that all parts of the agent share.
#[derive(Debug)]
pub(crate) struct Agent {
    place: Place,
    protocol: u32,
    settings: RwLock<Arc<Settings>>,
    host_clock: clock::HostClock,
    /// How long commands may stand still for a checkpoint.
    quiet: resume::Quiet,
    /// The way to the host, in a VM that has no vsock device.
    serial: OnceLock<serial::Serial>,
    /// The process that holds all commands.
    pub(crate) holder: Holder,
    /// The proxy to other machines.
    pub(crate) proxy: Proxy,
    /// Unfinished uploads of files.
    pub(crate) uploads: Uploads,
    /// The calls of each named link of the host.
    links: session::Links,
    /// Notified after each answer that was written.
    answered: Arc<Notify>,
    /// The reason of the shutdown, once it has started.
    going_down: watch::Sender<Option<ByeReason>>,
}

impl Agent {
    fn new(place: Place, protocol: u32) -> Self {
        let settings = Settings { token: hello::stored_token(&place), ..Settings::default() };
        let holder = match &place {
            Place::Vm { .. } => Holder::new(client::directory_in_vm(), true),
            Place::Process { directory } => Holder::new(directory.join("commands"), false),
        };
        Self {
            place,
            protocol,
            settings: RwLock::new(Arc::new(settings)),
            host_clock: clock::HostClock::default(),
            quiet: resume::Quiet::default(),
            serial: OnceLock::new(),
            holder,
            proxy: Proxy::default(),
            uploads: Uploads::default(),
            links: session::Links::default(),
            answered: Arc::default(),
            going_down: watch::Sender::new(None),
        }
    }

    /// Returns the current settings.
    pub(crate) fn settings(&self) -> Arc<Settings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the directory for records about trees that were copied in.
    pub(crate) fn trees(&self) -> PathBuf {
        match &self.place {
            Place::Vm { .. } => PathBuf::from("/var/lib/nexus/trees"),
            Place::Process { directory } => directory.join("trees"),
        }
    }

    /// Returns where this agent runs.
    pub(crate) const fn place(&self) -> &Place {
        &self.place
    }

    /// Returns the way to the host, in a VM that has no vsock device.
    pub(crate) fn serial(&self) -> Option<&serial::Serial> {
        self.serial.get()
    }

    /// Returns whether this agent runs in a VM, and so manages cgroups and OOM scores.
    pub(crate) fn is_in_vm(&self) -> bool {
        matches!(self.place, Place::Vm { .. })
    }

    /// Returns whether PID 1 is the image's own init.
    pub(crate) fn is_beside_init(&self) -> bool {
        self.place == (Place::Vm { init: InitMode::System })
    }

    fn configured(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
    }

    /// Starts the shutdown, once the answer to the request for it is written.
    fn go_down(self: &Arc<Self>, reason: ByeReason) {
        let agent = self.clone();
        let answered = self.answered.clone().notified_owned();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(Duration::from_millis(500), answered).await;
            agent.ask_init(reason).await;
        });
    }

    /// Asks PID 1 to shut the guest down; exits if there is no PID 1 to ask.
    async fn ask_init(self: &Arc<Self>, reason: ByeReason) {
        match self.place {
            // PID 1 then tells this agent to say bye, as it does for any other shutdown.
            Place::Vm { init: InitMode::Agent } => {
                let signal = match reason {
                    ByeReason::Poweroff => Signal::USR2,
                    ByeReason::Reboot => Signal::TERM,
                };
                if let Err(error) = kill_process(Pid::INIT, signal) {
                    say(format_args!("ask PID 1 to go down: {error}"));
                }
            }
            Place::Vm { init: InitMode::System } | Place::Process { .. } => {
                self.going_down.send_replace(Some(reason));
            }
        }
    }

    /// Kills the commands of an agent outside a VM. In a VM, PID 1 does that.
    async fn end_commands(&self) {
        if !self.is_in_vm() {
            self.holder.end().await;
        }
    }
}

/// Runs an agent until it ends.
pub(crate) fn run(place: Place, protocol: u32) -> ExitCode {
    // PID 1 blocks signals in order to wait for them, and child processes inherit that.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        say(format_args!("unblock signals: {error}"));
    }
    let runtime = match runtime::with_pool(16) {
        Ok(runtime) => runtime,
        Err(error) => {
            say(format_args!("cannot start the agent: {error}"));
            return ExitCode::FAILURE;
        }
    };
    // Raises the limit of this process.
    descriptors_of_commands();
    let agent = Arc::new(Agent::new(place, protocol));
    if agent.is_in_vm()
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000")
    {
        say(format_args!("keep the agent from the OOM killer: {error}"));
    }
    let ending = runtime.block_on(async {
        let ending = live(&agent).await;
        agent.end_commands().await;
        ending
    });
    // A call that hangs in the kernel must not delay the exit.
    runtime.shutdown_background();
    match ending {
        Ok(Ending::Down) => ExitCode::SUCCESS,
        Ok(Ending::Terminated) => ExitCode::from(143),
        Err(error) => {
            say(format_args!("the agent failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    /// The ports or sockets are not available.
    #[error("cannot listen: {0}")]
    Listen(#[source] std::io::Error),
    /// Signals cannot be received.
    #[error("cannot receive signals: {0}")]
    Signal(#[source] std::io::Error),
}

async fn live(agent: &Arc<Agent>) -> Result<Ending, AgentError> {
    let catch = |kind| signal(kind).map_err(AgentError::Signal);
    let mut terminate = catch(SignalKind::terminate())?;
    let mut interrupt = catch(SignalKind::interrupt())?;
    let mut reboot = catch(SignalKind::user_defined1())?;
    let mut poweroff = catch(SignalKind::user_defined2())?;
    let mut going_down = agent.going_down.subscribe();

    agent.holder.find_soon().await;
    listen::start(agent).await.map_err(AgentError::Listen)?;
    tokio::spawn(hello::until_welcome(agent.clone()));

    let (mut was_asked, mut guessed) = (false, false);
    let wanted = tokio::select! {
        _ = terminate.recv() => match agent.place {
            // The image's init then kills all processes when the guest shuts down.
            Place::Vm { init: InitMode::System } => {
                guessed = true;
                Some(power::guess())
            }
            Place::Vm { init: InitMode::Agent } | Place::Process { .. } => None,
        },
        _ = interrupt.recv() => None,
        _ = reboot.recv() => Some(ByeReason::Reboot),
        _ = poweroff.recv() => Some(ByeReason::Poweroff),
        asked = async { going_down.wait_for(Option::is_some).await.map(|reason| *reason) } => {
            was_asked = true;
            asked.ok().flatten()
        }
    };
    let Some(reason) = wanted else { return Ok(Ending::Terminated) };
    hello::bye(agent, reason, guessed).await;
    if was_asked && agent.is_beside_init() {
        let restarted = tokio::task::spawn_blocking(power::restart_through_image);
        if !restarted.await.unwrap_or(false) {
            say(format_args!("cannot tell the image's init to shut down"));
        }
    }
    Ok(Ending::Down)
}
