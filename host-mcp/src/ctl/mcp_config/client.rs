//! MCP clients: where each keeps its configuration, and in which form.

use std::ffi::OsStr;
use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::{Server, TOKEN_VARIABLE, Way, quoted};
use crate::ctl::error::Error;
use crate::dirs::Env;

/// An MCP client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Client {
    ClaudeCode,
    ClaudeDesktop,
    #[value(name = "vscode")]
    VsCode,
    Cursor,
    Windsurf,
    Zed,
    Codex,
    GeminiCli,
}

impl Client {
    /// Returns its name for people.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::ClaudeCode => "Claude Code",
            Self::ClaudeDesktop => "Claude Desktop",
            Self::VsCode => "VS Code",
            Self::Cursor => "Cursor",
            Self::Windsurf => "Windsurf",
            Self::Zed => "Zed",
            Self::Codex => "Codex",
            Self::GeminiCli => "Gemini CLI",
        }
    }

    /// Returns the key of the map of servers in its file.
    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::VsCode => "servers",
            Self::Zed => "context_servers",
            Self::Codex => "mcp_servers",
            Self::ClaudeCode | Self::ClaudeDesktop | Self::Cursor | Self::Windsurf | Self::GeminiCli => {
                "mcpServers"
            }
        }
    }

    /// Whether its file is TOML; the others are JSON.
    pub(super) const fn is_toml(self) -> bool {
        matches!(self, Self::Codex)
    }

    /// Returns its configuration file: the user's, or the one of the project in the current directory.
    pub(super) fn file(self, env: &Env, project: bool) -> Result<PathBuf, Error> {
        if project {
            return match self {
                Self::ClaudeCode => Ok(".mcp.json".into()),
                Self::VsCode => Ok(".vscode/mcp.json".into()),
                Self::Cursor => Ok(".cursor/mcp.json".into()),
                Self::Zed => Ok(".zed/settings.json".into()),
                Self::Codex => Ok(".codex/config.toml".into()),
                Self::GeminiCli => Ok(".gemini/settings.json".into()),
                Self::ClaudeDesktop | Self::Windsurf => Err(Error::usage(format!(
                    "{} has no configuration of projects: leave --project out",
                    self.title()
                ))),
            };
        }
        let home = absolute(env, "HOME")
            .ok_or_else(|| Error::usage("HOME is not set: cannot find the client's file"))?;
        let config = absolute(env, "XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
        Ok(match self {
            Self::ClaudeCode => home.join(".claude.json"),
            Self::ClaudeDesktop => config.join("Claude/claude_desktop_config.json"),
            Self::VsCode => config.join("Code/User/mcp.json"),
            Self::Cursor => home.join(".cursor/mcp.json"),
            Self::Windsurf => home.join(".codeium/windsurf/mcp_config.json"),
            Self::Zed => config.join("zed/settings.json"),
            Self::Codex => {
                absolute(env, "CODEX_HOME").unwrap_or_else(|| home.join(".codex")).join("config.toml")
            }
            Self::GeminiCli => home.join(".gemini/settings.json"),
        })
    }

    /// Returns the server's entry in the map of servers.
    pub(super) fn entry(self, server: &Server) -> Result<Map<String, Value>, Error> {
        let mut entry = Map::new();
        match &server.way {
            Way::Stdio { command, args, env } => {
                if matches!(self, Self::ClaudeCode | Self::VsCode | Self::Cursor) {
                    entry.insert("type".into(), "stdio".into());
                }
                entry.insert("command".into(), command.clone().into());
                entry.insert("args".into(), args.clone().into());
                if !env.is_empty() {
                    entry.insert("env".into(), env.clone().into());
                }
            }
            Way::Http { url, token } => {
                let key = match self {
                    Self::ClaudeDesktop => {
                        return Err(Error::usage(
                            "Claude Desktop's file has no servers over HTTP: leave --http out",
                        ));
                    }
                    Self::Windsurf => "serverUrl",
                    Self::GeminiCli => "httpUrl",
                    Self::ClaudeCode | Self::VsCode => {
                        entry.insert("type".into(), "http".into());
                        "url"
                    }
                    Self::Cursor | Self::Zed | Self::Codex => "url",
                };
                entry.insert(key.into(), url.clone().into());
                match (self, token) {
                    (Self::Codex, None) => entry.insert("bearer_token_env_var".into(), TOKEN_VARIABLE.into()),
                    (Self::Codex, Some(_)) => {
                        entry.insert("http_headers".into(), self.headers(token.as_deref()))
                    }
                    _ => entry.insert("headers".into(), self.headers(token.as_deref())),
                };
            }
        }
        Ok(entry)
    }

    fn headers(self, token: Option<&str>) -> Value {
        let token = token.map_or_else(|| self.reference(), str::to_owned);
        json!({ "Authorization": format!("Bearer {token}") })
    }

    /// How its file refers to the token in its environment.
    fn reference(self) -> String {
        match self {
            Self::ClaudeCode => format!("${{{TOKEN_VARIABLE}}}"),
            Self::VsCode | Self::Cursor | Self::Windsurf => format!("${{env:{TOKEN_VARIABLE}}}"),
            Self::GeminiCli | Self::Codex | Self::ClaudeDesktop => format!("${TOKEN_VARIABLE}"),
            // Its file has no variables.
            Self::Zed => TOKEN_VARIABLE.to_owned(),
        }
    }

    /// Returns a whole file with only this server.
    pub(super) fn document(self, server: &Server) -> Result<String, Error> {
        let document = json!({ self.key(): { server.name.clone(): self.entry(server)? } });
        if self.is_toml() {
            return toml::to_string(&document)
                .map_err(|error| Error::usage(format!("cannot write TOML: {error}")));
        }
        Ok(format!("{document:#}\n"))
    }

    /// Returns the command that installs the same server.
    fn install_line(self, server: &Server) -> String {
        let mut words = vec!["nexusctl".to_owned(), "mcp".into(), "install".into()];
        words.extend(self.to_possible_value().map(|value| value.get_name().to_owned()));
        match &server.way {
            Way::Stdio { args, .. } => {
                words.extend(args.iter().skip_while(|arg| *arg != "mcp").skip(1).cloned())
            }
            Way::Http { url, .. } => words.push(format!("--http={url}")),
        }
        if server.name != "nexus" {
            words.extend(["--server-name".to_owned(), server.name.clone()]);
        }
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }

    /// Returns what to do with the document.
    pub(super) fn how_to(self, server: &Server) -> String {
        let name = &server.name;
        let mut text = match (self, &server.way) {
            (Self::ClaudeCode, Way::Stdio { command, args, env }) => {
                let env: String = env
                    .iter()
                    .map(|(key, value)| {
                        format!(" --env {}", quoted(&format!("{key}={}", value.as_str().unwrap_or_default())))
                    })
                    .collect();
                let words = std::iter::once(command).chain(args);
                let line = words.map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
                format!(
                    "run:   claude mcp add --scope user {name}{env} -- {line}\n\
                     or save the above as .mcp.json in a project, to share it with all who work there"
                )
            }
            (Self::ClaudeCode, Way::Http { .. }) => {
                "save the above as .mcp.json in a project, or merge it into ~/.claude.json".to_owned()
            }
            (Self::ClaudeDesktop, _) => {
                "merge the above into claude_desktop_config.json (Settings > Developer > Edit Config) and restart\n\
                 Claude Desktop; the file is in ~/.config/Claude on Linux, in ~/Library/Application Support/Claude on macOS"
                    .to_owned()
            }
            (Self::VsCode, _) => {
                let mut one = self.entry(server).unwrap_or_default();
                one.insert("name".into(), name.clone().into());
                format!(
                    "run:   code --add-mcp {}\nor save the above as .vscode/mcp.json in a workspace",
                    quoted(&Value::from(one).to_string())
                )
            }
            (Self::Cursor, _) => {
                "save the above as .cursor/mcp.json in a project, or merge it into ~/.cursor/mcp.json for all of them".to_owned()
            }
            (Self::Windsurf, _) => "merge the above into ~/.codeium/windsurf/mcp_config.json and refresh its list of servers".to_owned(),
            (Self::Zed, _) => "merge the above into ~/.config/zed/settings.json, or .zed/settings.json of a project".to_owned(),
            (Self::Codex, _) => "append the above to ~/.codex/config.toml, or .codex/config.toml of a project".to_owned(),
            (Self::GeminiCli, _) => "merge the above into ~/.gemini/settings.json, or .gemini/settings.json of a project".to_owned(),
        };
        text.push_str(&format!("\nor run: {}", self.install_line(server)));
        if let Way::Http { token: None, .. } = server.way {
            text.push_str(&match self {
                Self::Zed => format!("\nput a token in the place of {TOKEN_VARIABLE}: "),
                _ => format!("\nstart the client with a token in its environment, as {TOKEN_VARIABLE}: "),
            });
            text.push_str("the one in the file http-token of the state directory, or a new one");
        }
        text
    }
}

fn absolute(env: &Env, name: &str) -> Option<PathBuf> {
    env.get(OsStr::new(name)).map(PathBuf::from).filter(|path| path.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stdio(env: &[(&str, &str)]) -> Server {
        Server {
            name: "nexus".into(),
            way: Way::Stdio {
                command: "/opt/my tools/nexusctl".into(),
                args: vec!["mcp".into()],
                env: env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            },
        }
    }

    fn http(token: Option<&str>) -> Server {
        Server {
            name: "nexus".into(),
            way: Way::Http { url: "http://127.0.0.1:9600/mcp".into(), token: token.map(str::to_owned) },
        }
    }

    #[test]
    fn every_client_is_described() {
        for client in Client::value_variants() {
            let name = client.to_possible_value().unwrap().get_name().to_owned();
            for (way, server) in
                [("stdio", stdio(&[])), ("http", http(None)), ("token", http(Some("secret")))]
            {
                let shown = match client.document(&server) {
                    Ok(document) => format!("{document}\n{}", client.how_to(&server)),
                    Err(error) => error.to_string(),
                };
                insta::assert_snapshot!(format!("config-{name}-{way}"), shown);
            }
        }
    }

    #[test]
    fn what_says_where_the_daemon_is_goes_along() {
        let server = stdio(&[("NEXUS_RUNTIME_DIR", "/r")]);
        let entry = Client::ClaudeCode.entry(&server).unwrap();
        assert_eq!(entry["env"]["NEXUS_RUNTIME_DIR"], "/r");
        let how_to = Client::ClaudeCode.how_to(&server);
        assert!(how_to.contains("--env NEXUS_RUNTIME_DIR=/r -- '/opt/my tools/nexusctl' mcp"), "{how_to}");
    }

    #[test]
    fn files_are_below_home_or_in_the_project() {
        let env: Env = [("HOME", "/h"), ("XDG_CONFIG_HOME", "/c")].map(|(k, v)| (k.into(), v.into())).into();
        let file =
            |client: Client, project| client.file(&env, project).ok().map(|path| path.display().to_string());
        assert_eq!(file(Client::Zed, false).as_deref(), Some("/c/zed/settings.json"));
        assert_eq!(file(Client::GeminiCli, false).as_deref(), Some("/h/.gemini/settings.json"));
        assert_eq!(file(Client::ClaudeCode, true).as_deref(), Some(".mcp.json"));
        assert_eq!(file(Client::Windsurf, true), None);
        assert!(Client::Cursor.file(&Env::new(), false).is_err());
    }
}
