//! The two ends of a copy, as given on the command line.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nexus_schema::Reference;
use nexus_schema::id::VmKind;

use crate::ctl::error::Error;

/// One end of a copy.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    /// In a VM.
    Vm(InVm),
    /// On this host.
    Here(PathBuf),
    /// A tar stream on standard input or output.
    Pipe,
}

/// A path in a VM.
#[derive(Debug, PartialEq)]
pub(super) struct InVm {
    pub(super) vm: Reference<VmKind>,
    /// Absolute, without `.` and `..`; a trailing slash or `/.` is kept.
    pub(super) path: String,
    /// Its last component; none for `/`.
    pub(super) name: Option<String>,
}

impl InVm {
    /// Whether it means the contents of the directory instead of the directory.
    pub(super) fn is_contents(&self) -> bool {
        self.path.ends_with("/.") || self.name.is_none()
    }
}

/// Whether a local path means the contents of a directory instead of the directory.
pub(super) fn is_contents(path: &OsStr) -> bool {
    let bytes = path.as_bytes();
    bytes == b"." || bytes.ends_with(b"/.") || bytes.iter().all(|byte| *byte == b'/')
}

/// Parses an end as docker does: `VM:PATH`, unless there is no colon or it begins with `/` or `.`.
pub(super) fn end(word: &OsStr) -> Result<End, Error> {
    let bytes = word.as_bytes();
    if bytes.is_empty() {
        return Err(Error::usage("the path is empty"));
    }
    if bytes == b"-" {
        return Ok(End::Pipe);
    }
    let colon = bytes.iter().position(|byte| *byte == b':');
    let Some(colon) = colon.filter(|_| !matches!(bytes[0], b'/' | b'.')) else {
        return Ok(End::Here(word.into()));
    };
    let (vm, path) = (&bytes[..colon], &bytes[colon + 1..]);
    let named = String::from_utf8_lossy(vm).into_owned();
    let vm = std::str::from_utf8(vm).ok().and_then(|vm| vm.parse().ok()).ok_or_else(|| Error::Usage {
        message: format!("`{}` is not a valid VM name", super::format::tame(&named)),
        hint: Some("for a local path with a colon in it, use ./PATH".into()),
    })?;
    let path = std::str::from_utf8(path).map_err(|_| Error::Usage {
        message: format!("the path in {named} is not UTF-8"),
        hint: Some(format!(
            "copy its parent directory instead, whose files may have any names: {named}:/DIR/."
        )),
    })?;
    if !path.starts_with('/') {
        return Err(Error::Usage {
            message: format!("`{}` is not an absolute path in {named}", super::format::tame(path)),
            hint: Some(format!("give an absolute path: {named}:/{}", super::format::tame(path))),
        });
    }
    let (path, name) = cleaned(path);
    Ok(End::Vm(InVm { vm, path, name }))
}

/// Removes empty components, `.` and `..` from a path, textually; an ending that marks a directory stays.
fn cleaned(path: &str) -> (String, Option<String>) {
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    let end = match () {
        () if names.is_empty() => "",
        () if path.ends_with("/.") => "/.",
        () if path.ends_with('/') => "/",
        () => "",
    };
    (format!("/{}{end}", names.join("/")), names.last().map(|name| (*name).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(word: &[u8]) -> Result<End, String> {
        end(OsStr::from_bytes(word))
            .map_err(|error| format!("{} | {}", error.message(), error.hint().unwrap_or_default()))
    }

    #[test]
    fn ends_are_read_as_docker_reads_them() {
        for here in ["file", "a/b:c/../d", "./web:/x", "../x:y", "/web:/x", ".", "/"] {
            let here = if here == "a/b:c/../d" { "./a/b:c/../d" } else { here };
            assert_eq!(of(here.as_bytes()), Ok(End::Here(here.into())));
        }
        assert_eq!(of(b"-"), Ok(End::Pipe));
        for (word, path, name, is_contents) in [
            ("web:/srv/x", "/srv/x", Some("x"), false),
            ("web:/srv//a/./b/", "/srv/a/b/", Some("b"), false),
            ("web:/srv/a/../b/.", "/srv/b/.", Some("b"), true),
            ("web:/../..", "/", None, true),
            ("web:/", "/", None, true),
            ("web:/a:b", "/a:b", Some("a:b"), false),
        ] {
            let Ok(End::Vm(found)) = of(word.as_bytes()) else { panic!("{word}") };
            assert_eq!((&*found.path, found.name.as_deref()), (path, name), "{word}");
            assert_eq!((found.vm.to_string().as_str(), found.is_contents()), ("web", is_contents), "{word}");
        }
        for (word, words) in [
            (&b""[..], "the path is empty"),
            (b":/x", "not a valid VM name"),
            (b"Not_One:/x", "./PATH"),
            (b"web:", "not an absolute path"),
            (b"web:srv/x", "web:/srv/x"),
            (b"web:/\xff", "not UTF-8"),
        ] {
            let error = of(word).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
        for (path, expected) in
            [(".", true), ("a/.", true), ("/", true), ("..", false), ("a/", false), (".a", false)]
        {
            assert_eq!(is_contents(OsStr::new(path)), expected, "{path}");
        }
    }
}
