//! The files of the repository, and Rust files as tokens with their line and whether they are test code.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::OnceLock;

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// The workspace's directory.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are a package of the workspace")
}

/// Every file that is tracked, or new and not ignored.
pub(crate) fn files() -> &'static [String] {
    static FILES: OnceLock<Vec<String>> = OnceLock::new();
    FILES.get_or_init(|| {
        let output = Command::new("git")
            .args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root())
            .output()
            .expect("git lists the files of the repository; install git");
        assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
        let listed = String::from_utf8(output.stdout).expect("file names are UTF-8");
        let mut files: Vec<String> = listed
            .split_terminator('\0')
            .filter(|file| root().join(file).is_file()) // not those just deleted
            .map(str::to_owned)
            .collect();
        files.sort();
        files
    })
}

/// The text of a file; `None` for one that is not text.
pub(crate) fn text(file: &str) -> Option<String> {
    let path: PathBuf = root().join(file);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    String::from_utf8(bytes).ok()
}

/// One Rust file.
pub(crate) struct Rust {
    /// Its path in the repository.
    pub(crate) file: String,
    /// Its text.
    pub(crate) text: String,
    /// Its tokens, without comments.
    pub(crate) tokens: Vec<Token>,
}

/// One token.
#[derive(Debug)]
pub(crate) struct Token {
    /// As written; a string literal without its quotes.
    pub(crate) text: String,
    /// Its line.
    pub(crate) line: usize,
    /// Whether it is a string literal.
    pub(crate) is_string: bool,
    /// Whether it is test code.
    pub(crate) is_test: bool,
}

impl Rust {
    pub(crate) fn new(file: String, text: String) -> Self {
        let stream = TokenStream::from_str(&text).unwrap_or_else(|e| panic!("{file} does not lex: {e}"));
        let mut tokens = Vec::new();
        flatten(stream, is_test_file(&file), &mut tokens);
        Self { file, text, tokens }
    }

    /// The places where the given tokens occur in sequence.
    pub(crate) fn find<'a>(&'a self, sequence: &'a [&str]) -> impl Iterator<Item = &'a Token> {
        self.tokens.windows(sequence.len()).filter_map(move |window| {
            let hit =
                window.iter().zip(sequence).all(|(token, text)| !token.is_string && token.text == *text);
            hit.then(|| &window[0])
        })
    }

    /// The same outside tests.
    pub(crate) fn find_outside_tests<'a>(&'a self, sequence: &'a [&str]) -> impl Iterator<Item = &'a Token> {
        self.find(sequence).filter(|token| !token.is_test)
    }
}

/// Every Rust file of the repository.
pub(crate) fn rust() -> &'static [Rust] {
    static RUST: OnceLock<Vec<Rust>> = OnceLock::new();
    RUST.get_or_init(|| {
        let mut all = Vec::new();
        let mut test_modules = BTreeSet::new();
        for file in files().iter().filter(|file| file.ends_with(".rs")) {
            let text = text(file).unwrap_or_else(|| panic!("{file} is not UTF-8"));
            let rust = Rust::new(file.clone(), text);
            test_modules.extend(test_modules_of(&rust.file, &rust.tokens));
            all.push(rust);
        }
        // `#[cfg(test)] mod model;` makes model.rs, and everything below it, test code.
        for rust in &mut all {
            if test_modules.iter().any(|module| rust.file.starts_with(module)) {
                rust.tokens.iter_mut().for_each(|token| token.is_test = true);
            }
        }
        all
    })
}

fn is_test_file(file: &str) -> bool {
    file.starts_with("tests/")
        || file.ends_with("/tests.rs")
        || file.contains("/tests/")
        || file.contains("/benches/")
}

/// The path prefixes of modules that are declared for tests only.
fn test_modules_of(file: &str, tokens: &[Token]) -> Vec<String> {
    let stem = ["/mod.rs", "/lib.rs", "/main.rs", ".rs"]
        .iter()
        .find_map(|end| file.strip_suffix(end))
        .unwrap_or(file);
    tokens
        .windows(3)
        .filter(|window| window[0].is_test && window[0].text == "mod" && window[2].text == ";")
        .flat_map(|window| [format!("{stem}/{}.rs", window[1].text), format!("{stem}/{}/", window[1].text)])
        .collect()
}

/// Lists a stream's tokens in order, with test items marked.
fn flatten(stream: TokenStream, is_test: bool, into: &mut Vec<Token>) {
    let mut item_is_test = false;
    let mut after_hash = false;
    for tree in stream {
        let test = is_test || item_is_test;
        match tree {
            TokenTree::Group(group) => {
                let attribute = after_hash && group.delimiter() == Delimiter::Bracket;
                if attribute && is_doc(&group) {
                    after_hash = false;
                    continue;
                }
                item_is_test |= attribute && is_test_attribute(&group);
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                let mark =
                    |text: &str, line| Token { text: text.to_owned(), line, is_string: false, is_test: test };
                into.push(mark(open, group.span_open().start().line));
                let ends_item = group.delimiter() == Delimiter::Brace;
                flatten(group.stream(), test, into);
                into.push(mark(close, group.span_close().start().line));
                if ends_item {
                    item_is_test = false;
                }
                after_hash = false;
            }
            other => {
                let line = other.span().start().line;
                let written = other.to_string();
                // `#` and `#!` start an attribute.
                after_hash = written == "#" || (after_hash && written == "!");
                let ends_item = written == ";";
                let string = string_content(&written).filter(|_| matches!(other, TokenTree::Literal(_)));
                let is_string = string.is_some();
                into.push(Token { text: string.unwrap_or(written), line, is_string, is_test: test });
                if ends_item {
                    item_is_test = false;
                }
            }
        }
    }
}

fn is_doc(attribute: &Group) -> bool {
    matches!(attribute.stream().into_iter().next(), Some(TokenTree::Ident(name)) if name == "doc")
}

/// `#[cfg(test)]`, `#[test]`, `#[tokio::test]` and the like; not `#[cfg(not(test))]`.
fn is_test_attribute(attribute: &Group) -> bool {
    let mut tokens = Vec::new();
    flatten(attribute.stream(), false, &mut tokens);
    let words: Vec<&str> =
        tokens.iter().filter(|token| !token.is_string).map(|token| token.text.as_str()).collect();
    match words.first() {
        Some(&"cfg") => words.contains(&"test") && !words.contains(&"not"),
        Some(&"cfg_attr") | None => false,
        Some(_) => words.iter().take_while(|word| **word != "(").last() == Some(&"test"),
    }
}

/// The text between the quotes of a string literal of any kind.
fn string_content(literal: &str) -> Option<String> {
    let open = literal.find('"')?;
    let prefix = literal[..open].trim_end_matches('#');
    if !matches!(prefix, "" | "b" | "c" | "r" | "br" | "cr") {
        return None;
    }
    let hashes = open - prefix.len();
    Some(literal[open + 1..literal.len() - hashes - 1].to_owned())
}

#[test]
fn tokens_know_their_line_and_whether_they_are_test_code() {
    let text = r##"//! Says .unwrap() in a comment.
/// Says .unwrap() in a comment.
fn shipped() { a.unwrap(); let s = ".unwrap()"; let r = r#"x"#; }
#[cfg(test)]
mod tests { fn helper() { b.unwrap(); } }
#[cfg(not(test))]
fn also_shipped() { c.unwrap(); }
#[tokio::test]
async fn one() { d.unwrap(); }
fn again() { e.unwrap(); }
#[cfg(test)]
mod model;
"##;
    let rust = Rust::new("core/src/thing/mod.rs".to_owned(), text.to_owned());
    let sequence = [".", "unwrap", "(", ")"];
    assert_eq!(rust.find(&sequence).map(|token| token.line).collect::<Vec<_>>(), [3, 5, 7, 9, 10]);
    assert_eq!(rust.find_outside_tests(&sequence).map(|token| token.line).collect::<Vec<_>>(), [3, 7, 10]);
    let strings: Vec<&str> = rust.tokens.iter().filter(|t| t.is_string).map(|t| t.text.as_str()).collect();
    assert_eq!(strings, [".unwrap()", "x"]);
    let modules = test_modules_of(&rust.file, &rust.tokens);
    assert!(modules.contains(&"core/src/thing/model.rs".to_owned()), "{modules:?}");
}
