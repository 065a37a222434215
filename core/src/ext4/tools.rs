//! The programs that make, fill and check filesystems.
//!
//! `mke2fs` makes an empty filesystem, a `debugfs` script fills it, and `e2fsck` checks it. `debugfs` reports failures only as text: every line that is not expected is one.
//!
//! The features are named one by one, so that the host's `mke2fs.conf` changes nothing: kernels from 5.10 on mount the
//! result and grow it online; descriptors for [`GROWTH`] are reserved (half a mebibyte), and past that kernels go on in
//! their own way (`meta_bg`).

use std::path::Path;
use std::time::Duration;

use fs_err as fs;

use super::Ext4Error;
use super::geometry::{BLOCK, Geometry, JOURNAL_MIB, inodes};
use crate::os::shown::printable;
use crate::os::tool::{Call, ProgramError, Tool};
use crate::progress::Progress;

/// Up to which size a filesystem grows online within its reserved descriptors.
const GROWTH: u64 = 1 << 40;
/// What makes the filesystem, beside nothing.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
    large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// The same for one that is never written to again.
const FEATURES_READ_ONLY: &str = "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,dir_nlink,extra_isize,metadata_csum";
/// How long a tool may work on one filesystem.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// The programs that this needs.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    mke2fs: Tool,
    debugfs: Tool,
    e2fsck: Tool,
}

impl Tools {
    pub(crate) fn find() -> Result<Self, ProgramError> {
        Ok(Self {
            mke2fs: Tool::find("mke2fs")?,
            debugfs: Tool::find("debugfs")?,
            e2fsck: Tool::find("e2fsck")?,
        })
    }

    /// Makes an empty filesystem in a new sparse file.
    pub(crate) async fn make(
        &self,
        file: &Path,
        geometry: Geometry,
        label: Option<&str>,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let created = fs::File::create_new(file).and_then(|f| f.set_len(geometry.blocks * BLOCK));
        created.map_err(|e| Ext4Error::io(file, e))?;
        self.format(file, geometry, label, progress).await
    }

    /// Makes an empty filesystem in a sparse file that is as long.
    async fn format(
        &self,
        file: &Path,
        geometry: Geometry,
        label: Option<&str>,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let mut extended =
            "assume_storage_prezeroed=1,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,nodiscard"
                .to_owned();
        if geometry.blocks < GROWTH / BLOCK {
            extended.push_str(&format!(",resize={}", GROWTH / BLOCK));
        }
        // A journal takes at most a part of a small filesystem.
        let journal_mib = if geometry.blocks * BLOCK < 64 << 20 { JOURNAL_MIB.min(4) } else { JOURNAL_MIB };
        let mut call = self
            .mke2fs
            .call()
            .args([
                "-q",
                "-F",
                "-b",
                "4096",
                "-I",
                "256",
                "-m",
                "0",
                "-e",
                "remount-ro",
                "-o",
                "Linux",
                "-O",
                FEATURES,
            ])
            .arg("-N")
            .arg(geometry.inodes.to_string())
            .arg("-J")
            .arg(format!("size={journal_mib}"))
            .arg("-E")
            .arg(extended);
        if let Some(label) = label {
            call = call.arg("-L").arg(label);
        }
        let made =
            call.disk(file).arg(geometry.blocks.to_string()).timeout(TIMEOUT).run(progress.token()).await;
        made.map_err(|e| full_or(file, e))?;
        Ok(())
    }

    /// Makes an empty filesystem, to be filled and then never written to again, in a new sparse file.
    pub(crate) async fn make_read_only(
        &self,
        file: &Path,
        geometry: Geometry,
        label: &str,
        uuid: &str,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let created = fs::File::create_new(file).and_then(|f| f.set_len(geometry.blocks * BLOCK));
        created.map_err(|e| Ext4Error::io(file, e))?;
        let extended = "assume_storage_prezeroed=1,lazy_itable_init=1,root_owner=0:0,nodiscard";
        let call = self
            .mke2fs
            .call()
            .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-o", "Linux", "-O", FEATURES_READ_ONLY])
            .args(["-E", extended, "-L", label, "-U", uuid, "-N"])
            .arg(geometry.inodes.to_string())
            .disk(file)
            .arg(geometry.blocks.to_string());
        call.timeout(TIMEOUT).run(progress.token()).await.map_err(|e| full_or(file, e))?;
        Ok(())
    }

    /// Runs a `debugfs` script over a filesystem that was just made here.
    pub(crate) async fn run_script(
        &self,
        file: &Path,
        script: &Path,
        directory: &Path,
        commands: Option<u64>,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let call = self.debugfs.call().args(["-w", "-f"]).arg(script).arg(file).directory(directory);
        self.follow_script(file, call, commands, progress).await
    }

    /// Runs a `debugfs` script over a filesystem that others wrote. The script and what it names are in `directory`, which the
    /// program's user must be able to read.
    pub(crate) async fn change(
        &self,
        file: &Path,
        script: &str,
        directory: &Path,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let call = self.debugfs.call().args(["-w", "-f", script]).disk(file).directory(directory);
        self.follow_script(file, call, None, progress).await
    }

    /// Runs a script; whatever `debugfs` says beside the expected is a failure.
    async fn follow_script(
        &self,
        file: &Path,
        call: Call,
        commands: Option<u64>,
        progress: &Progress,
    ) -> Result<(), Ext4Error> {
        let mut done: u64 = 0;
        let mut unexpected: Option<String> = None;
        // Once something went wrong the rest of the script is of no use.
        let stop = progress.token().child_token();
        let ended = call
            .timeout(TIMEOUT)
            .run_lines(&stop, |line| {
                if line.starts_with(b"debugfs: ") {
                    done += 1;
                    if done.is_multiple_of(2000) {
                        progress.advance(done, commands);
                    }
                } else if !is_expected(line) && unexpected.is_none() {
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
        // Its first line of error output is its version; everything else is an error.
        let mut said = finished.stderr.lines().filter(|line| !line.starts_with("debugfs 1."));
        match said.next() {
            Some(line) => Err(fill_error(file, printable(line.as_bytes()))),
            None => Ok(()),
        }
    }

    /// What a read-only `debugfs` command says, at most `max` bytes of it.
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

    /// Looks a filesystem over and changes nothing; an error in it is a failure.
    pub(crate) async fn check(&self, file: &Path, progress: &Progress) -> Result<(), Ext4Error> {
        self.fsck(self.e2fsck.call().arg("-fn").disk_to_read(file), file, &[0], progress).await
    }

    /// Replays a filesystem's journal and puts right what can be put right safely.
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

/// Makes an empty filesystem in a sparse file, as long as that is: for data drives.
pub(crate) async fn format(file: &Path, label: &str, progress: &Progress) -> Result<(), Ext4Error> {
    let blocks = fs::metadata(file).map_err(|e| Ext4Error::io(file, e))?.len() / BLOCK;
    let geometry = Geometry { blocks, inodes: inodes(blocks, 0) };
    Tools::find()?.format(file, geometry, Some(label), progress).await
}

/// A word of a `debugfs` command.
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

/// Whether a line of output is no complaint: `write` names the inode, and `rm` ends in an empty line.
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

/// A program's failure, unless the disk is what it failed for.
fn full_or(file: &Path, error: ProgramError) -> Ext4Error {
    match error {
        ProgramError::Failed { ref stderr, .. } if stderr.contains("No space left on device") => full(file),
        other => other.into(),
    }
}

fn full(file: &Path) -> Ext4Error {
    Ext4Error::full(file.parent().unwrap_or(file), 0)
}
