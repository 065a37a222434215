//! Downloads over TLS, from trusted and untrusted servers.

use nexus_schema::{ErrorCode, ToolError};

use super::*;
use crate::asset::testing::tls::{Authority, self_signed};
use crate::os::tls::{TlsProblem, Trust};

const HERE: &str = "127.0.0.1";

/// A server, and a client that trusts a CA.
fn scene(identity: Arc<rustls::ServerConfig>, authority: &Authority) -> Scene {
    Scene::of(Server::start_tls(identity), FetchSettings { trust: authority.trusted(), ..settings() })
}

#[tokio::test]
async fn a_server_that_a_ca_of_ours_vouches_for_is_trusted() {
    let authority = Authority::new("ours");
    let scene = scene(authority.server(HERE), &authority);
    assert!(scene.want().url.as_str().starts_with("https://127.0.0.1:"));
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    assert_eq!(scene.fetcher.to_memory(&scene.want(), &scene.progress).await.unwrap(), body());
}

#[tokio::test]
async fn a_connection_that_is_cut_is_gone_on_with_over_tls() {
    let authority = Authority::new("ours");
    let scene = scene(authority.server(HERE), &authority);
    scene.server.misbehave("/file", [Fault::CutAfter(100_000), Fault::CutAfter(50_000)]);
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    let ranges = scene.ranges();
    assert_eq!(ranges.len(), 3, "{ranges:?}");
    assert!(ranges[0].is_none() && ranges[1..].iter().all(Option::is_some), "{ranges:?}");

    std::fs::remove_file(scene.path()).unwrap();
    std::fs::write(scene.part(), &body()[..700_000]).unwrap();
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
    assert_eq!(scene.ranges().last().unwrap().as_deref(), Some("bytes=700000-"));
}

#[tokio::test]
async fn servers_that_nobody_vouches_for_are_refused_at_once() {
    let (authority, other) = (Authority::new("ours"), Authority::new("theirs"));
    for (identity, expected, said) in [
        (self_signed(HERE), Some(TlsProblem::UnknownIssuer), "not issued by a trusted CA"),
        (other.server(HERE), Some(TlsProblem::UnknownIssuer), "not issued by a trusted CA"),
        (authority.expired(HERE), None, "expired at 2020-02-02T00:00:00Z"),
        (authority.early(HERE), None, "is not valid before 3000-01-01T00:00:00Z"),
        (authority.server("mirror.example"), None, "its certificate is only valid for mirror.example"),
        (authority.server("127.0.0.2"), None, "its certificate is only valid for 127.0.0.2"),
    ] {
        let scene = scene(identity, &authority);
        let want = Want { url: scene.server.url("/file").parse().unwrap(), ..scene.want() };
        let error = scene.fetch(&want).await.unwrap_err();
        let AssetError::Untrusted { problem, .. } = &error else { panic!("{error:?}") };
        assert!(expected.is_none_or(|expected| expected == **problem), "{problem:?}");
        let error = ToolError::from(error);
        assert_eq!(error.code, ErrorCode::VerificationFailed);
        for part in [&format!("get {}: ", want.url), said] {
            assert!(error.message.contains(part), "{part}: {}", error.message);
        }
        assert!(error.hint.is_some(), "{error:?}");
        scene.assert_nothing();
        assert_eq!(
            (scene.server.requests().len(), scene.server.connections()),
            (0, 1),
            "asked again in vain"
        );
    }
}

#[tokio::test]
async fn a_ca_of_ours_is_not_needed_by_those_who_need_none() {
    // Without that CA, the server is not trusted.
    let authority = Authority::new("ours");
    let scene = Scene::of(Server::start_tls(authority.server(HERE)), settings());
    let error = ToolError::from(scene.fetch(&scene.want()).await.unwrap_err());
    assert!(error.hint.as_deref().is_some_and(|hint| hint.contains("ca_file")), "{error:?}");
    // Plain HTTP is not affected.
    let scene = Scene::with(FetchSettings { trust: authority.trusted(), ..settings() });
    scene.fetch(&scene.want()).await.unwrap();
    scene.assert_whole();
}

#[tokio::test]
async fn a_redirection_never_leaves_tls() {
    let authority = Authority::new("ours");
    let scene = scene(authority.server(HERE), &authority);
    let plain = Server::start();
    plain.put("/file", body());
    scene.server.put("/old", b"".to_vec());
    scene.server.misbehave("/old", [Fault::Redirect(plain.url("/file"))]);
    let want = Want { url: scene.server.url("/old").parse().unwrap(), ..scene.want() };
    let error = scene.fetch(&want).await.unwrap_err();
    let AssetError::Untrusted { problem, url } = &error else { panic!("{error:?}") };
    assert_eq!((&**problem, url), (&TlsProblem::Downgrade { to: plain.url("/file") }, &want.url.to_string()));
    assert_eq!((plain.requests().len(), scene.server.requests().len()), (0, 1));
    scene.assert_nothing();

    // Redirects to another TLS server, and from plain HTTP to TLS, are followed; a redirect back to plain HTTP is not.
    plain.put("/old", b"".to_vec());
    plain.misbehave("/old", [Fault::Redirect(scene.server.url("/file"))]);
    let want = Want { url: plain.url("/old").parse().unwrap(), ..scene.want() };
    scene.fetch(&want).await.unwrap();
    scene.assert_whole();
    std::fs::remove_file(scene.path()).unwrap();
    plain.misbehave("/old", [Fault::Redirect(scene.server.url("/file"))]);
    scene.server.misbehave("/file", [Fault::Redirect(plain.url("/file"))]);
    let error = scene.fetch(&want).await.unwrap_err();
    assert!(matches!(error, AssetError::Untrusted { .. }), "{error:?}");
    assert_eq!(plain.count("/file"), 0);
    scene.assert_nothing();
}

#[test]
fn a_file_of_cas_is_looked_at_before_it_is_used() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let authority = Authority::new("ours");
    let cut = &authority.pem()[..authority.pem().len() / 2];
    let noise = "-----BEGIN CERTIFICATE-----\nbm9ib2R5\n-----END CERTIFICATE-----\n";
    for (text, said) in
        [("", "contains no certificate"), ("nobody", "contains no certificate"), (noise, "certificate 1: ")]
    {
        std::fs::write(file.path(), text).unwrap();
        let error = Trust::read(file.path()).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains(&file.path().display().to_string()), "{error}");
    }
    std::fs::write(file.path(), cut).unwrap();
    assert!(Trust::read(file.path()).is_err());
    std::fs::write(file.path(), [authority.pem(), Authority::new("theirs").pem()].concat()).unwrap();
    let trust = Trust::read(file.path()).unwrap();
    // For other programs, together with the host's CAs.
    let bundle = trust.bundle().unwrap().unwrap();
    let text = std::fs::read_to_string(&bundle).unwrap();
    assert!(text.starts_with(&authority.pem().replace('\r', "")), "{text}");
    assert_ne!(Trust::read(&bundle).unwrap(), trust);
    assert!(Trust::default().bundle().unwrap().is_none());
    let error = Trust::read(std::path::Path::new("/nowhere/ca.pem")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/ca.pem"), "{error}");
}
