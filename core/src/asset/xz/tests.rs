//! Files of all kinds, valid and invalid, through both decoders.

use std::io::Write;
use std::ops::Range;

use xz2::stream::{Check, Filters, LzmaOptions};

use super::*;
use crate::os::mounted::Mounted;

/// The default block size of `xz -T` at level 6.
const DEFAULT_BLOCK: u64 = 24 << 20;

/// Bytes that compress to about half.
fn content(bytes: usize) -> Vec<u8> {
    let mut state: u32 = 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        b'a' + ((state >> 24) & 15) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// Bytes that compress fast, and differ everywhere.
fn light_content(bytes: usize) -> Vec<u8> {
    let mut all: Vec<u8> = content(4096).into_iter().cycle().take(bytes).collect();
    for (number, piece) in all.chunks_mut(4096).enumerate() {
        let number = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let length = piece.len().min(8);
        piece[..length].copy_from_slice(&number[..length]);
    }
    all
}

fn packed_by(bytes: &[u8], builder: &MtStreamBuilder) -> Vec<u8> {
    let mut writer = xz2::write::XzEncoder::new_stream(Vec::new(), builder.encoder().unwrap());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// Packed in blocks, as by `xz -T2 --block-size`.
fn in_blocks(bytes: &[u8], block: u64) -> Vec<u8> {
    let mut builder = MtStreamBuilder::new();
    packed_by(bytes, builder.threads(2).preset(1).block_size(block).check(Check::Crc64))
}

fn in_one(bytes: &[u8]) -> Vec<u8> {
    let mut writer = xz2::write::XzEncoder::new(Vec::new(), 1);
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

/// Decoded in memory.
fn in_memory(packed: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    Xz::new(io::BufReader::with_capacity(1000, packed))?.read_to_end(&mut out)?;
    Ok(out)
}

/// Decoded by threads with spools; blocks of at least `least` bytes in parallel.
fn by_blocks(packed: &[u8], least: u64, limit: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let inner = io::BufReader::with_capacity(1000, packed);
    Blocks::new(inner, std::env::temp_dir(), limit)?.with_least(least).read_to_end(&mut out)?;
    Ok(out)
}

/// Decoded in every way, always with the same result.
#[track_caller]
fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    let result = in_memory(packed);
    for (least, limit) in [(0, u64::MAX), (u64::MAX, u64::MAX), (40_000, u64::MAX), (0, 100_000)] {
        let other = by_blocks(packed, least, limit);
        match (&result, &other) {
            (Ok(bytes), Ok(others)) => assert!(bytes == others, "least {least}, limit {limit}"),
            (Err(_), Err(_)) => {}
            _ => panic!(
                "least {least}, limit {limit}: {:?} and {:?}",
                result.map(|bytes| bytes.len()),
                other.map(|bytes| bytes.len())
            ),
        }
    }
    result
}

/// The positions of the headers of a stream's blocks; all of them state their sizes.
fn headers(packed: &[u8]) -> Vec<Range<usize>> {
    let head = format::Head(packed[..12].try_into().unwrap());
    let (mut at, mut found) = (12, Vec::new());
    while packed[at] != 0 {
        let header = format::BlockHeader::read(packed[at], &mut &packed[at + 1..]).unwrap();
        found.push(at..at + header.bytes.len());
        let behind = format::behind_header(header.sizes.unwrap().0, head.check_bytes());
        at += header.bytes.len() + usize::try_from(behind).unwrap();
    }
    found
}

fn as_number(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// Replaces a header by one of the same length, with these sizes or none.
fn with_sizes(packed: &mut [u8], header: &Range<usize>, sizes: Option<(u64, u64)>) {
    let dictionary = {
        let old = &packed[header.clone()];
        let at = old.windows(2).position(|two| two == [0x21, 1]).unwrap();
        old[at..at + 3].to_vec()
    };
    let length = header.len();
    let mut fields = vec![packed[header.start], if sizes.is_some() { 0xc0 } else { 0 }];
    if let Some((packed, unpacked)) = sizes {
        fields.extend(as_number(packed));
        fields.extend(as_number(unpacked));
    }
    fields.extend(dictionary);
    assert!(fields.len() + 4 <= length, "it fits");
    fields.resize(length - 4, 0);
    let mut checksum = flate2::Crc::new();
    checksum.update(&fields);
    fields.extend(checksum.sum().to_le_bytes());
    packed[header.clone()].copy_from_slice(&fields);
}

fn sizes_of(packed: &[u8], header: &Range<usize>) -> (u64, u64) {
    format::BlockHeader::read(packed[header.start], &mut &packed[header.start + 1..]).unwrap().sizes.unwrap()
}

#[test]
fn blocks_and_streams_come_out_in_order() {
    let bytes = content(600_000);
    for block in [16 << 10, 200 << 10, 8 << 20] {
        assert!(unpack(&in_blocks(&bytes, block)).unwrap() == bytes, "blocks of {block}");
    }
    assert!(unpack(&in_one(&bytes)).unwrap() == bytes);
    assert_eq!(unpack(&in_one(b"")).unwrap(), b"");
    let several =
        [&in_one(b"one")[..], &in_blocks(b"two", 4096), &[0; 8], &in_one(b"three"), &[0; 4]].concat();
    assert_eq!(unpack(&several).unwrap(), b"onetwothree");
}

#[test]
fn every_check_and_filter_is_understood() {
    let bytes = content(100_000);
    for check in [Check::None, Check::Crc32, Check::Crc64, Check::Sha256] {
        let mut filters = Filters::new();
        filters.x86().lzma2(&LzmaOptions::new_preset(1).unwrap());
        let mut builder = MtStreamBuilder::new();
        builder.threads(2).filters(filters).block_size(30_000).check(check);
        let packed = packed_by(&bytes, &builder);
        assert_eq!(headers(&packed).len(), 4);
        assert!(unpack(&packed).unwrap() == bytes, "{check:?}");
        if !matches!(check, Check::None) {
            // The last byte of the second block's check field.
            let mut damaged = packed;
            let third = headers(&damaged)[2].start;
            damaged[third - 1] ^= 1;
            assert!(unpack(&damaged).is_err(), "{check:?}");
        }
    }
}

#[test]
fn what_is_cut_off_or_has_something_behind_it_is_refused() {
    for packed in [in_blocks(&content(300_000), 64 << 10), in_one(&content(300_000))] {
        for cut in [0, 1, 11, 12, 100, packed.len() / 2, packed.len() - 13, packed.len() - 1] {
            assert!(unpack(&packed[..cut]).is_err(), "{cut} of {}", packed.len());
        }
        for behind in [&[0u8, 0][..], b"behind", &[0, 0, 0, 0, 7]] {
            assert!(unpack(&[&packed[..], behind].concat()).is_err(), "{behind:?}");
        }
        let mut damaged = packed;
        let at = damaged.len() / 2;
        damaged[at] ^= 4;
        assert!(unpack(&damaged).is_err());
    }
}

#[test]
fn a_bit_that_is_turned_is_found_wherever_it_is() {
    let packed = in_blocks(&content(1200), 500);
    assert_eq!(headers(&packed).len(), 3);
    let mut refused = 0;
    for at in 0..packed.len() {
        for bit in [1, 0x80] {
            let mut damaged = packed.clone();
            damaged[at] ^= bit;
            refused += usize::from(unpack(&damaged).is_err());
        }
    }
    assert!(refused * 100 > packed.len() * 2 * 99, "{refused} of {}", packed.len() * 2);
}

#[test]
fn more_memory_than_is_allowed_is_refused() {
    let mut packed = in_one(b"small");
    // The header of its block: size, flags, the filter with its dictionary's size, padding, checksum.
    assert_eq!(packed[12..16], [2, 0, 0x21, 1]);
    // 4 GiB.
    packed[16] = 40;
    let mut checksum = flate2::Crc::new();
    checksum.update(&packed[12..20]);
    packed[20..24].copy_from_slice(&checksum.sum().to_le_bytes());
    let error = unpack(&packed).unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
    let error = by_blocks(&packed, 0, u64::MAX).unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
}

#[test]
fn headers_may_lack_sizes() {
    let bytes = content(300_000);
    let packed = in_blocks(&bytes, 64 << 10);
    let all = headers(&packed);
    assert_eq!(all.len(), 5);
    for without in [&[0][..], &[1], &[4], &[0, 1, 2, 3, 4], &[1, 3]] {
        let mut packed = packed.clone();
        for at in without {
            with_sizes(&mut packed, &all[*at], None);
        }
        assert!(unpack(&packed).unwrap() == bytes, "{without:?}");
    }
}

#[test]
fn sizes_that_are_not_true_are_refused() {
    let bytes = content(300_000);
    let good = in_blocks(&bytes, 64 << 10);
    for number in [0, 1, 4] {
        let header = &headers(&good)[number];
        let (packed, unpacked) = sizes_of(&good, header);
        for lie in [
            (packed, unpacked - 1),
            (packed, unpacked + 1),
            (packed - 1, unpacked),
            (packed + 1, unpacked),
            (packed - 4, unpacked),
            (packed + 4, unpacked),
            (1, unpacked),
            (packed, 1),
            (packed, 2_000_000),
            (2_000_000, unpacked),
        ] {
            let mut lying = good.clone();
            with_sizes(&mut lying, header, Some(lie));
            let error = unpack(&lying).unwrap_err();
            assert_eq!(error.to_string(), in_memory(&lying).unwrap_err().to_string());
        }
    }
    // A long block that claims twice its length.
    let mut lying = in_blocks(&light_content(1 << 20), 1 << 19);
    let header = headers(&lying)[0].clone();
    let sizes = sizes_of(&lying, &header);
    with_sizes(&mut lying, &header, Some((sizes.0, 1 << 20)));
    let error = by_blocks(&lying, 0, u64::MAX).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
}

#[test]
fn blocks_of_the_default_size_are_decoded_side_by_side() {
    let bytes = light_content(60 << 20);
    // As `xz -6 -T2` does.
    let packed = packed_by(&bytes, MtStreamBuilder::new().threads(2).preset(6).check(Check::Crc64));
    let all = headers(&packed);
    assert_eq!(sizes_of(&packed, &all[0]).1, DEFAULT_BLOCK);
    let read = |packed: &[u8]| -> io::Result<(usize, Vec<u8>)> {
        let inner = io::BufReader::with_capacity(64 << 10, packed);
        let mut reader = Blocks::new(inner, std::env::temp_dir(), u64::MAX)?.with_least(1 << 20);
        let mut out = vec![0; 1];
        reader.read_exact(&mut out)?;
        let under_way = reader.under_way();
        reader.read_to_end(&mut out)?;
        Ok((under_way, out))
    };
    let (under_way, out) = read(&packed).unwrap();
    assert!(out == bytes);
    assert!(under_way >= 2, "{under_way}");

    // Damage in the second block: in its data, and in its check field.
    for at in [all[1].end + 5000, all[2].start - 3] {
        let mut damaged = packed.clone();
        damaged[at] ^= 0x10;
        let error = read(&damaged).unwrap_err();
        assert_eq!(error.to_string(), in_memory(&damaged).unwrap_err().to_string());
    }
    let (small, large) = sizes_of(&packed, &all[1]);
    for lie in [(small, large - 4096), (small, large + 4096), (small - 4, large), (small + 4, large)] {
        let mut lying = packed.clone();
        with_sizes(&mut lying, &all[1], Some(lie));
        let error = read(&lying).unwrap_err();
        assert_eq!(error.to_string(), in_memory(&lying).unwrap_err().to_string(), "{lie:?}");
    }
    // Dropping the reader early does not wait.
    let inner = io::BufReader::new(&packed[..]);
    let mut reader = Blocks::new(inner, std::env::temp_dir(), u64::MAX).unwrap();
    reader.read_exact(&mut [0; 10]).unwrap();
    drop(reader);
}

#[test]
fn no_more_is_ahead_than_may_come_out() {
    let bytes = vec![7; 3 << 20];
    let packed = in_blocks(&bytes, 1 << 20);
    for (limit, most) in [(0, 0), ((1 << 20) - 1, 0), (1 << 20, 1), (5 << 19, 2)] {
        let inner = io::BufReader::new(&packed[..]);
        let mut reader = Blocks::new(inner, std::env::temp_dir(), limit).unwrap().with_least(0);
        let mut out = vec![0; 1];
        reader.read_exact(&mut out).unwrap();
        assert_eq!(reader.under_way(), most, "{limit}");
        reader.read_to_end(&mut out).unwrap();
        assert!(out == bytes);
    }
}

#[test]
fn a_full_disk_is_no_damage() {
    let disk = Mounted::fresh("ext4", 10);
    let packed = in_blocks(&light_content(40 << 20), 8 << 20);
    let inner = io::BufReader::new(&packed[..]);
    let mut reader = Blocks::new(inner, disk.path().to_owned(), u64::MAX).unwrap().with_least(0);
    let error = reader.read_to_end(&mut Vec::new()).unwrap_err();
    let cause = Unkept::in_error(&error).unwrap();
    assert_eq!(cause.kind(), io::ErrorKind::StorageFull, "{error}");
    drop(reader);
    let left =
        std::fs::read_dir(disk.path()).unwrap().filter(|e| e.as_ref().unwrap().file_name() != "lost+found");
    assert_eq!(left.count(), 0);
}

proptest::proptest! {
    #[test]
    fn any_bytes_behind_a_stream_header_are_decoded_or_refused(bytes: Vec<u8>, blocks in 0..3_usize) {
        let good = in_blocks(&content(blocks * 700), 700);
        let start = if blocks == 0 { 12 } else { good.len() - 60 };
        let _ = unpack(&[&good[..start], &bytes].concat());
    }

    #[test]
    fn changed_files_are_the_same_to_both(at in 0..2000_usize, change in 1..=255_u8, cut in 0..4000_usize) {
        let mut packed = in_blocks(&content(2500), 900);
        let at = at % packed.len();
        packed[at] ^= change;
        packed.truncate(cut.max(at + 1));
        let _ = unpack(&packed);
    }
}
