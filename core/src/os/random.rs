//! Random bytes from the kernel, and secrets made from them.

/// Fills `bytes` with cryptographically secure random bytes.
///
/// # Panics
/// If the kernel cannot provide randomness, because nothing can work without it.
pub fn fill(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("getrandom: {error}"),
        }
    }
}

/// A secret of 32 random bytes, in hexadecimal.
pub fn token() -> String {
    let mut bytes = [0; 32];
    fill(&mut bytes);
    data_encoding::HEXLOWER.encode(&bytes)
}

/// Whether two secrets are equal. The time it takes reveals only their lengths.
pub fn same_secret(given: &[u8], right: &[u8]) -> bool {
    given.len() == right.len() && given.iter().zip(right).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}
