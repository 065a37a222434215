//! The exported audit log: JSON lines in a file, which is replaced when it is full.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::config::AuditFile as Settings;
use crate::store::calls::CallRecord;

/// The file, and how much is in it.
#[derive(Debug)]
pub(super) struct AuditFile {
    settings: Settings,
    open: Option<(File, u64)>,
}

impl AuditFile {
    pub(super) fn new(settings: Settings) -> Self {
        Self { settings, open: None }
    }

    /// Appends a line for each call. A failed write leaves no part of a line. Blocks.
    pub(super) fn append(&mut self, calls: &[CallRecord]) -> io::Result<()> {
        let mut lines = String::new();
        for call in calls {
            lines.push_str(&call.line());
            lines.push('\n');
        }
        if self
            .open
            .as_ref()
            .is_some_and(|(_, size)| *size > 0 && size + lines.len() as u64 > self.settings.max_bytes)
        {
            self.open = None;
            self.rotate()?;
        }
        let (mut file, size) = match self.open.take() {
            Some(open) => open,
            None => open(&self.settings.path)?,
        };
        if let Err(error) = file.write_all(lines.as_bytes()) {
            file.set_len(size)?;
            return Err(error);
        }
        self.open = Some((file, size + lines.len() as u64));
        Ok(())
    }

    /// Makes room: `audit.jsonl` becomes `audit.jsonl.1`, that becomes `.2`, and the last one goes.
    fn rotate(&self) -> io::Result<()> {
        let numbered = |number: u32| {
            let mut name = self.settings.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        for number in (1..self.settings.keep).rev() {
            rename(&numbered(number), &numbered(number + 1))?;
        }
        match self.settings.keep {
            0 => std::fs::remove_file(&self.settings.path),
            _ => rename(&self.settings.path, &numbered(1)),
        }
    }
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(tool: &'static str) -> CallRecord {
        CallRecord { tool: tool.into(), ..crate::store::tests::call() }
    }

    #[test]
    fn a_full_file_is_replaced_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let line = call("vm_list").line().len() as u64 + 1;
        let mut file = AuditFile::new(Settings { path: path.clone(), max_bytes: line * 2, keep: 2 });
        for _ in 0..9 {
            file.append(&[call("vm_list")]).unwrap();
        }
        let lines = |name: &str| fs_err::read_to_string(directory.path().join(name)).unwrap().lines().count();
        assert_eq!([lines("audit.jsonl"), lines("audit.jsonl.1"), lines("audit.jsonl.2")], [1, 2, 2]);
        assert!(!directory.path().join("audit.jsonl.3").exists());
        let text = fs_err::read_to_string(&path).unwrap();
        let value: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(
            (&value["tool"], &value["rule"], &value["vm"]),
            (&"vm_list".into(), &"owner".into(), &serde_json::Value::Null)
        );
        // A later daemon goes on in the same file.
        drop(file);
        let mut file = AuditFile::new(Settings { path, max_bytes: line * 2, keep: 2 });
        file.append(&[call("vm_list")]).unwrap();
        assert_eq!(lines("audit.jsonl"), 2);
    }
}
