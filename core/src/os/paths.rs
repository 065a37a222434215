//! Every path under the state directory, in one place.

use std::path::{Path, PathBuf};

use nexus_schema::id::{AssetId, BuildId, CheckpointId, DriveId, ImageId, VmId};

/// The layout of a state directory.
#[derive(Debug, Clone)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The layout under `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The state directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The lock file that ensures a single daemon.
    pub fn lock(&self) -> PathBuf {
        self.root.join("nexusd.lock")
    }

    /// The file that is deleted to free space on a full disk.
    pub fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.root.join("nexus.db")
    }

    /// The file that the database's epoch is compared with.
    pub fn epoch(&self) -> PathBuf {
        self.root.join("epoch")
    }

    /// The names of entries that are kept although no row names them.
    pub fn kept(&self) -> PathBuf {
        self.root.join("kept.json")
    }

    /// The directory of all VMs.
    pub fn vms(&self) -> PathBuf {
        self.root.join("vms")
    }

    /// The directory of one VM: its sockets, plan, console and logs. The VMM's working directory.
    pub fn vm(&self, id: VmId) -> PathBuf {
        self.vms().join(id.to_string())
    }

    /// The directory of all drives.
    pub fn drives(&self) -> PathBuf {
        self.root.join("drives")
    }

    /// The directory of one drive.
    pub fn drive(&self, id: DriveId) -> PathBuf {
        self.drives().join(id.to_string())
    }

    /// The directory of all checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The directory of one checkpoint.
    pub fn checkpoint(&self, id: CheckpointId) -> PathBuf {
        self.checkpoints().join(id.to_string())
    }

    /// The directory of a checkpoint that is being made.
    pub fn checkpoint_part(&self, id: CheckpointId) -> PathBuf {
        self.checkpoints().join(format!("{id}.part"))
    }

    /// The directory of the saved memories of suspended VMs.
    pub fn all_suspended(&self) -> PathBuf {
        self.root.join("suspended")
    }

    /// The directory of one saved memory. Its files are those of a checkpoint, without copies of drives.
    pub fn suspended(&self, id: CheckpointId) -> PathBuf {
        self.all_suspended().join(id.to_string())
    }

    /// The directory of a memory that is being saved.
    pub fn suspended_part(&self, id: CheckpointId) -> PathBuf {
        self.all_suspended().join(format!("{id}.part"))
    }

    /// The directory of machines that new VMs go on from.
    pub fn all_prepared(&self) -> PathBuf {
        self.root.join("prepared")
    }

    /// The directory of one such machine. Its files are those of a checkpoint, and [`checkpoint_files::PREPARED`].
    pub fn prepared(&self, id: CheckpointId) -> PathBuf {
        self.all_prepared().join(id.to_string())
    }

    /// The directory of such a machine that is being made.
    pub fn prepared_part(&self, id: CheckpointId) -> PathBuf {
        self.all_prepared().join(format!("{id}.part"))
    }

    /// The directory of all images.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The directory of one image.
    pub fn image(&self, id: ImageId) -> PathBuf {
        self.images().join(id.to_string())
    }

    /// The directory of all assets.
    pub fn assets(&self) -> PathBuf {
        self.root.join("assets")
    }

    /// The directory of one asset.
    pub fn asset(&self, id: AssetId) -> PathBuf {
        self.assets().join(id.to_string())
    }

    /// Partial downloads that can be resumed.
    pub fn downloads(&self) -> PathBuf {
        self.root.join("downloads")
    }

    /// The directory of kernels that are being built, and the logs of those that were.
    pub fn kernels(&self) -> PathBuf {
        self.root.join("kernels")
    }

    /// Links to the downloaded programs to use.
    pub fn programs(&self) -> PathBuf {
        self.root.join("bin")
    }

    /// The directory of all builds' logs.
    pub fn builds(&self) -> PathBuf {
        self.root.join("builds")
    }

    /// The log of one build.
    pub fn build_log(&self, id: BuildId) -> PathBuf {
        self.builds().join(id.to_string())
    }

    /// Files that can be recreated at any time, such as composed initramfs files.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// The Unix sockets of published guest ports.
    pub fn sockets(&self) -> PathBuf {
        self.root.join("sockets")
    }

    /// The directory of the process for the VMs' network: its socket, its log, and the logs of the VMs' connections.
    pub fn network(&self) -> PathBuf {
        self.root.join("network")
    }

    /// A client's own folder for copies; `owner` identifies the client, such as `uid:1000`.
    pub fn of_client(&self, owner: &str) -> PathBuf {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') {
                c.to_string()
            } else {
                format!("%{:x}", u32::from(c))
            }
        };
        let name: String = owner.chars().map(|c| if c == ':' { "-".to_owned() } else { plain(c) }).collect();
        self.root.join("clients").join(name)
    }

    /// Unfinished work; emptied at every start of the daemon.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }
}

/// The files, relative to the root directory, that assign subordinate ids to users: for users and for groups.
pub(super) const SUBORDINATE_IDS: [&str; 2] = ["etc/subuid", "etc/subgid"];

/// The file that says which other services know such ids.
pub(super) const NAME_SERVICES: &str = "etc/nsswitch.conf";

/// Where to look for the host's programs. Some of these directories are for administrators and not in every user's `PATH`.
pub const PROGRAM_DIRECTORIES: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The host's libraries and other files that come with its programs. They contain no private data.
pub(super) const LIBRARIES: [&str; 8] =
    ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/gnu/store"];

/// The other files that the dynamic loader and the C library read.
pub(super) const LOADER_FILES: [&str; 4] =
    ["/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/sys/devices/system/cpu"];

/// The dynamic loader's cache of libraries.
pub(crate) const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// The other files that QEMU reads if it is installed in the usual place: firmware, and the memory size of each node.
pub(crate) const QEMU_FILES: [&str; 3] =
    ["/usr/share/qemu", "/usr/share/seabios", "/sys/devices/system/node"];

/// Devices that every program may use.
pub(crate) const PLAIN_DEVICES: [&str; 5] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

/// The kernel's description of the processors.
pub(super) const CPUINFO: &str = "/proc/cpuinfo";

/// The kernel's directory of processes.
pub(super) const PROCESSES: &str = "/proc";

/// The device of hardware virtualization.
pub(crate) const KVM: &str = "/dev/kvm";

/// The host's headers, for compilers.
pub(crate) const HEADERS: &str = "/usr/include";

/// The kernel's list of IPv4 routes, in this process's network namespace.
pub(crate) const ROUTES: &str = "/proc/self/net/route";

/// The host's configuration of names: its servers and search domains.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The device for using TAP devices.
pub(crate) const TUN: &str = nexus_net_wire::tap::DEVICE;

/// An image's directory of service files.
pub(crate) const GUEST_SERVICES: &str = "/etc/nexus/services.d";
/// Where a VM builds a kernel; a part of the key of what is built follows.
pub(crate) const GUEST_KERNELS: &str = "/var/tmp/nexus-kernel-";

/// A guest's directory for Nexus's own programs, such as `poweroff`.
pub const GUEST_PROGRAMS: &str = "/run/nexus/bin";

/// Names of files in a VM's directory. Sockets are short because a Unix socket path holds 107 bytes: processes use them
/// relative to the directory, or through `/proc/self/fd`.
pub mod vm_files {
    /// The vsock device's Unix socket (hybrid protocol).
    pub const VSOCK: &str = "v.sock";
    /// Where guest-initiated connections to the hello port arrive: `VSOCK` + `_1024`.
    pub const HELLO: &str = "v.sock_1024";
    /// Where the guest's connections to other machines arrive: `VSOCK` + `_1025`.
    pub const EGRESS: &str = "v.sock_1025";
    /// The shim's control socket.
    pub const SHIM: &str = "s.sock";
    /// The vhost-user socket between QEMU and the shim.
    pub const VHOST: &str = "vu.sock";
    /// QEMU's monitor.
    pub const QMP: &str = "q.sock";
    /// Firecracker's API socket.
    pub const API: &str = "api.sock";
    /// What was started.
    pub const PLAN: &str = "plan.json";
    /// How it ended.
    pub const EXIT: &str = "exit.json";
    /// The current console file; older ones have a number appended.
    pub const CONSOLE: &str = "console.log";
    /// What the VMM wrote to stderr.
    pub const VMM_LOG: &str = "vmm.log";
    /// The pipe to [`VMM_LOG`], for a VMM that opens its log by itself.
    pub const VMM_PIPE: &str = "vmm.pipe";
    /// Where Firecracker saves the state of its guest's devices and processors to, before it is copied.
    pub const SAVED_STATE: &str = "saved.state";
    /// Where Firecracker saves its guest's memory to, before it is copied.
    pub const SAVED_RAM: &str = "saved.ram";
    /// The state that a Firecracker goes on from.
    pub const LOADED_STATE: &str = "loaded.state";
    /// The memory that a Firecracker goes on from.
    pub const LOADED_RAM: &str = "loaded.ram";
    /// The directory with the root of a jailed VMM, some levels down.
    pub const JAIL: &str = "jail";
    /// The shim's own log.
    pub const SHIM_LOG: &str = "shim.log";
    /// Locked by the live shim; holds its pid and start time.
    pub const SHIM_LOCK: &str = "shim.lock";
}

/// Names of files in a checkpoint's directory.
pub mod checkpoint_files {
    /// What a restore needs to know, as JSON.
    pub const MANIFEST: &str = "manifest.json";
    /// The state of the VM's devices.
    pub const STATE: &str = "state";
    /// The VM's memory, a sparse file.
    pub const RAM: &str = "ram";
    /// The same in its packed form, in place of it.
    pub const PACKED: &str = "ram.packed";
    /// A packed form that is being made.
    pub const PACKED_PART: &str = "ram.packed.part";
    /// A memory that is being unpacked.
    pub const RAM_PART: &str = "ram.part";
    /// The directory of the copies of its drives.
    pub const DRIVES: &str = "drives";
    /// Which VMs go on from it, as JSON; only of a machine that is prepared for new VMs. Its time of modification is that of the last use.
    pub const PREPARED: &str = "prepared.json";
}
