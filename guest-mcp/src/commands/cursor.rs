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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_of_one_command() {
        let [id, other] = [CommandId::of_boot(9, 1).unwrap(), CommandId::of_boot(7, 1).unwrap()];
        assert_eq!(offsets(&cursor(id, [7, u64::MAX]), id), Ok([7, u64::MAX]));
        for bad in ["", "x", "x.1.2", &format!("{id}.1"), &format!("{id}.1.-2"), &format!("{id}.1.2.3")] {
            assert!(offsets(bad, id).is_err(), "{bad}");
        }
        let error = offsets(&cursor(other, [1, 2]), id).unwrap_err();
        assert!(error.message.contains("each boot"), "{error}");
    }
}
