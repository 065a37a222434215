//! `nexusctl guest read|write|ls|stat|rm`: files inside a VM.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use data_encoding::BASE64;
use nexus_schema::id::VmKind;
use nexus_schema::limits::{FILE_READ_MAX, FILE_WRITE_MAX};
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::file::{
    FileDelete, FileDeleteOutput, FileDeleteParams, FileEntry, FileList, FileListParams, FileRead,
    FileReadOutput, FileReadParams, FileStat, FileStatParams, FileType, FileWrite, FileWriteOutput,
    FileWriteParams,
};
use nexus_schema::{Reference, Tool};
use serde_json::{Map, Value, json};

use crate::ctl::App;
use crate::ctl::client::{Client, Options, raw};
use crate::ctl::error::Error;
use crate::ctl::format;
use crate::ctl::guest::exec::not_asked_for;
use crate::ctl::ui::{Format, Mood, Table, Text};

/// How many entries of a directory one call requests.
const PAGE: u32 = 2000;
/// How many entries are listed by default.
const ENTRIES: usize = 100_000;

/// What to read.
#[derive(Debug, Args)]
pub(crate) struct ReadArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Absolute path in the VM
    path: String,
    /// Where to start, in bytes
    #[arg(long, default_value_t = 0)]
    offset: u64,
    /// Maximum number of bytes [default: all]
    #[arg(long)]
    limit: Option<u64>,
    /// Act as this user in the VM: a name, a uid, uid:gid, or `image` for the image's user [default: root]
    #[arg(short, long)]
    user: Option<String>,
}

/// What to write where.
#[derive(Debug, Args)]
pub(crate) struct WriteArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Absolute path in the VM
    path: String,
    /// A local file [default: standard input]
    #[arg(value_name = "FILE")]
    from: Option<PathBuf>,
    /// The content itself, instead of a file
    #[arg(long, value_name = "TEXT", conflicts_with = "from")]
    content: Option<String>,
    /// Permission bits in octal [default: those of the file it replaces, else 0644]
    #[arg(short, long)]
    mode: Option<String>,
    /// Append to the file
    #[arg(short, long)]
    append: bool,
    /// Do not create missing parent directories
    #[arg(long)]
    no_parents: bool,
    /// Act as this user in the VM: a name, a uid, uid:gid, or `image` for the image's user [default: root]
    #[arg(short, long)]
    user: Option<String>,
}

/// Which directory.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Absolute path of a directory in the VM
    #[arg(default_value = "/")]
    path: String,
    /// Maximum depth
    #[arg(short, long, value_parser = clap::value_parser!(u32).range(1..=16))]
    depth: Option<u32>,
    /// Act as this user in the VM: a name, a uid, uid:gid, or `image` for the image's user [default: root]
    #[arg(short, long)]
    user: Option<String>,
}

/// Which file.
#[derive(Debug, Args)]
pub(crate) struct StatArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Absolute path in the VM
    path: String,
    /// Show what a symbolic link points to
    #[arg(short = 'L', long)]
    follow: bool,
    /// Act as this user in the VM: a name, a uid, uid:gid, or `image` for the image's user [default: root]
    #[arg(short, long)]
    user: Option<String>,
}

/// What to delete.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// The VM: its name or id
    vm: Reference<VmKind>,
    /// Absolute path in the VM
    path: String,
    /// Delete a directory with all its contents
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    /// Act as this user in the VM: a name, a uid, uid:gid, or `image` for the image's user [default: root]
    #[arg(short, long)]
    user: Option<String>,
}

/// Writes a file of a VM to stdout.
pub(super) async fn read(app: &App, args: ReadArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let vm = args.vm.to_string();
    let end = args.limit.map_or(u64::MAX, |limit| args.offset.saturating_add(limit));
    let mut offset = args.offset;
    let mut whole = Vec::new();
    loop {
        let params = FileReadParams {
            path: args.path.clone(),
            offset: Some(offset),
            limit: Some((end - offset).clamp(1, FILE_READ_MAX)),
            encoding: Some(ContentEncoding::Base64),
            user: args.user.clone(),
            ..FileReadParams::default()
        };
        let reply = client.call_guest::<FileRead>(&vm, &params, Options::default()).await?;
        let facts: FileReadOutput = reply.facts(FileRead::NAME, FileRead::SHAPE)?;
        let content = reply.stream("content").unwrap_or_default();
        let not_base64 = |_| not_asked_for("the file's content is not base64");
        let mut bytes = BASE64.decode(content.as_bytes()).map_err(not_base64)?;
        let read = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        bytes.truncate(usize::try_from(end - offset).unwrap_or(usize::MAX));
        offset = offset.saturating_add(read);
        if app.ui.is_json() {
            whole.extend(bytes);
        } else {
            app.ui.bytes(&bytes)?;
        }
        if facts.eof || read == 0 || offset >= end {
            if app.ui.is_json() {
                app.ui.json(&raw(&read_as_json(&facts, args.offset, &whole))?)?;
            }
            return Ok(0);
        }
    }
}

fn read_as_json(last: &FileReadOutput, offset: u64, whole: &[u8]) -> Value {
    let mut value = json!(last);
    value["offset"] = offset.into();
    value["read_bytes"] = whole.len().into();
    value["lossy"] = false.into();
    match std::str::from_utf8(whole) {
        Ok(text) => value["text"] = text.into(),
        Err(_) => value["base64"] = BASE64.encode(whole).into(),
    }
    value
}

/// Writes to a file in a VM: atomically up to the limit of one call, larger ones piece by piece.
pub(super) async fn write(app: &App, args: WriteArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let vm = args.vm.to_string();
    let mut source: Box<dyn Read + Send> = match (&args.content, &args.from) {
        (Some(text), _) => Box::new(std::io::Cursor::new(text.clone().into_bytes())),
        (None, Some(path)) => {
            let opened = std::fs::File::open(path);
            Box::new(opened.map_err(|source| Error::File { what: "open", path: path.clone(), source })?)
        }
        (None, None) => Box::new(std::io::stdin()),
    };
    let mut params = FileWriteParams {
        path: args.path,
        content: String::new(),
        encoding: Some(ContentEncoding::Base64),
        mode: args.mode,
        create_parents: args.no_parents.then_some(false),
        append: args.append.then_some(true),
        user: args.user,
        ..FileWriteParams::default()
    };
    let mut total: Option<FileWriteOutput> = None;
    loop {
        let (returned, piece) = next_piece(source).await?;
        source = returned;
        if piece.is_empty() && total.is_some() {
            break;
        }
        params.content = BASE64.encode(&piece);
        let written = write_piece(&mut client, &vm, &params).await?;
        total = Some(match total {
            None => written,
            Some(before) => FileWriteOutput {
                written_bytes: before.written_bytes + written.written_bytes,
                created: before.created,
                ..written
            },
        });
        if u64::try_from(piece.len()).unwrap_or(0) < FILE_WRITE_MAX {
            break;
        }
        params.append = Some(true);
    }
    let Some(total) = total else { return Ok(0) };
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&total)?)?,
        Format::Quiet => app.ui.line(&total.path)?,
        Format::Human => {
            let word = if total.created { "created" } else { "wrote" };
            app.ui.say(&format!("{word} {} ({})", format::tame(&total.path), format::size(total.size_bytes)));
        }
    }
    Ok(0)
}

async fn write_piece(
    client: &mut Client,
    vm: &str,
    params: &FileWriteParams,
) -> Result<FileWriteOutput, Error> {
    let reply = client.call_guest::<FileWrite>(vm, params, Options::default()).await?;
    reply.facts(FileWrite::NAME, FileWrite::SHAPE)
}

/// Reads as much as one call can carry; less only at the end.
async fn next_piece(mut source: Box<dyn Read + Send>) -> Result<(Box<dyn Read + Send>, Vec<u8>), Error> {
    let reading = tokio::task::spawn_blocking(move || {
        let mut piece = Vec::new();
        let result = source.by_ref().take(FILE_WRITE_MAX).read_to_end(&mut piece);
        (source, result.map(|_| piece))
    });
    tokio::select! {
        result = reading => match result {
            Ok((source, piece)) => Ok((source, piece.map_err(|source| Error::Input { source })?)),
            Err(_) => Err(Error::Unexpected { what: "the reader of the content was lost".into() }),
        },
        _ = tokio::signal::ctrl_c() => Err(Error::Interrupted),
    }
}

/// Lists a directory, all pages of it.
pub(super) async fn ls(app: &App, args: LsArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let vm = args.vm.to_string();
    let mut params = FileListParams {
        path: args.path,
        depth: args.depth,
        limit: Some(PAGE),
        user: args.user,
        ..FileListParams::default()
    };
    let mut entries: Vec<Value> = Vec::new();
    let mut listed: Map<String, Value>;
    loop {
        let reply = client.call_guest::<FileList>(&vm, &params, Options::default()).await?;
        listed = reply.facts(FileList::NAME, FileList::SHAPE)?;
        if let Some(Value::Array(more)) = listed.remove("entries") {
            entries.extend(more);
        }
        let next = listed.get("next_cursor").and_then(Value::as_str).map(str::to_owned);
        if next.is_none() || next == params.cursor || entries.len() >= ENTRIES {
            break;
        }
        params.cursor = next;
    }
    if entries.len() >= ENTRIES {
        app.ui.warn(&format!("only the first {} entries are listed", entries.len()));
    }
    if app.ui.is_json() {
        listed.insert("entries".into(), entries.into());
        app.ui.json(&raw(&listed)?)?;
        return Ok(0);
    }
    let garbled = |source| Error::Garbled { during: FileList::NAME.into(), source };
    let entries: Vec<FileEntry> = serde_json::from_value(entries.into()).map_err(garbled)?;
    match app.ui.format {
        Format::Quiet => {
            let text: String =
                entries.iter().map(|entry| format!("{}\n", format::tame(&entry.path))).collect();
            app.ui.bytes(text.as_bytes())?;
        }
        Format::Json | Format::Human => app.ui.table(entries_table(&entries))?,
    }
    Ok(0)
}

/// Shows one file's attributes.
pub(super) async fn stat(app: &App, args: StatArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params = FileStatParams { path: args.path, follow: args.follow.then_some(true), user: args.user };
    let reply = client.call_guest::<FileStat>(&args.vm.to_string(), &params, Options::default()).await?;
    let entry: FileEntry = reply.facts(FileStat::NAME, FileStat::SHAPE)?;
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => app.ui.line(&format::tame(&entry.path))?,
        Format::Human => {
            let mut table = Table::of_facts();
            table.fact("path", format::file_name(&entry.path));
            table.maybe("target", entry.target.as_deref().map(format::file_name));
            table.fact("type", kind_word(entry.kind));
            table.fact("size", format!("{} ({} bytes)", format::size(entry.size_bytes), entry.size_bytes));
            table.fact("mode", &entry.mode);
            table.fact("owner", format!("{}:{}", entry.uid, entry.gid));
            table.fact("modified", entry.modified_at);
            app.ui.table(table)?;
        }
    }
    Ok(0)
}

/// Deletes a file.
pub(super) async fn rm(app: &App, args: RmArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let params =
        FileDeleteParams { path: args.path, recursive: args.recursive.then_some(true), user: args.user };
    let reply = client.call_guest::<FileDelete>(&args.vm.to_string(), &params, Options::default()).await?;
    let gone: FileDeleteOutput = reply.facts(FileDelete::NAME, FileDelete::SHAPE)?;
    match app.ui.format {
        Format::Json => app.ui.json(reply.structured.as_ref().unwrap_or(&reply.raw))?,
        Format::Quiet => {}
        Format::Human => {
            let count =
                if gone.deleted == 1 { String::new() } else { format!(" ({} entries)", gone.deleted) };
            app.ui.say(&format!("deleted {}{count}", format::tame(&gone.path)));
        }
    }
    Ok(0)
}

fn kind_word(kind: FileType) -> &'static str {
    match kind {
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::BlockDevice => "block device",
        FileType::CharDevice => "character device",
        FileType::Fifo => "named pipe",
        FileType::Socket => "socket",
    }
}

/// Type and permissions as `ls -l` writes them.
fn long_mode(entry: &FileEntry) -> String {
    let kind = match entry.kind {
        FileType::File => '-',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::BlockDevice => 'b',
        FileType::CharDevice => 'c',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
    };
    let Ok(mode) = u32::from_str_radix(&entry.mode, 8) else { return format!("{kind}{}", entry.mode) };
    let mut text = String::from(kind);
    for (shift, special, letters) in
        [(6, 0o4000, ['s', 'S']), (3, 0o2000, ['s', 'S']), (0, 0o1000, ['t', 'T'])]
    {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, false) => 'x',
            (false, false) => '-',
            (true, true) => letters[0],
            (false, true) => letters[1],
        });
    }
    text
}

fn entries_table(entries: &[FileEntry]) -> Table {
    let mut table = Table::with_headings(&["MODE", "OWNER", "SIZE", "MODIFIED", "PATH"])
        .dropping(&["OWNER", "MODIFIED", "SIZE", "MODE"]);
    for entry in entries {
        let path = match &entry.target {
            Some(target) => format!("{} -> {}", format::file_name(&entry.path), format::file_name(target)),
            None => format::file_name(&entry.path),
        };
        let mood = if entry.kind == FileType::Directory { Mood::Good } else { Mood::Plain };
        table.row([
            long_mode(entry).into(),
            format!("{}:{}", entry.uid, entry.gid).into(),
            format::size(entry.size_bytes).into(),
            entry.modified_at.into(),
            Text::new(path, mood),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str, mode: &str) -> FileEntry {
        serde_json::from_value(
            json!({ "path": "x", "type": kind, "size_bytes": 2048, "mode": mode, "uid": 0, "gid": 5,
            "modified_at": "2026-01-02T03:04:05Z" }),
        )
        .unwrap()
    }

    #[test]
    fn modes_read_like_ls() {
        for (kind, mode, text) in [
            ("file", "0644", "-rw-r--r--"),
            ("directory", "1777", "drwxrwxrwt"),
            ("file", "4755", "-rwsr-xr-x"),
            ("file", "2644", "-rw-r-Sr--"),
            ("symlink", "0777", "lrwxrwxrwx"),
            ("fifo", "odd", "podd"),
        ] {
            assert_eq!(long_mode(&entry(kind, mode)), text);
        }
    }

    #[test]
    fn entries_are_aligned() {
        let mut link = entry("symlink", "0777");
        link.target = Some("/bin/busybox".into());
        let mut odd = entry("file", "0644");
        odd.path = "a\u{202e}txt.exe".into();
        let odd = entries_table(&[odd]).render(None, false);
        assert!(odd.contains("  a\\xe2\\x80\\xaetxt.exe\n"), "{odd}");
        insta::assert_snapshot!(entries_table(&[entry("file", "0644"), link]).render(None, false), @"
        MODE        OWNER  SIZE   MODIFIED                  PATH
        -rw-r--r--  0:5    2 KiB  2026-01-02T03:04:05.000Z  x
        lrwxrwxrwx  0:5    2 KiB  2026-01-02T03:04:05.000Z  x -> /bin/busybox
        ");
    }

    #[test]
    fn binary_files_are_base64_in_json() {
        let facts = json!({ "size_bytes": 2, "offset": 0, "read_bytes": 2, "eof": true, "lossy": true });
        let facts: FileReadOutput = serde_json::from_value(facts).unwrap();
        assert_eq!(read_as_json(&facts, 0, b"hi")["text"], "hi");
        assert_eq!(read_as_json(&facts, 0, &[0xff])["base64"], "/w==");
    }
}
