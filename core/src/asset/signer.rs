//! A secret key that signs documents, as the pipelines of providers check them.

use std::io::Cursor;
use std::path::Path;

use fs_err as fs;
use pgp::composed::{ArmorOptions, Deserializable, DetachedSignature, SignedPublicKey, SignedSecretKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Signature, SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::types::{KeyDetails, Password, SigningKey, Timestamp};

use super::AssetError;
use super::debian::signature::{Keyring, Seconds};

/// The largest file with a key.
const MAX_KEY: u64 = 1 << 20;

/// A secret key, and the trust that its public key gives.
pub(crate) struct Signer {
    secret: SignedSecretKey,
    public: String,
    fingerprint: String,
    keyring: Keyring,
}

impl Signer {
    /// Reads an armored secret key without a passphrase.
    pub(crate) fn read(file: &Path) -> Result<Self, AssetError> {
        let doing = AssetError::io("read the secret key");
        if fs::metadata(file).map_err(&doing)?.len() > MAX_KEY {
            return Err(AssetError::TooLarge { what: file.display().to_string(), limit: MAX_KEY });
        }
        Self::of_armor(&fs::read(file).map_err(&doing)?)
            .map_err(|problem| AssetError::Publish(format!("{}: {problem}", file.display())))
    }

    /// The key in this text; the error says what is wrong with it.
    pub(crate) fn of_armor(armor: &[u8]) -> Result<Self, String> {
        let unread = |e: pgp::errors::Error| format!("it is not an armored secret key: {e}");
        let (secret, _) = SignedSecretKey::from_armor_single(Cursor::new(armor)).map_err(unread)?;
        if secret.primary_key.secret_params().is_encrypted() {
            return Err("the key has a passphrase: export a key without one, used for this alone".into());
        }
        let public = SignedPublicKey::from(secret.clone());
        let fingerprint = public.fingerprint().to_string();
        let public = public.to_armored_string(ArmorOptions::default()).map_err(unread)?;
        let keyring = Keyring::of_keys(std::slice::from_ref(&public)).map_err(|e| e.to_string())?;
        Ok(Self { secret, public, fingerprint, keyring })
    }

    /// The public key, armored.
    pub(crate) fn public(&self) -> &str {
        &self.public
    }

    /// The fingerprint of the key, in hexadecimal.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A detached, armored signature of a document, by the first of the key's parts whose signatures a provider would accept.
    pub(crate) fn sign(&self, what: &str, document: &[u8], now: Seconds) -> Result<String, AssetError> {
        let subkeys = self.secret.secret_subkeys.iter();
        let signing = subkeys.filter(|subkey| subkey.signatures.iter().any(|made| made.key_flags().sign()));
        let made = signing.map(|subkey| signature(&subkey.key, document, now));
        let made = made.chain(std::iter::once_with(|| signature(&self.secret.primary_key, document, now)));
        let mut last = None;
        for signature in made {
            let armored = signature.and_then(|signature| {
                DetachedSignature::new(signature).to_armored_string(ArmorOptions::default())
            });
            let armored = match armored {
                Ok(armored) => armored,
                Err(error) => {
                    last = Some(AssetError::Publish(format!("sign {what}: {error}")));
                    continue;
                }
            };
            match self.keyring.check_detached(what, document, armored.as_bytes(), now) {
                Ok(()) => return Ok(armored),
                Err(error) => last = Some(error),
            }
        }
        Err(last
            .unwrap_or_else(|| AssetError::Publish(format!("sign {what}: the key has no part that signs"))))
    }
}

fn signature(key: &impl SigningKey, document: &[u8], now: Seconds) -> pgp::errors::Result<Signature> {
    let made = Timestamp::from_secs(u32::try_from(now).unwrap_or(u32::MAX));
    let mut config = SignatureConfig::v4(SignatureType::Binary, key.algorithm(), HashAlgorithm::Sha512);
    config.hashed_subpackets = vec![
        Subpacket::regular(SubpacketData::SignatureCreationTime(made))?,
        Subpacket::regular(SubpacketData::IssuerFingerprint(key.fingerprint()))?,
    ];
    config.unhashed_subpackets = vec![Subpacket::regular(SubpacketData::IssuerKeyId(key.legacy_key_id()))?];
    config.sign(key, &Password::empty(), document)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asset::testing::keys::{DAY, Key, NOW, NOW_SECONDS, Shape};

    /// The armored secret key.
    fn armored(key: &Key) -> String {
        key.secret.to_armored_string(ArmorOptions::default()).unwrap()
    }

    #[test]
    fn what_a_key_signs_its_public_key_vouches_for() {
        for shape in [Shape::default(), Shape { subkey: true, ..Shape::default() }] {
            let key = Key::new(&shape);
            let signer = Signer::of_armor(armored(&key).as_bytes()).unwrap();
            assert_eq!(signer.fingerprint(), key.fingerprint());
            let signature = signer.sign("list", b"a  b\n", NOW_SECONDS).unwrap();
            let keyring = Keyring::of_keys(&[signer.public().to_owned()]).unwrap();
            keyring.check_detached("list", b"a  b\n", signature.as_bytes(), NOW_SECONDS).unwrap();
            keyring.check_detached("list", b"a  c\n", signature.as_bytes(), NOW_SECONDS).unwrap_err();
            assert!(!signer.public().contains("PRIVATE"));
        }
    }

    #[test]
    fn a_key_that_providers_would_refuse_signs_nothing() {
        let expired = Key::new(&Shape { made: NOW - 9 * DAY, lifetime: Some(DAY), ..Shape::default() });
        let signer = Signer::of_armor(armored(&expired).as_bytes()).unwrap();
        let error = signer.sign("list", b"x", NOW_SECONDS).unwrap_err();
        assert!(nexus_schema::error::chain(&error).contains("expired"), "{error:?}");
        for text in ["", "key", Key::good().armored().as_str()] {
            assert!(Signer::of_armor(text.as_bytes()).is_err_and(|e| e.contains("secret key")), "{text}");
        }
    }
}
