//! The allocator: the C library's, behind lists of small free blocks for the thread that does the asynchronous work.
//!
//! The C library takes a lock and checks its books for each block. A tool call takes dozens of small ones, which costs an emulated processor a good
//! part of the call. All other threads use the C library alone. A block may be freed by another thread than the one that took it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;

/// The size of the smallest blocks in lists, and the alignment of all of them, in bytes. Each further list has blocks of twice the size.
const SMALLEST: usize = 16;
/// The number of lists: the largest blocks have 8 KiB.
const LISTS: usize = 10;
/// How many free blocks each list keeps at most.
const KEPT: usize = 64;
/// The same in bytes.
const KEPT_BYTES: usize = 32 << 10;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

thread_local! {
    // It has no destructor, so it can be used until its thread has ended.
    static FREE: Free = const {
        Free { is_kept: Cell::new(false), lists: [const { List::new() }; LISTS] }
    };
}

/// Lets this thread keep small free blocks. When it ends, they are lost.
pub(crate) fn keep_free_blocks() {
    FREE.with(|free| free.is_kept.set(true));
}

/// The free blocks of a thread.
struct Free {
    is_kept: Cell<bool>,
    lists: [List; LISTS],
}

/// Free blocks of one size.
struct List {
    first: Cell<*mut Block>,
    length: Cell<usize>,
}

/// The beginning of a free block.
struct Block {
    next: *mut Block,
}

impl List {
    const fn new() -> Self {
        Self { first: Cell::new(ptr::null_mut()), length: Cell::new(0) }
    }

    /// Takes a block; null if there is none.
    fn take(&self) -> *mut u8 {
        let first = self.first.get();
        if !first.is_null() {
            // SAFETY: a block in a list is nobody else's, and begins with what `keep` wrote there.
            self.first.set(unsafe { (*first).next });
            self.length.set(self.length.get() - 1);
        }
        first.cast()
    }

    /// Keeps a block unless there are `most` already; returns whether it did.
    ///
    /// # Safety
    /// The block has this list's size and the alignment of all lists, and nobody uses it.
    unsafe fn keep(&self, block: *mut u8, most: usize) -> bool {
        if self.length.get() >= most {
            return false;
        }
        let block = block.cast::<Block>();
        // SAFETY: the smallest block has room for a pointer and is aligned for it, and nobody uses this one.
        unsafe { block.write(Block { next: self.first.get() }) };
        self.first.set(block);
        self.length.set(self.length.get() + 1);
        true
    }
}

/// Returns the number of the list whose blocks suit a layout; `None` if no list's do.
fn list_of(layout: Layout) -> Option<usize> {
    if layout.size() > SMALLEST << (LISTS - 1) || layout.align() > SMALLEST {
        return None;
    }
    let smallest = layout.size().div_ceil(SMALLEST).max(1);
    Some(smallest.next_power_of_two().trailing_zeros() as usize)
}

/// Returns how many free blocks a list keeps.
fn most_of(list: usize) -> usize {
    KEPT.min(KEPT_BYTES / (SMALLEST << list))
}

/// Returns the layout of a list's blocks.
fn whole(list: usize) -> Layout {
    // SAFETY: the alignment is a power of two, and the size is a small multiple of it.
    unsafe { Layout::from_size_align_unchecked(SMALLEST << list, SMALLEST) }
}

struct Allocator;

// SAFETY: each block comes from `System`, with the layout that was asked for or with the larger one of its list, and goes back with the same layout: what
// that is depends only on the layout that the caller gives both times. A block that is in a list is given to nobody else.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(list) = list_of(layout) else {
            // SAFETY: the caller's promises are the same.
            return unsafe { System.alloc(layout) };
        };
        let block = FREE.with(|free| free.lists[list].take());
        if !block.is_null() {
            return block;
        }
        // SAFETY: the layout has a size.
        unsafe { System.alloc(whole(list)) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(list) = list_of(layout) else {
            // SAFETY: the caller's promises are the same, and `alloc` took it so.
            return unsafe { System.dealloc(block, layout) };
        };
        let is_kept = FREE.with(|free| {
            // SAFETY: `alloc` took it with the layout of this list, and the caller does not use it any more.
            free.is_kept.get() && unsafe { free.lists[list].keep(block, most_of(list)) }
        });
        if !is_kept {
            // SAFETY: `alloc` took it with this layout.
            unsafe { System.dealloc(block, whole(list)) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if list_of(layout).is_none() {
            // SAFETY: the caller's promises are the same. The system's own knows which memory is zero already.
            return unsafe { System.alloc_zeroed(layout) };
        }
        // SAFETY: the caller's promises are the same.
        let block = unsafe { self.alloc(layout) };
        if !block.is_null() {
            // SAFETY: the block has at least this size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size is valid with this alignment.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (list_of(layout), list_of(wanted)) {
            (None, None) => {
                // SAFETY: the caller's promises are the same, and `alloc` took it so.
                unsafe { System.realloc(block, layout, size) }
            }
            (own, other) if own == other => block,
            (_, _) => {
                // SAFETY: the caller promises that the size is not zero.
                let new = unsafe { self.alloc(wanted) };
                if !new.is_null() {
                    // SAFETY: both are at least so large, and the new one is nobody else's; the old one is not used any more.
                    unsafe {
                        ptr::copy_nonoverlapping(block, new, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                }
                new
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_size_has_the_list_with_the_smallest_blocks_that_suit() {
        for (size, align, list) in [
            (1, 1, Some(0)),
            (16, 16, Some(0)),
            (17, 8, Some(1)),
            (32, 1, Some(1)),
            (33, 1, Some(2)),
            (512, 8, Some(5)),
            (513, 8, Some(6)),
            (1024, 16, Some(6)),
            (1025, 1, Some(7)),
            (8192, 8, Some(9)),
            (8193, 8, None),
            (16, 32, None),
            (1 << 20, 8, None),
        ] {
            let layout = Layout::from_size_align(size, align).unwrap();
            assert_eq!(list_of(layout), list, "{size}, {align}");
            assert!(list.is_none_or(|list| whole(list).size() >= size && whole(list).align() >= align));
        }
    }

    #[test]
    fn a_free_block_is_used_again_where_blocks_are_kept() {
        std::thread::spawn(|| {
            keep_free_blocks();
            let first = Box::new([1_u8; 300]);
            let place = first.as_ptr();
            drop(first);
            let second = Box::new([2_u8; 500]);
            assert_eq!(second.as_ptr(), place);
            drop(second);
            let zeros = vec![0_u8; 400].into_boxed_slice();
            assert_eq!(zeros.as_ptr(), place);
            assert!(zeros.iter().all(|byte| *byte == 0), "nothing is left of what was there");
            // More than are kept.
            let many: Vec<Box<[u8; 40]>> = (0..3 * KEPT).map(|n| Box::new([n as u8; 40])).collect();
            assert!(many.iter().enumerate().all(|(n, block)| block.iter().all(|byte| *byte == n as u8)));
            drop(many);
            assert_eq!(FREE.with(|free| free.lists[2].length.get()), KEPT);
            let large: Vec<Vec<u8>> = (0..6).map(|_| Vec::with_capacity(8000)).collect();
            drop(large);
            assert_eq!(FREE.with(|free| free.lists[9].length.get()), 4);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn content_survives_each_change_of_size_and_of_thread() {
        let (there, comes) = std::sync::mpsc::channel::<Vec<u8>>();
        let growing = std::thread::spawn(move || {
            keep_free_blocks();
            for length in 1..3000_usize {
                let mut bytes: Vec<u8> = Vec::new();
                for at in 0..length {
                    bytes.push((at % 251) as u8);
                }
                bytes.truncate(length / 2);
                bytes.shrink_to_fit();
                there.send(bytes).unwrap();
            }
        });
        let mut count = 0;
        for bytes in comes {
            count += 1;
            assert_eq!(bytes.len(), count / 2);
            assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
        }
        assert_eq!(count, 2999);
        growing.join().unwrap();
    }
}
