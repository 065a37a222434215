//! A separate daemon for one test, with a state directory that starts with a kernel and the `busybox` image. At the end it is
//! checked for leftovers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Client;
use crate::wait::until;

mod user;

pub use user::UsersHost;

/// How long a daemon may take to start.
const START: Duration = Duration::from_secs(60);
/// How long it may take to stop.
const END: Duration = Duration::from_secs(60);
/// How long making kernel and image may take.
const SEED: Duration = Duration::from_mins(10);

/// Where a daemon runs.
#[derive(Debug)]
enum Host {
    /// As the test itself.
    Own,
    /// In a network namespace, given by a path.
    Namespace(PathBuf),
    /// As another user.
    User(user::Place),
}

/// One nexusd with everything in one directory. Dropping it deletes all its VMs and checks that nothing is left.
#[derive(Debug)]
pub struct Daemon {
    process: Child,
    root: PathBuf,
    state: PathBuf,
    arguments: Vec<String>,
    settings: BTreeMap<String, String>,
    /// The host that it runs on, if not the test's own.
    host: Host,
    _temporary: Option<TempDir>,
}

impl Daemon {
    /// A daemon whose VMs are processes of this host, `nexus-guest --unix`, without kernel and images. `arguments` are
    /// additional arguments of its command line.
    pub fn start_with_processes(arguments: &[&str]) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        let guest = temporary.path().join("nexus-guest");
        fs::write(&guest, nexus_host::daemon::AGENT).expect("write the guest");
        fs::set_permissions(&guest, fs::Permissions::from_mode(0o755)).expect("make the guest a program");
        Self::with_guest(temporary, &guest, arguments)
    }

    /// The same with a program that stands in for the guest.
    pub fn start_with_guest(guest: &Path, arguments: &[&str]) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        Self::with_guest(temporary, guest, arguments)
    }

    fn with_guest(temporary: TempDir, guest: &Path, arguments: &[&str]) -> Self {
        let root = temporary.path().to_path_buf();
        let guest = guest.display().to_string();
        let arguments: Vec<String> = ["--driver", "process", "--guest", &guest]
            .iter()
            .chain(arguments)
            .map(|word| (*word).to_owned())
            .collect();
        let state = root.join("state");
        let settings = BTreeMap::new();
        let process = spawn(&root, &state, &arguments, &settings);
        let mut daemon =
            Self { process, root, state, arguments, settings, host: Host::Own, _temporary: Some(temporary) };
        daemon.wait_until_served();
        daemon
    }

    /// A daemon with an empty state directory and additional settings (`NEXUS_*` in the environment).
    pub fn start_bare(settings: &[(&str, &str)]) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-fake-").tempdir().expect("a temporary directory");
        let state = temporary.path().join("state");
        Self::run(temporary, state, &[], settings)
    }

    /// The same in the caller's state directory.
    pub fn start_bare_at(state: &Path, settings: &[(&str, &str)]) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-fake-").tempdir().expect("a temporary directory");
        Self::run(temporary, state.to_path_buf(), &[], settings)
    }

    /// A daemon with a kernel and the `busybox` image, in the caller's state directory.
    pub fn start_at(state: &Path) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        copy(&seed(), state);
        Self::run(temporary, state.to_path_buf(), &[], &[])
    }

    /// A daemon with a kernel and the `busybox` image, and additional settings.
    pub fn start_set(settings: &[(&str, &str)]) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        let state = temporary.path().join("state");
        copy(&seed(), &state);
        Self::run(temporary, state, &[], settings)
    }

    /// A daemon with a kernel and the `busybox` image.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same in a network namespace, given by a path. Needs root.
    pub fn start_in_namespace(namespace: &Path) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        let (root, state) = (temporary.path().to_path_buf(), temporary.path().join("state"));
        copy(&seed(), &state);
        let host = Host::Namespace(namespace.to_owned());
        Self::run_on(host, temporary, root, state, BTreeMap::new())
    }

    fn run_on(
        host: Host,
        temporary: TempDir,
        root: PathBuf,
        state: PathBuf,
        settings: BTreeMap<String, String>,
    ) -> Self {
        let arguments = vec![];
        let process = start(host.command(&root, &arguments), &root, &state, &settings);
        let mut daemon =
            Self { process, root, state, arguments, settings, host, _temporary: Some(temporary) };
        daemon.wait_until_served();
        daemon
    }

    /// The same with additional arguments on its command line.
    pub fn start_with(arguments: &[&str]) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        let state = temporary.path().join("state");
        Self::start_in(temporary, state, arguments)
    }

    /// The same with its state at a path of the given length.
    pub fn start_with_long_path(length: usize) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-e2e-").tempdir().expect("a temporary directory");
        let mut state = temporary.path().to_path_buf();
        while state.as_os_str().len() < length {
            let missing = length - state.as_os_str().len();
            state.push("d".repeat(missing.saturating_sub(1).clamp(1, 60)));
        }
        Self::start_in(temporary, state, &[])
    }

    fn start_in(temporary: TempDir, state: PathBuf, arguments: &[&str]) -> Self {
        copy(&seed(), &state);
        Self::run(temporary, state, arguments, &[])
    }

    /// A daemon of another user, with an empty state directory, below `place`. Needs root, as do its clients.
    pub fn start_as(user: u32, place: &Path) -> Self {
        let temporary =
            tempfile::Builder::new().prefix("nexus-user-").tempdir_in(place).expect("a temporary directory");
        let root = temporary.path().to_path_buf();
        // A place where that user can run it.
        fs::copy(program("nexusd"), root.join("nexusd")).expect("a copy of nexusd");
        std::os::unix::fs::chown(&root, Some(user), Some(user)).expect("root gives directories away");
        let state = root.join("state");
        let settings = BTreeMap::new();
        let process = spawn_as(Some(user), &root, &state, &[], &settings);
        let arguments = vec![];
        let mut daemon =
            Self { process, root, state, arguments, settings, host: Host::Own, _temporary: Some(temporary) };
        daemon.wait_until_served();
        daemon
    }

    fn run(temporary: TempDir, state: PathBuf, arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let root = temporary.path().to_path_buf();
        let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
        let settings: BTreeMap<_, _> =
            settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let process = spawn(&root, &state, &arguments, &settings);
        let mut daemon =
            Self { process, root, state, arguments, settings, host: Host::Own, _temporary: Some(temporary) };
        daemon.wait_until_served();
        daemon
    }

    /// A directory for the test's own files; removed with the daemon.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The environment variables with which its clients find it.
    pub fn environment(&self) -> [(&'static str, PathBuf); 2] {
        [("NEXUS_STATE_DIR", self.state.clone()), ("NEXUS_RUNTIME_DIR", self.root.join("run"))]
    }

    /// The address of its HTTP endpoint, if it was started with `--http`, and the token.
    pub fn http(&self) -> (String, String) {
        let log = self.log();
        let url = log.split("url=").nth(1).and_then(|rest| rest.split_whitespace().next());
        let url = url.unwrap_or_else(|| panic!("nexusd serves no HTTP\n{log}")).to_owned();
        let token = fs::read_to_string(self.state.join("http-token"))
            .expect("the token of a daemon that serves HTTP");
        (url, token.trim().to_owned())
    }

    /// The process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A connection to it.
    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap_or_else(|e| panic!("connect to nexusd: {e}\n{}", self.log()))
    }

    /// Kills the daemon with SIGKILL. Its VMs keep running.
    pub fn kill(&mut self) {
        self.process.kill().expect("a child can be killed");
        self.process.wait().expect("a child can be waited for");
    }

    /// Starts it again, after [`Daemon::kill`] or [`Daemon::stop`].
    pub fn restart(&mut self) {
        let command = self.host.command(&self.root, &self.arguments);
        self.process = start(command, &self.root, &self.state, &self.settings);
        self.wait_until_served();
    }

    /// The same for a daemon that ends by itself before it serves anybody.
    pub fn restart_until_ended(&mut self) {
        let command = self.host.command(&self.root, &self.arguments);
        self.process = start(command, &self.root, &self.state, &self.settings);
        self.wait_until_ended();
    }

    /// Has it end at a failpoint, which `work` with a client of it reaches, and starts it again; returns a client of the next one.
    #[track_caller]
    pub fn kill_at(&mut self, point: &str, work: impl FnOnce(&mut Client)) -> Client {
        self.stop();
        self.set("NEXUS_FAILPOINT", Some(point));
        self.restart();
        work(&mut self.client());
        self.wait_until_ended();
        let reached = format!("ending at a failpoint point=\"{point}\"");
        assert!(self.log().contains(&reached), "{point} was not reached\n{}", self.log());
        self.set("NEXUS_FAILPOINT", None);
        self.restart();
        self.client()
    }

    /// Has the next start be in a network namespace, given by a path. Needs root.
    pub fn move_to(&mut self, namespace: &Path) {
        self.host = Host::Namespace(namespace.to_owned());
    }

    /// Changes a setting for the next start; `None` removes it.
    pub fn set(&mut self, key: &str, value: Option<&str>) {
        match value {
            Some(value) => self.settings.insert(key.to_owned(), value.to_owned()),
            None => self.settings.remove(key),
        };
    }

    /// Waits until the daemon has ended by itself.
    pub fn wait_until_ended(&mut self) {
        let gone = until(END, || self.process.try_wait().ok().flatten());
        assert!(gone.is_some(), "nexusd is still there\n{}", self.log());
    }

    /// Stops the daemon in order. Its VMs keep running.
    pub fn stop(&mut self) {
        signal(self.pid(), rustix::process::Signal::TERM);
        let gone = until(END, || self.process.try_wait().ok().flatten());
        assert!(gone.is_some(), "nexusd did not end on SIGTERM\n{}", self.log());
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.root.join("nexusd.log")).unwrap_or_default()
    }

    /// The processes of this daemon's VMs: those working in its state directory, and their children, which may be in jails.
    pub fn processes(&self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let state = fs::canonicalize(&self.state).unwrap_or_else(|_| self.state.clone());
        let works_here =
            |pid: u32| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&state));
        let parent = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != self.pid())
            .filter(|pid| {
                works_here(*pid)
                    || parent(*pid).is_some_and(|parent| parent != self.pid() && works_here(parent))
            })
            .collect()
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.root.join("run/nexus.sock")
    }

    fn wait_until_served(&mut self) {
        let deadline = Instant::now() + START;
        let served = until(START, || {
            if let Ok(Some(status)) = self.process.try_wait() {
                panic!("nexusd ended with {status}\n{}", self.log());
            }
            Client::connect(&self.socket()).ok()
        });
        assert!(served.is_some() && Instant::now() < deadline, "nexusd does not serve\n{}", self.log());
    }

    fn kill_everything(&mut self) {
        for pid in self.processes() {
            signal(pid, rustix::process::Signal::KILL);
        }
        let _gone = self.process.kill().and_then(|()| self.process.wait());
    }

    fn end_everything(&mut self) {
        let Ok(None) = self.process.try_wait() else { return };
        let Ok(mut client) = Client::connect_at(&self.socket(), "/mcp?tools=all") else { return };
        // Drives made by the test are deleted first, so that a drive that a VM leaves behind is noticed.
        let free = client.call("drive_list", json!({ "attached": false, "limit": 500 })).unwrap_or_default();
        for drive in free["drives"].as_array().into_iter().flatten() {
            let deleted = client.call_confirmed("drive_delete", json!({ "drive": drive["id"] }));
            assert!(deleted.is_ok(), "{drive} is not deleted: {deleted:?}\n{}", self.log());
        }
        let mut vms = Vec::new();
        let mut cursor = Value::Null;
        while let Ok(page) = client.call("vm_list", json!({ "limit": 500, "cursor": cursor })) {
            vms.extend(page["vms"].as_array().into_iter().flatten().cloned());
            cursor = page["next_cursor"].clone();
            if cursor.is_null() {
                break;
            }
        }
        for vm in &vms {
            let unprotected =
                client.call_confirmed("vm_update", json!({ "vm": vm["id"], "protected": false }));
            let deleted = client.call_confirmed("vm_delete", json!({ "vm": vm["id"], "force": true }));
            assert!(
                unprotected.is_ok() && deleted.is_ok(),
                "{vm} is not deleted: {deleted:?}\n{}",
                self.log()
            );
        }
        drop(client);
        self.stop();
        let left = until(END, || self.processes().is_empty().then_some(()));
        assert!(left.is_some(), "processes are left behind: {:?}\n{}", self.processes(), self.log());
        for directory in ["vms", "drives", "scratch"] {
            let left: Vec<_> =
                fs::read_dir(self.state.join(directory)).into_iter().flatten().flatten().collect();
            assert!(left.is_empty(), "left behind in {directory}: {left:?}\n{}", self.log());
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The test has already failed.
            eprintln!("nexusd said:\n{}", self.log());
            return self.kill_everything();
        }
        if let Err(failure) = catch_unwind(AssertUnwindSafe(|| self.end_everything())) {
            self.kill_everything();
            resume_unwind(failure);
        }
    }
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    // It may have already ended.
    let _sent = rustix::process::kill_process(pid, signal);
}

/// Kills a process with SIGKILL.
pub fn kill_process(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// A program of Nexus, from the build directory of this test.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a process knows its program");
    let built = own.ancestors().find(|directory| directory.join(name).is_file());
    match built {
        Some(directory) => directory.join(name),
        None => panic!("{name} is not built: cargo build -p nexus-host --bins (or `make test`, which does)"),
    }
}

fn spawn(root: &Path, state: &Path, arguments: &[String], settings: &BTreeMap<String, String>) -> Child {
    spawn_as(None, root, state, arguments, settings)
}

impl Host {
    /// The command that starts a daemon there; it executes nexusd.
    fn command(&self, root: &Path, arguments: &[String]) -> Command {
        match self {
            Self::Own => {
                let mut command = Command::new(program("nexusd"));
                command.args(arguments);
                command
            }
            Self::Namespace(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", namespace.display())).arg(program("nexusd")).args(arguments);
                command
            }
            Self::User(place) => place.command(root, arguments),
        }
    }
}

fn spawn_as(
    user: Option<u32>,
    root: &Path,
    state: &Path,
    arguments: &[String],
    settings: &BTreeMap<String, String>,
) -> Child {
    let mut command = match user {
        None => Command::new(program("nexusd")),
        Some(user) => {
            let mut command = Command::new(root.join("nexusd"));
            command.uid(user).gid(user).env("HOME", root);
            command
        }
    };
    command.args(arguments);
    start(command, root, state, settings)
}

fn start(mut command: Command, root: &Path, state: &Path, settings: &BTreeMap<String, String>) -> Child {
    let log = File::options().create(true).append(true).open(root.join("nexusd.log")).expect("a log file");
    command
        .env_remove("NEXUS_SOCKET")
        .env("NEXUS_STATE_DIR", state)
        .env("NEXUS_TOOLS", "all")
        .env("NEXUS_RUNTIME_DIR", root.join("run"))
        .envs(settings)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("nexusd starts")
}

/// A state directory with a kernel and the `busybox` image, made once for each build of nexusd.
fn seed() -> PathBuf {
    let nexusd = program("nexusd");
    let target = nexusd.parent().expect("a program is in a directory");
    let built = fs::metadata(&nexusd).and_then(|file| file.modified()).expect("nexusd was found just now");
    let built = built.duration_since(std::time::UNIX_EPOCH).expect("a time after 1970").as_nanos();
    let seeds = target.join("nexus-seed");
    fs::create_dir_all(&seeds).expect("a directory for seeds");
    let lock = File::create(seeds.join("lock")).expect("a lock file");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("the lock of the seeds");
    let seed = seeds.join(built.to_string());
    if seed.join("state/nexus.db").is_file() {
        return seed.join("state");
    }
    for old in fs::read_dir(&seeds).expect("the seeds").flatten().filter(|entry| entry.path().is_dir()) {
        fs::remove_dir_all(old.path()).expect("an old seed can go");
    }
    // Made in another place and renamed when complete.
    let half = seeds.join("half");
    fs::create_dir_all(&half).expect("a directory for the seed");
    let state = half.join("state");
    let settings = BTreeMap::new();
    let process = spawn(&half, &state, &[], &settings);
    let mut daemon = Daemon {
        process,
        root: half.clone(),
        state,
        arguments: vec![],
        settings,
        host: Host::Own,
        _temporary: None,
    };
    daemon.wait_until_served();
    let mut client = daemon.client();
    client.to_the_end("vm_create", json!({ "from": "busybox", "start": false, "wait_s": 0 }), SEED);
    drop(client);
    drop(daemon); // deletes the VM; kernel and image stay
    fs::rename(&half, &seed).expect("the seed is moved to its place");
    seed.join("state")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().expect("a state directory is in a directory")).expect("its parents");
    let status =
        Command::new("cp").args(["-a", "--sparse=always", "--reflink=auto"]).arg(from).arg(to).status();
    assert!(status.expect("cp runs").success(), "copy {} to {}", from.display(), to.display());
}
