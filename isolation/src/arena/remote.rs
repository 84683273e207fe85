//! Blocks that other threads gave back: a stack without locks that lives in the blocks themselves.
//!
//! Contract: anybody pushes, in a few instructions, and waits for nobody; one thread takes, always
//! everything at once, so that no link is read which another taker might change (there is no ABA). A
//! block that is on the stack is nobody's memory but the stack's.
#![allow(unsafe_code, reason = "nodes in freed memory; see each block")]

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An atomic word, so that a model checker's can stand in.
pub(super) trait Word {
    fn new(value: usize) -> Self;
    fn load(&self, order: Ordering) -> usize;
    fn store(&self, value: usize, order: Ordering);
    fn swap(&self, value: usize, order: Ordering) -> usize;
    fn replace(&self, old: usize, new: usize, order: Ordering) -> Result<usize, usize>;
}

impl Word for AtomicUsize {
    fn new(value: usize) -> Self {
        Self::new(value)
    }
    #[inline(always)]
    fn load(&self, order: Ordering) -> usize {
        self.load(order)
    }
    #[inline(always)]
    fn store(&self, value: usize, order: Ordering) {
        self.store(value, order);
    }
    fn swap(&self, value: usize, order: Ordering) -> usize {
        self.swap(value, order)
    }
    fn replace(&self, old: usize, new: usize, order: Ordering) -> Result<usize, usize> {
        self.compare_exchange_weak(old, new, order, Ordering::Relaxed)
    }
}

/// What a freed block holds: 16 bytes, which is the least that the arena hands out.
#[repr(C)]
pub(super) struct Node<W> {
    next: W,
    /// Size and alignment of the block, packed.
    layout: W,
}

/// Bits of the alignment's logarithm.
const ALIGN_BITS: u32 = 6;

fn pack(layout: Layout) -> usize {
    // A block of an arena is smaller than the arena, so no bit of its size is lost.
    layout.size() << ALIGN_BITS | layout.align().trailing_zeros() as usize
}

fn unpack(packed: usize) -> Layout {
    let (size, align) = (packed >> ALIGN_BITS, 1 << (packed & ((1 << ALIGN_BITS) - 1)));
    // SAFETY: packed from a layout.
    unsafe { Layout::from_size_align_unchecked(size, align) }
}

/// The stack.
pub(super) struct Stack<W>(W);

impl<W: Word> Stack<W> {
    pub(super) fn new() -> Self {
        Self(W::new(0))
    }

    /// Pushes a block.
    ///
    /// # Safety
    /// The block is the caller's, has at least 16 bytes whatever its layout says, is aligned for a word,
    /// and stays mapped.
    pub(super) unsafe fn push(&self, block: NonNull<u8>, layout: Layout) {
        let node = block.cast::<Node<W>>();
        // SAFETY: the caller's promise.
        unsafe { node.write(Node { next: W::new(0), layout: W::new(pack(layout)) }) };
        let address = node.as_ptr().expose_provenance();
        let mut head = self.0.load(Ordering::Relaxed);
        loop {
            // SAFETY: written above, and still the caller's.
            unsafe { node.as_ref() }.next.store(head, Ordering::Relaxed);
            // Release: who takes the block sees what is in the node, and what was done with the block.
            match self.0.replace(head, address, Ordering::Release) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Whether there may be something to take; one load.
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }

    /// Takes everything. One thread only may do that.
    pub(super) fn take(&self) -> Taken<W> {
        // Acquire: see `push`. Blocks below the first were released before it, in the same chain of
        // read-modify-writes of the head.
        Taken(self.0.swap(0, Ordering::Acquire), std::marker::PhantomData)
    }
}

/// Blocks that were taken and are given out one by one.
pub(super) struct Taken<W>(usize, std::marker::PhantomData<*const W>);

impl<W: Word> Taken<W> {
    pub(super) const fn none() -> Self {
        Self(0, std::marker::PhantomData)
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0 == 0
    }

    pub(super) fn next(&mut self) -> Option<(NonNull<u8>, Layout)> {
        let node = NonNull::new(std::ptr::with_exposed_provenance_mut::<Node<W>>(self.0))?;
        // SAFETY: an address that `push` published, of a node that nobody else reaches any more.
        let (next, layout) = unsafe {
            (node.as_ref().next.load(Ordering::Relaxed), node.as_ref().layout.load(Ordering::Relaxed))
        };
        self.0 = next;
        Some((node.cast(), unpack(layout)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// loom's word.
    struct Modelled(loom::sync::atomic::AtomicUsize);

    impl Word for Modelled {
        fn new(value: usize) -> Self {
            Self(loom::sync::atomic::AtomicUsize::new(value))
        }
        fn load(&self, order: Ordering) -> usize {
            self.0.load(order)
        }
        fn store(&self, value: usize, order: Ordering) {
            self.0.store(value, order);
        }
        fn swap(&self, value: usize, order: Ordering) -> usize {
            self.0.swap(value, order)
        }
        fn replace(&self, old: usize, new: usize, order: Ordering) -> Result<usize, usize> {
            self.0.compare_exchange(old, new, order, Ordering::Relaxed)
        }
    }

    /// Memory for a node, the number of which is its layout's size.
    fn block() -> NonNull<u8> {
        let node = Box::new(Node { next: Modelled::new(0), layout: Modelled::new(0) });
        NonNull::from(Box::leak(node)).cast()
    }

    fn take(stack: &Stack<Modelled>, sizes: &mut Vec<usize>) {
        let mut taken = stack.take();
        while let Some((block, layout)) = taken.next() {
            assert_eq!(layout.align(), 64);
            sizes.push(layout.size());
            // SAFETY: it came from `block`, and nobody has it any more.
            drop(unsafe { Box::from_raw(block.cast::<Node<Modelled>>().as_ptr()) });
        }
        assert!(taken.is_empty());
    }

    /// Every interleaving, and every value that the memory model lets a load return.
    #[test]
    fn nothing_is_lost_and_nothing_comes_twice() {
        loom::model(|| {
            let stack = loom::sync::Arc::new(Stack::<Modelled>::new());
            let pushers: Vec<_> = (0..2_usize)
                .map(|pusher| {
                    let stack = loom::sync::Arc::clone(&stack);
                    loom::thread::spawn(move || {
                        for n in 0..=pusher {
                            let layout = Layout::from_size_align(10 * pusher + n, 64).unwrap();
                            // SAFETY: a node's memory that is given up here.
                            unsafe { stack.push(block(), layout) };
                        }
                    })
                })
                .collect();
            let mut sizes = Vec::new();
            take(&stack, &mut sizes);
            for pusher in pushers {
                pusher.join().unwrap();
            }
            take(&stack, &mut sizes);
            assert!(stack.is_empty());
            sizes.sort_unstable();
            assert_eq!(sizes, [0, 10, 11]);
        });
    }

    #[test]
    fn layouts_survive_packing() {
        for (size, align) in [(0, 1), (1, 1), (1 << 32, 4096), (usize::MAX >> ALIGN_BITS >> 1, 1 << 40)] {
            let layout = Layout::from_size_align(size, align).unwrap();
            assert_eq!(unpack(pack(layout)), layout);
        }
    }
}
