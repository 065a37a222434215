//! The architectures that VMs can have, and what others call them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{ErrorCode, ToolError};

/// The architecture of a machine, and of everything that runs on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// 64-bit x86.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit Arm, little-endian.
    Aarch64,
}

impl Arch {
    /// All architectures.
    pub const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];
    /// The architecture of this program, and so of its host.
    pub const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };
    /// The other architecture: its VMs are emulated on this host, which is experimental.
    pub const FOREIGN: Self = match Self::HOST {
        Self::X86_64 => Self::Aarch64,
        Self::Aarch64 => Self::X86_64,
    };

    /// Returns its name: that of `uname -m`, of Rust and of QEMU. It is also the one on the wire and in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Returns its name in Debian's archive and in OCI images.
    pub const fn of_packages(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Returns the program of QEMU that has its machines.
    pub const fn qemu(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86_64",
            Self::Aarch64 => "qemu-system-aarch64",
        }
    }

    /// Returns the Debian package with that program.
    pub const fn qemu_package(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-system-x86",
            Self::Aarch64 => "qemu-system-arm",
        }
    }

    /// Returns the number of its machines in ELF files (`e_machine`).
    pub const fn elf_machine(self) -> u16 {
        match self {
            Self::X86_64 => 62,
            Self::Aarch64 => 183,
        }
    }

    /// Returns the architecture of a 64-bit little-endian ELF file, by its first bytes; `None` for anything else.
    pub fn of_elf(start: &[u8]) -> Option<Self> {
        if !start.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let machine = u16::from_le_bytes(*start.get(18..)?.first_chunk()?);
        Self::ALL.into_iter().find(|arch| arch.elf_machine() == machine)
    }

    /// Returns the architecture with a name, as `uname -m` or Debian has it.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.as_str() == name || arch.of_packages() == name)
    }

    /// Returns the architecture with a name, or an error that says that its VMs cannot be run.
    pub fn known(name: &str) -> Result<Self, ToolError> {
        Self::named(name).ok_or_else(|| {
            let message = format!("VMs of the architecture {name} cannot be run");
            ToolError::new(ErrorCode::HostUnsuitable, message)
        })
    }

    /// Returns whether it is that of the host.
    pub fn is_host(&self) -> bool {
        *self == Self::HOST
    }
}

/// That of the host.
impl Default for Arch {
    fn default() -> Self {
        Self::HOST
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_architecture() {
        for arch in Arch::ALL {
            assert_eq!(Arch::named(arch.as_str()), Some(arch));
            assert_eq!(Arch::named(arch.of_packages()), Some(arch));
            assert_eq!(serde_json::to_value(arch).unwrap(), arch.as_str());
            assert_eq!(serde_json::from_value::<Arch>(arch.as_str().into()).unwrap(), arch);
            assert!(arch.qemu().ends_with(arch.as_str()));
            assert_eq!(arch.is_host(), arch != Arch::FOREIGN);
        }
        assert_eq!(Arch::named("riscv64"), None);
        assert!(Arch::known("riscv64").unwrap_err().message.contains("riscv64"));
        assert_eq!(Arch::HOST.as_str(), std::env::consts::ARCH);
    }

    #[test]
    fn an_elf_file_says_its_architecture() {
        let mut header = b"\x7fELF\x02\x01".to_vec();
        header.resize(64, 0);
        for arch in Arch::ALL {
            header[18..20].copy_from_slice(&arch.elf_machine().to_le_bytes());
            assert_eq!(Arch::of_elf(&header), Some(arch));
        }
        assert_eq!(Arch::of_elf(&header[..19]), None);
        header[18..20].copy_from_slice(&8_u16.to_le_bytes());
        assert_eq!(Arch::of_elf(&header), None);
        for bytes in [&b""[..], b"\x7fELF\x02\x01", b"#!/bin/sh\n"] {
            assert_eq!(Arch::of_elf(bytes), None);
        }
    }
}
