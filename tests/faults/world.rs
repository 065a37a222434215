//! A daemon whose machines are processes of this host, and an image for them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_tests::client::{Client, Failure};
use nexus_tests::daemon::Daemon;
use nexus_tests::order::assert_in_order;
use nexus_tests::wait::until;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The timeout on a busy machine for everything that does not boot.
pub(crate) const SOON: Duration = Duration::from_mins(3);

/// One daemon, the program of its machines, and the source of their image.
pub(crate) struct World {
    pub(crate) daemon: Daemon,
    /// The `from` argument of `vm_create`.
    pub(crate) from: String,
    things: TempDir,
}

impl World {
    /// Machines run the real guest.
    pub(crate) fn new() -> Self {
        Self::with(&[])
    }

    /// The same with additional settings.
    pub(crate) fn with(settings: &[(&str, &str)]) -> Self {
        let things = things();
        let guest = things.path().join("nexus-guest");
        fs::write(&guest, nexus_host::daemon::AGENT).expect("the guest is written");
        make_executable(&guest);
        Self::of(things, &guest, None, settings)
    }

    /// Machines behave according to their names.
    pub(crate) fn hostile(settings: &[(&str, &str)]) -> Self {
        Self::of(things(), Path::new(env!("CARGO_BIN_EXE_hostile-guest")), None, settings)
    }

    /// Machines have an MCP server of their own.
    pub(crate) fn fixture() -> Self {
        Self::of(things(), Path::new(env!("CARGO_BIN_EXE_fixture-guest")), None, &[])
    }

    /// Machines run the given program.
    pub(crate) fn program(text: &str) -> Self {
        let things = things();
        let guest = things.path().join("program");
        fs::write(&guest, text).expect("the program is written");
        make_executable(&guest);
        Self::of(things, &guest, None, &[])
    }

    /// Machines behave according to their names; the state is in the caller's directory.
    pub(crate) fn hostile_at(state: &Path) -> Self {
        Self::of(things(), Path::new(env!("CARGO_BIN_EXE_hostile-guest")), Some(state), &[])
    }

    fn of(things: TempDir, guest: &Path, state: Option<&Path>, settings: &[(&str, &str)]) -> Self {
        let guest = guest.to_str().expect("a path of UTF-8");
        let mut all = vec![("NEXUS_DRIVER", "process"), ("NEXUS_GUEST", guest)];
        all.extend(settings);
        let image = things.path().join("image");
        fs::create_dir_all(image.join("etc")).expect("the image's source is made");
        fs::write(image.join("etc/os-release"), "PRETTY_NAME=Nothing\n").expect("a file is written");
        let daemon = match state {
            Some(state) => Daemon::start_bare_at(state, &all),
            None => Daemon::start_bare(&all),
        };
        Self { daemon, from: format!("file:{}", image.display()), things }
    }

    /// A path for the test's own files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.things.path().join(name)
    }

    pub(crate) fn client(&self) -> Client {
        self.daemon.client()
    }

    /// Asks for the stream of a ticket by the path in it, with more lines in the head of the request. Nothing of the response is read.
    pub(crate) fn upgrade(&self, path: &str, lines: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.daemon.socket()).expect("the socket");
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\n{lines}Connection: upgrade\r\nUpgrade: nexus-stream\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).expect("a request is sent");
        stream
    }

    /// The arguments of a valid `vm_create`.
    pub(crate) fn arguments(&self, name: &str) -> Value {
        json!({ "name": name, "from": self.from, "disk": "128MiB", "wait_s": 45 })
    }

    /// Creates a machine and waits until it is ready.
    #[track_caller]
    pub(crate) fn create(&self, client: &mut Client, name: &str) -> Value {
        client.create(self.arguments(name))
    }

    /// Creates a machine that must fail; returns the error.
    #[track_caller]
    pub(crate) fn create_in_vain(&self, client: &mut Client, name: &str) -> Failure {
        match client.call("vm_create", self.arguments(name)) {
            Ok(outcome) => panic!("{name} is created: {outcome}"),
            Err(failure) => failure,
        }
    }

    /// Checks that the daemon's state is consistent.
    #[track_caller]
    pub(crate) fn assert_in_order(&self) {
        assert_in_order(&self.daemon);
    }
}

/// Calls a tool that must fail; returns the code and the text.
#[track_caller]
pub(crate) fn refused(client: &mut Client, tool: &str, arguments: Value) -> Failure {
    match client.call(tool, arguments.clone()) {
        Ok(result) => panic!("{tool} {arguments} is not refused: {result}"),
        Err(failure) => failure,
    }
}

/// Waits for something that happens soon.
#[track_caller]
pub(crate) fn soon<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    until(SOON, ask).unwrap_or_else(|| panic!("waited in vain: {what}"))
}

/// Whether a process is running; a zombie has ended.
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// A process of a machine: `pid` or `shim_pid`.
#[track_caller]
pub(crate) fn process(vm: &Value, which: &str) -> u32 {
    let pid = vm["process"][which].as_u64().and_then(|pid| u32::try_from(pid).ok());
    pid.unwrap_or_else(|| panic!("no {which} in {vm}"))
}

fn things() -> TempDir {
    tempfile::Builder::new().prefix("nexus-faults-").tempdir().expect("a temporary directory")
}

fn make_executable(file: &Path) {
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).expect("a file is made executable");
}
