//! The clients as programs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nexus_tests::daemon::{Daemon, program};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What `.ci/setup test` put into the target directory, and a home for what the clients want to remember.
pub(crate) struct Kit {
    place: PathBuf,
    home: TempDir,
}

/// A generation of the protocol, as the Inspector calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    /// Sessions, up to 2025-11-25.
    Legacy,
    /// Stateless, from 2026-07-28 on.
    Modern,
}

impl Era {
    pub(crate) const BOTH: [Self; 2] = [Self::Legacy, Self::Modern];
}

impl Kit {
    pub(crate) fn find() -> Self {
        let own = std::env::current_exe().expect("a process knows its program");
        let place =
            own.ancestors().map(|directory| directory.join("clients")).find(|d| d.join("stamp").is_file());
        let place =
            place.expect("the MCP clients are not installed: .ci/setup test (or `make test`, which runs it)");
        Self { place, home: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A directory that goes with the test.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// A Python program.
    pub(crate) fn python(&self, script: &Path) -> Command {
        let mut command = self.command(&self.place.join("venv/bin/python"));
        command.arg(script);
        command
    }

    /// A TypeScript program of the examples, beside its packages.
    pub(crate) fn typescript(&self, script: &Path) -> Command {
        let beside = self.home().join("typescript");
        fs::create_dir_all(&beside).expect("a directory");
        let copy = beside.join(script.file_name().expect("a script has a name"));
        fs::copy(script, &copy).expect("the example is there");
        let package = script.with_file_name("package.json");
        fs::copy(package, beside.join("package.json")).expect("the example has a package.json");
        let packages = beside.join("node_modules");
        if !packages.exists() {
            std::os::unix::fs::symlink(self.place.join("typescript/node_modules"), packages)
                .expect("its packages");
        }
        let mut command = self.command(&self.place.join("bin/node"));
        command.arg(copy);
        command
    }

    /// One request by the Inspector to a server that `target` names, and all that it says: nothing but the result, or it
    /// is a complaint.
    #[track_caller]
    pub(crate) fn inspect(&self, target: &[&str], era: Era, request: &[&str]) -> Value {
        let output = self.inspector(target, era, request);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.is_empty(),
            "{target:?} {era:?} {request:?}: {}\n{said}",
            output.status
        );
        let mut answer: Value = serde_json::from_slice(&output.stdout).expect("the Inspector prints JSON");
        answer["result"].take()
    }

    /// The same without an opinion on what comes.
    pub(crate) fn inspector(&self, target: &[&str], era: Era, request: &[&str]) -> Output {
        let inspector = self.place.join("clients/node_modules/@modelcontextprotocol/inspector");
        let mut command = self.command(&self.place.join("bin/node"));
        command.arg(inspector.join("clients/launcher/build/index.js")).arg("--cli").args(target);
        // There is no desktop to keep secrets in, and none to keep: else it would speak of that.
        command.envs([("MCP_INSPECTOR_SECRET_STORE", "file"), ("MCP_INSPECTOR_SECRET_KEY", "none")]);
        command.args(["--protocol-era", if era == Era::Legacy { "legacy" } else { "modern" }]);
        command.args(["--format", "json"]).args(request);
        command.output().expect("the Inspector runs")
    }

    /// A file with one server for the Inspector, started as a process; `entry` is as in a client's own configuration.
    pub(crate) fn server_file(&self, name: &str, entry: &Value) -> PathBuf {
        let file = self.home().join(format!("{name}.json"));
        let document = json!({ "mcpServers": { name: entry } });
        fs::write(&file, document.to_string()).expect("write a configuration");
        file
    }

    /// A program for Node.
    pub(crate) fn node(&self, script: &Path) -> Command {
        let mut command = self.command(&self.place.join("bin/node"));
        command.arg(script);
        command
    }

    /// A file of an installed package.
    pub(crate) fn package(&self, path: &str) -> PathBuf {
        self.place.join("clients/node_modules").join(path)
    }

    fn command(&self, path: &Path) -> Command {
        let own = program("nexusctl");
        let mut search = OsString::from(own.parent().expect("a program is in a directory"));
        for more in [self.place.join("bin").into_os_string(), std::env::var_os("PATH").unwrap_or_default()] {
            search.push(":");
            search.push(more);
        }
        let mut command = Command::new(path);
        command.env_remove("NEXUS_SOCKET").env("PATH", search).env("HOME", self.home()).stdin(Stdio::null());
        command
    }
}

/// The same environment as JSON, for configurations.
pub(crate) fn environment(daemon: &Daemon) -> Value {
    let pairs = daemon.environment();
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// A file of the examples.
pub(crate) fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(path)
}
