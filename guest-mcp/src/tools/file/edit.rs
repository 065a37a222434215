//! `file_edit`.

use nexus_schema::ToolError;
use nexus_schema::error::ErrorCode;
use nexus_schema::tools::file::{Edit, FileChangeOutput, FileEdit, FileEditParams};

use super::change::Changes;
use super::diff::{replaced, reply, sha256, with_endings};
use super::parse_path;
use crate::places::Owner;
use crate::tools::{Call, Reply, Run};

/// How many of the places where a text occurs are listed.
const PLACES_MAX: usize = 5;

impl Run for FileEdit {
    async fn run(call: Call, params: FileEditParams) -> Result<Reply<FileChangeOutput>, ToolError> {
        let FileEditParams { edits, dry_run, user } = params;
        if edits.is_empty() {
            return Err(ToolError::invalid("edits is empty"));
        }
        call.blocking_as(user, move |owner, _| edit(&edits, dry_run, owner)).await
    }
}

fn edit(edits: &[Edit], dry_run: bool, owner: Owner) -> Result<Reply<FileChangeOutput>, ToolError> {
    let (mut changes, mut count) = (Changes::default(), 0);
    for (at, edit) in edits.iter().enumerate() {
        let place = format!("edits[{at}]");
        if edit.old.is_empty() {
            let error = ToolError::invalid(format!("{place}: `old` is empty"));
            return Err(error.hint("to replace a whole file, call guest_file_write"));
        }
        let path = parse_path(&edit.path)?;
        let change = changes.of(&edit.path, &path)?;
        check_hash(edit, &change.old, &place)?;
        let content = change.new.take().unwrap_or_default();
        let has_cr = edit.old.contains('\r') || edit.new.contains('\r');
        let new = with_endings(&content, has_cr, |content| {
            let (new, times) = replace(content, edit, &place)?;
            count += times;
            Ok(new)
        })?;
        change.new = Some(new);
    }
    if !dry_run {
        changes.apply(owner)?;
    }
    Ok(reply(&changes, count, "replacements", dry_run))
}

fn check_hash(edit: &Edit, content: &[u8], place: &str) -> Result<(), ToolError> {
    let Some(expected) = &edit.expect_sha256 else { return Ok(()) };
    let found = sha256(content);
    if expected.eq_ignore_ascii_case(&found) {
        return Ok(());
    }
    let text = format!("{place}: {} has the SHA-256 {found}, not the expected one", edit.path);
    Err(ToolError::new(ErrorCode::EditMismatch, text).hint("the file has changed: read it again"))
}

/// Makes the edit; returns the new content, and how many times the text was replaced.
fn replace(content: &[u8], edit: &Edit, place: &str) -> Result<(Vec<u8>, u64), ToolError> {
    let old = edit.old.as_bytes();
    let places: Vec<usize> = memchr::memmem::find_iter(content, old).collect();
    let expected = edit.expect_count.unwrap_or(1);
    let is_right = if edit.replace_all && edit.expect_count.is_none() {
        !places.is_empty()
    } else {
        places.len() as u64 == expected
    };
    if is_right {
        return Ok((replaced(content, old, edit.new.as_bytes()), places.len() as u64));
    }
    let line_of = |at: usize| 1 + memchr::memchr_iter(b'\n', &content[..at]).count();
    let mut text = match places.len() {
        0 => format!("{place}: `old` is not in {}", edit.path),
        1 => format!("{place}: `old` is once in {}", edit.path),
        many => format!("{place}: `old` is {many} times in {}", edit.path),
    };
    if !places.is_empty() {
        let lines: Vec<String> = places.iter().take(PLACES_MAX).map(|at| line_of(*at).to_string()).collect();
        let more = if places.len() > PLACES_MAX { ", ..." } else { "" };
        text.push_str(&format!(" (line {}{more}), expected {expected} times", lines.join(", ")));
    }
    let hint = match (places.is_empty(), similar_line(content, &edit.old)) {
        (true, Some(line)) => {
            format!("line {line} differs in white space only: read it, and pass it exactly")
        }
        (true, None) => "read the file again, and pass the text exactly, including white space".to_owned(),
        (false, _) => "add surrounding lines, or give expect_count, or replace_all: true".to_owned(),
    };
    Err(ToolError::new(ErrorCode::EditMismatch, text).hint(hint))
}

/// Returns the number of the first line that equals the text's first line except for white space.
fn similar_line(content: &[u8], old: &str) -> Option<usize> {
    let wanted = old.lines().map(str::trim).find(|line| !line.is_empty())?;
    let lines = content.split(|byte| *byte == b'\n');
    lines.map(<[u8]>::trim_ascii).position(|line| line == wanted.as_bytes()).map(|at| at + 1)
}
