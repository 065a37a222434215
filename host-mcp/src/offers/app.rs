//! The MCP App (extension `io.modelcontextprotocol/ui`, 2026-01-26): a dashboard that clients show which can. It is told of to these alone, as
//! metadata of `vm_list`, whose results it shows; all others get the same tools without it. What it polls and their set of tools lacks is listed
//! for them as tools that are the app's alone: such clients tell no model of them.

use rmcp::model::{ClientCapabilities, MetaObject, Resource, ResourceContents, Tool};
use serde_json::{Value, json};

use crate::forward::Client;
use crate::host::View;
use crate::page;
use crate::tools::Toolset;

/// The app's address.
pub(super) const URI: &str = "ui://nexus/dashboard";
const MIME_TYPE: &str = "text/html;profile=mcp-app";
const EXTENSION: &str = "io.modelcontextprotocol/ui";
/// The tool that shows the app.
const SHOWN_BY: &str = "vm_list";
/// The host's tools that the app polls, besides. They change nothing.
const POLLED: [&str; 4] = ["vm_inspect", "vm_logs", "vm_history", "network_log"];

/// Whether a client can show apps.
pub(crate) fn is_shown_by(client: Option<&ClientCapabilities>) -> bool {
    let types = client.and_then(|can| can.extensions.as_ref()?.get(EXTENSION)?.get("mimeTypes"));
    types.and_then(Value::as_array).is_some_and(|types| types.iter().any(|kind| kind == MIME_TYPE))
}

/// Tells of the app in a client's list of tools, and adds what the app polls.
pub(crate) fn mark(tools: &mut Vec<Tool>, client: &Client) {
    let Some(tool) = tools.iter_mut().find(|tool| tool.name == SHOWN_BY) else { return };
    tool.meta.get_or_insert_default().0.insert("ui".into(), json!({ "resourceUri": URI }));
    let (registry, grant) = (client.host().registry(), client.caller().grant());
    let all = registry.list(View::Whole(Toolset::ALL));
    let has_scope = |tool: &Tool| grant.is_none_or(|grant| grant.has(registry.needs(&tool.name)));
    let polled = all.iter().filter(|tool| may_poll(client, &tool.name) && has_scope(tool)).cloned();
    tools.extend(polled.map(|mut tool| {
        // No program looks at its results but the app.
        tool.output_schema = None;
        let of_app = json!({ "resourceUri": URI, "visibility": ["app"] });
        tool.meta.get_or_insert_default().0.insert("ui".into(), of_app);
        tool
    }));
}

/// Whether the app may call a tool that its client's set lacks. A token is limited to its own set all the same.
pub(crate) fn may_poll(client: &Client, tool: &str) -> bool {
    let (registry, View::Whole(set)) = (client.host().registry(), client.view()) else { return false };
    POLLED.contains(&tool)
        && registry.refusal(set, tool).is_some()
        && client.caller().tools().is_none_or(|own| registry.refusal(own, tool).is_none())
}

/// The app in a list of resources.
pub(super) fn resource() -> Resource {
    Resource::new(URI, "dashboard")
        .with_title("Nexus dashboard")
        .with_description(
            "Virtual machines with their states, consoles and commands, for clients that show apps",
        )
        .with_mime_type(MIME_TYPE)
}

/// The app itself. It needs no connection but that to its client.
pub(super) fn contents() -> ResourceContents {
    let mut meta = MetaObject::default();
    meta.0.insert("ui".into(), json!({ "csp": {}, "prefersBorder": false }));
    ResourceContents::text(page::app(), URI).with_mime_type(MIME_TYPE).with_meta(meta)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clients_that_take_its_type_are_told() {
        let can = |capabilities: Value| {
            is_shown_by(Some(&serde_json::from_value::<ClientCapabilities>(capabilities).unwrap()))
        };
        assert!(can(json!({ "extensions": { EXTENSION: { "mimeTypes": ["x", MIME_TYPE] } } })));
        for other in [
            json!({}),
            json!({ "extensions": {} }),
            json!({ "extensions": { EXTENSION: {} } }),
            json!({ "extensions": { EXTENSION: { "mimeTypes": ["text/html"] } } }),
        ] {
            assert!(!can(other.clone()), "{other}");
        }
        assert!(!is_shown_by(None));
    }
}
