//! What is taken out of packages.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use nexus_schema::tools::asset::Verified;
use tokio_util::sync::CancellationToken;

use crate::asset::debian::deb::{self, More};
use crate::asset::debian::packages::Package;
use crate::asset::error::{AssetError, KernelProblem, PackageProblem};
use crate::asset::fetch::Fetched;
use crate::asset::kernel::{
    self, Choice, KernelFiles, MAX_KERNEL, MAX_MODULE, Modules, Provenance, first_guess, module_name,
};
use crate::asset::stream::{Compression, capped, decompressed, hashed};

/// The largest single file of another kind that is taken out.
const MAX_FILE: u64 = 256 << 20;
/// The largest list of what is built in.
const MAX_LIST: u64 = 4 << 20;
/// How often a package is read: modules that depend on modules that depend on ..
const MAX_PASSES: usize = 8;

/// What is known of a kernel before it is taken out.
pub(super) struct Extracted {
    pub(super) origin: String,
    pub(super) package: String,
    pub(super) version: String,
    pub(super) verified: Verified,
}

/// Takes the kernel and the modules that it needs out of its packages, into a kernel's directory.
pub(super) fn kernel(
    debs: &[PathBuf],
    facts: Extracted,
    into: &Path,
    cancel: &CancellationToken,
) -> Result<KernelFiles, AssetError> {
    let of_package = |problem| AssetError::Package { package: facts.package.clone(), problem };
    let of_kernel = |problem| AssetError::Kernel { kernel: facts.version.clone(), problem };
    let mut parts =
        Parts { version: &facts.version, image: None, modules: Modules::default(), wanted: first_guess() };
    for _ in 0..MAX_PASSES {
        for deb in debs {
            if cancel.is_cancelled() {
                return Err(AssetError::Cancelled);
            }
            parts.read(deb).map_err(of_package)?;
        }
        let Some(image) = &parts.image else {
            return Err(of_package(PackageProblem::NoMember(format!("boot/vmlinuz-{}", facts.version))));
        };
        match parts.modules.choose().map_err(of_kernel)? {
            Choice::Order(order) => {
                let provenance = Provenance {
                    origin: facts.origin,
                    version: Some(facts.version.clone()),
                    verified: facts.verified,
                };
                return kernel::install(image, &parts.modules, &order, provenance, into);
            }
            Choice::Unread(names) => parts.wanted = names,
        }
    }
    let first = parts.wanted.pop_first().unwrap_or_default();
    Err(of_kernel(KernelProblem::Circle(first)))
}

/// What was read of a kernel's packages so far.
struct Parts<'v> {
    version: &'v str,
    image: Option<Vec<u8>>,
    modules: Modules,
    /// Names of the modules to read in this pass.
    wanted: BTreeSet<String>,
}

impl Parts<'_> {
    fn read(&mut self, deb: &Path) -> Result<(), PackageProblem> {
        let image_path = format!("boot/vmlinuz-{}", self.version);
        let tree = format!("lib/modules/{}/", self.version);
        let below_tree =
            |path: &str| path.strip_prefix("usr/").unwrap_or(path).strip_prefix(&tree).map(str::to_owned);
        let Self { image, modules, wanted, .. } = self;
        let has_image = image.is_some();
        // Two closures need the set of modules: what is there is noted first, and handed over below.
        let present = std::cell::RefCell::new(BTreeSet::new());
        let mut chosen = |path: &str| {
            if path == image_path {
                return !has_image;
            }
            let Some(inner) = below_tree(path) else { return false };
            if inner == "modules.builtin" {
                return true;
            }
            match module_name(&inner) {
                Some(name) if inner.starts_with("kernel/") => {
                    let is_wanted = wanted.contains(&name);
                    present.borrow_mut().insert(name);
                    is_wanted
                }
                _ => false,
            }
        };
        let mut take = |path: &str, file: &mut dyn Read| {
            if path == image_path {
                *image = Some(deb::read_whole(path, file, MAX_KERNEL)?);
            } else if path.ends_with("/modules.builtin") {
                modules.set_builtin(&String::from_utf8_lossy(&deb::read_whole(path, file, MAX_LIST)?));
            } else if let Some(name) = module_name(path) {
                let packed = deb::read_whole(path, file, MAX_MODULE)?;
                let unpacked = decompressed(&packed[..], Compression::of_name(path))
                    .and_then(|mut reader| {
                        let mut bytes = Vec::new();
                        capped(&mut reader, MAX_MODULE).read_to_end(&mut bytes)?;
                        Ok(bytes)
                    })
                    .map_err(|e| PackageProblem::of_read(e, path))?;
                modules.add(&name, unpacked).map_err(|e| PackageProblem::Data(std::io::Error::other(e)))?;
            }
            Ok(More::Wanted)
        };
        deb::each_file(deb, MAX_KERNEL, &mut chosen, &mut take)?;
        for name in present.into_inner() {
            self.modules.note_present(&name);
        }
        Ok(())
    }
}

/// Takes one file out of a package.
pub(super) fn file(deb: &Path, package: &Package, member: &str, into: &Path) -> Result<Fetched, AssetError> {
    let of_package = |problem| AssetError::Package { package: package.name.clone(), problem };
    let doing = AssetError::io("write a package's file");
    // Newer releases have everything below /usr.
    let plain = member.trim_start_matches("./").trim_start_matches('/');
    let wanted = plain.strip_prefix("usr/").unwrap_or(plain);
    let name = wanted.rsplit('/').next().filter(|n| !n.is_empty());
    let path = into.join(name.ok_or_else(|| of_package(PackageProblem::NoMember(member.to_owned())))?);
    let mut written = None;
    let mut failed = None;
    deb::each_file(
        deb,
        MAX_FILE,
        &mut |path| path.strip_prefix("usr/").unwrap_or(path) == wanted,
        &mut |_, file| {
            let bytes = deb::read_whole(member, file, MAX_FILE)?;
            match write(&path, &bytes) {
                Ok(()) => written = Some(bytes),
                Err(error) => failed = Some(error),
            }
            Ok(More::Enough)
        },
    )
    .map_err(of_package)?;
    if let Some(error) = failed {
        return Err(doing(error));
    }
    let bytes = written.ok_or_else(|| of_package(PackageProblem::NoMember(member.to_owned())))?;
    let (sha256, size_bytes) = hashed(&bytes[..]).finish().map_err(&doing)?;
    Ok(Fetched { path, sha256, size_bytes, version: Some(package.version.clone()) })
}

/// Writes a program that is there as a whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o755))?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}
