//! Bytes that both ends of a test connection know: a table that repeats with a period no buffer size divides.

/// The period of the pattern, in bytes: a prime.
pub const PERIOD: usize = 262_147;

/// The pattern's first [`PERIOD`] bytes.
pub fn pattern() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..PERIOD).map(|_| next()).collect()
}

/// Whether `bytes` are the pattern from `offset` on.
pub fn matches(pattern: &[u8], offset: usize, mut bytes: &[u8]) -> bool {
    let mut at = offset % PERIOD;
    while !bytes.is_empty() {
        let count = bytes.len().min(PERIOD - at);
        if bytes[..count] != pattern[at..at + count] {
            return false;
        }
        (bytes, at) = (&bytes[count..], (at + count) % PERIOD);
    }
    true
}

/// Fills `bytes` with the pattern from `offset` on.
pub fn fill(pattern: &[u8], offset: usize, bytes: &mut [u8]) {
    let (mut at, mut done) = (offset % PERIOD, 0);
    while done < bytes.len() {
        let count = (bytes.len() - done).min(PERIOD - at);
        bytes[done..done + count].copy_from_slice(&pattern[at..at + count]);
        (done, at) = (done + count, (at + count) % PERIOD);
    }
}
