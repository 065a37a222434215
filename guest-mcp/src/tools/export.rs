//! `export`.

use std::path::{Path, PathBuf};

use nexus_schema::limits::{OUTPUT_DEFAULT, OUTPUT_MAX};
use nexus_schema::tools::tree::{Export, ExportOutput, ExportParams, TreeChange};
use nexus_schema::{ErrorCode, ToolError};

use super::text::decode;
use super::{Block, Call, Reply, Run, human_bytes};
use crate::agent::replace;
use crate::places::make_directories;
use crate::tree::export_tree;

impl Run for Export {
    async fn run(call: Call, params: ExportParams) -> Result<Reply<ExportOutput>, ToolError> {
        let max = params.max_bytes.unwrap_or(OUTPUT_DEFAULT);
        if !(1..=OUTPUT_MAX).contains(&max) {
            return Err(ToolError::invalid(format!("max_bytes must be 1 to {OUTPUT_MAX}, got {max}")));
        }
        if let Some(to) = &params.to
            && !Path::new(to).is_absolute()
        {
            return Err(ToolError::invalid(format!("to: `{to}` is not an absolute path")));
        }
        let trees = call.agent.trees();
        call.blocking(move |_| export(trees, &params, max)).await
    }
}

fn export(trees: PathBuf, params: &ExportParams, max: u64) -> Result<Reply<ExportOutput>, ToolError> {
    let (patch, mut facts) = export_tree(trees.clone(), &params.path)?;
    let (text, is_lossy) = decode(&patch);
    facts.whole = patch.len() as u64 <= max && !is_lossy;
    // An incomplete patch is only useful in a file.
    let place =
        params.to.as_ref().map(PathBuf::from).or_else(|| (!facts.whole).then(|| trees.join("last.patch")));
    if let Some(place) = place {
        // The agent's own paths are relative to its directory, which a reader of the reply does not know.
        let place = std::path::absolute(&place).unwrap_or(place);
        let fail = |error| {
            let text = format!("write the patch to {}: {error}", place.display());
            ToolError::new(ErrorCode::FileRefused, text)
        };
        place.parent().map(make_directories).transpose().map_err(fail)?;
        replace(&place, &patch, 0o644).map_err(fail)?;
        facts.patch_file = Some(place.display().to_string());
    }
    let mut header = format!(
        "{} · {} files changed, {} lines added, {} removed · {}",
        params.path,
        facts.files,
        facts.added_lines,
        facts.removed_lines,
        human_bytes(facts.patch_bytes)
    );
    if let Some(place) = &facts.patch_file {
        header.push_str(&format!(" · the patch is in {place}"));
    }
    if !facts.whole {
        let why = if is_lossy { "not UTF-8, bytes were replaced" } else { "cut" };
        header.push_str(&format!("\nthe text is {why}: copy the file out with guest_copy_out"));
    }
    for left in &facts.not_in_patch {
        let change = match left.change {
            TreeChange::Added => "added",
            TreeChange::Deleted => "deleted",
            TreeChange::Modified => "modified",
        };
        header.push_str(&format!("\nnot in the patch: {} ({change}): {}", left.path, left.why));
    }
    if facts.not_in_patch_count > facts.not_in_patch.len() as u64 {
        header.push_str(&format!(
            "\nnot in the patch: {} more",
            facts.not_in_patch_count - facts.not_in_patch.len() as u64
        ));
    }
    let mut reply = Reply::new(header, facts);
    if !text.is_empty() {
        let mut end = usize::try_from(max).unwrap_or(usize::MAX).min(text.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        reply.blocks.push(Block::stream("content", text[..end].to_owned()));
    }
    Ok(reply)
}
