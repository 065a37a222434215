//! A miniature archive with real signatures on a server, and a host configured for it.

use std::path::Path;
use std::time::Duration;

use nexus_schema::Arch;

use crate::asset::debian::{ARCH, Archive};
use crate::asset::error::AssetError;
use crate::asset::fetch::FetchSettings;
use crate::asset::stream::{Compression, Sha256};
use crate::asset::testing::keys::{Key, NOW, NOW_SECONDS};
use crate::asset::testing::{Server, bz_image, elf_kernel, module, pack};
use crate::os::tls::Trust;
use crate::progress::Progress;

/// A package.
#[derive(Debug, Clone)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) deb: Vec<u8>,
}

/// The tar archive of these files.
pub(super) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, path, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A `.deb` around a data archive.
pub(super) fn deb_of(data: &[u8], compression: Compression) -> Vec<u8> {
    let name = match compression {
        Compression::Plain => "data.tar",
        Compression::Gzip => "data.tar.gz",
        Compression::Zstd => "data.tar.zst",
        Compression::Xz | Compression::Lz4Legacy => "data.tar.xz",
    };
    let members = [
        ("debian-binary", b"2.0\n".to_vec()),
        // Of an odd length, so that there is padding.
        ("control.tar", vec![0; 1025]),
        (name, pack(data, compression)),
    ];
    let mut builder = ar::Builder::new(Vec::new());
    for (name, bytes) in members {
        builder.append(&ar::Header::new(name.into(), bytes.len() as u64), &bytes[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

impl Package {
    pub(super) fn new(name: &str, version: &str, files: &[(&str, &[u8])], compression: Compression) -> Self {
        Self { name: name.into(), version: version.into(), deb: deb_of(&tar(files), compression) }
    }

    pub(super) fn busybox() -> Self {
        let files: [(&str, &[u8]); 2] = [("./usr/share/doc/x", b"x"), ("./bin/busybox", b"a busybox")];
        Self::new("busybox-static", "1:1.35.0-4+b1", &files, Compression::Xz)
    }

    /// A kernel of this version, as Debian packs them; the modules are packed too where the tree is below `/usr`.
    pub(super) fn kernel(uname: &str, version: &str, usr: bool) -> Self {
        let image = bz_image(&kernel_elf(uname), Compression::Lz4Legacy, uname);
        let mut files = vec![(format!("./boot/vmlinuz-{uname}"), image)];
        let (tree, packed) = if usr { ("./usr/lib/modules", ".xz") } else { ("./lib/modules", "") };
        let builtin = "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio.ko\n";
        files.push((format!("{tree}/{uname}/modules.builtin"), builtin.into()));
        for (path, depends) in [
            ("drivers/virtio/virtio_mmio", "virtio_ring"),
            ("drivers/virtio/virtio_ring", ""),
            // A chain of dependencies that cannot be guessed: it takes three passes.
            ("drivers/block/virtio_blk", "surprise"),
            ("lib/surprise", "second-surprise"),
            ("lib/second_surprise", ""),
            ("drivers/net/virtio_net", "virtio_ring"),
            ("net/vmw_vsock/vmw_vsock_virtio_transport", "vsock"),
            ("net/vmw_vsock/vsock", ""),
            ("drivers/char/hw_random/virtio-rng", ""),
            (
                "drivers/gpu/a-driver-with-a-name-that-is-so-long-that-it-does-not-fit-into-the-header-of-a-tar-archive",
                "",
            ),
        ] {
            let file = module(&[&format!("depends={depends}"), &format!("vermagic={uname} SMP")]);
            let compression = if usr { Compression::Xz } else { Compression::Plain };
            files.push((format!("{tree}/{uname}/kernel/{path}.ko{packed}"), pack(&file, compression)));
        }
        let files: Vec<_> = files.iter().map(|(p, b)| (p.as_str(), b.as_slice())).collect();
        Self::new(&format!("linux-image-{uname}"), version, &files, Compression::Xz)
    }
}

/// The kernel that is in the package of this version.
pub(super) fn kernel_elf(uname: &str) -> Vec<u8> {
    elf_kernel(format!("{} Linux version {uname} (x)", "kernel ".repeat(20_000)).as_bytes())
}

/// Debian's way to write `6.1.0-1-cloud-amd64`.
pub(super) fn cloud(version: &str) -> String {
    format!("{version}-cloud-{ARCH}")
}

/// A suite that a test is going to publish.
#[derive(Debug, Clone)]
pub(super) struct SuiteToBe {
    /// Where the archive is on the server.
    pub(super) root: String,
    pub(super) suite: String,
    pub(super) origin: String,
    pub(super) codename: String,
    pub(super) date: u32,
    pub(super) valid_until: Option<u32>,
    /// More lines of its index.
    pub(super) more: String,
    pub(super) by_hash: bool,
    pub(super) list: Compression,
    pub(super) arch: Arch,
    pub(super) packages: Vec<Package>,
}

impl SuiteToBe {
    pub(super) fn new(packages: Vec<Package>) -> Self {
        Self {
            root: "/debian".into(),
            suite: "bookworm".into(),
            origin: "Debian".into(),
            codename: "bookworm".into(),
            date: NOW - 86400,
            valid_until: None,
            more: "Version: 12.15\n".into(),
            by_hash: true,
            list: Compression::Xz,
            arch: Arch::HOST,
            packages,
        }
    }

    pub(super) fn in_release(&self) -> String {
        format!("{}/dists/{}/InRelease", self.root, self.suite)
    }

    pub(super) fn list_path(&self) -> String {
        format!("{}/dists/{}/{}", self.root, self.suite, self.list_name())
    }

    pub(super) fn list_by_hash(&self) -> String {
        let digest = Sha256::of(&self.packed_list());
        let arch = self.arch.of_packages();
        format!("{}/dists/{}/main/binary-{arch}/by-hash/SHA256/{digest}", self.root, self.suite)
    }

    pub(super) fn deb_path(&self, number: usize) -> String {
        format!("{}/{}", self.root, filename(&self.packages[number]))
    }

    fn list_name(&self) -> String {
        let extension = match self.list {
            Compression::Plain => "",
            Compression::Gzip => ".gz",
            Compression::Zstd => ".zst",
            _ => ".xz",
        };
        format!("main/binary-{}/Packages{extension}", self.arch.of_packages())
    }

    pub(super) fn packed_list(&self) -> Vec<u8> {
        let (mut text, arch) = (String::new(), self.arch.of_packages());
        for package in &self.packages {
            text.push_str(&format!(
                "Package: {}\nVersion: {}\nArchitecture: {arch}\nDescription: none\nFilename: {}\nSize: {}\nSHA256: {}\n\n",
                package.name,
                package.version,
                filename(package),
                package.deb.len(),
                Sha256::of(&package.deb),
            ));
        }
        pack(text.as_bytes(), self.list)
    }

    pub(super) fn release(&self) -> String {
        let (list, arch) = (self.packed_list(), self.arch.of_packages());
        let until = self.valid_until.map(|t| format!("Valid-Until: {}\n", date(t))).unwrap_or_default();
        let suite = if self.origin == "Ubuntu" { self.suite.as_str() } else { "stable" };
        let by_hash = if self.by_hash { "Acquire-By-Hash: yes\n" } else { "" };
        format!(
            "Origin: {}\nLabel: Test\nSuite: {suite}\nCodename: {}\n{}{until}Date: {}\n{by_hash}Architectures: {arch}\n\
             Components: main\nSHA256:\n {} {} {}\n",
            self.origin,
            self.codename,
            self.more,
            date(self.date),
            Sha256::of(&list),
            list.len(),
            self.list_name(),
        )
    }

    /// Puts all of it on a server. Where the index offers it, the list is available only by its hash.
    pub(super) fn publish(&self, server: &Server, key: &Key) {
        server.put(&self.in_release(), key.sign(&self.release()));
        let list = if self.by_hash { self.list_by_hash() } else { self.list_path() };
        server.put(&list, self.packed_list());
        for (number, package) in self.packages.iter().enumerate() {
            server.put(&self.deb_path(number), package.deb.clone());
        }
    }
}

fn filename(package: &Package) -> String {
    let version = package.version.split_once(':').map_or(package.version.as_str(), |(_, v)| v);
    format!("pool/main/x/{}_{version}_{ARCH}.deb", package.name)
}

fn date(seconds: u32) -> String {
    let time = jiff::Timestamp::from_second(seconds.into()).unwrap();
    time.strftime("%a, %d %b %Y %H:%M:%S UTC").to_string()
}

/// A host whose apt is configured for a server.
pub(super) struct Host {
    pub(super) server: Server,
    pub(super) key: Key,
    pub(super) root: tempfile::TempDir,
    pub(super) trust: Trust,
    pub(super) progress: Progress,
}

impl Host {
    /// With one source: `bookworm` below `/debian`.
    pub(super) fn new() -> Self {
        Self::of(Server::start())
    }

    pub(super) fn of(server: Server) -> Self {
        let host = Self {
            server,
            key: Key::good(),
            root: tempfile::tempdir().unwrap(),
            trust: Trust::default(),
            progress: Progress::default(),
        };
        host.write("usr/share/keyrings/test.gpg", host.key.binary());
        host.source("/debian", "bookworm");
        host
    }

    pub(super) fn serving(suite: &SuiteToBe) -> Self {
        let host = Self::new();
        suite.publish(&host.server, &host.key);
        host
    }

    pub(super) fn write(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// Adds a source, signed by the host's key.
    pub(super) fn source(&self, root: &str, suites: &str) {
        let text = format!(
            "Types: deb\nURIs: {}\nSuites: {suites}\nComponents: main\nSigned-By: /usr/share/keyrings/test.gpg\n",
            self.server.url(root)
        );
        let name =
            format!("etc/apt/sources.list.d/{}.sources", format!("{root}-{suites}").replace(['/', ' '], "_"));
        self.write(&name, text);
    }

    pub(super) fn path(&self) -> &Path {
        self.root.path()
    }

    pub(super) async fn open(&self) -> Result<Archive, AssetError> {
        self.open_for(Arch::HOST).await
    }

    /// Opens the archive for packages of an architecture.
    pub(super) async fn open_for(&self, arch: Arch) -> Result<Archive, AssetError> {
        let settings = FetchSettings {
            connect_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(20),
            retries: 1,
            backoff: Duration::from_millis(5),
            trust: self.trust.clone(),
            ..FetchSettings::default()
        };
        Archive::open_with(arch, self.path(), settings, NOW_SECONDS, &self.progress).await
    }

    /// Opens an archive that must be refused, and returns the error.
    pub(super) async fn refused(&self) -> String {
        match self.open().await {
            Err(error @ AssetError::NoArchive { .. }) => nexus_schema::error::chain(&error),
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("it was opened"),
        }
    }
}
