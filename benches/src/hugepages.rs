//! Huge pages for the time of a run, so that neither side is slowed by small ones.
//!
//! Contract: what was reserved is given back when the value is dropped and on SIGINT and SIGTERM, which
//! then end the program (after SIGKILL `nr_hugepages` stays raised); where nothing can be reserved
//! both sides run on small pages, and the report says so.

use signal_hook::consts::TERM_SIGNALS;

const NR: &str = "/proc/sys/vm/nr_hugepages";

/// 2 MiB pages reserved until dropped.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

fn read() -> Option<u64> {
    std::fs::read_to_string(NR).ok()?.trim().parse().ok()
}

impl HugePages {
    /// Raises the number of reserved 2 MiB pages to `pages`; `None` when the kernel does not let us.
    #[must_use]
    pub fn reserve(pages: u64) -> Option<Self> {
        let before = read()?;
        let mut signals = signal_hook::iterator::Signals::new(TERM_SIGNALS).ok()?;
        std::thread::spawn(move || {
            if signals.forever().next().is_some() {
                drop(Self { before });
                std::process::exit(130);
            }
        });
        // Made first, so that a partial reservation is undone too.
        let reserved = Self { before };
        if before < pages {
            std::fs::write(NR, pages.to_string()).ok()?;
        }
        (read()? >= pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(NR, self.before.to_string()) {
            eprintln!("cannot give huge pages back: {error}; run: echo {} > {NR}", self.before);
        }
    }
}

/// Are there free huge pages now?
#[must_use]
pub fn available() -> bool {
    let free = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = free.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    free.and_then(|n| n.trim().parse::<u64>().ok()).is_some_and(|n| n >= 300)
}
