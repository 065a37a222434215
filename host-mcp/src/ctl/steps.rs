//! Shows the steps of long work: as a bar that fits the terminal and disappears afterwards, or one line each.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use nexus_schema::tools::op::{ALREADY, OpProgress};

use super::client::Progress;
use super::format;
use super::ui::{Format, Ui, stderr_width};

/// From this number on, units are assumed to be bytes.
const BYTES_FROM: u64 = 64 << 10;
/// Columns left free at the end of a line: a terminal shows `^C` there, which must not wrap.
const MARGIN: u16 = 4;

/// The steps of an operation.
pub(super) struct Steps {
    bar: Option<ProgressBar>,
    /// How wide the terminal is, in columns.
    width: Box<dyn Fn() -> u16>,
    ui: Ui,
    last: String,
}

impl Steps {
    pub(super) fn new(ui: &Ui) -> Self {
        let bar = (ui.stderr_is_terminal && ui.format != Format::Quiet).then(|| {
            let target = ProgressDrawTarget::term_like(Box::new(Stderr::default()));
            let bar = ProgressBar::with_draw_target(None, target);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self::with(ui, bar, Box::new(stderr_width))
    }

    fn with(ui: &Ui, bar: Option<ProgressBar>, width: Box<dyn Fn() -> u16>) -> Self {
        if let Some(bar) = &bar {
            bar.set_style(style(SPINNER));
        }
        Self { bar, width, ui: ui.clone(), last: String::new() }
    }

    /// Whether it is a moving bar instead of lines.
    pub(super) fn has_bar(&self) -> bool {
        self.bar.is_some()
    }

    /// Shows the progress of the work.
    pub(super) fn show(&mut self, progress: &OpProgress) {
        self.step(&progress.step);
        let Some(bar) = &self.bar else { return };
        match (progress.done, progress.total) {
            (Some(done), Some(total)) if total > 0 => {
                bar.set_style(style(layout(total >= BYTES_FROM, (self.width)())));
                bar.set_length(total);
                bar.set_position(done.min(total));
            }
            (Some(done), None) if done >= BYTES_FROM => {
                bar.set_style(style(SPINNER));
                bar.set_message(format!("{}  {}", self.last, format::size(done)));
            }
            (_, _) => bar.set_style(style(SPINNER)),
        }
    }

    /// Shows a progress message that arrives between two answers; only its text is used.
    pub(super) fn report(&mut self, progress: &Progress) {
        let Some(message) = &progress.message else { return };
        // Counts within a step move a bar; as lines they would be too many.
        self.step(without_count(message));
    }

    fn step(&mut self, step: &str) {
        let step = format::tame(step);
        if step.is_empty() || step == self.last || step == ALREADY {
            return;
        }
        match &self.bar {
            Some(bar) => bar.set_message(step.clone()),
            None => self.ui.say(&step),
        }
        self.last = step;
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A step without its count: `filling the filesystem` for `filling the filesystem: 31%` and for `filling the filesystem: 41 of 87 MB`.
fn without_count(message: &str) -> &str {
    let is_word = |word: &str| matches!(word, "of" | "MB") || is_number(word.trim_end_matches('%'));
    match message.rsplit_once(": ") {
        Some((step, count)) if count.split(' ').all(is_word) => step,
        _ => message,
    }
}

fn is_number(word: &str) -> bool {
    word.bytes().all(|b| b.is_ascii_digit())
}

/// A line in which the step gets the remaining space.
const SPINNER: &str = "{spinner} {wide_msg} {elapsed}";

/// The same with a bar, as large as the terminal allows.
fn layout(counts_bytes: bool, width: u16) -> &'static str {
    match (counts_bytes, width) {
        (true, 100..) => {
            "{spinner} {wide_msg} [{bar:20}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta}"
        }
        (true, 72..) => "{spinner} {wide_msg} [{bar:20}] {binary_bytes}/{binary_total_bytes}",
        (false, 72..) => "{spinner} {wide_msg} [{bar:20}] {pos}/{len}",
        (_, _) => "{spinner} {wide_msg} {percent} %",
    }
}

/// The terminal of stderr, treated as slightly narrower, so that the echo of a ctrl-c stays on the line that is cleared.
#[derive(Debug, Default)]
struct Stderr {
    pending: Mutex<Vec<u8>>,
}

impl Stderr {
    fn put(&self, text: &str) -> io::Result<()> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).extend(text.as_bytes());
        Ok(())
    }

    fn moved(&self, columns_or_lines: usize, towards: char) -> io::Result<()> {
        if columns_or_lines == 0 { Ok(()) } else { self.put(&format!("\u{1b}[{columns_or_lines}{towards}")) }
    }
}

impl TermLike for Stderr {
    fn width(&self) -> u16 {
        stderr_width().saturating_sub(MARGIN).max(1)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.moved(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.put(text)?;
        self.put("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.put(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.put("\r\u{1b}[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let text = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        io::stderr().lock().write_all(&text)
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner());
    style.progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use unicode_width::UnicodeWidthStr;

    use super::*;

    /// A terminal that records its content, and its widest line.
    #[derive(Debug, Clone)]
    struct Screen {
        width: u16,
        now: Arc<Mutex<(Vec<String>, usize)>>,
        seen: Arc<Mutex<Vec<String>>>,
    }

    impl Screen {
        fn new(width: u16) -> Self {
            Self { width, now: Arc::new(Mutex::new((vec![String::new()], 0))), seen: Arc::default() }
        }

        fn change(&self, change: impl FnOnce(&mut Vec<String>, &mut usize)) -> std::io::Result<()> {
            let mut now = self.now.lock().unwrap();
            let (lines, at) = &mut *now;
            change(lines, at);
            self.seen.lock().unwrap().push(lines.concat());
            Ok(())
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            self.width
        }
        fn move_cursor_up(&self, n: usize) -> std::io::Result<()> {
            self.change(|_, at| *at = at.saturating_sub(n))
        }
        fn move_cursor_down(&self, n: usize) -> std::io::Result<()> {
            self.change(|lines, at| {
                *at += n;
                lines.resize((*at + 1).max(lines.len()), String::new());
            })
        }
        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> std::io::Result<()> {
            self.write_str(text)?;
            self.move_cursor_down(1)
        }
        fn write_str(&self, text: &str) -> std::io::Result<()> {
            self.change(|lines, at| lines[*at].push_str(text))
        }
        fn clear_line(&self) -> std::io::Result<()> {
            self.change(|lines, at| lines[*at].clear())
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bars_fit_the_width_and_leave_nothing_behind() {
        let ui = Ui::of_process(Format::Human, &Default::default());
        for width in [40, 60, 80, 120] {
            let screen = Screen::new(width);
            let target = ProgressDrawTarget::term_like_with_hz(Box::new(screen.clone()), 255);
            let bar = ProgressBar::with_draw_target(None, target);
            let mut steps = Steps::with(&ui, Some(bar.clone()), Box::new(move || width));
            let step = "downloading linux-image-6.1.0-40-cloud-amd64 from a mirror with a rather long name";
            for (done, total) in
                [(None, None), (Some(30 << 20), Some(120 << 20)), (Some(3), Some(9)), (Some(1 << 20), None)]
            {
                steps.show(&OpProgress { step: step.into(), done, total });
                bar.force_draw();
            }
            let seen = screen.seen.lock().unwrap().clone();
            assert!(seen.iter().any(|line| line.contains("downloading")), "{seen:#?}");
            let widest = seen.iter().map(|line| line.width()).max().unwrap();
            assert!(widest <= usize::from(width), "{width}: {widest} {seen:#?}");
            steps.finish();
            assert_eq!(screen.now.lock().unwrap().0.concat().trim(), "");
        }
    }

    #[test]
    fn counts_are_not_lines() {
        for (message, step) in [
            ("filling the filesystem: 31%", "filling the filesystem"),
            ("downloading kernel: 1048576", "downloading kernel"),
            ("downloading kernel: 41 of 87 MB", "downloading kernel"),
            ("unpacking: 7 MB", "unpacking"),
            ("checking: some of it", "checking: some of it"),
            ("importing the kernel: /a", "importing the kernel: /a"),
        ] {
            assert_eq!(without_count(message), step);
        }
    }
}
