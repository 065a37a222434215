//! How a command is started: program, user, directory and environment.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::{COMMAND_MAX, COMMAND_WORD_MAX, FILE_WRITE_MAX};
use nexus_schema::tools::ContentEncoding;
use nix::errno::Errno;
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use tokio::process::{Child, Command};
use tokio::sync::OwnedSemaphorePermit;

use super::cgroup::Cgroup;
use super::streams::{self, Ends, Stdin};
use super::tree::{MARK, Tree};
use crate::holder::wire::Settings;
use crate::identity::Identity;
use crate::os::{Users, reason, shell, with_errno};
use crate::places::make_directories;
use crate::sys::{ChildSetup, prepare_child};
use crate::tools::agent_failed;

/// The default `PATH`; the first directory has `poweroff` and the like.
pub(crate) const PATH: &str = "/run/nexus/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The `TERM` of commands in a terminal.
const TERM: &str = "xterm-256color";
/// How much of a command line is kept for lists, in characters.
const LINE_MAX: usize = 200;

/// The command to start.
#[derive(Debug, Default)]
pub(super) struct Order {
    pub(super) command: Option<String>,
    pub(super) argv: Option<Vec<String>>,
    /// Whether it is the user's login shell, instead of `command` or `argv`.
    pub(super) login_shell: bool,
    pub(super) cwd: Option<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) user: Option<String>,
    pub(super) stdin: Option<String>,
    pub(super) stdin_encoding: ContentEncoding,
    pub(super) stdin_path: Option<String>,
    pub(super) stdin_open: bool,
    /// The size of its terminal as columns and rows, if it gets one.
    pub(super) terminal: Option<(u16, u16)>,
    pub(super) merge: bool,
    pub(super) log: Option<String>,
}

/// A started command.
pub(super) struct Started {
    /// Its first process.
    pub(super) child: Child,
    /// All of its processes.
    pub(super) tree: Tree,
    /// The command line, for lists.
    pub(super) line: String,
    /// Its working directory.
    pub(super) cwd: String,
    /// Its user.
    pub(super) user: String,
    /// Our ends of its streams.
    pub(super) ends: Ends,
    /// The input to write first.
    pub(super) input: Option<Vec<u8>>,
    /// Counts this input for the limit of all commands; the caller sets it.
    pub(super) held: Option<OwnedSemaphorePermit>,
    /// The file that gets all output.
    pub(super) log: Option<File>,
}

/// Starts a command; `mark` identifies its processes.
pub(super) fn start(
    order: Order,
    settings: &Settings,
    in_vm: bool,
    mark: String,
) -> Result<Started, ToolError> {
    let mut line = line(&order);
    let who = Identity::resolve(order.user.as_deref(), settings.image_user.as_deref(), &Users::read())?;
    let (program, of_image) = if order.login_shell {
        if order.command.is_some() || order.argv.is_some() {
            return Err(ToolError::invalid("a login shell excludes command and argv"));
        }
        let program = login_shell(&who)?;
        line = program.join(" ");
        // It starts in the home directory, as every login shell.
        (Program { argv: program, script: None }, None)
    } else {
        (Program::of(order.command, order.argv)?, settings.working_dir.as_deref())
    };
    let Program { argv, script } = program;
    let input = input(order.stdin, order.stdin_encoding)?;
    let (cwd, directory) = cwd(order.cwd, of_image, &who)?;
    let stdin_file = match (&order.stdin_path, &input, order.stdin_open, order.terminal) {
        (None, ..) => None,
        (Some(path), None, false, None) => Some(who.run(|| streams::input_file(path))??),
        (Some(_), ..) => {
            return Err(ToolError::invalid("stdin_path excludes stdin, stdin_open and tty"));
        }
    };

    let mut environment = environment(&who, in_vm);
    if order.terminal.is_some() {
        environment.insert("TERM".to_owned(), TERM.to_owned());
    }
    environment.extend(proxy_env(settings, &order.env));
    environment.extend(settings.env.clone());
    for (name, value) in order.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ToolError::invalid(format!(
                "`{}` cannot be an environment variable",
                name.escape_debug()
            )));
        }
        environment.insert(name, value);
    }
    check_environment(&environment)?;

    let (cgroup, procs) = in_vm.then(|| Cgroup::create(&mark)).flatten().unzip();
    if cgroup.is_none() {
        environment.insert(MARK.to_owned(), mark.clone());
    }
    let log = match order.log.as_deref() {
        Some(path) => Some(who.run(|| streams::log_file(path))??),
        None => None,
    };

    let stdin = match stdin_file {
        Some(file) => Stdin::File(file),
        None if input.is_some() || order.stdin_open => Stdin::Pipe,
        None => Stdin::Nothing,
    };
    let (ends, theirs) = streams::make(stdin, order.terminal, order.merge)
        .map_err(|error| agent_failed(format!("make the command's streams: {}", reason(&error))))?;
    let mut command = std::process::Command::new(&argv[0]);
    command.args(&argv[1..]).env_clear().envs(&environment);
    command.stdin(theirs.stdin).stdout(theirs.stdout).stderr(theirs.stderr);
    prepare_child(
        &mut command,
        ChildSetup {
            cgroup: procs,
            reset_oom: in_vm,
            credentials: who.credentials,
            directory: Some(directory),
            dies_with_parent: true,
            kept: script,
            terminal: order.terminal.is_some(),
            descriptors: Some(super::descriptors_of_commands()),
        },
    );
    let child = Command::from(command).spawn().map_err(|error| refused(&argv[0], &error))?;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32));
    let pid = pid.ok_or_else(|| agent_failed("a command that was just started has no process id"))?;
    let tree = Tree::new(pid, mark, cgroup);
    Ok(Started { child, tree, line, cwd, user: who.name, ends, input, held: None, log })
}

/// Returns the command line for lists: one line of at most 200 characters.
fn line(order: &Order) -> String {
    let text = match (&order.command, &order.argv) {
        (Some(line), _) => line.clone(),
        (None, Some(argv)) => argv.join(" "),
        (None, None) => String::new(),
    };
    let tame = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut line: String = tame.take(LINE_MAX + 1).collect();
    if let Some((end, _)) = line.char_indices().nth(LINE_MAX) {
        line.truncate(end);
        line.push('…');
    }
    line
}

fn refused(program: &str, error: &io::Error) -> ToolError {
    let program: String = program.chars().take(200).collect();
    let (code, hint) = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => (
            ErrorCode::ProgramNotFound,
            Some("give the path of an existing program, or install it; a script also needs its interpreter"),
        ),
        Some(Errno::EACCES | Errno::ENOEXEC | Errno::ENOTDIR | Errno::EISDIR | Errno::ELOOP) => {
            (ErrorCode::ProgramNotExecutable, Some("make it executable, or run it with its interpreter"))
        }
        Some(Errno::E2BIG) => (
            ErrorCode::TooLarge,
            Some("argv and env together can have at most about 2 MiB: pass data by stdin or in a file"),
        ),
        _ => (ErrorCode::CommandFailed, None),
    };
    let failed = ToolError::new(code, format!("start `{program}`: {}", reason(error)));
    let failed = with_errno(failed, error);
    match hint {
        Some(hint) => failed.hint(hint),
        None => failed,
    }
}

/// The program to execute.
#[derive(Debug)]
struct Program {
    argv: Vec<String>,
    /// The command line if it is too long for an argument: an in-memory file that `argv` refers to.
    script: Option<OwnedFd>,
}

impl Program {
    fn of(command: Option<String>, argv: Option<Vec<String>>) -> Result<Self, ToolError> {
        let (program, script) = match (command, argv) {
            (Some(line), None) => {
                check_line(&line)?;
                let shell = shell().ok_or_else(|| {
                    ToolError::new(ErrorCode::ProgramNotFound, "the VM has no shell")
                        .hint("give `argv` instead of `command`")
                })?;
                if line.len() <= COMMAND_WORD_MAX {
                    (vec![shell.to_owned(), "-c".to_owned(), line], None)
                } else {
                    let script = in_memory(line.as_bytes()).map_err(|error| {
                        let text = format!("keep a command of {} bytes: {}", line.len(), reason(&error));
                        ToolError::new(ErrorCode::CommandFailed, text)
                    })?;
                    // The child has it under the same number.
                    (vec![shell.to_owned(), format!("/proc/self/fd/{}", script.as_raw_fd())], Some(script))
                }
            }
            (None, Some(argv)) if argv.first().is_some_and(|program| !program.is_empty()) => (argv, None),
            (None, Some(_)) => return Err(ToolError::invalid("argv needs a program")),
            (None, None) => return Err(ToolError::invalid("give `command` or `argv`")),
            (Some(_), Some(_)) => {
                return Err(ToolError::invalid("give either `command` or `argv`, not both"));
            }
        };
        if program.iter().any(|word| word.contains('\0')) {
            return Err(ToolError::invalid("a command cannot contain a NUL byte"));
        }
        if let Some((at, word)) = program.iter().enumerate().find(|(_, word)| word.len() > COMMAND_WORD_MAX) {
            return Err(too_long(&format!("argv[{at}]"), word.len()));
        }
        Ok(Self { argv: program, script })
    }
}

fn check_line(line: &str) -> Result<(), ToolError> {
    if line.len() as u64 <= COMMAND_MAX {
        return Ok(());
    }
    let text = format!("command has {} bytes, at most {COMMAND_MAX} are allowed", line.len());
    Err(ToolError::new(ErrorCode::TooLarge, text)
        .hint("write it to a file with file_write, and run the file"))
}

fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), ToolError> {
    let length = |(name, value): &(&String, &String)| name.len() + 1 + value.len();
    match environment.iter().find(|variable| length(variable) > COMMAND_WORD_MAX) {
        Some(variable) => {
            Err(too_long(&format!("env variable `{}`", shortened(variable.0)), length(&variable)))
        }
        None => Ok(()),
    }
}

/// Returns the error for a word that is too long for Linux.
fn too_long(what: &str, bytes: usize) -> ToolError {
    let text = format!("{what} has {bytes} bytes, Linux allows at most {COMMAND_WORD_MAX}");
    ToolError::new(ErrorCode::TooLarge, text).hint("pass it by stdin, or write it to a file with file_write")
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Creates an anonymous in-memory file with `bytes`.
fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file: File = rustix::fs::memfd_create(c"command", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    file.write_all(bytes)?;
    Ok(file.into())
}

fn input(stdin: Option<String>, encoding: ContentEncoding) -> Result<Option<Vec<u8>>, ToolError> {
    let Some(text) = stdin else { return Ok(None) };
    let bytes = encoding.decode(text).map_err(|error| ToolError::invalid(format!("stdin: {error}")))?;
    if bytes.len() as u64 > FILE_WRITE_MAX {
        let text = format!("stdin has {} bytes, at most {FILE_WRITE_MAX} are allowed", bytes.len());
        return Err(ToolError::new(ErrorCode::TooLarge, text).hint("write it to a file and give stdin_path"));
    }
    Ok(Some(bytes))
}

/// Opens the working directory of a command with its user's rights: `cwd` if given; else the image's, created if missing; else the user's home.
fn cwd(
    given: Option<String>,
    of_image: Option<&str>,
    who: &Identity,
) -> Result<(String, OwnedFd), ToolError> {
    let path = match (given, of_image) {
        (Some(path), _) if !path.starts_with('/') || path.contains('\0') => {
            return Err(ToolError::invalid("cwd must be an absolute path"));
        }
        (Some(path), _) => path,
        (None, Some(path)) => working_directory(path)?,
        (None, None) => {
            if who.home.starts_with('/')
                && let Ok(directory) = who.run(|| enter(&who.home))?
            {
                return Ok((who.home.clone(), directory));
            }
            "/".to_owned()
        }
    };
    let directory = who.run(|| enter(&path))?.map_err(|error| {
        let text = format!("cwd {path} as {}: {}", who.name, reason(&error));
        let failed = with_errno(ToolError::new(ErrorCode::CwdNotFound, text), &error);
        match error.kind() {
            io::ErrorKind::PermissionDenied => failed
                .hint(format!("the user {} may not enter it: give another cwd, or another user", who.name)),
            _ => failed,
        }
    })?;
    Ok((path, directory))
}

/// Opens a directory that this thread may enter.
fn enter(path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Looking `.` up in it needs the right to enter it.
    Ok(rustix::fs::open(format!("{path}/."), flags, Mode::empty())?)
}

/// Returns the image's working directory; a relative one starts at the root.
fn working_directory(of_image: &str) -> Result<String, ToolError> {
    let path: PathBuf = Path::new("/").join(of_image);
    make_directories(&path).map_err(|error| {
        let text = format!("the image's working directory {}: {}", path.display(), reason(&error));
        with_errno(ToolError::new(ErrorCode::FileRefused, text), &error).hint("give `cwd`")
    })?;
    Ok(path.to_string_lossy().into_owned())
}

/// Returns the user's own shell if it can be executed, else the VM's; as a login shell.
fn login_shell(who: &Identity) -> Result<Vec<String>, ToolError> {
    let is_shell = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        let is_none = matches!(name, "" | "nologin" | "false");
        path.starts_with('/') && !is_none && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
    };
    let own = is_shell(&who.shell).then(|| who.shell.clone());
    let program = own.or_else(|| shell().map(str::to_owned)).ok_or_else(|| {
        ToolError::new(ErrorCode::ProgramNotFound, "the VM has no shell").hint("run a program of the image")
    })?;
    Ok(vec![program, "-l".to_owned()])
}

/// Returns the proxy variables. If the VM or the caller sets one in either case, neither case is set here.
fn proxy_env<'a>(
    settings: &'a Settings,
    own: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = (String, String)> + 'a {
    let is_set =
        |name: &str| settings.env.keys().chain(own.keys()).any(|other| other.eq_ignore_ascii_case(name));
    let ours = settings.proxy_env.iter().filter(move |(name, _)| !is_set(name));
    ours.map(|(name, value)| (name.clone(), value.clone()))
}

/// Returns the default environment of a command.
fn environment(who: &Identity, in_vm: bool) -> BTreeMap<String, String> {
    // A process on a host keeps the host's `PATH`.
    let path = if in_vm { None } else { std::env::var("PATH").ok() };
    [
        ("PATH", path.unwrap_or_else(|| PATH.to_owned())),
        ("HOME", who.home.clone()),
        ("USER", who.name.clone()),
        ("LOGNAME", who.name.clone()),
        ("SHELL", if who.shell.is_empty() { "/bin/sh".to_owned() } else { who.shell.clone() }),
        ("LANG", "C.UTF-8".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_of_others_goes_before_ours() {
        let map = |names: &[&str]| names.iter().map(|name| (name.to_string(), name.to_string())).collect();
        let settings = Settings {
            env: map(&["HTTP_PROXY"]),
            proxy_env: map(&["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy"]),
            ..Settings::default()
        };
        let own = map(&["no_proxy"]);
        let names: Vec<_> = proxy_env(&settings, &own).map(|(name, _)| name).collect();
        assert_eq!(names, ["HTTPS_PROXY", "https_proxy"]);
    }

    #[test]
    fn either_a_line_or_words() {
        let argv = |command, argv| Program::of(command, argv).map(|program| program.argv);
        assert!(argv(None, None).is_err());
        assert!(argv(Some("x".into()), Some(vec!["x".into()])).is_err());
        assert!(argv(None, Some(vec![])).is_err());
        assert!(argv(None, Some(vec!["a\0b".into()])).is_err());
        assert_eq!(argv(None, Some(vec!["ls".into(), "-l".into()])).unwrap(), ["ls", "-l"]);
        assert_eq!(argv(Some("ls | wc".into()), None).unwrap()[1..], ["-c", "ls | wc"]);
    }
}
