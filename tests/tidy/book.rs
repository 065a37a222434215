//! Checks the book: its list of chapters, and its pictures. Links and anchors of all documents are checked in `documents.rs`.

use std::collections::BTreeSet;

use crate::source::{files, text};
use crate::{Finding, none};

const SUMMARY: &str = "docs/SUMMARY.md";

/// The pages that the list of chapters names, with their lines, as paths in the repository.
fn chapters() -> Vec<(usize, String)> {
    let summary = text(SUMMARY).expect("the list of chapters is text");
    let links = summary.lines().enumerate().filter_map(|(at, line)| {
        let target = line.split("](").nth(1)?.split(')').next()?;
        let path = target.strip_prefix("../").map_or_else(|| format!("docs/{target}"), str::to_owned);
        Some((at + 1, path))
    });
    links.collect()
}

#[test]
fn every_page_is_a_chapter() {
    let chapters = chapters();
    let mut findings = Vec::new();
    let mut seen = BTreeSet::new();
    for (line, path) in &chapters {
        if !seen.insert(path.as_str()) {
            findings.push(Finding {
                file: SUMMARY.into(),
                line: *line,
                what: format!("{path} is there twice"),
            });
        }
    }
    for page in files().iter().filter(|file| file.starts_with("docs/") && file.ends_with(".md")) {
        if page != SUMMARY && !seen.contains(page.as_str()) {
            findings.push(Finding {
                file: page.clone(),
                line: 1,
                what: format!("{SUMMARY} does not have it"),
            });
        }
    }
    assert!(chapters.len() > 20, "{} chapters", chapters.len());
    none("each page of docs/ is a chapter of the book, once", findings);
}

#[test]
fn every_page_begins_with_its_title() {
    let mut findings = Vec::new();
    for (_, path) in chapters() {
        let page = text(&path).unwrap_or_default();
        let first = page.lines().next().unwrap_or_default();
        if !first.starts_with("# ") {
            findings.push(Finding {
                file: path,
                line: 1,
                what: "does not begin with a title, `# ...`".into(),
            });
        }
    }
    none("each chapter begins with its title", findings);
}

/// A picture is drawn by the reader's browser, perhaps without a network.
#[test]
fn pictures_are_whole_and_are_shown() {
    let shown: String =
        files().iter().filter(|file| file.ends_with(".md")).filter_map(|file| text(file)).collect();
    let mut findings = Vec::new();
    let pictures = files().iter().filter(|file| file.starts_with("docs/img/"));
    for file in pictures {
        let mut find =
            |what: &str| findings.push(Finding { file: file.clone(), line: 1, what: what.to_owned() });
        let picture = text(file).unwrap_or_default().replace("http://www.w3.org/2000/svg", "");
        if !picture.starts_with("<svg ") || !picture.trim_end().ends_with("</svg>") {
            find("is not an SVG picture");
        }
        for word in ["<script", "<image", "<foreignObject", "href=", "http:", "https:", "@import"] {
            if picture.contains(word) {
                find(&format!("has {word:?}: a picture contains all that it shows, and runs nothing"));
            }
        }
        if !picture.contains("aria-label=") {
            find("does not say what it shows: aria-label");
        }
        let name = file.trim_start_matches("docs/");
        if !shown.contains(&format!("]({name})")) {
            find("is in no document");
        }
    }
    none("pictures of the book are whole, and each is shown", findings);
}
