//! Builds kernels from the source of Linux, by the host's own compiler.
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
const LONGEST: Duration = Duration::from_secs(12 * 3600);
/// How long what an interrupted build left is kept.
const KEPT: Duration = Duration::from_secs(7 * 86400);

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

    /// Where the source belongs, as a packed tar archive.
    pub(crate) fn source(&self) -> PathBuf {
        self.directory.join("source.tar.xz")
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
        let wanted = self.directory.join("config");
        fs::write(&wanted, config).map_err(&doing)?;
        let call = self.make()?.env("KCONFIG_ALLCONFIG", &wanted).arg("allnoconfig");
        self.run(call, "configure", progress).await?;
        let made = fs::read_to_string(self.tree().join(".config")).map_err(&doing)?;
        let options = unmet(config, &made);
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
        let kernel = self.directory.join("vmlinux");
        let call = self.program("strip")?.arg("--strip-debug").arg("-o").arg(&kernel);
        self.run(call.arg(self.tree().join("vmlinux")), "strip", progress).await?;
        failpoint::reach("kernel-compiled");
        Ok(kernel)
    }

    fn make(&self) -> Result<Call, AssetError> {
        let call = self.program("make")?.arg("-C").arg(self.tree());
        // Part of a kernel, and otherwise different each time.
        let builder = call.env("KBUILD_BUILD_USER", "nexus").env("KBUILD_BUILD_HOST", "nexus");
        Ok(builder.env("KBUILD_BUILD_TIMESTAMP", "@0"))
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
        for file in
            [self.unpacked(), self.source(), self.directory.join("config"), self.directory.join("vmlinux")]
        {
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
