//! Which releases root filesystems can be made from.

use super::archive::{Host, SuiteToBe};
use crate::asset::debian::ReleaseVersion;
use crate::asset::error::AssetError;
use nexus_schema::error::chain;

/// A host of Debian 12 with another release and with Ubuntu's in its sources.
fn host() -> Host {
    let host = Host::new();
    host.write("etc/os-release", "ID=debian\nVERSION_CODENAME=bookworm\n");
    let suite = |root: &str, suite: &str, origin: &str, more: &str| {
        let made = SuiteToBe {
            root: root.into(),
            suite: suite.into(),
            // Ubuntu's additions have the code name of what they add to.
            codename: if origin == "Ubuntu" { "noble" } else { suite }.into(),
            origin: origin.into(),
            more: more.into(),
            ..SuiteToBe::new(Vec::new())
        };
        made.publish(&host.server, &host.key);
    };
    suite("/debian", "trixie", "Debian", "Version: 13.1\n");
    suite("/debian", "bookworm", "Debian", "Version: 12.15\n");
    suite("/debian", "bookworm-updates", "Debian", "");
    suite("/security", "bookworm-security", "Debian", "");
    suite("/ubuntu", "noble", "Ubuntu", "Version: 24.04\n");
    suite("/ubuntu", "noble-updates", "Ubuntu", "Version: 24.04\n");
    suite("/ubuntu", "noble-security", "Ubuntu", "Version: 24.04\n");
    host.source("/a/debian", "unheard-of");
    host.source("/debian", "trixie");
    host.source("/debian", "bookworm-updates");
    host.source("/security", "bookworm-security");
    host.source("/ubuntu", "noble-security noble noble-updates");
    host
}

fn codenames(releases: &[ReleaseVersion]) -> Vec<&str> {
    releases.iter().map(|release| release.codename.as_str()).collect()
}

#[tokio::test]
async fn releases_are_found_by_what_people_call_them() {
    let host = host();
    let archive = host.open().await.unwrap();
    assert_eq!(codenames(&archive.releases("debian")), ["bookworm", "trixie"], "the host's own first");
    assert_eq!(codenames(&archive.releases("ubuntu")), ["noble"]);
    assert!(archive.releases("plan9").is_empty());
    for (distribution, wanted, codename, distro, mirrors) in [
        ("debian", None, "bookworm", "debian-12", 3),
        ("debian", Some("bookworm"), "bookworm", "debian-12", 3),
        ("debian", Some("12"), "bookworm", "debian-12", 3),
        ("debian", Some("12.15"), "bookworm", "debian-12", 3),
        ("debian", Some("13"), "trixie", "debian-13", 1),
        ("ubuntu", Some("24.04"), "noble", "ubuntu-24.04", 3),
        ("ubuntu", None, "noble", "ubuntu-24.04", 3),
    ] {
        let (release, source) = archive.release_source(distribution, wanted).unwrap();
        assert_eq!((release.codename.as_str(), source.distro.as_str()), (codename, distro), "{wanted:?}");
        assert_eq!(
            (source.suite.as_str(), source.mirrors.len()),
            (codename, mirrors),
            "{:?}",
            source.mirrors
        );
        assert!(source.mirrors.iter().all(|mirror| mirror.contains(codename)), "{:?}", source.mirrors);
        assert!(source.keyring.ends_with("usr/share/keyrings/test.gpg"));
    }
    let (_, source) = archive.release_source("debian", Some("13")).unwrap();
    assert_eq!(source.mirrors, [format!("deb {} trixie main", host.server.url("/debian"))]);
    // The host's own release is unchanged.
    assert_eq!(archive.bootstrap_source().unwrap().distro, "debian-12");
}

#[tokio::test]
async fn releases_that_no_source_names_are_refused() {
    let host = host();
    let archive = host.open().await.unwrap();
    for (distribution, wanted, said) in [
        ("debian", Some("1"), "no release 1 of debian, only bookworm, trixie"),
        ("ubuntu", Some("bookworm"), "no release bookworm of ubuntu, only noble"),
        ("plan9", None, "no release of plan9"),
    ] {
        let error = archive.release_source(distribution, wanted).unwrap_err();
        assert!(matches!(error, AssetError::NoRelease { .. }), "{error:?}");
        let text = chain(&error);
        assert!(text.contains(said) && text.contains("unheard-of"), "{text}");
        assert!(error.hint().is_some_and(|hint| hint.contains("Signed-By")));
    }
}

#[tokio::test]
async fn what_a_source_says_of_itself_stays_with_it_but_not_its_password() {
    let host = host();
    host.write("etc/apt/apt.conf.d/50old", "Acquire::Check-Valid-Until false;");
    std::fs::remove_dir_all(host.path().join("etc/apt/sources.list.d")).unwrap();
    let url = host.server.url("/debian");
    let named = url.replace("http://", "http://me:a%40b@");
    let strange = host.server.url("/security").replace("http://", "http://me:a%0ab@");
    let key = "signed-by=/usr/share/keyrings/test.gpg";
    host.write(
        "etc/apt/sources.list",
        format!(
            "deb [{key}] {named} bookworm main\n\
             deb [{key} check-valid-until=yes check-date=no] {named} bookworm-updates main\n\
             deb [{key}] {strange} bookworm-security main\n"
        ),
    );
    let archive = host.open().await.unwrap();
    let (_, source) = archive.release_source("debian", None).unwrap();
    assert_eq!(
        source.mirrors,
        [
            format!("deb [check-valid-until=no] {url} bookworm main"),
            format!("deb [check-date=no] {url} bookworm-updates main"),
            format!("deb [check-valid-until=no] {} bookworm-security main", host.server.url("/security")),
        ]
    );
    let login = format!("machine {url}/ login me password a@b\n");
    assert_eq!(source.credentials.reveal(), login.repeat(2), "{:?}", archive.problems());
    assert!(!format!("{source:?}").contains("a@b"), "{source:?}");
}
