//! Puts overlay files into an existing ext4 filesystem: first looks up where they go, then writes them with one script.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;

use super::super::ImageError;
use super::super::facts::InitSystem;
use super::super::overlay::Additions;
use super::super::tree::refuse;
use super::{Ask, write_for_tool};
use crate::ext4::quote;

/// How many symbolic links are followed on one path; the kernel's limit.
const HOPS: usize = 40;

/// What is under a name.
enum Found {
    Nothing,
    Directory,
    Link(String),
    Other,
}

impl Ask<'_> {
    /// Writes the overlay files to the filesystem.
    pub(super) async fn put(
        &self,
        additions: &Additions,
        init: Option<InitSystem>,
        scratch: &Path,
    ) -> Result<(), ImageError> {
        let wanted = additions.files(init, |_| false);
        let mut there = BTreeSet::new();
        for path in wanted.keys().filter(|path| !additions.overlays.contains_key(*path)) {
            if !matches!(self.look(path).await?, Found::Nothing) {
                there.insert(path.clone());
            }
        }
        let files = additions.files(init, |path| there.contains(path));
        if files.is_empty() {
            return Ok(());
        }
        self.progress.step("laying files over the source");
        let mut script = Script { commands: Vec::new(), made: BTreeSet::new() };
        for (at, (path, overlay)) in files.iter().enumerate() {
            self.progress.log(&format!("laying over {path}"));
            let staged = format!("overlay-{at}");
            write_for_tool(&scratch.join(&staged), &overlay.content)?;
            let (directory, name) = self.directory_of(path, &mut script).await?;
            let place = format!("{directory}/{name}");
            match self.look(&place).await? {
                Found::Nothing => {}
                Found::Directory => {
                    return Err(refuse(path.as_bytes(), "a file is to be laid over a directory"));
                }
                Found::Link(_) | Found::Other => script.push(&["rm", &quoted(&place)]),
            }
            script.push(&["cd", &quoted(if directory.is_empty() { "/" } else { &directory })]);
            script.push(&["write", &staged, &quoted(&name)]);
            let here = quoted(&format!("./{name}"));
            script.push(&["sif", &here, "mode", &format!("0{:o}", 0o100_000 | u32::from(overlay.mode))]);
            script.push(&["cd", "/"]);
        }
        self.change("overlays", &script.commands, scratch).await
    }

    /// The directory and the name of a path. Links are followed; the script makes missing directories.
    async fn directory_of(&self, path: &str, script: &mut Script) -> Result<(String, String), ImageError> {
        let words = |text: &str| -> Vec<String> {
            text.split('/').filter(|part| !part.is_empty() && *part != ".").map(str::to_owned).collect()
        };
        let mut parents: VecDeque<String> = words(path).into();
        let name = parents.pop_back().ok_or_else(|| refuse(path.as_bytes(), "the root is a directory"))?;
        let (mut at, mut hops) = (Vec::new(), 0);
        while let Some(part) = parents.pop_front() {
            if part == ".." {
                at.pop();
                continue;
            }
            let here = format!("/{}", [&at[..], std::slice::from_ref(&part)].concat().join("/"));
            if script.made.contains(&here) {
                at.push(part);
                continue;
            }
            match self.look(&here).await? {
                Found::Directory => at.push(part),
                Found::Nothing => {
                    script.push(&["mkdir", &quoted(&here)]);
                    script.made.insert(here);
                    at.push(part);
                }
                Found::Link(target) => {
                    hops += 1;
                    if hops > HOPS {
                        return Err(refuse(path.as_bytes(), "it goes through too many symbolic links"));
                    }
                    if target.starts_with('/') {
                        at.clear();
                    }
                    for word in words(&target).into_iter().rev() {
                        parents.push_front(word);
                    }
                }
                Found::Other => return Err(refuse(path.as_bytes(), "a part of its path is not a directory")),
            }
        }
        let directory = at.iter().map(|part| format!("/{part}")).collect();
        Ok((directory, name))
    }

    async fn look(&self, path: &str) -> Result<Found, ImageError> {
        let said = self.stat(&quoted(path)).await?;
        let kind = said.lines().next().and_then(|line| line.split_once("Type: ")).map(|(_, kind)| kind);
        Ok(match kind {
            None => Found::Nothing,
            Some(kind) if kind.starts_with("directory") => Found::Directory,
            Some(kind) if kind.starts_with("symlink") => match target(&said) {
                Some(target) => Found::Link(target),
                None => Found::Other,
            },
            Some(_) => Found::Other,
        })
    }
}

/// Where a short symbolic link points.
fn target(said: &str) -> Option<String> {
    let line = said.lines().find_map(|line| line.strip_prefix("Fast link dest: "))?;
    Some(line.trim().trim_matches('"').to_owned())
}

fn quoted(word: &str) -> String {
    String::from_utf8_lossy(&quote(word.as_bytes())).into_owned()
}

struct Script {
    commands: Vec<String>,
    made: BTreeSet<String>,
}

impl Script {
    fn push(&mut self, words: &[&str]) {
        self.commands.push(words.join(" "));
    }
}
