//! The files that a program needs to run. The dynamic loader lists its libraries.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{JailError, file};
use crate::os::confine::program::interpreter;
use crate::os::paths::LOADER_CACHE;
use crate::vmm::process::ask;

/// Timeout of the loader.
const ANSWER: Duration = Duration::from_secs(10);

/// Returns the loader of a program, its libraries and the loader's own files. A statically linked program needs none; a script needs its
/// interpreter and the files that the interpreter needs.
pub(super) fn needs(program: &Path) -> Result<Vec<PathBuf>, JailError> {
    let Some(loader) = interpreter(program).map_err(file("read", program))? else { return Ok(Vec::new()) };
    if is_script(program).map_err(file("read", program))? {
        let mut paths = needs(&loader)?;
        paths.push(loader);
        return Ok(paths);
    }
    let failed = |why: String| JailError::Libraries { program: program.to_owned(), why };
    let listed = ask(&loader, &["--list", &program.to_string_lossy()], ANSWER);
    let listed = listed.map_err(|error| failed(error.to_string()))?;
    if !listed.status.success() {
        return Err(failed(listed.text.trim().to_owned()));
    }
    let mut paths = vec![loader, PathBuf::from(LOADER_CACHE)];
    paths.extend(parse(&listed.text));
    Ok(paths)
}

fn is_script(program: &Path) -> io::Result<bool> {
    let mut start = [0; 2];
    File::open(program)?.read_exact(&mut start)?;
    Ok(start == *b"#!")
}

/// Returns the paths in the output of `ld.so --list`: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f…)`.
fn parse(text: &str) -> impl Iterator<Item = PathBuf> {
    text.lines().filter_map(|line| {
        let path = line.split_once(" => ").map_or(line, |(_, path)| path).trim();
        let path = path.rsplit_once(" (0x").map_or(path, |(path, _)| path);
        path.starts_with('/').then(|| path.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_tells_the_libraries() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd1)\n\tlibc.so.6 => /lib/a b/libc.so.6 (0x00007f0)\n\t/lib64/ld.so (0x0)\n";
        assert_eq!(
            parse(text).collect::<Vec<_>>(),
            [Path::new("/lib/a b/libc.so.6"), Path::new("/lib64/ld.so")]
        );
        let found = needs(Path::new("/bin/sh")).unwrap();
        assert!(found.iter().any(|path| path.to_string_lossy().contains("libc.so")), "{found:?}");
        assert!(found.iter().all(|path| path.is_absolute()), "{found:?}");
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "#!/bin/sh\n").unwrap();
        let of_script = needs(script.path()).unwrap();
        assert!(of_script.contains(&PathBuf::from("/bin/sh")), "{of_script:?}");
        assert!(found.iter().all(|path| of_script.contains(path)), "{of_script:?}");
    }
}
