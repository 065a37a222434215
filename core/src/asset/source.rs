//! Builds kernels from the source of Linux, by the host's own compiler; says what the same takes elsewhere.
//!
//! ```text
//! source.tar.xz ── tar ─> tree ── make allnoconfig (with the configuration) ─> .config ── make vmlinux ── strip ─> vmlinux
//! ```
//!
//! All of it is in one directory, in which an interrupted build goes on. The same source, configuration and compiler make an
//! identical kernel. Whether the source may be trusted was decided before.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use fs_err as fs;

use super::AssetError;
use crate::os::paths::HEADERS;
use crate::os::tool::{Call, ProgramError, Tool};
use crate::os::{failpoint, remove};
use crate::progress::Progress;

/// The configuration for microVMs: everything that a VM needs built in, and nothing else.
pub(crate) const MICROVM: &str = include_str!("../../kernel/microvm.config");

/// The programs that a build needs, with their packages.
static PROGRAMS: [(&str, &str); 10] = [
    ("bc", "bc"),
    ("bison", "bison"),
    ("flex", "flex"),
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("make", "make"),
    ("perl", "perl"),
    ("strip", "binutils"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];
/// The headers that it needs, with their packages.
static LIBRARIES: [(&str, &str); 3] =
    [("stdio.h", "libc6-dev"), ("gelf.h", "libelf-dev"), ("openssl/opensslv.h", "libssl-dev")];
/// What the options of a configuration begin with that the build finds out by itself.
const FOUND_OUT: [&str; 8] = [
    "CONFIG_AS_",
    "CONFIG_CC_",
    "CONFIG_CLANG_",
    "CONFIG_GCC_",
    "CONFIG_LD_",
    "CONFIG_LLD_",
    "CONFIG_PAHOLE_",
    "CONFIG_RUSTC_",
];
/// How long one step may take: a whole configuration of a distribution takes hours on a small host.
pub(crate) const LONGEST: Duration = Duration::from_secs(12 * 3600);
/// How long what an interrupted build left is kept.
const KEPT: Duration = Duration::from_secs(7 * 86400);

/// What `make` is told of who builds: it is a part of kernels, and otherwise different each time.
pub(crate) const BUILDER: [(&str, &str); 3] =
    [("KBUILD_BUILD_USER", "nexus"), ("KBUILD_BUILD_HOST", "nexus"), ("KBUILD_BUILD_TIMESTAMP", "@0")];
/// The name of a source.
pub(crate) const SOURCE: &str = "source.tar.xz";
/// The name of a configuration that is asked for.
pub(crate) const CONFIG: &str = "config";
/// The name of a kernel that was built.
pub(crate) const KERNEL: &str = "vmlinux";

/// The same work for a shell in another directory, which has the source and the configuration: what makes the configuration
/// [`MADE`] there. It goes on with what an interrupted build left.
pub(crate) const CONFIGURE: &str = "set -e
if ! [ -e unpacked ]; then
  rm -rf tree
  mkdir tree
  tar -xJf source.tar.xz -C tree --strip-components=1 --no-same-owner --exclude='*/tools/testing' --exclude='*/Documentation/translations'
  sync -f tree
  : > unpacked
fi
KCONFIG_ALLCONFIG=\"$PWD/config\" make -C tree allnoconfig
cp tree/.config made";
/// The name of the configuration that was made.
pub(crate) const MADE: &str = "made";
/// What makes the kernel there afterwards.
pub(crate) const COMPILE: &str = "set -e
make -C tree -j\"$(nproc)\" vmlinux
strip --strip-debug -o vmlinux tree/vmlinux";
/// What tells whether the source is unpacked there.
pub(crate) const IS_UNPACKED: &str = "[ -e unpacked ]";

/// The packages that building a kernel needs, sorted.
pub(crate) fn needed() -> Vec<String> {
    let all: BTreeSet<&str> = PROGRAMS.iter().chain(&LIBRARIES).map(|(_, package)| *package).collect();
    all.into_iter().map(str::to_owned).collect()
}

/// The packages that this host lacks to build a kernel, sorted.
pub(crate) fn missing() -> Vec<String> {
    let programs = PROGRAMS.iter().filter(|(program, _)| Tool::find(program).is_err());
    let libraries = LIBRARIES.iter().filter(|(header, _)| !Path::new(HEADERS).join(header).exists());
    let packages: BTreeSet<&str> = programs.chain(libraries).map(|(_, package)| *package).collect();
    packages.into_iter().map(str::to_owned).collect()
}

/// The work on one kernel.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    directory: PathBuf,
    /// The version of Linux, for messages.
    version: String,
}

impl Work {
    /// The work in a directory, which exists.
    pub(crate) fn new(directory: PathBuf, version: &str) -> Self {
        Self { directory, version: version.to_owned() }
    }

    /// Where all of it is.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the source belongs, as a packed tar archive.
    pub(crate) fn source(&self) -> PathBuf {
        self.directory.join(SOURCE)
    }

    /// Where the kernel belongs.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.directory.join(KERNEL)
    }

    /// The directory for a download of the source, which must not exist yet.
    pub(crate) fn arrival(&self) -> PathBuf {
        self.directory.join("arrival")
    }

    /// The log, which stays.
    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn tree(&self) -> PathBuf {
        self.directory.join("tree")
    }

    /// Exists once the tree is complete.
    fn unpacked(&self) -> PathBuf {
        self.directory.join("unpacked")
    }

    /// Builds the kernel, and returns its file.
    pub(crate) async fn build(&self, config: &str, progress: &Progress) -> Result<PathBuf, AssetError> {
        self.unpack(progress).await?;
        self.configure(config, progress).await?;
        self.compile(progress).await
    }

    async fn unpack(&self, progress: &Progress) -> Result<(), AssetError> {
        let doing = AssetError::io("unpack the source of a kernel");
        if self.unpacked().exists() {
            progress.step("going on with what an interrupted build left");
            return Ok(());
        }
        progress.step(format!("unpacking Linux {}", self.version));
        remove::tree(&self.tree()).await;
        fs::create_dir_all(self.tree()).map_err(&doing)?;
        let call = self.program("tar")?.arg("-xJf").arg(self.source()).arg("-C").arg(self.tree());
        let call = call.args(["--strip-components=1", "--no-same-owner"]);
        // A third of the files, and no kernel needs them.
        let call = call.args(["--exclude=*/tools/testing", "--exclude=*/Documentation/translations"]);
        self.run(call, "unpack", progress).await?;
        fs::write(self.unpacked(), "").map_err(&doing)?;
        failpoint::reach("kernel-source-unpacked");
        Ok(())
    }

    async fn configure(&self, config: &str, progress: &Progress) -> Result<(), AssetError> {
        let doing = AssetError::io("configure a kernel");
        progress.step(format!("configuring Linux {}", self.version));
        let wanted = self.put_config(config)?;
        let call = self.make()?.env("KCONFIG_ALLCONFIG", &wanted).arg("allnoconfig");
        self.run(call, "configure", progress).await?;
        let made = fs::read_to_string(self.tree().join(".config")).map_err(&doing)?;
        self.check_config(config, &made)
    }

    /// Writes down the configuration that is asked for; returns its file.
    pub(crate) fn put_config(&self, config: &str) -> Result<PathBuf, AssetError> {
        let wanted = self.directory.join(CONFIG);
        fs::write(&wanted, config).map_err(AssetError::io("configure a kernel"))?;
        Ok(wanted)
    }

    /// Fails if a configuration that was made lacks options that were asked for.
    pub(crate) fn check_config(&self, config: &str, made: &str) -> Result<(), AssetError> {
        let options = unmet(config, made);
        if options.is_empty() {
            return Ok(());
        }
        Err(AssetError::Options { version: self.version.clone(), options })
    }

    async fn compile(&self, progress: &Progress) -> Result<PathBuf, AssetError> {
        progress.step(format!("compiling Linux {}", self.version));
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let call = self.make()?.arg(format!("-j{jobs}")).arg("vmlinux");
        self.run(call, "compile", progress).await?;
        let kernel = self.kernel();
        let call = self.program("strip")?.arg("--strip-debug").arg("-o").arg(&kernel);
        self.run(call.arg(self.tree().join("vmlinux")), "strip", progress).await?;
        failpoint::reach("kernel-compiled");
        Ok(kernel)
    }

    fn make(&self) -> Result<Call, AssetError> {
        let call = self.program("make")?.arg("-C").arg(self.tree());
        Ok(BUILDER.iter().fold(call, |call, (name, value)| call.env(name, value)))
    }

    fn program(&self, name: &'static str) -> Result<Call, AssetError> {
        let tool = Tool::find(name).map_err(|source| self.failed("build", source))?;
        Ok(tool.call().timeout(LONGEST))
    }

    fn failed(&self, doing: &str, source: ProgramError) -> AssetError {
        AssetError::Program { doing: format!("{doing} Linux {}", self.version), source }
    }

    /// Runs a program; its output goes to the log, and its lines are counted.
    async fn run(&self, call: Call, doing: &str, progress: &Progress) -> Result<(), AssetError> {
        let (log, mut lines) = (progress.clone(), 0);
        let show = move |line: &[u8]| {
            lines += 1;
            log.log(&String::from_utf8_lossy(line));
            log.advance(lines, None);
        };
        let ended = call.run_lines(progress.token(), show).await;
        if let Err(ProgramError::Failed { stderr, .. }) = &ended {
            stderr.lines().for_each(|line| progress.log(line));
        }
        ended.map(drop).map_err(|source| self.failed(doing, source))
    }

    /// Removes everything but the log.
    pub(crate) async fn clear(&self) {
        for directory in [self.tree(), self.arrival()] {
            remove::tree(&directory).await;
        }
        for file in [
            self.unpacked(),
            self.source(),
            self.kernel(),
            self.directory.join(CONFIG),
            self.directory.join(MADE),
        ] {
            remove::path(&file).await;
        }
    }
}

/// The lines of a configuration that are not in the one that was made of it.
fn unmet(wanted: &str, made: &str) -> Vec<String> {
    let made: BTreeSet<&str> = made.lines().map(str::trim).collect();
    let is_asked = |line: &&str| {
        let is_set = line.starts_with("CONFIG_") && line.contains('=') && !line.ends_with("=n");
        is_set && !FOUND_OUT.iter().any(|start| line.starts_with(start))
    };
    let asked = wanted.lines().map(str::trim).filter(is_asked);
    asked.filter(|line| !made.contains(line)).map(str::to_owned).collect()
}

/// Removes what builds left that were abandoned for days; `kept` is in use.
pub(crate) async fn sweep(directory: &Path, kept: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let is_old = |path: &PathBuf| {
        let changed =
            fs::metadata(path).and_then(|meta| meta.modified()).unwrap_or_else(|_| SystemTime::now());
        path != kept && changed.elapsed().unwrap_or_default() > KEPT
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(is_old) {
        tracing::info!(path = %path.display(), "removing what an old build of a kernel left");
        remove::path(&path).await;
    }
}

#[cfg(test)]
mod tests;
