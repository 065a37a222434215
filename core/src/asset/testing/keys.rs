//! Keys that the tests make, valid and invalid.

use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, DetachedSignature, KeyType, SecretKeyParamsBuilder,
    SignedPublicKey, SignedSecretKey, SubkeyParamsBuilder,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{KeyFlags, Signature, SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::ser::Serialize;
use pgp::types::{Duration, KeyDetails, Password, SigningKey, Tag, Timestamp};
use rand::thread_rng;

use crate::asset::debian::signature::Seconds;

/// A day, in seconds.
pub(crate) const DAY: u32 = 86400;

/// The time of all tests.
pub(crate) const NOW: u32 = 1_790_000_000;
/// The same in the type of the code.
pub(crate) const NOW_SECONDS: Seconds = NOW as Seconds;

/// How a key is made, and what its self-signature says.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) made: u32,
    pub(crate) lifetime: Option<u32>,
    pub(crate) signs: bool,
    pub(crate) hash: HashAlgorithm,
    pub(crate) subkey: bool,
    pub(crate) rsa: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            made: NOW - 100 * DAY,
            lifetime: None,
            signs: true,
            hash: HashAlgorithm::Sha256,
            subkey: false,
            rsa: false,
        }
    }
}

/// How a text is signed.
#[derive(Debug, Clone)]
pub(crate) struct Manner {
    pub(crate) made: u32,
    pub(crate) lifetime: Option<u32>,
    pub(crate) hash: HashAlgorithm,
    pub(crate) typ: SignatureType,
    pub(crate) more: Vec<Subpacket>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            made: NOW - DAY,
            lifetime: None,
            hash: HashAlgorithm::Sha256,
            typ: SignatureType::Text,
            more: Vec::new(),
        }
    }
}

/// A key with its secret.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) secret: SignedSecretKey,
}

fn regular(data: SubpacketData) -> Subpacket {
    Subpacket::regular(data).unwrap()
}

fn config(typ: SignatureType, key: &impl SigningKey, hash: HashAlgorithm, made: u32) -> SignatureConfig {
    let mut config = SignatureConfig::v4(typ, key.algorithm(), hash);
    config.hashed_subpackets = vec![
        regular(SubpacketData::SignatureCreationTime(Timestamp::from_secs(made))),
        regular(SubpacketData::IssuerFingerprint(key.fingerprint())),
    ];
    config.unhashed_subpackets = vec![regular(SubpacketData::IssuerKeyId(key.legacy_key_id()))];
    config
}

fn flags(signs: bool) -> SubpacketData {
    let mut flags = KeyFlags::default();
    flags.set_certify(true);
    flags.set_sign(signs);
    SubpacketData::KeyFlags(flags)
}

impl Key {
    pub(crate) fn good() -> Self {
        Self::new(&Shape::default())
    }

    pub(crate) fn new(shape: &Shape) -> Self {
        let created = Timestamp::from_secs(shape.made);
        let kind = if shape.rsa { KeyType::Rsa(2048) } else { KeyType::Ed25519Legacy };
        let mut params = SecretKeyParamsBuilder::default();
        params.key_type(kind).can_certify(true).can_sign(true).created_at(created);
        params.primary_user_id("Test Archive <archive@example.test>".into());
        if shape.subkey {
            let mut subkey = SubkeyParamsBuilder::default();
            subkey.key_type(KeyType::Ed25519Legacy).can_sign(true).created_at(created);
            params.subkeys(vec![subkey.build().unwrap()]);
        }
        let mut key = Self { secret: params.build().unwrap().generate(thread_rng()).unwrap() };
        key.certify(shape);
        if shape.subkey {
            key.bind(shape.made, shape.lifetime, true, true);
        }
        key
    }

    /// Replaces the self-signature.
    pub(crate) fn certify(&mut self, shape: &Shape) {
        // If the key has a subkey, signing and expiry are left to the subkey.
        let (signs, lifetime) = if shape.subkey { (false, None) } else { (shape.signs, shape.lifetime) };
        let signature = self.certification(shape.made, shape.hash, signs, lifetime);
        self.secret.details.users[0].signatures = vec![signature];
    }

    pub(crate) fn certification(
        &self,
        made: u32,
        hash: HashAlgorithm,
        signs: bool,
        lifetime: Option<u32>,
    ) -> Signature {
        let primary = &self.secret.primary_key;
        let mut config = config(SignatureType::CertPositive, primary, hash, made);
        config.hashed_subpackets.push(regular(flags(signs)));
        if let Some(lifetime) = lifetime {
            config
                .hashed_subpackets
                .push(regular(SubpacketData::KeyExpirationTime(Duration::from_secs(lifetime))));
        }
        let user = &self.secret.details.users[0].id;
        config
            .sign_certification(primary, primary.public_key(), &Password::empty(), Tag::UserId, user)
            .unwrap()
    }

    /// Replaces the binding of the subkey.
    pub(crate) fn bind(&mut self, made: u32, lifetime: Option<u32>, signs: bool, signs_back: bool) {
        let primary = &self.secret.primary_key;
        let subkey = &self.secret.secret_subkeys[0].key;
        let nothing = Password::empty();
        let mut binding = config(SignatureType::SubkeyBinding, primary, HashAlgorithm::Sha256, made);
        binding.hashed_subpackets.push(regular(flags(signs)));
        if let Some(lifetime) = lifetime {
            binding
                .hashed_subpackets
                .push(regular(SubpacketData::KeyExpirationTime(Duration::from_secs(lifetime))));
        }
        if signs_back {
            let back = config(SignatureType::KeyBinding, subkey, HashAlgorithm::Sha256, made);
            let back = back
                .sign_primary_key_binding(subkey, subkey.public_key(), &nothing, primary.public_key())
                .unwrap();
            binding.hashed_subpackets.push(regular(SubpacketData::EmbeddedSignature(Box::new(back))));
        }
        let signature = binding
            .sign_subkey_binding(primary, primary.public_key(), &nothing, subkey.public_key())
            .unwrap();
        self.secret.secret_subkeys[0].signatures = vec![signature];
    }

    /// Revokes the whole key.
    pub(crate) fn revoke(&mut self, made: u32) {
        let primary = &self.secret.primary_key;
        let config = config(SignatureType::KeyRevocation, primary, HashAlgorithm::Sha256, made);
        let revocation = config.sign_key(primary, &Password::empty(), primary.public_key()).unwrap();
        self.secret.details.revocation_signatures.push(revocation);
    }

    /// Revokes the user id.
    pub(crate) fn revoke_user(&mut self, made: u32) {
        let primary = &self.secret.primary_key;
        let config = config(SignatureType::CertRevocation, primary, HashAlgorithm::Sha256, made);
        let user = &self.secret.details.users[0].id;
        let revocation = config
            .sign_certification(primary, primary.public_key(), &Password::empty(), Tag::UserId, user)
            .unwrap();
        self.secret.details.users[0].signatures.push(revocation);
    }

    /// Revokes the subkey.
    pub(crate) fn revoke_subkey(&mut self, made: u32) {
        let primary = &self.secret.primary_key;
        let subkey = &self.secret.secret_subkeys[0].key;
        let config = config(SignatureType::SubkeyRevocation, primary, HashAlgorithm::Sha256, made);
        let revocation = config
            .sign_subkey_binding(primary, primary.public_key(), &Password::empty(), subkey.public_key())
            .unwrap();
        self.secret.secret_subkeys[0].signatures.push(revocation);
    }

    pub(crate) fn public(&self) -> SignedPublicKey {
        SignedPublicKey::from(self.secret.clone())
    }

    /// The keyring with this key alone.
    pub(crate) fn binary(&self) -> Vec<u8> {
        self.public().to_bytes().unwrap()
    }

    pub(crate) fn armored(&self) -> String {
        self.public().to_armored_string(ArmorOptions::default()).unwrap()
    }

    pub(crate) fn fingerprint(&self) -> String {
        self.public().fingerprint().to_string()
    }

    /// A signature of a text as it is hashed, by the subkey if there is one.
    pub(crate) fn signature(&self, text: &str, manner: &Manner) -> Signature {
        match self.secret.secret_subkeys.first() {
            Some(subkey) => signature(&subkey.key, text, manner),
            None => signature(&self.secret.primary_key, text, manner),
        }
    }

    /// A detached, armored signature of a document.
    pub(crate) fn sign_beside(&self, document: &str, manner: &Manner) -> String {
        let signature = DetachedSignature::new(self.signature(document, manner));
        signature.to_armored_string(ArmorOptions::default()).unwrap()
    }

    pub(crate) fn sign(&self, text: &str) -> String {
        sign_many(text, &[(self, Manner::default())])
    }

    pub(crate) fn sign_so(&self, text: &str, manner: Manner) -> String {
        sign_many(text, &[(self, manner)])
    }
}

fn signature(key: &impl SigningKey, text: &str, manner: &Manner) -> Signature {
    let mut config = config(manner.typ, key, manner.hash, manner.made);
    if let Some(lifetime) = manner.lifetime {
        config
            .hashed_subpackets
            .push(regular(SubpacketData::SignatureExpirationTime(Duration::from_secs(lifetime))));
    }
    config.hashed_subpackets.extend(manner.more.clone());
    config.sign(key, &Password::empty(), text.as_bytes()).unwrap()
}

/// A text signed by several keys.
pub(crate) fn sign_many(text: &str, by: &[(&Key, Manner)]) -> String {
    // Blanks at the ends of lines are not signed.
    let hashed: Vec<_> = text.lines().map(|line| line.trim_end_matches([' ', '\t'])).collect();
    let hashed = hashed.join("\r\n") + if text.ends_with('\n') { "\r\n" } else { "" };
    let message = CleartextSignedMessage::new_many(text, |_| {
        Ok(by.iter().map(|(key, manner)| key.signature(&hashed, manner)).collect())
    });
    message.unwrap().to_armored_string(ArmorOptions::default()).unwrap()
}
