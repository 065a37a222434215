//! Checks of the arguments of `vm_create`. All mistakes are reported at once, before anything changes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use nexus_schema::limits::CONFIGURE_MAX;
use nexus_schema::link::ImageConfig;
use nexus_schema::network::{NetworkMode, NetworkPolicy};
use nexus_schema::tools::vm::{IdleAction, VmCreateParams};
use nexus_schema::{ByteSize, Name, TimeSpan, ToolError};

use crate::egress;
use crate::os::paths::GUEST_PROGRAMS;
use crate::store::vms::{TmpPlace, VmSpec};
use crate::vmm::Caps;

/// Maximum number of virtual CPUs that both drivers allow.
pub(crate) const VCPUS_MAX: u32 = 32;
/// Minimum memory that the distribution's kernel boots with.
pub(crate) const MEMORY_MIN: ByteSize = ByteSize::mib(96);
/// Maximum memory.
pub(crate) const MEMORY_MAX: ByteSize = ByteSize::gib(1024);
/// Maximum size of the environment, in bytes.
const ENV_MAX: usize = CONFIGURE_MAX / 8;
/// Maximum size of the files as passed in the call, in bytes.
const FILES_MAX: usize = 1 << 20;
/// Minimum size of a root drive.
pub(crate) const DISK_MIN: ByteSize = ByteSize::mib(16);
/// Maximum size of a root drive: what ext4 with 4 KiB blocks and the usual options can grow to.
pub(crate) const DISK_MAX: ByteSize = ByteSize::gib(16 * 1024);

/// The longest command of a run, in bytes: it is in the VM's row.
const RUN_MAX: usize = 64 << 10;

/// Default size of a drive.
pub(crate) const DISK_DEFAULT: ByteSize = ByteSize::gib(8);

/// Default image of VMs.
pub(crate) const DEFAULT_IMAGE: &str = "debian";
/// Default kernel of VMs.
pub(crate) const DEFAULT_KERNEL: &str = "debian";

/// Checks the arguments and fills in all defaults. The error lists all mistakes.
pub(crate) fn check(params: &VmCreateParams, name: &Name, defaults: &Defaults) -> Result<VmSpec, ToolError> {
    let mut mistakes = Vec::new();
    let mut wrong = |mistake: String| mistakes.push(mistake);

    let vcpus = params.vcpus.unwrap_or(defaults.vcpus);
    let memory = params.memory.unwrap_or(defaults.memory);
    let disk = params.disk.unwrap_or(defaults.disk);
    for mistake in [check_vcpus(vcpus), check_memory(memory), check_disk(disk)] {
        if let Err(mistake) = mistake {
            wrong(mistake);
        }
    }
    let hostname = params.hostname.clone().unwrap_or_else(|| name.to_string());
    if !is_hostname(&hostname) {
        wrong(format!("hostname `{}` is invalid: use 1 to 64 of a-z, A-Z, 0-9, - and .", shorten(&hostname)));
    }
    for (key, value) in &params.env {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            wrong(format!("env variable `{}` has an invalid name or value", shorten(key)));
        }
    }
    for (path, file) in &params.files {
        if !path.starts_with('/')
            || path.ends_with('/')
            || path.contains('\0')
            || path.split('/').any(|p| p == "..")
        {
            wrong(format!("files has `{}`, which is not an absolute path of a file", shorten(path)));
        }
        if let Err(mistake) = file.resolve() {
            wrong(format!("files has `{}`: {mistake}", shorten(path)));
        }
    }
    let env: usize = params.env.iter().map(|(key, value)| key.len() + value.len() + 32).sum();
    if env > ENV_MAX {
        wrong(format!("env has {env} bytes, more than {ENV_MAX}"));
    }
    let files: usize = params.files.iter().map(|(path, file)| path.len() + file.size() + 128).sum();
    if files > FILES_MAX {
        wrong(format!(
            "files has {files} bytes, more than {FILES_MAX}: copy larger files with guest_copy_in or guest_file_write"
        ));
    }
    if let Some(line) = &params.run {
        if line.trim().is_empty() || line.len() > RUN_MAX || line.contains('\0') {
            wrong(format!("run is empty, longer than {RUN_MAX} bytes, or holds a zero byte"));
        }
        if params.start == Some(false) || params.protected == Some(true) {
            wrong(
                "run needs a VM that starts at once and can be deleted: leave start and protected out".into(),
            );
        }
    }
    check_tags(&params.tags, &mut wrong);
    let network = egress::starting(defaults.network, params.network.as_ref()).unwrap_or_else(|mistake| {
        wrong(mistake);
        NetworkPolicy::default()
    });
    let from = params.from.clone().unwrap_or_else(|| defaults.image.clone());
    let kernel = params.kernel.clone().unwrap_or_else(|| defaults.kernel.clone());
    for (what, text) in [("from", &from), ("kernel", &kernel)] {
        if text.is_empty() || text.len() > 4096 || text.contains('\0') {
            wrong(format!("{what} is empty or too long"));
        }
    }

    let checkpoints = params.checkpoints.or(defaults.checkpoints);
    if params.idle_action == Some(IdleAction::Suspend) && checkpoints != Some(true) {
        wrong("idle_action suspend needs checkpoints: true".into());
    }
    if !mistakes.is_empty() {
        return Err(ToolError::invalid(mistakes.join("; ")));
    }
    // The default is of those that can be suspended only. The driver may still decide that one cannot.
    let can_sleep = checkpoints != Some(false) && params.run.is_none();
    let idle_action = params.idle_action.unwrap_or(defaults.idle_action);
    Ok(VmSpec {
        vcpus,
        memory,
        disk,
        disk_given: params.disk.is_some(),
        dns: defaults.dns.clone(),
        driver: params.driver.unwrap_or_default(),
        init: params.init.unwrap_or_default(),
        network,
        hostname,
        env: params.env.clone(),
        working_dir: None,
        image_user: None,
        tmp: defaults.tmp,
        wait_for_init: defaults.wait_for_init,
        files: params.files.clone(),
        from,
        kernel,
        start: params.start.unwrap_or(true),
        idle_stop: Some(params.idle_stop.unwrap_or(defaults.idle_stop)).filter(|limit| !limit.is_zero()),
        idle_action: if can_sleep { idle_action } else { IdleAction::Stop },
        checkpoints: checkpoints.unwrap_or(false),
        run: params.run.clone(),
        warm: None,
    })
}

/// Fills in environment, working directory and user from the image's configuration. Variables that the caller set override the image's.
pub(crate) fn take_defaults(spec: &mut VmSpec, image: &ImageConfig) {
    for (name, value) in &image.env {
        let value = match name.as_str() {
            "PATH" => format!("{GUEST_PROGRAMS}:{value}"),
            _ => value.clone(),
        };
        spec.env.entry(name.clone()).or_insert(value);
    }
    spec.working_dir.clone_from(&image.working_dir);
    spec.image_user.clone_from(&image.user);
}

/// The defaults for new VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Defaults {
    /// Image.
    pub(crate) image: String,
    /// Kernel.
    pub(crate) kernel: String,
    /// Virtual CPUs.
    pub(crate) vcpus: u32,
    /// Memory.
    pub(crate) memory: ByteSize,
    /// Size of the root drive.
    pub(crate) disk: ByteSize,
    /// Name servers.
    pub(crate) dns: Vec<IpAddr>,
    /// Location of `/tmp`.
    pub(crate) tmp: TmpPlace,
    /// Whether a VM counts as ready only after its own init has started the system.
    pub(crate) wait_for_init: bool,
    /// Network mode.
    pub(crate) network: NetworkMode,
    /// How long they live; zero for ever.
    pub(crate) ttl: TimeSpan,
    /// How long they may be idle; zero for ever.
    pub(crate) idle_stop: TimeSpan,
    /// What happens to them then.
    pub(crate) idle_action: IdleAction,
    /// Whether checkpoints of them can be taken; `None` where that costs nothing.
    pub(crate) checkpoints: Option<bool>,
    /// Whether those of which they can be taken go on from a machine that was booted before.
    pub(crate) warm_start: bool,
    /// How many machines wait for VMs of which images.
    pub(crate) warm_pool: BTreeMap<String, u32>,
}

impl Defaults {
    /// Returns whether checkpoints of a VM can be taken, now that its driver is known. With a driver where that costs nothing they can, unless somebody
    /// said otherwise.
    pub(crate) fn allow_checkpoints(&self, asked: Option<bool>, driver: &Caps) -> bool {
        asked.or(self.checkpoints).unwrap_or(driver.checkpoint && driver.saves_vsock)
    }

    /// Returns whether somebody said that checkpoints of a VM are to be possible, by its arguments or by a setting.
    pub(crate) fn asks_for_checkpoints(&self, asked: Option<bool>) -> bool {
        asked.or(self.checkpoints).unwrap_or(false)
    }
}

impl Defaults {
    /// Returns the defaults of an installation without changed settings.
    pub(crate) fn built_in() -> Self {
        Self {
            image: DEFAULT_IMAGE.into(),
            kernel: DEFAULT_KERNEL.into(),
            vcpus: 1,
            memory: ByteSize::gib(1),
            disk: ByteSize::gib(8),
            dns: Vec::new(),
            tmp: TmpPlace::default(),
            wait_for_init: true,
            network: NetworkMode::Proxy,
            ttl: TimeSpan::default(),
            idle_stop: TimeSpan::default(),
            idle_action: IdleAction::Stop,
            checkpoints: None,
            warm_start: false,
            warm_pool: BTreeMap::new(),
        }
    }
}

/// Fails if the number of virtual CPUs is out of range.
pub(crate) fn check_vcpus(vcpus: u32) -> Result<(), String> {
    if (1..=VCPUS_MAX).contains(&vcpus) {
        Ok(())
    } else {
        Err(format!("vcpus must be 1 to {VCPUS_MAX}, got {vcpus}"))
    }
}

/// Fails if the size of the memory is out of range or not whole MiB.
pub(crate) fn check_memory(memory: ByteSize) -> Result<(), String> {
    if memory < MEMORY_MIN || memory > MEMORY_MAX {
        Err(format!(
            "memory must be {MEMORY_MIN} to {MEMORY_MAX}, got {memory}{}",
            with_unit(memory, MEMORY_MIN)
        ))
    } else if !memory.as_bytes().is_multiple_of(1 << 20) {
        Err(format!("memory must be a whole number of MiB, got {memory}"))
    } else {
        Ok(())
    }
}

/// Fails if a VM would have more memory than the host, with what the host has in all.
pub(crate) fn check_fits(memory: ByteSize, host: ByteSize) -> Result<(), ToolError> {
    if memory <= host {
        return Ok(());
    }
    let host = ByteSize::mib(host.as_mib());
    let message = format!("memory is {memory}, more than this host has in all, {host}");
    Err(ToolError::invalid(message)
        .hint(format!("give memory of at most {host}; the default is the setting default.memory")))
}

/// Fails if the size of a root drive is out of range or not a multiple of 4 KiB.
pub(crate) fn check_disk(disk: ByteSize) -> Result<(), String> {
    if disk < DISK_MIN || disk > DISK_MAX {
        Err(format!("disk must be {DISK_MIN} to {DISK_MAX}, got {disk}{}", with_unit(disk, DISK_MIN)))
    } else if !disk.as_bytes().is_multiple_of(4096) {
        Err(format!("disk must be a multiple of 4KiB, got {disk}"))
    } else {
        Ok(())
    }
}

/// Returns the end of an error message for a number that was probably meant as MiB or GiB.
fn with_unit(size: ByteSize, least: ByteSize) -> String {
    let number = size.as_bytes();
    if number == 0 || number >= 1 << 20 {
        return String::new();
    }
    let [mib, gib] = [ByteSize::mib(number), ByteSize::gib(number)];
    let meant = if mib >= least { mib } else { gib };
    format!("; a number without a unit is in bytes: write {meant} if you mean that")
}

/// Checks tags.
pub(crate) fn check_tags(tags: &BTreeMap<String, String>, wrong: &mut impl FnMut(String)) {
    if tags.len() > 64 {
        wrong(format!("at most 64 tags, got {}", tags.len()));
    }
    for (key, value) in tags {
        if key.is_empty() || key.len() > 63 || value.len() > 255 || key.contains(char::is_control) {
            wrong(format!(
                "tag `{}` is invalid: keys have 1 to 63 bytes without control characters, values at most 255 bytes",
                shorten(key)
            ));
        }
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(60).flat_map(char::escape_debug).collect()
}

fn is_hostname(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

#[cfg(test)]
mod tests {
    use nexus_schema::tools::vm::VmFile;

    use super::*;

    #[test]
    fn checkpoints_are_allowed_where_they_cost_nothing_unless_somebody_says_otherwise() {
        use nexus_schema::DriverKind::{Firecracker, Process, Qemu};
        let [qemu, firecracker, process] = [Qemu, Firecracker, Process].map(Caps::of);
        let allowed = |setting, asked, driver: &Caps| {
            Defaults { checkpoints: setting, ..defaults() }.allow_checkpoints(asked, driver)
        };
        assert!(allowed(None, None, &firecracker));
        assert!(!allowed(None, None, &qemu) && !allowed(None, None, &process));
        assert!(allowed(Some(true), None, &qemu) && !allowed(Some(false), None, &firecracker));
        assert!(allowed(Some(false), Some(true), &qemu));
        assert!(!allowed(Some(true), Some(false), &firecracker));
        let asks =
            |setting, asked| Defaults { checkpoints: setting, ..defaults() }.asks_for_checkpoints(asked);
        assert!(asks(Some(true), None) && asks(None, Some(true)));
        assert!(!asks(None, None) && !asks(Some(true), Some(false)));
    }

    fn defaults() -> Defaults {
        Defaults::built_in()
    }

    #[test]
    fn nothing_asked_for_is_a_whole_spec() {
        let spec = check(&VmCreateParams::default(), &"web".parse().unwrap(), &defaults()).unwrap();
        assert_eq!((spec.vcpus, spec.memory, spec.disk), (1, ByteSize::gib(1), ByteSize::gib(8)));
        assert_eq!((spec.hostname.as_str(), spec.from.as_str()), ("web", "debian"));
    }

    #[test]
    fn a_number_that_lacks_its_unit_is_told_which() {
        let said = check_memory(ByteSize::bytes(512)).unwrap_err();
        assert_eq!(
            said,
            "memory must be 96MiB to 1TiB, got 512B; a number without a unit is in bytes: write 512MiB if you mean that"
        );
        assert!(check_disk(ByteSize::bytes(8)).unwrap_err().ends_with("write 8GiB if you mean that"));
        assert!(!check_memory(ByteSize::mib(64)).unwrap_err().contains("unit"));
        check_memory(ByteSize::mib(96)).unwrap();
    }

    #[test]
    fn memory_beyond_the_hosts_is_refused_with_what_the_host_has() {
        let host = ByteSize::bytes((23 << 30) + 4096);
        for memory in [ByteSize::gib(1), ByteSize::gib(23), host] {
            check_fits(memory, host).unwrap();
        }
        let error = check_fits(ByteSize::gib(24), host).unwrap_err();
        assert_eq!(error.code, nexus_schema::ErrorCode::InvalidArgument);
        assert_eq!(error.message, "memory is 24GiB, more than this host has in all, 23GiB");
        assert!(error.hint.unwrap().contains("23GiB"));
        let error = check_fits(ByteSize::gib(900), ByteSize::mib(24_001)).unwrap_err();
        assert!(error.message.ends_with("has in all, 24001MiB"), "{error}");
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let params = VmCreateParams {
            vcpus: Some(0),
            memory: Some(ByteSize::mib(1)),
            disk: Some(ByteSize::bytes(1 << 60)),
            hostname: Some("-".into()),
            env: [("A=B".to_string(), String::new())].into(),
            files: [
                ("relative".to_string(), VmFile::default()),
                ("/a/../b".to_string(), VmFile::default()),
                ("/c".to_string(), VmFile { mode: Some("9".into()), ..VmFile::default() }),
            ]
            .into(),
            tags: [(String::new(), String::new())].into(),
            ..Default::default()
        };
        let error = check(&params, &"web".parse().unwrap(), &defaults()).unwrap_err();
        for word in
            ["vcpus", "memory", "disk", "hostname", "env", "relative", "/a/../b", "`9` is not a mode", "tag"]
        {
            assert!(error.message.contains(word), "{word} in {error}");
        }
    }
}
