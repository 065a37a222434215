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
    for client in ["claude-code", "claude-desktop", "vscode", "cursor"] {
        let mut command = Command::new(program("nexusctl"));
        command.env_remove("NEXUS_SOCKET").envs(daemon.environment());
        let output = command.args(["mcp", "config", client]).output().expect("nexusctl runs");
        assert!(output.status.success(), "{client}: {}", String::from_utf8_lossy(&output.stderr));
        let document: Value =
            serde_json::from_slice(&output.stdout).expect("stdout is the configuration alone");
        let servers = if client == "vscode" { &document["servers"] } else { &document["mcpServers"] };
        leads_to(&kit, &daemon, "nexus", &servers["nexus"]);
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
