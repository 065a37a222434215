//! The tools, one file per noun. [`host`] and [`guest`] list which tools run on the host and in the guest.

pub mod asset;
pub mod audit;
pub mod build;
pub mod checkpoint;
pub mod command;
pub mod drive;
pub mod event;
pub mod file;
pub mod http;
pub mod image;
pub mod kernel;
pub mod mcp;
pub mod network;
pub mod op;
pub mod os;
pub mod plan;
pub mod provider;
pub mod prune;
pub mod settings;
pub mod stream;
pub mod system;
pub mod template;
pub mod token;
pub mod tree;
pub mod vm;

use data_encoding::{BASE64, BASE64_NOPAD, DecodeError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tool::{Tool, ToolInfo, guest_info, info};

/// Calls a macro with the list of the host's own tools.
#[macro_export]
macro_rules! for_each_host_tool {
    ($callback:ident) => {
        $callback! {
            $crate::tools::asset::AssetDownload => asset_download,
            $crate::tools::asset::AssetInspect => asset_inspect,
            $crate::tools::asset::AssetList => asset_list,
            $crate::tools::asset::AssetRemove => asset_remove,
            $crate::tools::asset::AssetVerify => asset_verify,
            $crate::tools::audit::AuditList => audit_list,
            $crate::tools::build::BuildInspect => build_inspect,
            $crate::tools::build::BuildList => build_list,
            $crate::tools::build::BuildLogs => build_logs,
            $crate::tools::build::BuildStart => build_start,
            $crate::tools::checkpoint::CheckpointDelete => checkpoint_delete,
            $crate::tools::checkpoint::CheckpointDiff => checkpoint_diff,
            $crate::tools::checkpoint::CheckpointList => checkpoint_list,
            $crate::tools::drive::DriveAttach => drive_attach,
            $crate::tools::drive::DriveCreate => drive_create,
            $crate::tools::drive::DriveDelete => drive_delete,
            $crate::tools::drive::DriveDetach => drive_detach,
            $crate::tools::drive::DriveInspect => drive_inspect,
            $crate::tools::drive::DriveList => drive_list,
            $crate::tools::drive::DriveResize => drive_resize,
            $crate::tools::event::EventsWait => events_wait,
            $crate::tools::tree::GuestCopyIn => guest_copy_in,
            $crate::tools::tree::GuestCopyOut => guest_copy_out,
            $crate::tools::stream::GuestStreamOpen => guest_stream_open,
            $crate::tools::image::ImageCreate => image_create,
            $crate::tools::image::ImageDelete => image_delete,
            $crate::tools::image::ImageInspect => image_inspect,
            $crate::tools::image::ImageList => image_list,
            $crate::tools::image::ImagePush => image_push,
            $crate::tools::image::ImageSave => image_save,
            $crate::tools::kernel::KernelBuild => kernel_build,
            $crate::tools::kernel::KernelPublish => kernel_publish,
            $crate::tools::network::NetworkCleanup => network_cleanup,
            $crate::tools::network::NetworkFirewall => network_firewall,
            $crate::tools::network::NetworkInspect => network_inspect,
            $crate::tools::network::NetworkLog => network_log,
            $crate::tools::op::OpCancel => op_cancel,
            $crate::tools::op::OpGet => op_get,
            $crate::tools::op::OpList => op_list,
            $crate::tools::provider::ProviderInspect => provider_inspect,
            $crate::tools::provider::ProviderList => provider_list,
            $crate::tools::provider::ProviderRemove => provider_remove,
            $crate::tools::provider::ProviderSet => provider_set,
            $crate::tools::prune::Prune => prune,
            $crate::tools::settings::SettingsGet => settings_get,
            $crate::tools::settings::SettingsHistory => settings_history,
            $crate::tools::settings::SettingsRollback => settings_rollback,
            $crate::tools::settings::SettingsSet => settings_set,
            $crate::tools::system::SystemInfo => system_info,
            $crate::tools::template::TemplateCreate => template_create,
            $crate::tools::template::TemplateDelete => template_delete,
            $crate::tools::template::TemplateInspect => template_inspect,
            $crate::tools::template::TemplateList => template_list,
            $crate::tools::template::TemplateUpdate => template_update,
            $crate::tools::token::TokenCreate => token_create,
            $crate::tools::token::TokenList => token_list,
            $crate::tools::token::TokenRevoke => token_revoke,
            $crate::tools::checkpoint::VmCheckpoint => vm_checkpoint,
            $crate::tools::vm::VmCreate => vm_create,
            $crate::tools::vm::VmDelete => vm_delete,
            $crate::tools::checkpoint::VmFork => vm_fork,
            $crate::tools::vm::VmHistory => vm_history,
            $crate::tools::vm::VmInspect => vm_inspect,
            $crate::tools::vm::VmList => vm_list,
            $crate::tools::vm::VmLogs => vm_logs,
            $crate::tools::vm::VmPause => vm_pause,
            $crate::tools::vm::VmPublish => vm_publish,
            $crate::tools::vm::VmRename => vm_rename,
            $crate::tools::vm::VmRestart => vm_restart,
            $crate::tools::vm::VmResume => vm_resume,
            $crate::tools::checkpoint::VmRollback => vm_rollback,
            $crate::tools::vm::VmStart => vm_start,
            $crate::tools::vm::VmStop => vm_stop,
            $crate::tools::vm::VmUnpublish => vm_unpublish,
            $crate::tools::vm::VmUpdate => vm_update,
            $crate::tools::vm::VmWait => vm_wait,
        }
    };
}

/// Calls a macro with the list of the guest's tools.
#[macro_export]
macro_rules! for_each_guest_tool {
    ($callback:ident) => {
        $callback! {
            $crate::tools::command::CommandInput => command_input,
            $crate::tools::command::CommandList => command_list,
            $crate::tools::command::CommandOutput => command_output,
            $crate::tools::command::CommandSignal => command_signal,
            $crate::tools::command::CommandStart => command_start,
            $crate::tools::tree::Export => export,
            $crate::tools::file::FileCopy => file_copy,
            $crate::tools::file::FileDelete => file_delete,
            $crate::tools::file::FileEdit => file_edit,
            $crate::tools::file::FileList => file_list,
            $crate::tools::file::FileMkdir => file_mkdir,
            $crate::tools::file::FileMove => file_move,
            $crate::tools::file::FilePatch => file_patch,
            $crate::tools::file::FileRead => file_read,
            $crate::tools::file::FileSearch => file_search,
            $crate::tools::file::FileStat => file_stat,
            $crate::tools::file::FileWrite => file_write,
            $crate::tools::http::HttpRequest => http_request,
            $crate::tools::mcp::McpCall => mcp_call,
            $crate::tools::mcp::McpList => mcp_list,
            $crate::tools::os::OsInfo => os_info,
            $crate::tools::command::RunCommand => run_command,
        }
    };
}

macro_rules! names {
    ($($tool:path => $method:ident,)*) => { &[$(<$tool as Tool>::NAME),*] };
}

/// The names of the host's own tools, sorted.
pub const HOST_NAMES: &[&str] = for_each_host_tool!(names);

/// The names of the guest's tools in the guest, sorted.
pub const GUEST_NAMES: &[&str] = for_each_guest_tool!(names);

/// Returns the host's own tools, sorted by name.
pub fn host() -> Vec<ToolInfo> {
    macro_rules! infos { ($($tool:path => $method:ident,)*) => { vec![$(info::<$tool>()),*] }; }
    for_each_host_tool!(infos)
}

/// Returns the guest's tools in the form of the guest and the scoped endpoint, sorted by name.
pub fn guest() -> Vec<ToolInfo> {
    macro_rules! infos { ($($tool:path => $method:ident,)*) => { vec![$(info::<$tool>()),*] }; }
    for_each_guest_tool!(infos)
}

/// Returns the guest's tools as the host publishes them, sorted by name.
pub fn guest_on_host() -> Vec<ToolInfo> {
    macro_rules! infos { ($($tool:path => $method:ident,)*) => { vec![$(guest_info::<$tool>()),*] }; }
    for_each_guest_tool!(infos)
}

/// How content is represented in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ContentEncoding {
    /// As text; bytes that are not UTF-8 are replaced, and the result says so.
    #[default]
    Text,
    /// As base64 (RFC 4648 section 4, padded); exact.
    Base64,
}

impl ContentEncoding {
    /// Decodes a text in this encoding. Base64 may have line breaks, lack its padding, or use the alphabet for URLs: each of these has only one
    /// possible meaning.
    pub fn decode(self, text: String) -> Result<Vec<u8>, NotBase64> {
        match self {
            Self::Text => Ok(text.into_bytes()),
            Self::Base64 => match BASE64.decode(text.as_bytes()) {
                Ok(bytes) => Ok(bytes),
                Err(_) => {
                    let letters = text.bytes().filter(|byte| !byte.is_ascii_whitespace());
                    let letters = letters.map(|byte| match byte {
                        b'-' => b'+',
                        b'_' => b'/',
                        byte => byte,
                    });
                    let mut letters: Vec<u8> = letters.collect();
                    // At most two: a text with more padding was cut in the wrong place, or is not base64.
                    let padding = letters.iter().rev().take(2).take_while(|letter| **letter == b'=').count();
                    letters.truncate(letters.len() - padding);
                    Ok(BASE64_NOPAD.decode(&letters)?)
                }
            },
        }
    }
}

/// Why a text is not base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not base64: {0}")]
pub struct NotBase64(#[from] DecodeError);

/// The reply of a call that starts long work: the same from the call itself and from `op_get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OpOutcome<T> {
    /// Whether the work has ended. While false, call op_get with op_id.
    pub done: bool,
    /// The operation's id.
    pub op_id: crate::id::OpId,
    /// The operation's state.
    pub state: op::OpState,
    /// What it is doing or did last.
    pub progress: op::OpProgress,
    /// The id of the thing that the operation makes or works on, from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_id: Option<String>,
    /// The name of that thing, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject_name: Option<String>,
    /// The result, once `done` and succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<T>,
    /// How it failed, once `done` and not succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<crate::error::ToolError>,
}

/// How to read a list page by page.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Page {
    /// How many rows at most (default 50, at most 500).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 500))]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_in_each_form_that_means_one_thing() {
        let decode = |text: &str| ContentEncoding::Base64.decode(text.to_owned());
        let expected: Vec<u8> = (0..=255).chain([0xfb, 0xff]).collect();
        let plain = BASE64.encode(&expected);
        let mut lines: String =
            plain.as_bytes().chunks(76).map(|l| str::from_utf8(l).unwrap().to_owned() + "\r\n").collect();
        lines.insert(0, ' ');
        let url = plain.replace('+', "-").replace('/', "_");
        for form in [&plain, &lines, &url, plain.trim_end_matches('=')] {
            assert_eq!(decode(form).unwrap(), expected, "{form}");
        }
        assert_eq!(decode("").unwrap(), b"");
        for wrong in ["a", "ab=c", "a===", "====", "abc\u{e4}", "Zh=="] {
            assert!(decode(wrong).is_err(), "{wrong}");
        }
        assert_eq!(ContentEncoding::Text.decode("aGk=\n".to_owned()).unwrap(), b"aGk=\n");
    }
}
