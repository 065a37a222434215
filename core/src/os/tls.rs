//! What cryptography TLS uses.

use std::sync::Once;

/// Sees to it that there is one before a client is made.
pub(crate) fn provide() {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Another part of the process may have installed one: any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
