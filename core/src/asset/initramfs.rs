//! The initramfs: the agent as `/init`, and the modules that the kernel needs to find its drive.
//!
//! A plain (uncompressed) cpio archive in the `newc` format, which boots faster than a packed one. Source of the format:
//! the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs_err as fs;
use sha2::Digest as _;

use crate::asset::AssetError;

/// Part of the hash that names a composed file. Change it whenever the same parts make a different archive.
const LAYOUT: &[u8] = b"nexus initramfs 2\n";
/// The trailer of a signed module (linux/module_signature.h); 12 bytes of metadata and the signature precede it.
const SIGNED: &[u8] = b"~Module signature appended~\n";

/// Composes an initramfs in `cache`, or returns an existing one: the file name is a hash of its parts. `modules` are in load order.
pub fn compose_initramfs(cache: &Path, agent: &[u8], modules: &[PathBuf]) -> Result<PathBuf, AssetError> {
    let doing = AssetError::io("compose an initramfs");
    let mut files = Vec::with_capacity(modules.len());
    for module in modules {
        let name = module.file_name().and_then(|n| n.to_str()).filter(|n| !n.contains('\n'));
        let name = name
            .ok_or_else(|| doing(io::Error::new(io::ErrorKind::InvalidInput, "a module without a name")))?;
        files.push((name, fs::read(module).map_err(&doing)?));
    }
    let mut hasher = sha2::Sha256::new();
    hasher.update(LAYOUT);
    for (name, bytes) in files.iter().map(|(n, b)| (*n, b.as_slice())).chain([("init", agent)]) {
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    let digest = data_encoding::HEXLOWER.encode(&hasher.finalize());
    let path = cache.join(format!("initramfs-{}.cpio", &digest[..32]));
    // Refreshes its time, so that pruning the cache leaves it alone.
    if let Ok(file) = fs::File::open(&path) {
        file.set_modified(std::time::SystemTime::now()).map_err(&doing)?;
        return Ok(path);
    }
    fs::create_dir_all(cache).map_err(&doing)?;
    let mut temporary = tempfile::NamedTempFile::new_in(cache).map_err(&doing)?;
    write(&mut io::BufWriter::new(temporary.as_file_mut()), agent, &files).map_err(&doing)?;
    {
        use std::os::unix::fs::PermissionsExt;
        temporary.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(&doing)?;
    }
    temporary.persist(&path).map_err(|e| doing(e.error))?;
    Ok(path)
}

fn write(out: &mut impl Write, agent: &[u8], modules: &[(&str, Vec<u8>)]) -> io::Result<()> {
    let mut archive = Cpio { out, inode: 0, written: 0 };
    for directory in ["dev", "modules"] {
        archive.entry(directory, DIRECTORY | 0o755, (0, 0), b"")?;
    }
    // Without a console, /init would start without stdin, stdout and stderr.
    archive.entry("dev/console", CHARACTER | 0o600, (5, 1), b"")?;
    archive.entry("dev/null", CHARACTER | 0o666, (1, 3), b"")?;
    archive.entry("init", REGULAR | 0o755, (0, 0), agent)?;
    let mut order = String::new();
    for (name, bytes) in modules {
        order.push_str(name);
        order.push('\n');
        archive.entry(&format!("modules/{name}"), REGULAR | 0o644, (0, 0), unsigned(bytes))?;
    }
    archive.entry("modules/order", REGULAR | 0o644, (0, 0), order.as_bytes())?;
    archive.end()
}

/// A module without its signature. The host has already verified the package, and checking again is slow on an emulated
/// machine. Distribution kernels accept unsigned modules unless they are locked down, which requires secure boot.
fn unsigned(module: &[u8]) -> &[u8] {
    let Some((signed, facts)) = module.strip_suffix(SIGNED).and_then(|rest| rest.split_last_chunk::<12>())
    else {
        return module;
    };
    let length = u32::from_be_bytes([facts[8], facts[9], facts[10], facts[11]]);
    match usize::try_from(length).ok().and_then(|length| signed.len().checked_sub(length)) {
        Some(end) => &signed[..end],
        None => module,
    }
}

const DIRECTORY: u32 = 0o040_000;
const CHARACTER: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;

struct Cpio<'w, W> {
    out: &'w mut W,
    inode: u32,
    written: usize,
}

impl<W: Write> Cpio<'_, W> {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        self.header(name, self.inode, mode, device, data)
    }

    fn header(
        &mut self,
        name: &str,
        inode: u32,
        mode: u32,
        device: (u32, u32),
        data: &[u8],
    ) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        // No timestamp: the same parts make the same archive.
        let (owner, group, time, sum) = (0, 0, 0, 0);
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_size = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let fields = [inode, mode, owner, group, links, time, size, 0, 0, device.0, device.1, name_size, sum];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(b"\0")?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn end(&mut self) -> io::Result<()> {
        self.header("TRAILER!!!", 0, 0, (0, 0), b"")?;
        self.out.flush()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    /// Pads to a multiple of four: header plus name, and data.
    fn pad(&mut self) -> io::Result<()> {
        let padding = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// An entry: name, mode, device numbers, contents.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn entries(archive: &Path) -> Vec<Entry> {
        let bytes = std::fs::read(archive).unwrap();
        let (mut at, mut entries) = (0, Vec::new());
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * n..at + 14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (name_size, size) = (field(11) as usize, field(6) as usize);
            let name = std::str::from_utf8(&bytes[at + 110..at + 110 + name_size - 1]).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(data, bytes.len());
                return entries;
            }
            entries.push((
                name.to_owned(),
                field(1),
                (field(9), field(10)),
                bytes[data..data + size].to_vec(),
            ));
            at = (data + size).next_multiple_of(4);
        }
    }

    fn module(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn an_initramfs_has_agent_modules_order_and_devices() {
        let dir = tempfile::tempdir().unwrap();
        let modules = [module(dir.path(), "00-b.ko", b"bbb"), module(dir.path(), "01-a.ko", b"a")];
        let path = compose_initramfs(&dir.path().join("cache"), b"the agent", &modules).unwrap();
        let entries = entries(&path);
        let facts: Vec<_> = entries.iter().map(|(name, mode, dev, _)| (name.as_str(), *mode, *dev)).collect();
        assert_eq!(
            facts,
            [
                ("dev", 0o40755, (0, 0)),
                ("modules", 0o40755, (0, 0)),
                ("dev/console", 0o20600, (5, 1)),
                ("dev/null", 0o20666, (1, 3)),
                ("init", 0o100755, (0, 0)),
                ("modules/00-b.ko", 0o100644, (0, 0)),
                ("modules/01-a.ko", 0o100644, (0, 0)),
                ("modules/order", 0o100644, (0, 0)),
            ]
        );
        let contents: Vec<_> = entries[4..].iter().map(|(.., data)| data.as_slice()).collect();
        assert_eq!(contents, [&b"the agent"[..], b"bbb", b"a", b"00-b.ko\n01-a.ko\n"]);
    }

    #[test]
    fn the_same_parts_are_composed_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let one = module(dir.path(), "00-a.ko", b"a");
        let first = compose_initramfs(&cache, b"agent", std::slice::from_ref(&one)).unwrap();
        let made = std::fs::metadata(&first).unwrap().ino();
        let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        std::fs::File::open(&first).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(compose_initramfs(&cache, b"agent", std::slice::from_ref(&one)).unwrap(), first);
        let found = std::fs::metadata(&first).unwrap();
        assert_eq!(found.ino(), made);
        assert!(
            found.modified().unwrap() > long_ago,
            "what is in use looks young to those who prune the cache"
        );
        let others = [
            compose_initramfs(&cache, b"agent 2", std::slice::from_ref(&one)).unwrap(),
            compose_initramfs(&cache, b"agent", &[]).unwrap(),
            compose_initramfs(&cache, b"agent", &[module(dir.path(), "00-b.ko", b"a")]).unwrap(),
            compose_initramfs(&cache, b"agent", &[module(dir.path(), "00-a.ko", b"b")]).unwrap(),
        ];
        let all: std::collections::BTreeSet<_> = others.iter().chain([&first]).collect();
        assert_eq!(all.len(), 5);
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 5, "no half-made file is left");
    }

    #[test]
    fn a_missing_module_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = compose_initramfs(dir.path(), b"agent", &[dir.path().join("none.ko")]).unwrap_err();
        assert!(nexus_schema::error::chain(&error).contains("none.ko"), "{error:?}");
    }

    #[test]
    fn signatures_of_modules_are_left_out() {
        let signed = |length: u32| {
            [b"ELF and so on".as_slice(), b"signature", &[0; 8], &length.to_be_bytes(), SIGNED].concat()
        };
        assert_eq!(unsigned(&signed(9)), b"ELF and so on");
        for odd in [signed(9999), SIGNED.to_vec(), b"no signature".to_vec(), vec![]] {
            assert_eq!(unsigned(&odd), odd);
        }
    }
}
