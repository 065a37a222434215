//! `file_read`: by bytes, or by lines.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nexus_schema::ToolError;
use nexus_schema::limits::{FILE_READ_MAX, OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::file::{FileRead, FileReadOutput, FileReadParams};
use rustix::fs::{FileType as Kind, Mode, OFlags};

use super::lines::{Wanted, lines, reply_lines};
use super::{failed, not_regular, parse_path};
use crate::tools::text::{decode, incomplete_end, shown};
use crate::tools::{Block, Call, Reply, Run, human_bytes};

impl Run for FileRead {
    async fn run(call: Call, params: FileReadParams) -> Result<Reply<FileReadOutput>, ToolError> {
        let path = parse_path(&params.path)?;
        let encoding = params.encoding.unwrap_or_default();
        let most = match encoding {
            ContentEncoding::Text => OUTPUT_MAX,
            ContentEncoding::Base64 => FILE_READ_MAX,
        };
        let limit = params.limit.unwrap_or(OUTPUT_DEFAULT).min(most) as usize;
        if limit == 0 {
            return Err(ToolError::invalid("limit must be at least 1"));
        }
        if params.from_line.is_some() || params.lines.is_some() || params.numbered {
            let wanted = Wanted::of(&params, limit)?;
            let part = call.blocking_as(params.user, move |_, cancel| lines(&path, wanted, cancel)).await?;
            return Ok(reply_lines(&params.path, part, encoding));
        }
        let offset = params.offset.unwrap_or(0);
        // The kernel's file positions are signed.
        if offset > (i64::MAX as u64).saturating_sub(FILE_READ_MAX) {
            return Err(ToolError::invalid("offset is beyond the end of every file"));
        }
        let part = call.blocking_as(params.user, move |_, _| read(&path, offset, limit)).await?;
        Ok(reply(&params.path, part, offset, encoding))
    }
}

/// A part of a file, by bytes.
struct Part {
    size: u64,
    bytes: Vec<u8>,
    eof: bool,
}

fn read(path: &Path, offset: u64, limit: usize) -> Result<Part, ToolError> {
    let file = open_regular("read", path)?;
    let size = file.metadata().map_err(|error| failed("read", path, error))?.len();
    // One byte more shows whether the end was reached, even in files of /proc, whose size is 0.
    let mut bytes = vec![0; limit + 1];
    let mut length = 0;
    while length < bytes.len() {
        match file.read_at(&mut bytes[length..], offset + length as u64) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A file of /proc without more data at the moment.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(failed("read", path, error)),
        }
    }
    bytes.truncate(length);
    let eof = length <= limit;
    bytes.truncate(limit);
    Ok(Part { size, bytes, eof })
}

/// Opens a file for reading, if it is a regular one.
pub(super) fn open_regular(what: &str, path: &Path) -> Result<File, ToolError> {
    let refer = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let refer = refer.map_err(|error| failed(what, path, error))?;
    let stat = rustix::fs::fstat(&refer).map_err(|error| failed(what, path, error))?;
    match Kind::from_raw_mode(stat.st_mode) {
        Kind::RegularFile => {}
        Kind::Directory => {
            return Err(not_regular(what, path, Kind::Directory).hint("call guest_file_list"));
        }
        other => return Err(not_regular(what, path, other)),
    }
    let again = format!("/proc/self/fd/{}", refer.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(again, flags, Mode::empty()).map_err(|error| failed(what, path, error))?;
    Ok(File::from(file))
}

fn reply(path: &str, part: Part, offset: u64, encoding: ContentEncoding) -> Reply<FileReadOutput> {
    let Part { size, mut bytes, mut eof } = part;
    let (text, lossy) = match encoding {
        ContentEncoding::Base64 => (data_encoding::BASE64.encode(&bytes), false),
        ContentEncoding::Text => {
            // A character that is cut at the end of this part belongs to the next part.
            let cut = if eof { 0 } else { incomplete_end(&bytes) };
            if cut < bytes.len() {
                bytes.truncate(bytes.len() - cut);
            }
            eof = eof && cut == 0;
            decode(&bytes)
        }
    };
    let read = bytes.len() as u64;
    let mut header = format!("{} · {}", shown(path), human_bytes(read));
    if offset > 0 || !eof {
        header.push_str(&format!(" from byte {offset}"));
        if size > 0 {
            header.push_str(&format!(" of {size}"));
        }
    }
    if eof {
        header.push_str(" · to the end");
    } else {
        header.push_str(&format!(" · continues at offset {}", offset + read));
    }
    if lossy {
        header.push_str("\nnot UTF-8, bytes were replaced; encoding base64 gives them exactly");
    }
    let (from_line, lines) = (None, None);
    let facts = FileReadOutput { size_bytes: size, offset, read_bytes: read, eof, lossy, from_line, lines };
    let mut reply = Reply::new(header, facts);
    if !text.is_empty() {
        reply.blocks.push(Block::stream("content", text));
    }
    reply
}
