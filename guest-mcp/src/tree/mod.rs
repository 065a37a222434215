//! Copies trees of files into and out of the VM, on separate streams, and exports later changes to them.
//!
//! A task serves the stream's connection. A thread packs or unpacks the tree with the rights of the requested user.

mod export;
mod manifest;
mod patch;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nexus_schema::stream::{TreeArrival, TreeEnded, TreeInOpening, TreeOutOpening, TreePart};
use nexus_schema::tools::tree::ExportOutput;
use nexus_schema::{ErrorCode, ToolError};
use nexus_tree::{
    Chunk, ChunkReader, ChunkWriter, Filter, Owner, Packing, Part, Source, Target, Top, TreeError, Under,
    Unpacking, pack, plan, target, unpack,
};
use nexus_wire::duplex::Writer;
use nexus_wire::frames::{Receiver, Sender};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::agent::{Agent, Settings};
use crate::identity::Identity;
use crate::os::{Users, with_errno};
use crate::places;
use manifest::{Header, Manifests, Tracker};

/// The maximum number of trees copied at the same time. Each uses one thread of the pool that all tools share.
const AT_ONCE: usize = 6;

static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// A slot for one of these trees.
struct Place;

impl Place {
    fn take() -> Result<Self, ToolError> {
        if UNDER_WAY.fetch_add(1, Ordering::Relaxed) < AT_ONCE {
            return Ok(Self);
        }
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
        let text = format!("{AT_ONCE} trees are already being copied");
        Err(ToolError::new(ErrorCode::GuestFailed, text).hint("wait for one to end, then try again"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Cancels the work on a thread when the task that waits for it is dropped.
fn watch(cancel: &CancellationToken) -> impl FnMut(u64, u64) -> Result<(), TreeError> + use<> {
    let cancel = cancel.clone();
    move |_, _| if cancel.is_cancelled() { Err(TreeError::Cancelled) } else { Ok(()) }
}

fn failed(error: &TreeError) -> ToolError {
    let told = of_guest(error.to_tool_error());
    match error {
        TreeError::File { source, .. } => with_errno(told, source),
        _ => told,
    }
}

/// Replaces error codes that only the host may use, such as that the guest is unreachable.
fn of_guest(error: ToolError) -> ToolError {
    match error.code.may_be_of_guest() {
        true => error,
        false => ToolError { code: ErrorCode::Cancelled, ..error },
    }
}

fn absolute(path: &str) -> Result<&Path, ToolError> {
    let path = Path::new(path);
    if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(ToolError::invalid(format!("`{}` is not an absolute path", path.display())));
    }
    Ok(path)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ToolError> + Send + 'static,
) -> Result<T, ToolError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ToolError::new(ErrorCode::GuestFailed, "the copy failed; see the console")))
}

/// Returns the user that a tree is copied as.
fn identity(user: Option<&str>, settings: &Settings) -> Result<Identity, ToolError> {
    Identity::resolve(user, settings.image_user.as_deref(), &Users::read())
}

/// A tree that is going to be copied in.
pub(crate) struct TreeIn {
    opening: TreeInOpening,
    identity: Identity,
    directory: OwnedFd,
    top: Top,
    is_new: bool,
    tracker: Option<io::Result<Tracker>>,
    part: Resumed,
    _place: Place,
}

/// The part that an interrupted copy of a file left.
enum Resumed {
    /// The copy cannot be resumed.
    No,
    /// To be described, if there is one.
    Described(Option<Part>),
    /// To be completed.
    WithPart(Part),
}

impl TreeIn {
    /// Checks that the tree can be copied in, and makes its target directory.
    pub(crate) async fn open(agent: &Agent, opening: TreeInOpening) -> Result<Self, ToolError> {
        let (place, settings, manifests) = (Place::take()?, agent.settings(), Manifests(agent.trees()));
        blocking(move || {
            let path = absolute(&opening.directory)?;
            if opening.top.contains(['/', '\0']) || matches!(&*opening.top, "." | "..") {
                return Err(ToolError::invalid(format!("`{}` is not a name", opening.top)));
            }
            let identity = identity(opening.user.as_deref(), &settings)?;
            let (directory, top, is_new) =
                identity.run(|| open_place(path, &opening))?.map_err(|e| failed(&e))?;
            let tracker = opening.track.as_ref().filter(|_| opening.arrival.is_none()).map(|track| {
                let header = Header {
                    directory: opening.directory.clone(),
                    top: opening.top.clone(),
                    exclude: track.exclude.clone(),
                };
                manifests.begin(&tree_path(&opening), &header)
            });
            let part = identity.run(|| resumed(&opening, &directory, &top))?.map_err(|e| failed(&e))?;
            Ok(Self { identity, directory, top, is_new, tracker, part, opening, _place: place })
        })
        .await
    }

    /// Receives it from its stream. An error is sent to the host.
    pub(crate) async fn run<R, W>(
        self,
        receiver: &mut Receiver<R>,
        sender: &Sender<W>,
    ) -> Result<TreeEnded, ToolError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let cancel = CancellationToken::new();
        let _guard = cancel.clone().drop_guard();
        let (into, from) = nexus_tree::chunks();
        let work = blocking(move || self.unpack(from, &cancel));
        let (received, result) = tokio::join!(nexus_tree::stream::receive(receiver, sender, into), work);
        match (received, result) {
            (Err(error), Ok(_)) => {
                Err(ToolError::new(ErrorCode::Cancelled, format!("the stream was interrupted: {error}")))
            }
            (_, result) => result,
        }
    }

    fn unpack(self, from: mpsc::Receiver<Chunk>, cancel: &CancellationToken) -> Result<TreeEnded, ToolError> {
        let Self { opening, identity, directory, top, is_new, mut tracker, part, _place } = self;
        let part = match part {
            Resumed::No => None,
            Resumed::WithPart(part) => Some(part),
            Resumed::Described(part) => {
                let described = part.map(|part| part.describe(&mut watch(cancel))).transpose();
                let part = described.map_err(|error| failed(&error))?;
                return Ok(TreeEnded { part, ..TreeEnded::default() });
            }
        };
        let owner = match (&opening.user, opening.same_owner) {
            (_, true) => Owner::Same,
            (None, false) if !opening.own => Owner::OfDirectory,
            (_, false) => Owner::Own,
        };
        let unpacked = identity.run(|| {
            let mut how =
                Unpacking { owner, specials: opening.specials, top, is_new, part, ..Unpacking::default() };
            if let Some(Ok(tracker)) = &mut tracker {
                how.track = Some(tracker);
            }
            unpack(ChunkReader::new(from), directory, &mut how, &mut watch(cancel))
        })?;
        match unpacked {
            Ok(summary) => {
                let finished = tracker.map(|tracker| tracker.and_then(Tracker::finish));
                let (tracked, problem) = match finished {
                    None => (false, None),
                    Some(Ok(())) => (true, None),
                    Some(Err(error)) => (false, Some(error.to_string())),
                };
                Ok(TreeEnded { summary, tracked, not_tracked_why: problem, part: None })
            }
            Err(broken) => {
                if let Some(Ok(tracker)) = tracker {
                    tracker.give_up();
                }
                let told = of_guest(broken.to_tool_error());
                Err(match &broken.error {
                    TreeError::File { source, .. } => with_errno(told, source),
                    _ => told,
                })
            }
        }
    }
}

/// Opens the part of the file that a copy resumes.
fn resumed(opening: &TreeInOpening, directory: &OwnedFd, top: &Top) -> Result<Resumed, TreeError> {
    let Some(resume) = &opening.resume else { return Ok(Resumed::No) };
    if opening.arrival != Some(TreeArrival::File) {
        return Err(TreeError::refused(resume.name.as_bytes(), "only a copy of one file can be resumed"));
    }
    let name = match top {
        Top::Named(name) => name,
        _ => resume.name.as_bytes(),
    };
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) || matches!(name, b"." | b"..") {
        return Err(TreeError::refused(name, "it is not a name"));
    }
    let Some(from) = resume.from else { return Ok(Resumed::Described(Part::find(directory.as_fd(), name)?)) };
    let mut part = Part::find_or_make(directory.as_fd(), name)?;
    part.keep(from)?;
    Ok(Resumed::WithPart(part))
}

/// Returns the path of the tree itself.
fn tree_path(opening: &TreeInOpening) -> PathBuf {
    let directory = Path::new(&opening.directory);
    if opening.top.is_empty() { directory.to_owned() } else { directory.join(&opening.top) }
}

/// Opens the directory that a tree is copied to. Also returns what to do with its name there, and whether the directory was made for it.
fn open_place(path: &Path, opening: &TreeInOpening) -> Result<(OwnedFd, Top, bool), TreeError> {
    if let Some(what) = opening.arrival {
        let Target { directory, under } = target(path, what)?;
        let top = match under {
            // The name comes with the stream.
            Under::Own => Top::Kept,
            under => under.top(b""),
        };
        return Ok((directory, top, false));
    }
    let (directory, is_new) = open_directory(path, opening)?;
    let top = opening.top.clone().into_bytes();
    Ok((directory, if top.is_empty() { Top::Kept } else { Top::Only(top) }, is_new))
}

/// Opens the directory that a tree is copied to; also returns whether it was made for it.
fn open_directory(path: &Path, opening: &TreeInOpening) -> Result<(OwnedFd, bool), TreeError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let fail = |action| move |error: io::Error| TreeError::file(action, bytes, error);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let (directory, is_new) = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(directory) => (directory, false),
        Err(Errno::NOENT) if opening.make => {
            let owner =
                if opening.user.is_some() { places::Owner::Maker } else { places::Owner::OfDirectory };
            places::make_directories_for(path, owner).map_err(fail("create the directory"))?;
            let opened = rustix::fs::open(path, flags, Mode::empty());
            (opened.map_err(|error| fail("open")(error.into()))?, true)
        }
        Err(error) => return Err(fail("open the directory")(error.into())),
    };
    if opening.fresh {
        let is_there = match opening.top.is_empty() {
            true => !is_new && std::fs::read_dir(path).map_err(fail("read"))?.next().is_some(),
            false => rustix::fs::statat(&directory, &*opening.top, AtFlags::SYMLINK_NOFOLLOW).is_ok(),
        };
        if is_there {
            let tree = tree_path(opening);
            let why = "it already exists; allow overwriting, or copy to another path";
            return Err(TreeError::refused(tree.as_os_str().as_encoded_bytes(), why));
        }
    }
    Ok((directory, is_new))
}

/// A tree that is going to be copied out.
pub(crate) struct TreeOut {
    identity: Identity,
    source: Source,
    packing: Packing,
    plan: bool,
    part: Option<TreePart>,
    _place: Place,
}

impl TreeOut {
    /// Checks that the tree can be copied out.
    pub(crate) async fn open(agent: &Agent, opening: TreeOutOpening) -> Result<Self, ToolError> {
        let (place, settings) = (Place::take()?, agent.settings());
        blocking(move || {
            let path = absolute(&opening.path)?;
            let identity = identity(opening.user.as_deref(), &settings)?;
            let filter = Filter::new(&opening.exclude, opening.gitignore).map_err(|e| failed(&e))?;
            let source = identity.run(|| Source::open(path, opening.follow))?.map_err(|e| failed(&e))?;
            let packing =
                Packing { top: opening.top.into_bytes(), filter, specials: opening.specials, from: 0 };
            Ok(Self { identity, source, packing, plan: opening.plan, part: opening.part, _place: place })
        })
        .await
    }

    /// Returns whether it is a directory.
    pub(crate) fn is_directory(&self) -> bool {
        self.source.is_directory()
    }

    /// Sends it.
    pub(crate) async fn run<R: AsyncRead + Unpin>(
        self,
        receiver: &mut Receiver<R>,
        sender: &Sender<Writer>,
    ) -> Result<TreeEnded, ToolError> {
        let cancel = CancellationToken::new();
        let _guard = cancel.clone().drop_guard();
        let (into, from) = nexus_tree::pieces();
        let work = blocking(move || {
            let Self { identity, source, mut packing, plan: only_plan, part, _place } = self;
            let packed = identity.run(|| {
                if only_plan {
                    return plan(&source, &packing, &mut watch(&cancel));
                }
                if let Some(part) = &part {
                    packing.from = source.same_part(part, &mut watch(&cancel))?;
                }
                pack(&source, &packing, &mut ChunkWriter::of_pieces(into), &mut watch(&cancel))
            })?;
            packed.map_err(|error| failed(&error))
        });
        let sending = async {
            let sent = nexus_tree::stream::send_pieces(receiver, sender, from).await;
            sent.map_err(|error| {
                ToolError::new(ErrorCode::Cancelled, format!("the stream was interrupted: {error}"))
            })
        };
        let (sent, packed) = tokio::join!(sending, work);
        let summary = packed.or_else(|error| sent.clone().and(Err(error)))?;
        sent?;
        sender.end().await.map_err(|error| ToolError::new(ErrorCode::Cancelled, error.to_string()))?;
        Ok(TreeEnded { summary, ..TreeEnded::default() })
    }
}

/// Compares a tree with its state when it was copied in, for the tool `export`.
pub(crate) fn export_tree(agent_trees: PathBuf, path: &str) -> Result<(Vec<u8>, ExportOutput), ToolError> {
    let tree = absolute(path)?;
    let tree: PathBuf = tree.components().collect();
    let read = |error: io::Error| {
        ToolError::new(ErrorCode::GuestFailed, format!("read what was copied to {}: {error}", tree.display()))
    };
    let Some(manifest) = Manifests(agent_trees).open(&tree).map_err(read)? else {
        let text = format!("nothing was copied to {} by guest_copy_in", tree.display());
        return Err(
            ToolError::new(ErrorCode::FileNotFound, text).hint("give the `to` path of a guest_copy_in call")
        );
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&*manifest.header.directory, flags, Mode::empty())
        .map_err(|error| failed(&TreeError::file("open", manifest.header.directory.as_bytes(), error)))?;
    let patch = export::export(&manifest, &directory).map_err(|error| failed(&error))?;
    Ok((patch.text, patch.facts))
}
