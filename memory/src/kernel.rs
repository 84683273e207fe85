//! The token that makes "may this code enter the kernel?" visible in a signature.
//!
//! A function that makes a system call takes `&Kernel`. Under isolation the only way to get one is
//! the slow path, which hands it to a closure; code that runs outside isolation states so by
//! calling [`Kernel::outside_isolation`]. The token holds nothing and costs nothing.

use std::marker::PhantomData;

/// Permission to enter the kernel, held for as long as the borrow lasts. Neither `Send` nor `Sync`:
/// permission belongs to the thread that got it.
#[derive(Debug)]
pub struct Kernel(PhantomData<*const ()>);

impl Kernel {
    /// States that the calling thread is not isolated: set-up code, housekeeping threads, tests,
    /// and workers that run without strict mode.
    ///
    /// Calling this on an isolated worker is not unsafe, only wrong: the system call that follows
    /// is a breach, and is reported as one.
    #[must_use]
    pub fn outside_isolation() -> Self {
        Self(PhantomData)
    }
}
