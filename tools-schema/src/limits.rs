//! The caps of the wire, in one place. Host and guest enforce the same numbers.

use std::time::Duration;

/// The longest JSON line on a stream, in bytes. A longer one is answered with an error and skipped.
pub const LINE_MAX: usize = 16 << 20;
/// The largest result that a guest may send for one call, in bytes of JSON.
pub const GUEST_RESULT_MAX: usize = 1 << 20;
/// The largest HTTP request body, in bytes.
pub const HTTP_BODY_MAX: usize = 4 << 20;
/// How deeply JSON from a guest may nest.
pub const JSON_DEPTH_MAX: usize = 64;
/// What a text result shows by default, in bytes: head and tail are kept.
pub const OUTPUT_DEFAULT: u64 = 32 << 10;
/// The most that a text result may show, in characters.
pub const OUTPUT_MAX: u64 = 48_000;
/// The largest chunk of a file in one `file_read` with base64, in bytes (so that it fits [`GUEST_RESULT_MAX`] encoded).
pub const FILE_READ_MAX: u64 = 704 << 10;
/// The largest content of one `file_write`, in bytes after decoding.
pub const FILE_WRITE_MAX: u64 = 2 << 20;
/// The largest file that is written in pieces, in bytes.
pub const UPLOAD_MAX: u64 = 1 << 30;
/// The largest configuration message of the hello exchange, in bytes.
pub const CONFIGURE_MAX: usize = 4 << 20;
/// The largest message that a guest may send on the hello port, in bytes.
pub const HELLO_MAX: usize = 64 << 10;
/// How long a call that waits does so when not told otherwise.
pub const WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// The longest that a call may be told to wait; clients cut calls off at about a minute.
pub const WAIT_MAX: Duration = Duration::from_secs(45);
/// A list's page when not told otherwise, in rows.
pub const PAGE_DEFAULT: u32 = 50;
/// The largest page of a list, in rows.
pub const PAGE_MAX: u32 = 500;
/// How long `run_command` waits for a command when not told otherwise.
pub const YIELD_DEFAULT: Duration = Duration::from_secs(30);
/// How long a command may live when not told otherwise.
pub const COMMAND_TIMEOUT_DEFAULT: Duration = Duration::from_secs(3600);
/// How much of each of a command's streams is kept when not told otherwise, in bytes.
pub const KEEP_DEFAULT: u64 = 2 << 20;
/// The most that may be kept of one, in bytes.
pub const KEEP_MAX: u64 = 16 << 20;
/// The longest command line for a shell, in bytes.
pub const COMMAND_MAX: u64 = 2 << 20;
/// The longest argument, and the longest environment variable with its name, in bytes (`MAX_ARG_STRLEN` of linux/binfmts.h without
/// the zero byte at its end).
pub const COMMAND_WORD_MAX: usize = (128 << 10) - 1;
