//! Resources: URIs of `nexus://`, and the tool that reads each.
//!
//! ```text
//! nexus://vms                           vm_list
//! nexus://vm/{vm}                       vm_inspect
//! nexus://vm/{vm}/console               vm_logs
//! nexus://vm/{vm}/history               vm_history
//! nexus://vm/{vm}/file/{+path}          file_read
//! nexus://vm/{vm}/command/{id}          command_output
//! nexus://op/{id}                       op_get
//! skill://{name}/SKILL.md               a skill
//! ui://nexus/dashboard                  the MCP App
//! ```

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use rmcp::model::{JsonObject, Resource, ResourceTemplate};
use serde_json::{Value, json};

use super::{app, skills};

const JSON: &str = "application/json";
const TEXT: &str = "text/plain";
/// The most bytes of a file that are read, which is the most that `file_read` gives at once.
const FILE_MAX: u64 = 720_896;
/// The most bytes of text that tools give at once.
const TEXT_MAX: u64 = 48_000;
/// What is escaped in one segment of a URI.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Where the content of a resource comes from.
#[derive(Debug, PartialEq)]
pub(crate) enum Source {
    /// A call of a tool, and what of its result is the content.
    Tool { name: &'static str, is_of_guest: bool, arguments: JsonObject, form: Form },
    /// Fixed text, as Markdown.
    Skill(&'static str),
    /// The MCP App.
    App,
}

/// What of a tool's result is the content of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The structured result.
    Json,
    /// The text behind the header line.
    Text,
    /// The base64 text behind the header line: a file's bytes.
    Bytes,
}

impl Form {
    /// The MIME type of the content, if it is always the same.
    pub(crate) const fn mime_type(self) -> Option<&'static str> {
        match self {
            Self::Json => Some(JSON),
            Self::Text => Some(TEXT),
            Self::Bytes => None,
        }
    }
}

/// The source of a URI; `None` if there is no such resource.
pub(crate) fn source(uri: &str) -> Option<Source> {
    if uri == app::URI {
        return Some(Source::App);
    }
    if uri.starts_with("skill://") {
        return skills::text(uri).map(Source::Skill);
    }
    let path = uri.strip_prefix("nexus://")?;
    let call = |name, is_of_guest, arguments: Value, form| {
        let Value::Object(arguments) = arguments else { return None };
        Some(Source::Tool { name, is_of_guest, arguments, form })
    };
    if path == "vms" {
        return call("vm_list", false, json!({ "limit": 500 }), Form::Json);
    }
    if let Some(op) = path.strip_prefix("op/") {
        // As it is now; who wants to wait for its end subscribes.
        return call("op_get", false, json!({ "op_id": segment(op)?, "wait_s": 0 }), Form::Json);
    }
    let (vm, rest) = match path.strip_prefix("vm/")?.split_once('/') {
        Some((vm, rest)) => (segment(vm)?, Some(rest)),
        None => (segment(path.strip_prefix("vm/")?)?, None),
    };
    match rest {
        None => call("vm_inspect", false, json!({ "vm": vm }), Form::Json),
        Some("console") => call("vm_logs", false, json!({ "vm": vm, "max_bytes": TEXT_MAX }), Form::Text),
        Some("history") => call("vm_history", false, json!({ "vm": vm }), Form::Json),
        Some(rest) => {
            if let Some(id) = rest.strip_prefix("command/") {
                let arguments = json!({ "vm": vm, "id": segment(id)?, "limit": TEXT_MAX });
                return call("command_output", true, arguments, Form::Text);
            }
            let path = decoded(rest.strip_prefix("file/")?)?;
            let path = if path.starts_with('/') { path } else { format!("/{path}") };
            let arguments = json!({ "vm": vm, "path": path, "encoding": "base64", "limit": FILE_MAX });
            call("file_read", true, arguments, Form::Bytes)
        }
    }
}

/// One segment of a path, decoded; `None` if it is empty or more than one.
fn segment(text: &str) -> Option<String> {
    if text.contains('/') {
        return None;
    }
    decoded(text).filter(|segment| !segment.is_empty())
}

fn decoded(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(|text| text.into_owned())
}

/// The list of VMs and a resource for each of them, by name.
pub(crate) fn of_vms<'a>(names: impl Iterator<Item = &'a str>) -> Vec<Resource> {
    let all = Resource::new("nexus://vms", "vms").with_title("All VMs").with_mime_type(JSON);
    let one = |name: &'a str| {
        let uri = format!("nexus://vm/{}", utf8_percent_encode(name, SEGMENT));
        Resource::new(uri, name).with_title(format!("VM {name}")).with_mime_type(JSON)
    };
    std::iter::once(all.with_description("Names, states and images of all VMs"))
        .chain(names.map(one))
        .collect()
}

/// The resources that exist for each VM and operation.
pub(crate) fn templates() -> Vec<ResourceTemplate> {
    [
        ("nexus://vm/{vm}", "vm", "A VM", "What is known about a VM", Some(JSON)),
        (
            "nexus://vm/{vm}/console",
            "vm-console",
            "Console of a VM",
            "The end of its console log",
            Some(TEXT),
        ),
        (
            "nexus://vm/{vm}/history",
            "vm-history",
            "History of a VM",
            "Its changes of state, with reasons",
            Some(JSON),
        ),
        (
            "nexus://vm/{vm}/file/{+path}",
            "vm-file",
            "File in a VM",
            "A file by its absolute path, up to 704 KiB",
            None,
        ),
        (
            "nexus://vm/{vm}/command/{id}",
            "vm-command",
            "Command in a VM",
            "State and output of a command",
            Some(TEXT),
        ),
        (
            "nexus://op/{id}",
            "op",
            "An operation",
            "State, progress and result of a long operation",
            Some(JSON),
        ),
    ]
    .into_iter()
    .map(|(uri, name, title, description, mime_type)| {
        let template = ResourceTemplate::new(uri, name).with_title(title).with_description(description);
        match mime_type {
            Some(mime_type) => template.with_mime_type(mime_type),
            None => template,
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(uri: &str) -> Option<(&'static str, bool, Value, Form)> {
        match source(uri)? {
            Source::Tool { name, is_of_guest, arguments, form } => {
                Some((name, is_of_guest, arguments.into(), form))
            }
            Source::Skill(_) | Source::App => None,
        }
    }

    #[test]
    fn uris_are_calls_of_tools() {
        for (uri, name, is_of_guest, arguments) in [
            ("nexus://vms", "vm_list", false, json!({ "limit": 500 })),
            ("nexus://vm/web-1", "vm_inspect", false, json!({ "vm": "web-1" })),
            ("nexus://vm/web-1/history", "vm_history", false, json!({ "vm": "web-1" })),
            ("nexus://op/abc", "op_get", false, json!({ "op_id": "abc", "wait_s": 0 })),
        ] {
            assert_eq!(tool(uri), Some((name, is_of_guest, arguments, Form::Json)), "{uri}");
        }
        let file = |uri| tool(uri).map(|(_, _, arguments, _)| arguments["path"].clone());
        assert_eq!(file("nexus://vm/a/file/etc/os-release"), Some(json!("/etc/os-release")));
        assert_eq!(file("nexus://vm/a/file//etc/a%20b%2f..%2Fc"), Some(json!("/etc/a b/../c")));
        assert_eq!(tool("nexus://vm/a/command/x").unwrap().0, "command_output");
        assert_eq!(tool("nexus://vm/a%2Fb").unwrap().2, json!({ "vm": "a/b" }), "the tool refuses this name");
    }

    #[test]
    fn other_uris_are_no_resources() {
        for uri in [
            "",
            "nexus://",
            "nexus://vm/",
            "nexus://vm//console",
            "nexus://vm/a/",
            "nexus://vm/a/other",
            "nexus://op/",
            "nexus://op/a/b",
            "nexus://vm/a/command/",
            "nexus://vm/a/command/b/c",
            "http://vms",
            "nexus://VMS",
            "nexus://vm/%ff",
            "skill://nope/SKILL.md",
            "skill://build-and-test/../x",
            "ui://nexus/",
            "ui://nexus/dashboard/x",
        ] {
            assert_eq!(source(uri), None, "{uri}");
        }
        assert!(matches!(source("skill://build-and-test/SKILL.md"), Some(Source::Skill(_))));
    }

    #[test]
    fn every_template_and_listed_resource_has_a_source() {
        for template in templates() {
            let uri =
                template.uri_template.replace("{vm}", "a").replace("{id}", "b").replace("{+path}", "etc/x");
            assert!(source(&uri).is_some(), "{uri}");
        }
        for resource in of_vms(["a", "b-2"].into_iter()) {
            assert!(source(&resource.uri).is_some(), "{}", resource.uri);
        }
    }
}
