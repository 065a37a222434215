//! Detection of hardware KVM. A `/dev/kvm` that opens is not enough: the module behind it may be software only.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

/// Whether KVM can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kvm {
    /// Hardware KVM works.
    Usable,
    /// There is no device.
    NoDevice,
    /// This user has no permission to open the device.
    Denied,
    /// The device does not open for another reason.
    Broken(String),
    /// The device belongs to a module without hardware support; stock kernels crash under it.
    SoftwareOnly,
    /// The processor, as this host sees it, has no virtualisation.
    NoProcessorSupport,
    /// The processor has it, but its module is not loaded.
    NoModule,
}

impl Kvm {
    /// Examines the host's files below `root`: `/`, or a test's directory.
    pub(super) fn look(root: &Path) -> Self {
        match OpenOptions::new().read(true).write(true).open(root.join("dev/kvm")) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Self::NoDevice,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Self::Denied,
            Err(e) => return Self::Broken(e.to_string()),
        }
        if !cfg!(target_arch = "x86_64") {
            return Self::Usable;
        }
        let module = |name: &str| root.join("sys/module").join(name).exists();
        if module("kvm_pvm") {
            return Self::SoftwareOnly;
        }
        let processors = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let flags = processors.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        if !flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
            return Self::NoProcessorSupport;
        }
        if module("kvm_intel") || module("kvm_amd") { Self::Usable } else { Self::NoModule }
    }

    /// Returns what is wrong and how to fix it; `None` if KVM works.
    pub(super) fn complaint(&self) -> Option<(String, String)> {
        let (why, fix) = match self {
            Self::Usable => return None,
            Self::NoDevice => (
                "there is no /dev/kvm".to_owned(),
                "enable virtualisation in the firmware (or nested virtualisation in the hypervisor), and load kvm_intel or kvm_amd",
            ),
            Self::Denied => (
                "this user has no permission to open /dev/kvm".to_owned(),
                "usermod -aG kvm USER, and log in again",
            ),
            Self::Broken(error) => (format!("cannot open /dev/kvm: {error}"), "check the kernel's log"),
            Self::SoftwareOnly => (
                "/dev/kvm belongs to kvm_pvm, which is software only and cannot run stock kernels".to_owned(),
                "use a host with hardware virtualisation",
            ),
            Self::NoProcessorSupport => (
                "the processor shows neither vmx nor svm".to_owned(),
                "enable virtualisation in the firmware, or nested virtualisation in the hypervisor",
            ),
            Self::NoModule => {
                ("neither kvm_intel nor kvm_amd is loaded".to_owned(), "modprobe kvm_intel, or kvm_amd")
            }
        };
        Some((why, fix.to_owned()))
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;

    fn host(device: bool, flags: &str, modules: &[&str]) -> Kvm {
        let root = tempfile::tempdir().unwrap();
        for directory in ["dev", "proc", "sys/module"] {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        if device {
            std::fs::write(root.path().join("dev/kvm"), "").unwrap();
        }
        std::fs::write(
            root.path().join("proc/cpuinfo"),
            format!("processor\t: 0\nflags\t\t: fpu {flags} sse\n"),
        )
        .unwrap();
        for module in modules {
            std::fs::create_dir(root.path().join("sys/module").join(module)).unwrap();
        }
        Kvm::look(root.path())
    }

    #[test]
    fn only_hardware_counts() {
        assert_eq!(host(true, "vmx", &["kvm", "kvm_intel"]), Kvm::Usable);
        assert_eq!(host(true, "svm", &["kvm", "kvm_amd"]), Kvm::Usable);
        assert_eq!(host(false, "vmx", &["kvm", "kvm_intel"]), Kvm::NoDevice);
        assert_eq!(host(true, "hypervisor", &["kvm", "kvm_pvm"]), Kvm::SoftwareOnly);
        assert_eq!(host(true, "hypervisor", &["kvm", "kvm_amd"]), Kvm::NoProcessorSupport);
        assert_eq!(host(true, "vmx", &["kvm"]), Kvm::NoModule);
    }
}
