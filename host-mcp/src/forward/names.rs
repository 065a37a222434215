//! Names of tools in what a client reads. The whole endpoint has the guest's tools with a prefix; the endpoint of one VM has them without it,
//! and has none of the host's.

use std::borrow::Cow;

use nexus_schema::ToolError;
use nexus_schema::tool::{in_guest, on_host, words};
use nexus_schema::tools::HOST_NAMES;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;
use serde_json::value::RawValue;

use crate::host::View;

/// What precedes a tool that somebody else has to call.
const ASKED_FOR: &str = "ask for ";

/// An error for a client of a view: with a hint, and in it only tools that the client has.
pub(super) fn told(error: ToolError, view: View) -> ToolError {
    let mut error = error.with_advice();
    if let Some(hint) = &mut error.hint {
        let named = in_text(hint, view).into_owned();
        *hint = match view {
            View::Vm(_) | View::Own(_) if names_lacking(&named) => error.code.advice_inside().to_owned(),
            View::Vm(_) | View::Own(_) | View::Whole(_) => named,
        };
    }
    error
}

/// Content blocks with the view's names of tools in the first one, the guest's report. Blocks of streams stay as they are.
pub(super) fn in_report(content: &str, view: View) -> Cow<'_, str> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Report<'a> {
        #[serde(rename = "type")]
        _kind: IgnoredAny,
        #[serde(borrow)]
        text: Cow<'a, str>,
    }
    // Almost all reports of short commands name no tool. Those of commands that lack a network name `file_write`.
    let may_name = content.contains("command_") || content.contains("file_write");
    if matches!(view, View::Vm(_) | View::Own(_)) || !may_name {
        return content.into();
    }
    let Ok(blocks) = serde_json::from_str::<Vec<&RawValue>>(content) else { return content.into() };
    let Some((first, rest)) = blocks.split_first() else { return content.into() };
    let Ok(report) = serde_json::from_str::<Report<'_>>(first.get()) else { return content.into() };
    let Cow::Owned(text) = in_text(&report.text, view) else { return content.into() };
    let mut out = format!("[{}", json!({ "type": "text", "text": text }));
    for block in rest {
        out.push(',');
        out.push_str(block.get());
    }
    out.push(']');
    out.into()
}

/// A text with the view's names of the guest's tools. Words that are part of a path stay as they are.
fn in_text(text: &str, view: View) -> Cow<'_, str> {
    match view {
        View::Whole(_) => on_host(text),
        View::Vm(_) | View::Own(_) => in_guest(text),
    }
}

/// Whether a text tells to call a tool of the host, and not to ask somebody for it.
fn names_lacking(text: &str) -> bool {
    words(text).any(|(at, word)| HOST_NAMES.contains(&word) && !text[..at].ends_with(ASKED_FOR))
}

#[cfg(test)]
mod tests {
    use nexus_schema::ErrorCode;
    use nexus_schema::id::VmId;
    use nexus_schema::tool::GUEST_PREFIX;
    use nexus_schema::tools::command::FailureCause;

    use super::*;
    use crate::tools::Toolset;

    const WHOLE: View = View::Whole(Toolset::WORK);

    fn inside() -> View {
        View::Vm(VmId::from_i64(1).unwrap())
    }

    #[test]
    fn the_guests_tools_have_the_names_of_the_endpoint() {
        for (text, whole, within) in [
            (
                "call command_output with id x",
                "call guest_command_output with id x",
                "call command_output with id x",
            ),
            (
                "run rm -rf with guest_run_command",
                "run rm -rf with guest_run_command",
                "run rm -rf with run_command",
            ),
            (
                "see command_list and command_signal.",
                "see guest_command_list and guest_command_signal.",
                "see command_list and command_signal.",
            ),
            (
                "/srv/run_command, run_command-1, a.file_read",
                "/srv/run_command, run_command-1, a.file_read",
                "/srv/run_command, run_command-1, a.file_read",
            ),
            (
                "the export is 5 B; stdin_open: true",
                "the export is 5 B; stdin_open: true",
                "the export is 5 B; stdin_open: true",
            ),
            ("ä file_read ö", "ä guest_file_read ö", "ä file_read ö"),
            ("", "", ""),
        ] {
            assert_eq!(in_text(text, WHOLE), whole);
            assert_eq!(in_text(text, inside()), within);
        }
    }

    #[test]
    fn a_report_is_adapted_and_output_is_not() {
        let report =
            r#"{"type":"text","text":"still running\nit continues: call command_output with id \"x\""}"#;
        let output = r#"{"type":"text","text":"call command_output","_meta":{"dev.nexus/stream":"stdout"}}"#;
        let content = format!("[{report}, {output}]");
        let said: serde_json::Value = serde_json::from_str(&in_report(&content, WHOLE)).unwrap();
        assert_eq!(
            said[0],
            json!({"type": "text", "text": "still running\nit continues: call guest_command_output with id \"x\""})
        );
        assert_eq!(said[1], serde_json::from_str::<serde_json::Value>(output).unwrap());
        assert_eq!(said.as_array().unwrap().len(), 2);
        let cause = FailureCause::NoNetwork.explained();
        let noted = json!([{ "type": "text", "text": format!("exit 100\nnote: {cause}") }]).to_string();
        let said = in_report(&noted, WHOLE);
        assert!(said.contains("(guest_file_write)"), "{said}");
        for content in [format!("[{output},{report}]"), "[]".to_owned(), "command_output".to_owned()] {
            assert_eq!(in_report(&content, WHOLE), content);
        }
        assert_eq!(in_report(&content, inside()), content);
    }

    #[test]
    fn inside_a_vm_no_tool_is_named_that_is_not_there() {
        for code in ErrorCode::ALL {
            let error = told(ToolError::new(*code, "x"), inside());
            let hint = error.hint.unwrap_or_default();
            assert!(!names_lacking(&hint), "{code}: {hint}");
            assert!(!hint.contains(GUEST_PREFIX), "{code}: {hint}");
            let whole = told(ToolError::new(*code, "x"), WHOLE);
            assert_eq!(whole, ToolError::new(*code, "x").with_advice(), "{code}");
        }
        let hint = |error: ToolError| told(error, inside()).hint.unwrap();
        let missing = ToolError::new(ErrorCode::VmNotFound, "x").hint("call vm_list to see the VMs");
        assert_eq!(hint(missing), "the VM is gone: ask whoever gave you this endpoint for another one");
        // What somebody else has to call is still said exactly.
        let refused = ToolError::new(ErrorCode::RequestFailed, "x")
            .hint(r#"ask for vm_update network.allow=["a.example"]"#);
        assert!(hint(refused).contains("network.allow"));
    }
}
