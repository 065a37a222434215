//! The image's MCP servers: started on first use, and stopped when idle. Their messages are treated as data: cut to size, and never offered as tools
//! of the guest itself.

mod session;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nexus_schema::error::ErrorCode;
use nexus_schema::limits::{OUTPUT_MAX, WAIT_DEFAULT, WAIT_MAX};
use nexus_schema::tools::mcp::{
    McpCallOutput, McpCallParams, McpListOutput, McpListParams, McpServer, McpServerConfig, McpServerTool,
};
use nexus_schema::{Name, ToolError};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

use self::session::Session;
use super::Caller;
use super::calls::plain;
use super::launch::{self, Order};
use super::table::Table;
use crate::holder::wire::{Answer, Settings};
use crate::os::{read_small, reason};

/// The directory of an image with one file per server.
pub(super) const MCP_DIRECTORY: &str = "/etc/nexus/mcp.d";
/// The maximum number of servers.
const SERVERS_MAX: usize = 64;
/// The maximum size of a server's file, in bytes.
const FILE_MAX: u64 = 64 << 10;
/// The maximum number of a server's tools that are listed, and of pages that are requested.
const TOOLS_MAX: usize = 200;
const PAGES_MAX: usize = 20;
/// The maximum number of blocks other than text that are named.
const OMITTED_MAX: usize = 200;
/// The maximum length of a tool's name, in characters.
const NAME_MAX: usize = 200;
/// The maximum length of a shown description, in characters, and of the schema of a tool's arguments, in bytes.
const DESCRIPTION_MAX: usize = 1000;
const SCHEMA_MAX: usize = 8 << 10;
/// The maximum total size of all schemas, and of a structured result, in bytes.
const SCHEMAS_MAX: usize = 256 << 10;
const STRUCTURED_MAX: usize = 256 << 10;
/// How long a server may be idle before it is stopped, and the interval of checks for that.
const IDLE: (Duration, Duration) = (Duration::from_secs(900), Duration::from_secs(60));

/// A server, running or not. Its calls run one after the other.
#[derive(Debug, Default)]
pub(super) struct Server(Mutex<Option<Session>>);

/// A page of a server's tools. The text of values is checked for its length before it is parsed, here and in results.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tools<'a> {
    #[serde(borrow, default)]
    tools: Vec<TheirTool<'a>>,
    #[serde(default)]
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TheirTool<'a> {
    name: String,
    #[serde(default)]
    description: Option<String>,
    #[serde(borrow, default)]
    input_schema: Option<&'a RawValue>,
}

impl TheirTool<'_> {
    /// Returns what is listed of it. `room` is how many bytes of schemas may still be listed.
    fn listed(self, room: &mut usize) -> McpServerTool {
        let length = self.input_schema.map_or(0, |schema| schema.get().len());
        let schema = self.input_schema.filter(|_| length <= SCHEMA_MAX.min(*room));
        let input_schema = schema.and_then(|schema| serde_json::from_str(schema.get()).ok());
        if input_schema.is_some() {
            *room -= length;
        }
        let description = cut(&self.description.unwrap_or_default(), DESCRIPTION_MAX);
        McpServerTool { name: cut(&self.name, NAME_MAX), description, input_schema }
    }
}

/// The result of a tool.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outcome<'a> {
    #[serde(borrow, default)]
    content: Vec<&'a RawValue>,
    #[serde(borrow, default)]
    structured_content: Option<&'a RawValue>,
    #[serde(default)]
    is_error: bool,
}

/// A block of a result.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TheirBlock<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    mime_type: Option<&'a RawValue>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

/// Returns a value that is text.
fn said(value: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(value?.get()).ok()
}

/// Parses a server's answer.
fn valid<'a, T: Deserialize<'a>>(name: &str, method: &str, answer: &'a RawValue) -> Result<T, ToolError> {
    serde_json::from_str(answer.get())
        .map_err(|error| gone(name, &format!("its answer to {method} is not valid MCP: {error}")))
}

impl Table {
    /// Runs `mcp_list`.
    pub(super) async fn mcp_list(
        self: &Arc<Self>,
        params: McpListParams,
        caller: &Caller,
    ) -> Result<Answer, ToolError> {
        let mut found = configured(&self.mcp_directory());
        let servers = match params.server {
            Some(name) => {
                let config = take(&mut found, &name)?;
                vec![self.describe(name, &config, caller).await?]
            }
            None => {
                let mut servers = Vec::new();
                for (name, config) in found {
                    let running = self.server(&name).0.try_lock().map_or(true, |session| session.is_some());
                    servers.push(match config {
                        Ok(config) => {
                            McpServer { command: line(&config), running, name, ..McpServer::default() }
                        }
                        Err(problem) => McpServer { problem: Some(problem), name, ..McpServer::default() },
                    });
                }
                servers
            }
        };
        let header = match servers.len() {
            0 => format!("no MCP servers: the image has no file in {}", self.mcp_directory().display()),
            1 => "1 MCP server".to_owned(),
            count => format!("{count} MCP servers"),
        };
        let text: String = servers.iter().map(shown).collect();
        let mut answer = plain(header, &McpListOutput { servers })?;
        if !text.is_empty() {
            answer.blocks.push((None, text));
        }
        Ok(answer)
    }

    /// Runs `mcp_call`.
    pub(super) async fn mcp_call(
        self: &Arc<Self>,
        params: McpCallParams,
        caller: &Caller,
    ) -> Result<Answer, ToolError> {
        let McpCallParams { server, tool, arguments, timeout_s } = params;
        let wait = timeout_s.map_or(WAIT_DEFAULT, |seconds| {
            Duration::try_from_secs_f64(seconds).unwrap_or(WAIT_MAX).min(WAIT_MAX)
        });
        let config = take(&mut configured(&self.mcp_directory()), &server)?;
        let asked = json!({ "name": tool, "arguments": arguments });
        let deadline = Instant::now() + wait;
        let answer = self.ask(&server, &config, caller, "tools/call", asked, deadline).await?;
        let outcome: Outcome<'_> = valid(&server, "tools/call", &answer)?;
        let (mut text, mut omitted, mut omitted_bytes) = (String::new(), Vec::new(), 0);
        for block in &outcome.content {
            let block: TheirBlock<'_> = serde_json::from_str(block.get()).unwrap_or_default();
            let kind = said(block.kind);
            let piece = said(block.text).filter(|_| kind.as_deref() == Some("text"));
            if let Some(piece) = piece {
                let room = (OUTPUT_MAX as usize).saturating_sub(text.len());
                let end = piece.floor_char_boundary(room.min(piece.len()));
                omitted_bytes += (piece.len() - end) as u64;
                text.push_str(&piece[..end]);
                if end > 0 && !piece.ends_with('\n') {
                    text.push('\n');
                }
            } else if omitted.len() < OMITTED_MAX {
                let kind = said(block.mime_type).or(kind).unwrap_or_else(|| "unknown".to_owned());
                let size = said(block.data).map_or(0, |data| data.len() / 4 * 3);
                omitted.push(format!("{} {size}", cut(&kind, 100)));
            }
        }
        let structured = outcome.structured_content.filter(|value| value.get().len() <= STRUCTURED_MAX);
        let structured: Option<Map<String, Value>> =
            structured.and_then(|value| serde_json::from_str(value.get()).ok());
        if text.is_empty()
            && let Some(value) = &structured
        {
            text = serde_json::to_string(value).unwrap_or_default();
        }
        let facts = McpCallOutput { is_error: outcome.is_error, structured, omitted, omitted_bytes };
        let verb = if facts.is_error { "failed" } else { "answered" };
        let mut header = format!("{server} {verb}");
        if !facts.omitted.is_empty() {
            header.push_str(&format!("; omitted: {}", facts.omitted.join(", ")));
        }
        if omitted_bytes > 0 {
            header.push_str(&format!("; {omitted_bytes} more bytes of text"));
        }
        let mut answer = plain(header, &facts)?;
        if !text.is_empty() {
            answer.blocks.push((None, text));
        }
        Ok(answer)
    }

    async fn describe(
        self: &Arc<Self>,
        name: String,
        config: &McpServerConfig,
        caller: &Caller,
    ) -> Result<McpServer, ToolError> {
        let deadline = Instant::now() + WAIT_MAX;
        let (mut tools, mut omitted_tools, mut cursor, mut room) = (Vec::new(), 0, None, SCHEMAS_MAX);
        for _ in 0..PAGES_MAX {
            let asked = cursor.map_or_else(|| json!({}), |cursor: String| json!({ "cursor": cursor }));
            let answer = self.ask(&name, config, caller, "tools/list", asked, deadline).await?;
            let page: Tools<'_> = valid(&name, "tools/list", &answer)?;
            for tool in page.tools {
                if tools.len() < TOOLS_MAX {
                    tools.push(tool.listed(&mut room));
                } else {
                    omitted_tools += 1;
                }
            }
            cursor = page.next_cursor;
            if cursor.is_none() || omitted_tools > 0 {
                break;
            }
        }
        omitted_tools += u64::from(cursor.is_some());
        let title = self.server(&name).0.lock().await.as_ref().map(|session| session.title.clone());
        let command = line(config);
        Ok(McpServer { name, command, running: true, title, tools, omitted_tools, problem: None })
    }

    /// Sends one request to a server; starts the server if it is not running.
    async fn ask(
        self: &Arc<Self>,
        name: &str,
        config: &McpServerConfig,
        caller: &Caller,
        method: &str,
        params: Value,
        deadline: Instant,
    ) -> Result<Box<RawValue>, ToolError> {
        let server = self.server(name);
        let asked = async {
            let mut place = server.0.lock().await;
            if place.as_mut().is_none_or(|session| session.is_over()) {
                *place = None;
                let mut session = self.start_server(name, config, &caller.settings)?;
                session.greet().await?;
                *place = Some(session);
                server.clone().end_when_idle();
            }
            let Some(session) = place.as_mut() else { return Err(gone(name, "")) };
            let answer = session.request(method, &params).await;
            if answer.is_err() && session.is_over() {
                *place = None;
            }
            answer
        };
        let answer = tokio::select! {
            answer = timeout_at(deadline, asked) => answer,
            () = caller.cancel.cancelled() => return Err(crate::tools::cancelled()),
        };
        answer.map_err(|_| {
            ToolError::new(
                ErrorCode::Timeout,
                format!("the MCP server {name} did not answer {method} in time"),
            )
            .hint("give a larger timeout_s, at most 45")
        })?
    }

    fn start_server(
        self: &Arc<Self>,
        name: &str,
        config: &McpServerConfig,
        settings: &Settings,
    ) -> Result<Session, ToolError> {
        let mut argv = vec![config.command.clone()];
        argv.extend(config.args.iter().cloned());
        let order = Order {
            argv: Some(argv),
            cwd: config.cwd.clone(),
            env: config.env.clone(),
            user: config.user.clone(),
            stdin_open: true,
            ..Order::default()
        };
        let id = self.new_id()?;
        let started = launch::start(order, settings, self.in_vm, id.to_string())?;
        Session::over(name, started)
    }
}

impl Server {
    /// Stops the server once it has been idle for long.
    fn end_when_idle(self: Arc<Self>) {
        let this = Arc::downgrade(&self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(IDLE.1).await;
                let Some(this) = this.upgrade() else { return };
                let mut place = this.0.lock().await;
                let is_used = |session: &mut Session| session.used.elapsed() < IDLE.0 && !session.is_over();
                if !place.as_mut().is_some_and(is_used) {
                    *place = None;
                    return;
                }
            }
        });
    }
}

/// Reads the servers in a directory, by name: the configuration of each, or what is wrong with its file.
fn configured(directory: &Path) -> BTreeMap<String, Result<McpServerConfig, String>> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut paths: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect();
    paths.sort_unstable();
    paths.truncate(SERVERS_MAX);
    let named = paths.into_iter().filter_map(|path| {
        let name = path.file_stem()?.to_str()?.parse::<Name>().ok()?;
        Some((name.to_string(), one(&path)))
    });
    named.collect()
}

fn one(path: &Path) -> Result<McpServerConfig, String> {
    let found = std::fs::metadata(path).map_err(|error| reason(&error))?;
    if !found.is_file() || found.len() > FILE_MAX {
        return Err(format!("its file is not text of at most {} KiB", FILE_MAX >> 10));
    }
    let text = read_small(path, FILE_MAX).ok_or("its file cannot be read")?;
    let config: McpServerConfig =
        serde_json::from_str(&text).map_err(|error| format!("its file: {error}"))?;
    match config.kind.as_deref() {
        None | Some("stdio") => Ok(config),
        Some(kind) => Err(format!("its type is `{}`: only stdio servers are supported", kind.escape_debug())),
    }
}

/// Takes the configuration of one server.
fn take(
    found: &mut BTreeMap<String, Result<McpServerConfig, String>>,
    name: &str,
) -> Result<McpServerConfig, ToolError> {
    match found.remove(name) {
        Some(Ok(config)) => Ok(config),
        Some(Err(problem)) => Err(gone(name, &problem)),
        None => {
            let names: Vec<_> = found.keys().map(String::as_str).collect();
            let hint = match names.as_slice() {
                [] => format!("this VM has no MCP servers: an image can define them in {}", MCP_DIRECTORY),
                names => format!("this VM has: {}", names.join(", ")),
            };
            Err(ToolError::invalid(format!("there is no MCP server `{}`", cut(name, 60))).hint(hint))
        }
    }
}

fn gone(name: &str, why: &str) -> ToolError {
    let why = if why.is_empty() { "it ended" } else { why };
    ToolError::new(ErrorCode::CommandFailed, format!("the MCP server {name} cannot be used: {why}"))
}

fn line(config: &McpServerConfig) -> String {
    let words = std::iter::once(&config.command).chain(&config.args);
    cut(&words.map(String::as_str).collect::<Vec<_>>().join(" "), 200)
}

/// Describes a server as text.
fn shown(server: &McpServer) -> String {
    let state = match (&server.problem, server.running) {
        (Some(problem), _) => problem.clone(),
        (None, true) => "running".to_owned(),
        (None, false) => "not started".to_owned(),
    };
    let mut text = format!("{} · {state} · {}\n", server.name, server.command);
    for tool in &server.tools {
        let first = tool.description.lines().next().unwrap_or_default();
        text.push_str(&format!("  {} · {}\n", tool.name, cut(first, 200)));
    }
    if server.omitted_tools > 0 {
        text.push_str("  and more tools\n");
    }
    text
}

/// Returns at most `most` characters of a text, without those that control terminals.
fn cut(text: &str, most: usize) -> String {
    let plain = text.chars().map(|letter| if letter.is_control() && letter != '\n' { ' ' } else { letter });
    plain.take(most).collect()
}
