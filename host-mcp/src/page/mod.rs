//! The page for people: what a browser gets at `/` of the HTTP endpoint, and the same views as an MCP App. These are fixed files without rights or data:
//! the page calls tools by MCP, with the token of whoever logs in, as every client does; the app by the client that shows it.
//!
//! ```text
//! web/*.js     the views: page.js for a browser, app.js for a client's frame, all others for both
//! web/xterm/   xterm.js, as published
//! ```
//! What guests say becomes text nodes only. The content security policy of the page allows its own files, keeps scripts from parsing HTML
//! (trusted types), and has no exception for anything inline but the one style in the document, by its digest. That is there so that a browser
//! paints the document before it has loaded anything else.

mod bundle;

use std::sync::LazyLock;

use data_encoding::BASE64;
use nexus_core::host::Sha256;

use bundle::{Module, bundle};

/// Lists the modules with their texts.
macro_rules! modules {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("web/", $name)))),*] };
}

const MODULES: &[Module] = modules![
    "app.js",
    "audit.js",
    "bridge.js",
    "commands.js",
    "console.js",
    "dialogs.js",
    "dom.js",
    "format.js",
    "history.js",
    "http.js",
    "network.js",
    "overview.js",
    "page.js",
    "poll.js",
    "result.js",
    "router.js",
    "shell.js",
    "terminal.js",
    "vm.js",
    "vms.js",
];

const STYLE: &str = include_str!("web/page.css");

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    include_str!("web/index.html").replace("<style></style>", &format!("<style>{STYLE}</style>"))
});

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let style = BASE64.encode(&Sha256::of(STYLE.as_bytes()).0);
    format!(
        "default-src 'none'; script-src 'self'; style-src 'self' 'sha256-{style}'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
});

static SCRIPT: LazyLock<String> = LazyLock::new(|| bundle("page.js", MODULES));

static APP: LazyLock<String> = LazyLock::new(|| {
    // Clients put their own scripts and styles into it, so inline ones are allowed; connections are not.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>Nexus</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<div id=\"page\"></div>\n<script type=\"module\">\n{}</script>\n</body>\n</html>\n",
        bundle("app.js", MODULES)
    )
});

/// A file of the page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct File {
    /// Its type.
    pub(crate) content_type: &'static str,
    /// Its text.
    pub(crate) text: &'static str,
}

/// The file at a path; `None` if the page has none there.
pub(crate) fn file(path: &str) -> Option<File> {
    let (content_type, text) = match path {
        "/" => ("text/html; charset=utf-8", DOCUMENT.as_str()),
        "/page.js" => ("text/javascript; charset=utf-8", SCRIPT.as_str()),
        "/xterm.js" => ("text/javascript; charset=utf-8", include_str!("web/xterm/xterm.js")),
        "/xterm.css" => ("text/css; charset=utf-8", include_str!("web/xterm/xterm.css")),
        "/icon.svg" => ("image/svg+xml", include_str!("web/icon.svg")),
        _ => return None,
    };
    Some(File { content_type, text })
}

/// What a browser may do with the page: run its own script, show its own files, and call this daemon.
pub(crate) fn policy() -> &'static str {
    &POLICY
}

/// The MCP App: one document with everything in it.
pub(crate) fn app() -> &'static str {
    &APP
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [&str; 5] = ["/", "/page.js", "/xterm.js", "/xterm.css", "/icon.svg"];

    #[test]
    fn the_page_and_the_app_are_small() {
        let page: usize = FILES.iter().map(|path| file(path).unwrap().text.len()).sum();
        assert!(page <= 400_000, "the page is {page} bytes");
        assert!(app().len() <= 100_000, "the app is {} bytes", app().len());
    }

    #[test]
    fn the_document_is_painted_as_it_is() {
        let document = file("/").unwrap().text;
        let (_, rest) = document.split_once("<style>").unwrap();
        let (style, rest) = rest.split_once("</style>").unwrap();
        let digest = BASE64.encode(&Sha256::of(style.as_bytes()).0);
        assert!(policy().contains(&format!("style-src 'self' 'sha256-{digest}';")) && style.len() > 1000);
        assert!(
            !document.contains("rel=\"stylesheet\"") && document.matches("<script").count() == 1,
            "{document}"
        );
        assert!(rest.contains("<script type=\"module\"") && rest.contains("<h1>Nexus</h1>"), "{rest}");
    }

    #[test]
    fn every_import_is_there_and_exported() {
        let all = |name: &str| MODULES.iter().find(|(module, _)| *module == name).map(|(_, text)| *text);
        for (module, text) in MODULES {
            for line in text.lines().filter(|line| line.starts_with("import ")) {
                let (names, from) = line
                    .trim_start_matches("import { ")
                    .trim_end_matches("\";")
                    .split_once(" } from \"./")
                    .unwrap_or_else(|| panic!("{module}: {line}"));
                let imported = all(from).unwrap_or_else(|| panic!("{module}: {from} is missing"));
                for name in names.split(", ") {
                    let is_exported = ["class", "function", "async function", "const"].iter().any(|kind| {
                        let start = format!("export {kind} {name}");
                        imported.lines().any(|line| {
                            line.strip_prefix(&start)
                                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
                        })
                    });
                    assert!(is_exported, "{module}: {from} does not export {name}");
                }
            }
        }
        let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/page/web")).unwrap();
        let scripts =
            folder.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|end| end == "js"));
        assert_eq!(scripts.count(), MODULES.len(), "a script is in no bundle");
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere_or_parsed() {
        for text in [file("/").unwrap().text, &SCRIPT, STYLE, app()] {
            for word in
                ["http://", "https://", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("]
            {
                assert!(!text.contains(word), "{word}");
            }
        }
        // It ends at the first of these.
        let script = bundle("app.js", MODULES);
        assert!(!script.contains("</script") && !script.contains("<!--") && !STYLE.contains("</"));
        for word in ["localStorage", "sessionStorage", "WebSocket", "fetch("] {
            assert!(!script.contains(word), "the app has {word}");
        }
        assert!(!SCRIPT.contains("\nimport ") && !SCRIPT.contains("\nexport "));
    }
}
