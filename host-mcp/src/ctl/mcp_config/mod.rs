//! `nexusctl mcp config` and `mcp install`: the configuration with which an MCP client finds Nexus, printed or written into its file.

mod client;
mod install;
mod merge;

use std::path::{Path, PathBuf};

use nexus_schema::id::VmKind;
use nexus_schema::tools::vm::{VmInspect, VmInspectParams};
use nexus_schema::toolset::Toolset;
use nexus_schema::{ErrorCode, Reference};
use serde_json::{Map, Value};

use self::client::Client;
use super::App;
use super::error::Error;
use crate::dirs::{self, Env};

/// Variable of a client's environment from which it takes the token, where `--token` is not given.
const TOKEN_VARIABLE: &str = "NEXUS_TOKEN";

/// Which client, and how it reaches the daemon.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The client
    #[arg(value_enum)]
    client: Client,
    /// One VM only
    #[arg(long, value_name = "VM")]
    vm: Option<Reference<VmKind>>,
    /// The tools to offer, as for `nexusctl mcp`
    #[arg(long, value_name = "SET", conflicts_with = "vm")]
    tools: Option<Toolset>,
    /// The server's name in the client [default: nexus, or nexus- and the VM's name]
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// By streamable HTTP instead of the stdio bridge; the daemon must listen there (nexusd --http)
    #[arg(long, value_name = "URL", num_args = 0..=1, require_equals = true, default_missing_value = "http://127.0.0.1:9600/mcp")]
    http: Option<String>,
    /// The token for --http, as plain text [default: the client reads it from $NEXUS_TOKEN]
    #[arg(long, value_name = "TOKEN", requires = "http")]
    token: Option<String>,
}

/// Where `install` writes.
#[derive(Debug, clap::Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    config: Args,
    /// For the project in the current directory, instead of for you
    #[arg(long)]
    project: bool,
    /// Remove the server from the client's file instead
    #[arg(long)]
    remove: bool,
}

/// Prints the configuration on stdout, and how to apply it on stderr.
pub(crate) async fn run(app: &App, args: Args) -> Result<u8, Error> {
    check_vm(app, &args).await?;
    let server = server_of(app, &args)?;
    app.ui.line(args.client.document(&server)?.trim_end())?;
    app.ui.say(&args.client.how_to(&server));
    Ok(0)
}

/// Adds the server to the client's own file, or removes it.
pub(crate) async fn install(app: &App, args: InstallArgs) -> Result<u8, Error> {
    // What is removed may name a VM that is gone.
    if !args.remove {
        check_vm(app, &args.config).await?;
    }
    let server = server_of(app, &args.config)?;
    let client = args.config.client;
    let file = client.file(&app.env, args.project)?;
    let done = if args.remove {
        install::remove(client, &server, &file)
    } else {
        install::add(client, &server, &file)
    };
    let done = done?;
    app.ui.say(&done.told(&server.name, &file, client));
    Ok(0)
}

/// Refuses a VM that does not exist. Without a daemon to ask, and for one at another address, it only warns.
async fn check_vm(app: &App, args: &Args) -> Result<(), Error> {
    let Some(vm) = &args.vm else { return Ok(()) };
    let found = async {
        let params = VmInspectParams { vm: vm.clone(), verbose: None };
        app.connect_if_up().await?.call::<VmInspect>(&params).await
    };
    match found.await {
        Ok(_) => Ok(()),
        Err(Error::Tool(refusal)) if refusal.error.code == ErrorCode::VmNotFound && args.http.is_none() => {
            Err(Error::Tool(refusal))
        }
        Err(error) => {
            app.ui.warn(&format!("cannot check whether VM {vm} exists: {}", error.message()));
            Ok(())
        }
    }
}

fn server_of(app: &App, args: &Args) -> Result<Server, Error> {
    let name = args.server_name.clone().unwrap_or_else(|| match &args.vm {
        Some(vm) => format!("nexus-{vm}"),
        None => "nexus".into(),
    });
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
        return Err(Error::usage(format!("{name:?} is no name for a server: use letters, digits, - and _")));
    }
    let tools = args.tools.map(|set| set.to_string());
    let way = match &args.http {
        Some(url) => {
            Way::Http { url: address(url, args.vm.as_ref(), tools.as_deref()), token: args.token.clone() }
        }
        None => Way::Stdio {
            command: own_path()?,
            args: arguments(app.socket.as_deref(), args.vm.as_ref(), tools.as_deref()),
            env: environment(&app.env),
        },
    };
    Ok(Server { name, way })
}

/// A server in a client's configuration.
struct Server {
    name: String,
    way: Way,
}

/// How a client reaches the daemon.
enum Way {
    /// It starts the bridge.
    Stdio { command: String, args: Vec<String>, env: Map<String, Value> },
    /// It connects to the daemon; without a token it reads [`TOKEN_VARIABLE`].
    Http { url: String, token: Option<String> },
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

/// The endpoint's address for one VM or a set of tools.
fn address(url: &str, vm: Option<&Reference<VmKind>>, tools: Option<&str>) -> String {
    match (vm, tools) {
        (Some(vm), _) => format!("{}/vm/{vm}", url.trim_end_matches('/')),
        (None, Some(tools)) => format!("{url}?tools={tools}"),
        (None, None) => url.to_owned(),
    }
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

    #[test]
    fn the_bridge_and_the_endpoint_get_the_vm_or_the_tools() {
        let vm = "web-1".parse().unwrap();
        assert_eq!(
            arguments(Some(Path::new("/s")), Some(&vm), None),
            ["--socket", "/s", "mcp", "--vm", "web-1"]
        );
        assert_eq!(arguments(None, None, Some("work,drives")), ["mcp", "--tools", "work,drives"]);
        assert_eq!(address("http://h:1/mcp/", Some(&vm), None), "http://h:1/mcp/vm/web-1");
        assert_eq!(address("http://h:1/mcp", None, Some("work,drives")), "http://h:1/mcp?tools=work,drives");
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("/usr/bin/nexusctl"), "/usr/bin/nexusctl");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
