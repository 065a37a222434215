//! What apt's sources say.

use std::path::Path;

use crate::asset::debian::sources::{Entry, SignedBy, Sources, read};
use crate::asset::error::{AssetError, SourceProblem};

/// The sources of a host with these files below `etc/apt`.
fn sources(files: &[(&str, &str)]) -> (tempfile::TempDir, Sources) {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = root.path().join("etc/apt").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let sources = read(root.path(), "amd64").unwrap();
    (root, sources)
}

/// Address, suite and components of each entry.
fn short(sources: &Sources) -> Vec<String> {
    let short = |e: &Entry| format!("{} {} {}", e.mirrors[0], e.suite, e.components.join(","));
    sources.entries.iter().map(short).collect()
}

fn problems(sources: &Sources) -> Vec<SourceProblem> {
    let problem = |e: &AssetError| match e {
        AssetError::Source { problem, .. } => problem.clone(),
        other => panic!("{other:?}"),
    };
    sources.problems.iter().map(problem).collect()
}

#[test]
fn one_line_sources_are_read() {
    let list = "# deb http://commented.test/ x main\n\
        deb http://a.test/debian bookworm main contrib # why\n\
        deb-src http://a.test/debian bookworm main\n\
        \tdeb   [ arch=amd64,arm64 signed-by=/k/a.gpg,/k/b.asc  trusted=yes check-valid-until=no ]  https://b.test/d/  x-security   main\n\
        deb [arch=armhf] http://c.test/ x main\n\
        deb [signed-by=0123456789abcdef0123456789ABCDEF01234567!] http://d.test/$(ARCH) x main\n\n";
    let (root, sources) =
        sources(&[("sources.list", list), ("sources.list.d/a.list.save", list), ("sources.list.d/b", list)]);
    assert_eq!(
        short(&sources),
        [
            "http://a.test/debian/ bookworm main,contrib",
            "https://b.test/d/ x-security main",
            "http://d.test/amd64/ x main"
        ]
    );
    assert_eq!(problems(&sources), [SourceProblem::Architecture("amd64")]);
    let [a, b, d] = &sources.entries[..] else { panic!() };
    assert_eq!((&a.signed_by, a.check_valid_until), (&None, None));
    let files = ["k/a.gpg", "k/b.asc"].map(|f| root.path().join(f)).to_vec();
    assert_eq!(b.signed_by, Some(SignedBy::Keys { files, fingerprints: vec![] }));
    assert_eq!(b.check_valid_until, Some(false));
    let fingerprints = vec!["0123456789abcdef0123456789abcdef01234567".to_owned()];
    assert_eq!(d.signed_by, Some(SignedBy::Keys { files: vec![], fingerprints }));
}

#[test]
fn stanzas_are_read() {
    let text = "# a comment\n\
        Types: deb deb-src\nURIs: http://a.test/debian http://b.test/debian\nSuites: stable stable-updates\n\
        Components: main non-free-firmware\nSigned-By: /k/a.gpg\nCheck-Valid-Until: no\nCheck-Date: no\n\n\n\
        Types: deb\nEnabled: no\nURIs: http://off.test/\nSuites: x\nComponents: main\n\n\
        Types: deb-src\nURIs: http://source.test/\nSuites: x\nComponents: main\n\n\
        Types: deb\nURIs: http://c.test\nSuites:\n x\n# between\n y\nComponents: main\nArchitectures: amd64 i386\nSigned-By:\n \
        -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n";
    let (_root, sources) = sources(&[("sources.list.d/x.sources", text)]);
    assert_eq!(
        short(&sources),
        [
            "http://a.test/debian/ stable main,non-free-firmware",
            "http://a.test/debian/ stable-updates main,non-free-firmware",
            "http://b.test/debian/ stable main,non-free-firmware",
            "http://b.test/debian/ stable-updates main,non-free-firmware",
            "http://c.test/ x main",
            "http://c.test/ y main",
        ]
    );
    assert!(sources.problems.is_empty());
    assert_eq!(
        (sources.entries[0].check_valid_until, sources.entries[0].check_date),
        (Some(false), Some(false))
    );
    let key = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nabc\n-----END PGP PUBLIC KEY BLOCK-----\n";
    assert_eq!(sources.entries[5].signed_by, Some(SignedBy::Embedded(key.into())));
}

#[test]
fn the_same_suite_twice_is_one_entry() {
    let (_root, sources) = sources(&[(
        "sources.list",
        "deb http://a.test/d x main\ndeb http://a.test/d/ x contrib\ndeb http://a.test/d y main\n",
    )]);
    assert_eq!(short(&sources), ["http://a.test/d/ x main,contrib", "http://a.test/d/ y main"]);
}

#[test]
fn what_is_not_supported_is_said_so() {
    let list = "deb cdrom:[Debian GNU/Linux 12]/ bookworm main\n\
        deb file:/srv/mirror bookworm main\n\
        deb mirror+file:/etc/apt/mirrors.none bookworm main\n\
        deb mirror+file:/etc/apt/empty.list x main\n\
        deb tor+http://a.test/ x main\n\
        deb http://flat.test/ ./\n\
        deb http://a.test/ x\n\
        deb http://a.test/\n\
        deb [arch=amd64 http://a.test/ x main\n\
        deb [arch] http://a.test/ x main\n\
        deb nonsense x main\n\
        deb http:// x main\n\
        deb http://a.test/ ../x main\n\
        deb http://a.test/ x ma?in\n";
    let (_root, sources) = sources(&[
        ("sources.list", list),
        ("empty.list", "# none\n"),
        ("sources.list.d/x.sources", "no colon\n"),
    ]);
    assert_eq!(short(&sources), Vec::<String>::new());
    let problems = problems(&sources);
    assert_eq!(problems.len(), 15, "{problems:?}");
    assert_eq!(problems[1], SourceProblem::Scheme("file".into()));
    assert_eq!(problems[4], SourceProblem::Scheme("tor+http".into()));
    assert_eq!(problems[5], SourceProblem::Flat);
    let text = sources.problems[1].to_string();
    assert!(
        text.contains("file:/srv/mirror") && text.contains("sources.list") && text.contains("only http"),
        "{text}"
    );
}

#[test]
fn a_list_of_mirrors_is_taken_in_its_order() {
    let list = "# mirrors\nhttp://last.test/debian\n\nhttp://second.test/debian/ arch:amd64 priority:2\nhttp://first.test/d\tpriority:1\n";
    let (_root, sources) = sources(&[
        ("mirrors/x.list", list),
        ("sources.list", "deb mirror+file:/etc/apt/mirrors/x.list stable main\n"),
    ]);
    let mirrors: Vec<_> = sources.entries[0].mirrors.iter().map(|m| m.as_str()).collect();
    assert_eq!(mirrors, ["http://first.test/d/", "http://second.test/debian/", "http://last.test/debian/"]);
}

#[test]
fn a_host_without_apt_has_no_sources() {
    let sources = read(Path::new("/nonexistent"), "amd64").unwrap();
    assert!(sources.entries.is_empty() && sources.problems.is_empty());
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(list in "(deb |\\[|\\]|signed-by=|http://a|/|mirror\\+file:| |\n|.){0,40}", stanzas: String) {
        sources(&[("sources.list", &list), ("sources.list.d/x.sources", &stanzas)]);
    }
}
