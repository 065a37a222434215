//! Signatures of indexes: which keys are trusted, and whether one of them signed a cleartext-signed text.
//!
//! The `pgp` crate does only the arithmetic. Whether a key may sign is checked here, after RFC 9580, sections 5.2.3 (the
//! meaning of subpackets) and 10.1 (the structure of a certificate):
//!
//! - the newest valid self-signature of the primary key, and the newest valid binding of a subkey, determine its expiry and
//!   its allowed uses; a signing subkey must have signed back;
//! - a revocation counts regardless of its time and reason;
//! - MD5, SHA-1, RIPEMD, DSA and RSA below 2048 bits are refused, as is anything expired or from the future.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use fs_err as fs;
use pgp::composed::{
    CleartextSignedMessage, Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::crypto::public_key::PublicKeyAlgorithm;
use pgp::packet::{KeyFlags, Signature, SignatureType, SignatureVersion, SubpacketData};
use pgp::ser::Serialize;
use pgp::types::{KeyDetails, PublicParams, Tag, VerifyingKey};

use crate::asset::AssetError;
use crate::asset::debian::sources::SignedBy;
use crate::asset::error::SignatureProblem;

/// The largest signed text; its parser takes quadratic time.
pub(crate) const MAX_SIGNED: u64 = 1 << 20;
/// The largest keyring.
const MAX_KEYRING: u64 = 8 << 20;
/// The most certificates of one keyring, and the most signatures of one text, that are looked at.
const MAX_CERTIFICATES: usize = 256;
const MAX_SIGNATURES: usize = 16;
/// How far clocks may differ, in seconds.
const SKEW: u64 = 600;

/// Seconds since 1970.
pub(crate) type Seconds = u64;

/// Certificates that may sign.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keyring {
    certificates: Vec<SignedPublicKey>,
}

impl Keyring {
    /// The keys that an entry of apt's sources trusts. `fallback` are the distribution's keyrings, for hosts whose apt has no
    /// trusted keys of its own.
    pub(crate) fn of_entry(
        apt_root: &Path,
        signed_by: Option<&SignedBy>,
        fallback: &[PathBuf],
    ) -> Result<Self, AssetError> {
        let mut keyring = Self::default();
        match signed_by {
            Some(SignedBy::Embedded(text)) => keyring.add(text.as_bytes()),
            Some(SignedBy::Keys { files, fingerprints }) => {
                if files.is_empty() {
                    keyring = Self::trusted_by_apt(apt_root)?;
                }
                for file in files {
                    keyring.add_file(file)?;
                }
                if !fingerprints.is_empty() {
                    keyring.certificates.retain(|c| fingerprints.iter().any(|f| has_fingerprint(c, f)));
                }
            }
            None => {
                keyring = Self::trusted_by_apt(apt_root)?;
                for file in fallback {
                    if keyring.certificates.is_empty() && fs::metadata(file).is_ok() {
                        keyring.add_file(file)?;
                    }
                }
            }
        }
        if keyring.certificates.is_empty() {
            let path = match signed_by {
                Some(SignedBy::Keys { files, .. }) if !files.is_empty() => files[0].clone(),
                _ => trusted_parts(apt_root),
            };
            return Err(AssetError::Keyring { path });
        }
        Ok(keyring)
    }

    /// The keys that a provider names: absolute paths of files, or armored keys. With none given, no key is trusted.
    pub(crate) fn of_keys(keys: &[String]) -> Result<Self, AssetError> {
        let mut keyring = Self::default();
        for key in keys {
            if key.starts_with('/') { keyring.add_file(Path::new(key))? } else { keyring.add(key.as_bytes()) }
        }
        Ok(keyring)
    }

    /// Whether no key could be read.
    pub(crate) fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    /// Reads `etc/apt/trusted.gpg` and `etc/apt/trusted.gpg.d/`. A file that is not a keyring is skipped, as apt does.
    fn trusted_by_apt(apt_root: &Path) -> Result<Self, AssetError> {
        let mut files = vec![apt_root.join("etc/apt/trusted.gpg")];
        if let Ok(dir) = fs::read_dir(trusted_parts(apt_root)) {
            let mut parts: Vec<_> = dir
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| matches!(p.extension().and_then(|e| e.to_str()), Some("gpg" | "asc")))
                .collect();
            parts.sort();
            files.extend(parts);
        }
        let mut keyring = Self::default();
        for file in files.iter().filter(|f| fs::metadata(f).is_ok()) {
            keyring.add_file(file)?;
        }
        Ok(keyring)
    }

    fn add_file(&mut self, file: &Path) -> Result<(), AssetError> {
        let doing = AssetError::io("read a keyring");
        if fs::metadata(file).map_err(&doing)?.len() > MAX_KEYRING {
            return Err(AssetError::TooLarge { what: file.display().to_string(), limit: MAX_KEYRING });
        }
        self.add(&fs::read(file).map_err(&doing)?);
        Ok(())
    }

    /// Adds the certificates of a keyring: binary, or one or more blocks of ASCII armor. Unreadable ones are skipped.
    fn add(&mut self, bytes: &[u8]) {
        const ARMOR: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
        const ARMOR_END: &str = "-----END PGP PUBLIC KEY BLOCK-----";
        let before = self.certificates.len();
        if bytes.first().is_some_and(|b| b & 0x80 != 0) {
            if let Ok(all) = SignedPublicKey::from_bytes_many(bytes) {
                self.certificates.extend(all.take(MAX_CERTIFICATES).flatten());
            }
        } else {
            let text = String::from_utf8_lossy(bytes);
            for block in text.split(ARMOR).skip(1).take(MAX_CERTIFICATES) {
                let block = block.split(ARMOR_END).next().unwrap_or_default();
                let block = format!("{ARMOR}{block}{ARMOR_END}\n");
                if let Ok((all, _)) = SignedPublicKey::from_armor_many(Cursor::new(block.as_bytes())) {
                    self.certificates.extend(all.take(MAX_CERTIFICATES).flatten());
                }
            }
        }
        tracing::debug!(certificates = self.certificates.len() - before, "keyring read");
    }

    /// Checks a cleartext-signed text and returns the signed text, with `\n` line ends.
    pub(crate) fn signed_text(&self, what: &str, signed: &[u8], now: Seconds) -> Result<String, AssetError> {
        let failed = |problem| AssetError::Signature { what: what.to_owned(), problem };
        if signed.len() as u64 > MAX_SIGNED {
            return Err(AssetError::TooLarge { what: what.to_owned(), limit: MAX_SIGNED });
        }
        let (message, _) = CleartextSignedMessage::from_armor(signed)
            .map_err(|e| failed(SignatureProblem::Malformed(Box::new(e))))?;
        let text = message.signed_text();
        let mut reasons = Vec::new();
        for signature in message.signatures().iter().take(MAX_SIGNATURES) {
            match self.check(signature, text.as_bytes(), now) {
                Ok(()) => return Ok(text.replace("\r\n", "\n")),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(failed(SignatureProblem::NoneGood { count: message.signatures().len(), reasons }))
    }

    /// Checks a document against detached signatures, armored or binary; one valid signature is enough.
    pub(crate) fn check_detached(
        &self,
        what: &str,
        document: &[u8],
        signatures: &[u8],
        now: Seconds,
    ) -> Result<(), AssetError> {
        let failed = |problem| AssetError::Signature { what: what.to_owned(), problem };
        let malformed = |e| failed(SignatureProblem::Malformed(Box::new(e)));
        let is_armored = signatures.trim_ascii_start().starts_with(b"-----BEGIN ");
        let parsed = match is_armored {
            true => DetachedSignature::from_armor_many(Cursor::new(signatures)).map(|(all, _)| all),
            false => DetachedSignature::from_bytes_many(signatures),
        };
        let mut reasons = Vec::new();
        for signature in parsed.map_err(malformed)?.take(MAX_SIGNATURES) {
            match self.check(&signature.map_err(malformed)?.signature, document, now) {
                Ok(()) => return Ok(()),
                Err(reason) => reasons.push(reason),
            }
        }
        Err(failed(SignatureProblem::NoneGood { count: reasons.len(), reasons }))
    }

    /// Checks one signature of a text; the error says why it is not valid.
    fn check(&self, signature: &Signature, text: &[u8], now: Seconds) -> Result<(), String> {
        let issuer = issuer(signature);
        let told = |reason: &str| format!("{reason} ({issuer})");
        if !matches!(signature.typ(), Some(SignatureType::Text | SignatureType::Binary)) {
            return Err(told("it is no signature of a document"));
        }
        let made = usable(signature, now).map_err(told)?;
        let mut reason = "no trusted key made it";
        for certificate in &self.certificates {
            if signature.verify(&certificate.primary_key, text).is_ok() {
                match fit_primary(certificate, now).and_then(|own| signs(&own, true)) {
                    Ok(()) if made >= created(&certificate.primary_key) => return Ok(()),
                    Ok(()) => reason = "it is older than its key",
                    Err(why) => reason = why,
                }
            }
            for subkey in &certificate.public_subkeys {
                if signature.verify(&subkey.key, text).is_ok() {
                    let fit =
                        fit_primary(certificate, now).and_then(|_| fit_subkey(certificate, subkey, now));
                    match fit {
                        Ok(()) if made >= created(&subkey.key) => return Ok(()),
                        Ok(()) => reason = "it is older than its key",
                        Err(why) => reason = why,
                    }
                }
            }
        }
        Err(told(reason))
    }
}

fn trusted_parts(apt_root: &Path) -> PathBuf {
    apt_root.join("etc/apt/trusted.gpg.d")
}

fn has_fingerprint(certificate: &SignedPublicKey, fingerprint: &str) -> bool {
    // A key id is too short to name a key safely: whole fingerprints only.
    fingerprint.len() >= 40
        && (certificate.fingerprint().to_string().eq_ignore_ascii_case(fingerprint)
            || certificate
                .public_subkeys
                .iter()
                .any(|s| s.key.fingerprint().to_string().eq_ignore_ascii_case(fingerprint)))
}

fn issuer(signature: &Signature) -> String {
    let fingerprint = signature.issuer_fingerprint().first().map(ToString::to_string);
    let id = || signature.issuer_key_id().first().map(ToString::to_string);
    fingerprint.or_else(id).unwrap_or_else(|| "an unnamed key".into())
}

fn created(key: &impl KeyDetails) -> Seconds {
    key.created_at().as_secs().into()
}

/// Checks what every signature must satisfy, on documents and within certificates: a current version, a strong hash, made
/// before now, not expired, and no critical subpacket that is not understood. Returns when it was made.
fn usable(signature: &Signature, now: Seconds) -> Result<Seconds, &'static str> {
    if !matches!(signature.version(), SignatureVersion::V4 | SignatureVersion::V6) {
        return Err("it is of an unknown or outdated version");
    }
    let strong = matches!(
        signature.hash_alg(),
        Some(
            HashAlgorithm::Sha256
                | HashAlgorithm::Sha384
                | HashAlgorithm::Sha512
                | HashAlgorithm::Sha3_256
                | HashAlgorithm::Sha3_512
        )
    );
    if !strong {
        return Err("its hash is too weak");
    }
    let config = signature.config().ok_or("it is of an unknown version")?;
    let unknown = |d: &SubpacketData| matches!(d, SubpacketData::Other(..) | SubpacketData::Experimental(..));
    if config
        .hashed_subpackets()
        .any(|p| p.is_critical && (unknown(&p.data) || matches!(p.data, SubpacketData::Notation(_))))
    {
        return Err("it makes a critical demand that is not understood");
    }
    let made: Seconds = signature.created().ok_or("it says nothing about when it was made")?.as_secs().into();
    if made > now + SKEW {
        return Err("it was made in the future");
    }
    match signature.signature_expiration_time().map(|d| d.as_secs()) {
        Some(seconds) if seconds > 0 && made + Seconds::from(seconds) <= now => Err("it has expired"),
        _ => Ok(made),
    }
}

/// What a self-signature says about its key.
struct Own {
    flags: Option<KeyFlags>,
    expires: Option<Seconds>,
}

/// What the newest of some valid signatures states.
fn newest<'s>(
    valid: impl Iterator<Item = &'s Signature>,
    key: &impl KeyDetails,
    now: Seconds,
) -> Option<Own> {
    let newest = valid.filter_map(|s| Some((usable(s, now).ok()?, s))).max_by_key(|(made, _)| *made)?.1;
    let flags = newest.config()?.hashed_subpackets().find_map(|p| match &p.data {
        SubpacketData::KeyFlags(flags) => Some(flags.clone()),
        _ => None,
    });
    let lifetime = newest.key_expiration_time().map(|d| d.as_secs()).filter(|s| *s > 0);
    Some(Own { flags, expires: lifetime.map(|s| created(key) + Seconds::from(s)) })
}

/// Whether these statements allow a key to sign documents.
fn signs(own: &Own, unsaid: bool) -> Result<(), &'static str> {
    let may = own.flags.as_ref().map_or(unsaid, KeyFlags::sign);
    if may { Ok(()) } else { Err("its key is not meant for signing") }
}

/// The newest self-signature of a primary key, if the key is neither revoked nor expired nor weak.
fn fit_primary(certificate: &SignedPublicKey, now: Seconds) -> Result<Own, &'static str> {
    let key = &certificate.primary_key;
    strong(key)?;
    let details = &certificate.details;
    let revoked = |s: &Signature| s.typ() == Some(SignatureType::KeyRevocation) && s.verify_key(key).is_ok();
    if details.revocation_signatures.iter().chain(&details.direct_signatures).any(revoked) {
        return Err("its key is revoked");
    }
    // Third parties certify user ids too: only a signature that verifies with the key itself is a self-signature.
    let direct = details
        .direct_signatures
        .iter()
        .filter(|s| s.typ() == Some(SignatureType::Key) && s.verify_key(key).is_ok());
    let users = details.users.iter().flat_map(|user| {
        let own = |s: &&Signature| s.verify_certification(key, Tag::UserId, &user.id).is_ok();
        let is_revoked = |s: &Signature| s.typ() == Some(SignatureType::CertRevocation);
        let all: Vec<_> = user.signatures.iter().filter(own).collect();
        if all.iter().any(|s| is_revoked(s)) { Vec::new() } else { all }
    });
    let own = newest(direct.chain(users), key, now).ok_or("its key has no valid self-signature")?;
    if own.expires.is_some_and(|at| at <= now) {
        return Err("its key has expired");
    }
    Ok(own)
}

/// Whether a subkey is bound to its primary key, meant for signing, and neither revoked nor expired nor weak.
fn fit_subkey(
    certificate: &SignedPublicKey,
    subkey: &SignedPublicSubKey,
    now: Seconds,
) -> Result<(), &'static str> {
    let primary = &certificate.primary_key;
    strong(&subkey.key)?;
    let verified = |typ| {
        subkey
            .signatures
            .iter()
            .filter(move |s| s.typ() == Some(typ) && s.verify_subkey_binding(primary, &subkey.key).is_ok())
    };
    if verified(SignatureType::SubkeyRevocation).next().is_some() {
        return Err("its key is revoked");
    }
    let bindings = || verified(SignatureType::SubkeyBinding);
    let own = newest(bindings(), &subkey.key, now).ok_or("its key is not bound to its certificate")?;
    signs(&own, false)?;
    if own.expires.is_some_and(|at| at <= now) {
        return Err("its key has expired");
    }
    // Otherwise anyone could bind another's signing key to a certificate of their own.
    let signed_back = bindings().filter_map(Signature::embedded_signature).any(|back| {
        usable(back, now).is_ok() && back.verify_primary_key_binding(&subkey.key, primary).is_ok()
    });
    if signed_back { Ok(()) } else { Err("its key has not signed back to its certificate") }
}

/// Whether a key's algorithm and size are strong enough.
fn strong(key: &impl VerifyingKey) -> Result<(), &'static str> {
    let weak = Err("its key is too weak");
    match key.public_params() {
        PublicParams::RSA(params) => {
            // In the packet the modulus comes first, after its length in bits. (Some keys of "2048 bits" have 2047.)
            let bytes = params.to_bytes().unwrap_or_default();
            let bits = bytes.first_chunk().map_or(0, |b| u16::from_be_bytes(*b));
            if bits >= 2047 { Ok(()) } else { weak }
        }
        PublicParams::DSA(_) | PublicParams::Elgamal(_) => weak,
        _ if matches!(key.algorithm(), PublicKeyAlgorithm::Unknown(_)) => weak,
        _ => Ok(()),
    }
}
