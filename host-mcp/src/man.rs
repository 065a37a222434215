//! Manual pages, made from the definition of a command line. Packages ship them; nothing reads them at run time.

use std::io;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;

/// The section of commands for users.
pub const USERS: &str = "1";
/// The section of daemons and commands for administrators.
pub const ADMINISTRATORS: &str = "8";

/// Writes a page for a command and one for each of its visible subcommands, such as `nexusctl-vm-create.1`, into a directory, which is made
/// if it is missing. The same command makes the same bytes.
///
/// # Errors
/// The directory cannot be made, or a page cannot be written.
pub fn write(command: Command, section: &str, directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    pages(&command, section, directory)
}

fn pages(command: &Command, section: &str, directory: &Path) -> io::Result<()> {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        pages(sub, section, directory)?;
    }
    let page = Man::new(command.clone()).section(section).manual("Nexus");
    page.source(concat!("Nexus ", env!("CARGO_PKG_VERSION"))).generate_to(directory)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_visible_command_has_a_page() {
        let command = || {
            let create = Command::new("create").about("Creates one");
            let vm = Command::new("vm").about("Virtual machines").subcommand(create);
            Command::new("tool").version("9").subcommand(vm).subcommand(Command::new("secret").hide(true))
        };
        let directory = tempfile::tempdir().unwrap();
        let made = directory.path().join("share/man8");
        write(command(), ADMINISTRATORS, &made).unwrap();
        let mut names: Vec<_> =
            std::fs::read_dir(&made).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["tool-vm-create.8", "tool-vm.8", "tool.8"]);
        let read = |name: &str| std::fs::read_to_string(made.join(name)).unwrap();
        let page = read("tool-vm-create.8");
        assert!(page.contains("Creates one") && page.contains(env!("CARGO_PKG_VERSION")), "{page}");
        assert!(!read("tool.8").contains("secret"));
        write(command(), ADMINISTRATORS, &made).unwrap();
        assert_eq!(read("tool-vm-create.8"), page);
    }
}
