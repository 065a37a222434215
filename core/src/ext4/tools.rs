//! The programs that check filesystems, and change imported ones.
//!
//! `debugfs` reports failures only as text: every unexpected line is a failure.

use std::path::Path;
use std::time::Duration;

use super::Ext4Error;
use crate::os::shown::printable;
use crate::os::tool::{Call, ProgramError, Tool};
use crate::progress::Progress;

/// The timeout of a tool for one filesystem.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// The required programs.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    debugfs: Tool,
    e2fsck: Tool,
}

impl Tools {
    pub(crate) fn find() -> Result<Self, ProgramError> {
        Ok(Self { debugfs: Tool::find("debugfs")?, e2fsck: Tool::find("e2fsck")? })
    }

    /// Runs a `debugfs` script on an imported filesystem. The script and the files that it uses are in `directory`, which the
    /// program's user must be able to read. Any unexpected output of `debugfs` is a failure.
    pub(crate) async fn change(
        &self,
        file: &Path,
        script: &str,
        directory: &Path,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let call = self.debugfs.call().args(["-w", "-f", script]).disk(file).directory(directory);
        let mut unexpected: Option<String> = None;
        // After a failure the rest of the script is useless.
        let stop = progress.token().child_token();
        let ended = call
            .timeout(TIMEOUT)
            .run_lines(&stop, |line| {
                if !line.starts_with(b"debugfs: ") && !is_expected(line) && unexpected.is_none() {
                    unexpected = Some(printable(line));
                    stop.cancel();
                }
            })
            .await;
        progress.check()?;
        if let Some(said) = unexpected {
            return Err(fill_error(file, said));
        }
        let finished = ended.map_err(|e| full_or(file, e))?;
        // The first line on stderr is its version; everything else is an error.
        let mut said = finished.stderr.lines().filter(|line| !line.starts_with("debugfs 1."));
        match said.next() {
            Some(line) => Err(fill_error(file, printable(line.as_bytes()))),
            None => Ok(()),
        }
    }

    /// The output of a read-only `debugfs` command, at most `max` bytes.
    pub(crate) async fn ask(
        &self,
        file: &Path,
        command: &str,
        max: usize,
        progress: &Progress,
    ) -> Result<Vec<u8>, Ext4Error> {
        let mut said = Vec::new();
        self.debugfs
            .call()
            .args(["-R", command])
            .disk_to_read(file)
            .timeout(TIMEOUT)
            .run_lines(progress.token(), |line| {
                if said.len() + line.len() < max {
                    said.extend_from_slice(line);
                    said.push(b'\n');
                }
            })
            .await?;
        Ok(said)
    }

    /// Checks a filesystem without changing it; an error in it is a failure.
    pub(crate) async fn check(&self, file: &Path, progress: &Progress) -> Result<(), Ext4Error> {
        self.fsck(self.e2fsck.call().arg("-fn").disk_to_read(file), file, &[0], progress).await
    }

    /// Replays a filesystem's journal and makes safe repairs.
    pub(crate) async fn recover(&self, file: &Path, progress: &Progress) -> Result<(), Ext4Error> {
        self.fsck(self.e2fsck.call().arg("-fp").disk(file), file, &[0, 1, 2], progress).await
    }

    async fn fsck(
        &self,
        call: Call,
        file: &Path,
        fine: &[i32],
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let mut said = String::new();
        let ended = call
            .timeout(TIMEOUT)
            .success(fine)
            .run_lines(progress.token(), |line| {
                if said.len() < 1000 && !line.starts_with(b"Pass ") {
                    said.push_str(&printable(line));
                    said.push(' ');
                }
            })
            .await;
        match ended {
            Ok(_) => Ok(()),
            Err(ProgramError::Failed { stderr, .. }) => {
                Err(Ext4Error::Check { said: format!("{} {}", said.trim(), stderr).trim().to_owned() })
            }
            Err(other) => Err(full_or(file, other)),
        }
    }
}

/// Quotes a word for a `debugfs` command.
pub(crate) fn quote(word: &[u8]) -> Vec<u8> {
    let mut quoted = Vec::with_capacity(word.len() + 2);
    quoted.push(b'"');
    for byte in word {
        if *byte == b'"' {
            quoted.push(b'"');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    quoted
}

/// Whether a line of output is expected: `write` names the inode, and `rm` ends with an empty line.
fn is_expected(line: &[u8]) -> bool {
    if line.is_empty() {
        return true;
    }
    let number = line.strip_prefix(b"Allocated inode: ");
    number.is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit))
}

fn fill_error(file: &Path, said: String) -> Ext4Error {
    if said.contains("No space left on device") { full(file) } else { Ext4Error::Fill { said } }
}

/// A program's failure, or a full disk if that caused it.
fn full_or(file: &Path, error: ProgramError) -> Ext4Error {
    match error {
        ProgramError::Failed { ref stderr, .. } if stderr.contains("No space left on device") => full(file),
        other => other.into(),
    }
}

fn full(file: &Path) -> Ext4Error {
    Ext4Error::full(file.parent().unwrap_or(file), 0)
}
