//! The form in which replies show output and the state of commands.

use std::time::Duration;

use nexus_schema::limits::OUTPUT_MAX;
use nexus_schema::tools::ContentEncoding;
use nexus_schema::tools::command::{CommandState, Descendants, FailureCause, RunCommandOutput, StreamFacts};
use nexus_wire::fold;
use nix::sys::signal::Signal;

use super::command::{Command, Ending};
use super::kept::Kept;
use super::offline;
use crate::holder::wire::OfStream;
use crate::tools::human_bytes;
use crate::tools::text::{continuation_start, decode, incomplete_end};

/// The shown part of a stream: a head, and a tail if something between them is left out.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) head: Vec<u8>,
    pub(super) tail: Vec<u8>,
    pub(super) total: u64,
    /// Bytes left out before the offset, or between head and tail.
    pub(super) omitted: u64,
    /// Bytes of the stream that were dropped and cannot be read any more.
    pub(super) dropped: u64,
}

impl Piece {
    /// Takes both ends of a stream, `most` bytes in total.
    pub(super) fn ends(kept: &Kept, most: usize) -> Self {
        let (total, dropped) = (kept.total(), kept.dropped());
        let start =
            |most| if dropped == 0 || kept.gap().start > 0 { kept.read(0, most).1 } else { Vec::new() };
        let (head, tail) = match (kept.len() <= most, dropped) {
            (true, 0) => (start(usize::MAX), Vec::new()),
            (true, _) => (start(usize::MAX), kept.last(usize::MAX)),
            (false, _) => (start(most - most / 2), kept.last(most / 2)),
        };
        let omitted = total - (head.len() + tail.len()) as u64;
        Self { offset: 0, head, tail, total, omitted, dropped }
    }

    /// Takes at most `most` contiguous bytes from `offset` on. Text is cut between characters if possible.
    pub(super) fn from(
        kept: &Kept,
        offset: u64,
        most: usize,
        encoding: ContentEncoding,
        is_over: bool,
    ) -> Self {
        let (start, mut head) = kept.read(offset, most);
        let total = kept.total();
        if encoding == ContentEncoding::Text {
            let is_whole = start + head.len() as u64 == total && is_over;
            if !is_whole {
                head.truncate(text_end(&head));
            }
        }
        let omitted = start.saturating_sub(offset);
        Self { offset: start, head, tail: Vec::new(), total, omitted, dropped: kept.dropped() }
    }

    /// Returns the offset of its end.
    pub(super) fn end(&self) -> u64 {
        self.offset + self.head.len() as u64
    }

    /// Shortens it to `most` bytes.
    pub(super) fn shorten(&mut self, most: usize) {
        if self.head.len() > most {
            self.head.truncate(most);
            self.head.truncate(text_end(&self.head));
        }
    }

    fn len(&self) -> usize {
        self.head.len() + self.tail.len()
    }
}

/// A stream in the form of a reply.
struct Shown {
    text: String,
    facts: StreamFacts,
}

/// Divides the size of a text result between two streams: returns the sizes for [`Piece::ends`] of each.
pub(super) fn share(lengths: [usize; 2]) -> [usize; 2] {
    let most = OUTPUT_MAX as usize;
    let [stdout, stderr] = lengths;
    if stdout + stderr <= most {
        return lengths;
    }
    let stderr = stderr.min((most / 2).max(most.saturating_sub(stdout)));
    [stdout.min(most - stderr), stderr]
}

/// Takes both ends of both streams, within the size of a result.
pub(super) fn ends(streams: [&Kept; 2], most: usize, encoding: ContentEncoding) -> [Piece; 2] {
    let pieces = streams.map(|kept| Piece::ends(kept, most));
    if encoding == ContentEncoding::Base64 {
        return pieces;
    }
    let lengths = [pieces[0].len(), pieces[1].len()];
    let shared = share(lengths);
    if shared == lengths {
        return pieces;
    }
    [Piece::ends(streams[0], shared[0]), Piece::ends(streams[1], shared[1])]
}

fn shown(piece: Piece, encoding: ContentEncoding) -> Shown {
    let Piece { offset, mut head, mut tail, total, omitted, dropped } = piece;
    let mut facts = StreamFacts {
        total_bytes: total,
        omitted_bytes: omitted,
        offset,
        dropped_bytes: dropped,
        ..StreamFacts::default()
    };
    let is_cut = omitted > 0 && offset == 0;
    match encoding {
        ContentEncoding::Base64 => {
            facts.omitted_at = is_cut.then_some(head.len() as u64);
            head.append(&mut tail);
            Shown { text: data_encoding::BASE64.encode(&head), facts }
        }
        ContentEncoding::Text if is_cut => {
            // A character or an escape sequence that was cut is left out.
            head.truncate(text_end(&head));
            tail.drain(..continuation_start(&tail));
            facts.omitted_at = Some(head.len() as u64);
            facts.omitted_bytes = total - (head.len() + tail.len()) as u64;
            let head = readable(&head, &mut facts);
            let tail = readable(&tail, &mut facts);
            let text = format!("{head}\n[... {} bytes left out ...]\n{tail}", facts.omitted_bytes);
            Shown { text, facts }
        }
        ContentEncoding::Text => {
            let text = readable(&head, &mut facts);
            Shown { text, facts }
        }
    }
}

/// Returns how many of these bytes can be shown without more: a character, an escape sequence or a carriage return at the end may go on. All of
/// them if nothing else is there.
fn text_end(bytes: &[u8]) -> usize {
    let cut = incomplete_end(bytes);
    match fold::whole(&bytes[..bytes.len() - cut]) {
        0 => bytes.len(),
        end => end,
    }
}

/// Decodes output, folded as a terminal would show it. Notes in the facts what is not exact.
fn readable(bytes: &[u8], facts: &mut StreamFacts) -> String {
    let (text, lossy) = decode(bytes);
    facts.lossy |= lossy;
    // A NUL byte alone does not matter: programs separate names by it.
    if !text.contains(['\u{1b}', '\r', '\u{8}']) {
        return text;
    }
    facts.folded = true;
    fold::fold(&text)
}

/// What a reply says about a command, except its output.
pub(super) struct Said {
    pub(super) ending: Option<Ending>,
    pub(super) left: Option<Descendants>,
    pub(super) cursor: Option<String>,
    pub(super) more: bool,
    pub(super) written: Option<u64>,
    /// The first words; by default the state of the command.
    pub(super) opening: Option<String>,
}

/// The text and the structured result of a reply.
pub(super) struct Report {
    pub(super) header: String,
    pub(super) blocks: Vec<(Option<OfStream>, String)>,
    pub(super) facts: RunCommandOutput,
}

/// Builds the report on a command, with pieces of its streams.
pub(super) fn report(command: &Command, said: Said, pieces: [Piece; 2], encoding: ContentEncoding) -> Report {
    let Said { ending, left, cursor, more, written, opening } = said;
    let duration = ending.as_ref().map_or_else(|| command.begun.elapsed(), |ending| ending.duration);
    let total: u64 = pieces.iter().map(|piece| piece.total).sum();
    let mut header = opening.unwrap_or_else(|| how(ending.as_ref(), command.limits.timeout));
    header.push_str(&format!(" · {} · {}", human_duration(duration), human_bytes(total)));
    let id = command.id;
    if ending.is_none() {
        header.push_str(&format!(" · command {id}"));
    }
    if let Some(left) = &left {
        let names = left.names.join(", ");
        header.push_str(&format!(
            "\n{} of its processes are still running in the background: {names} (command {id})",
            left.count
        ));
    }
    let oom_killed = ending.as_ref().map(|ending| ending.oom_killed.clone()).unwrap_or_default();
    if !oom_killed.is_empty() {
        let who = oom_killed.join(", ");
        header.push_str(&format!(
            "\nthe VM ran out of memory, and the kernel killed {who}; results may be wrong"
        ));
    }
    let cause = ending.as_ref().and_then(|ending| why(ending, &pieces));
    if let Some(cause) = cause {
        header.push_str(&format!("\nnote: {}", cause.explained()));
    }
    let log = command.log_facts();
    if let Some(problem) = log.as_ref().and_then(|log| log.problem.as_ref()) {
        header.push_str(&format!("\nlog: incomplete: {problem}"));
    }
    let [stdout, stderr] = pieces.map(|piece| shown(piece, encoding));
    for (name, shown) in [("stdout", &stdout), ("stderr", &stderr)] {
        note(&mut header, name, &shown.facts, command);
    }
    if let (true, Some(cursor)) = (ending.is_none() || more, &cursor) {
        let what = if more { "there is more" } else { "it continues" };
        header.push_str(&format!("\n{what}: call command_output with id {id} and cursor {cursor}"));
    }
    let facts = RunCommandOutput {
        command_id: Some(id),
        state: if ending.is_some() { CommandState::Ended } else { CommandState::Running },
        status: ending.as_ref().map(Ending::status),
        exit_code: ending.as_ref().and_then(|ending| ending.code),
        signal: ending.as_ref().and_then(|ending| ending.signal).map(signal_name),
        timed_out: ending.as_ref().is_some_and(|ending| ending.timed_out),
        duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
        stdout: stdout.facts,
        stderr: stderr.facts,
        cursor,
        more,
        descendants: left,
        cause,
        cwd: Some(command.cwd.clone()),
        pid: Some(command.tree.root().as_raw_nonzero().get().cast_unsigned()),
        log,
        written_bytes: written,
        oom_killed,
        // Only the agent knows these.
        network_denied: Vec::new(),
    };
    let mut blocks = Vec::new();
    if !stdout.text.is_empty() {
        blocks.push((Some(OfStream::Stdout), stdout.text));
    }
    if !stderr.text.is_empty() {
        blocks.push((None, "stderr:".to_owned()));
        blocks.push((Some(OfStream::Stderr), stderr.text));
    }
    Report { header, blocks, facts }
}

/// Returns why a command failed, if its output shows that. For a command that succeeded, only stderr counts: `apt-get update` succeeds even without a
/// network.
fn why(ending: &Ending, pieces: &[Piece; 2]) -> Option<FailureCause> {
    let [stdout, stderr] = pieces;
    let has_failed = ending.code.is_some_and(|code| code != 0);
    let asked = [Some(stderr), has_failed.then_some(stdout)];
    let mut output = asked.into_iter().flatten().flat_map(|piece| [&piece.head, &piece.tail]);
    output.any(|bytes| offline::is_why(bytes)).then_some(FailureCause::NoNetwork)
}

fn how(ending: Option<&Ending>, timeout: Option<Duration>) -> String {
    match ending {
        None => "still running".to_owned(),
        Some(Ending { timed_out: true, .. }) => {
            format!("timed out after {} s and was killed", timeout.unwrap_or_default().as_secs_f64())
        }
        Some(Ending { code: Some(code), .. }) => format!("exit {code}"),
        Some(Ending { signal: Some(signal), .. }) => format!("killed by {}", signal_name(*signal)),
        Some(_) => "ended".to_owned(),
    }
}

/// Adds to the header what a stream does not show exactly.
fn note(header: &mut String, name: &str, facts: &StreamFacts, command: &Command) {
    let id = command.id;
    if facts.omitted_bytes > 0 {
        let place = if facts.offset == 0 { "left out of the middle" } else { "before this are gone" };
        header.push_str(&format!("\n{name}: {} bytes {place}", facts.omitted_bytes));
        if facts.offset == 0 {
            match facts.dropped_bytes {
                0 => header.push_str(&format!("; command_output reads them by id {id}")),
                gone => header
                    .push_str(&format!(", {gone} of them gone; command_output reads the rest by id {id}")),
            }
        }
    }
    if facts.lossy {
        header.push_str(&format!(
            "\n{name}: not UTF-8, bytes were replaced; encoding base64 gives them exactly"
        ));
    } else if facts.folded && command.terminal.is_none() {
        header.push_str(&format!(
            "\n{name}: without escape sequences and overwritten text; encoding base64 gives the bytes"
        ));
    }
}

/// Returns the name of a signal, such as `SIGKILL`.
pub(super) fn signal_name(number: i32) -> String {
    Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.as_str().to_owned())
}

fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..60 => format!("{:.1} s", (duration.as_millis() / 100) as f64 / 10.0),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(keep: usize, pieces: &[&[u8]]) -> Kept {
        let mut kept = Kept::new(keep);
        pieces.iter().for_each(|piece| kept.push(piece));
        kept
    }

    fn text(kept: &Kept, most: usize) -> Shown {
        shown(Piece::ends(kept, most), ContentEncoding::Text)
    }

    #[test]
    fn short_output_is_whole_and_long_output_loses_its_middle() {
        let short = kept(100, &[b"hel", b"lo ", b"you"]);
        let short = text(&short, 10);
        assert_eq!((short.text.as_str(), short.facts.omitted_bytes), ("hello you", 0));

        // Whether all of it is kept or not.
        for (keep, dropped) in [(100, 0), (26, 0), (20, 6), (10, 16)] {
            let long = text(&kept(keep, &[b"0123456", b"789abc", b"defghijklmnop"]), 10);
            assert_eq!(long.text, "01234\n[... 16 bytes left out ...]\nlmnop", "{keep}");
            let facts = StreamFacts {
                total_bytes: 26,
                omitted_bytes: 16,
                omitted_at: Some(5),
                dropped_bytes: dropped,
                ..StreamFacts::default()
            };
            assert_eq!(long.facts, facts, "{keep}");
        }
    }

    #[test]
    fn a_cut_through_a_character_is_not_lossy() {
        let long = text(&kept(100, &["ääääääää".as_bytes()]), 7);
        assert!(!long.facts.lossy, "{}", long.text);
        assert!(long.text.starts_with("ää\n[") && long.text.ends_with("]\nä"), "{}", long.text);
        assert_eq!(long.facts.omitted_bytes, 10);
    }

    #[test]
    fn both_streams_share_what_may_be_shown() {
        let most = OUTPUT_MAX as usize;
        let stream = |length| kept(1 << 20, &[&vec![b'x'; length]]);
        let both = |stdout, stderr| {
            ends([&stream(stdout), &stream(stderr)], most, ContentEncoding::Text)
                .map(|piece| shown(piece, ContentEncoding::Text))
        };
        let [stdout, stderr] = both(60_000, 60_000);
        assert!(stdout.text.len() + stderr.text.len() < 50_000);
        let [stdout, stderr] = both(60_000, 5);
        assert_eq!(stderr.text, "xxxxx");
        assert!(stdout.text.len() > 47_000 && stdout.text.len() + stderr.text.len() < 50_000);
        // If both streams together are too large, each loses its own middle.
        let [stdout, stderr] = both(40_000, 40_000);
        assert_eq!(stdout.facts.omitted_bytes + 24_000, 40_000);
        assert_eq!(stderr.facts.omitted_bytes + 24_000, 40_000);
    }

    #[test]
    fn base64_has_both_ends_and_says_where_they_meet() {
        let long = kept(100, &[b"\x00\xFF\x01\x02\x03\x04"]);
        let long = shown(Piece::ends(&long, 4), ContentEncoding::Base64);
        assert_eq!(data_encoding::BASE64.decode(long.text.as_bytes()).unwrap(), b"\x00\xFF\x03\x04");
        assert_eq!((long.facts.omitted_bytes, long.facts.omitted_at), (2, Some(2)));
    }

    #[test]
    fn text_is_what_a_terminal_would_show_and_base64_what_was_written() {
        let written = b"\x1b[31mred\x1b[0m\r\n  1%\r 50%\r100%\n";
        let bar = kept(100, &[written]);
        let seen = text(&bar, 100);
        assert_eq!(
            (seen.text.as_str(), seen.facts.folded, seen.facts.total_bytes),
            ("red\n100%\n", true, 29)
        );
        let exact = shown(Piece::ends(&bar, 100), ContentEncoding::Base64);
        assert_eq!(data_encoding::BASE64.decode(exact.text.as_bytes()).unwrap(), written);
        assert!(!exact.facts.folded);
        // Names that are separated by NUL bytes are data.
        let names = text(&kept(100, &[b"a\0b\0\tc\n"]), 100);
        assert_eq!((names.text.as_str(), names.facts.folded), ("a\0b\0\tc\n", false));
        // No sequence is cut in two while more may come; what was cut in the middle is left out.
        let piece = |most, is_over| Piece::from(&bar, 0, most, ContentEncoding::Text, is_over).head.len();
        assert_eq!((piece(3, false), piece(10, false), piece(13, false), piece(14, false)), (3, 8, 12, 14));
        let cut = text(&kept(100, &[b"ab\x1b[31mcdefghijklmnop"]), 10);
        assert_eq!(cut.text, "ab\n[... 14 bytes left out ...]\nlmnop");
    }

    #[test]
    fn pieces_end_between_characters() {
        let stream = kept(100, &["aä".as_bytes()]);
        let piece =
            |offset, most, is_over| Piece::from(&stream, offset, most, ContentEncoding::Text, is_over);
        assert_eq!(piece(0, 2, false).head, b"a");
        assert_eq!(piece(1, 2, false).head, "ä".as_bytes());
        assert_eq!(piece(1, 1, false).head, b"\xC3", "one that would be empty is not held back");
        assert_eq!((piece(9, 5, true).offset, piece(9, 5, true).head.len()), (3, 0));
        let gone = kept(4, &[b"0123456789"]);
        let piece = Piece::from(&gone, 2, 9, ContentEncoding::Text, true);
        assert_eq!((piece.offset, piece.omitted, piece.head.as_slice()), (8, 6, &b"89"[..]));
    }

    #[test]
    fn durations_are_for_people() {
        for (millis, text) in
            [(0, "0 ms"), (999, "999 ms"), (1_250, "1.2 s"), (59_999, "59.9 s"), (61_000, "1 min 1 s")]
        {
            assert_eq!(human_duration(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn signals_have_names() {
        assert_eq!(signal_name(9), "SIGKILL");
        assert_eq!(signal_name(40), "signal 40");
    }
}
