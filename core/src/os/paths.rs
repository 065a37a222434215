//! Every path under the state directory, in one place.

use std::path::{Path, PathBuf};

use nexus_schema::id::{AssetId, BuildId, DriveId, ImageId, VmId};

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

    /// The file whose lock makes one daemon the only one.
    pub fn lock(&self) -> PathBuf {
        self.root.join("nexusd.lock")
    }

    /// What is given up on a full disk.
    pub fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.root.join("nexus.db")
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

    /// Downloads that are not whole yet, to be gone on with.
    pub fn downloads(&self) -> PathBuf {
        self.root.join("downloads")
    }

    /// Links to the programs that were downloaded and are to be used.
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

    /// What can be made again at any time, such as composed initramfs files.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Unix sockets by which ports of guests are published.
    pub fn sockets(&self) -> PathBuf {
        self.root.join("sockets")
    }

    /// Where the process that keeps the network of VMs has its socket and its log, and the VMs' connections are logged.
    pub fn network(&self) -> PathBuf {
        self.root.join("network")
    }

    /// A client's own folder for copies: `owner` is whom its calls belong to, such as `uid:1000`.
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

    /// Half-made things; emptied at every start of the daemon.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }
}

/// Where it says which ids a user has besides its own, below the root directory: users' and groups'.
pub(super) const SUBORDINATE_IDS: [&str; 2] = ["etc/subuid", "etc/subgid"];

/// Where it says who else may know such things.
pub(super) const NAME_SERVICES: &str = "etc/nsswitch.conf";

/// Where the host's programs are looked for. Some of them are for administrators, whose directories are not in every user's
/// `PATH`.
pub const PROGRAM_DIRECTORIES: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Where the host's libraries are, with what else comes with its programs. Holds nothing of its owner's.
pub(super) const LIBRARIES: [&str; 8] =
    ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/gnu/store"];

/// What the dynamic loader and the C library read besides libraries.
pub(super) const LOADER_FILES: [&str; 4] =
    ["/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/sys/devices/system/cpu"];

/// The dynamic loader's list of libraries.
pub(crate) const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// What QEMU reads besides libraries, where it is in the usual place: firmware, and how much memory each node has.
pub(crate) const QEMU_FILES: [&str; 3] =
    ["/usr/share/qemu", "/usr/share/seabios", "/sys/devices/system/node"];

/// Devices that every program may use.
pub(crate) const PLAIN_DEVICES: [&str; 5] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

/// Where the kernel tells of processes.
pub(super) const PROCESSES: &str = "/proc";

/// The device of hardware virtualization.
pub(crate) const KVM: &str = "/dev/kvm";

/// Where the kernel lists its routes of IPv4, those of this process's network namespace.
pub(crate) const ROUTES: &str = "/proc/self/net/route";

/// The device by which TAP devices are used.
pub(crate) const TUN: &str = "/dev/net/tun";

/// Where an image has the files of its services.
pub(crate) const GUEST_SERVICES: &str = "/etc/nexus/services.d";

/// Where a guest has programs of its own, such as `poweroff`.
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
    /// What was launched.
    pub const PLAN: &str = "plan.json";
    /// How it ended.
    pub const EXIT: &str = "exit.json";
    /// The console, current file; older ones have a number behind.
    pub const CONSOLE: &str = "console.log";
    /// What the VMM wrote to stderr.
    pub const VMM_LOG: &str = "vmm.log";
    /// Through which a VMM that opens its log by itself writes it to [`VMM_LOG`].
    pub const VMM_PIPE: &str = "vmm.pipe";
    /// The directory that a jailed VMM has for its root, some levels down.
    pub const JAIL: &str = "jail";
    /// What the shim has to say.
    pub const SHIM_LOG: &str = "shim.log";
    /// Locked by the live shim; holds its pid and start time.
    pub const SHIM_LOCK: &str = "shim.lock";
}
