//! Which modules a kernel needs to boot a VM, and in which order to load them.
//!
//! A kernel package has no `modules.dep`. A module's dependencies are in its own `.modinfo` section, as NUL-terminated
//! `key=value` strings. `modules.builtin` lists what is built in.

use std::collections::{BTreeMap, BTreeSet};

use crate::asset::error::KernelProblem;

/// The most that one module may have, unpacked.
pub(crate) const MAX_MODULE: u64 = 64 << 20;

/// The modules needed for booting: virtio over MMIO with block, network, vsock, entropy and serial ports, and ext4. Others are added
/// as their dependencies.
const ROOTS: [(&str, Need); 7] = [
    ("virtio_mmio", Need::Must),
    ("virtio_blk", Need::Must),
    ("virtio_net", Need::Must),
    ("vmw_vsock_virtio_transport", Need::Must),
    ("virtio_rng", Need::May),
    // For VMs that can be checkpointed.
    ("virtio_console", Need::May),
    ("ext4", Need::Must),
];

/// Their known dependencies in some kernels. These are read in the first pass over a package, which mostly saves a
/// second one. The list need not be complete.
const LIKELY: [&str; 14] = [
    "virtio",
    "virtio_ring",
    "failover",
    "net_failover",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "rng_core",
    "jbd2",
    "mbcache",
    "crc16",
    "crc32c_generic",
    "crc32c_intel",
    "crc32c_cryptoapi",
    "libcrc32c",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Must,
    May,
}

/// The modules of a kernel that were read so far.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    /// Unpacked files by module name.
    files: BTreeMap<String, (Vec<u8>, Info)>,
    /// Names of built-in modules, if known.
    builtin: Option<BTreeSet<String>>,
    /// Names of all modules in the package.
    present: BTreeSet<String>,
}

/// What a module's `.modinfo` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Info {
    depends: Vec<String>,
    /// Soft dependencies: loaded before it if they exist.
    before: Vec<String>,
}

/// The result of choosing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The modules to load, in order.
    Order(Vec<String>),
    /// These must be read first.
    Unread(BTreeSet<String>),
}

/// The name of the module in a file such as `kernel/drivers/char/hw_random/virtio-rng.ko.xz`: `virtio_rng`.
pub(crate) fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = ["", ".xz", ".zst", ".gz"]
        .iter()
        .find_map(|packed| file.strip_suffix(packed)?.strip_suffix(".ko"))?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (!stem.is_empty() && stem.len() <= 64 && stem.bytes().all(plain)).then(|| normal(stem))
}

/// Normalizes a module name: `-` and `_` are the same.
pub(super) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The modules to read in the first pass.
pub(crate) fn first_guess() -> BTreeSet<String> {
    ROOTS.iter().map(|(name, _)| *name).chain(LIKELY).map(str::to_owned).collect()
}

impl Modules {
    /// Adds the list of built-in modules: one path a line.
    pub(crate) fn set_builtin(&mut self, list: &str) {
        self.builtin.get_or_insert_default().extend(list.lines().filter_map(module_name));
    }

    /// Records that a module of this name exists.
    pub(crate) fn note_present(&mut self, name: &str) {
        if !self.present.contains(name) {
            self.present.insert(name.to_owned());
        }
    }

    /// Adds a module's unpacked file.
    pub(crate) fn add(&mut self, name: &str, file: Vec<u8>) -> Result<(), KernelProblem> {
        let info =
            info(&file).map_err(|problem| KernelProblem::Module { module: name.to_owned(), problem })?;
        self.note_present(name);
        self.files.insert(name.to_owned(), (file, info));
        Ok(())
    }

    /// A module's unpacked file.
    pub(crate) fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(|(file, _)| file.as_slice())
    }

    /// Chooses the modules needed for booting, each after its dependencies.
    pub(crate) fn choose(&self) -> Result<Choice, KernelProblem> {
        let mut walk = Walk { modules: self, order: Vec::new(), open: Vec::new(), unread: BTreeSet::new() };
        for (name, need) in ROOTS {
            walk.visit(name, need)?;
        }
        Ok(if walk.unread.is_empty() { Choice::Order(walk.order) } else { Choice::Unread(walk.unread) })
    }
}

struct Walk<'m> {
    modules: &'m Modules,
    order: Vec<String>,
    open: Vec<String>,
    unread: BTreeSet<String>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str, need: Need) -> Result<(), KernelProblem> {
        if self.order.iter().any(|n| n == name) || self.unread.contains(name) {
            return Ok(());
        }
        if self.open.iter().any(|n| n == name) {
            return Err(KernelProblem::Circle(name.to_owned()));
        }
        if !self.modules.present.contains(name) {
            let built_in = self.modules.builtin.as_ref().is_none_or(|b| b.contains(name));
            return match need {
                Need::Must if !built_in => Err(KernelProblem::NoModule(name.to_owned())),
                _ => Ok(()),
            };
        }
        let Some((_, info)) = self.modules.files.get(name) else {
            self.unread.insert(name.to_owned());
            return Ok(());
        };
        self.open.push(name.to_owned());
        for before in &info.before {
            // A soft dependency may name an algorithm instead of a module.
            let generic = format!("{before}_generic");
            let name = if self.modules.present.contains(before) { before } else { &generic };
            if !self.open.contains(name) {
                self.visit(name, Need::May)?;
            }
        }
        for dependency in &info.depends {
            self.visit(dependency, Need::Must)?;
        }
        self.open.pop();
        self.order.push(name.to_owned());
        Ok(())
    }
}

/// Reads a module's `.modinfo`.
fn info(file: &[u8]) -> Result<Info, &'static str> {
    let mut info = Info::default();
    for (key, value) in entries(section(file, b".modinfo")?) {
        match key {
            "depends" => info.depends.extend(value.split(',').filter(|n| !n.is_empty()).map(normal)),
            "softdep" => {
                let before = value
                    .split_whitespace()
                    .skip_while(|w| *w != "pre:")
                    .skip(1)
                    .take_while(|w| *w != "post:");
                info.before.extend(before.map(normal));
            }
            _ => {}
        }
    }
    if info.depends.len() + info.before.len() > 64 {
        return Err("it depends on too many modules");
    }
    Ok(info)
}

/// The NUL-terminated `key=value` strings of a `.modinfo`.
pub(super) fn entries(section: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    section.split(|b| *b == 0).filter_map(|entry| std::str::from_utf8(entry).ok()?.split_once('='))
}

/// A section of a 64-bit little-endian ELF file, by name.
pub(super) fn section<'f>(file: &'f [u8], name: &[u8]) -> Result<&'f [u8], &'static str> {
    const SHORT: &str = "its sections are not where they should be";
    if file.get(..6) != Some(&[0x7f, b'E', b'L', b'F', 2, 1]) {
        return Err("it is no 64-bit ELF file");
    }
    let u16_at =
        |at: usize| file.get(at..).and_then(<[u8]>::first_chunk).map(|b| u16::from_le_bytes(*b)).ok_or(SHORT);
    let u64_at = |at: usize| {
        let bytes = file.get(at..).and_then(<[u8]>::first_chunk).ok_or(SHORT)?;
        usize::try_from(u64::from_le_bytes(*bytes)).map_err(|_| SHORT)
    };
    let (table, size) = (u64_at(0x28)?, usize::from(u16_at(0x3a)?));
    let header = |number: u16| {
        table.checked_add(usize::from(number) * size).filter(|at| at.checked_add(64).is_some()).ok_or(SHORT)
    };
    let contents = |at: usize| {
        let (offset, length) = (u64_at(at + 0x18)?, u64_at(at + 0x20)?);
        offset.checked_add(length).and_then(|end| file.get(offset..end)).ok_or(SHORT)
    };
    let names = contents(header(u16_at(0x3e)?)?)?;
    for number in 0..u16_at(0x3c)? {
        let at = header(number)?;
        let name_at =
            file.get(at..).and_then(<[u8]>::first_chunk).map(|b| u32::from_le_bytes(*b)).ok_or(SHORT)?;
        let found = names.get(name_at as usize..).ok_or(SHORT)?;
        if found.split(|b| *b == 0).next() == Some(name) {
            return contents(at);
        }
    }
    Err("it has no .modinfo")
}
