//! QEMU's machines, one for each architecture: `microvm` on x86_64, `virt` on aarch64.

use nexus_schema::Arch;

use crate::vmm::plan::Accel;

/// The machine of an architecture, and its free slots for devices.
pub(super) struct Machine {
    arch: Arch,
    accel: Accel,
    /// The number of the next slot.
    next: usize,
}

impl Machine {
    pub(super) const fn new(arch: Arch, accel: Accel) -> Self {
        Self { arch, accel, next: 0 }
    }

    /// Adds the options of the machine and its processors; its memory is the backend `mem0`.
    pub(super) fn options(&self, mut option: impl FnMut(&str, String)) {
        let accel = self.accel.as_str();
        let (machine, emulated) = match self.arch {
            // Keep the PC's interrupt controllers, timer and clock: kernels boot faster with them than without.
            // Under emulation, fast string instructions copy one byte at a time; without these features Linux copies eight at a time.
            Arch::X86_64 => ("microvm", "max,erms=off,fsrm=off"),
            // The oldest interrupt controller serves eight processors only. The usual way to sign pointers is slow to emulate.
            Arch::Aarch64 => ("virt", "max,pauth-impdef=on"),
        };
        let more = if self.arch == Arch::Aarch64 { ",gic-version=max" } else { "" };
        option("-machine", format!("{machine},accel={accel}{more},memory-backend=mem0"));
        option("-cpu", if self.accel == Accel::Kvm { "host" } else { emulated }.to_owned());
    }

    /// Puts a device of virtio into the next slot, so that the guest finds devices in the order of this call. The machine `virt` would fill its
    /// slots from the other end.
    pub(super) fn device(&mut self, device: &str) -> String {
        let number = self.next;
        self.next += 1;
        match self.arch {
            Arch::X86_64 => device.to_owned(),
            Arch::Aarch64 => format!("{device},bus=virtio-mmio-bus.{number}"),
        }
    }

    /// Returns the words of the kernel's command line. `tsc_khz` is the frequency of the host's time stamp counter, if it has one.
    pub(super) fn kernel_words(&self, tsc_khz: Option<u32>) -> Vec<String> {
        // Under emulation, warnings stay on: one of them says that the guest has lost its timer.
        let loudness = if self.accel == Accel::Tcg { "loglevel=5" } else { "quiet" };
        let mut words = match self.arch {
            // Reboot by a triple fault, which ends the VMM with every kernel; the kernel's default methods may take half a minute on this machine.
            Arch::X86_64 => vec!["console=ttyS0", loudness, "panic=-1", "reboot=t"],
            Arch::Aarch64 => vec!["console=ttyAMA0", loudness, "panic=-1"],
        };
        // Clearing each page and buffer before its use takes an emulated processor about a tenth of its time in a stream.
        let quicker: &[&str] = match (self.accel, self.arch) {
            (Accel::Kvm, _) => &[],
            (Accel::Tcg, Arch::X86_64) => {
                &["mitigations=off", "nokaslr", "no_timer_check", "init_on_alloc=0"]
            }
            (Accel::Tcg, Arch::Aarch64) => &["mitigations=off", "nokaslr", "init_on_alloc=0"],
        };
        words.extend(quicker);
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        if self.accel == Accel::Tcg && self.arch == Arch::X86_64 {
            // On a busy host the guest's own measurement can fail, and without a known rate the guest hangs forever.
            words.extend(tsc_khz.map(|khz| format!("tsc_early_khz={khz}")));
            words.push("tsc=reliable".to_owned());
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arch: Arch, accel: Accel) -> Vec<String> {
        let mut all = Vec::new();
        Machine::new(arch, accel).options(|name, value| all.push(format!("{name} {value}")));
        all
    }

    #[test]
    fn each_architecture_has_a_machine() {
        assert_eq!(
            options(Arch::X86_64, Accel::Tcg),
            ["-machine microvm,accel=tcg,memory-backend=mem0", "-cpu max,erms=off,fsrm=off"]
        );
        assert_eq!(
            options(Arch::Aarch64, Accel::Tcg),
            ["-machine virt,accel=tcg,gic-version=max,memory-backend=mem0", "-cpu max,pauth-impdef=on"]
        );
        assert_eq!(
            options(Arch::Aarch64, Accel::Kvm),
            ["-machine virt,accel=kvm,gic-version=max,memory-backend=mem0", "-cpu host"]
        );
    }

    #[test]
    fn devices_of_virt_are_in_the_order_of_the_command_line() {
        let mut virt = Machine::new(Arch::Aarch64, Accel::Tcg);
        assert_eq!(virt.device("a,drive=d"), "a,drive=d,bus=virtio-mmio-bus.0");
        assert_eq!(virt.device("b"), "b,bus=virtio-mmio-bus.1");
        assert_eq!(Machine::new(Arch::X86_64, Accel::Tcg).device("a"), "a");
    }

    #[test]
    fn only_x86_has_a_time_stamp_counter() {
        let words = |arch, accel, khz| Machine::new(arch, accel).kernel_words(khz).join(" ");
        let quicker = "mitigations=off nokaslr init_on_alloc=0";
        let arm = words(Arch::Aarch64, Accel::Tcg, Some(7));
        assert_eq!(arm, format!("console=ttyAMA0 loglevel=5 panic=-1 {quicker}"));
        assert_eq!(words(Arch::Aarch64, Accel::Kvm, Some(7)), "console=ttyAMA0 quiet panic=-1");
        let x86 = words(Arch::X86_64, Accel::Tcg, Some(7));
        assert!(x86.ends_with(" init_on_alloc=0 tsc_early_khz=7 tsc=reliable"), "{x86}");
        assert_eq!(words(Arch::X86_64, Accel::Kvm, Some(7)), "console=ttyS0 quiet panic=-1 reboot=t");
    }
}
