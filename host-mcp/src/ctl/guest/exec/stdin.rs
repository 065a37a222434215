//! The standard input of a command in a VM: empty unless requested.
//!
//! The rule is docker's, with one addition: `-i` passes standard input on, whatever it is. A redirected file (`< FILE`) is
//! passed on too, unless something was already read from it. A pipe, a terminal or a partly read file is not touched, so that
//! `while read NAME; do nexusctl guest run $NAME -- true; done` sees all of its lines.

use std::io::Read;

use crate::ctl::error::Error;
use crate::ctl::format;
use crate::ctl::stream::is_fresh_file;

/// The most input that safely fits in one call, in bytes.
const STDIN_MAX: usize = 2 << 20;

/// All of standard input, if it should be passed on.
pub(super) async fn read(asked: bool, refused: bool) -> Result<Option<Vec<u8>>, Error> {
    if refused || !(asked || is_fresh_file(std::io::stdin())) {
        return Ok(None);
    }
    let reading =
        tokio::task::spawn_blocking(|| read_all(std::io::stdin().lock(), STDIN_MAX, "standard input"));
    tokio::select! {
        result = reading => match result {
            Ok(read) => read.map(Some),
            Err(_) => Err(Error::Unexpected { what: "the reader of standard input was lost".into() }),
        },
        _ = tokio::signal::ctrl_c() => Err(Error::Interrupted),
    }
}

/// Reads everything, up to a limit.
fn read_all(reader: impl Read, max: usize, what: &str) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    reader.take(limit).read_to_end(&mut bytes).map_err(|source| Error::Input { source })?;
    if bytes.len() > max {
        let max = format::size(u64::try_from(max).unwrap_or(u64::MAX));
        return Err(Error::Usage {
            message: format!("{what} is more than {max}"),
            hint: Some(
                "write it to a file in the VM with `nexusctl guest write`, and make the command read that file"
                    .into(),
            ),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn input_is_capped() {
        assert_eq!(read_all(&b"abc"[..], 3, "input").unwrap(), b"abc");
        assert_eq!(read_all(&b"abcd"[..], 3, "input").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_file_counts_from_its_beginning_only() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one\ntwo\n").unwrap();
        file.rewind().unwrap();
        assert!(is_fresh_file(&file));
        file.read_exact(&mut [0; 4]).unwrap();
        assert!(!is_fresh_file(&file));
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(!is_fresh_file(reader));
        assert!(!is_fresh_file(std::fs::File::open("/dev/null").unwrap()));
    }
}
