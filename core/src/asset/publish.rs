//! Lays kernels out in a directory as a provider reads them, so that a web server of the directory is a mirror of it.
//!
//! The layout is not written down here: it is what the provider's own pipeline would ask the mirror for. For `anvil`:
//!
//! ```text
//! v6.12.48/vmlinux-6.12.48-x86_64.xz     the kernel, packed
//! v6.12.48/SHA256SUMS, SHA256SUMS.asc    checksums of the packed and of the unpacked file, and their signature
//! repos/.../releases                     the versions, as the API answers
//! public.asc                             the key to set
//! ```

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use fs_err as fs;
use nexus_schema::Name;
use serde_json::{Value, json};

use super::AssetError;
use super::debian::signature::Seconds;
use super::fetch::hash_file;
use super::provider::{
    Check, Expect, Format, Plan, Provider, Source, Versions, checked_version, with_version,
};
use super::signer::Signer;
use super::stream::Sha256;
use crate::progress::Progress;

/// The file with the public key.
pub(crate) const PUBLIC_KEY: &str = "public.asc";
/// The length of the blocks of packed files: several are packed at once, and unpacked at once.
const BLOCK: u64 = 8 << 20;
/// How hard to pack.
const PRESET: u32 = 6;
/// How much is packed at a time.
const PIECE: usize = 256 << 10;

/// A kernel to publish.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    pub(crate) name: Name,
    pub(crate) version: String,
    /// The uncompressed file.
    pub(crate) file: PathBuf,
}

/// A kernel that was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) name: Name,
    pub(crate) version: String,
    /// The packed file, below the directory.
    pub(crate) file: String,
    pub(crate) sha256: Sha256,
    pub(crate) size_bytes: u64,
}

/// The lines of a list of checksums, and where its signatures belong.
#[derive(Default)]
struct List {
    lines: BTreeMap<String, Sha256>,
    signatures: Vec<String>,
}

/// Publishes kernels. Blocks. Files of the same names are replaced, each as a whole; others stay.
pub(crate) fn publish(
    directory: &Path,
    provider: &Provider,
    kernels: &[Kernel],
    signer: &Signer,
    now: Seconds,
    progress: &Progress,
) -> Result<Vec<Written>, AssetError> {
    let plans =
        kernels.iter().map(|kernel| plan(provider, &kernel.version)).collect::<Result<Vec<_>, _>>()?;
    for (at, plan) in plans.iter().enumerate() {
        if let Some(same) = plans[..at].iter().position(|other| other.source == plan.source) {
            let (a, b, version) = (&kernels[same].name, &kernels[at].name, &kernels[at].version);
            return Err(refused(format!("{a} and {b} have the same version, {version}")));
        }
    }
    // A key that signs nothing is refused before anything is written.
    signer.sign("the checksums", b"", now)?;
    fs::create_dir_all(directory).map_err(AssetError::io("make the directory"))?;
    let mut lists: BTreeMap<String, List> = BTreeMap::new();
    let mut all = Vec::new();
    for (kernel, plan) in kernels.iter().zip(&plans) {
        let Source::Download(url) = &plan.source else { return Err(refused(unfit(provider))) };
        let file = below(url, provider)?;
        progress.step(format!("packing {}", kernel.name));
        let packed = directory.join(&file);
        let unpacked = pack(&kernel.file, &packed, progress)?;
        let (digest, size_bytes) = hash_file(&packed, progress)?;
        let checks = plan.raw.iter().map(|check| (check, digest));
        for (check, digest) in checks.chain(plan.unpacked.iter().map(|check| (check, unpacked))) {
            if let Check { expect: Expect::Listed { document, name: Some(name) } } = check {
                let list = lists.entry(below(document, provider)?).or_default();
                list.lines.insert(name.clone(), digest);
            }
        }
        for signed in &plan.signed {
            let signature = signed.signature.as_deref().ok_or_else(|| refused(unfit(provider)))?;
            let list = lists.entry(below(&signed.document, provider)?).or_default();
            list.signatures.push(below(signature, provider)?);
        }
        let (name, version) = (kernel.name.clone(), kernel.version.clone());
        all.push(Written { name, version, file, sha256: digest, size_bytes });
    }
    progress.step("signing the checksums");
    for (document, list) in &lists {
        check_replaced(&directory.join(document), list)?;
    }
    for (document, list) in &lists {
        let text: String = list.lines.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect();
        // The list first: between the two, readers get a signature that is not of this list, and so refuse it.
        place(directory, document, text.as_bytes())?;
        for signature in &list.signatures {
            place(directory, signature, signer.sign(document, text.as_bytes(), now)?.as_bytes())?;
        }
    }
    if let Versions::GithubReleases { url, tag, .. } = &provider.versions {
        let url = url.fill(&values(provider)?);
        let index = below(url.split('?').next().unwrap_or_default(), provider)?;
        let tags = all.iter().map(|written| -> Result<_, AssetError> {
            let values = with_version(values(provider)?, &written.version);
            Ok((tag.fill(&values), written))
        });
        let tags = tags.collect::<Result<Vec<_>, _>>()?;
        place(directory, &index, &releases(&directory.join(&index), &tags))?;
    }
    place(directory, PUBLIC_KEY, signer.public().as_bytes())?;
    Ok(all)
}

fn refused(problem: String) -> AssetError {
    AssetError::Publish(problem)
}

fn unfit(provider: &Provider) -> String {
    format!(
        "the provider {} does not read what this writes: files packed with xz, and lists of checksums with signatures beside them",
        provider.name
    )
}

/// The values of a provider whose mirror and API are the directory.
fn values(provider: &Provider) -> Result<super::provider::Values, AssetError> {
    let mut values = provider.values("").map_err(|problem| provider.failed(problem))?;
    values.insert("api".into(), String::new());
    Ok(values)
}

/// What the provider would ask the directory for, for one version.
fn plan(provider: &Provider, version: &str) -> Result<Plan, AssetError> {
    let failed = |problem| provider.failed(problem);
    let values = with_version(values(provider)?, checked_version(version).map_err(failed)?);
    let plan = provider.plan(&values).map_err(failed)?;
    let is_listed = |check: &Check| matches!(&check.expect, Expect::Listed { name: Some(_), .. });
    let fits = matches!(plan.source, Source::Download(_))
        && plan.decompress == Some(Format::Xz)
        && plan.extract.is_empty()
        && plan.raw.iter().chain(&plan.unpacked).all(is_listed)
        && plan.signed.iter().all(|signed| signed.signature.is_some());
    if fits && !plan.signed.is_empty() { Ok(plan) } else { Err(refused(unfit(provider))) }
}

/// The path below the directory that an address without a mirror names.
fn below(address: &str, provider: &Provider) -> Result<String, AssetError> {
    let path = address.trim_start_matches('/');
    let is_plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let is_below =
        address.starts_with('/') && is_plain && !path.is_empty() && !path.contains(['?', '#', '%']);
    if is_below { Ok(path.to_owned()) } else { Err(refused(unfit(provider))) }
}

/// Packs a file; returns the digest of the unpacked bytes. The packed file appears when it is complete.
fn pack(from: &Path, to: &Path, progress: &Progress) -> Result<Sha256, AssetError> {
    let doing = AssetError::io("pack a kernel");
    let parent = to.parent().unwrap_or(to);
    fs::create_dir_all(parent).map_err(&doing)?;
    let mut source = super::stream::hashed(fs::File::open(from).map_err(&doing)?);
    let total = fs::metadata(from).map_err(&doing)?.len();
    let part = tempfile::NamedTempFile::new_in(parent).map_err(&doing)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let mut builder = xz2::stream::MtStreamBuilder::new();
    let threads = u32::try_from(threads).unwrap_or(1);
    builder.threads(threads).preset(PRESET).block_size(BLOCK).check(xz2::stream::Check::Crc64);
    let stream = builder.encoder().map_err(|e| doing(io::Error::other(e)))?;
    let mut encoder = xz2::write::XzEncoder::new_stream(part, stream);
    let (mut buffer, mut done) = (vec![0; PIECE], 0);
    loop {
        progress.check()?;
        let n = io::Read::read(&mut source, &mut buffer).map_err(&doing)?;
        if n == 0 {
            break;
        }
        encoder.write_all(&buffer[..n]).map_err(&doing)?;
        done += n as u64;
        progress.advance(done, Some(total));
    }
    keep(encoder.finish().map_err(&doing)?, to).map_err(&doing)?;
    Ok(source.finish().map_err(&doing)?.0)
}

/// Writes a small file below the directory, at once.
fn place(directory: &Path, file: &str, bytes: &[u8]) -> Result<(), AssetError> {
    let doing = AssetError::io("write a published file");
    let path = directory.join(file);
    let parent = path.parent().unwrap_or(directory);
    fs::create_dir_all(parent).map_err(&doing)?;
    let mut part = tempfile::NamedTempFile::new_in(parent).map_err(&doing)?;
    part.write_all(bytes).and_then(|()| keep(part, &path)).map_err(&doing)
}

/// Gives a complete file its name; everybody may read it.
fn keep(part: tempfile::NamedTempFile, path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    part.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    part.as_file().sync_data()?;
    part.persist(path).map(drop).map_err(|error| error.error)
}

/// Refuses to replace a list that has files which the new one lacks: they would no longer be vouched for.
fn check_replaced(path: &Path, list: &List) -> Result<(), AssetError> {
    let before = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(AssetError::io("read the published checksums")(error)),
    };
    let names = before.lines().filter_map(|line| line.split_once("  ").map(|(_, name)| name));
    let lost: Vec<&str> = names.filter(|name| !list.lines.contains_key(*name)).collect();
    if lost.is_empty() {
        return Ok(());
    }
    Err(refused(format!(
        "{} lists {}, which would be lost: publish into another directory, or remove that file first",
        path.display(),
        lost.join(", ")
    )))
}

/// The list of releases with these, and with those of other tags that it had.
fn releases(before: &Path, tags: &[(String, &Written)]) -> Vec<u8> {
    let before = fs::read(before).ok().and_then(|json| serde_json::from_slice::<Vec<Value>>(&json).ok());
    let is_other = |release: &Value| !tags.iter().any(|(tag, _)| release["tag_name"] == tag.as_str());
    let others = before.unwrap_or_default().into_iter().filter(is_other);
    let published = tags.iter().map(|(tag, written)| {
        let name = written.file.rsplit('/').next().unwrap_or_default();
        json!({ "tag_name": tag, "draft": false, "prerelease": false,
            "assets": [{ "name": name, "size": written.size_bytes }] })
    });
    let all: Vec<Value> = published.chain(others).collect();
    format!("{:#}\n", Value::Array(all)).into_bytes()
}

#[cfg(test)]
mod tests;
