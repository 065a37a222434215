//! Extracts files from packages.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::tools::asset::Verified;

use crate::asset::debian::deb::{self, More};
use crate::asset::debian::packages::Package;
use crate::asset::error::{AssetError, KernelProblem, PackageProblem};
use crate::asset::fetch::Fetched;
use crate::asset::kernel::{
    self, Choice, KernelFiles, MAX_KERNEL, MAX_MODULE, MODULE_LISTS, ModuleTree, Modules, Provenance,
    first_guess, module_name,
};
use crate::asset::stream::{Compression, capped, decompressed, hashed};
use crate::image::ImageError;
use crate::progress::Progress;

/// The largest single file of another kind that is taken out.
const MAX_FILE: u64 = 256 << 20;
/// The largest packed source of a kernel.
const MAX_SOURCE: u64 = 512 << 20;
/// The largest list of modules, or of built-in modules.
const MAX_LIST: u64 = 16 << 20;
/// How often a package is read at most: modules depend on modules, which depend on others.
const MAX_PASSES: usize = 8;

/// What is known of a kernel before it is extracted.
pub(super) struct Extracted {
    pub(super) origin: String,
    pub(super) package: String,
    pub(super) version: String,
    pub(super) verified: Verified,
}

/// Extracts the kernel and its modules from its packages into a kernel's directory. Blocks; runs on a blocking thread of the runtime.
pub(super) fn kernel(
    debs: &[PathBuf],
    facts: Extracted,
    into: &Path,
    progress: &Progress,
) -> Result<KernelFiles, AssetError> {
    let of_package = |problem| AssetError::Package { package: facts.package.clone(), problem };
    let of_kernel = |problem| AssetError::Kernel { kernel: facts.version.clone(), problem };
    let of_tree = |source| match source {
        ImageError::Cancelled => AssetError::Cancelled,
        source => AssetError::ModuleImage { kernel: facts.version.clone(), source },
    };
    let mut parts = Parts {
        version: &facts.version,
        image: None,
        modules: Modules::default(),
        wanted: first_guess(),
        tree: Some(ModuleTree::new(into, progress.clone()).map_err(of_tree)?),
    };
    let mut whole_tree = None;
    for _ in 0..MAX_PASSES {
        for deb in debs {
            if progress.check().is_err() {
                return Err(AssetError::Cancelled);
            }
            match parts.read(deb) {
                Err(Failed::Package(problem)) => return Err(of_package(problem)),
                Err(Failed::Tree(problem)) => return Err(of_tree(problem)),
                Ok(()) => {}
            }
        }
        // One pass is enough for all modules.
        whole_tree = parts.tree.take().or(whole_tree);
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
                let tree = match whole_tree {
                    Some(tree) => tree.write(into).map_err(of_tree)?,
                    None => None,
                };
                return kernel::install(image, &parts.modules, &order, tree, provenance, into);
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
    /// Collects all modules, in the first pass.
    tree: Option<ModuleTree>,
}

/// Why reading failed.
enum Failed {
    Package(PackageProblem),
    Tree(ImageError),
}

impl Parts<'_> {
    fn read(&mut self, deb: &Path) -> Result<(), Failed> {
        let image_path = format!("boot/vmlinuz-{}", self.version);
        let tree = format!("lib/modules/{}/", self.version);
        let below_tree =
            |path: &str| path.strip_prefix("usr/").unwrap_or(path).strip_prefix(&tree).map(str::to_owned);
        let Self { image, modules, wanted, tree: all, .. } = self;
        let (has_image, takes_all) = (image.is_some(), all.is_some());
        let mut failed = None;
        // Two closures need the set of modules, so the names are collected here first and handed over below.
        let present = std::cell::RefCell::new(BTreeSet::new());
        let mut chosen = |path: &str| {
            if path == image_path {
                return !has_image;
            }
            let Some(inner) = below_tree(path) else { return false };
            if MODULE_LISTS.contains(&inner.as_str()) {
                return takes_all;
            }
            match module_name(&inner) {
                Some(name) if inner.starts_with("kernel/") => {
                    let is_wanted = wanted.contains(&name);
                    present.borrow_mut().insert(name);
                    is_wanted || takes_all
                }
                _ => false,
            }
        };
        let mut take = |path: &str, file: &mut dyn Read| {
            if path == image_path {
                *image = Some(deb::read_whole(path, file, MAX_KERNEL)?);
                return Ok(More::Wanted);
            }
            let Some(inner) = below_tree(path) else { return Ok(More::Wanted) };
            let put = if let Some(name) = module_name(&inner) {
                let packed = deb::read_whole(path, file, MAX_MODULE)?;
                let unpacked = decompressed(&packed[..], Compression::of_name(path))
                    .and_then(|mut reader| {
                        let mut bytes = Vec::new();
                        capped(&mut reader, MAX_MODULE).read_to_end(&mut bytes)?;
                        Ok(bytes)
                    })
                    .map_err(|e| PackageProblem::of_read(e, path))?;
                let put = all.as_mut().map(|tree| tree.module(&inner, &unpacked));
                if wanted.contains(&name) {
                    let added = modules.add(&name, unpacked);
                    added.map_err(|e| PackageProblem::Data(std::io::Error::other(e)))?;
                }
                put
            } else {
                let list = deb::read_whole(path, file, MAX_LIST)?;
                if inner == "modules.builtin" {
                    modules.set_builtin(&String::from_utf8_lossy(&list));
                }
                all.as_mut().map(|tree| tree.list(&inner, &list))
            };
            if let Some(Err(error)) = put {
                failed = Some(error);
                return Ok(More::Enough);
            }
            Ok(More::Wanted)
        };
        deb::each_file(deb, MAX_KERNEL, &mut chosen, &mut take).map_err(Failed::Package)?;
        if let Some(error) = failed {
            return Err(Failed::Tree(error));
        }
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
    // Newer releases have everything below `/usr`.
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

/// Copies one large file of a package to the file `to`, which appears when it is complete.
pub(super) fn copy(deb: &Path, package: &Package, member: &str, to: &Path) -> Result<(), AssetError> {
    let of_package = |problem| AssetError::Package { package: package.name.clone(), problem };
    let doing = AssetError::io("write a package's file");
    let part = to.with_extension("part");
    let mut file = Some(fs::File::create(&part).map_err(&doing)?);
    let mut copied = None;
    let read = deb::each_file(deb, MAX_SOURCE, &mut |path| path == member, &mut |_, bytes| {
        copied = file.take().map(|mut file| std::io::copy(bytes, &mut file).and_then(|_| file.sync_data()));
        Ok(More::Enough)
    });
    let copied = match (read, copied) {
        (Err(problem), _) => Err(of_package(problem)),
        (Ok(()), None) => Err(of_package(PackageProblem::NoMember(member.to_owned()))),
        (Ok(()), Some(copied)) => copied.and_then(|()| fs::rename(&part, to)).map_err(&doing),
    };
    if copied.is_err() {
        // If this fails, the next copy writes it anew.
        fs::remove_file(&part).ok();
    }
    copied
}

/// Writes a program atomically: `path` is either complete or missing.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o755))?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}
