//! The hello exchange with the host, and the bye. See [`nexus_schema::link`].

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::limits::CONFIGURE_MAX;
use nexus_schema::link::{
    Ack, Bye, ByeReason, Configure, GuestMessage, Hello, HostMessage, ImageMetadata, InitMode, PROTOCOL,
    PROTOCOL_MIN,
};
use nexus_schema::tools::os::{SystemState, SystemStatus};
use tokio::io::AsyncWriteExt;

use super::stream::{Duplex, dial_host};
use super::{Agent, Place, Settings, configure, resume, services};
use crate::commands::freeze;
use crate::console::say;
use crate::os::{OsRelease, read_small, uptime};
use crate::proxy;
use crate::role::VERSION;
use crate::system;
use nexus_wire::lines::{Line, LineReader};

/// The file with the token, for a restarted agent. Only root can read it.
const TOKEN: &str = "/run/nexus/token";
/// The file with the problems from before the agent started, one per line.
const PROBLEMS: &str = "/run/nexus/problems";
/// The file with the image's metadata.
const IMAGE: &str = "/etc/nexus/image.yaml";
/// Timeout of one answer of the host.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a whole bye exchange.
const BYE_TIMEOUT: Duration = Duration::from_secs(5);
/// The first pause after a failed exchange; each further one is twice as long.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The pause after the host has refused.
const PAUSE_REFUSED: Duration = Duration::from_secs(10);

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
enum HelloError {
    #[error("cannot reach the host: {0}")]
    Unreachable(#[source] io::Error),
    #[error("lost the host while talking to it: {0}")]
    Lost(#[source] io::Error),
    #[error("the host does not answer")]
    Timeout,
    #[error("unexpected answer from the host: expected {expected}")]
    Unexpected { expected: &'static str },
    #[error("the host refused: {reason}")]
    Refused { reason: String },
}

/// Sends hello until the host sends a welcome.
pub(super) async fn until_welcome(agent: Arc<Agent>) {
    let mut pause = PAUSE_FIRST;
    let mut said = String::new();
    loop {
        let error = match exchange(&agent).await {
            Ok(()) => return,
            Err(error) => error,
        };
        let text = error.to_string();
        if text != said {
            say(format_args!("hello: {text}"));
            said = text;
        }
        tokio::time::sleep(if let HelloError::Refused { .. } = error { PAUSE_REFUSED } else { pause }).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

async fn exchange(agent: &Arc<Agent>) -> Result<(), HelloError> {
    let mut host = Host::dial(agent).await?;
    let token = agent.settings().token.clone();
    host.say(&GuestMessage::Hello(introduce(agent, token))).await?;
    let HostMessage::Configure(configure) = host.hear().await? else {
        return Err(HelloError::Unexpected { expected: "a configuration" });
    };
    if configure.protocol > agent.protocol.max(PROTOCOL) || configure.protocol < PROTOCOL_MIN {
        return Err(HelloError::Unexpected { expected: "a protocol that this guest speaks" });
    }
    let Configure { token, name, env, working_dir, image_user, .. } = &configure;
    agent.configured(Settings {
        name: name.to_string(),
        env: env.clone(),
        working_dir: working_dir.clone(),
        image_user: image_user.clone(),
        token: Some(token.clone()),
    });
    let token = token.clone();
    agent.host_clock.saw(configure.time_unix_ns);
    let wait = Duration::from_secs(configure.wait_for_init_s.into());
    let (proxy, template) = (configure.proxy, configure.template);
    let restored = match configure.resume.clone() {
        // Before anything else: what comes after it may need random numbers.
        Some(asked) => Some((resume::begin(agent, &asked, &configure).await, asked)),
        None => None,
    };
    agent.proxy.set_interface(agent.is_in_vm() && !configure.interfaces.is_empty());
    let mut problems = apply(agent, configure).await;
    if let Some(params) = proxy {
        problems.extend(proxy::apply(agent, params).await);
    }
    // What an agent left standing still that was killed during a checkpoint. The holder may wait for it, too.
    let is_quiet = agent.is_in_vm() && freeze::is_quiet();
    let resumed = match restored {
        // Its init and its services go on as they were.
        Some((resumed, asked)) => Some(resume::finish(asked, resumed, &problems).await),
        None if template => {
            problems.extend(services::refuse(agent));
            None
        }
        None => {
            if agent.is_beside_init() {
                problems.extend(unready(&system::wait(wait).await));
            }
            if !is_quiet {
                problems.extend(services::start(agent).await);
            }
            None
        }
    };
    let starts_late = resumed.is_none() && is_quiet && !template;
    host.say(&GuestMessage::Ack(Ack { token, problems, resumed })).await?;
    match host.hear().await? {
        HostMessage::Welcome {} => {
            // Those of a restored guest, and those that an agent left standing still that ended during a checkpoint.
            if let Err(error) = resume::thaw(agent) {
                say(format_args!("let commands go on: {error}"));
            }
            // A holder that waited for a command that stood still answers only now. In the background: it may take its time.
            let finding = agent.clone();
            tokio::spawn(async move { finding.holder.find_again().await });
            if starts_late {
                services::start(agent).await.iter().for_each(|problem| say(format_args!("{problem}")));
            }
            Ok(())
        }
        HostMessage::Configure(_) | HostMessage::Refused { .. } => {
            Err(HelloError::Unexpected { expected: "a welcome" })
        }
    }
}

/// Returns a message if the image's init has not started everything.
fn unready(status: &SystemStatus) -> Option<String> {
    let state = status.state.as_str();
    match status.state {
        SystemState::Starting | SystemState::Stopping => Some(format!("system: {state}")),
        SystemState::Degraded => Some(format!("system: {state}; failed: {}", status.failed.join(", "))),
        SystemState::Running | SystemState::Unknown => None,
    }
}

async fn apply(agent: &Arc<Agent>, configure: Configure) -> Vec<String> {
    let init = match agent.place {
        Place::Vm { init } => init,
        Place::Process { .. } => return configure::refuse_on_host(&configure),
    };
    let applied = tokio::task::spawn_blocking(move || {
        let mut problems: Vec<String> =
            read_small(PROBLEMS, 16 << 10).unwrap_or_default().lines().map(str::to_owned).collect();
        if let Err(error) = store_token(&configure.token) {
            problems.push(format!("keep the token: {error}"));
        }
        configure::apply(&configure, init, &mut problems);
        problems
    });
    applied.await.unwrap_or_else(|_| vec!["applying the configuration failed".into()])
}

fn store_token(token: &str) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    let _ = std::fs::remove_file(TOKEN);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(TOKEN)?;
    file.write_all(token.as_bytes())
}

/// Returns the token of this boot, if an earlier agent has stored it.
pub(super) fn stored_token(place: &Place) -> Option<String> {
    match place {
        Place::Vm { .. } => read_small(TOKEN, 1 << 10),
        Place::Process { .. } => None,
    }
}

fn introduce(agent: &Agent, token: Option<String>) -> Hello {
    let uname = rustix::system::uname();
    let (init, os, image, kernel_boot_id) = match agent.place {
        Place::Vm { init } => {
            let id = read_small("/proc/sys/kernel/random/boot_id", 64).unwrap_or_default();
            (init, OsRelease::read().pretty_name, read_image(Path::new(IMAGE)), id.trim().to_owned())
        }
        // Each start of the process counts as a boot.
        Place::Process { .. } => {
            let id = read_small("/proc/sys/kernel/random/uuid", 64).unwrap_or_default();
            (InitMode::Agent, OsRelease::read().pretty_name, None, id.trim().to_owned())
        }
    };
    Hello {
        protocol: agent.protocol,
        min_protocol: agent.protocol.min(PROTOCOL_MIN),
        build: VERSION.to_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        arch: uname.machine().to_string_lossy().into_owned(),
        kernel_boot_id,
        uptime_ms: u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX),
        token,
        resumed: agent.quiet.nonce(),
        init,
        os,
        image,
    }
}

fn read_image(path: &Path) -> Option<ImageMetadata> {
    let text = read_small(path, 256 << 10)?;
    match serde_yaml_ng::from_str(&text) {
        // Without its config: the host knows it better, and a hello should be short.
        Ok(image) => Some(ImageMetadata { config: None, ..image }),
        Err(error) => {
            say(format_args!("{}: {error}", path.display()));
            None
        }
    }
}

/// Tells the host that the guest is shutting down. Gives up after [`BYE_TIMEOUT`].
pub(super) async fn bye(agent: &Arc<Agent>, reason: ByeReason, guessed: bool) {
    let Some(token) = agent.settings().token.clone() else { return };
    let said = tokio::time::timeout(BYE_TIMEOUT, async {
        let mut host = Host::dial(agent).await?;
        host.say(&GuestMessage::Bye(Bye { token, reason, guessed })).await?;
        host.hear().await.map(drop)
    });
    match said.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => say(format_args!("bye: {error}")),
        Err(_) => say(format_args!("bye: the host did not answer")),
    }
}

/// The connection to the host for one exchange.
struct Host {
    lines: LineReader<Box<dyn Duplex>>,
}

impl Host {
    async fn dial(agent: &Agent) -> Result<Self, HelloError> {
        let stream = dial_host(agent).await.map_err(HelloError::Unreachable)?;
        Ok(Self { lines: LineReader::new(stream, CONFIGURE_MAX, CONFIGURE_MAX as u64 * 2) })
    }

    async fn say(&mut self, message: &GuestMessage) -> Result<(), HelloError> {
        let mut line = serde_json::to_vec(message).map_err(|error| HelloError::Lost(error.into()))?;
        line.push(b'\n');
        let written = tokio::time::timeout(ANSWER_TIMEOUT, self.lines.get_mut().write_all(&line));
        written.await.map_err(|_| HelloError::Timeout)?.map_err(HelloError::Lost)
    }

    async fn hear(&mut self) -> Result<HostMessage, HelloError> {
        let line = tokio::time::timeout(ANSWER_TIMEOUT, self.lines.next());
        let message = match line.await.map_err(|_| HelloError::Timeout)?.map_err(HelloError::Lost)? {
            Some(Line::Whole(line)) => serde_json::from_slice(line),
            Some(Line::TooLong(_) | Line::TooLongEnd { .. }) => {
                return Err(HelloError::Unexpected { expected: "a shorter message" });
            }
            None => return Err(HelloError::Lost(io::ErrorKind::UnexpectedEof.into())),
        };
        match message.map_err(|_| HelloError::Unexpected { expected: "a message" })? {
            HostMessage::Refused { reason } => Err(HelloError::Refused { reason }),
            message => Ok(message),
        }
    }
}
