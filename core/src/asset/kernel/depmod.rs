//! Makes the files that depmod(8) makes for a kernel's modules: their dependencies, and the names that load them.
//!
//! Kernel packages do not contain these files; they are generated at installation. BusyBox reads the text files, kmod and
//! systemd the `.bin` files. Source of the formats: modules.dep(5), and kmod's depmod.

use std::collections::{BTreeMap, BTreeSet};

use super::index::Index;
use super::modules::{entries, module_name, normal, section};

/// The files of a package that are used for this.
pub(crate) const LISTS: [&str; 3] = ["modules.order", "modules.builtin", "modules.builtin.modinfo"];

/// Everything that is known of a kernel's modules.
#[derive(Debug, Default)]
pub(crate) struct Depmod {
    modules: Vec<Module>,
    order: String,
    builtin: String,
    builtin_info: Vec<u8>,
}

#[derive(Debug)]
struct Module {
    /// Below the directory of the kernel's version, such as `kernel/fs/overlayfs/overlay.ko`.
    path: String,
    name: String,
    depends: Vec<String>,
    aliases: Vec<String>,
    soft: Vec<String>,
    symbols: Vec<String>,
}

impl Depmod {
    /// Adds a module's unpacked file.
    pub(crate) fn module(&mut self, path: &str, file: &[u8]) -> Result<(), &'static str> {
        let Some(name) = module_name(path) else { return Ok(()) };
        let mut module = Module {
            path: path.to_owned(),
            name,
            depends: Vec::new(),
            aliases: Vec::new(),
            soft: Vec::new(),
            symbols: Vec::new(),
        };
        for (key, value) in entries(section(file, b".modinfo")?) {
            match key {
                "depends" => {
                    module.depends.extend(value.split(',').filter(|n| !n.is_empty()).map(normal));
                }
                "alias" => module.aliases.push(value.to_owned()),
                "softdep" => module.soft.push(value.to_owned()),
                _ => {}
            }
        }
        // A module that exports nothing has no such section.
        if let Ok(names) = section(file, b"__ksymtab_strings") {
            let names = names.split(|b| *b == 0).filter(|name| !name.is_empty());
            module.symbols.extend(names.filter_map(|name| Some(std::str::from_utf8(name).ok()?.to_owned())));
        }
        self.modules.push(module);
        Ok(())
    }

    /// Adds one of [`LISTS`].
    pub(crate) fn list(&mut self, name: &str, content: &[u8]) {
        match name {
            "modules.order" => self.order.push_str(&String::from_utf8_lossy(content)),
            "modules.builtin" => self.builtin.push_str(&String::from_utf8_lossy(content)),
            "modules.builtin.modinfo" => self.builtin_info.extend_from_slice(content),
            _ => {}
        }
    }

    /// Whether there are any modules.
    pub(crate) fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }

    /// The files, by name.
    pub(crate) fn files(mut self) -> BTreeMap<&'static str, Vec<u8>> {
        self.sort();
        let mut files = BTreeMap::new();
        let mut put = |text: &'static str, lines: String, binary: &'static str, index: &Index| {
            files.insert(text, lines.into_bytes());
            // A file that is too large for its format is left out: its readers report that.
            files.extend(index.to_bytes().map(|bytes| (binary, bytes)));
        };
        let (text, index) = self.dependencies();
        put("modules.dep", text, "modules.dep.bin", &index);
        let (text, index) = self.aliases();
        put("modules.alias", text, "modules.alias.bin", &index);
        let (text, index) = self.symbols();
        put("modules.symbols", text, "modules.symbols.bin", &index);
        files.insert("modules.softdep", self.soft_dependencies().into_bytes());
        files.insert("modules.devname", self.device_nodes().into_bytes());
        files.extend(self.builtin_names().to_bytes().map(|bytes| ("modules.builtin.bin", bytes)));
        files.extend(self.builtin_aliases().to_bytes().map(|bytes| ("modules.builtin.alias.bin", bytes)));
        files
    }

    /// Sorts by `modules.order`, which gives the priority where several modules match a name; then by path.
    fn sort(&mut self) {
        let places: BTreeMap<&str, usize> =
            self.order.lines().enumerate().map(|(at, path)| (path, at)).collect();
        self.modules.sort_by_cached_key(|m| {
            (places.get(m.path.as_str()).copied().unwrap_or(usize::MAX), m.path.clone())
        });
    }

    /// Modules with their priority.
    fn numbered(&self) -> impl Iterator<Item = (u32, &Module)> {
        (0..).zip(&self.modules)
    }

    fn dependencies(&self) -> (String, Index) {
        let by_name: BTreeMap<&str, &Module> = self.modules.iter().map(|m| (m.name.as_str(), m)).collect();
        let (mut text, mut index) = (String::new(), Index::default());
        for (priority, module) in self.numbered() {
            let mut order = Vec::new();
            visit(module, &by_name, &mut BTreeSet::new(), &mut order);
            // The first module to load comes last; the module itself is left out.
            order.pop();
            let mut line = format!("{}:", module.path);
            for dependency in order.iter().rev() {
                line.push(' ');
                line.push_str(dependency);
            }
            index.insert(&module.name, &line, priority);
            text.push_str(&line);
            text.push('\n');
        }
        (text, index)
    }

    fn aliases(&self) -> (String, Index) {
        let mut text = "# Aliases extracted from modules themselves.\n".to_owned();
        let mut index = Index::default();
        for (priority, module) in self.numbered() {
            for alias in &module.aliases {
                text.push_str(&format!("alias {alias} {}\n", module.name));
                index.insert(&normal_alias(alias), &module.name, priority);
            }
        }
        (text, index)
    }

    fn symbols(&self) -> (String, Index) {
        let mut text = "# Aliases for symbols, used by symbol_request().\n".to_owned();
        let mut index = Index::default();
        for (priority, module) in self.numbered() {
            for symbol in &module.symbols {
                text.push_str(&format!("alias symbol:{symbol} {}\n", module.name));
                index.insert(&format!("symbol:{symbol}"), &module.name, priority);
            }
        }
        (text, index)
    }

    fn soft_dependencies(&self) -> String {
        let mut text = "# Soft dependencies extracted from modules themselves.\n".to_owned();
        for module in &self.modules {
            for soft in &module.soft {
                text.push_str(&format!("softdep {} {soft}\n", module.name));
            }
        }
        text
    }

    /// Nodes of /dev that load a module when they are opened.
    fn device_nodes(&self) -> String {
        let mut text = "# Device nodes to trigger on-demand module loading.\n".to_owned();
        for module in &self.modules {
            let name = module.aliases.iter().find_map(|alias| alias.strip_prefix("devname:"));
            let number = module.aliases.iter().find_map(|alias| {
                let (kind, rest) = alias
                    .strip_prefix("char-major-")
                    .map(|rest| ('c', rest))
                    .or_else(|| alias.strip_prefix("block-major-").map(|rest| ('b', rest)))?;
                let (major, minor) = rest.split_once('-')?;
                Some((kind, major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
            });
            if let (Some(name), Some((kind, major, minor))) = (name, number) {
                text.push_str(&format!("{} {name} {kind}{major}:{minor}\n", module.name));
            }
        }
        text
    }

    fn builtin_names(&self) -> Index {
        let mut index = Index::default();
        for name in self.builtin.lines().filter_map(module_name) {
            index.insert(&name, "", 0);
        }
        index
    }

    fn builtin_aliases(&self) -> Index {
        let mut index = Index::default();
        for (key, value) in entries(&self.builtin_info) {
            if let Some(module) = key.strip_suffix(".alias") {
                index.insert(&normal_alias(value), &normal(module), 0);
            }
        }
        index
    }
}

/// Appends a module's dependencies and then the module itself to the load order.
fn visit<'m>(
    module: &'m Module,
    by_name: &BTreeMap<&str, &'m Module>,
    seen: &mut BTreeSet<&'m str>,
    order: &mut Vec<&'m str>,
) {
    if !seen.insert(&module.name) {
        return;
    }
    for name in &module.depends {
        if let Some(dependency) = by_name.get(name.as_str()) {
            visit(dependency, by_name, seen, order);
        }
    }
    order.push(&module.path);
}

/// Normalizes an alias for look-ups: `-` becomes `_`, but not within brackets.
fn normal_alias(alias: &str) -> String {
    let mut normal = String::with_capacity(alias.len());
    let mut in_brackets = false;
    for c in alias.chars() {
        match c {
            '[' => in_brackets = true,
            ']' => in_brackets = false,
            _ => {}
        }
        normal.push(if c == '-' && !in_brackets { '_' } else { c });
    }
    normal
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::asset::testing::module;

    const VERSION: &str = "6.1.0-x";

    fn sample() -> Depmod {
        let mut depmod = Depmod::default();
        for (path, entries) in [
            ("kernel/z/last.ko", &["depends=", "alias=pci:v0000-*sv[A-F]*", "alias=same"][..]),
            ("kernel/a/first-one.ko", &["depends=middle,last", "alias=fs-first", "softdep=pre: other"]),
            ("kernel/a/middle.ko", &["depends=deep", "alias=devname:mid/x", "alias=char-major-10-229"]),
            ("kernel/a/deep.ko", &["depends=", "alias=same", "alias=devname:alone"]),
        ] {
            depmod.module(path, &module(entries)).unwrap();
        }
        depmod.list("modules.order", b"kernel/a/deep.ko\nkernel/z/last.ko\n");
        depmod.list("modules.builtin", b"kernel/fs/ext4/ext4.ko\n");
        depmod.list("modules.builtin.modinfo", b"ext4.alias=fs-ext3\0ext4.license=GPL\0");
        depmod
    }

    fn text(files: &BTreeMap<&'static str, Vec<u8>>, name: &str) -> String {
        String::from_utf8(files[name].clone()).unwrap()
    }

    #[test]
    fn text_files_say_what_depends_on_what() {
        let files = sample().files();
        assert_eq!(
            text(&files, "modules.dep"),
            "kernel/a/deep.ko:\nkernel/z/last.ko:\n\
             kernel/a/first-one.ko: kernel/z/last.ko kernel/a/middle.ko kernel/a/deep.ko\n\
             kernel/a/middle.ko: kernel/a/deep.ko\n"
        );
        assert!(text(&files, "modules.alias").contains("\nalias pci:v0000-*sv[A-F]* last\n"));
        assert!(text(&files, "modules.softdep").ends_with("\nsoftdep first_one pre: other\n"));
        assert!(text(&files, "modules.devname").ends_with("loading.\nmiddle mid/x c10:229\n"));
    }

    /// What kmod's own program finds in the binary indexes.
    fn modprobe(root: &Path, arguments: &[&str]) -> String {
        let output = Command::new("modprobe")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .arg("-d")
            .arg(root)
            .args(["-S", VERSION, "-C", "/dev/null"])
            .args(arguments)
            .output()
            .expect("modprobe is installed (package kmod)");
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        text.replace(&format!("{}/lib/modules/{VERSION}/", root.display()), "")
    }

    #[test]
    fn kmod_reads_the_binary_indexes() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("lib/modules").join(VERSION);
        std::fs::create_dir_all(&tree).unwrap();
        for (name, content) in sample().files() {
            std::fs::write(tree.join(name), content).unwrap();
        }
        for module in ["z/last", "a/first-one", "a/middle", "a/deep"] {
            let file = tree.join(format!("kernel/{module}.ko"));
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, "").unwrap();
        }
        std::fs::write(tree.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let ask = |name: &str| modprobe(root.path(), &["--show-depends", name]);
        assert_eq!(
            ask("fs-first"),
            "insmod kernel/a/deep.ko \ninsmod kernel/a/middle.ko \ninsmod kernel/z/last.ko \n\
             insmod kernel/a/first-one.ko \n"
        );
        assert_eq!(ask("first-one"), ask("fs-first"));
        assert_eq!(ask("pci:v0000-12svB9"), "insmod kernel/z/last.ko \n");
        assert_eq!(ask("ext4"), "builtin ext4\n");
        assert_eq!(ask("fs-ext3"), "builtin ext4\n");
        assert!(ask("unknown").contains("not found"), "{}", ask("unknown"));
        // Several modules match one name: in the order of modules.order.
        assert_eq!(modprobe(root.path(), &["-R", "same"]), "deep\nlast\n");
    }

    #[test]
    fn an_index_holds_what_was_put_in() {
        assert_eq!(Index::default().to_bytes().unwrap(), [0xb0, 7, 0xf4, 0x57, 0, 2, 0, 1, 0, 0, 0, 0]);
        let mut index = Index::default();
        index.insert("ab", "1", 2);
        index.insert("ab", "0", 1);
        index.insert("ad", "2", 0);
        index.insert("no\u{e4}", "3", 0);
        let mut expected = vec![0xb0, 7, 0xf4, 0x57, 0, 2, 0, 1, 0xa0, 0, 0, 0x29];
        // "ab", and behind it "ad": values only.
        expected.extend(b"\0\0\0\x02\0\0\0\x010\0\0\0\0\x021\0");
        expected.extend(b"\0\0\0\x01\0\0\0\x002\0");
        // The root: prefix "a", children from b to d, none at c.
        expected.extend(b"a\0bd\x40\0\0\x0c\0\0\0\0\x40\0\0\x1c");
        expected[11] = u8::try_from(expected.len() - 16).unwrap();
        assert_eq!(index.to_bytes().unwrap(), expected);
    }
}
