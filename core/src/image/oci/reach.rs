//! Where a registry is: on the internet, or where only the host's own programs and networks should be.

use std::net::IpAddr;
use std::time::Duration;

use nexus_net_policy::{Range, range};
use oci_spec::distribution::Reference;

use super::session::host_and_port;
use crate::os::own_address::is_own;

/// Timeout for the lookup of a registry's name.
const LOOKUP_MAX: Duration = Duration::from_secs(5);
/// The port of a registry that names none.
const PORT: u16 = 443;

/// Whether the registry of a reference is on the internet, and not on this host: whether all addresses of its name are. A reference that is none, and a
/// name that is not known, count as such, for whoever asks such a registry is told what is wrong. TLS keeps a name from being another registry's later.
pub(crate) async fn is_public(reference: &str) -> bool {
    is_elsewhere(reference, is_own).await
}

/// As [`is_public`], with what tells the addresses of this host.
async fn is_elsewhere(reference: &str, is_own: fn(IpAddr) -> bool) -> bool {
    let is_allowed = |address: IpAddr| range(address) == Range::Public && !is_own(address);
    let Ok(reference) = reference.parse::<Reference>() else { return true };
    let (host, port) = host_and_port(reference.resolve_registry());
    if is_own_name(host) {
        return false;
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return is_allowed(address);
    }
    let lookup = tokio::net::lookup_host((host, port.unwrap_or(PORT)));
    match tokio::time::timeout(LOOKUP_MAX, lookup).await {
        Ok(Ok(mut found)) => found.all(|at| is_allowed(at.ip())),
        Ok(Err(_)) | Err(_) => true,
    }
}

/// Whether a name means this host, whatever a resolver says.
fn is_own_name(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    host == "localhost" || host.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn registries_of_the_host_and_of_private_networks_are_not_public() {
        for (reference, expected) in [
            ("127.0.0.1:5000/a/b:1", false),
            ("localhost:5000/a/b:1", false),
            ("localhost/a", false),
            ("x.localhost:80/a", false),
            ("10.1.2.3/a/b", false),
            ("192.168.1.1:443/a/b:1", false),
            ("169.254.169.254/latest/meta-data:1", false),
            ("0.0.0.0:5000/a", false),
            // A resolver reads this as 127.0.0.1.
            ("127.1:5000/a", false),
            ("8.8.8.8/a/b:1", true),
            // No reference at all: refused elsewhere, with the reason.
            ("UPPER/CASE", true),
            ("", true),
        ] {
            assert_eq!(is_public(reference).await, expected, "{reference}");
        }
    }

    #[tokio::test]
    async fn an_address_of_the_host_is_not_public_whatever_its_range() {
        let is_own = |address: IpAddr| address == IpAddr::from([192, 0, 2, 2]);
        for (reference, expected) in [
            ("192.0.2.2:9611/x", false),
            ("192.0.2.2/a/b:1", false),
            // A resolver reads this as 192.0.2.2.
            ("192.0.514:9611/x", false),
            ("192.0.2.3:9611/x", true),
            ("192.0.515:9611/x", true),
        ] {
            assert_eq!(is_elsewhere(reference, is_own).await, expected, "{reference}");
        }
    }
}
