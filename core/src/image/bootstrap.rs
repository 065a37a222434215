//! A root filesystem from a distribution's packages, by `mmdebstrap`, as a tar stream that never touches the disk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempPath;

use super::ImageError;
use crate::op::Progress;
use crate::os::tls::Trust;
use crate::os::tool::{ProgramError, Running, Tool};

/// What is in every such image beside the essential packages.
pub const PACKAGES: [&str; 5] = ["bash", "coreutils", "apt", "ca-certificates", "python3-minimal"];

/// Options of apt stay in what is made, where that file of the host is not: an apt that is told of it trusts nobody.
const FORGET_AUTHORITIES: &str =
    "--customize-hook=sed -i '/^Acquire::https::CAInfo /d' \"$1/etc/apt/apt.conf.d/99mmdebstrap\"";

/// What `mmdebstrap` says of its own affairs: for the log only.
const ITS_OWN: [&str; 6] =
    ["chroot architecture", "finding correct", "using ", "removing tempdir", "success in", "done"];

/// How long it may take; a mirror far away is slow.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Where packages come from. Nothing is taken from the host's configuration that is not in here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// One-line entries (`deb URI SUITE COMPONENT`); they are the image's `sources.list`, too.
    pub mirrors: Vec<String>,
    /// The suite, such as `bookworm`.
    pub suite: String,
    /// The keys that sign it: a file or a directory of such files.
    pub keyring: PathBuf,
    /// The distribution with its version, such as `debian-12`.
    pub distro: String,
    /// The proxy for HTTP, if any.
    pub proxy: Option<String>,
    /// Whether an index's end of validity counts.
    pub check_valid_until: bool,
    /// Whose certificates mirrors with TLS may have.
    pub trust: Trust,
    /// Where `mmdebstrap` is, if not in the usual directories.
    pub program: Option<PathBuf>,
    /// Packages beside the essential ones; [`PACKAGES`] by default.
    pub packages: Vec<String>,
}

/// An `mmdebstrap` that runs.
struct Started {
    running: Running,
    /// What it writes: a tar archive.
    pipe: File,
    /// Is there as long as it runs.
    _authorities: Option<TempPath>,
}

impl Bootstrap {
    /// Runs `mmdebstrap`; `read` gets the tar archive that it writes. Its temporary files go to `scratch` where it can use that.
    pub(crate) async fn run<T, F>(
        &self,
        scratch: &Path,
        progress: &Progress,
        read: impl FnOnce(File) -> F,
    ) -> Result<T, ImageError>
    where
        F: Future<Output = Result<T, ImageError>>,
    {
        let Started { running, pipe, _authorities } = self.start(scratch)?;
        let ended = running.wait(progress.token(), |line| Self::show(line, progress));
        let (read, ended) = tokio::join!(read(pipe), ended);
        progress.check()?;
        // A reader that stopped early makes the writer fail; a writer that failed leaves half an archive.
        match (read, ended) {
            (Err(error @ (ImageError::DiskFull { .. } | ImageError::TooLarge { .. })), _) => Err(error),
            (_, Err(error)) => Err(error.into()),
            (read, Ok(_)) => read,
        }
    }

    /// Looks whether all is here that it takes, and gives the program.
    pub(crate) fn check(&self) -> Result<Tool, ImageError> {
        Tool::find("apt-get")?;
        if !rustix::process::geteuid().is_root() {
            // Its namespace needs it.
            Tool::find("newuidmap")?;
        }
        Ok(match &self.program {
            Some(path) => Tool::at("mmdebstrap", path)?,
            None => Tool::find("mmdebstrap")?,
        })
    }

    fn start(&self, scratch: &Path) -> Result<Started, ImageError> {
        let root = rustix::process::geteuid().is_root();
        let tool = self.check()?;
        let mut call = tool
            .call()
            .args(["--variant=minbase", "--format=tar", "--aptopt=Acquire::Languages \"none\""])
            .arg(format!("--mode={}", if root { "root" } else { "unshare" }))
            .arg(format!("--include={}", self.packages.join(",")))
            .arg(format!("--keyring={}", self.keyring.display()))
            .args(["man", "doc", "info", "locale"].into_iter().flat_map(without))
            .args([
                "--dpkgopt=path-include=/usr/share/doc/*/copyright",
                "--dpkgopt=path-include=/usr/share/locale/locale.alias",
            ])
            .timeout(TIMEOUT);
        // The users of its namespace do not get into this user's directories.
        if root {
            call = call.env("TMPDIR", scratch);
        }
        if let Some(proxy) = &self.proxy {
            call = call.arg(format!("--aptopt=Acquire::http::Proxy \"{proxy}\""));
        }
        let authorities = self.trust.bundle().map_err(|e| ImageError::write(scratch, e))?;
        if let Some(file) = &authorities {
            call = call
                .arg(format!("--aptopt=Acquire::https::CAInfo \"{}\"", file.display()))
                .arg(FORGET_AUTHORITIES);
        }
        if !self.check_valid_until {
            call = call.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
        }
        let mut running = call.arg("--").arg(&self.suite).arg("-").args(&self.mirrors).start()?;
        let pipe = running.stdout().ok_or(ImageError::Worker)?;
        let pipe = pipe.into_owned_fd().map_err(|e| ImageError::source(tool.path(), e))?;
        Ok(Started { running, pipe: File::from(pipe), _authorities: authorities })
    }

    /// Shows a line of what `mmdebstrap` says: as a step, or in the log only.
    fn show(line: &[u8], progress: &Progress) {
        let text = String::from_utf8_lossy(line);
        match text.strip_prefix("I: ") {
            Some(said) if ITS_OWN.iter().any(|own| said.starts_with(own)) => progress.log(said),
            Some(step) => progress.step(step.trim_end_matches("...").chars().take(100).collect::<String>()),
            None => progress.log(&text),
        }
    }
}

/// What to do about an `mmdebstrap` that failed, where that can be told.
pub(super) fn hint(error: &ProgramError) -> Option<String> {
    let ProgramError::Failed { name: "mmdebstrap", stderr, .. } = error else { return None };
    let package = missing_package(stderr)?;
    Some(format!(
        "the archive of the host's apt has no package {package}: correct its name in the template, or leave it out \
         (template_update), then call build_start again"
    ))
}

/// The package that apt says it does not find.
fn missing_package(said: &str) -> Option<&str> {
    let name = match said.split_once("E: Unable to locate package ") {
        Some((_, rest)) => rest.split_whitespace().next()?,
        None => said.split_once("' has no installation candidate")?.0.rsplit_once('\'')?.1,
    };
    let is_sound = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.:".contains(&byte));
    (is_sound && !name.is_empty()).then_some(name)
}

/// Options that leave a directory of documentation out of the image.
fn without(what: &str) -> [String; 1] {
    [format!("--dpkgopt=path-exclude=/usr/share/{what}/*")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_there_is_not_is_found_in_what_apt_says() {
        for (said, package) in [
            (
                "Reading package lists...\nE: Unable to locate package no-such+1.0\nE: setup failed",
                Some("no-such+1.0"),
            ),
            ("Package foo is not available\nE: Package 'foo' has no installation candidate\n", Some("foo")),
            ("E: Unable to locate package $(rm)", None),
            ("E: Unable to locate package", None),
            ("E: apt-get update failed", None),
        ] {
            assert_eq!(missing_package(said), package, "{said}");
        }
    }
}
