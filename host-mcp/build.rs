//! Builds `nexus-guest` for its own static target, so that `cargo build` alone builds everything, and hands the file's
//! path to the crate as `NEXUS_GUEST_BIN`.
//!
//! A build script may not share the target directory of the cargo that runs it (they would wait for each other forever),
//! so the guest has one beside it, `target/nexus-guest`, shared by check, clippy, test and every profile: the
//! guest's own cargo decides there whether anything has to be compiled. Nothing of the outer cargo's wrappers and flags may
//! reach the inner one, or the guest would be compiled anew for each of them.

#![allow(clippy::print_stdout, reason = "this is how a build script talks to cargo")]

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Set it to a target triple to choose the guest's target by hand.
const TARGET_OVERRIDE: &str = "NEXUS_GUEST_TARGET";

/// The beginning of the one flag that the guest takes from the outer build: it keeps the builder's folders out of the program.
const REMAP: &str = "--remap-path-prefix=";

/// What the guest is made of, relative to the workspace.
const SOURCES: [&str; 12] = [
    "Cargo.lock",
    "Cargo.toml",
    "guest-mcp/Cargo.toml",
    "guest-mcp/src",
    "tools-schema/Cargo.toml",
    "tools-schema/src",
    "tools-schema/tree/Cargo.toml",
    "tools-schema/tree/src",
    "tools-schema/vsock/Cargo.toml",
    "tools-schema/vsock/src",
    "tools-schema/wire/Cargo.toml",
    "tools-schema/wire/src",
];

fn main() -> Result<(), Box<dyn Error>> {
    let workspace = PathBuf::from(required("CARGO_MANIFEST_DIR")?)
        .parent()
        .ok_or("host-mcp is not in a workspace")?
        .to_path_buf();
    let out = PathBuf::from(required("OUT_DIR")?);
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    println!("cargo::rerun-if-env-changed={TARGET_OVERRIDE}");

    let target = GuestTarget::choose()?;
    let target_dir = target_root(&out).join("nexus-guest");
    build(&workspace, &target_dir, &target)?;

    // A copy beside the other outputs, written only when it differs: an unchanged guest compiles nothing anew here, and the
    // guest's target directory may be deleted at any time.
    let built = target_dir.join(&target.triple).join("guest/nexus-guest");
    let copy = out.join("nexus-guest.elf");
    let bytes = fs::read(&built).map_err(|e| format!("read {}: {e}", built.display()))?;
    if fs::read(&copy).ok().as_deref() != Some(&bytes[..]) {
        fs::write(&copy, &bytes).map_err(|e| format!("write {}: {e}", copy.display()))?;
    }
    println!("cargo::rustc-env=NEXUS_GUEST_BIN={}", copy.display());
    Ok(())
}

/// What the guest is compiled for.
struct GuestTarget {
    triple: String,
    /// Whether the C library is linked statically only when asked.
    needs_crt_static: bool,
}

impl GuestTarget {
    /// The musl target where the toolchain has it (`make setup` adds it), else the GNU one, linked statically.
    fn choose() -> Result<Self, Box<dyn Error>> {
        if let Some(triple) = env::var(TARGET_OVERRIDE).ok().filter(|triple| !triple.is_empty()) {
            let needs_crt_static = !triple.ends_with("musl");
            return Ok(Self { triple, needs_crt_static });
        }
        let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
        let musl = format!("{arch}-unknown-linux-musl");
        let libraries = target_libraries(&musl)?;
        if libraries.is_dir() {
            return Ok(Self { triple: musl, needs_crt_static: false });
        }
        // rustup rewrites this list when a target is added: look again then.
        if let Some(list) = libraries.ancestors().nth(2).map(|rustlib| rustlib.join("components"))
            && list.is_file()
        {
            println!("cargo::rerun-if-changed={}", list.display());
        }
        Ok(Self { triple: format!("{arch}-unknown-linux-gnu"), needs_crt_static: true })
    }
}

/// Where the toolchain keeps the libraries of a target, whether or not they are installed.
fn target_libraries(triple: &str) -> Result<PathBuf, Box<dyn Error>> {
    let rustc = required("RUSTC")?;
    let output = Command::new(&rustc).args(["--print", "target-libdir", "--target", triple]).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("ask {} for the libraries of {triple}: {said}", rustc.display()).into());
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// The target directory that `out` is in: the nearest one that cargo has tagged. Cargo tags none that was there before its first build, as
/// where `make setup` made it; then the directory above `PROFILE/build/PACKAGE/out` is taken.
fn target_root(out: &Path) -> &Path {
    let tagged = out.ancestors().find(|directory| directory.join("CACHEDIR.TAG").is_file());
    let by_name = || {
        let mut above = out.ancestors().skip(2);
        (above.next()?.file_name()? == "build").then(|| above.nth(1)).flatten()
    };
    tagged.or_else(by_name).unwrap_or(out)
}

fn build(workspace: &Path, target_dir: &Path, target: &GuestTarget) -> Result<(), Box<dyn Error>> {
    let mut cargo = Command::new(required("CARGO")?);
    cargo.current_dir(workspace);
    cargo.args(["build", "--locked", "--package", "nexus-guest", "--bin", "nexus-guest"]);
    cargo.args(["--profile", "guest", "--target", &target.triple]);
    for (name, _) in env::vars_os().filter(|(name, _)| belongs_to_the_outer_build(&name.to_string_lossy())) {
        cargo.env_remove(name);
    }
    cargo.env("CARGO_TARGET_DIR", target_dir).env("CARGO_BUILD_BUILD_DIR", target_dir);
    // At a fixed address: to relocate itself takes a program in a software-emulated machine several milliseconds each time it starts.
    let mut flags = vec!["-Crelocation-model=static"];
    if target.needs_crt_static {
        flags.push("-Ctarget-feature=+crt-static");
    }
    let outer = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    flags.extend(outer.split('\x1f').filter(|flag| flag.starts_with(REMAP)));
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // What the inner cargo says goes to stderr, which the outer one shows when this fails.
    let status = cargo.status().map_err(|e| format!("run cargo for nexus-guest: {e}"))?;
    if !status.success() {
        return Err(format!("nexus-guest does not build for {} ({status}), see above", target.triple).into());
    }
    Ok(())
}

/// Whether a variable is about how the outer crates are compiled, and so none of the guest's business.
fn belongs_to_the_outer_build(name: &str) -> bool {
    matches!(
        name,
        "RUSTC_WORKSPACE_WRAPPER"
            | "RUSTC_WRAPPER"
            | "RUSTFLAGS"
            | "CARGO_ENCODED_RUSTFLAGS"
            | "RUSTDOCFLAGS"
            | "CARGO_ENCODED_RUSTDOCFLAGS"
            | "TARGET"
            | "HOST"
            | "PROFILE"
            | "OPT_LEVEL"
            | "DEBUG"
            | "OUT_DIR"
            | "NUM_JOBS"
    ) || name.starts_with("CLIPPY_")
        || name.starts_with("CARGO_CFG_")
        || name.starts_with("CARGO_FEATURE_")
        || name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
        || (name.starts_with("CARGO_BUILD_") && name != "CARGO_BUILD_JOBS")
        || (name.starts_with("CARGO_TARGET_") && name.ends_with("_RUSTFLAGS"))
}

fn required(name: &str) -> Result<OsString, Box<dyn Error>> {
    env::var_os(name).ok_or_else(|| format!("{name} is not set: this runs under cargo only").into())
}
