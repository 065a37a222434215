//! Writes an image to a tar archive that is both an OCI layout and what `docker save` writes, so that whatever reads one of them reads it.

use std::io::{self, Read, Write};
use std::path::Path;

use fs_err as fs;
use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::{Exported, MANIFEST_TYPE, descriptor};
use crate::image::ImageError;
use crate::image::oci::blobs::name_of;
use crate::image::oci::digest::Digest;
use crate::image::oci::document::Blob;
use crate::image::oci::{INDEX, LAYOUT, MANIFEST};
use crate::progress::Progress;

impl Exported {
    /// Writes the archive; `path` is where, for errors. Returns its length in bytes. Blocks.
    pub(crate) fn write_archive(
        &self,
        sink: impl Write,
        path: &Path,
        progress: &Progress,
    ) -> Result<u64, ImageError> {
        let failed = |e| ImageError::write(path, e);
        let mut archive = Builder::new(Counted { sink, bytes: 0 });
        let manifest = Blob { digest: self.digest(), size: self.manifest.len() as u64 };
        let config = Blob { digest: Digest::of(&self.config), size: self.config.len() as u64 };
        for (name, content) in [
            (LAYOUT.to_owned(), json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes()),
            (INDEX.to_owned(), self.index(&manifest).as_bytes()),
            (MANIFEST.to_owned(), self.saved(&config).as_bytes()),
            (name_of(&manifest.digest), self.manifest.as_slice()),
            (name_of(&config.digest), self.config.as_slice()),
        ] {
            append(&mut archive, &name, content, content.len() as u64).map_err(failed)?;
        }
        let layer = fs::File::open(&self.layer_file).map_err(|e| ImageError::source(&self.layer_file, e))?;
        let layer = Watched { source: layer, read: 0, total: self.layer.size, progress };
        let appended = append(&mut archive, &name_of(&self.layer.digest), layer, self.layer.size);
        progress.check()?;
        appended.map_err(failed)?;
        let mut sink = archive.into_inner().map_err(failed)?;
        sink.flush().map_err(failed)?;
        Ok(sink.bytes)
    }

    fn index(&self, manifest: &Blob) -> String {
        let mut entry = descriptor(MANIFEST_TYPE, &manifest.digest, manifest.size);
        if let Some(entry) = entry.as_object_mut() {
            let platform = json!({ "architecture": self.arch.of_packages(), "os": "linux" });
            entry.insert("platform".to_owned(), platform);
            let name = json!({ "org.opencontainers.image.ref.name": "latest" });
            entry.insert("annotations".to_owned(), name);
        }
        let media_type = "application/vnd.oci.image.index.v1+json";
        json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": [entry] }).to_string()
    }

    fn saved(&self, config: &Blob) -> String {
        json!([{
            "Config": name_of(&config.digest),
            "RepoTags": [format!("{}:latest", self.name)],
            "Layers": [name_of(&self.layer.digest)],
        }])
        .to_string()
    }
}

fn append(archive: &mut Builder<impl Write>, name: &str, content: impl Read, size: u64) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    archive.append_data(&mut header, name, content)
}

/// A reader that shows how far it is, and ends early if the work is cancelled.
struct Watched<'a, R> {
    source: R,
    read: u64,
    total: u64,
    progress: &'a Progress,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.progress.check().map_err(io::Error::other)?;
        let read = self.source.read(buffer)?;
        self.read += read as u64;
        self.progress.advance(self.read, Some(self.total));
        Ok(read)
    }
}

/// A writer that counts.
struct Counted<W> {
    sink: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(buffer)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}
