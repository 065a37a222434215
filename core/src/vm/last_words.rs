//! What the end of a guest's console says about the end of its boot.

use std::path::Path;

/// Returns the last lines of a VM's console for the reason of a failure, without control characters. A panicking kernel prints the cause
/// before its registers and its call trace, so the cause is kept too.
fn console_tail(directory: &Path) -> Option<String> {
    let bytes = crate::vmm::console::tail(directory, 16 << 10);
    last_lines(&crate::vmm::console::readable(&bytes))
}

fn last_lines(text: &str) -> Option<String> {
    const LINES: usize = 12;
    const BEFORE_PANIC: usize = 3;
    const PANIC: &str = "Kernel panic - not syncing";
    const WIDTH: usize = 300;
    let clean: String = text.chars().filter(|c| *c == '\n' || *c == '\t' || !c.is_control()).collect();
    let lines: Vec<String> = clean
        .lines()
        .map(str::trim_end)
        .filter(|l| !l.is_empty())
        .map(|l| l.chars().take(WIDTH).collect())
        .collect();
    let end = lines.len().saturating_sub(LINES);
    let panic =
        lines[..end].iter().rposition(|line| line.contains(PANIC) && !line.contains("end Kernel panic"));
    let tail = match panic {
        Some(at) => {
            let why = lines[at.saturating_sub(BEFORE_PANIC)..=at].join("\n");
            let left_out = if at + 1 < end { "\n...\n" } else { "\n" };
            format!("{why}{left_out}{}", lines[end..].join("\n"))
        }
        None => lines[end..].join("\n"),
    };
    (!tail.is_empty()).then_some(tail)
}

/// Appends the console's last lines to a failure's message.
pub(super) fn with_console(message: String, directory: &Path) -> String {
    match console_tail(directory) {
        Some(tail) => format!("{message}; the console's last lines:\n{tail}"),
        None => message,
    }
}

/// Returns whether the console ends with the kernel's message that it has halted.
pub(super) fn is_halted(directory: &Path) -> bool {
    let tail = crate::vmm::console::tail(directory, 4 << 10);
    let text = String::from_utf8_lossy(&tail);
    ["reboot: System halted", "reboot: Power down"].iter().any(|words| text.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_with_what_led_to_it_and_the_end() {
        let before: String = (0..50).map(|n| format!("line {n}\r\n")).collect();
        assert_eq!(last_lines(&before).unwrap().lines().count(), 12);
        let calls: String = (0..40).map(|n| format!("call {n}\n")).collect();
        let told = last_lines(&format!("{before}\x1b[0mKernel panic - not syncing: no\n{calls}")).unwrap();
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines.len(), 4 + 1 + 12);
        assert_eq!((lines[0], lines[4], lines[16]), ("line 47", "...", "call 39"));
        assert!(lines[3].contains("not syncing: no"));
        assert_eq!(last_lines("\n\r\n \n"), None);
    }
}
