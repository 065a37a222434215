//! Checks the packages: which may depend on which, and on what.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::OnceLock;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, PackageId};

use crate::source::root;
use crate::{Finding, none};

/// The packages of the workspace, with those that each may use.
const DIRECTION: &[(&str, &[&str])] = &[
    ("nexus-schema", &[]),
    ("nexus-wire", &[]),
    ("nexus-tree", &["nexus-schema", "nexus-wire"]),
    ("nexus-vsock", &["nexus-schema"]),
    ("nexus-guest", &["nexus-schema", "nexus-tree", "nexus-vsock", "nexus-wire"]),
    ("nexus-net-wire", &["nexus-schema", "nexus-wire"]),
    ("nexus-net-policy", &["nexus-schema"]),
    ("nexus-net", &["nexus-schema", "nexus-wire", "nexus-net-wire", "nexus-net-policy"]),
    (
        "nexus-core",
        &["nexus-schema", "nexus-tree", "nexus-vsock", "nexus-wire", "nexus-net-policy", "nexus-net-wire"],
    ),
    ("nexus-host", &["nexus-schema", "nexus-tree", "nexus-core"]),
    ("nexus-examples", &["nexus-schema", "nexus-core", "nexus-host"]),
    ("nexus-tests", &["nexus-schema", "nexus-core", "nexus-host"]),
];

/// Libraries of C under licences that reach whatever links them (libnftnl: GPL, libmnl: LGPL), and the one package that may.
const COPYLEFT: &[&str] = &["mnl", "mnl-sys", "nftnl", "nftnl-sys"];
const COPYLEFT_LINKED_BY: &str = "nexus-net";

/// Everything that the vocabulary may use: none of it does IO.
const VOCABULARY: &[&str] = &["data-encoding", "jiff", "schemars", "serde", "serde_json", "thiserror"];

/// Licences that are allowed for code in the binaries.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Not allowed anywhere in the graph.
const BANNED: &[(&str, &str)] = &[
    ("openssl", "TLS is rustls"),
    ("openssl-sys", "TLS is rustls"),
    ("native-tls", "TLS is rustls"),
    ("aws-lc-sys", "rustls uses ring: no cmake in the build"),
    ("async-std", "the runtime is tokio"),
    ("xz2", "unmaintained: liblzma is its continuation, and only one of them fits in a build"),
    ("lzma-sys", "unmaintained: liblzma-sys is its continuation"),
    ("serde_yaml", "unmaintained: serde_yaml_ng"),
    ("bindgen", "needs libclang at build time"),
];

/// Not allowed as a direct dependency.
const BANNED_DIRECT: &[(&str, &str)] = &[
    ("anyhow", "one error enum per module, by thiserror"),
    ("eyre", "one error enum per module, by thiserror"),
    ("chrono", "times are jiff's"),
    ("time", "times are jiff's"),
    ("lazy_static", "std::sync::LazyLock"),
    ("once_cell", "std::sync::OnceLock"),
    ("log", "tracing"),
    ("async-trait", "async functions in traits"),
];

fn metadata() -> &'static Metadata {
    static METADATA: OnceLock<Metadata> = OnceLock::new();
    METADATA.get_or_init(|| {
        let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        MetadataCommand::new()
            .manifest_path(root().join("Cargo.toml"))
            .other_options(["--locked".to_owned(), "--filter-platform".to_owned(), platform])
            .exec()
            .expect("cargo metadata describes the workspace")
    })
}

fn ours() -> Vec<&'static Package> {
    metadata().workspace_packages()
}

fn finding(package: &Package, what: String) -> Finding {
    let manifest = package.manifest_path.strip_prefix(root()).unwrap_or(&package.manifest_path);
    Finding { file: manifest.to_string(), line: 1, what }
}

/// Everything that is linked into what users run, or runs while it is built.
fn shipped() -> BTreeMap<&'static PackageId, &'static Package> {
    needed(metadata().workspace_members.iter())
}

/// These packages, and everything that is linked into them or runs while they are built.
fn needed(
    packages: impl Iterator<Item = &'static PackageId>,
) -> BTreeMap<&'static PackageId, &'static Package> {
    let metadata = metadata();
    let resolve = metadata.resolve.as_ref().expect("the dependency graph was asked for");
    let nodes: BTreeMap<_, _> = resolve.nodes.iter().map(|node| (&node.id, node)).collect();
    let mut queue: VecDeque<&PackageId> = packages.collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = queue.pop_front() {
        if !seen.insert(id) {
            continue;
        }
        let wanted = nodes[id].deps.iter().filter(|dependency| {
            dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development)
        });
        queue.extend(wanted.map(|dependency| &dependency.pkg));
    }
    metadata
        .packages
        .iter()
        .filter(|package| seen.contains(&package.id))
        .map(|package| (&package.id, package))
        .collect()
}

#[test]
fn packages_depend_in_one_direction() {
    let mut findings = Vec::new();
    let names: BTreeSet<&str> = ours().iter().map(|package| package.name.as_str()).collect();
    for package in ours() {
        let Some((_, allowed)) = DIRECTION.iter().find(|(name, _)| *name == package.name.as_str()) else {
            findings.push(finding(
                package,
                format!("{} is not in the plan of tests/tidy/packages.rs", package.name),
            ));
            continue;
        };
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            if names.contains(name) && !allowed.contains(&name) {
                findings.push(finding(package, format!("{} may not depend on {name}", package.name)));
            }
            if package.name.as_str() == "nexus-schema"
                && dependency.kind == DependencyKind::Normal
                && !VOCABULARY.contains(&name)
            {
                findings.push(finding(package, format!("the vocabulary may not use {name}: it does no IO")));
            }
        }
    }
    none(
        "nexus-schema <- nexus-guest; nexus-schema <- nexus-core <- nexus-host <- tests, examples",
        findings,
    );
}

/// A separate cargo builds the guest; the outer one only knows what the build script reports.
#[test]
fn the_guest_is_built_anew_when_a_part_of_it_changes() {
    let script =
        std::fs::read_to_string(root().join("host-mcp/build.rs")).expect("the build script is there");
    let (_, parts) = DIRECTION.iter().find(|(name, _)| *name == "nexus-guest").expect("it is in the plan");
    let parts = ours().into_iter().filter(|package| {
        let name = package.name.as_str();
        name == "nexus-guest" || parts.contains(&name)
    });
    let missing = parts.flat_map(|package| {
        let manifest = package.manifest_path.strip_prefix(root()).expect("it is in the workspace");
        let sources = manifest.with_file_name("src");
        [manifest.to_string(), sources.to_string()]
    });
    let missing = missing.filter(|path| !script.contains(&format!("\"{path}\"")));
    let findings = missing.map(|path| Finding {
        file: "host-mcp/build.rs".to_owned(),
        line: 1,
        what: format!("does not watch {path}: add it to SOURCES"),
    });
    none("the guest is built anew when a part of it changes", findings.collect());
}

#[test]
fn licences_are_known() {
    let allowed = |request: &spdx::LicenseReq| LICENCES.contains(&request.to_string().as_str());
    let mut findings = Vec::new();
    for package in shipped().values() {
        let what = match package.license.as_deref() {
            None => format!("{} {} states no licence", package.name, package.version),
            Some(licence) => match spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX) {
                Ok(expression) if expression.evaluate(allowed) => continue,
                Ok(_) => format!(
                    "{} {} is under {licence}, which is not on the list",
                    package.name, package.version
                ),
                Err(e) => {
                    format!("{} {}: {licence:?} is no licence expression: {e}", package.name, package.version)
                }
            },
        };
        findings.push(Finding { file: "Cargo.lock".to_owned(), line: 1, what });
    }
    none("all that is linked is under a licence of tests/tidy/packages.rs", findings);
}

/// nexusd and nexusctl are under Apache-2.0, and can be linked statically.
#[test]
fn one_binary_alone_links_copyleft_libraries() {
    let mut findings = Vec::new();
    for package in ours() {
        let all = needed([&package.id].into_iter());
        let linked: Vec<&str> =
            all.values().map(|one| one.name.as_str()).filter(|name| COPYLEFT.contains(name)).collect();
        let may = package.name.as_str() == COPYLEFT_LINKED_BY;
        if !may && !linked.is_empty() {
            findings.push(finding(package, format!("{} links {}", package.name, linked.join(", "))));
        }
        if may && linked.is_empty() {
            findings.push(finding(package, "links none of them: COPYLEFT is out of date".to_owned()));
        }
    }
    // Whatever else links a library of C of that kind says so here.
    for package in shipped().values() {
        let names = package.links.as_deref().filter(|links| links.contains("nftnl") || links.contains("mnl"));
        if names.is_some() && !COPYLEFT.contains(&package.name.as_str()) {
            let what = format!("{} links {}: add it to COPYLEFT", package.name, names.unwrap_or_default());
            findings.push(Finding { file: "Cargo.lock".to_owned(), line: 1, what });
        }
    }
    none("only nexus-net links libnftnl and libmnl", findings);
}

#[test]
fn banned_packages_stay_out() {
    let mut findings = Vec::new();
    for package in shipped().values() {
        if let Some((name, why)) = BANNED.iter().find(|(name, _)| *name == package.name.as_str()) {
            let what = format!("{name} is in the graph ({why}); `cargo tree -i {name}` says through whom");
            findings.push(Finding { file: "Cargo.lock".to_owned(), line: 1, what });
        }
    }
    for package in ours() {
        for dependency in &package.dependencies {
            let banned = BANNED.iter().chain(BANNED_DIRECT).find(|(name, _)| *name == dependency.name);
            if let Some((name, why)) = banned {
                findings.push(finding(package, format!("depends on {name}: {why}")));
            }
        }
    }
    none("banned packages stay out", findings);
}

#[test]
fn packages_are_alike() {
    let mut findings = Vec::new();
    for package in ours() {
        let manifest = std::fs::read_to_string(&package.manifest_path).expect("cargo read it just now");
        if !manifest.contains("[lints]\nworkspace = true") {
            findings.push(finding(
                package,
                "does not take the workspace's lints: [lints] workspace = true".to_owned(),
            ));
        }
        if package.publish.as_deref() != Some(&[]) {
            findings.push(finding(package, "could be published: publish.workspace = true".to_owned()));
        }
        if package.license.as_deref() != Some("Apache-2.0") {
            findings.push(finding(package, "is not under the workspace's licence".to_owned()));
        }
        for dependency in &package.dependencies {
            let line = manifest.lines().find(|line| {
                let key = line.split(['.', '=', ' ']).next().unwrap_or_default();
                key == dependency.rename.as_deref().unwrap_or(&dependency.name)
            });
            if line.is_some_and(|line| !line.contains("workspace")) {
                findings.push(finding(
                    package,
                    format!("{}: put its version in the workspace's Cargo.toml", dependency.name),
                ));
            }
        }
    }
    none("every package takes lints, licence and versions from the workspace", findings);
}
