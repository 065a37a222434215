//! Starts the image's services once the VM is configured.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_schema::Name;
use nexus_schema::link::InitMode;
use nexus_schema::service::Service;
use tokio_util::sync::CancellationToken;

use super::{Agent, Place};
use crate::commands::Orders;
use crate::os::{read_small, reason};
use crate::tools::Call;

/// The directory of service files in an image.
const SERVICES_DIRECTORY: &str = "/etc/nexus/services.d";
/// The maximum number of services.
const SERVICES_MAX: usize = 64;
/// The maximum size of a service file, in bytes.
const FILE_MAX: u64 = 64 << 10;

/// Starts the services in images without another init, and waits until they are ready; returns problems as messages.
pub(super) async fn start(agent: &Arc<Agent>) -> Vec<String> {
    let Some(directory) = directory(&agent.place) else { return Vec::new() };
    let (services, mut problems) = read(&directory);
    if services.is_empty() {
        return problems;
    }
    let call = Call {
        agent: agent.clone(),
        settings: agent.settings(),
        cancel: CancellationToken::new(),
        wants_kill: Arc::default(),
        client: None,
        trace: None,
        tell: None,
    };
    match agent.holder.start_services(call, &Orders { services }).await {
        Ok(more) => problems.extend(more),
        Err(error) => problems.push(format!("services: {}", error.message)),
    }
    problems
}

/// Returns a problem if the image has services: what they remember would be in all VMs that go on from this one.
pub(super) fn refuse(agent: &Agent) -> Option<String> {
    match &agent.place {
        Place::Vm { init: InitMode::System } => Some("the image's own init starts services".to_owned()),
        place => refused(&directory(place)?),
    }
}

fn refused(directory: &Path) -> Option<String> {
    let (services, problems) = read(directory);
    (!services.is_empty() || !problems.is_empty()).then(|| "the image has services".to_owned())
}

/// The directory of service files, unless the image's own init starts its services.
fn directory(place: &Place) -> Option<PathBuf> {
    match place {
        Place::Vm { init: InitMode::Agent } => Some(Path::new(SERVICES_DIRECTORY).to_owned()),
        Place::Vm { init: InitMode::System } => None,
        Place::Process { directory } => Some(directory.join("services.d")),
    }
}

/// Reads the service files of a directory; also returns what is wrong with them.
fn read(directory: &Path) -> (BTreeMap<String, Service>, Vec<String>) {
    let (mut services, mut problems) = (BTreeMap::new(), Vec::new());
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return (services, problems),
        Err(error) => return (services, vec![format!("services: {}", reason(&error))]),
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort_unstable();
    if paths.len() > SERVICES_MAX {
        problems.push(format!("services: {} files, but at most {SERVICES_MAX} are allowed", paths.len()));
        paths.truncate(SERVICES_MAX);
    }
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        match one(&path, &name) {
            Ok(service) => drop(services.insert(name.into_owned(), service)),
            Err(problem) => problems.push(format!("service {}: {problem}", name.escape_debug())),
        }
    }
    (services, problems)
}

fn one(path: &Path, name: &str) -> Result<Service, String> {
    name.parse::<Name>().map_err(|error| error.to_string())?;
    let is_file = std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() <= FILE_MAX);
    let text = path.to_str().filter(|_| is_file).and_then(|path| read_small(path, FILE_MAX));
    let text = text.ok_or_else(|| format!("its file is not text of at most {} KiB", FILE_MAX >> 10))?;
    let service: Service = serde_json::from_str(&text).map_err(|error| format!("its file: {error}"))?;
    service.check()?;
    Ok(service)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_with_a_service_is_no_template() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(refused(&directory.path().join("none")), None);
        std::fs::write(directory.path().join("README"), "no service").unwrap();
        assert_eq!(refused(directory.path()), None);
        std::fs::write(directory.path().join("web.json"), r#"{"command":"x"}"#).unwrap();
        assert!(refused(directory.path()).is_some());
        // Nor is one that only cannot be read.
        std::fs::write(directory.path().join("web.json"), "{}").unwrap();
        assert!(refused(directory.path()).is_some());
    }

    #[test]
    fn files_that_are_no_services_are_told() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read(&directory.path().join("none")), (BTreeMap::new(), Vec::new()));
        for (name, text) in [
            ("web.json", r#"{"command":"x"}"#),
            ("README", "no service"),
            ("Bad Name.json", r#"{"command":"x"}"#),
            ("typo.json", r#"{"comand":"x"}"#),
            ("empty.json", "{}"),
        ] {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        std::fs::create_dir(directory.path().join("folder.json")).unwrap();
        let (services, problems) = read(directory.path());
        assert_eq!(services.keys().collect::<Vec<_>>(), ["web"]);
        let about = [
            "service Bad Name:",
            "service empty: it has neither",
            "service folder: its file is not",
            "service typo: its file:",
        ];
        assert_eq!(problems.len(), about.len(), "{problems:?}");
        for (problem, about) in problems.iter().zip(about) {
            assert!(problem.starts_with(about), "{problem}");
        }
    }
}
