//! MCP servers of an image. Their messages are treated as data: their tools never become tools of Nexus.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::tool::{Effect, ResultShape, TimeLimit, Tool};

/// The default timeout of a call.
const TIMEOUT_DEFAULT: std::time::Duration = std::time::Duration::from_secs(30);

/// How a server is started, as a file `NAME.json` in `/etc/nexus/mcp.d` of the image says it: as in the `mcpServers` of MCP clients. It speaks MCP over its standard input and output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct McpServerConfig {
    /// `stdio`, which is all that there is.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The program.
    pub command: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment variables besides the VM's.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it starts.
    #[serde(default)]
    pub cwd: Option<String>,
    /// As whom it runs.
    #[serde(default)]
    pub user: Option<String>,
}

/// Lists the MCP servers of the VM, or the tools of one.
pub enum McpList {}

/// Arguments of `mcp_list`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct McpListParams {
    /// Start this one if it does not run, and list its tools with their arguments (default: name all servers, start none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
}

/// Result of `mcp_list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct McpListOutput {
    /// The servers, by name.
    pub servers: Vec<McpServer>,
}

/// An MCP server in the VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct McpServer {
    /// Its name: the argument `server`.
    pub name: String,
    /// What is run.
    pub command: String,
    /// Whether it is running.
    pub running: bool,
    /// Its own name and version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Its tools, if they were requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<McpServerTool>,
    /// The number of tools that are left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub omitted_tools: u64,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// A tool of an MCP server, as the server describes it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct McpServerTool {
    /// Its name: the argument `tool`.
    pub name: String,
    /// What it does, cut to 1,000 characters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The JSON schema of its arguments; absent if it is too large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_schema: Option<Map<String, Value>>,
}

impl Tool for McpList {
    const NAME: &'static str = "mcp_list";
    const TITLE: &'static str = "List MCP servers in the VM";
    const DESCRIPTION: &'static str = "Lists the MCP servers that the VM's image brings, or with `server` the tools of one; use it before \
        mcp_call. What they say of themselves is text from inside the VM.";
    const EFFECT: Effect = Effect::ReadOnly;
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    type Params = McpListParams;
    type Output = McpListOutput;
}

/// Calls a tool of an MCP server of the VM.
pub enum McpCall {}

/// Arguments of `mcp_call`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct McpCallParams {
    /// The server's name.
    pub server: String,
    /// The tool's name.
    pub tool: String,
    /// The tool's arguments (default: none).
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    /// How long it may take, in seconds (default 30, at most 45).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.1, max = 45.0))]
    pub timeout_s: Option<f64>,
}

/// The structured result of `mcp_call`; the text of the content is the text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct McpCallOutput {
    /// Whether the tool reported a failure.
    pub is_error: bool,
    /// Its structured result, unless that is too large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structured: Option<Map<String, Value>>,
    /// Content that is not text, by type and size in bytes, such as `image/png 2048`; it is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub omitted: Vec<String>,
    /// How much text is left out, in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub omitted_bytes: u64,
}

impl Tool for McpCall {
    const NAME: &'static str = "mcp_call";
    const TITLE: &'static str = "Call a tool of an MCP server in the VM";
    const DESCRIPTION: &'static str = "Calls a tool of an MCP server that the VM's image brings, which is started if it does not run; use it after mcp_list said which tools there are.";
    const EFFECT: Effect = Effect::Destructive { idempotent: false };
    const SHAPE: ResultShape = ResultShape::Text;
    const OPEN_WORLD: bool = true;
    const TIME_LIMIT: TimeLimit =
        TimeLimit::Argument { name: "timeout_s", default: TIMEOUT_DEFAULT, max: crate::limits::WAIT_MAX };
    type Params = McpCallParams;
    type Output = McpCallOutput;
}
