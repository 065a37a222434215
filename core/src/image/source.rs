//! What images are made from, and how it is read.

use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use fs_err as fs;
use nexus_schema::ByteSize;
use nexus_schema::link::ImageConfig;

use super::bootstrap::Bootstrap;
use super::contents::Contents;
use super::oci::{self, Form, Resolved};
use super::place::Place;
use super::tree::Tree;
use super::{ImageError, Limits, MADE, ROOTFS, archive, busybox, directory, filesystem};
use crate::ext4::fill;
use crate::os::given::{self, Kind};
use crate::progress::Progress;

/// What an image is made from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A distribution's packages.
    Bootstrap(Bootstrap),
    /// A static BusyBox.
    Busybox {
        /// The binary.
        binary: PathBuf,
    },
    /// A directory with a root filesystem.
    Directory(PathBuf),
    /// A tar archive with a root filesystem or an OCI or Docker image: plain, or compressed by gzip, xz or zstd.
    Tar(PathBuf),
    /// An OCI image in a registry.
    Remote(Box<Resolved>),
    /// An OCI or Docker image in a file or directory.
    Saved {
        /// The archive, or the directory of an OCI layout.
        path: PathBuf,
        /// Its format.
        form: Form,
        /// The name of the image in it, if there are several.
        name: Option<String>,
    },
    /// An ext4 filesystem with a root filesystem.
    Ext4(PathBuf),
    /// A copy of a machine's root drive, which nobody else uses: its journal is applied, its files are written anew, and what is that machine's own is left out.
    Filesystem(PathBuf),
}

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The memory limit of decompression; the largest presets of xz need 65 MiB.
const UNPACK_MEMORY: u64 = 256 << 20;

impl Source {
    /// Detects what a path of the host is: a directory, an OCI layout, an ext4 image or a tar archive. Blocks.
    pub fn detect(path: &Path) -> Result<Self, ImageError> {
        let failed = |e| ImageError::source(path, e);
        if given::kind(path).map_err(failed)? == Kind::Directory {
            return Ok(match oci::is_layout(path) {
                true => Self::Saved { path: path.to_owned(), form: Form::Layout, name: None },
                false => Self::Directory(path.to_owned()),
            });
        }
        let mut start = [0; 2048];
        let read = fill(&mut given::open_file(path).map_err(failed)?, &mut start).map_err(failed)?;
        let start = &start[..read];
        if start.get(1024 + 0x38..1024 + 0x3a) == Some(&[0x53, 0xef]) {
            return Ok(Self::Ext4(path.to_owned()));
        }
        let packed = [GZIP, XZ, ZSTD].iter().any(|magic| start.starts_with(magic));
        // An archive starts with a header that has a checksum, or with zeros if it is empty.
        let plain = start.is_empty()
            || start.get(..512).is_some_and(|block| {
                let mut header = tar::Header::new_old();
                header.as_mut_bytes().copy_from_slice(block);
                let given = header.cksum().ok();
                header.set_cksum();
                given == header.cksum().ok() || block.iter().all(|b| *b == 0)
            });
        if packed || plain {
            Ok(Self::Tar(path.to_owned()))
        } else {
            Err(ImageError::Unknown { path: path.to_owned() })
        }
    }
}

/// Where a source is read to, and how much of it may be read.
pub(crate) struct Room {
    pub(crate) place: Place,
    pub(crate) limits: Limits,
    /// The minimum size of the filesystem.
    pub(crate) size: Option<ByteSize>,
}

/// A source that was read.
pub(crate) struct Staged {
    pub(crate) tree: Tree,
    pub(crate) contents: Contents,
    pub(crate) distro: Option<String>,
    pub(crate) config: Option<ImageConfig>,
    pub(crate) notes: Vec<String>,
}

/// Reads a source into an image of at least `size` in the place's scratch directory. The place is passed along so that it
/// exists as long as it is used.
pub(crate) async fn stage(
    source: Source,
    room: Room,
    progress: &Progress,
) -> Result<(Place, Staged), ImageError> {
    progress.step("reading the source");
    let watched = progress.clone();
    match source {
        Source::Bootstrap(bootstrap) => {
            let scratch = room.place.scratch().join("bootstrap");
            fs::create_dir(&scratch).map_err(|e| ImageError::write(&scratch, e))?;
            let read = |pipe| {
                blocking(room, progress, move |staged, limits| {
                    let pipe = BufReader::with_capacity(1 << 20, pipe);
                    archive::read(pipe, &mut staged.tree, &mut staged.contents, limits, &watched)
                })
            };
            let (place, mut staged) = bootstrap.run(&scratch, progress, read).await?;
            staged.distro = Some(bootstrap.distro);
            Ok((place, staged))
        }
        Source::Busybox { binary } => {
            blocking(room, progress, move |staged, _| {
                busybox::put(&binary, &mut staged.tree, &mut staged.contents, MADE.into())
            })
            .await
        }
        Source::Directory(path) => {
            blocking(room, progress, move |staged, _| {
                staged.notes = directory::read(&path, &mut staged.tree, &mut staged.contents, &watched)?;
                Ok(())
            })
            .await
        }
        Source::Tar(path) | Source::Ext4(path) => {
            blocking(room, progress, move |staged, limits| {
                archive::read(open(&path)?, &mut staged.tree, &mut staged.contents, limits, &watched)?;
                oci::unfold(staged, None, None, limits, &watched).map(drop)
            })
            .await
        }
        Source::Filesystem(path) => {
            blocking(room, progress, move |staged, _| filesystem::read(&path, staged, &watched)).await
        }
        Source::Saved { path, form, name } => {
            blocking(room, progress, move |staged, limits| {
                let name = name.as_deref();
                if form == Form::Layout && path.is_dir() {
                    return oci::read_layout(&path, name, staged, limits, &watched);
                }
                archive::read(open(&path)?, &mut staged.tree, &mut staged.contents, limits, &watched)?;
                if staged.tree.is_empty() {
                    return Err(ImageError::Empty);
                }
                match oci::unfold(staged, Some(form), name, limits, &watched)? {
                    true => Ok(()),
                    false => Err(oci::not_one(&path, form).into()),
                }
            })
            .await
        }
        Source::Remote(resolved) => Box::pin(oci::stage_remote(*resolved, room, progress)).await,
    }
}

pub(crate) async fn blocking(
    room: Room,
    progress: &Progress,
    read: impl FnOnce(&mut Staged, &Limits) -> Result<(), ImageError> + Send + 'static,
) -> Result<(Place, Staged), ImageError> {
    let progress = progress.clone();
    let work = move || {
        let Room { place, limits, size } = room;
        let file = place.scratch().join(ROOTFS);
        let mut staged = Staged {
            tree: Tree::new(limits.clone()),
            contents: Contents::create(&file, size, limits.clone(), &progress)?,
            distro: None,
            config: None,
            notes: Vec::new(),
        };
        read(&mut staged, &limits)?;
        if staged.tree.is_empty() { Err(ImageError::Empty) } else { Ok((place, staged)) }
    };
    tokio::task::spawn_blocking(work).await.map_err(|_| ImageError::Worker)?
}

/// Opens an archive and decompresses it, by its first bytes.
fn open(path: &Path) -> Result<Box<dyn Read>, ImageError> {
    unpacked(given::open_file(path).map_err(|e| ImageError::source(path, e))?, path)
}

/// Decompresses a content, by its first bytes.
pub(crate) fn unpacked(
    mut file: impl Read + Seek + 'static,
    path: &Path,
) -> Result<Box<dyn Read>, ImageError> {
    let failed = |e| ImageError::source(path, e);
    let mut start = [0; 6];
    let read = fill(&mut file, &mut start).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let start = &start[..read];
    let file = BufReader::with_capacity(1 << 20, file);
    if start.starts_with(GZIP) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(file)));
    }
    if start.starts_with(XZ) {
        let decoder = xz2::stream::Stream::new_stream_decoder(UNPACK_MEMORY, xz2::stream::CONCATENATED);
        let decoder = decoder.map_err(|e| failed(e.into()))?;
        return Ok(Box::new(xz2::bufread::XzDecoder::new_stream(file, decoder)));
    }
    if start.starts_with(ZSTD) {
        return Ok(Box::new(zstd::stream::read::Decoder::with_buffer(file).map_err(failed)?));
    }
    Ok(Box::new(file))
}
