//! Random trees.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::*;

fn name(random: &mut StdRng) -> Vec<u8> {
    let longest = *[3, 12, 40, 255].choose(random).unwrap();
    let mut name: Vec<u8> = (0..random.gen_range(1..=longest)).map(|_| random.r#gen()).collect();
    name.iter_mut().filter(|byte| matches!(**byte, 0 | b'/' | b'.')).for_each(|byte| *byte = b'_');
    name
}

fn any_attributes(random: &mut StdRng, body: &Body) -> Attributes {
    let mut xattrs = BTreeMap::new();
    for _ in 0..[0, 0, 0, 1, 3].choose(random).copied().unwrap() {
        let prefix = *["user.", "trusted.", "security."].choose(random).unwrap();
        let name = format!("{prefix}{}", random.gen_range(0..1_000_000));
        if xattr::is_kept(body, name.as_bytes()) {
            let length = *[0, 1, 20, 60, 900].choose(random).unwrap();
            xattrs.insert(name.into_bytes(), noise(random.r#gen(), length));
        }
    }
    Attributes {
        mode: random.gen_range(0..0o10000),
        uid: if random.r#gen() { 0 } else { random.gen_range(0..u32::MAX) },
        gid: random.gen_range(0..u32::MAX),
        mtime: random.gen_range(-(1 << 31)..(3_i64 << 32)),
        mtime_ns: random.gen_range(0..1_000_000_000),
        xattrs: xattrs.into(),
    }
}

fn content(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.gen_range(0..12) {
        match random.gen_range(0..3) {
            0 => bytes.extend(vec![0; random.gen_range(1..40_000)]),
            _ => bytes.extend(noise(random.r#gen(), *[1, 4_096, 5_000, 70_000].choose(random).unwrap())),
        }
    }
    bytes
}

/// A tree of some hundred nodes; some are replaced, some have several names.
fn grow(random: &mut StdRng, trial: &mut Trial) {
    let mut directories: Vec<Vec<u8>> = vec![Vec::new()];
    let mut files: Vec<(Vec<u8>, NodeId)> = Vec::new();
    for _ in 0..*[3, 60, 900].choose(random).unwrap() {
        let path = [directories.choose(random).unwrap(), &b"/"[..], &name(random)].concat();
        if path.len() > 3_000 {
            continue;
        }
        let body = match random.gen_range(0..12) {
            0..=2 => Body::directory(),
            3 => Body::Symlink(name(random).into()),
            4 => Body::Symlink(vec![b'x'; random.gen_range(1..4_096)].into()),
            5 => Body::Device {
                block: random.r#gen(),
                major: random.gen_range(0..4_096),
                minor: random.gen_range(0..1 << 20),
            },
            6 => {
                if random.r#gen() {
                    Body::Fifo
                } else {
                    Body::Socket
                }
            }
            7 if !files.is_empty() => {
                let (_, node) = files.choose(random).unwrap();
                trial.remove(&path);
                if trial.has_name(*node) {
                    trial.link(&path, *node);
                }
                continue;
            }
            _ => {
                let bytes = content(random);
                let node = trial.file(&path, &bytes);
                let attributes = any_attributes(random, &Body::File(Content::default()));
                trial.describe(node, attributes);
                files.push((path, node));
                continue;
            }
        };
        let attributes = any_attributes(random, &body);
        let is_directory = matches!(body, Body::Directory(_));
        trial.put(&path, attributes, body);
        directories.retain(|other| !other.starts_with(&path));
        if is_directory {
            directories.push(path);
        }
    }
    if let Some((path, _)) = files.choose(random).filter(|_| random.r#gen()) {
        trial.remove(path);
    }
}

#[test]
fn random_trees_are_what_they_were_when_mounted() {
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let size = *[0, 30 << 20, 200 << 20, 5 << 30, 70 << 30].choose(&mut random).unwrap();
        let mut trial = Trial::new(Size::AtLeast(size));
        trial.skip_to(*[0, 32_700, 98_000, 200_000].choose(&mut random).unwrap());
        grow(&mut random, &mut trial);
        let purpose = if random.gen_bool(0.2) { Purpose::ReadOnly } else { Purpose::Drive };
        println!("seed {seed}");
        trial.finish(&Options { purpose, ..drive("random") }).assert_mounted();
    }
}
