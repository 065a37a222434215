//! Layers on top of each other, as in OCI images: what a layer hides of those below.
//!
//! A file `.wh.NAME` in a layer hides NAME beside it; a file `.wh..wh..opq` hides everything in its directory. Both affect
//! only lower layers, whatever their position in their own.

use std::collections::BTreeMap;

use super::{Body, ImageError, NodeId, Place, Tree, refuse};

/// The prefix of names that hide another.
const WHITEOUT: &[u8] = b".wh.";
/// The prefix of names that are reserved for metadata of layers.
const NOTES: &[u8] = b".wh..wh.";
/// The name that hides everything in a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

impl Tree {
    /// Starts a layer: everything so far is below it.
    pub(crate) fn begin_layer(&mut self) -> Result<(), ImageError> {
        const MOST: u16 = u16::MAX;
        self.layer =
            self.layer.checked_add(1).ok_or(ImageError::TooLarge { limit: MOST.into(), what: "layers" })?;
        self.whiteouts.clear();
        Ok(())
    }

    /// Applies an entry that hides something; `false` if it is an ordinary entry.
    pub(crate) fn white_out(&mut self, path: &[u8]) -> Result<bool, ImageError> {
        let components = self.components(path)?;
        let Some((name, parents)) = components.split_last() else { return Ok(false) };
        let notes = components.iter().any(|part| part.starts_with(NOTES));
        if !notes && !name.starts_with(WHITEOUT) {
            return Ok(false);
        }
        self.count(path.len())?;
        if notes && *name != OPAQUE {
            return Ok(true);
        }
        let Some(parent) = self.walk(&parents.join(&b'/')) else { return Ok(true) };
        // Once is enough: entries that follow in this layer stay.
        let mark = (parent, name.to_vec());
        if self.children(parent).is_none() || !self.whiteouts.insert(mark) {
            return Ok(true);
        }
        if *name == OPAQUE {
            self.hide_children(parent);
            return Ok(true);
        }
        match &name[WHITEOUT.len()..] {
            b"" | b"." | b".." => Err(refuse(path, "it hides no name")),
            hidden => {
                self.hide(Place { parent, name: hidden.to_vec() });
                Ok(true)
            }
        }
    }

    /// Records that the current layer put a name.
    pub(super) fn mark(&mut self, place: &Place) {
        let layer = self.layer;
        if let Body::Directory(children) = &mut self.nodes[place.parent as usize].body
            && let Some(child) = children.get_mut(&place.name[..])
        {
            child.layer = layer;
        }
    }

    /// Removes a name unless this layer put it; in a directory, removes what this layer did not put there.
    fn hide(&mut self, place: Place) {
        let Some(child) = self.child(&place) else { return };
        if matches!(self.nodes[child as usize].body, Body::Directory(_)) {
            self.hide_children(child);
        }
        let empty = self.children(child).is_none_or(BTreeMap::is_empty);
        let put_here = self
            .children(place.parent)
            .and_then(|children| children.get(&place.name[..]))
            .is_some_and(|child| child.layer == self.layer);
        if empty && !put_here {
            self.unname(&place);
        }
    }

    fn hide_children(&mut self, directory: NodeId) {
        let names: Vec<Box<[u8]>> =
            self.children(directory).into_iter().flat_map(|children| children.keys().cloned()).collect();
        for name in names {
            self.hide(Place { parent: directory, name: name.into() });
        }
    }
}
