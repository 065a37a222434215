//! Local files for a new VM.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::vm::VmFile;

use crate::ctl::error::Error;

/// A local file: its content and its permission bits.
pub(super) fn read(path: PathBuf) -> Result<VmFile, Error> {
    match content(&path) {
        Ok(file) => Ok(file),
        Err(source) => Err(Error::File { what: "read the file", path, source }),
    }
}

fn content(path: &Path) -> std::io::Result<VmFile> {
    let mode = std::fs::metadata(path)?.permissions().mode() & 0o7777;
    let (content, encoding) = match String::from_utf8(std::fs::read(path)?) {
        Ok(text) => (text, None),
        Err(binary) => (BASE64.encode(binary.as_bytes()), Some(ContentEncoding::Base64)),
    };
    Ok(VmFile { content, encoding, mode: Some(format!("{mode:04o}")), user: None })
}
