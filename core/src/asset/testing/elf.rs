//! Files that resemble kernels and modules.

use std::io::Write;

use nexus_schema::Arch;

use crate::asset::stream::Compression;

/// An ELF file of this architecture that loads itself, with `body` after its headers.
pub(crate) fn elf_kernel(body: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; 64 + 56];
    elf[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
    elf[0x10..0x12].copy_from_slice(&2u16.to_le_bytes());
    elf[0x12..0x14].copy_from_slice(&Arch::HOST.elf_machine().to_le_bytes());
    elf[0x20..0x28].copy_from_slice(&64u64.to_le_bytes());
    elf[0x36..0x38].copy_from_slice(&56u16.to_le_bytes());
    elf[0x38..0x3a].copy_from_slice(&1u16.to_le_bytes());
    elf[64..68].copy_from_slice(&1u32.to_le_bytes());
    let length = (elf.len() + body.len()) as u64;
    elf[64 + 32..64 + 40].copy_from_slice(&length.to_le_bytes());
    elf.extend_from_slice(body);
    elf
}

/// An image of arm64 with `body` after its header.
pub(crate) fn arm64_image(body: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[56..60].copy_from_slice(b"ARM\x64");
    image[16..24].copy_from_slice(&(64 + body.len() as u64).to_le_bytes());
    image.extend_from_slice(body);
    image
}

/// A module whose `.modinfo` has these entries.
pub(crate) fn module(entries: &[&str]) -> Vec<u8> {
    let names = b"\0.shstrtab\0.modinfo\0";
    let info: Vec<u8> = entries.iter().flat_map(|e| e.bytes().chain([0])).collect();
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
    elf.extend_from_slice(names);
    elf.extend_from_slice(&info);
    let table = elf.len() as u64;
    elf[0x28..0x30].copy_from_slice(&table.to_le_bytes());
    elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
    elf[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
    elf[0x3e..0x40].copy_from_slice(&1u16.to_le_bytes());
    let sections = [(0u32, 0, 0), (1, 64, names.len()), (11, 64 + names.len(), info.len())];
    for (name, offset, length) in sections {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
        elf.extend_from_slice(&header);
    }
    elf
}

/// LZ4's legacy format.
pub(crate) fn lz4_legacy(blocks: &[&[u8]]) -> Vec<u8> {
    let mut out = 0x184c_2102u32.to_le_bytes().to_vec();
    for block in blocks {
        let packed = lz4_flex::block::compress(block);
        out.extend_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        out.extend_from_slice(&packed);
    }
    out
}

/// Compresses.
pub(crate) fn pack(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::Plain => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Xz => {
            let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        Compression::Lz4Legacy => lz4_legacy(&[bytes]),
    }
}

/// An .xz file with blocks of the given size, as `xz -T2 --block-size` makes it.
pub(crate) fn pack_in_blocks(bytes: &[u8], block: u64) -> Vec<u8> {
    let mut builder = xz2::stream::MtStreamBuilder::new();
    builder.threads(2).preset(0).block_size(block).check(xz2::stream::Check::Crc64);
    let stream = builder.encoder().unwrap();
    let mut encoder = xz2::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A bzImage with this payload, compressed, and with this version in its header.
pub(crate) fn bz_image(unpacked: &[u8], compression: Compression, version: &str) -> Vec<u8> {
    let mut payload = pack(unpacked, compression);
    if compression != Compression::Gzip && compression != Compression::Plain {
        payload.extend_from_slice(&u32::try_from(unpacked.len()).unwrap().to_le_bytes());
    }
    let sectors = 4;
    let offset = 32;
    let mut image = vec![0; (sectors + 1) * 512 + offset];
    image[0x1f1] = u8::try_from(sectors).unwrap();
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x300u16.to_le_bytes());
    let text = format!("{version} (someone@somewhere) #1 SMP\0");
    image[0x500..0x500 + text.len()].copy_from_slice(text.as_bytes());
    image[0x248..0x24c].copy_from_slice(&u32::try_from(offset).unwrap().to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    image.extend_from_slice(&payload);
    image
}
