//! Random bytes from the kernel, and secrets made of them.

/// Fills `bytes` with random bytes that are fit for secrets.
///
/// # Panics
/// If the kernel has no randomness to give: nothing sensible can be done without it.
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

/// Whether two secrets are the same. How long it takes tells nothing but their lengths.
pub fn same_secret(given: &[u8], right: &[u8]) -> bool {
    given.len() == right.len() && given.iter().zip(right).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}
