//! The list of packages of one component. It is streamed; only the wanted stanzas are kept.

use std::io::{BufRead, BufReader, Read};

use crate::asset::error::IndexProblem;
use crate::asset::stream::{Compression, OverLimit, Sha256, capped, decompressed};

/// The most that a list may unpack to. (Debian's `main` has some 50 MB, Ubuntu's `universe` 70 MB.)
const MAX_UNPACKED: u64 = 1 << 30;
/// The longest line.
const MAX_LINE: u64 = 1 << 20;

/// One package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// Its path below the archive's root.
    pub(crate) filename: String,
    pub(crate) size: u64,
    pub(crate) sha256: Sha256,
}

/// The packages of a compressed list whose name is wanted.
pub(crate) fn select(
    list: &[u8],
    compression: Compression,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Vec<Package>, IndexProblem> {
    let damaged = |e: std::io::Error| match OverLimit::in_error(&e) {
        Some(limit) => IndexProblem::Damaged(limit.to_string()),
        None => IndexProblem::Damaged(e.to_string()),
    };
    let reader = capped(decompressed(list, compression).map_err(damaged)?, MAX_UNPACKED);
    let mut reader = BufReader::with_capacity(128 << 10, reader);
    let mut found = Vec::new();
    let mut stanza = Draft::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).map_err(damaged)?;
        if n as u64 == MAX_LINE && line.last() != Some(&b'\n') {
            return Err(IndexProblem::Damaged(OverLimit { limit: MAX_LINE }.to_string()));
        }
        let text = line.trim_ascii_end();
        if text.is_empty() {
            found.extend(std::mem::take(&mut stanza).package()?);
            if n == 0 {
                return Ok(found);
            }
        } else if let Some(name) = text.strip_prefix(b"Package:") {
            let name = String::from_utf8_lossy(name.trim_ascii()).into_owned();
            stanza = Draft { is_wanted: wanted(&name), name, ..Draft::default() };
        } else if stanza.is_wanted {
            stanza.field(text);
        }
    }
}

/// A stanza that is being read.
#[derive(Default)]
struct Draft {
    is_wanted: bool,
    name: String,
    version: Option<String>,
    filename: Option<String>,
    size: Option<u64>,
    sha256: Option<Sha256>,
}

impl Draft {
    fn field(&mut self, line: &[u8]) {
        let Some(colon) = line.iter().position(|b| *b == b':') else { return };
        let value = || String::from_utf8_lossy(line[colon + 1..].trim_ascii()).into_owned();
        match &line[..colon] {
            b"Version" => self.version = Some(value()),
            b"Filename" => self.filename = Some(value()),
            b"Size" => self.size = value().parse().ok(),
            b"SHA256" => self.sha256 = value().parse().ok(),
            _ => {}
        }
    }

    fn package(self) -> Result<Option<Package>, IndexProblem> {
        if !self.is_wanted {
            return Ok(None);
        }
        let filename = self.filename.ok_or(IndexProblem::Field("Filename"))?;
        if !is_safe(&filename) {
            return Err(IndexProblem::UnsafePath(filename));
        }
        Ok(Some(Package {
            name: self.name,
            version: self.version.ok_or(IndexProblem::Field("Version"))?,
            filename,
            size: self.size.ok_or(IndexProblem::Field("Size"))?,
            sha256: self.sha256.ok_or(IndexProblem::Field("SHA256"))?,
        }))
    }
}

/// Whether a path stays below the archive's root and contains nothing special in a URL.
fn is_safe(path: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.+~:%".contains(&b);
    path.bytes().all(plain)
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        // `%2e%2e/` is `../` too.
        && !path.to_ascii_lowercase().contains("%2")
        && !path.split('/').next().unwrap_or_default().contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn select_plain(text: &str) -> Result<Vec<Package>, IndexProblem> {
        select(text.as_bytes(), Compression::Plain, &|name| name.starts_with("linux-"))
    }

    #[test]
    fn wanted_stanzas_are_kept() {
        let stanza = |name: &str| {
            format!(
                "Package: {name}\nVersion: 1:2-3\nDescription: x\n Version: 9\nFilename: pool/main/l/{name}_2-3_amd64.deb\n\
                 Size: 7\nSHA256: {HASH}\n"
            )
        };
        let text = format!("{}\n{}\n\n{}", stanza("linux-a"), stanza("other"), stanza("linux-b"));
        let found = select_plain(&text).unwrap();
        assert_eq!(found.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["linux-a", "linux-b"]);
        assert_eq!((found[0].version.as_str(), found[0].size), ("1:2-3", 7));
    }

    #[test]
    fn paths_that_leave_the_archive_are_refused() {
        for path in [
            "../x.deb",
            "/etc/x",
            "pool/../../x",
            "pool//x",
            "http://h/x",
            "a:b/x",
            "pool/%2e%2e/x",
            "pool/x?y",
            "pool/x y",
        ] {
            let text = format!("Package: linux-a\nVersion: 1\nFilename: {path}\nSize: 7\nSHA256: {HASH}\n");
            assert!(matches!(select_plain(&text), Err(IndexProblem::UnsafePath(_))), "{path}");
        }
    }

    #[test]
    fn wanted_stanzas_must_be_whole_and_others_not() {
        assert_eq!(select_plain("Package: other\nSize: many\n").unwrap(), []);
        assert!(select_plain("Package: linux-a\nVersion: 1\nFilename: x\nSize: many\n").is_err());
        let endless = format!("Package: linux-a\nX: {}\n", "y".repeat(2 << 20));
        assert!(matches!(select_plain(&endless), Err(IndexProblem::Damaged(_))));
        assert!(matches!(select(b"not xz", Compression::Xz, &|_| true), Err(IndexProblem::Damaged(_))));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
            let _ = select(&bytes, Compression::Plain, &|_| true);
        }
    }
}
