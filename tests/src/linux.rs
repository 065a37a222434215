//! Sources of Linux as kernel.org has them, but small: what a build asks of a source is there, and its kernel does nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use data_encoding::HEXLOWER;
use pgp::composed::{ArmorOptions, CleartextSignedMessage, KeyType, SecretKeyParamsBuilder, SignedSecretKey};
use pgp::types::Password;
use rand::thread_rng;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::web::Web;

/// The version of the source.
pub const VERSION: &str = "6.12.1";
/// The version that its kernel has.
pub const BUILT: &str = "6.12.1-test";

/// The targets that a build asks for; `RECIPE` is for lines before those that make the kernel.
const MAKEFILE: &str = "\
allnoconfig:
\tcp \"$$KCONFIG_ALLCONFIG\" .config
vmlinux: .config
RECIPE\techo \"  LD      vmlinux by $$KBUILD_BUILD_USER\"
\t{ echo 'const char banner[] = \"Linux version BUILT (nexus@nexus) \";'; echo 'void _start(void) { for (;;); }'; } > main.c
\tgcc -static -nostdlib -no-pie -g -o vmlinux main.c
";

/// A secret key without a passphrase.
pub fn signing_key() -> SignedSecretKey {
    let mut params = SecretKeyParamsBuilder::default();
    params.key_type(KeyType::Ed25519Legacy).can_certify(true).can_sign(true);
    params.primary_user_id("Kernels <kernels@host.example>".into());
    params.build().expect("a key").generate(thread_rng()).expect("a key")
}

/// The configuration `providers` of a daemon that has sources from this server only, and trusts them if these armored keys signed their lists.
pub fn providers(web: &Web, keys: &[String]) -> String {
    let row = json!({ "mirrors": [web.url("/pub")], "api": web.url(""), "keys": keys });
    json!({ "kernel-org": row }).to_string()
}

/// Serves the source as kernel.org does, signed by a key; returns that key's public part, armored. `recipe` has lines of a makefile that come before
/// its kernel is made.
pub fn serve(web: &Web, recipe: &str) -> String {
    let (things, key) = (tempfile::tempdir().expect("a directory"), signing_key());
    let source = pack(things.path(), recipe);
    let sums = format!("{}  linux-{VERSION}.tar.xz\n", HEXLOWER.encode(&Sha256::digest(&source)));
    let signed = CleartextSignedMessage::sign(thread_rng(), &sums, &key.primary_key, &Password::empty());
    let signed = signed.expect("a signature").to_armored_string(ArmorOptions::default()).expect("armor");
    web.put("/pub/v6.x/sha256sums.asc", signed);
    web.put(&format!("/pub/v6.x/linux-{VERSION}.tar.xz"), source);
    let release = json!({ "version": VERSION, "moniker": "longterm", "iseol": false });
    let list = json!({ "latest_stable": { "version": VERSION }, "releases": [release] });
    web.put("/releases.json", list.to_string());
    key.to_public_key().to_armored_string(ArmorOptions::default()).expect("armor")
}

fn pack(things: &Path, recipe: &str) -> Vec<u8> {
    let name = format!("linux-{VERSION}");
    let inner = things.join(&name);
    fs::create_dir(&inner).expect("a directory");
    let makefile = MAKEFILE.replace("RECIPE", recipe).replace("BUILT", BUILT);
    fs::write(inner.join("Makefile"), makefile).expect("a file is written");
    let packed = things.join("packed");
    let tar = Command::new("tar").arg("-cJf").arg(&packed).arg("-C").arg(things).arg(&name).status();
    assert!(tar.expect("tar runs").success(), "tar failed");
    fs::read(&packed).expect("the source")
}
