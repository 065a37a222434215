//! Kernels: a file for VMMs to boot (on x86_64 an ELF file, on arm64 an image), and the modules that it needs to find its drive.
//!
//! A kernel's directory holds `vmlinux`, `modules/NN-name.ko` in load order, `modules.ext4` with all modules if the kernel has
//! any, and `kernel.json` with its metadata. That file is written last: a directory without it is incomplete.

mod bzimage;
mod depmod;
mod index;
mod modules;
pub(crate) mod problem;
#[cfg(test)]
mod tests;
mod tree;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::Arch;
use nexus_schema::tools::asset::Verified;
use serde::{Deserialize, Serialize};

use crate::asset::AssetError;
use crate::asset::error::KernelProblem;
use crate::asset::stream::{Sha256, capped, hashed};
use crate::os::{given, memory};
pub(crate) use bzimage::MAX_KERNEL;
use bzimage::{Image, check_elf, examine};
pub(crate) use depmod::LISTS as MODULE_LISTS;
pub(crate) use modules::{Choice, MAX_MODULE, Modules, first_guess, module_name};
use tree::ModuleFacts;
pub use tree::ModuleImage;
pub(crate) use tree::ModuleTree;

/// A kernel in its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// Its version as in `uname -r`, such as `6.1.0-40-cloud-amd64`; `unknown` if the file does not contain it.
    pub version: String,
    /// Its architecture.
    pub arch: Arch,
    /// The kernel, uncompressed: an ELF file, or an image of arm64.
    pub vmlinux: PathBuf,
    /// The modules needed for booting, unpacked, in load order; empty if everything is built in.
    pub modules: Vec<PathBuf>,
    /// All its modules, for `/lib/modules`; `None` if it has none or they were not kept.
    pub module_image: Option<ModuleImage>,
    /// SHA-256 of `vmlinux`, in hexadecimal.
    pub sha256: String,
    /// The length of `vmlinux` in bytes.
    pub size_bytes: u64,
    /// What verified it.
    pub verified: Verified,
    /// The package with its version, or the file, that it comes from.
    pub origin: String,
}

/// `kernel.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    version: String,
    /// Older files do not say it: their kernels are for the host.
    #[serde(default)]
    arch: Arch,
    sha256: String,
    size_bytes: u64,
    verified: Verified,
    origin: String,
    /// File names below `modules/`, in load order.
    modules: Vec<String>,
    /// The filesystem with all modules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    module_image: Option<ModuleFacts>,
}

pub(crate) const VMLINUX: &str = "vmlinux";
const MODULES: &str = "modules";
const FACTS: &str = "kernel.json";

impl KernelFiles {
    /// Loads the metadata of the kernel in `dir`.
    pub fn load(dir: &Path) -> Result<Self, AssetError> {
        let doing = AssetError::io("load a kernel");
        let json = fs::read(dir.join(FACTS)).map_err(&doing)?;
        let facts: Facts = serde_json::from_slice(&json).map_err(|e| AssetError::Kernel {
            kernel: dir.display().to_string(),
            problem: KernelProblem::Facts(e),
        })?;
        let kernel = Self {
            version: facts.version,
            arch: facts.arch,
            vmlinux: dir.join(VMLINUX),
            modules: facts.modules.iter().map(|m| dir.join(MODULES).join(m)).collect(),
            module_image: facts.module_image.map(|facts| ModuleImage::of(dir, facts)),
            sha256: facts.sha256,
            size_bytes: facts.size_bytes,
            verified: facts.verified,
            origin: facts.origin,
        };
        let image = kernel.module_image.iter().map(|image| &image.path);
        for file in kernel.modules.iter().chain([&kernel.vmlinux]).chain(image) {
            fs::metadata(file).map_err(&doing)?;
        }
        Ok(kernel)
    }
}

/// Where a kernel comes from.
pub(crate) struct Provenance {
    /// The package with its version, or the file.
    pub(crate) origin: String,
    /// The version, if known from elsewhere than the file.
    pub(crate) version: Option<String>,
    /// What verified it.
    pub(crate) verified: Verified,
}

/// Imports a kernel from a file of the host: an ELF file, an image of arm64, or a bzImage, which is unpacked. Everything that booting needs is
/// assumed to be built in. If `sha256` is given, the file must have that digest.
pub fn import_kernel(file: &Path, into: &Path, sha256: Option<&str>) -> Result<KernelFiles, AssetError> {
    memory::keep_lean();
    let expected = sha256
        .map(|text| text.parse::<Sha256>().map_err(|_| AssetError::NotADigest { text: text.to_owned() }))
        .transpose()?;
    let kernel = file.display().to_string();
    let bytes = read(file)?;
    if let Some(expected) = expected {
        let found = Sha256::of(&bytes);
        if found != expected {
            return Err(AssetError::Checksum { what: kernel, expected, found });
        }
    }
    let verified = if expected.is_some() { Verified::Checksum } else { Verified::None };
    let provenance = Provenance { origin: kernel, version: None, verified };
    install(&bytes, &Modules::default(), &[], None, provenance, into)
}

/// Refuses a file that is no kernel, by the start of what is in it; what is packed stays so.
pub(crate) fn check_kernel(file: &Path) -> Result<(), AssetError> {
    let kernel = file.display().to_string();
    examine(&read(file)?).map(drop).map_err(|problem| AssetError::Kernel { kernel, problem })
}

/// The bytes of a kernel on the host.
fn read(file: &Path) -> Result<Vec<u8>, AssetError> {
    let doing = AssetError::io("read a kernel");
    let kernel = file.display().to_string();
    let opened = match given::open_file(file) {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
            return Err(AssetError::Kernel { kernel, problem: KernelProblem::UnknownFormat });
        }
        opened => opened.map_err(&doing)?,
    };
    let mut bytes = Vec::new();
    capped(opened, MAX_KERNEL).read_to_end(&mut bytes).map_err(|e| match KernelProblem::of_read(e) {
        KernelProblem::Damaged(e) => doing(e),
        problem => AssetError::Kernel { kernel: kernel.clone(), problem },
    })?;
    Ok(bytes)
}

/// Whether a file is an ELF program for this machine.
pub(crate) fn is_program(file: &Path) -> std::io::Result<bool> {
    let mut start = Vec::new();
    let file = fs::File::open(file)?;
    let length = file.metadata()?.len();
    file.take(64 << 10).read_to_end(&mut start)?;
    Ok(start.starts_with(b"\x7fELF") && check_elf(&start, length).is_ok_and(|arch| arch.is_host()))
}

/// Makes a kernel's directory from an already verified file.
pub(crate) fn adopt_kernel(
    file: &Path,
    into: &Path,
    origin: &str,
    verified: Verified,
) -> Result<KernelFiles, AssetError> {
    memory::keep_lean();
    let doing = AssetError::io("read a kernel");
    let mut bytes = Vec::new();
    let opened = fs::File::open(file).map_err(&doing)?;
    capped(opened, MAX_KERNEL)
        .read_to_end(&mut bytes)
        .map_err(|e| AssetError::Kernel { kernel: origin.to_owned(), problem: KernelProblem::of_read(e) })?;
    let provenance = Provenance { origin: origin.to_owned(), version: None, verified };
    install(&bytes, &Modules::default(), &[], None, provenance, into)
}

/// Makes a kernel's directory from its image and its modules in load order; `tree` is already in it.
pub(crate) fn install(
    image: &[u8],
    modules: &Modules,
    order: &[String],
    tree: Option<ModuleImage>,
    provenance: Provenance,
    into: &Path,
) -> Result<KernelFiles, AssetError> {
    let failed = |problem| AssetError::Kernel { kernel: provenance.origin.clone(), problem };
    let doing = AssetError::io("write a kernel");
    fs::create_dir_all(into).map_err(&doing)?;
    let form = examine(image).map_err(failed)?;
    let is_arm64 = form == Image::Arm64;
    let (version, unpacked, mut reader): (_, _, Box<dyn Read + '_>) = match form {
        Image::Elf | Image::Arm64 => (None, image.len() as u64, Box::new(image)),
        Image::BzImage(packed) => {
            let reader = packed.reader().map_err(failed)?;
            (packed.version.clone(), packed.unpacked(), Box::new(reader))
        }
    };
    let mut temporary = tempfile::NamedTempFile::new_in(into).map_err(&doing)?;
    let (mut start, mut scan) = (Vec::new(), VersionScan::default());
    let mut source = hashed(&mut reader);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) => return Err(failed(KernelProblem::of_read(e))),
        };
        if start.len() < 64 << 10 {
            start.extend_from_slice(&buffer[..n]);
        }
        scan.push(&buffer[..n]);
        temporary.write_all(&buffer[..n]).map_err(&doing)?;
    }
    let (sha256, size_bytes) = source.finish().map_err(|e| failed(KernelProblem::of_read(e)))?;
    if size_bytes != unpacked {
        return Err(failed(KernelProblem::Length { expected: unpacked, found: size_bytes }));
    }
    let arch = if is_arm64 { Arch::Aarch64 } else { check_elf(&start, size_bytes).map_err(failed)? };
    let vmlinux = into.join(VMLINUX);
    publish(temporary, &vmlinux).map_err(&doing)?;

    let dir = into.join(MODULES);
    fs::create_dir_all(&dir).map_err(&doing)?;
    let mut names = Vec::new();
    for (number, module) in order.iter().enumerate() {
        let file = modules.file(module).ok_or_else(|| failed(KernelProblem::NoModule(module.clone())))?;
        let name = format!("{number:02}-{module}.ko");
        fs::write(dir.join(&name), file).map_err(&doing)?;
        names.push(name);
    }
    let facts = Facts {
        version: provenance.version.or(version).or(scan.found).unwrap_or_else(|| "unknown".into()),
        arch,
        sha256: sha256.to_string(),
        size_bytes,
        verified: provenance.verified,
        origin: provenance.origin,
        modules: names,
        module_image: tree.as_ref().map(ModuleImage::facts),
    };
    let mut temporary = tempfile::NamedTempFile::new_in(into).map_err(&doing)?;
    serde_json::to_writer_pretty(&mut temporary, &facts).map_err(|e| doing(e.into()))?;
    publish(temporary, &into.join(FACTS)).map_err(&doing)?;
    KernelFiles::load(into)
}

/// Renames a complete file to its final name and makes it world-readable, as it holds no secrets.
fn publish(file: tempfile::NamedTempFile, path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let file = file.persist(path).map_err(|e| e.error)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.sync_data()
}

/// Whether a word is a valid kernel version.
fn is_version(word: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+~-".contains(&b);
    word.len() <= 128 && word.starts_with(|c: char| c.is_ascii_digit()) && word.bytes().all(plain)
}

/// Looks for the banner `Linux version 6.1.0 (..)` in bytes that come in pieces.
#[derive(Default)]
struct VersionScan {
    tail: Vec<u8>,
    found: Option<String>,
}

impl VersionScan {
    const BANNER: &[u8] = b"Linux version ";
    const LONGEST: usize = 256;

    fn push(&mut self, piece: &[u8]) {
        if self.found.is_some() {
            return;
        }
        self.tail.extend_from_slice(piece);
        for at in memchr::memmem::find_iter(&self.tail, Self::BANNER) {
            let rest = &self.tail[at + Self::BANNER.len()..];
            let end = rest.iter().take(Self::LONGEST).position(|b| *b == b' ');
            let word = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok());
            if let Some(word) = word.filter(|w| is_version(w)) {
                self.found = Some(word.to_owned());
                return;
            }
        }
        let keep = self.tail.len().min(Self::LONGEST + Self::BANNER.len());
        self.tail.drain(..self.tail.len() - keep);
    }
}
