//! The keys that detach from a command: typed in sequence, they are not passed on.

/// Those of docker.
const DEFAULT: &str = "ctrl-p,ctrl-q";

/// Looks for the keys in the input.
#[derive(Debug, Clone)]
pub(crate) struct DetachKeys {
    keys: Vec<u8>,
    /// How many of them were just typed; these are held back.
    typed: usize,
}

impl Default for DetachKeys {
    fn default() -> Self {
        Self { keys: vec![0x10, 0x11], typed: 0 }
    }
}

impl DetachKeys {
    /// The part of `bytes` to pass on, and whether the keys were typed; anything after them is dropped.
    pub(crate) fn pass(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if self.keys.get(self.typed) == Some(byte) {
                self.typed += 1;
                if self.typed == self.keys.len() {
                    self.typed = 0;
                    return (passed, true);
                }
                continue;
            }
            passed.extend_from_slice(&self.keys[..std::mem::take(&mut self.typed)]);
            if self.keys.first() == Some(byte) {
                self.typed = 1;
            } else {
                passed.push(*byte);
            }
        }
        (passed, false)
    }
}

/// Parses keys such as `ctrl-p,ctrl-q`; an empty text means none.
pub(crate) fn detach_keys(text: &str) -> Result<DetachKeys, String> {
    let key = |word: &str| match (word.strip_prefix("ctrl-"), word.as_bytes()) {
        (None, [byte]) if byte.is_ascii_graphic() => Ok(*byte),
        (Some(letter), _) => match letter.as_bytes() {
            [byte @ (b'a'..=b'z' | b'A'..=b'Z' | b'@' | b'[' | b'\\' | b']' | b'^' | b'_')] => {
                Ok(byte & 0x1f)
            }
            _ => Err(format!("`{word}` is not a valid key: give one such as {DEFAULT}")),
        },
        (None, _) => Err(format!("`{word}` is not a valid key: give letters, or ones such as {DEFAULT}")),
    };
    let keys: Result<Vec<u8>, String> = text.split(',').filter(|word| !word.is_empty()).map(key).collect();
    Ok(DetachKeys { keys: keys?, typed: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(keys: &mut DetachKeys, text: &str) -> (String, bool) {
        let (passed, detached) = keys.pass(text.as_bytes());
        (String::from_utf8(passed).unwrap(), detached)
    }

    #[test]
    fn keys_are_found_wherever_they_are_cut() {
        let mut keys = DetachKeys::default();
        assert_eq!(pass(&mut keys, "abc\x10"), ("abc".into(), false));
        assert_eq!(pass(&mut keys, "d"), ("\x10d".into(), false));
        assert_eq!(pass(&mut keys, "\x10\x10"), ("\x10".into(), false));
        assert_eq!(pass(&mut keys, "\x11rest"), (String::new(), true));
        assert_eq!(pass(&mut keys, "x\x10\x11y"), ("x".into(), true));
    }

    #[test]
    fn keys_are_given_by_their_names() {
        assert_eq!(detach_keys(DEFAULT).unwrap().keys, DetachKeys::default().keys);
        assert_eq!(detach_keys("ctrl-@,a,ctrl-],Z").unwrap().keys, [0, b'a', 29, b'Z']);
        let mut none = detach_keys("").unwrap();
        assert_eq!(pass(&mut none, "\x10\x11"), ("\x10\x11".into(), false));
        for bad in ["ctrl-", "ctrl-1", "ab", "ctrl-ab", "ä", "alt-x"] {
            assert!(detach_keys(bad).is_err(), "{bad}");
        }
    }
}
