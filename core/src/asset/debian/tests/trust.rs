//! Which signatures are valid.

use nexus_schema::error::chain;
use pgp::composed::{ArmorOptions, CleartextSignedMessage};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{SignatureType, Subpacket, SubpacketData};

use crate::asset::AssetError;
use crate::asset::debian::signature::Keyring;
use crate::asset::debian::sources::SignedBy;
use crate::asset::error::SignatureProblem;
use crate::asset::testing::keys::{DAY, Key, Manner, NOW, NOW_SECONDS, Shape, sign_many};

const TEXT: &str = "Origin: Debian\n- a line that begins with a dash\nSuite: stable  \n\nDate: now\n";

/// A keyring of these keys.
fn keyring(keys: &[&Key]) -> Keyring {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keyring.gpg");
    std::fs::write(&file, keys.iter().flat_map(|k| k.binary()).collect::<Vec<_>>()).unwrap();
    let signed_by = SignedBy::Keys { files: vec![file], fingerprints: vec![] };
    Keyring::of_entry(dir.path(), Some(&signed_by), &[]).unwrap()
}

fn check(key: &Key, signed: &str) -> Result<String, String> {
    keyring(&[key]).signed_text("it", signed.as_bytes(), NOW_SECONDS).map_err(|e| chain(&e))
}

#[track_caller]
fn assert_refused(key: &Key, signed: &str, why: &str) {
    let error = check(key, signed).unwrap_err();
    assert!(error.contains(why), "{error:?} does not say {why:?}");
}

#[test]
fn a_good_signature_gives_the_signed_text() {
    for shape in [
        Shape::default(),
        Shape { subkey: true, ..Shape::default() },
        Shape { rsa: true, ..Shape::default() },
    ] {
        let key = Key::new(&shape);
        let text = check(&key, &key.sign(TEXT)).unwrap();
        // Blanks at the ends of lines are not signed, so they are not in the text either.
        assert_eq!(text, TEXT.replace("stable  ", "stable"), "{shape:?}");
        let binary = Manner { typ: SignatureType::Binary, ..Manner::default() };
        check(&key, &key.sign_so(TEXT, binary)).unwrap();
        let hash = HashAlgorithm::Sha512;
        check(&key, &key.sign_so(TEXT, Manner { hash, ..Manner::default() })).unwrap();
    }
}

#[test]
fn nothing_unsigned_is_in_the_text() {
    let key = Key::good();
    let signed = key.sign(TEXT);
    for added in [format!("Origin: Other\n{signed}"), format!("{signed}Origin: Other\n")] {
        let error = keyring(&[&key]).signed_text("it", added.as_bytes(), NOW_SECONDS).unwrap_err();
        assert!(
            matches!(error, AssetError::Signature { problem: SignatureProblem::Malformed(_), .. }),
            "{error:?}"
        );
    }
    // A line must not hide in a header.
    let hidden = signed.replacen("\n\n", "\nOrigin: Other\n\n", 1);
    assert!(check(&key, &hidden).is_err());
}

#[test]
fn a_changed_text_is_refused() {
    let key = Key::good();
    let signed = key.sign(TEXT);
    assert_refused(&key, &signed.replace("Debian", "Debiam"), "no trusted key made it");
    assert_refused(&key, &signed.replace("Date: now\n", ""), "no trusted key made it");
    for cut in (0..signed.len()).step_by(37) {
        assert!(check(&key, &signed[..cut]).is_err(), "{cut}");
    }
}

#[test]
fn another_key_is_refused() {
    assert_refused(&Key::good(), &Key::good().sign(TEXT), "no trusted key made it");
}

#[test]
fn one_good_signature_of_several_is_enough() {
    // RSA, because with elliptic curves the crate refuses to make weak signatures.
    let (good, stranger) = (Key::new(&Shape { rsa: true, ..Shape::default() }), Key::good());
    let weak = Manner { hash: HashAlgorithm::Sha1, ..Manner::default() };
    let signed =
        sign_many(TEXT, &[(&stranger, Manner::default()), (&good, weak.clone()), (&good, Manner::default())]);
    check(&good, &signed).unwrap();
    let signed = sign_many(TEXT, &[(&stranger, Manner::default()), (&good, weak)]);
    let error = check(&good, &signed).unwrap_err();
    assert!(error.contains("none of 2 signatures is valid") && error.contains("too weak"), "{error}");
}

#[test]
fn weak_hashes_are_refused() {
    let key = Key::new(&Shape { rsa: true, ..Shape::default() });
    for hash in [HashAlgorithm::Md5, HashAlgorithm::Sha1, HashAlgorithm::Ripemd160, HashAlgorithm::Sha224] {
        let signed = key.sign_so(TEXT, Manner { hash, ..Manner::default() });
        assert_refused(&key, &signed, "its hash is too weak");
    }
    // A key whose own self-signature is weak is not trusted either.
    let key = Key::new(&Shape { hash: HashAlgorithm::Sha1, rsa: true, ..Shape::default() });
    assert_refused(&key, &key.sign(TEXT), "no valid self-signature");
}

#[test]
fn times_count() {
    let key = Key::good();
    let at = |made, lifetime| key.sign_so(TEXT, Manner { made, lifetime, ..Manner::default() });
    check(&key, &at(NOW - 10, Some(DAY))).unwrap();
    check(&key, &at(NOW + 300, None)).expect("clocks differ a little");
    assert_refused(&key, &at(NOW + DAY, None), "made in the future");
    assert_refused(&key, &at(NOW - 2 * DAY, Some(DAY)), "it has expired");
    assert_refused(&key, &at(NOW - 200 * DAY, None), "it is older than its key");

    let key = |made, lifetime| Key::new(&Shape { made, lifetime, ..Shape::default() });
    let fresh = key(NOW - 10 * DAY, Some(20 * DAY));
    check(&fresh, &fresh.sign(TEXT)).unwrap();
    let expired = key(NOW - 10 * DAY, Some(9 * DAY));
    assert_refused(&expired, &expired.sign(TEXT), "its key has expired");
    let unborn = key(NOW + 10 * DAY, None);
    assert_refused(&unborn, &unborn.sign(TEXT), "no valid self-signature");
}

#[test]
fn the_newest_self_signature_counts() {
    let mut key = Key::new(&Shape { lifetime: Some(DAY), ..Shape::default() });
    assert_refused(&key, &key.sign(TEXT), "its key has expired");
    let longer = key.certification(NOW - DAY, HashAlgorithm::Sha256, true, Some(1000 * DAY));
    key.secret.details.users[0].signatures.insert(0, longer);
    check(&key, &key.sign(TEXT)).unwrap();
    let not_for_signing = key.certification(NOW - 10, HashAlgorithm::Sha256, false, None);
    key.secret.details.users[0].signatures.insert(0, not_for_signing);
    assert_refused(&key, &key.sign(TEXT), "not meant for signing");
}

#[test]
fn what_a_third_party_certifies_does_not_count() {
    let mut key = Key::new(&Shape { lifetime: Some(DAY), ..Shape::default() });
    let other = Key::good();
    let longer = other.certification(NOW - DAY, HashAlgorithm::Sha256, true, Some(1000 * DAY));
    key.secret.details.users[0].signatures.push(longer);
    assert_refused(&key, &key.sign(TEXT), "its key has expired");
    let mut key = Key::good();
    key.secret.details.users[0].signatures.push(other.certification(
        NOW - 5,
        HashAlgorithm::Sha256,
        false,
        None,
    ));
    check(&key, &key.sign(TEXT)).unwrap();
}

#[test]
fn keys_must_be_meant_for_signing() {
    let key = Key::new(&Shape { signs: false, ..Shape::default() });
    assert_refused(&key, &key.sign(TEXT), "not meant for signing");
}

#[test]
fn revoked_keys_are_refused() {
    let mut key = Key::good();
    // Signatures of a compromised key are invalid, whether made before or after the revocation.
    let signed = key.sign(TEXT);
    key.revoke(NOW - 10);
    assert_refused(&key, &signed, "its key is revoked");

    let mut key = Key::good();
    key.revoke_user(NOW - 10);
    assert_refused(&key, &key.sign(TEXT), "no valid self-signature");

    // Nobody else can revoke a key.
    let (mut key, mut other) = (Key::good(), Key::good());
    other.revoke(NOW - 10);
    key.secret.details.revocation_signatures = other.secret.details.revocation_signatures;
    check(&key, &key.sign(TEXT)).unwrap();
}

#[test]
fn subkeys_must_be_bound_and_sign_back() {
    let shape = Shape { subkey: true, ..Shape::default() };
    let mut key = Key::new(&shape);
    let made = shape.made;
    key.bind(made, None, true, false);
    assert_refused(&key, &key.sign(TEXT), "not signed back");
    key.bind(made, None, false, true);
    assert_refused(&key, &key.sign(TEXT), "not meant for signing");
    key.bind(made, Some(DAY), true, true);
    assert_refused(&key, &key.sign(TEXT), "its key has expired");
    key.bind(made, None, true, true);
    check(&key, &key.sign(TEXT)).unwrap();

    let mut revoked = key.clone();
    revoked.revoke_subkey(NOW - 10);
    assert_refused(&revoked, &revoked.sign(TEXT), "its key is revoked");
    let mut revoked = key.clone();
    revoked.revoke(NOW - 10);
    assert_refused(&revoked, &revoked.sign(TEXT), "its key is revoked");

    // A subkey that is bound by another certificate does not belong to that certificate.
    let mut thief = Key::new(&shape);
    thief.secret.secret_subkeys = key.secret.secret_subkeys.clone();
    assert_refused(&thief, &key.sign(TEXT), "not bound");

    // The primary key signs only if its usage flags allow it.
    let mut primary = key.clone();
    let subkeys = std::mem::take(&mut primary.secret.secret_subkeys);
    let signed = primary.sign(TEXT);
    primary.secret.secret_subkeys = subkeys;
    assert_refused(&primary, &signed, "not meant for signing");
}

#[test]
fn demands_that_are_not_understood_are_refused() {
    let key = Key::good();
    let unknown = SubpacketData::Experimental(101, vec![1].into());
    let critical = Manner { more: vec![Subpacket::critical(unknown.clone()).unwrap()], ..Manner::default() };
    assert_refused(&key, &key.sign_so(TEXT, critical), "not understood");
    let harmless = Manner { more: vec![Subpacket::regular(unknown).unwrap()], ..Manner::default() };
    check(&key, &key.sign_so(TEXT, harmless)).unwrap();
    let elsewhere = key.certification(NOW - DAY, HashAlgorithm::Sha256, true, None);
    let message = CleartextSignedMessage::new_many(TEXT, |_| Ok(vec![elsewhere])).unwrap();
    let signed = message.to_armored_string(ArmorOptions::default()).unwrap();
    assert_refused(&key, &signed, "no signature of a document");
}

#[test]
fn much_too_much_is_refused_before_it_is_parsed() {
    let key = Key::good();
    let error = keyring(&[&key]).signed_text("it", &vec![b'-'; 2 << 20], NOW_SECONDS).unwrap_err();
    assert!(matches!(error, AssetError::TooLarge { .. }), "{error:?}");
}

#[test]
fn keyrings_are_read_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let keys = [Key::good(), Key::good(), Key::good()];
    let signed: Vec<_> = keys.iter().map(|k| k.sign(TEXT)).collect();
    let good = |ring: &Keyring, n: usize| ring.signed_text("it", signed[n].as_bytes(), NOW_SECONDS).is_ok();
    let path = |name: &str| dir.path().join(name);
    let of = |signed_by: &SignedBy| Keyring::of_entry(dir.path(), Some(signed_by), &[]);
    let files = |names: &[&str]| SignedBy::Keys {
        files: names.iter().map(|n| path(n)).collect(),
        fingerprints: vec![],
    };

    std::fs::write(path("all.gpg"), keys.iter().flat_map(Key::binary).collect::<Vec<_>>()).unwrap();
    std::fs::write(path("two.asc"), format!("first:\n{}\nsecond:\n{}", keys[0].armored(), keys[1].armored()))
        .unwrap();
    std::fs::write(path("none"), "nothing").unwrap();

    let all = of(&files(&["all.gpg"])).unwrap();
    assert!((0..3).all(|n| good(&all, n)));
    let two = of(&files(&["two.asc"])).unwrap();
    assert_eq!([good(&two, 0), good(&two, 1), good(&two, 2)], [true, true, false]);
    let embedded = of(&SignedBy::Embedded(keys[2].armored())).unwrap();
    assert_eq!([good(&embedded, 0), good(&embedded, 2)], [false, true]);
    let only = SignedBy::Keys { files: vec![path("all.gpg")], fingerprints: vec![keys[1].fingerprint()] };
    let only = of(&only).unwrap();
    assert_eq!([good(&only, 0), good(&only, 1)], [false, true]);
    assert!(matches!(of(&files(&["none"])), Err(AssetError::Keyring { .. })));
    assert!(matches!(of(&files(&["missing"])), Err(AssetError::Io { .. })));

    // Without `signed-by`: apt's trusted keys; if there are none, the distribution's own keyring.
    let fallback = [path("all.gpg")];
    assert!(good(&Keyring::of_entry(dir.path(), None, &fallback).unwrap(), 2));
    std::fs::create_dir_all(path("etc/apt/trusted.gpg.d")).unwrap();
    assert!(good(&Keyring::of_entry(dir.path(), None, &fallback).unwrap(), 2));
    std::fs::write(path("etc/apt/trusted.gpg.d/a.asc"), keys[0].armored()).unwrap();
    std::fs::write(path("etc/apt/trusted.gpg.d/b.bak"), keys[1].binary()).unwrap();
    std::fs::write(path("etc/apt/trusted.gpg"), "KBXf not a keyring of this kind").unwrap();
    let trusted = Keyring::of_entry(dir.path(), None, &fallback).unwrap();
    assert_eq!([good(&trusted, 0), good(&trusted, 1), good(&trusted, 2)], [true, false, false]);
}

#[test]
fn gpg_agrees_on_what_is_signed() {
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    // gpgv only uses the host's clock.
    let made = u32::try_from(jiff::Timestamp::now().as_second()).unwrap() - DAY;
    let key = Key::new(&Shape { made, rsa: true, ..Shape::default() });
    let signed = key.sign_so(TEXT, Manner { made, ..Manner::default() });
    let ours = keyring(&[&key]).signed_text("it", signed.as_bytes(), (made + DAY).into()).unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("key.gpg"), key.binary()).unwrap();
    std::fs::write(path("signed"), signed).unwrap();
    let status = Command::new("gpgv")
        .args([
            "--ignore-time-conflict",
            "--keyring",
            &path("key.gpg"),
            "--output",
            &path("text"),
            &path("signed"),
        ])
        .output()
        .expect("gpgv is installed");
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let text = std::fs::read_to_string(path("text")).unwrap();
    assert_eq!(text.trim_end(), ours.trim_end());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn damage_anywhere_is_refused_or_harmless(at in 0usize..2000, byte: u8) {
        thread_local!(static KEY: (Key, String) = { let key = Key::good(); let signed = key.sign(TEXT); (key, signed) });
        KEY.with(|(key, signed)| {
            let mut bytes = signed.clone().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(text) = keyring(&[key]).signed_text("it", &bytes, NOW_SECONDS) {
                assert_eq!(text, TEXT.replace("stable  ", "stable"));
            }
        });
    }
}
