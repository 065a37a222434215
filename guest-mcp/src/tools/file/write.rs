//! `file_write`. A file is replaced in one step, appended to in place, or sent in pieces: see [`super::upload`].

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::limits::FILE_WRITE_MAX;
use nexus_schema::tools::file::{FileWrite, FileWriteOutput, FileWriteParams};

use super::draft::sync;
use super::parse_path;
use super::target::{Target, check_regular};
use super::upload::{Piece, Uploads, check_id};
use crate::places::{Owner, give_to_owner_of};
use crate::tools::text::shown;
use crate::tools::{Call, Reply, Run, human_bytes};

impl Run for FileWrite {
    async fn run(call: Call, params: FileWriteParams) -> Result<Reply<FileWriteOutput>, ToolError> {
        let path = parse_path(&params.path)?;
        let content = params.encoding.unwrap_or_default().decode(params.content);
        let content = content.map_err(|error| ToolError::invalid(format!("content: {error}")))?;
        if content.len() as u64 > FILE_WRITE_MAX {
            let text = format!("content has {} bytes, at most {FILE_WRITE_MAX} are allowed", content.len());
            return Err(ToolError::new(ErrorCode::TooLarge, text).hint("write it in pieces with upload_id"));
        }
        let mode = params.mode.as_deref().map(parse_mode).transpose()?;
        if let Some(id) = params.upload_id {
            check_id(&id)?;
            if params.append == Some(true) {
                return Err(ToolError::invalid("give either append or upload_id"));
            }
            let piece = Piece {
                id,
                path,
                user: params.user,
                offset: params.offset,
                content,
                create_parents: params.create_parents.unwrap_or(true),
                commit: params.commit,
                mode,
            };
            return take(call, params.path, piece).await;
        }
        if params.offset.is_some() || params.commit {
            return Err(ToolError::invalid("offset and commit need upload_id"));
        }
        let request = Request {
            named: params.path,
            path,
            content,
            mode,
            create_parents: params.create_parents.unwrap_or(true),
            append: params.append.unwrap_or(false),
        };
        let output = call.blocking_as(params.user, move |owner, _| request.write(owner)).await?;
        let header = format!(
            "{} · {} {} · now {}",
            shown(&output.path),
            human_bytes(output.written_bytes),
            if output.created { "written to a new file" } else { "written" },
            human_bytes(output.size_bytes),
        );
        Ok(Reply::new(header, output))
    }
}

/// Handles a piece of a file.
async fn take(call: Call, path: String, piece: Piece) -> Result<Reply<FileWriteOutput>, ToolError> {
    let (agent, user) = (call.agent.clone(), piece.user.clone());
    let (id, written) = (piece.id.clone(), piece.content.len() as u64);
    let received = call.blocking_as(user, move |owner, _| agent.uploads.take(&piece, owner)).await?;
    let header = match received.created {
        None => format!(
            "{} · piece of upload {id} · {} so far · in place after commit",
            shown(&path),
            human_bytes(received.length)
        ),
        Some(_) => format!("{} · upload {id} in place · {}", shown(&path), human_bytes(received.length)),
    };
    if received.created.is_none() {
        let agent = call.agent.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Uploads::TIDY_AFTER).await;
            agent.uploads.tidy();
        });
    }
    let facts = FileWriteOutput {
        path,
        written_bytes: written,
        size_bytes: received.length,
        created: received.created.unwrap_or(false),
        pending: received.created.is_none(),
    };
    Ok(Reply::new(header, facts))
}

/// Parses an octal mode.
pub(super) fn parse_mode(text: &str) -> Result<u32, ToolError> {
    nexus_schema::tools::file::parse_mode(text).ok_or_else(|| {
        let shown: String = text.chars().take(40).collect();
        ToolError::invalid(format!("`{shown}` is not a mode: octal digits such as 0644"))
    })
}

struct Request {
    named: String,
    path: PathBuf,
    content: Vec<u8>,
    mode: Option<u32>,
    create_parents: bool,
    append: bool,
}

impl Request {
    fn write(self, owner: Owner) -> Result<FileWriteOutput, ToolError> {
        let target = Target::find(&self.path)?;
        if self.create_parents {
            target.make_parents(owner)?;
        }
        let (created, written) = (target.existing.is_none(), self.content.len() as u64);
        let size = if self.append {
            let file = append(&target, &self.content, self.mode, owner);
            file.map_err(|error| target.fail(error))?
        } else {
            target.put(self.content, self.mode, owner)?;
            std::fs::metadata(target.path()).map_or(written, |metadata| metadata.len())
        };
        Ok(FileWriteOutput {
            path: self.named,
            written_bytes: written,
            size_bytes: size,
            created,
            pending: false,
        })
    }
}

/// Appends to the file; returns its new size.
fn append(target: &Target, content: &[u8], mode: Option<u32>, owner: Owner) -> io::Result<u64> {
    let mut options = File::options();
    // A file that was found to be regular may have been replaced by a pipe or a device meanwhile.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    options.append(true).create(true).mode(mode.unwrap_or(0o644)).custom_flags(flags);
    let mut file = options.open(target.path())?;
    check_regular(&file)?;
    let before = file.metadata()?.len();
    let is_new = target.existing.is_none();
    if is_new && owner == Owner::OfDirectory {
        give_to_owner_of(target.directory(), &file)?;
    }
    if let Err(error) = file.write_all(content).and_then(|()| sync(&file)) {
        // All or nothing, as far as that is possible while others may append too.
        let _ = file.set_len(before);
        return Err(error);
    }
    if let Some(mode) = mode.or(is_new.then_some(0o644)) {
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    }
    Ok(file.metadata()?.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        for (text, mode) in [("0644", 0o644), ("755", 0o755), ("4755", 0o4755), ("0o600", 0o600), ("0", 0)] {
            assert_eq!(parse_mode(text), Ok(mode), "{text}");
        }
        for bad in ["", "8", "rw-r--r--", "10000", "-1", "0x1", "+644"] {
            assert!(parse_mode(bad).is_err(), "{bad}");
        }
    }
}
