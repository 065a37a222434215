//! The lifecycle of the daemon: opens the state directory, serves, and shuts down in order. VMs outlive it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use nexus_core::host::memory;
use nexus_core::{Caller, Nexus, OpenError};
use nexus_schema::tools::system::{Doctor, DoctorStatus};
use rustix::process::{Resource, Rlimit};
use tokio::net::{TcpListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::endpoint::{self, Door, Endpoints, SocketUsers, TokenError};
use crate::host::{Host, View};
use crate::settings::Settings;
use crate::tools::Toolset;
use crate::{bridge, log, stream};

/// The guest, built for its own target.
pub static AGENT: &[u8] = include_bytes!(env!("NEXUS_GUEST_BIN"));

/// This binary, even after an upgrade has replaced its file.
const OWN_BINARY: &str = "/proc/self/exe";
/// How long clients may take to disconnect when the daemon stops.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long the last spans may take.
const EXPORT_MAX: Duration = Duration::from_secs(3);
/// How long running work may take to finish.
const SETTLE_MAX: Duration = Duration::from_secs(15);
/// How long another daemon that is just starting may take to make its socket available.
const START_MAX: Duration = Duration::from_secs(10);
/// How often open streams are checked when nothing else keeps the daemon running.
const IDLE_CHECK: Duration = Duration::from_millis(500);
/// How often unused memory is returned to the system, if there was any activity.
const TIDY_EVERY: Duration = Duration::from_secs(20);

/// Why the daemon could not serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state directory cannot be opened.
    #[error("open the state directory {directory}")]
    Open {
        /// The directory.
        directory: String,
        /// Why not.
        #[source]
        source: Box<OpenError>,
    },
    /// A directory cannot be made.
    #[error("make the directory {directory}")]
    Directory {
        /// The directory.
        directory: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another daemon listens on the socket.
    #[error("another nexusd serves {socket}")]
    Served {
        /// The socket.
        socket: String,
    },
    /// The users of the socket are not as configured.
    #[error("{0}")]
    SocketUsers(String),
    /// A socket cannot be listened on.
    #[error("listen on {address}")]
    Listen {
        /// The socket or address.
        address: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The token is not available.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The process itself could not be set up.
    #[error("{what}")]
    Process {
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl DaemonError {
    /// Whether another daemon uses the state directory or the socket.
    fn is_served(&self) -> bool {
        match self {
            Self::Served { .. } => true,
            Self::Open { source, .. } => matches!(**source, OpenError::Locked { .. }),
            _ => false,
        }
    }
}

/// Runs until told to stop. With `stdio`, also serves the client on this process's own stdin and stdout, and ends with it.
pub fn run(settings: Settings, stdio: bool) -> Result<ExitCode, DaemonError> {
    raise_file_limit();
    memory::keep_lean();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.worker_threads)
        .thread_name("nexusd")
        .enable_all()
        .build()
        .map_err(|source| DaemonError::Process { what: "start the threads of the daemon", source })?;
    let ended = runtime.block_on(async {
        if stdio { Box::pin(serve_stdio(settings)).await } else { Box::pin(serve(settings, false)).await }
    });
    // Does not wait for threads that are blocked on a file or on stdin.
    runtime.shutdown_background();
    ended
}

/// A daemon and a stdio server in one; or a bridge, if another daemon already holds the state directory.
async fn serve_stdio(settings: Settings) -> Result<ExitCode, DaemonError> {
    if connect(&settings.socket).await.is_some() {
        return Ok(bridge::pump(&settings.socket).await);
    }
    let socket = settings.socket.clone();
    match Box::pin(serve(settings, true)).await {
        Err(error) if error.is_served() => {
            // That daemon is just starting.
            let waited = timeout(START_MAX, async {
                while connect(&socket).await.is_none() {
                    sleep(Duration::from_millis(50)).await;
                }
            });
            match waited.await {
                Ok(()) => Ok(bridge::pump(&socket).await),
                Err(_) => Err(DaemonError::Listen {
                    address: socket.display().to_string(),
                    source: io::Error::new(
                        io::ErrorKind::TimedOut,
                        "the daemon that holds the state directory does not serve",
                    ),
                }),
            }
        }
        other => other,
    }
}

async fn serve(settings: Settings, stdio: bool) -> Result<ExitCode, DaemonError> {
    let mut terminate = listen_for(SignalKind::terminate())?;
    let mut interrupt = listen_for(SignalKind::interrupt())?;
    make_directory(&settings.state_dir)?;
    let (runtime_dir, name) = split_socket(&settings.socket)?;
    make_directory(&runtime_dir)?;
    let shim = PathBuf::from(OWN_BINARY);
    if let Some(guest) = settings.guest_binary {
        tracing::info!(?guest, "VMs run the guest binary of the configuration");
    }
    let nexus = Nexus::open(settings.config(AGENT, shim)).await.map_err(|source| DaemonError::Open {
        directory: settings.state_dir.display().to_string(),
        source: Box::new(source),
    })?;
    let stop = CancellationToken::new();
    let endpoints = Endpoints::new(Host::new(nexus.clone()), settings.tools, stop.clone());
    let opened = open_doors(&settings, &endpoints, &runtime_dir, &name).await;
    if let Err(error) = opened {
        stop.cancel();
        nexus.shutdown().await;
        return Err(error);
    }
    // Fails without systemd, which does not matter.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::spawn(tidy(endpoints.clone()));
    // Ends later than calls do, so that none of their spans is lost.
    let exported = CancellationToken::new();
    let exporting = settings
        .otlp_endpoint
        .clone()
        .map(|collector| tokio::spawn(endpoints.host().clone().export(collector, exported.clone())));
    tracing::info!(socket = %settings.socket.display(), state = %settings.state_dir.display(), "serving");

    tokio::select! {
        _ = terminate.recv() => tracing::info!("told to stop"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
        () = stdio_client(&endpoints, settings.tools), if stdio => tracing::info!("the client is gone"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.cancel();
    let (clients, calls) = (endpoints.tasks(), endpoints.host().under_way());
    clients.close();
    calls.close();
    if timeout(DRAIN_MAX, async { tokio::join!(clients.wait(), calls.wait()) }).await.is_err() {
        tracing::warn!("clients are still connected: leaving all the same");
    }
    exported.cancel();
    if let Some(exporting) = exporting
        && timeout(EXPORT_MAX, exporting).await.is_err()
    {
        tracing::warn!("the collector is slow: the last spans are lost");
    }
    if timeout(SETTLE_MAX, nexus.shutdown()).await.is_err() {
        tracing::warn!("work is still under way: it is settled at the next start");
    }
    // Removes the socket, because nobody listens on it any more.
    let _ = std::fs::remove_file(&settings.socket);
    Ok(ExitCode::SUCCESS)
}

async fn open_doors(
    settings: &Settings,
    endpoints: &Endpoints,
    runtime_dir: &Path,
    name: &str,
) -> Result<(), DaemonError> {
    if connect(&settings.socket).await.is_some() {
        return Err(DaemonError::Served { socket: settings.socket.display().to_string() });
    }
    let failed = |address: String| move |source| DaemonError::Listen { address, source };
    let users = SocketUsers::resolve(settings.socket_group.as_deref(), &settings.socket_users)
        .map_err(DaemonError::SocketUsers)?;
    endpoint::serve_unix(endpoints, runtime_dir, name, users)
        .map_err(failed(settings.socket.display().to_string()))?;
    if let Some(address) = settings.http {
        let token = endpoint::load_token(&settings.state_dir)?;
        let listener = TcpListener::bind(address).await.map_err(failed(address.to_string()))?;
        // With port 0, the system chose one.
        let address = listener.local_addr().map_err(failed(address.to_string()))?;
        endpoint::serve_tcp(
            endpoints,
            listener,
            Door::Tcp { token, origins: settings.http_origins.clone().into() },
        );
        tracing::info!(url = %format!("http://{address}/mcp"), "serving HTTP");
    }
    Ok(())
}

/// Serves the client on stdin and stdout, then waits until the other clients have disconnected.
async fn stdio_client(endpoints: &Endpoints, tools: Toolset) {
    let caller = Caller::owner(format!("uid:{}", rustix::process::getuid().as_raw()));
    let ends = rmcp::transport::stdio_pipes();
    let stop = endpoints.stop().child_token();
    Box::pin(stream::serve(endpoints.host().clone(), View::Whole(tools), caller, ends, &[], stop)).await;
    while endpoints.host().counters().streams.get() > 0 {
        sleep(IDLE_CHECK).await;
    }
}

/// Returns unused memory to the system, until the daemon stops.
async fn tidy(endpoints: Endpoints) {
    let (mut seen, mut quiet) = (None, 0_u8);
    loop {
        tokio::select! {
            () = sleep(TIDY_EVERY) => {}
            () = endpoints.stop().cancelled() => return,
        }
        let calls = endpoints.host().counters();
        let now = Some((calls.host_calls.get(), calls.guest_calls.get(), calls.requests.get()));
        // Work started by a call may outlast it, so memory is returned once more after everything was quiet.
        if quiet < 2 {
            memory::give_back();
        }
        quiet = if seen == now { quiet.saturating_add(1) } else { 0 };
        seen = now;
    }
}

/// A connection to the daemon behind a socket, if one is running.
async fn connect(socket: &Path) -> Option<UnixStream> {
    let (directory, name) = split_socket(socket).ok()?;
    nexus_core::host::socket::connect_in_tokio(&directory, &name).await.ok()
}

fn split_socket(socket: &Path) -> Result<(PathBuf, String), DaemonError> {
    let parts = socket.parent().zip(socket.file_name().and_then(|name| name.to_str()));
    parts.map(|(directory, name)| (directory.to_owned(), name.to_owned())).ok_or_else(|| {
        DaemonError::Listen {
            address: socket.display().to_string(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "not the path of a socket"),
        }
    })
}

fn listen_for(kind: SignalKind) -> Result<tokio::signal::unix::Signal, DaemonError> {
    signal(kind).map_err(|source| DaemonError::Process { what: "listen for signals", source })
}

/// Makes a directory that is private to this user; an existing one is not changed.
fn make_directory(directory: &Path) -> Result<(), DaemonError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| DaemonError::Directory { directory: directory.display().to_string(), source })
}

/// Raises the limit of open files as far as the system allows.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // A lower limit only allows fewer VMs, so a failure does not prevent the start.
    let _ = rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit { current: limit.maximum, maximum: limit.maximum },
    );
}

/// Prints an error with all its causes to stderr.
pub fn complain(error: &dyn std::error::Error, code: u8) -> ExitCode {
    log::say(&format!("nexusd: {}", nexus_schema::error::chain(error)));
    ExitCode::from(code)
}

/// Runs as the parent of one VM's VMM.
pub fn shim(directory: &Path) -> ExitCode {
    nexus_core::shim_main(directory)
}

/// Prints what this host can run.
pub fn doctor(settings: &Settings, json: bool) -> ExitCode {
    use std::io::Write;
    let host = nexus_core::examine(&settings.config(AGENT, PathBuf::from(OWN_BINARY)));
    let mut report = host.report();
    nexus_core::add_database_check(&mut report, &settings.state_dir);
    let text =
        if json { serde_json::to_string_pretty(&report).unwrap_or_default() } else { in_words(&report) };
    // A reader that stops early does not need the rest.
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
    if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn in_words(report: &Doctor) -> String {
    let mut text = match (&report.driver, &report.accel) {
        (Some(driver), Some(accel)) => format!("VMs run with {driver} ({accel}): {}\n", report.why),
        _ => format!("VMs cannot be run here: {}\n", report.why),
    };
    for check in &report.checks {
        let status = match check.status {
            DoctorStatus::Ok => "ok",
            DoctorStatus::Note => "note",
            DoctorStatus::Warn => "warn",
            DoctorStatus::Fail => "FAIL",
        };
        text.push_str(&format!("{status:<5} {:<19} {}\n", check.name, check.found));
        if let Some(fix) = &check.fix {
            text.push_str(&format!("      {:<19} fix: {fix}\n", ""));
        }
    }
    text
}
