//! Versions of VMMs.

use std::fmt;

/// A version: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// Finds the first version in a text such as `QEMU emulator version 7.2.22 (Debian ..)` or `Firecracker v1.16.1`.
    pub(crate) fn find(text: &str) -> Option<Self> {
        text.split(|c: char| c.is_whitespace() || c == '(').find_map(|word| {
            let word = word.strip_prefix('v').unwrap_or(word);
            let mut numbers = word.split('.').map(|part| {
                let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
                part[..digits].parse().ok()
            });
            let (major, minor) = (numbers.next()??, numbers.next()??);
            Some(Self(major, minor, numbers.next().flatten().unwrap_or(0)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let qemu = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022";
        assert_eq!(Version::find(qemu), Some(Version(7, 2, 22)));
        assert_eq!(Version::find("Firecracker v1.16.1\n\nSupported snapshot"), Some(Version(1, 16, 1)));
        assert_eq!(Version::find("QEMU emulator version 10.0"), Some(Version(10, 0, 0)));
        assert_eq!(Version::find("Firecracker v1.17.0-dev"), Some(Version(1, 17, 0)));
        assert_eq!(Version::find("no version here. At all"), None);
        assert!(Version(1, 9, 0) < Version(1, 16, 1));
    }
}
