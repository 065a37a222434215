//! Configurations of desktop clients, those in the examples and those that `nexusctl mcp config` prints: each is given to a
//! client, which starts the command that it names and finds the daemon behind it.

use std::fs;
use std::process::Command;

use nexus_tests::daemon::{Daemon, program};
use serde_json::{Value, json};

use crate::kit::{Era, Kit, environment, example};

/// The Inspector starts the server of a configuration and asks which daemon it is.
#[track_caller]
fn leads_to(kit: &Kit, daemon: &Daemon, name: &str, entry: &Value) {
    let file = kit.server_file(name, entry);
    let target = ["--config", file.to_str().expect("a path of text"), "--server", name];
    let request = ["--method", "tools/call", "--tool-name", "system_info"];
    let info = kit.inspect(&target, Era::Modern, &request);
    assert_eq!(info["structuredContent"]["pid"], daemon.pid(), "{entry}");
}

#[test]
fn printed_configurations_work_as_they_are() {
    let kit = Kit::find();
    let daemon = Daemon::start_with_processes(&[]);
    let home = tempfile::tempdir().expect("a home");
    for (client, key, file) in [
        ("claude-code", "mcpServers", ".claude.json"),
        ("claude-desktop", "mcpServers", ".config/Claude/claude_desktop_config.json"),
        ("vscode", "servers", ".config/Code/User/mcp.json"),
        ("cursor", "mcpServers", ".cursor/mcp.json"),
        ("windsurf", "mcpServers", ".codeium/windsurf/mcp_config.json"),
        ("zed", "context_servers", ".config/zed/settings.json"),
        ("gemini-cli", "mcpServers", ".gemini/settings.json"),
    ] {
        let nexusctl = |verb: &str| {
            let mut command = Command::new(program("nexusctl"));
            command.env_remove("NEXUS_SOCKET").env_remove("XDG_CONFIG_HOME").envs(daemon.environment());
            let output =
                command.env("HOME", home.path()).args(["mcp", verb, client]).output().expect("nexusctl runs");
            assert!(output.status.success(), "{client}: {}", String::from_utf8_lossy(&output.stderr));
            output.stdout
        };
        let document: Value =
            serde_json::from_slice(&nexusctl("config")).expect("stdout is the configuration alone");
        // What is written into the client's own file is the same.
        nexusctl("install");
        let text = fs::read(home.path().join(file)).expect("the client's file is there");
        assert_eq!(serde_json::from_slice::<Value>(&text).expect("JSON"), document, "{client}");
        // The forms differ only in the key and in a type, so two are enough for the real client.
        if matches!(client, "claude-code" | "zed") {
            leads_to(&kit, &daemon, "nexus", &document[key]["nexus"]);
        }
        assert!(document[key]["nexus"]["command"].is_string(), "{document}");
    }
}

#[test]
fn example_configurations_work() {
    let kit = Kit::find();
    let daemon = Daemon::start_with_processes(&[]);
    for file in ["claude/.mcp.json", "claude/claude_desktop_config.json"] {
        let text = fs::read_to_string(example(file)).expect("the example is there");
        let document: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{file}: {e}"));
        let mut entry = document["mcpServers"]["nexus"].clone();
        // As if Nexus were installed, and its daemon where a daemon usually is.
        let command =
            entry["command"].as_str().unwrap_or_else(|| panic!("{file} names no command")).to_owned();
        if let Some(installed) = command.strip_prefix("/usr/local/bin/") {
            entry["command"] = json!(program(installed));
        }
        entry["env"] = environment(&daemon);
        leads_to(&kit, &daemon, "nexus", &entry);
    }
}

/// The line that is printed for Claude Code's command is a shell's, quotes and all.
#[test]
fn the_printed_line_is_what_a_shell_reads() {
    let daemon = Daemon::start_with_processes(&[]);
    let mut command = Command::new(program("nexusctl"));
    command.env_remove("NEXUS_SOCKET").envs(daemon.environment());
    let output = command.args(["mcp", "config", "claude-code"]).output().expect("nexusctl runs");
    let said = String::from_utf8(output.stderr).expect("text");
    let line =
        said.lines().find_map(|line| line.split_once("claude mcp add ")).expect("a line for the shell").1;
    // Instead of `claude` a function that shows its arguments.
    let script = format!("show() {{ for word; do echo \"$word\"; done; }}\nshow {line}");
    let shown = Command::new("sh").args(["-c", &script]).output().expect("a shell");
    let shown = String::from_utf8(shown.stdout).expect("text");
    let words: Vec<&str> = shown.lines().collect();
    let after = words.iter().position(|word| *word == "--").expect("a command after --");
    let nexusctl = program("nexusctl").canonicalize().expect("it is there");
    assert_eq!(words[after + 1..], [nexusctl.to_str().expect("text"), "mcp"]);
    for (name, value) in daemon.environment() {
        assert!(words.contains(&format!("{name}={}", value.display()).as_str()), "{shown}");
    }
}

/// The bundle's manifest leads a client that unpacks it to the daemon.
#[test]
fn a_bundle_works_where_it_is_unpacked() {
    let kit = Kit::find();
    let daemon = Daemon::start_with_processes(&[]);
    let place = tempfile::tempdir().expect("a directory");
    // Small programs, since a debug build takes long to pack.
    let programs = place.path().join("programs");
    fs::create_dir(&programs).expect("a directory");
    let script = |name| format!("#!/bin/sh\nexec '{}' \"$@\"\n", program(name).display());
    for name in ["nexusctl", "nexusd"] {
        fs::write(programs.join(name), script(name)).expect("a program");
    }
    let pack = |into: &str| {
        let into = place.path().join(into);
        let packed = Command::new("python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../.ci/mcpb"))
            .args([&programs, &into])
            .arg("https://example.org/download")
            .status();
        assert!(packed.expect("python3 runs").success());
        into
    };
    let (first, second) = (pack("first"), pack("second"));
    let bundle = |folder: &std::path::Path| {
        let files = fs::read_dir(folder).expect("a folder").map(|file| file.expect("a file").path());
        files.into_iter().find(|file| file.extension().is_some_and(|end| end == "mcpb")).expect("a bundle")
    };
    assert!(fs::read(bundle(&first)).ok() == fs::read(bundle(&second)).ok(), "the same bytes twice");

    let unpacked = place.path().join("unpacked");
    let unpack = "import sys, zipfile, os\nfor info in zipfile.ZipFile(sys.argv[1]).infolist():\n    \
                  path = zipfile.ZipFile(sys.argv[1]).extract(info, sys.argv[2])\n    os.chmod(path, info.external_attr >> 16)";
    let done = Command::new("python3").args(["-c", unpack]).args([&bundle(&first), &unpacked]).status();
    assert!(done.expect("python3 runs").success());
    let read = |path: std::path::PathBuf| -> Value {
        serde_json::from_slice(&fs::read(path).expect("it is there")).expect("JSON")
    };
    let manifest = read(unpacked.join("manifest.json"));
    let start = manifest["server"]["mcp_config"]["command"].as_str().expect("a command");
    let command = start.replace("${__dirname}", unpacked.to_str().expect("text"));
    let entry = json!({ "command": command, "args": manifest["server"]["mcp_config"]["args"], "env": environment(&daemon) });
    leads_to(&kit, &daemon, "nexus", &entry);
    let listed = read(first.join("server.json"));
    assert_eq!(listed["packages"][0]["fileSha256"].as_str().map(str::len), Some(64), "{listed}");
    assert_eq!(listed["version"], manifest["version"]);
}
