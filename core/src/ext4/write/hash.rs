//! The hash for names in large directories: half of MD4, over signed characters.
//!
//! Source: `ext4fs_dirhash`, `str2hashbuf_signed` and `half_md4_transform` of linux/fs/ext4/hash.c and linux/lib.

/// Its number in the superblock and in directories (`DX_HASH_HALF_MD4`).
pub(super) const VERSION: u8 = 1;

/// The value that would mean the end of a directory.
const END: u32 = 0xffff_fffe;

/// The hash of a name and its minor hash, with the filesystem's seed.
pub(super) fn hash(seed: &[u32; 4], name: &[u8]) -> (u32, u32) {
    let mut state = *seed;
    let mut rest = name;
    loop {
        transform(&mut state, &words(rest));
        if rest.len() <= 32 {
            break;
        }
        rest = &rest[32..];
    }
    // The lowest bit is not part of the hash: in an index it means that names with this hash begin in the
    // previous block.
    let hash = state[1] & !1;
    (if hash == END { END - 2 } else { hash }, state[2])
}

/// The next 32 bytes of a name as words, padded with the length that was left.
fn words(rest: &[u8]) -> [u32; 8] {
    let left = rest.len() as u32;
    let fill = left | left << 8;
    let fill = fill | fill << 16;
    let mut words = [fill; 8];
    for (word, bytes) in words.iter_mut().zip(rest[..rest.len().min(32)].chunks(4)) {
        let signed = |byte: &u8| i32::from(byte.cast_signed()).cast_unsigned();
        *word = bytes.iter().fold(fill, |word, byte| signed(byte).wrapping_add(word << 8));
    }
    words
}

fn transform(state: &mut [u32; 4], words: &[u32; 8]) {
    const SECOND: u32 = 0x5a82_7999;
    const THIRD: u32 = 0x6ed9_eba1;
    let choose = |x: u32, y: u32, z: u32| z ^ (x & (y ^ z));
    let majority = |x: u32, y: u32, z: u32| (x & y).wrapping_add((x ^ y) & z);
    let parity = |x: u32, y: u32, z: u32| x ^ y ^ z;
    let [mut a, mut b, mut c, mut d] = *state;
    let mut round = |of: fn(u32, u32, u32) -> u32, add: u32, order: [usize; 8], shifts: [u32; 4]| {
        for (step, word) in order.into_iter().enumerate() {
            let sum = a.wrapping_add(of(b, c, d)).wrapping_add(words[word]).wrapping_add(add);
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    };
    round(choose, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]);
    round(majority, SECOND, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]);
    round(parity, THIRD, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]);
    for (word, more) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(more);
    }
}
