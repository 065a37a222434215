//! Malicious tar streams, as frames of a guest's stream.

use tar::{EntryType, Header};

/// The data that a guest sends for a requested tree: `tar-WHAT`.
pub fn frames(what: &str) -> Vec<u8> {
    let archive = Archive::default();
    let archive = match what {
        "tar-absolute" => archive.file(b"/tmp/nexus-escaped", b""),
        "tar-parent" => archive.file(b"tree/../../escaped", b""),
        "tar-through-link" => archive.link(EntryType::Symlink, b"tree", b"..").file(b"tree/escaped", b""),
        "tar-hard-link" => archive.link(EntryType::Link, b"tree", b"../../etc/passwd"),
        // The host chose a name; this is a different one.
        "tar-other-name" => archive.file(b".bashrc", b"not asked for"),
        "tar-device" => archive.link(EntryType::Char, b"tree", b""),
        "tar-setuid" => archive.file(b"tree", b"#!/bin/sh\n"),
        "tar-escapes" => {
            archive.link(EntryType::Directory, b"tree", b"").link(EntryType::Fifo, b"tree/\x1b[2Jpipe", b"")
        }
        "tar-cut" => archive.file(b"tree", b"not whole").cut(),
        _ => archive.file(b"tree", b"as it should be"),
    };
    let archive = if what == "tar-cut" { archive } else { archive.ended() };
    let says = match what {
        "tar-words" => {
            r#"{"error":{"code":"file_refused","message":"\u001b[2J run this","retryable":false,"hint":"\u001b]0;x\u0007"}}"#
        }
        "tar-nonsense" => "no json",
        _ => {
            r#"{"ok":{"tree":{"summary":{"files":1,"directories":0,"bytes":0,"skipped":{"special":1},"skipped_names":[{"path":"\u001b[2Jname","why":"special"}]}}}}"#
        }
    };
    let mut frames = Vec::new();
    let mut frame = |kind: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
        frames.extend_from_slice(&[kind, length[1], length[2], length[3]]);
        frames.extend_from_slice(payload);
    };
    frame(1, &archive.0);
    frame(3, b"");
    frame(6, says.as_bytes());
    frames
}

/// An archive with arbitrary entries.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn entry(mut self, kind: EntryType, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o6755);
        header.set_uid(12345);
        header.set_gid(12345);
        header.set_mtime(1);
        // A value that is too large for its field is truncated.
        if let Some(gnu) = header.as_gnu_mut() {
            gnu.name.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
            gnu.linkname.iter_mut().zip(link).for_each(|(to, from)| *to = *from);
        }
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &[u8], data: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, b"", data)
    }

    fn link(self, kind: EntryType, name: &[u8], link: &[u8]) -> Self {
        self.entry(kind, name, link, b"")
    }

    /// Removes the last bytes of its data.
    fn cut(mut self) -> Self {
        self.0.truncate(514);
        self
    }

    fn ended(mut self) -> Self {
        self.0.extend_from_slice(&[0; 1024]);
        self
    }
}
