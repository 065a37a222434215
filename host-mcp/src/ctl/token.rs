//! `nexusctl token`: access tokens.

use clap::{Args, Subcommand};
use nexus_schema::access::Scope;
use nexus_schema::id::{TokenKind, VmKind};
use nexus_schema::tools::token::{
    Quota, TokenCreate, TokenCreateOutput, TokenCreateParams, TokenDetails, TokenList, TokenListParams,
    TokenRevoke, TokenRevokeParams,
};
use nexus_schema::{ByteSize, Name, Reference, Timestamp};

use super::App;
use super::args::pair;
use super::client::raw;
use super::confirm::{Yes, confirmed};
use super::each::{each, show_deleted};
use super::error::Error;
use super::format;
use super::list::{self, Paging};
use super::moment::Moment;
use super::ui::{Format, Table};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a token with limited rights; its secret is shown once
    Create(Box<CreateArgs>),
    /// List tokens
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Revoke tokens: what uses them ends within a second
    #[command(visible_aliases = ["rm", "delete"])]
    Revoke(RevokeArgs),
}

/// What a token may do.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name
    name: Option<Name>,
    /// What it may do: read, exec, lifecycle, images, network, admin, waive-confirmation [default: read,exec,lifecycle]
    #[arg(short, long = "scope", value_name = "SCOPE", value_delimiter = ',')]
    scopes: Vec<Scope>,
    /// A VM that it sees besides those that it makes
    #[arg(long = "vm", value_name = "VM")]
    vms: Vec<Reference<VmKind>>,
    /// It also sees the VMs that have this label; with several, all of them
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    tag: Vec<(String, String)>,
    /// It sees all VMs
    #[arg(long)]
    all_vms: bool,
    /// The tools that it may be offered, such as work,drives [default: all]
    #[arg(long, value_name = "SET")]
    tools: Option<String>,
    /// A directory of the host for guest_copy_in and guest_copy_out; it has to be in copy_roots of the configuration
    #[arg(long = "root", value_name = "DIRECTORY")]
    roots: Vec<String>,
    /// How many VMs it may have
    #[arg(long, value_name = "COUNT")]
    max_vms: Option<u32>,
    /// How many virtual CPUs its VMs may have together
    #[arg(long, value_name = "COUNT")]
    max_vcpus: Option<u32>,
    /// How much memory its VMs may have together
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<ByteSize>,
    /// How much disk its drives may have together
    #[arg(long, value_name = "SIZE")]
    max_disk: Option<ByteSize>,
    /// How long it works, such as 30m, 12h or 7d, or until when, such as 2026-01-02T15:00:00Z [default: until it is revoked]
    #[arg(short, long, value_name = "TIME")]
    expires: Option<Moment>,
}

/// Which tokens.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Also those that are revoked or expired
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    paging: Paging,
}

/// What to revoke.
#[derive(Debug, Args)]
pub(crate) struct RevokeArgs {
    /// The tokens: names or ids
    #[arg(required = true, value_name = "TOKEN")]
    tokens: Vec<Reference<TokenKind>>,
    #[command(flatten)]
    yes: Yes,
}

/// Runs one verb.
pub(crate) async fn run(app: &App, command: Command) -> Result<u8, Error> {
    match command {
        Command::Create(args) => create(app, *args).await,
        Command::List(args) => list_tokens(app, args).await,
        Command::Revoke(args) => revoke(app, args).await,
    }
}

async fn create(app: &App, args: CreateArgs) -> Result<u8, Error> {
    let quota =
        Quota { vms: args.max_vms, vcpus: args.max_vcpus, memory: args.max_memory, disk: args.max_disk };
    let now = app.ui.now();
    let ends = args.expires.map(|at| {
        at.seconds_ahead(now).ok_or_else(|| Error::usage("--expires must be in the future, such as 12h"))
    });
    let params = TokenCreateParams {
        name: args.name,
        scopes: args.scopes,
        vms: args.vms,
        tags: args.tag.into_iter().collect(),
        all_vms: args.all_vms.then_some(true),
        tools: args.tools,
        roots: args.roots,
        quota: (!quota.is_none()).then_some(quota),
        expires_in_s: ends.transpose()?,
    };
    let made: TokenCreateOutput = app.connect().await?.call::<TokenCreate>(&params).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&raw(&made)?)?,
        Format::Quiet => app.ui.line(&made.token)?,
        Format::Human => {
            app.ui.line(&made.token)?;
            let TokenDetails { name, id, .. } = &made.details;
            app.ui.say(&format!(
                "token {name} ({id}) may {}; this is the only time that its secret is shown",
                scopes(&made.details)
            ));
        }
    }
    Ok(0)
}

async fn list_tokens(app: &App, args: ListArgs) -> Result<u8, Error> {
    let mut client = app.connect().await?;
    let ended = args.all.then_some(true);
    let page = |limit, cursor| TokenListParams { ended, limit: Some(limit), cursor };
    let listed = list::all::<TokenList, TokenDetails>(&mut client, &args.paging, "tokens", page).await?;
    match app.ui.format {
        Format::Json => app.ui.json(&listed.raw)?,
        Format::Quiet => list::ids(&app.ui, listed.rows.iter().map(|token| token.id))?,
        Format::Human => {
            listed.show(&app.ui, table(&listed.rows, app.ui.now()), "no tokens")?;
            listed.say_more(&app.ui);
        }
    }
    Ok(0)
}

async fn revoke(app: &App, args: RevokeArgs) -> Result<u8, Error> {
    each(app, args.tokens, async |client, token| {
        let params = TokenRevokeParams { token, confirm: None };
        let revoked = confirmed(app, args.yes, async |confirm| {
            client.call::<TokenRevoke>(&TokenRevokeParams { confirm, ..params.clone() }).await
        });
        let revoked = revoked.await?.revoked;
        revoked
            .iter()
            .try_for_each(|gone| show_deleted(app, gone, gone.id, &format!("{} revoked", gone.name)))
    })
    .await
}

fn scopes(token: &TokenDetails) -> String {
    token.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(", ")
}

/// Which VMs a token sees, in a few words.
fn vms(token: &TokenDetails) -> String {
    let mut words = Vec::new();
    if token.all_vms || token.scopes.contains(&Scope::Admin) {
        return "all".into();
    }
    words.push("its own".to_owned());
    words.extend(token.vms.iter().map(ToString::to_string));
    if !token.tags.is_empty() {
        let tags: Vec<_> = token.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
        words.push(tags.join("+"));
    }
    words.join(", ")
}

fn ends(token: &TokenDetails, now: Timestamp) -> String {
    match (token.revoked_at, token.expires_at) {
        (Some(_), _) => "revoked".into(),
        (None, Some(at)) if at <= now => "expired".into(),
        (None, Some(at)) => at.to_string(),
        (None, None) => "-".into(),
    }
}

fn table(tokens: &[TokenDetails], now: Timestamp) -> Table {
    let mut table =
        Table::with_headings(&["ID", "NAME", "SCOPES", "VMS", "TOOLS", "MADE BY", "CREATED", "ENDS"])
            .prose(&["SCOPES"])
            .dropping(&["CREATED", "MADE BY", "TOOLS", "VMS"]);
    for token in tokens {
        table.row([
            token.id.into(),
            (&token.name).into(),
            scopes(token).into(),
            vms(token).into(),
            (&token.tools).into(),
            (&token.owner).into(),
            format::ago(token.created_at, now).into(),
            ends(token, now).into(),
        ]);
    }
    table
}
