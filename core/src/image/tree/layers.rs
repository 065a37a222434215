//! Layers on each other, as OCI images have them: what a layer hides of those below it.
//!
//! A layer says that a name is gone by a file `.wh.NAME` beside it, and that a directory has nothing of the layers below by
//! a file `.wh..wh..opq` in it. Both mean lower layers only, wherever they stand in their own.

use std::collections::BTreeMap;

use super::{Body, ImageError, NodeId, Place, Tree, refuse};

/// What names that hide another begin with.
const WHITEOUT: &[u8] = b".wh.";
/// What names begin with that are notes of the layers' own.
const NOTES: &[u8] = b".wh..wh.";
/// What hides all of a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

impl Tree {
    /// Begins a layer: what is there now is below it.
    pub(crate) fn begin_layer(&mut self) -> Result<(), ImageError> {
        const MOST: u16 = u16::MAX;
        self.layer =
            self.layer.checked_add(1).ok_or(ImageError::TooLarge { limit: MOST.into(), what: "layers" })?;
        self.whiteouts.clear();
        Ok(())
    }

    /// Hides what an entry of a layer says is hidden; `false` if it is an ordinary entry.
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
        // Once is enough: what comes after it in this layer stays.
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

    /// Remembers that the layer at hand put a name.
    pub(super) fn mark(&mut self, place: &Place) {
        let layer = self.layer;
        if let Body::Directory(children) = &mut self.nodes[place.parent as usize].body
            && let Some(child) = children.get_mut(&place.name[..])
        {
            child.layer = layer;
        }
    }

    /// Takes a name away, unless this layer put it; of a directory, what this layer did not put into it.
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
