//! Search domains of the host, for guests whose names the host's own servers are asked for.

use std::io;

use nexus_schema::network::name;

use crate::os::paths::RESOLV_CONF;

/// Maximum number of search domains besides that of VMs. Older resolvers take six in all.
pub(crate) const SEARCH_MAX: usize = 5;

/// Returns the host's search domains.
pub(crate) fn host_search() -> io::Result<Vec<String>> {
    match std::fs::read_to_string(RESOLV_CONF) {
        Ok(text) => Ok(parse_search(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Parses a `resolv.conf`: of several lines with domains the last one counts. What is not a name is left out, such as the root.
fn parse_search(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split(['#', ';']).next().unwrap_or_default().split_whitespace();
        if matches!(words.next(), Some("search" | "domain")) {
            found = words.filter_map(|word| name(word).ok()).take(SEARCH_MAX).collect();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_domains_of_the_host_are_those_of_the_last_line() {
        let found = |text: &str| parse_search(text).join(" ");
        assert_eq!(
            found("nameserver 192.0.2.1\nsearch Corp.example. lab.example # ours\n"),
            "corp.example lab.example"
        );
        assert_eq!(found("search a.example\ndomain b.example\n"), "b.example");
        assert_eq!(found("search .\noptions edns0\n"), "", "systemd-resolved has this where there are none");
        assert_eq!(found("search a.example b/../c \u{1b}[2J 10.0.0.1 d.example\n"), "a.example d.example");
        assert_eq!(found("search a b c d e f g\n"), "a b c d e");
        assert_eq!(found("searched a.example\n# search b.example\n"), "");
    }
}
