//! Joins modules of JavaScript to one script, so that a page is loaded by few requests and an app is one file.
//!
//! Each module becomes a function that is called once and returns what it exports. Understood is what the modules of this room use: `import { a, b }
//! from "./x.js";` on one line, and `export` before a class, function or constant.

use std::fmt::Write;

/// A module's file name and its text.
pub(super) type Module = (&'static str, &'static str);

/// The script of a module and of all that it imports. What is imported and not there is left out; a test keeps the modules whole.
pub(super) fn bundle(entry: &str, modules: &[Module]) -> String {
    let (mut out, mut seen) = (String::new(), Vec::new());
    add(entry, modules, &mut seen, &mut out);
    out
}

fn add(name: &str, modules: &[Module], seen: &mut Vec<&'static str>, out: &mut String) {
    let Some((name, text)) = modules.iter().find(|(module, _)| *module == name) else { return };
    if seen.contains(name) {
        return;
    }
    seen.push(name);
    for (_, from) in text.lines().filter_map(import) {
        add(from, modules, seen, out);
    }
    let (mut body, mut exported) = (String::new(), Vec::new());
    for line in text.lines() {
        // Writing to a string cannot fail.
        let _ = match (import(line), export(line)) {
            (Some((names, from)), _) => writeln!(body, "const {names} = {};", variable(from)),
            (None, Some((name, rest))) => {
                exported.push(name);
                writeln!(body, "{rest}")
            }
            (None, None) => writeln!(body, "{line}"),
        };
    }
    let _ = writeln!(
        out,
        "const {} = (() => {{\n{body}return {{ {} }};\n}})();",
        variable(name),
        exported.join(", ")
    );
}

/// What a line imports, with its braces, and from which file.
fn import(line: &str) -> Option<(&str, &str)> {
    let (names, from) = line.strip_prefix("import ")?.split_once(" from \"./")?;
    Some((names, from.strip_suffix("\";")?))
}

/// What a line exports, and the line without that word.
fn export(line: &str) -> Option<(&str, &str)> {
    let rest = line.strip_prefix("export ")?;
    let declared = rest.strip_prefix("async ").unwrap_or(rest);
    let named = ["class ", "function ", "const "].iter().find_map(|word| declared.strip_prefix(word))?;
    Some((named.split(|c: char| !c.is_alphanumeric() && c != '_').next()?, rest))
}

/// The variable that holds what a module exports.
fn variable(file: &str) -> String {
    format!("of_{}", file.trim_end_matches(".js"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_import_and_once() {
        let modules = [
            (
                "a.js",
                "import { two, Three } from \"./b.js\";\nimport { c } from \"./c.js\";\ntwo(new Three(), c);\n",
            ),
            (
                "b.js",
                "import { c } from \"./c.js\";\nexport async function two() {}\nexport class Three {}\nconst own = c;\n",
            ),
            ("c.js", "export const c = 1;\nconst own = 2;\n"),
            ("d.js", "unused();\n"),
        ];
        let expected = "const of_c = (() => {\nconst c = 1;\nconst own = 2;\nreturn { c };\n})();\n\
            const of_b = (() => {\nconst { c } = of_c;\nasync function two() {}\nclass Three {}\nconst own = c;\nreturn { two, Three };\n})();\n\
            const of_a = (() => {\nconst { two, Three } = of_b;\nconst { c } = of_c;\ntwo(new Three(), c);\nreturn {  };\n})();\n";
        assert_eq!(bundle("a.js", &modules), expected);
    }
}
