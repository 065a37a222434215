//! `nexusctl mcp config`: prints the configuration with which a client finds the bridge.

use std::path::{Path, PathBuf};

use clap::builder::PossibleValuesParser;
use nexus_schema::Reference;
use nexus_schema::id::VmKind;
use serde_json::{Map, Value, json};

use super::App;
use super::error::Error;
use crate::dirs::{self, Env};

/// Which client, and how it reaches the daemon.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The client
    #[arg(value_parser = PossibleValuesParser::new(["claude-code", "claude-desktop", "vscode", "cursor"]))]
    client: String,
    /// One VM only
    #[arg(long, value_name = "VM")]
    vm: Option<Reference<VmKind>>,
    /// The tools to offer, as for `nexusctl mcp`
    #[arg(long, value_name = "SET", conflicts_with = "vm")]
    tools: Option<String>,
    /// The server's name in the client [default: nexus, or nexus- and the VM's name]
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
}

/// Prints the configuration on stdout, and how to apply it on stderr.
pub(crate) fn run(app: &App, args: Args) -> Result<u8, Error> {
    let server = Server {
        name: args.server_name.unwrap_or_else(|| match &args.vm {
            Some(vm) => format!("nexus-{vm}"),
            None => "nexus".into(),
        }),
        command: own_path()?,
        args: arguments(app.socket.as_deref(), args.vm.as_ref(), args.tools.as_deref()),
        env: environment(&app.env),
    };
    let (document, how_to) = describe(&args.client, &server)?;
    app.ui.line(&format!("{document:#}"))?;
    app.ui.say(&how_to);
    Ok(0)
}

/// How a client starts the bridge.
struct Server {
    name: String,
    command: String,
    args: Vec<String>,
    env: Map<String, Value>,
}

impl Server {
    fn entry(&self) -> Map<String, Value> {
        let mut entry = Map::new();
        entry.insert("command".into(), self.command.clone().into());
        entry.insert("args".into(), self.args.clone().into());
        if !self.env.is_empty() {
            entry.insert("env".into(), self.env.clone().into());
        }
        entry
    }

    fn typed_entry(&self) -> Map<String, Value> {
        let mut entry = self.entry();
        entry.insert("type".into(), "stdio".into());
        entry
    }

    /// The shell command that starts the bridge.
    fn line(&self) -> String {
        let words = std::iter::once(&self.command).chain(&self.args);
        words.map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

fn describe(client: &str, server: &Server) -> Result<(Value, String), Error> {
    let name = &server.name;
    match client {
        "claude-code" => {
            let env: String = server
                .env
                .iter()
                .map(|(key, value)| {
                    format!(" --env {}", quoted(&format!("{key}={}", value.as_str().unwrap_or_default())))
                })
                .collect();
            let how_to = format!(
                "run:   claude mcp add --scope user {name}{env} -- {}\n\
                 or save the above as .mcp.json in a project, to share it with all who work there",
                server.line()
            );
            Ok((json!({ "mcpServers": { name: server.typed_entry() } }), how_to))
        }
        "claude-desktop" => {
            let how_to = "merge the above into claude_desktop_config.json (Settings > Developer > Edit Config) and restart\n\
                 Claude Desktop; the file is in ~/.config/Claude on Linux, in ~/Library/Application Support/Claude on macOS";
            Ok((json!({ "mcpServers": { name: server.entry() } }), how_to.into()))
        }
        "vscode" => {
            let mut one = server.typed_entry();
            one.insert("name".into(), name.clone().into());
            let how_to = format!(
                "run:   code --add-mcp {}\nor save the above as .vscode/mcp.json in a workspace",
                quoted(&Value::from(one).to_string())
            );
            Ok((json!({ "servers": { name: server.typed_entry() } }), how_to))
        }
        "cursor" => {
            let how_to = "save the above as .cursor/mcp.json in a project, or merge it into ~/.cursor/mcp.json for all of them";
            Ok((json!({ "mcpServers": { name: server.typed_entry() } }), how_to.into()))
        }
        other => Err(Error::usage(format!("no configuration for {other}"))),
    }
}

/// The bridge's arguments.
fn arguments(socket: Option<&Path>, vm: Option<&Reference<VmKind>>, tools: Option<&str>) -> Vec<String> {
    let mut args = Vec::new();
    if let Some(socket) = socket {
        let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
        args.extend(["--socket".to_owned(), socket.to_string_lossy().into_owned()]);
    }
    args.push("mcp".into());
    if let Some(vm) = vm {
        args.extend(["--vm".to_owned(), vm.to_string()]);
    }
    if let Some(tools) = tools {
        args.extend(["--tools".to_owned(), tools.to_owned()]);
    }
    args
}

/// The variables that locate the daemon, because a client starts the bridge with a different environment.
fn environment(env: &Env) -> Map<String, Value> {
    let told = [dirs::SOCKET, dirs::RUNTIME_DIR, dirs::STATE_DIR].into_iter().filter_map(|name| {
        let value = env.get(std::ffi::OsStr::new(name)).filter(|value| !value.is_empty())?;
        Some((name.to_owned(), value.to_string_lossy().into_owned().into()))
    });
    told.collect()
}

fn own_path() -> Result<String, Error> {
    let missing = |source| Error::File { what: "find", path: PathBuf::from("/proc/self/exe"), source };
    Ok(std::env::current_exe().map_err(missing)?.to_string_lossy().into_owned())
}

/// Quotes a word for a POSIX shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(env: &[(&str, &str)]) -> Server {
        Server {
            name: "nexus".into(),
            command: "/opt/my tools/nexusctl".into(),
            args: arguments(None, None, None),
            env: env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        }
    }

    #[test]
    fn every_client_is_described() {
        for client in ["claude-code", "claude-desktop", "vscode", "cursor"] {
            let (document, how_to) = describe(client, &server(&[])).unwrap();
            insta::assert_snapshot!(format!("config-{client}"), format!("{document:#}\n\n{how_to}"));
        }
    }

    #[test]
    fn what_says_where_the_daemon_is_goes_along() {
        let (document, how_to) = describe("claude-code", &server(&[("NEXUS_RUNTIME_DIR", "/r")])).unwrap();
        assert_eq!(document["mcpServers"]["nexus"]["env"]["NEXUS_RUNTIME_DIR"], "/r");
        assert!(how_to.contains("--env NEXUS_RUNTIME_DIR=/r -- '/opt/my tools/nexusctl' mcp"), "{how_to}");
        let vm = "web-1".parse().unwrap();
        assert_eq!(
            arguments(Some(Path::new("/s")), Some(&vm), None),
            ["--socket", "/s", "mcp", "--vm", "web-1"]
        );
        assert_eq!(arguments(None, None, Some("work,drives")), ["mcp", "--tools", "work,drives"]);
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("/usr/bin/nexusctl"), "/usr/bin/nexusctl");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
