//! Certificates for servers of tests.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::os::tls::Trust;

/// A CA that is not trusted by default.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Its own certificate.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// The trust settings of a host that has this CA in a file.
    pub(crate) fn trusted(&self) -> Trust {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &self.pem).unwrap();
        Trust::read(file.path()).unwrap()
    }

    /// A server with a certificate of this CA.
    pub(crate) fn server(&self, name: &str) -> Arc<ServerConfig> {
        self.server_with(name, |_| {})
    }

    /// A server whose certificate has expired.
    pub(crate) fn expired(&self, name: &str) -> Arc<ServerConfig> {
        self.server_with(name, |params| params.not_after = date_time_ymd(2020, 2, 2))
    }

    /// A server whose certificate is not valid yet.
    pub(crate) fn early(&self, name: &str) -> Arc<ServerConfig> {
        self.server_with(name, |params| params.not_before = date_time_ymd(3000, 1, 1))
    }

    fn server_with(&self, name: &str, change: impl Fn(&mut CertificateParams)) -> Arc<ServerConfig> {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        identity(certificate.der().clone(), &key)
    }
}

/// A server with a self-signed certificate.
pub(crate) fn self_signed(name: &str) -> Arc<ServerConfig> {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([name.to_owned()]).unwrap().self_signed(&key).unwrap();
    identity(certificate.der().clone(), &key)
}

fn identity(certificate: CertificateDer<'static>, key: &KeyPair) -> Arc<ServerConfig> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(config.with_no_client_auth().with_single_cert(vec![certificate], key).unwrap())
}
