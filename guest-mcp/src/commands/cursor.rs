//! Where a reader of a command's output goes on.

use nexus_schema::ToolError;
use nexus_schema::id::CommandId;

/// Returns the cursor to continue reading with: the command, and the offset in each stream.
pub(super) fn cursor(id: CommandId, [stdout, stderr]: [u64; 2]) -> String {
    format!("{id}.{stdout}.{stderr}")
}

/// Returns the offsets in a cursor, which must be of this command.
pub(super) fn offsets(cursor: &str, of: CommandId) -> Result<[u64; 2], ToolError> {
    let mut parts = cursor.splitn(3, '.');
    let id = parts.next().and_then(|id| id.parse::<CommandId>().ok());
    let mut offset = || parts.next()?.parse::<u64>().ok();
    let (Some(id), Some(stdout), Some(stderr)) = (id, offset(), offset()) else {
        return Err(ToolError::invalid("cursor is not from an earlier reply about a command")
            .hint("omit it to read from the start"));
    };
    if id != of {
        let text = format!("cursor is for command {id}, but id is {of}; command ids change with each boot");
        return Err(ToolError::invalid(text).hint("omit it to read from the start"));
    }
    Ok([stdout, stderr])
}
