//! Prints the conversation to a terminal or a file.

use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, Write, stdout};
use std::time::Duration;

use serde_json::Value;

/// The maximum length of a message; the rest is cut.
const WIDTH: usize = 400;
/// The width of lines of facts.
const FACTS_WIDTH: usize = 100;
/// The facts of a virtual machine that are shown.
const OF_A_VM: [&str; 9] = ["name", "id", "state", "kernel", "vcpus", "memory", "driver", "accel", "boot_id"];
/// The maximum number of lines of a text; the rest is cut.
const LINES: usize = 12;

/// The maximum length of a progress line: a longer one would wrap on a narrow terminal and could not be overwritten.
const PROGRESS_WIDTH: usize = 70;

thread_local! {
    /// The last step that was printed without a terminal.
    static STEP: RefCell<String> = const { RefCell::new(String::new()) };
    /// Whether the terminal currently shows a progress line, which will be overwritten.
    static PROGRESS: Cell<bool> = const { Cell::new(false) };
}

fn paint(code: &str, text: &str) -> String {
    if stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Announces the next step.
pub fn step(text: &str) {
    println!("\n{}", paint("1", &format!("# {text}")));
}

/// Prints a remark.
pub fn note(text: &str) {
    println!("{}", paint("2", &format!("  {text}")));
}

/// Prints a tool call.
pub fn question(tool: &str, arguments: &Value) {
    println!("{} {} {}", paint("36", "->"), paint("1", tool), abridged(&arguments.to_string()));
}

/// Prints an answer that is not a tool's.
pub fn answer(value: &Value, took: Duration) {
    println!(
        "{} {} {}",
        paint("32", "<-"),
        abridged(&value.to_string()),
        paint("2", &format!("({})", human(took)))
    );
}

/// Prints a tool's result, as a model would see it.
pub fn result(result: &Value, took: Duration) {
    let mut arrow = paint("32", "<-");
    let structured = &result["structuredContent"];
    if !structured.is_null() {
        for line in facts(structured) {
            println!("{arrow} {line}");
            arrow = "  ".to_owned();
        }
        println!("   {}", paint("2", &format!("({})", human(took))));
        return;
    }
    for block in result["content"].as_array().into_iter().flatten() {
        let text = block["text"].as_str().unwrap_or("(not text)");
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().take(LINES) {
            println!("{arrow} {}", abridged(line));
            arrow = "  ".to_owned();
        }
        if lines.len() > LINES {
            println!("   ... {} more lines", lines.len() - LINES);
        }
    }
    println!("   {}", paint("2", &format!("({})", human(took))));
}

/// The plain values of a structured result, in lines that fit a terminal: for finished work those of its result, for a virtual
/// machine the most important ones.
fn facts(value: &Value) -> Vec<String> {
    let Value::Object(fields) = value else { return vec![abridged(&value.to_string())] };
    let result = fields.get("result").filter(|result| result.is_object());
    let is_vm = fields.contains_key("boot_id") || fields.contains_key("vcpus");
    let (mut said, mut left) = (Vec::new(), 0);
    for (key, value) in fields {
        let is_told_below =
            result.is_some() && ["result", "progress", "subject_id", "subject_name"].contains(&&**key);
        match value {
            Value::Null => {}
            _ if is_told_below => {}
            _ if is_vm && !OF_A_VM.contains(&&**key) => left += 1,
            Value::String(text) => said.push(format!("{key}: {}", abridged(text))),
            Value::Bool(_) | Value::Number(_) => said.push(format!("{key}: {value}")),
            Value::Array(values) if values.is_empty() => said.push(format!("{key}: none")),
            Value::Array(_) | Value::Object(_) => left += 1,
        }
    }
    if left > 0 {
        said.push(format!("and {left} more"));
    }
    let mut lines = wrapped(&said);
    lines.extend(result.into_iter().flat_map(facts));
    lines
}

/// Words with commas between, in lines that fit a terminal.
fn wrapped(words: &[impl AsRef<str>]) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        let word = word.as_ref();
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < FACTS_WIDTH => line.push_str(&format!(", {word}")),
            Some(_) | None => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Prints side notes as a list.
pub fn notes(title: &str, words: &[&str]) {
    note(title);
    wrapped(words).iter().for_each(|line| note(&format!("  {line}")));
}

/// Shows the progress of long work: overwritten in place on a terminal, one line each elsewhere.
pub fn progress(params: &Value) {
    let message = params["message"].as_str().unwrap_or("working");
    if stdout().is_terminal() {
        let columns = message.chars().take(PROGRESS_WIDTH).collect::<String>();
        print!("\r\x1b[K{}", paint("2", &format!("   ... {columns}")));
        // It does not matter if the line appears late.
        let _shown = stdout().flush();
        PROGRESS.set(true);
        return;
    }
    // Without the count, and only once per step, because a file is read later.
    let step = message.split(':').next().unwrap_or(message);
    if STEP.with_borrow_mut(|last| {
        last != step && {
            step.clone_into(last);
            true
        }
    }) {
        println!("   ... {step}");
    }
}

/// Clears the progress line.
pub fn end_progress() {
    if PROGRESS.take() {
        print!("\r\x1b[K");
    }
}

/// Prints the timings of a boot, from the VM's own details.
pub fn boot(vm: &Value, timings: &mut Timings) {
    for (key, what) in [
        ("plan_ms", "  of which drive and plan"),
        ("spawn_ms", "  of which spawn of the VMM"),
        ("boot_ms", "  of which kernel and agent, to the hello"),
        ("configure_ms", "  of which configuration"),
        ("link_ms", "  of which MCP link"),
    ] {
        if let Some(ms) = vm["timings"][key].as_u64() {
            timings.note(what, Duration::from_millis(ms));
        }
    }
    let driver = vm["driver"].as_str().unwrap_or("?");
    let accel = vm["accel"].as_str().unwrap_or("?");
    note(&format!("{} runs under {driver} with {accel}", vm["name"].as_str().unwrap_or("it")));
}

fn abridged(text: &str) -> String {
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text.to_owned(),
    }
}

fn human(took: Duration) -> String {
    if took < Duration::from_secs(1) {
        format!("{:.1} ms", took.as_secs_f64() * 1000.0)
    } else {
        format!("{:.1} s", took.as_secs_f64())
    }
}

/// How long each step took.
#[derive(Default)]
pub struct Timings {
    rows: Vec<(String, Duration)>,
}

impl Timings {
    /// Adds a step.
    pub fn note(&mut self, what: &str, took: Duration) {
        self.rows.push((what.to_owned(), took));
    }

    /// Prints all steps.
    pub fn print(&self) {
        step("how long it took");
        for (what, took) in &self.rows {
            println!("  {what:<44} {:>10}", human(*took));
        }
    }
}
