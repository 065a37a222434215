//! Skills (SEP-2640): instructions for common work in VMs, as files that a client may load when it needs them.

use rmcp::model::{Resource, Skill, SkillFrontmatter, SkillResource, SkillResources};

/// The skills by name, as `SKILL.md` with their frontmatter.
const SKILLS: [(&str, &str); 3] = [
    ("build-and-test", include_str!("skills/build-and-test/SKILL.md")),
    ("explore-alternatives", include_str!("skills/explore-alternatives/SKILL.md")),
    ("serve-and-look", include_str!("skills/serve-and-look/SKILL.md")),
];

fn uri_of(name: &str) -> String {
    format!("skill://{name}/SKILL.md")
}

/// The text of a skill by its URI.
pub(super) fn text(uri: &str) -> Option<&'static str> {
    SKILLS.iter().find(|(name, _)| uri == uri_of(name)).map(|(_, text)| *text)
}

/// All skills, with the digests of their files.
pub(crate) fn all() -> Vec<Skill> {
    SKILLS.iter().map(|(name, text)| described(name, text)).collect()
}

/// A skill by its URI.
pub(crate) fn named(uri: &str) -> Option<Skill> {
    SKILLS.iter().find(|(name, _)| uri == uri_of(name)).map(|(name, text)| described(name, text))
}

/// The skills as ordinary resources, for clients without the extension.
pub(crate) fn resources() -> Vec<Resource> {
    let one = |(name, text): &(&str, &str)| {
        Resource::new(uri_of(name), *name)
            .with_title(format!("Skill {name}"))
            .with_description(description(text))
            .with_mime_type("text/markdown")
            .with_size(text.len() as u64)
    };
    SKILLS.iter().map(one).collect()
}

fn described(name: &str, text: &str) -> Skill {
    let uri = uri_of(name);
    let file = SkillResource::from_bytes(uri.clone(), text.as_bytes());
    Skill::new(uri, SkillFrontmatter::new(name, description(text)), SkillResources::Files(vec![file]))
}

/// The `description` in the frontmatter of a skill.
fn description(text: &str) -> &str {
    text.lines().find_map(|line| line.strip_prefix("description: ")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use nexus_schema::tools;

    use super::*;

    #[test]
    fn skills_have_the_frontmatter_of_the_agent_skills_format() {
        for (name, text) in SKILLS {
            let head = text
                .strip_prefix("---\n")
                .and_then(|text| text.split_once("\n---\n"))
                .expect("frontmatter")
                .0;
            let keys: Vec<&str> =
                head.lines().filter_map(|line| line.split_once(": ")).map(|(key, _)| key).collect();
            assert_eq!(keys, ["name", "description"], "{name}");
            assert!(head.contains(&format!("name: {name}\n")), "{name}");
            assert!((20..=1024).contains(&description(text).len()), "{name}");
            assert!(text.len() < 4096, "{name}: a skill costs tokens");
        }
    }

    #[test]
    fn skills_name_tools_that_exist() {
        let known: Vec<String> = tools::host()
            .into_iter()
            .chain(tools::guest_on_host())
            .map(|info| info.name)
            .chain(tools::guest().into_iter().map(|info| format!("guest_{}", info.name)))
            .collect();
        for (name, text) in SKILLS {
            let words = text.split(|c: char| !c.is_ascii_lowercase() && c != '_');
            let named = words.filter(|word| {
                ["guest_", "vm_", "op_", "image_", "template_", "drive_"]
                    .iter()
                    .any(|of| word.starts_with(of))
            });
            for tool in named {
                assert!(known.iter().any(|known| known == tool), "{name} names {tool}");
            }
        }
    }
}
