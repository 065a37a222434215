//! A root filesystem from a distribution's packages: `mmdebstrap` makes it as a tar stream that never touches the disk.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempPath;

use super::ImageError;
use crate::config::{Environment, Secret};
use crate::os::subids;
use crate::os::tls::Trust;
use crate::os::tool::{ProgramError, Running, Tool};
use crate::progress::Progress;

/// Packages that the default image has in addition to [`PACKAGES`], so that it is useful for work at once.
pub const FOR_WORK: [&str; 9] =
    ["python3", "python3-venv", "python3-pip", "git", "curl", "procps", "less", "patch", "unzip"];
/// Packages that every such image has in addition to the essential ones. `kmod` because a VM has all modules of its kernel, and
/// some units of systemd need it.
pub const PACKAGES: [&str; 6] = ["bash", "coreutils", "apt", "ca-certificates", "kmod", "python3-minimal"];

/// Configures apt while it runs here, readable by nobody else. The values are passed in the environment, because arguments are
/// visible to all.
const TELL: &str = "--setup-hook=umask 077; mkdir -p \"$1/etc/apt/auth.conf.d\"; \
    printf %s \"$NEXUS_APT_CONF\" > \"$1/etc/apt/apt.conf.d/99nexus-host\"; \
    printf %s \"$NEXUS_APT_AUTH\" > \"$1/etc/apt/auth.conf.d/nexus-host.conf\"";

/// Removes what belongs to the host only: proxies, passwords and CAs, which may be secret or unreachable elsewhere; keyring
/// paths that may not exist there; the host name and the name servers.
const FORGET: &str = "--customize-hook=rm \"$1/etc/apt/apt.conf.d/99nexus-host\" \"$1/etc/apt/auth.conf.d/nexus-host.conf\"; \
    sed -i 's/ \\?signed-by=[^] ]*//; s/\\[ */[/; s/\\[\\] //' \"$1/etc/apt/sources.list\"; \
    : > \"$1/etc/resolv.conf\"; echo nexus > \"$1/etc/hostname\"";

/// Messages of `mmdebstrap` about its internals: only for the log.
const ITS_OWN: [&str; 7] = [
    "chroot architecture",
    "finding correct",
    "running --",
    "using ",
    "removing tempdir",
    "success in",
    "done",
];

/// The timeout; a distant mirror is slow.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Where packages come from. Nothing else of the host's configuration is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootstrap {
    /// One-line entries (`deb URI SUITE COMPONENT`); they are the image's `sources.list`, too.
    pub mirrors: Vec<String>,
    /// The suite, such as `bookworm`.
    pub suite: String,
    /// The keys that sign it: a keyring file, or a directory of them.
    pub keyring: PathBuf,
    /// The distribution with its version, such as `debian-12`.
    pub distro: String,
    /// Options of apt, such as proxies, for its run on the host only.
    pub options: Secret,
    /// Names and passwords for the mirrors, in the syntax of `apt_auth.conf(5)`; for the same time only.
    pub credentials: Secret,
    /// Proxy variables of the environment, used if apt has no proxy configured.
    pub environment: Environment,
    /// The CAs to trust for mirrors with TLS.
    pub trust: Trust,
    /// The path of `mmdebstrap`, if it is not in the usual directories.
    pub program: Option<PathBuf>,
    /// Packages in addition to the essential ones; by default [`PACKAGES`].
    pub packages: Vec<String>,
}

/// A running `mmdebstrap`.
struct Started {
    running: Running,
    /// The tar archive that it writes.
    pipe: File,
    /// A file that must exist while it runs.
    _authorities: Option<TempPath>,
}

impl Bootstrap {
    /// Runs `mmdebstrap`; `read` gets the tar archive that it writes. Temporary files go to `scratch` if `mmdebstrap` can use it.
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
        // If the reader stops early, the writer fails too; if the writer fails, the reader gets half an archive.
        match (read, ended) {
            (Err(error @ (ImageError::DiskFull { .. } | ImageError::TooLarge { .. })), _) => Err(error),
            (_, Err(error)) => Err(error.into()),
            (read, Ok(_)) => read,
        }
    }

    /// Checks that all requirements are installed, and returns the program.
    pub(crate) fn check(&self) -> Result<Tool, ImageError> {
        Tool::find("apt-get")?;
        if !rustix::process::geteuid().is_root() {
            // Its user namespace needs both.
            Tool::find("newuidmap")?;
            subids::check()?;
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
        // The users of its namespace have no access to this user's directories.
        if root {
            // It mounts filesystems for packages inside the tree, and does not unmount them when it is killed.
            call = call.env("TMPDIR", scratch).own_mounts();
        }
        let authorities = self.trust.bundle().map_err(|e| ImageError::write(scratch, e))?;
        let mut options = self.options.reveal().to_owned();
        if let Some(file) = &authorities {
            options.push_str(&format!("Acquire::https::CAInfo \"{}\";\n", file.display()));
        }
        // As for all downloads from an archive: proxies of the environment are used only if apt has none configured.
        for (name, value) in self.environment.iter().filter(|_| self.options.reveal().is_empty()) {
            call = call.env(name, value);
        }
        call = call
            .args([TELL, FORGET])
            .env("NEXUS_APT_CONF", options)
            .env("NEXUS_APT_AUTH", self.credentials.reveal());
        let mut running = call.arg("--").arg(&self.suite).arg("-").args(&self.mirrors).start()?;
        let pipe = running.stdout().ok_or(ImageError::Worker)?;
        let pipe = pipe.into_owned_fd().map_err(|e| ImageError::source(tool.path(), e))?;
        Ok(Started { running, pipe: File::from(pipe), _authorities: authorities })
    }

    /// Reports a line of `mmdebstrap`'s output: as a step, or only in the log.
    fn show(line: &[u8], progress: &Progress) {
        let text = String::from_utf8_lossy(line);
        match text.strip_prefix("I: ") {
            Some(said) if ITS_OWN.iter().any(|own| said.starts_with(own)) => progress.log(said),
            Some(step) => progress.step(step.trim_end_matches("...").chars().take(100).collect::<String>()),
            None => progress.log(&text),
        }
    }
}

/// What to do about a failed `mmdebstrap`, if known.
pub(super) fn hint(error: &ProgramError) -> Option<String> {
    let ProgramError::Failed { name: "mmdebstrap", stderr, .. } = error else { return None };
    let package = missing_package(stderr)?;
    Some(format!(
        "the archive of the host's apt has no package {package}: correct its name in the template, or leave it out \
         (template_update), then call build_start again"
    ))
}

/// The package that apt reports as missing.
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

    #[tokio::test]
    async fn what_is_of_the_host_is_told_and_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        fs_err::create_dir_all(etc.join("apt/apt.conf.d")).unwrap();
        fs_err::write(etc.join("resolv.conf"), "search host.example\n").unwrap();
        fs_err::write(etc.join("hostname"), "host\n").unwrap();
        let sources = [
            ("deb [signed-by=/a/b.gpg] http://m.example/debian bookworm main", "deb http://m.example/debian"),
            (
                "deb [signed-by=/a/b.gpg check-date=no] http://m.example/x y main",
                "deb [check-date=no] http://m",
            ),
            ("deb [check-date=no] http://m.example/debian bookworm main", "deb [check-date=no] http://m"),
            ("deb http://m.example/debian bookworm main", "deb http://m.example/debian bookworm main"),
        ];
        let lines = sources.map(|(line, _)| format!("{line}\n")).concat();
        fs_err::write(etc.join("apt/sources.list"), lines).unwrap();
        let options = "Acquire::http::Proxy \"http://me:it's $HOME%s@p:1\";\n";
        let mut left = Vec::new();
        for hook in [TELL, FORGET] {
            let (_, script) = hook.split_once("-hook=").unwrap();
            // As mmdebstrap does.
            let call = Tool::find("sh").unwrap().call().arg("-c").arg(script).arg("exec").arg(root.path());
            let call = call.env("NEXUS_APT_CONF", options).env("NEXUS_APT_AUTH", "machine m\n");
            call.run(&tokio_util::sync::CancellationToken::new()).await.unwrap();
            let told = [etc.join("apt/apt.conf.d/99nexus-host"), etc.join("apt/auth.conf.d/nexus-host.conf")];
            left.push(told.map(|path| fs_err::read_to_string(path).ok()));
        }
        assert_eq!(left[0], [Some(options.to_owned()), Some("machine m\n".to_owned())]);
        assert_eq!(left[1], [None, None]);
        let now = fs_err::read_to_string(etc.join("apt/sources.list")).unwrap();
        for (line, (was, is)) in now.lines().zip(sources) {
            assert!(line.starts_with(is) && line.ends_with("main"), "{was} became {line}");
        }
        assert_eq!(fs_err::read_to_string(etc.join("resolv.conf")).unwrap(), "");
        assert_eq!(fs_err::read_to_string(etc.join("hostname")).unwrap(), "nexus\n");
    }

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
