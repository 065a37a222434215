//! Registries over TLS, trusted and untrusted.

use std::sync::Arc;

use super::*;
use crate::asset::testing::tls::{Authority, self_signed};
use crate::os::tls::TlsProblem;

const NAME: &str = "registry.test";

/// A registry that is reachable under a name.
fn served(identity: Arc<rustls::ServerConfig>, authority: &Authority) -> (Liar, Access, String) {
    let liar = Liar::of(Server::start_tls(identity), two_layers(), |_, _| None);
    let at = liar.server.address();
    let access = Access { trust: authority.trusted(), hosts: vec![(NAME.into(), at)], ..Access::default() };
    (liar, access, format!("{NAME}:{}/test:1", at.port()))
}

#[tokio::test]
async fn a_registry_that_a_ca_of_ours_vouches_for_is_trusted() {
    let base = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let (liar, access, name) = served(authority.server(NAME), &authority);
    liar.server.misbehave(&liar.blob(1), [Fault::CutAfter(150_000)]);
    pull_by(&name, &access, &base.path().join("image")).await.unwrap();
    let asked = liar.server.requests();
    let ranges: Vec<_> =
        asked.iter().filter(|r| r.target == liar.blob(1)).map(|r| r.range.as_deref()).collect();
    assert!(matches!(ranges[..], [None, Some(_)]), "{ranges:?}");
}

#[tokio::test]
async fn registries_that_nobody_vouches_for_are_refused_at_once() {
    let authority = Authority::new("ours");
    for (identity, said) in [
        (self_signed(NAME), "not issued by a trusted CA"),
        (authority.expired(NAME), "expired at 2020-02-02"),
        (authority.server("another.test"), "is only valid for another.test"),
    ] {
        let (liar, access, name) = served(identity, &authority);
        let error = Remote::parse(&name, &access).unwrap().resolve().await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(said) && text.contains(NAME), "{text}");
        assert_eq!(error.code(), ErrorCode::VerificationFailed);
        assert!(error.hint().is_some());
        assert_eq!((liar.server.requests().len(), liar.server.connections()), (0, 1));
    }
}

#[tokio::test]
async fn blobs_never_leave_tls() {
    let base = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let (liar, access, name) = served(authority.server(NAME), &authority);
    let plain = Server::start();
    liar.server.misbehave(&liar.blob(0), [Fault::Redirect(plain.url("/blob"))]);
    let error = pull_by(&name, &access, &base.path().join("image")).await.unwrap_err();
    let ImageError::Oci(OciError::Untrusted { problem, .. }) = &error else { panic!("{error:?}") };
    assert_eq!(problem, &TlsProblem::Downgrade { to: plain.url("/blob") });
    assert_eq!((plain.requests().len(), liar.server.count(&liar.blob(0))), (0, 1));
    assert!(names(base.path()).is_empty());
}
