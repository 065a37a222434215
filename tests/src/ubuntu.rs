//! A package archive in Ubuntu's form (a release, its updates and its security updates, signed, lists by hash, packages with
//! zstd), filled with packages of the archive that this host's apt uses; and an apt that is configured only for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::path::Path;
use std::process::Command;

use nexus_core::FetchSettings;
use nexus_core::internals::Archive;
use nexus_core::internals::Progress;
use pgp::composed::{
    CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedPublicKey, SignedSecretKey,
};
use pgp::ser::Serialize;
use pgp::types::Password;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::mirror::apt_proxy;
use crate::web::Web;

/// Packages of a small root filesystem in addition to the essential ones.
const WANTED: [&str; 6] = ["bash", "coreutils", "apt", "ca-certificates", "kmod", "python3-minimal"];
/// The architecture of its packages.
const ARCH: &str = nexus_schema::Arch::HOST.of_packages();
/// The path of the keyring, as on Ubuntu.
const KEYRING: &str = "usr/share/keyrings/ubuntu-archive-keyring.gpg";
/// The version of the only package of Ubuntu's own, which is in the updates.
const OWN: &str = "13ubuntu10.2";

/// A running archive; it stops when dropped.
#[derive(Debug)]
pub struct Ubuntu {
    root: TempDir,
    _web: Web,
}

type Fields = BTreeMap<String, String>;

impl Ubuntu {
    /// Makes one and serves it.
    pub fn start() -> Self {
        let (root, web) = (tempfile::tempdir().expect("a temporary directory"), Web::start());
        let (mirror, suite) = origin();
        let fetch = |path: &str, into: &Path| fetch(&format!("{mirror}/{path}"), into);
        let list = root.path().join("Packages.gz");
        fetch(&format!("dists/{suite}/main/binary-{ARCH}/Packages.gz"), &list);
        let chosen = closure(&stanzas(&unpacked(&list)));

        let pool = root.path().join("pool");
        fs::create_dir(&pool).expect("a directory for packages");
        let (mut release, mut updates) = (String::new(), String::new());
        for fields in &chosen {
            let name = fields["Filename"].rsplit('/').next().expect("a path has a name").to_owned();
            let file = pool.join(&name);
            fetch(&fields["Filename"], &file);
            // apt encodes two characters of versions in its own way.
            let asked = fields["Filename"].replace('+', "%2b").replace('~', "%7e");
            web.put(&format!("/ubuntu/{asked}"), fs::read(&file).expect("a package"));
            listed(&mut release, fields);
            if fields["Package"] == "base-files" {
                let (path, deb) = own_base_files(root.path(), &file);
                let mut own = fields.clone();
                own.extend([
                    ("Version".to_owned(), OWN.to_owned()),
                    ("Size".to_owned(), deb.len().to_string()),
                    ("SHA256".to_owned(), hex(&deb)),
                    ("Filename".to_owned(), path.clone()),
                ]);
                own.retain(|name, _| name != "MD5sum");
                listed(&mut updates, &own);
                web.put(&format!("/ubuntu/{path}"), deb);
            }
        }
        let key = key();
        for (suite, list) in
            [("noble", release), ("noble-updates", updates), ("noble-security", String::new())]
        {
            publish(&web, &key, suite, &list);
        }
        configure(root.path(), &web.url("/ubuntu"), &key);
        Self { root, _web: web }
    }

    /// A root directory whose apt downloads everything from here.
    pub fn apt_root(&self) -> &Path {
        self.root.path()
    }
}

/// The mirror and the suite of this host's own release.
fn origin() -> (String, String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let opened =
        runtime.block_on(Archive::open(Path::new("/"), &FetchSettings::default(), &Progress::default()));
    let source = opened.and_then(|archive| archive.bootstrap_source()).expect("apt's sources are reachable");
    let line = source.mirrors.iter().find(|line| line.ends_with(&format!(" {} main", source.suite)));
    let line = line.unwrap_or_else(|| panic!("no release among {:?}", source.mirrors));
    let mirror = line.split(' ').find(|word| word.starts_with("http")).expect("a mirror has an address");
    (mirror.to_owned(), source.suite)
}

fn fetch(url: &str, into: &Path) {
    let mut curl = Command::new("curl");
    curl.args(["-fsSL", "--retry", "3", "--max-time", "300", "-o"]).arg(into);
    curl.args(apt_proxy().iter().flat_map(|proxy| ["-x", proxy])).args(["--", url]);
    run(&mut curl);
}

fn run(command: &mut Command) {
    let ended = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
}

fn unpacked(list: &Path) -> String {
    let mut text = String::new();
    let file = fs::File::open(list).expect("a list of packages");
    flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).expect("a list of packages");
    text
}

fn stanzas(text: &str) -> Vec<Fields> {
    let fields = |stanza: &str| {
        let lines = stanza.lines().filter(|line| !line.starts_with(' '));
        let fields = lines.filter_map(|line| line.split_once(": "));
        fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    text.split("\n\n").map(fields).filter(|fields: &Fields| fields.contains_key("Package")).collect()
}

/// The wanted and required packages, with everything that they may need.
fn closure(all: &[Fields]) -> Vec<Fields> {
    let names = |fields: &Fields, field: &str| -> Vec<String> {
        let text = fields.get(field).map_or("", String::as_str);
        let words =
            text.split([',', '|']).filter_map(|word| word.split([' ', '(', ':']).find(|w| !w.is_empty()));
        words.map(str::to_owned).collect()
    };
    let mut offered: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (at, fields) in all.iter().enumerate() {
        // If several packages provide something, the first few are enough.
        offered.entry(fields["Package"].clone()).or_default().insert(0, at);
        for name in names(fields, "Provides") {
            offered.entry(name).or_default().push(at);
        }
    }
    let is_required = |fields: &Fields| {
        fields.get("Essential").is_some_and(|value| value == "yes")
            || fields.get("Priority").is_some_and(|value| value == "required")
            || WANTED.contains(&fields["Package"].as_str())
    };
    let mut left: Vec<usize> = (0..all.len()).filter(|at| is_required(&all[*at])).collect();
    let mut chosen = BTreeSet::new();
    while let Some(at) = left.pop() {
        if chosen.insert(at) {
            let needed = ["Depends", "Pre-Depends"].iter().flat_map(|field| names(&all[at], field));
            left.extend(needed.filter_map(|name| offered.get(&name)?.first().copied()));
        }
    }
    chosen.into_iter().map(|at| all[at].clone()).collect()
}

/// Adds a package to a list.
fn listed(list: &mut String, fields: &Fields) {
    for (name, value) in fields {
        writeln!(list, "{name}: {value}").expect("a string takes text");
    }
    list.push('\n');
}

/// The package that identifies the distribution, changed to Ubuntu's values, and its path in the archive.
fn own_base_files(scratch: &Path, deb: &Path) -> (String, Vec<u8>) {
    let tree = scratch.join("base-files");
    run(Command::new("dpkg-deb").arg("-R").args([deb, &tree]));
    let release = "PRETTY_NAME=\"Ubuntu 24.04 LTS\"\nNAME=\"Ubuntu\"\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\nID=ubuntu\nID_LIKE=debian\n";
    fs::write(tree.join("usr/lib/os-release"), release).expect("a file of the package");
    let control = fs::read_to_string(tree.join("DEBIAN/control")).expect("a package has a control file");
    let control = control.lines().map(|line| match line.starts_with("Version: ") {
        true => format!("Version: {OWN}\n"),
        false => format!("{line}\n"),
    });
    fs::write(tree.join("DEBIAN/control"), control.collect::<String>()).expect("the control file");
    let path = format!("pool/main/b/base-files/base-files_{OWN}_{ARCH}.deb");
    let file = scratch.join("own.deb");
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Zzstd", "-b"]).args([&tree, &file]));
    (path, fs::read(file).expect("a package"))
}

/// Serves a suite with one list of packages, available only by hash.
fn publish(web: &Web, key: &SignedSecretKey, suite: &str, list: &str) {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(list.as_bytes()).expect("memory takes everything");
    let packed = packer.finish().expect("memory takes everything");
    let directory = format!("main/binary-{ARCH}");
    let now = Command::new("date").args(["-u", "+%a, %d %b %Y %H:%M:%S UTC"]).output().expect("date runs");
    let release = format!(
        "Origin: Ubuntu\nLabel: Ubuntu\nSuite: {suite}\nVersion: 24.04\nCodename: noble\nDate: {}\nArchitectures: {ARCH}\n\
         Components: main restricted universe multiverse\nDescription: Ubuntu Noble 24.04\nAcquire-By-Hash: yes\nSHA256:\n \
         {} {} {directory}/Packages\n {} {} {directory}/Packages.gz\n",
        String::from_utf8_lossy(&now.stdout).trim(),
        hex(list.as_bytes()),
        list.len(),
        hex(&packed),
        packed.len(),
    );
    let signed =
        CleartextSignedMessage::sign(rand::thread_rng(), &release, &key.primary_key, &Password::empty());
    let signed = signed.and_then(|message| message.to_armored_string(None.into())).expect("a signed text");
    web.put(&format!("/ubuntu/dists/{suite}/InRelease"), signed);
    web.put(&format!("/ubuntu/dists/{suite}/{directory}/by-hash/SHA256/{}", hex(&packed)), packed);
}

fn key() -> SignedSecretKey {
    let mut params = SecretKeyParamsBuilder::default();
    params.key_type(KeyType::Rsa(2048)).can_certify(true).can_sign(true);
    params.primary_user_id("Ubuntu Archive of a Test <archive@example.test>".into());
    params.build().expect("a key's parameters").generate(rand::thread_rng()).expect("a key")
}

/// The sources of an Ubuntu host.
fn configure(root: &Path, mirror: &str, key: &SignedSecretKey) {
    let put = |path: &str, bytes: &[u8]| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a file is in a directory")).expect("a directory");
        fs::write(path, bytes).expect("a file of the host's");
    };
    put(KEYRING, &SignedPublicKey::from(key.clone()).to_bytes().expect("a key has bytes"));
    let suites = ["noble-security", "noble noble-updates noble-backports"];
    let stanza = |suites: &str| {
        let components = "main restricted universe multiverse";
        format!(
            "Types: deb\nURIs: {mirror}/\nSuites: {suites}\nComponents: {components}\nSigned-By: /{KEYRING}\n"
        )
    };
    put("etc/apt/sources.list.d/ubuntu.sources", suites.map(stanza).join("\n").as_bytes());
    put("etc/os-release", b"ID=ubuntu\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\n");
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}
