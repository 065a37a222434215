//! What the host's processors can do: a saved VM goes on only where that is the same.

use std::collections::BTreeSet;
use std::io;

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use super::paths::CPUINFO;

/// A digest of the model and the features of the host's processors, in hexadecimal.
pub(crate) fn digest() -> io::Result<String> {
    Ok(of(&std::fs::read_to_string(CPUINFO)?))
}

fn of(text: &str) -> String {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
        line.unwrap_or_default().trim()
    };
    // On x86 they are called flags, on ARM features.
    let features: BTreeSet<&str> =
        ["flags", "Features"].iter().flat_map(|name| field(name).split(' ')).collect();
    let features: Vec<&str> = features.into_iter().collect();
    HEXLOWER.encode(&Sha256::digest(format!("{}\n{}", field("model name"), features.join(" "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_count_and_their_order_does_not() {
        let one = of("processor\t: 0\nmodel name\t: X\nflags\t\t: a b c\nbogomips\t: 1\n");
        assert_eq!(one, of("model name\t: X\ncpu MHz\t: 2\nflags\t\t: c a b\n"));
        assert_ne!(one, of("model name\t: X\nflags\t\t: a b\n"));
        assert_ne!(one, of("model name\t: Y\nflags\t\t: a b c\n"));
        assert_eq!(digest().unwrap(), digest().unwrap());
    }
}
