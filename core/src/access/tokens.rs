//! All tokens of one daemon, in memory: a request is authenticated without the store.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use nexus_schema::access::{Scope, Scopes};
use nexus_schema::id::{TokenId, VmId};
use nexus_schema::tools::token::{Quota, Rights};
use nexus_schema::toolset::Toolset;
use nexus_schema::{ByteSize, ErrorCode, Name, Timestamp, ToolError};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::grant::{Lineage, OWNER_PREFIX};
use super::promised::{Promised, Promises};
use super::{Caller, Grant};
use crate::os::random;
use crate::store::tokens::{self, TokenRecord, Usage};
use crate::store::{Connection, StoreError, now, random_id};

/// What the secret of a token begins with, so that scanners for secrets find it.
const SECRET_PREFIX: &str = "nexus_";
/// How many tokens may work at the same time.
const TOKENS_MAX: usize = 10_000;
/// How long a chain of tokens that made each other may be.
const CHAIN_MAX: usize = 8;
/// How many tokens there may be of one that the daemon's user made: it and all that were made with it, ended ones as well.
const FAMILY_MAX: usize = 200;
/// How often it is checked at least whether a token has expired: the host's clock may have been set, or the host may have slept.
const EXPIRY_CHECK: Duration = Duration::from_secs(60);

/// All tokens of one daemon. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tokens {
    working: Arc<RwLock<Working>>,
    lineage: Lineage,
    promises: Promises,
}

/// The tokens that work.
#[derive(Debug, Default)]
struct Working {
    by_hash: HashMap<[u8; 32], Arc<Grant>>,
    by_id: HashMap<TokenId, Arc<Grant>>,
    /// Those that the daemon's user made.
    by_name: HashMap<String, Arc<Grant>>,
}

/// The rights that are asked for a new token.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) name: Option<Name>,
    /// `None`: the default.
    pub(crate) scopes: Option<Scopes>,
    /// VMs that the caller sees.
    pub(crate) vms: Vec<VmId>,
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) all_vms: bool,
    pub(crate) tools: Option<Toolset>,
    /// Directories that the configuration allows.
    pub(crate) roots: Vec<String>,
    pub(crate) quota: Quota,
    pub(crate) expires_at: Option<Timestamp>,
}

/// The quota of a token that something new counts for, and whose things count.
#[derive(Debug, Clone)]
pub(crate) struct Charge {
    token: TokenId,
    name: Name,
    quota: Quota,
    lineage: Lineage,
    promises: Promises,
}

fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

impl Tokens {
    /// Takes up the tokens of the store, oldest first.
    pub(crate) fn load(&self, records: Vec<TokenRecord>) {
        for record in records {
            self.lineage.add(record.id, record.parent);
            let is_over = record.revoked_at.is_some() || record.expires_at.is_some_and(|at| at <= now());
            if !is_over {
                self.add(record);
            }
        }
    }

    /// Has a token work from now on, unless the one that made it does not.
    pub(crate) fn add(&self, record: TokenRecord) {
        self.lineage.add(record.id, record.parent);
        let mut key = [0; 32];
        let is_hash = data_encoding::HEXLOWER.decode_mut(record.hash.as_bytes(), &mut key) == Ok(32);
        let Ok(tools) = record.rights.tools.parse() else {
            return tracing::error!(token = %record.name, "a token is offered unknown tools; it does not work");
        };
        let mut working = self.working.write().unwrap_or_else(PoisonError::into_inner);
        let parent = record.parent.map(|id| working.by_id.get(&id).cloned());
        let (Some(parent), true) = (parent.map_or(Some(None), |parent| parent.map(Some)), is_hash) else {
            return;
        };
        let ended = parent.as_ref().map_or_else(CancellationToken::new, |parent| parent.ended.child_token());
        let (id, expires_at) = (record.id, record.expires_at);
        let owner = format!("{OWNER_PREFIX}{id}").into();
        let grant = Arc::new(Grant { record, owner, tools, parent, ended, lineage: self.lineage.clone() });
        working.by_hash.insert(key, Arc::clone(&grant));
        working.by_id.insert(id, Arc::clone(&grant));
        if grant.parent.is_none() {
            working.by_name.insert(grant.record.name.to_string(), Arc::clone(&grant));
        }
        drop(working);
        if let Some(expires_at) = expires_at {
            tokio::spawn(expire(Arc::downgrade(&self.working), self.lineage.clone(), grant, expires_at));
        }
    }

    /// The caller that a secret belongs to.
    pub(crate) fn authenticate(&self, secret: &str) -> Option<Caller> {
        let key = hash(secret);
        let working = self.working.read().unwrap_or_else(PoisonError::into_inner);
        let grant = working.by_hash.get(&key)?;
        grant.works().then(|| Caller::of(Arc::clone(grant)))
    }

    /// A caller with the rights of the token of this name, if the daemon's user made it. Names that holders of tokens choose do not count.
    pub(crate) fn by_name(&self, name: &str) -> Option<Caller> {
        let working = self.working.read().unwrap_or_else(PoisonError::into_inner);
        let grant = working.by_name.get(name)?;
        grant.works().then(|| Caller::of(Arc::clone(grant)))
    }

    /// A new token for a caller, with its secret; it works once it was stored and added.
    ///
    /// # Errors
    /// `forbidden` if it would have more rights than the caller, `quota_exceeded` if the caller's token may not make more.
    pub(crate) fn draft(&self, caller: &Caller, wanted: Wanted) -> Result<(TokenRecord, String), ToolError> {
        if self.working.read().unwrap_or_else(PoisonError::into_inner).by_id.len() >= TOKENS_MAX {
            return Err(ToolError::new(ErrorCode::Busy, format!("{TOKENS_MAX} tokens exist already"))
                .hint("revoke some that are no longer needed"));
        }
        let (name, expires_at) = (wanted.name.clone(), wanted.expires_at);
        let (rights, expires_at) = match caller.grant() {
            None => (owned(wanted), expires_at),
            Some(grant) => {
                self.may_make(grant)?;
                lessened(grant, wanted)?
            }
        };
        let id: TokenId = random_id();
        let secret = format!("{SECRET_PREFIX}{}", random::token());
        let text = id.to_string();
        let made_up = || format!("token-{}", &text[text.len() - 6..]).parse();
        let record = TokenRecord {
            seq: 0,
            id,
            name: name.map_or_else(made_up, Ok).map_err(|e| ToolError::internal(format!("{e}")))?,
            hash: data_encoding::HEXLOWER.encode(&hash(&secret)),
            parent: caller.grant().map(|grant| grant.record.id),
            owner: caller.owner.to_string(),
            rights,
            created_at: now(),
            expires_at,
            revoked_at: None,
        };
        Ok((record, secret))
    }

    /// Refuses a token that one makes whose chain is too long or whose family is too large.
    fn may_make(&self, grant: &Grant) -> Result<(), ToolError> {
        if grant.chain().count() >= CHAIN_MAX {
            let message =
                format!("this token is the last of {CHAIN_MAX} that made each other; it cannot make more");
            return Err(ToolError::new(ErrorCode::QuotaExceeded, message)
                .hint("use this token, or ask the holder of the one that made it for another"));
        }
        let root = grant.chain().last().unwrap_or(grant);
        if self.family(root.record.id).len() >= FAMILY_MAX {
            let message = format!(
                "{FAMILY_MAX} tokens come from the token {} already, ended ones included",
                root.record.name
            );
            return Err(ToolError::new(ErrorCode::QuotaExceeded, message)
                .hint("use one that works, or ask the daemon's user for another token"));
        }
        Ok(())
    }

    /// A token and all that were made with it.
    pub(crate) fn family(&self, token: TokenId) -> Vec<TokenId> {
        self.lineage.family(token)
    }

    /// Has tokens stop working: their sessions, streams and waiting calls end.
    pub(crate) fn end(&self, tokens: &[TokenId]) {
        end(&self.working, tokens);
    }

    /// The quotas that what an owner makes counts for. If its token does not work any more, these are the quotas of the nearest one above it that does.
    /// Work that goes on after its token keeps those that it began with.
    pub(crate) fn charges(&self, owner: &str) -> Vec<Charge> {
        let Some(id) = owner.strip_prefix(OWNER_PREFIX).and_then(|id| id.parse::<TokenId>().ok()) else {
            return Vec::new();
        };
        let grant = {
            let working = self.working.read().unwrap_or_else(PoisonError::into_inner);
            self.lineage.upwards(id).iter().find_map(|id| working.by_id.get(id).cloned())
        };
        let chain = grant.iter().flat_map(|grant| grant.chain());
        let limited = chain.filter(|grant| !grant.record.rights.quota.is_none());
        limited
            .map(|grant| Charge {
                token: grant.record.id,
                name: grant.record.name.clone(),
                quota: grant.record.rights.quota,
                lineage: self.lineage.clone(),
                promises: self.promises.clone(),
            })
            .collect()
    }

    /// Promises disk space to an owner, to be asked in a transaction that writes: what is made meanwhile is seen, and sees it. It counts for the owner's
    /// quotas until it is dropped.
    ///
    /// # Errors
    /// [`StoreError::QuotaExceeded`] if one of these has no room for so many bytes.
    pub(crate) fn promise(&self, tx: &Connection, owner: &str, bytes: u64) -> Result<Promised, StoreError> {
        let more = Usage { disk: bytes, ..Usage::default() };
        self.charges(owner).iter().try_for_each(|charge| charge.check(tx, more, None))?;
        Ok(self.promises.add(owner, bytes))
    }
}

/// Has tokens stop working.
fn end(working: &RwLock<Working>, tokens: &[TokenId]) {
    let mut working = working.write().unwrap_or_else(PoisonError::into_inner);
    working.by_hash.retain(|_, grant| !tokens.contains(&grant.record.id));
    working.by_name.retain(|_, grant| !tokens.contains(&grant.record.id));
    let ended: Vec<_> = tokens.iter().filter_map(|token| working.by_id.remove(token)).collect();
    drop(working);
    ended.iter().for_each(|grant| grant.ended.cancel());
}

/// Has a token stop working at its time.
async fn expire(working: Weak<RwLock<Working>>, lineage: Lineage, grant: Arc<Grant>, at: Timestamp) {
    loop {
        let left = at.as_millis().saturating_sub(now().as_millis());
        let Ok(left) = u64::try_from(left).map(Duration::from_millis) else { break };
        if left.is_zero() {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(left.min(EXPIRY_CHECK)) => {}
            () = grant.ended.cancelled() => return,
        }
    }
    let Some(working) = working.upgrade() else { return };
    end(&working, &lineage.family(grant.record.id));
}

/// The scopes of a new token for which none are asked.
const DEFAULT_SCOPES: [Scope; 3] = [Scope::Read, Scope::Exec, Scope::Lifecycle];

/// The rights of a token that the daemon's user makes.
fn owned(wanted: Wanted) -> Rights {
    Rights {
        scopes: wanted.scopes.unwrap_or_else(|| DEFAULT_SCOPES.into_iter().collect()),
        vms: wanted.vms,
        tags: wanted.tags,
        all_vms: wanted.all_vms,
        tools: wanted.tools.unwrap_or(Toolset::ALL).to_string(),
        roots: wanted.roots,
        quota: wanted.quota,
    }
}

/// The rights of a token that another one makes: never more than that one has. Of VMs it sees only those that the other one sees,
/// whatever it asks for.
fn lessened(grant: &Grant, wanted: Wanted) -> Result<(Rights, Option<Timestamp>), ToolError> {
    let mut beyond = Vec::new();
    let own: Scopes = Scope::ALL.into_iter().filter(|scope| grant.has(*scope)).collect();
    let scopes = match wanted.scopes {
        Some(scopes) => scopes,
        None => DEFAULT_SCOPES.into_iter().collect::<Scopes>().common(own),
    };
    beyond.extend(scopes.beyond(own).map(|scope| format!("the scope {scope}")));
    let tools = wanted.tools.unwrap_or(grant.tools);
    if !tools.is_within(grant.tools) {
        beyond.push(format!("the tools {tools}; it has {}", grant.tools));
    }
    let is_within = |root: &&String| !grant.roots().iter().any(|own| Path::new(root).starts_with(own));
    beyond.extend(wanted.roots.iter().filter(is_within).map(|root| format!("the root {root}")));
    let (asked, own) = (wanted.quota, grant.record.rights.quota);
    let mut smaller = |what: &str, asked: Option<u64>, own: Option<u64>| {
        if let (Some(asked), Some(own)) = (asked, own)
            && asked > own
        {
            beyond.push(format!("a quota of {asked} {what}; it has {own}"));
        }
        asked.or(own)
    };
    let count = |value: Option<u64>| value.and_then(|value| u32::try_from(value).ok());
    let size = |value: Option<ByteSize>| value.map(ByteSize::as_bytes);
    let quota = Quota {
        vms: count(smaller("VMs", asked.vms.map(u64::from), own.vms.map(u64::from))),
        vcpus: count(smaller("vCPUs", asked.vcpus.map(u64::from), own.vcpus.map(u64::from))),
        memory: smaller("bytes of memory", size(asked.memory), size(own.memory)).map(ByteSize::bytes),
        disk: smaller("bytes of disk", size(asked.disk), size(own.disk)).map(ByteSize::bytes),
    };
    let expires_at = match (wanted.expires_at, grant.record.expires_at) {
        (Some(asked), Some(own)) if asked > own => {
            beyond.push(format!("an end after its own, {own}"));
            Some(own)
        }
        (asked, own) => asked.or(own),
    };
    if !beyond.is_empty() {
        let message = format!("a token cannot hand out more than it has: {}", beyond.join(", "));
        return Err(ToolError::new(ErrorCode::Forbidden, message).hint("ask for less"));
    }
    let rights = Rights {
        scopes,
        vms: wanted.vms,
        tags: wanted.tags,
        all_vms: wanted.all_vms,
        tools: tools.to_string(),
        roots: wanted.roots,
        quota,
    };
    Ok((rights, expires_at))
}

impl Charge {
    /// Whether the quota allows `more`, beside what there is; what the VM `except` takes does not count. To be asked in the
    /// transaction that makes it.
    pub(crate) fn check(&self, db: &Connection, more: Usage, except: Option<VmId>) -> Result<(), StoreError> {
        let used = self.used(db, except)?;
        let Quota { vms, vcpus, memory, disk } = self.quota;
        let size = |bytes: u64| ByteSize::bytes(bytes).to_string();
        let count = |count: u64| count.to_string();
        let bytes = |size: Option<ByteSize>| size.map(ByteSize::as_bytes);
        for (what, shown, limit, used, more) in [
            ("VMs", &count as &dyn Fn(u64) -> String, vms.map(u64::from), used.vms, more.vms),
            ("vCPUs", &count, vcpus.map(u64::from), used.vcpus, more.vcpus),
            ("memory", &size, bytes(memory), used.memory, more.memory),
            ("disk", &size, bytes(disk), used.disk, more.disk),
        ] {
            let Some(limit) = limit.filter(|limit| more > 0 && used.saturating_add(more) > *limit) else {
                continue;
            };
            return Err(StoreError::QuotaExceeded {
                what: format!(
                    "{what}: the token {} may have {}, has {}, and this takes {}",
                    self.name,
                    shown(limit),
                    shown(used),
                    shown(more)
                ),
            });
        }
        Ok(())
    }
}

impl Charge {
    /// Whether what there is is within the quota of disk, in the transaction that found out how large it is.
    pub(crate) fn check_held(&self, db: &Connection) -> Result<(), StoreError> {
        let Some(limit) = self.quota.disk else { return Ok(()) };
        let used = ByteSize::bytes(self.used(db, None)?.disk);
        if used <= limit {
            return Ok(());
        }
        let what = format!("disk: the token {} may have {limit}, and with this it has {used}", self.name);
        Err(StoreError::QuotaExceeded { what })
    }

    /// Whether the quota of disk has anything left, for something whose size is known only when it is made: that is [`Charge::check_held`].
    pub(crate) fn check_room(&self, db: &Connection) -> Result<(), StoreError> {
        let Some(limit) = self.quota.disk else { return Ok(()) };
        let used = ByteSize::bytes(self.used(db, None)?.disk);
        if used < limit {
            return Ok(());
        }
        let what = format!("disk: the token {} may have {limit}, and has {used} already", self.name);
        Err(StoreError::QuotaExceeded { what })
    }

    /// What counts, with what is promised; without what the VM `except` has.
    fn used(&self, db: &Connection, except: Option<VmId>) -> Result<Usage, StoreError> {
        let owners = self.owners();
        let used = tokens::usage(db, &owners, except)?;
        Ok(Usage { disk: used.disk.saturating_add(self.promises.of(&owners)), ..used })
    }

    /// The owners whose things count, with those of tokens that were made meanwhile.
    fn owners(&self) -> Vec<String> {
        self.lineage.family(self.token).iter().map(|id| format!("{OWNER_PREFIX}{id}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scopes(scopes: &[Scope]) -> Option<Scopes> {
        Some(scopes.iter().copied().collect())
    }

    fn make(
        tokens: &Tokens,
        caller: &Caller,
        wanted: Wanted,
    ) -> Result<(Caller, TokenRecord, String), ToolError> {
        let (record, secret) = tokens.draft(caller, wanted)?;
        tokens.add(record.clone());
        Ok((tokens.authenticate(&secret).expect("it works"), record, secret))
    }

    #[tokio::test]
    async fn a_token_hands_out_less_than_it_has_and_never_more() {
        let tokens = Tokens::default();
        let later = Timestamp::from_millis(now().as_millis() + 60_000);
        let wanted = Wanted {
            scopes: scopes(&[Scope::Exec, Scope::Lifecycle]),
            tools: Some(Toolset::WORK),
            roots: vec!["/srv/a".into()],
            quota: Quota { vms: Some(2), ..Quota::default() },
            expires_at: Some(later),
            ..Wanted::default()
        };
        let (parent, _, _) = make(&tokens, &Caller::owner("uid:0"), wanted).unwrap();
        let too_much = Wanted {
            scopes: scopes(&[Scope::Admin, Scope::WaiveConfirmation]),
            tools: Some(Toolset::ALL),
            roots: vec!["/srv/ab".into(), "/srv".into()],
            quota: Quota { vms: Some(3), ..Quota::default() },
            expires_at: Some(Timestamp::from_millis(later.as_millis() + 1)),
            ..Wanted::default()
        };
        let error = make(&tokens, &parent, too_much).unwrap_err();
        for part in [
            "scope admin",
            "scope waive_confirmation",
            "tools all",
            "/srv/ab",
            "root /srv,",
            "quota of 3 VMs",
            "an end after",
        ] {
            assert!(error.message.contains(part), "{part} in {error}");
        }
        let less = Wanted { roots: vec!["/srv/a/b".into()], ..Wanted::default() };
        let (child, record, _) = make(&tokens, &parent, less).unwrap();
        assert_eq!(record.rights.quota.vms, Some(2));
        assert_eq!(record.expires_at, Some(later));
        assert!(child.has(Scope::Lifecycle) && !child.has(Scope::Images));
        assert!(parent.made(&child.owner) && !child.made(&parent.owner));
        assert_eq!(tokens.charges(&child.owner).len(), 2);
        // Without it, what it makes still counts for the one that made it.
        tokens.end(&[record.id]);
        let names: Vec<_> = tokens.charges(&child.owner).into_iter().map(|charge| charge.token).collect();
        assert_eq!(names, [parent.grant().unwrap().record.id]);
    }

    #[tokio::test]
    async fn tokens_make_only_so_many_and_so_deep() {
        let tokens = Tokens::default();
        let owner = Caller::owner("uid:0");
        let (root, _, _) = make(&tokens, &owner, Wanted::default()).unwrap();
        let mut last = root.clone();
        for _ in 1..CHAIN_MAX {
            last = make(&tokens, &last, Wanted::default()).unwrap().0;
        }
        let error = make(&tokens, &last, Wanted::default()).unwrap_err();
        assert!(error.code == ErrorCode::QuotaExceeded && error.message.contains("the last of"), "{error}");
        for _ in CHAIN_MAX..FAMILY_MAX {
            let (_, record, _) = make(&tokens, &root, Wanted::default()).unwrap();
            tokens.end(&[record.id]);
        }
        let error = make(&tokens, &root, Wanted::default()).unwrap_err();
        assert!(error.code == ErrorCode::QuotaExceeded && error.message.contains("ended ones"), "{error}");
        make(&tokens, &owner, Wanted::default()).unwrap();
    }

    #[tokio::test]
    async fn a_request_is_authorised_among_many_tokens_in_no_time() {
        let tokens = Tokens::default();
        let made: Vec<_> =
            (0..1000).map(|_| make(&tokens, &Caller::owner("uid:0"), Wanted::default()).unwrap().2).collect();
        let start = std::time::Instant::now();
        for secret in made.iter().cycle().take(10_000) {
            let caller = tokens.authenticate(secret).unwrap();
            assert_eq!(caller.authorise("guest_run_command", Scope::Exec).unwrap(), "exec");
        }
        let each = start.elapsed() / 10_000;
        println!("authenticated and authorised in {each:?}");
        // About 1 µs in a release build; much more only if something waits or searches.
        assert!(each < Duration::from_micros(100), "{each:?}");
    }

    #[tokio::test]
    async fn what_is_revoked_or_expired_ends_with_all_that_it_made() {
        let tokens = Tokens::default();
        let (parent, record, secret) = make(&tokens, &Caller::owner("uid:0"), Wanted::default()).unwrap();
        let (child, _, child_secret) = make(&tokens, &parent, Wanted::default()).unwrap();
        let (other, _, other_secret) = make(&tokens, &Caller::owner("uid:0"), Wanted::default()).unwrap();
        assert!(tokens.authenticate("nexus_").is_none() && tokens.authenticate(&secret[1..]).is_none());
        tokens.end(&tokens.family(record.id));
        for (caller, secret) in [(&parent, &secret), (&child, &child_secret)] {
            assert!(tokens.authenticate(secret).is_none());
            assert!(caller.ended().is_cancelled());
            assert_eq!(caller.authorise("vm_list", Scope::Read).unwrap_err().1, "token ended");
        }
        assert!(tokens.authenticate(&other_secret).is_some() && !other.ended().is_cancelled());

        let soon = Timestamp::from_millis(now().as_millis() + 100);
        let (brief, _, secret) =
            make(&tokens, &Caller::owner("uid:0"), Wanted { expires_at: Some(soon), ..Wanted::default() })
                .unwrap();
        tokio::time::timeout(Duration::from_secs(10), brief.ended().cancelled()).await.unwrap();
        assert!(tokens.authenticate(&secret).is_none());
        // After a restart, what ended stays so.
        let again = Tokens::default();
        let mut revoked = record.clone();
        revoked.revoked_at = Some(now());
        again.load(vec![revoked]);
        assert!(again.authenticate(&secret).is_none());
    }
}
