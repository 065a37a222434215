//! What is checked before a restore: the files are as they were written, and this host is the one that they were written on.

use std::path::{Path, PathBuf};

use nexus_schema::tools::vm::DriverChoice;
use nexus_schema::{DriverKind, ErrorCode, ToolError};

use super::packed::has_memory;
use crate::context::Shared;
use crate::os::paths::checkpoint_files;
use crate::os::{cpu, tsc};
use crate::store::checkpoints::{CheckpointRecord, HostFacts, MANIFEST_VERSION, Manifest};
use crate::store::vms::VmSpec;
use crate::vmm::doctor::Choice;
use crate::vmm::{Caps, sha256_of_file, sha256_of_memory};

/// The largest difference of the rate of the time stamp counter, as a part of it: a guest's clock would go wrong by that.
const TSC_PARTS: u32 = 1000;

/// Why a checkpoint cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(in crate::vm) enum CheckError {
    /// A file cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file is not as it was written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// It was written by another version of the daemon.
    #[error("it was written in the form {found}, and this nexusd reads {MANIFEST_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// The host is another one.
    #[error("{0}")]
    Host(String),
}

impl CheckError {
    /// Whether the files are damaged, and not this host another one.
    pub(in crate::vm) const fn is_of_files(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Damaged { .. })
    }

    /// The same for callers.
    pub(super) fn told(&self, checkpoint: &CheckpointRecord) -> ToolError {
        let message = format!(
            "restore checkpoint {} ({}): {}",
            checkpoint.name,
            checkpoint.id,
            nexus_schema::error::chain(self)
        );
        match self {
            Self::Read { .. } | Self::Damaged { .. } => ToolError::new(ErrorCode::VerificationFailed, message)
                .hint("the checkpoint is of no use any more: use another one from checkpoint_list, and checkpoint_delete this one"),
            Self::Version { .. } | Self::Host(_) => ToolError::new(ErrorCode::HostUnsuitable, message)
                .hint("a checkpoint can be restored only where it was taken, by the same VMM: take another one with vm_checkpoint"),
        }
    }
}

/// Compares this host with the one that a checkpoint was taken on, as far as that is known without reading files.
fn same_host(facts: &HostFacts, now: &HostFacts) -> Result<(), CheckError> {
    let other = |what: &str, was: &str, is: &str| {
        Err(CheckError::Host(format!("it was taken with {what} {was}, and this host has {is}")))
    };
    if facts.driver != now.driver {
        return other("the driver", &facts.driver, &now.driver);
    }
    if facts.driver_version != now.driver_version {
        return other(&facts.driver, &facts.driver_version, &now.driver_version);
    }
    if facts.accel != now.accel {
        return other("the acceleration", &facts.accel, &now.accel);
    }
    if !facts.cpu_sha256.is_empty() && facts.cpu_sha256 != now.cpu_sha256 {
        return Err(CheckError::Host("it was taken on a processor with other features".into()));
    }
    // An empty digest is not known yet.
    if !now.binary_sha256.is_empty() && facts.binary_sha256 != now.binary_sha256 {
        let what = format!("it was taken with another build of {} {}", facts.driver, facts.driver_version);
        return Err(CheckError::Host(what));
    }
    if let (Some(was), Some(is)) = (facts.tsc_khz, now.tsc_khz)
        && u64::from(was.abs_diff(is)) * u64::from(TSC_PARTS) > u64::from(was)
    {
        let what = format!("its time stamp counter ran at {was} kHz, and that of this host runs at {is} kHz");
        return Err(CheckError::Host(what));
    }
    Ok(())
}

/// What this host has for a VMM; without the digest of its binary.
pub(super) fn facts_of(choice: &Choice) -> HostFacts {
    HostFacts {
        driver: choice.driver.as_str().into(),
        driver_version: choice.version.clone(),
        binary_sha256: String::new(),
        accel: choice.accel.as_str().into(),
        cpu_sha256: cpu::digest().unwrap_or_default(),
        tsc_khz: tsc::khz(),
    }
}

/// Returns the VMM that restores a checkpoint.
pub(crate) async fn choose(shared: &Shared, manifest: &Manifest) -> Result<Choice, ToolError> {
    let wanted = match DriverKind::named(&manifest.host.driver) {
        Some(DriverKind::Qemu) => DriverChoice::Qemu,
        Some(DriverKind::Firecracker) => DriverChoice::Firecracker,
        Some(DriverKind::Process) | None => manifest.spec.driver,
    };
    shared.choose_driver(&VmSpec { driver: wanted, ..manifest.spec.clone() }).await
}

/// What is known to keep a checkpoint from being restored here; quick, for lists.
pub(crate) async fn problem(shared: &Shared, checkpoint: &CheckpointRecord) -> Option<String> {
    let manifest = checkpoint.manifest.as_ref()?;
    let directory = shared.paths.checkpoint(checkpoint.id);
    if !tokio::task::spawn_blocking(move || has_memory(&directory)).await.ok()? {
        return Some("its files are missing; checkpoint_delete it".into());
    }
    match look_at_host(shared, manifest).await {
        Ok(looked) => looked.err().map(|error| error.to_string()),
        Err(error) => Some(error.message),
    }
}

/// Checks that this host can restore a checkpoint, as far as that is known without reading files.
pub(super) async fn check_host(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<(), ToolError> {
    let Some(manifest) = &checkpoint.manifest else { return Ok(()) };
    look_at_host(shared, manifest).await?.map_err(|error| error.told(checkpoint))
}

async fn look_at_host(shared: &Shared, manifest: &Manifest) -> Result<Result<(), CheckError>, ToolError> {
    let choice = choose(shared, manifest).await?;
    let facts = manifest.host.clone();
    let looked = tokio::task::spawn_blocking(move || same_host(&facts, &facts_of(&choice)));
    looked.await.map_err(|e| ToolError::internal(format!("look at the host: {e}")))
}

/// Checks everything of a checkpoint before its restore; returns its manifest. Reads all of its memory, but not the copies of drives, whose sizes
/// are compared.
pub(super) async fn check(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<Manifest, ToolError> {
    let Some(manifest) = checkpoint.manifest.clone() else {
        return Err(ToolError::internal(format!("checkpoint {} has no manifest", checkpoint.id)));
    };
    let checked = check_at(shared, shared.paths.checkpoint(checkpoint.id), manifest).await?;
    checked.map_err(|error| error.told(checkpoint))
}

/// Checks the files in a directory, and that this host can restore them; returns their manifest.
pub(in crate::vm) async fn check_at(
    shared: &Shared,
    directory: PathBuf,
    manifest: Manifest,
) -> Result<Result<Manifest, CheckError>, ToolError> {
    let choice = choose(shared, &manifest).await?;
    if !Caps::of(choice.driver).fork {
        let message = format!("the driver {} cannot restore VMs", choice.driver);
        return Err(ToolError::new(ErrorCode::HostUnsuitable, message)
            .hint("make VMs that can be saved with vm_create, checkpoints: true and driver: qemu"));
    }
    let looked = tokio::task::spawn_blocking(move || -> Result<Manifest, CheckError> {
        // The host first: to read a memory that cannot be restored here takes long.
        let mut now = facts_of(&choice);
        same_host(&manifest.host, &now)?;
        now.binary_sha256 = digest(&choice.binary, sha256_of_file)?;
        same_host(&manifest.host, &now)?;
        check_files(&directory, &manifest)?;
        Ok(manifest)
    });
    looked.await.map_err(|e| ToolError::internal(format!("check a checkpoint: {e}")))
}

/// Checks again that a checkpoint that was checked is there; quick.
pub(super) async fn is_there(shared: &Shared, checkpoint: &CheckpointRecord) -> Result<(), ToolError> {
    let path = shared.paths.checkpoint(checkpoint.id).join(checkpoint_files::RAM);
    let found = tokio::fs::metadata(&path).await;
    found.map(drop).map_err(|source| CheckError::Read { path, source }.told(checkpoint))
}

fn digest(path: &Path, of: fn(&Path) -> std::io::Result<String>) -> Result<String, CheckError> {
    of(path).map_err(|source| CheckError::Read { path: path.into(), source })
}

/// Checks that a checkpoint's files are as they were written. Blocks.
pub(super) fn check_files(directory: &Path, expected: &Manifest) -> Result<(), CheckError> {
    if expected.version != MANIFEST_VERSION {
        return Err(CheckError::Version { found: expected.version });
    }
    let damaged = |path: PathBuf, what| Err(CheckError::Damaged { path, what });
    let path = directory.join(checkpoint_files::MANIFEST);
    let text = std::fs::read(&path).map_err(|source| CheckError::Read { path: path.clone(), source })?;
    let found = serde_json::from_slice::<Manifest>(&text).ok();
    if found.as_ref() != Some(expected) {
        return damaged(path, "it is not the manifest of this checkpoint");
    }
    let drives = directory.join(checkpoint_files::DRIVES);
    let mut sizes = Vec::new();
    for entry in
        std::fs::read_dir(&drives).map_err(|source| CheckError::Read { path: drives.clone(), source })?
    {
        let length = entry.and_then(|entry| entry.metadata()).map(|found| found.len());
        sizes.push(length.map_err(|source| CheckError::Read { path: drives.clone(), source })?);
    }
    let mut wanted = expected.drive_bytes.clone();
    sizes.sort_unstable();
    wanted.sort_unstable();
    if sizes != wanted {
        return damaged(drives, "a copy of a drive is missing, or has another size");
    }
    let path = directory.join(checkpoint_files::STATE);
    if digest(&path, sha256_of_file)? != expected.state_sha256 {
        return damaged(path, "its checksum is another one");
    }
    let path = directory.join(checkpoint_files::RAM);
    if digest(&path, sha256_of_memory)? != expected.ram_sha256 {
        return damaged(path, "its checksum is another one");
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::FileExt;

    use nexus_schema::link::{Hello, InitMode};

    use super::*;
    use crate::store::random_id;
    use crate::store::vms::GuestRecord;

    fn host() -> HostFacts {
        HostFacts {
            driver: "qemu".into(),
            driver_version: "7.2.22".into(),
            binary_sha256: "aa".into(),
            accel: "tcg".into(),
            cpu_sha256: "bb".into(),
            tsc_khz: Some(2_400_000),
        }
    }

    /// A whole checkpoint of one page of memory.
    pub(in crate::vm::checkpoint) fn written() -> (tempfile::TempDir, Manifest) {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at(checkpoint_files::DRIVES)).unwrap();
        std::fs::write(at("drives/a.ext4"), "drive").unwrap();
        std::fs::write(at(checkpoint_files::STATE), "devices").unwrap();
        let ram = std::fs::File::create(at(checkpoint_files::RAM)).unwrap();
        ram.set_len(1 << 20).unwrap();
        ram.write_all_at(&[7; 4096], 8192).unwrap();
        let vm = crate::store::tests::vm("web", 3);
        let hello = Hello {
            protocol: 1,
            min_protocol: 1,
            build: "0.1.0".into(),
            kernel: "6.12".into(),
            arch: "x86_64".into(),
            kernel_boot_id: "b".into(),
            uptime_ms: 5,
            token: None,
            resumed: None,
            init: InitMode::Agent,
            os: None,
            image: None,
        };
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            checkpoint: random_id(),
            vm: vm.id,
            boot_id: random_id(),
            spec: vm.spec,
            image_id: None,
            image_name: "debian".into(),
            kernel_id: None,
            arch: "x86_64".into(),
            guest: GuestRecord { hello, protocol: 1, configured: true, problems: Vec::new(), resumed: None },
            host: host(),
            private: false,
            interface: false,
            state_sha256: sha256_of_file(&at(checkpoint_files::STATE)).unwrap(),
            ram_sha256: sha256_of_memory(&at(checkpoint_files::RAM)).unwrap(),
            quiesced: true,
            drive_bytes: vec![5],
            processes: Vec::new(),
        };
        std::fs::write(at(checkpoint_files::MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        (directory, manifest)
    }

    pub(in crate::vm::checkpoint) fn flip(file: &Path, at: u64) {
        let file = std::fs::File::options().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    #[test]
    fn one_flipped_byte_is_found_wherever_it_is() {
        let (directory, manifest) = written();
        check_files(directory.path(), &manifest).unwrap();
        for (name, at) in [
            (checkpoint_files::STATE, 3),
            (checkpoint_files::RAM, 8192),
            (checkpoint_files::RAM, 8192 + 4095),
            // A page that was all zeros.
            (checkpoint_files::RAM, 500_000),
            (checkpoint_files::MANIFEST, 40),
        ] {
            let path = directory.path().join(name);
            flip(&path, at);
            let error = check_files(directory.path(), &manifest).unwrap_err();
            assert!(matches!(error, CheckError::Damaged { .. }), "{name}: {error}");
            assert!(error.to_string().contains(name), "{error}");
            flip(&path, at);
        }
        check_files(directory.path(), &manifest).unwrap();
    }

    #[test]
    fn missing_and_short_files_are_found() {
        let (directory, manifest) = written();
        std::fs::write(directory.path().join("drives/a.ext4"), "driv").unwrap();
        assert!(check_files(directory.path(), &manifest).unwrap_err().to_string().contains("drives"));
        std::fs::write(directory.path().join("drives/a.ext4"), "drive").unwrap();
        std::fs::remove_file(directory.path().join(checkpoint_files::STATE)).unwrap();
        assert!(matches!(check_files(directory.path(), &manifest), Err(CheckError::Read { .. })));
        let later = Manifest { version: MANIFEST_VERSION + 1, ..manifest };
        assert!(matches!(check_files(directory.path(), &later), Err(CheckError::Version { .. })));
    }

    #[test]
    fn another_host_is_refused_with_what_is_different() {
        same_host(&host(), &host()).unwrap();
        same_host(&host(), &HostFacts { tsc_khz: Some(2_402_000), ..host() }).unwrap();
        same_host(&host(), &HostFacts { binary_sha256: String::new(), tsc_khz: None, ..host() }).unwrap();
        let mut others = [host(), host(), host(), host(), host(), host()];
        others[0].driver = "firecracker".into();
        others[1].driver_version = "10.0.2".into();
        others[2].accel = "kvm".into();
        others[3].cpu_sha256 = "cc".into();
        others[4].binary_sha256 = "dd".into();
        others[5].tsc_khz = Some(2_410_000);
        let words = ["firecracker", "10.0.2", "kvm", "processor", "another build", "2410000 kHz"];
        for (other, word) in others.iter().zip(words) {
            let error = same_host(&host(), other).unwrap_err().to_string();
            assert!(error.contains(word), "{word} in {error}");
        }
    }
}
