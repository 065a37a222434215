//! The present time.

use nexus_schema::Timestamp;

/// The present time.
pub fn now() -> Timestamp {
    std::time::SystemTime::now().into()
}
