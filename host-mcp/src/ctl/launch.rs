//! Starts the daemon in the background if none is running: one at a time, in a session of its own, with its output in a log.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, IsTerminal, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::time::Instant;

use super::App;
use super::connect;
use super::error::Error;
use super::ui::Format;
use crate::dirs::{self, Env};

/// The hidden command that becomes the daemon.
pub(crate) const COMMAND: &str = "launch-daemon";
/// The variable that names the daemon's binary, for tests and unusual installations.
const BINARY: &str = "NEXUS_DAEMON";
/// How long a new daemon may take until its socket answers.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);
/// How often the socket is tried meanwhile.
const STEP: Duration = Duration::from_millis(20);
/// The longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 64;
/// How much of the log is shown if the daemon exits at once.
const TAIL: u64 = 2000;

/// What to become.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The daemon's binary
    binary: PathBuf,
}

/// Leaves the caller's session and becomes the daemon.
pub(crate) fn exec(args: Args) -> Result<u8, Error> {
    rustix::process::setsid().map_err(|e| Error::Launch {
        what: "leave the session".into(),
        hint: None,
        source: Some(e.into()),
    })?;
    let source = std::process::Command::new(&args.binary).exec();
    Err(Error::File { what: "run", path: args.binary, source })
}

/// The daemon's binary: from `NEXUS_DAEMON`, beside this one, or in `PATH`.
pub(crate) fn daemon_binary(env: &Env) -> PathBuf {
    if let Some(binary) = env.get(OsStr::new(BINARY)).filter(|b| !b.is_empty()) {
        return std::path::absolute(binary).unwrap_or_else(|_| binary.into());
    }
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("nexusd"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| "nexusd".into())
}

/// Asks at the terminal whether to start a daemon, and starts it; returns whether one is running. Does not ask without a terminal.
pub(crate) async fn offer(app: &App, why: &Error) -> Result<bool, Error> {
    let is_asked = app.ui.format == Format::Human && app.ui.stderr_is_terminal && io::stdin().is_terminal();
    if !is_asked {
        return Ok(false);
    }
    let state = dirs::state_dir(app.uid, &app.env)?;
    app.ui.say(&why.message());
    app.ui.ask(&format!("start one in the background, with its state in {}? [Y/n] ", state.display()));
    let answer = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        io::stdin().lock().take(ANSWER_MAX).read_line(&mut answer).map(|read| (read, answer))
    });
    let answered = tokio::select! {
        answered = answer => answered,
        _ = tokio::signal::ctrl_c() => return Err(Error::Interrupted),
    };
    let is_yes = match answered {
        // The terminal was closed.
        Ok(Ok((0, _))) | Err(_) => false,
        Ok(Ok((_, answer))) => ["", "y", "yes"].contains(&&*answer.trim().to_ascii_lowercase()),
        Ok(Err(source)) => return Err(Error::Input { source }),
    };
    if is_yes {
        ensure(app).await?;
    }
    Ok(is_yes)
}

/// Starts the daemon unless it answers, and waits until it does. Prints the place of its state, because another daemon may use
/// a different one. Several callers start only one daemon.
pub(crate) async fn ensure(app: &App) -> Result<(), Error> {
    let socket = app.socket()?;
    let state = dirs::state_dir(app.uid, &app.env)?;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&state);
    made.map_err(|source| Error::File { what: "make", path: state.clone(), source })?;
    let deadline = Instant::now() + DEADLINE;
    let _lock = lock(&state.join("nexusctl.lock"), deadline).await?;
    // Another bridge may have started it while this one waited for the lock.
    if connect::dial(&socket).await.is_ok() {
        return Ok(());
    }
    let log = state.join(dirs::LOG_NAME);
    let mut child = spawn(app, &log)?;
    loop {
        if connect::dial(&socket).await.is_ok() {
            app.ui.say(&format!(
                "started nexusd: its state is in {}, its log is {}",
                state.display(),
                log.display()
            ));
            return Ok(());
        }
        let ended =
            child.try_wait().map_err(|source| Error::File { what: "watch", path: log.clone(), source })?;
        if let Some(status) = ended {
            return Err(Error::Launch {
                what: format!("it exited immediately ({status}); its output:\n{}", tail(&log).trim_end()),
                hint: Some(format!("the full log is in {}", log.display())),
                source: None,
            });
        }
        if Instant::now() >= deadline {
            return Err(Error::Launch {
                what: format!("it is not listening on {} after {} s", socket.display(), DEADLINE.as_secs()),
                hint: Some(format!("see {}", log.display())),
                source: None,
            });
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Takes the lock that lets only one caller start the daemon. Dropping the file releases it.
async fn lock(path: &Path, deadline: Instant) -> Result<File, Error> {
    let fail = |source| Error::File { what: "lock", path: path.into(), source };
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).map_err(fail)?;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => tokio::time::sleep(STEP).await,
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::Launch {
                    what: format!("another nexusctl has been starting it for {} s", DEADLINE.as_secs()),
                    hint: Some(format!("see {} beside {}", dirs::LOG_NAME, path.display())),
                    source: None,
                });
            }
            Err(error) => return Err(fail(error.into())),
        }
    }
}

fn spawn(app: &App, log: &Path) -> Result<tokio::process::Child, Error> {
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { what, path, source }
    };
    let output =
        OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(fail("open", log))?;
    let own = std::env::current_exe().map_err(fail("find", Path::new("/proc/self/exe")))?;
    let daemon = daemon_binary(&app.env);
    // Not std's: tokio reaps the daemon if it ends before the bridge.
    let mut command = tokio::process::Command::new(&own);
    command.arg(COMMAND).arg(&daemon).env_clear().envs(&app.env);
    // The daemon runs in `/`, so that it keeps no directory busy; relative paths are made absolute first.
    for name in [dirs::STATE_DIR, dirs::RUNTIME_DIR, dirs::SOCKET] {
        if let Some(path) = app.env.get(OsStr::new(name)).filter(|value| !value.is_empty()) {
            command.env(name, absolute(Path::new(path))?);
        }
    }
    if let Some(socket) = &app.socket {
        command.env(dirs::SOCKET, absolute(socket)?);
    }
    command.current_dir("/").stdin(Stdio::null());
    command.stdout(output.try_clone().map_err(fail("open", log))?).stderr(output);
    command.spawn().map_err(fail("run", &own))
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|source| Error::File { what: "find", path: path.into(), source })
}

fn tail(log: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(the log cannot be read: {error})"),
    }
}
