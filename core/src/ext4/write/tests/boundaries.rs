//! Everything that ends exactly where something else begins.

use super::*;

/// Names of 255 bytes: 15 of them in a block.
fn long_name(number: u32) -> Vec<u8> {
    format!("{number:0255}").into_bytes()
}

#[test]
fn directories_of_every_shape_are_found_by_name_when_mounted() {
    // Two short names and long ones: about one full block; about one full index block.
    for names in [1, 14, 15, 16, 507 * 15, 507 * 15 + 1, 60_000] {
        let mut trial = Trial::new(Size::AtLeast(0));
        for number in 0..names {
            trial.put(&[b"d/", &long_name(number)[..]].concat(), attributes(0o644), Body::Fifo);
        }
        let image = trial.finish(&drive(""));
        let said = image.debugfs("htree_dump /d");
        let levels = said.lines().find_map(|line| line.trim().strip_prefix("Indirect levels: "));
        let expected = if names < 16 {
            None
        } else if names <= 507 * 15 {
            Some("0")
        } else {
            Some("1")
        };
        assert_eq!(levels, expected, "{names}: {}", said.lines().take(12).collect::<String>());
        image.assert_mounted();
    }
}

#[test]
fn a_block_that_is_full_to_the_last_byte_is_one_block() {
    // `.`, `..` and the checksum leave 4,060 bytes.
    for (rest, blocks) in [(4_060, 1), (4_064, 2)] {
        let mut trial = Trial::new(Size::AtLeast(0));
        let (mut left, mut number) = (rest, 0);
        while left > 0 {
            let size = if left > 264 + 12 {
                264
            } else if left > 264 {
                left - 12
            } else {
                left
            };
            let name = format!("{number:0width$}", width = (size - 8).min(255)).into_bytes();
            trial.put(&[b"d/", &name[..]].concat(), attributes(0o644), Body::Fifo);
            left -= size;
            number += 1;
        }
        let image = trial.finish(&drive(""));
        let said = image.debugfs("stat /d");
        assert!(said.contains(&format!("Size: {}", blocks * BLOCK)), "{rest}: {said}");
    }
}

#[test]
fn names_of_one_hash_in_two_blocks_are_found_when_mounted() {
    let identity = [7; 32];
    let seed = [u32::from_le_bytes([7; 4]); 4];
    let mut by_hash: Vec<(u32, u32)> =
        (0..300_000).map(|number| (hash::hash(&seed, &long_name(number)).0, number)).collect();
    by_hash.sort_unstable();
    let twins: Vec<usize> = (1..by_hash.len()).filter(|at| by_hash[*at].0 == by_hash[*at - 1].0).collect();
    assert!(!twins.is_empty(), "300,000 names have as many different hashes");
    let mut split = 0;
    for second in twins.into_iter().take(5) {
        // Enough names before it that the first of both is the last of a block.
        let first = second - 1;
        if first < 14 {
            continue;
        }
        let mut trial = Trial::new(Size::AtLeast(0));
        for (_, number) in &by_hash[first - 14..(second + 20).min(by_hash.len())] {
            trial.put(&[b"d/", &long_name(*number)[..]].concat(), attributes(0o644), Body::Fifo);
        }
        let image = trial.finish(&Options { identity: Some(identity), ..drive("") });
        let said = image.debugfs("htree_dump /d");
        let continued = format!("0x{:08x}", by_hash[second].0 | 1);
        assert!(said.contains(&continued), "{continued} is not in {said}");
        image.assert_mounted();
        split += 1;
    }
    assert!(split > 0);
}

#[test]
fn files_of_any_number_of_runs_are_read_when_mounted() {
    let mut trial = Trial::new(Size::AtLeast(0));
    for runs in [1, 4, 5, 340, 341, 1_360, 1_361] {
        // Every second block is zeros.
        let mut bytes = vec![0; runs * 2 * BLOCK - BLOCK];
        for (at, block) in bytes.chunks_mut(2 * BLOCK).enumerate() {
            block[7..11].copy_from_slice(&(at as u32 + 1).to_le_bytes());
        }
        let node = trial.file(format!("runs-{runs}").as_bytes(), &bytes);
        assert_eq!(trial.runs(node), runs as u32);
    }
    trial.finish(&drive("")).assert_mounted();
}

#[test]
fn what_meets_the_head_of_a_group_goes_past_it_and_is_read_when_mounted() {
    // Groups 1 and 3 have a head, group 2 does not. Blocks of the directory and of the journal reach them too.
    for before in [1, 2, 3, 6, 7, 8, 40, 1_000, 4_100] {
        let mut trial = Trial::new(Size::AtLeast(0));
        trial.skip_to(GROUP - before);
        trial.file(b"first", &noise(1, 3 * BLOCK));
        trial.file(b"second", &noise(2, 2 * BLOCK + 1));
        for number in 0..40 {
            trial.put(&[b"d/", &long_name(number)[..]].concat(), attributes(0o644), Body::Fifo);
        }
        trial.finish(&drive("")).assert_mounted();
    }
    let mut trial = Trial::new(Size::AtLeast(0));
    trial.skip_to(2 * GROUP - 10);
    trial.file(b"over-a-plain-border", &noise(1, 20 * BLOCK));
    let long = noise(2, 5 << 20);
    trial.skip_to(3 * GROUP - 100);
    trial.file(b"over-a-head", &long);
    trial.finish(&drive("")).assert_mounted();
}

#[test]
fn last_groups_of_every_length_are_whole() {
    let block = BLOCK as u64;
    for groups in [1, 2, 3, 4] {
        for over in [0, 1, 63, 64, 65, 128, 129, 130, 192, 193, 200, 577, 578, 643, 700, 706, 707, 708] {
            let blocks = groups * GROUP + over;
            let at_least = Trial::new(Size::AtLeast(blocks * block)).finish(&drive("")).made.size / block;
            assert!(at_least >= blocks && at_least < blocks + 1_000, "{at_least} for {blocks}");
            let trial = Trial::new(Size::Exactly(blocks * block));
            let path = trial.writer.path().to_owned();
            let (_kept, made) = trial.finish_unchecked(&drive(""));
            check(&path);
            assert!(made.size / block <= blocks && made.size / block >= groups * GROUP, "{made:?}");
        }
    }
}

#[test]
fn as_many_inodes_as_there_are_names_are_there_when_mounted() {
    // In one group: the minimum, more than that, and the maximum; then more groups than the blocks need.
    for names in [8_000, 9_000, 30_000, 70_000] {
        let mut trial = Trial::new(Size::AtLeast(0));
        for number in 0..names {
            trial.put(format!("{}/{number}", number % 97).as_bytes(), attributes(0o600), Body::Fifo);
        }
        trial.finish(&drive("")).assert_mounted();
    }
}

#[test]
fn as_many_links_as_ext4_knows_are_counted_when_mounted() {
    let mut trial = Trial::new(Size::AtLeast(0));
    let one = trial.file(b"links/first", b"one");
    for number in 1..LINKS_MAX {
        trial.link(format!("links/{number}").as_bytes(), one);
    }
    for (name, count) in [("most", 64_998), ("more", 64_999)] {
        for number in 0..count {
            trial.directory(format!("{name}/{number}").as_bytes());
        }
    }
    trial.finish(&drive("")).assert_mounted();
}
