use serde_json::{Value, json};

use super::*;

fn entry(digit: &str, platform: Value) -> Descriptor {
    let digest = format!("sha256:{}", digit.repeat(64));
    serde_json::from_value(json!({ "digest": digest, "size": 1, "platform": platform })).unwrap()
}

fn platform(os: &str, architecture: &str, variant: Option<&str>) -> Value {
    json!({ "os": os, "architecture": architecture, "variant": variant })
}

#[test]
fn the_image_for_this_machine_is_chosen() {
    let mut about = entry("0", platform("linux", "amd64", None));
    about.annotations = Some([(REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned())].into());
    let entries = [
        about,
        entry("1", platform("unknown", "unknown", None)),
        entry("2", platform("windows", "amd64", None)),
        entry("3", platform("linux", "amd64", Some("v3"))),
        entry("4", platform("linux", "amd64", None)),
        entry("5", platform("linux", "arm64", Some("v8"))),
        entry("6", platform("linux", "arm", Some("v7"))),
    ];
    let chosen = |architecture| choose(&entries, None, architecture).map(|d| d.digest[7..8].to_owned());
    assert_eq!(chosen("amd64").unwrap(), "4");
    assert_eq!(chosen("arm64").unwrap(), "5");
    assert_eq!(chosen("arm").unwrap(), "6");
    let error = chosen("riscv64").unwrap_err();
    assert!(matches!(&error, OciError::Platform { has, .. } if has.contains("linux/arm64")), "{error}");
    // An entry without a platform is used if no other fits.
    let entries = [entry("1", Value::Null), entry("2", platform("linux", "amd64", None))];
    assert_eq!(choose(&entries, None, "amd64").unwrap().digest, entries[1].digest);
    assert_eq!(choose(&entries, None, "arm64").unwrap().digest, entries[0].digest);
}

#[test]
fn configurations_may_be_sparse() {
    let parse = |value: Value| Configuration::parse(value.to_string().as_bytes(), "amd64");
    let bare = parse(json!({ "rootfs": { "diff_ids": [] } })).unwrap();
    assert_eq!(bare.config, ImageConfig::default());
    let nulls = json!({ "architecture": "", "os": "", "rootfs": { "diff_ids": [] },
        "config": { "Env": null, "WorkingDir": "", "User": "", "Entrypoint": null, "Cmd": null } });
    assert_eq!(parse(nulls).unwrap().config, ImageConfig::default());
    for bad in [json!({}), json!([]), json!({ "rootfs": {} }), json!({ "rootfs": { "diff_ids": ["x"] } })] {
        assert!(parse(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn layers_that_are_no_tar_archives_are_refused_by_their_type() {
    let parse = |kind: Value| {
        let blob = |media_type| json!({ "mediaType": media_type, "digest": format!("sha256:{}", "1".repeat(64)), "size": 1 });
        let tar = blob(json!("application/vnd.oci.image.layer.v1.tar+gzip"));
        let config = blob(json!("application/vnd.oci.image.config.v1+json"));
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [tar, blob(kind)] });
        Document::parse(manifest.to_string().as_bytes()).map(drop).map_err(|error| error.to_string())
    };
    for known in [
        json!("application/vnd.oci.image.layer.v1.tar"),
        json!("application/vnd.oci.image.layer.v1.tar+zstd"),
        json!("application/vnd.docker.image.rootfs.diff.tar.gzip"),
        json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        json!(""),
        Value::Null,
    ] {
        assert_eq!(parse(known.clone()), Ok(()), "{known}");
    }
    let encrypted = parse(json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")).unwrap_err();
    assert!(encrypted.contains("its layer 2") && encrypted.contains("which is encrypted"), "{encrypted}");
    for unknown in
        ["application/vnd.oci.empty.v1+json", "application/vnd.oci.image.layer.v1.tar+br", "text/plain"]
    {
        let refused = parse(json!(unknown)).unwrap_err();
        assert!(refused.contains(unknown) && refused.contains("no tar archive"), "{refused}");
    }
}
