//! The limits of the protocols, in one place. Host and guest enforce the same values.

use std::time::Duration;

/// The maximum length of a JSON line on a stream, in bytes. A longer line is answered with an error and skipped.
pub const LINE_MAX: usize = 16 << 20;
/// The maximum size of a guest's result of one call, in bytes of JSON.
pub const GUEST_RESULT_MAX: usize = 1 << 20;
/// The maximum size of an HTTP request body, in bytes.
pub const HTTP_BODY_MAX: usize = 4 << 20;
/// The maximum nesting depth of JSON from a guest.
pub const JSON_DEPTH_MAX: usize = 64;
/// The default size of the output in a text result, in bytes: head and tail are kept.
pub const OUTPUT_DEFAULT: u64 = 32 << 10;
/// The maximum size of the output in a text result, in characters.
pub const OUTPUT_MAX: u64 = 48_000;
/// The maximum size of one `file_read` with base64, in bytes (so that it fits in [`GUEST_RESULT_MAX`] when encoded).
pub const FILE_READ_MAX: u64 = 704 << 10;
/// The maximum content of one `file_write`, in bytes after decoding.
pub const FILE_WRITE_MAX: u64 = 2 << 20;
/// The maximum size of a file that is written in pieces, in bytes.
pub const UPLOAD_MAX: u64 = 1 << 30;
/// The maximum size of the configuration message of the hello exchange, in bytes.
pub const CONFIGURE_MAX: usize = 4 << 20;
/// The maximum size of a guest's message on the hello port, in bytes.
pub const HELLO_MAX: usize = 64 << 10;
/// The default wait of a waiting call.
pub const WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// The maximum wait of a call; clients abort calls after about a minute.
pub const WAIT_MAX: Duration = Duration::from_secs(45);
/// The default size of a list's page, in rows.
pub const PAGE_DEFAULT: u32 = 50;
/// The maximum size of a list's page, in rows.
pub const PAGE_MAX: u32 = 500;
/// The default wait of `run_command`.
pub const YIELD_DEFAULT: Duration = Duration::from_secs(30);
/// The default timeout of a command.
pub const COMMAND_TIMEOUT_DEFAULT: Duration = Duration::from_secs(3600);
/// The default amount of output that is kept of each stream of a command, in bytes.
pub const KEEP_DEFAULT: u64 = 2 << 20;
/// The maximum amount of output that is kept of each stream of a command, in bytes.
pub const KEEP_MAX: u64 = 16 << 20;
/// The maximum length of a command line for a shell, in bytes.
pub const COMMAND_MAX: u64 = 2 << 20;
/// The maximum length of an argument, and of an environment variable with its name, in bytes (`MAX_ARG_STRLEN` of linux/binfmts.h without the NUL
/// byte at its end).
pub const COMMAND_WORD_MAX: usize = (128 << 10) - 1;
