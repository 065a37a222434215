//! Sources of kernels, as packages of the distribution.

use super::archive::{Host, Package, SuiteToBe};
use crate::asset::error::AssetError;
use crate::asset::stream::Compression;

/// A package with the source of a series of Linux.
fn source(series: &str, version: &str) -> Package {
    let name = format!("linux-source-{series}");
    let path = format!("./usr/src/{name}.tar.xz");
    let content = format!("the source of {version}");
    let files: [(&str, &[u8]); 2] = [("./usr/share/doc/x", b"x"), (path.as_str(), content.as_bytes())];
    Package::new(&name, version, &files, Compression::Xz)
}

#[tokio::test]
async fn sources_of_kernels_are_found_and_fetched() {
    let meta = Package::new("linux-source", "6.12.48-1", &[], Compression::Xz);
    let packages = vec![source("6.1", "6.1.153+1~deb12u1"), meta, source("6.12", "6.12.48-1")];
    let host = Host::serving(&SuiteToBe::new(packages));
    let archive = host.open().await.unwrap();
    let sources = archive.kernel_sources(&host.progress).await.unwrap();
    let found: Vec<_> =
        sources.iter().map(|source| (source.package.as_str(), source.version.as_str())).collect();
    assert_eq!(found, [("linux-source-6.12", "6.12.48"), ("linux-source-6.1", "6.1.153")]);

    let to = host.path().join("source.tar.xz");
    archive.fetch_kernel_source(&sources[0], &to, &host.progress).await.unwrap();
    assert_eq!(std::fs::read(&to).unwrap(), b"the source of 6.12.48-1");
    let left = std::fs::read_dir(host.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name != "etc" && name != "usr").collect();
    assert_eq!(left, ["source.tar.xz"], "nothing half-made is left");
}

#[tokio::test]
async fn a_package_without_its_source_is_refused() {
    let files: [(&str, &[u8]); 1] = [("./usr/src/x", b"x")];
    let empty = Package::new("linux-source-6.12", "6.12.48-1", &files, Compression::Xz);
    let host = Host::serving(&SuiteToBe::new(vec![empty]));
    let archive = host.open().await.unwrap();
    let sources = archive.kernel_sources(&host.progress).await.unwrap();
    let to = host.path().join("source.tar.xz");
    let error = archive.fetch_kernel_source(&sources[0], &to, &host.progress).await.unwrap_err();
    assert!(matches!(error, AssetError::Package { .. }), "{error}");
    assert!(!to.exists());
}
