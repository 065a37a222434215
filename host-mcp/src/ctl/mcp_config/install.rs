//! Writes a server into the configuration file of a client.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::client::Client;
use super::{Server, merge};
use crate::ctl::error::Error;

/// The mode of a new file: it may hold a token.
const NEW_MODE: u32 = 0o600;

/// What was done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    Added,
    Removed,
    /// It was so already.
    Nothing,
}

impl Done {
    pub(super) fn told(self, name: &str, file: &Path, client: Client) -> String {
        let (file, client) = (file.display(), client.title());
        match self {
            Self::Added => format!("{name} is in {file} now; restart {client}, or reload its MCP servers"),
            Self::Removed => {
                format!("{name} is no longer in {file}; restart {client}, or reload its MCP servers")
            }
            Self::Nothing => format!("{file} needed no change"),
        }
    }
}

/// Adds a server to a client's file, in the place of one of the same name. The file before is kept as `FILE.bak`.
pub(super) fn add(client: Client, server: &Server, file: &Path) -> Result<Done, Error> {
    let before = read(file)?;
    let text = if client.is_toml() {
        let document = client.document(server)?;
        let rest = without(&before, client, &server.name).map_err(|why| refused(file, &why, client))?;
        match own_table(&before, client, &server.name) == table(&document) {
            true => None,
            false if rest.is_empty() => Some(document),
            false => Some(format!("{}\n\n{document}", rest.trim_end())),
        }
    } else {
        let entry = client.entry(server)?;
        merge::set(&before, client.key(), &server.name, Some(&entry))
            .map_err(|error| refused(file, &error.to_string(), client))?
    };
    let Some(text) = text else { return Ok(Done::Nothing) };
    write(file, &before, &text)?;
    Ok(Done::Added)
}

/// Removes a server from a client's file.
pub(super) fn remove(client: Client, server: &Server, file: &Path) -> Result<Done, Error> {
    let before = read(file)?;
    let text = if client.is_toml() {
        let rest = without(&before, client, &server.name).map_err(|why| refused(file, &why, client))?;
        (rest != before).then_some(rest)
    } else {
        merge::set(&before, client.key(), &server.name, None)
            .map_err(|error| refused(file, &error.to_string(), client))?
    };
    let Some(text) = text else { return Ok(Done::Nothing) };
    write(file, &before, &text)?;
    Ok(Done::Removed)
}

/// A TOML document, if it is one.
fn table(text: &str) -> Option<toml::Table> {
    text.parse().ok()
}

/// The document that has only the server of this name, as it is in a text.
fn own_table(text: &str, client: Client, name: &str) -> Option<toml::Table> {
    let server = table(text)?.get(client.key())?.get(name)?.clone();
    let servers = toml::Table::from_iter([(name.to_owned(), server)]);
    Some(toml::Table::from_iter([(client.key().to_owned(), servers.into())]))
}

/// A TOML text without the tables of one server; everything else keeps its text.
fn without(text: &str, client: Client, name: &str) -> Result<String, String> {
    let mut expected: toml::Table =
        text.parse().map_err(|error: toml::de::Error| error.message().to_owned())?;
    let servers = expected.get_mut(client.key()).and_then(toml::Value::as_table_mut);
    if servers.and_then(|servers| servers.remove(name)).is_none() {
        return Ok(text.to_owned());
    }
    let own = format!("{}.{name}", client.key());
    let mut is_own = false;
    let kept = text.split_inclusive('\n').filter(|line| {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            let header = header.split(']').next().unwrap_or_default().trim();
            is_own = header == own || header.strip_prefix(&own).is_some_and(|rest| rest.starts_with('.'));
        }
        !is_own
    });
    let kept: String = kept.collect();
    // Servers may also be written inline, which this does not edit.
    let mut rest: toml::Table = kept.parse().map_err(|error: toml::de::Error| error.message().to_owned())?;
    for document in [&mut rest, &mut expected] {
        if document.get(client.key()).and_then(toml::Value::as_table).is_some_and(toml::Table::is_empty) {
            document.remove(client.key());
        }
    }
    if rest == expected { Ok(kept) } else { Err(format!("{name} is not in a table [{own}] of its own")) }
}

fn refused(file: &Path, why: &str, client: Client) -> Error {
    let form = if client.is_toml() { "TOML" } else { "JSON without comments" };
    Error::Usage {
        message: format!("cannot change {}: {why}", file.display()),
        hint: Some(format!("nexusctl changes only {form}: add by hand what `nexusctl mcp config` prints")),
    }
}

fn read(file: &Path) -> Result<String, Error> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(Error::File { what: "read", path: file.to_owned(), source }),
    }
}

/// Replaces a file as a whole, unless it is no longer what it was. A symbolic link stays, and its target is replaced.
fn write(file: &Path, before: &str, text: &str) -> Result<(), Error> {
    let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let beside = |end: &str| {
        let mut name = file.file_name().unwrap_or_default().to_owned();
        name.push(end);
        file.with_file_name(name)
    };
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { what: "write", path, source }
    };
    if let Some(directory) = file.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::create_dir_all(directory).map_err(failed(directory))?;
    }
    let mode = fs::metadata(&file).map_or(NEW_MODE, |meta| meta.permissions().mode() & 0o777);
    let put = |path: PathBuf, text: &str| -> Result<PathBuf, Error> {
        // A leftover of an interrupted run, or an older copy.
        let _gone = fs::remove_file(&path);
        let mut to = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path)
            .map_err(failed(&path))?;
        to.write_all(text.as_bytes()).and_then(|()| to.sync_all()).map_err(failed(&path))?;
        Ok(path)
    };
    if !before.is_empty() {
        put(beside(".bak"), before)?;
    }
    let new = put(beside(".nexus-new"), text)?;
    if read(&file)? != before {
        let _gone = fs::remove_file(&new);
        return Err(Error::usage(format!(
            "{} was changed by another program meanwhile: run this again",
            file.display()
        )));
    }
    fs::rename(&new, &file).map_err(failed(&file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::mcp_config::Way;

    fn server(command: &str) -> Server {
        let way =
            Way::Stdio { command: command.into(), args: vec!["mcp".into()], env: serde_json::Map::new() };
        Server { name: "nexus".into(), way }
    }

    #[test]
    fn a_json_file_is_made_changed_and_cleaned() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("deep/er/mcp.json");
        let text = || fs::read_to_string(&file).unwrap();
        assert_eq!(add(Client::Cursor, &server("/a"), &file).unwrap(), Done::Added);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(add(Client::Cursor, &server("/a"), &file).unwrap(), Done::Nothing);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(add(Client::Cursor, &server("/b"), &file).unwrap(), Done::Added);
        assert!(text().contains("/b") && !text().contains("/a"), "{}", text());
        assert!(fs::read_to_string(file.with_file_name("mcp.json.bak")).unwrap().contains("/a"));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(remove(Client::Cursor, &server("/b"), &file).unwrap(), Done::Removed);
        assert_eq!(text(), "{\n  \"mcpServers\": {}\n}\n");
        assert_eq!(remove(Client::Cursor, &server("/b"), &file).unwrap(), Done::Nothing);
        let entries = fs::read_dir(file.parent().unwrap()).unwrap().count();
        assert_eq!(entries, 2, "the file and the one before");
    }

    #[test]
    fn a_link_stays_a_link_and_a_file_with_comments_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("real.json"), directory.path().join("settings.json"));
        fs::write(&file, "{ // mine\n}\n").unwrap();
        std::os::unix::fs::symlink("real.json", &link).unwrap();
        let error = add(Client::Zed, &server("/a"), &link).unwrap_err().to_string();
        assert!(error.contains("settings.json") && error.contains("line 1"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "{ // mine\n}\n");
        fs::write(&file, "{}").unwrap();
        add(Client::Zed, &server("/a"), &link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::read_to_string(&file).unwrap().contains("context_servers"));
    }

    #[test]
    fn a_toml_file_keeps_its_comments() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.toml");
        let mine = "# mine\nmodel = \"m\"\n\n[mcp_servers.other]\ncommand = \"o\" # why\n";
        fs::write(&file, mine).unwrap();
        assert_eq!(add(Client::Codex, &server("/a"), &file).unwrap(), Done::Added);
        assert_eq!(add(Client::Codex, &server("/a"), &file).unwrap(), Done::Nothing);
        assert_eq!(add(Client::Codex, &server("/b"), &file).unwrap(), Done::Added);
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with(mine.trim_end()), "{text}");
        let document: toml::Table = text.parse().unwrap();
        assert_eq!(document["mcp_servers"]["nexus"]["command"].as_str(), Some("/b"));
        assert_eq!(document["mcp_servers"].as_table().unwrap().len(), 2);
        assert_eq!(remove(Client::Codex, &server("/b"), &file).unwrap(), Done::Removed);
        assert_eq!(fs::read_to_string(&file).unwrap().trim_end(), mine.trim_end());
        fs::write(&file, "mcp_servers = { nexus = { command = \"x\" } }\n").unwrap();
        assert!(add(Client::Codex, &server("/a"), &file).is_err());
    }
}
