//! Which log lines are shown: RUST_LOG has the last word, then `--verbose`, then what a command asks for.

use std::io::IsTerminal;
use std::sync::OnceLock;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Sets the level; absent when the user has said which.
static LEVEL: OnceLock<Box<dyn Fn(LevelFilter) + Send + Sync>> = OnceLock::new();

/// Begins to log to standard error: warnings, and more as `verbose` says.
pub(crate) fn init(verbose: u8) {
    let level = ["warn", "info", "debug"][usize::from(verbose.min(2))];
    let asked = EnvFilter::try_from_default_env();
    let settled = asked.is_ok() || verbose > 0;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(asked.unwrap_or_else(|_| EnvFilter::new(level)))
        .with_writer(crate::progress::above)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_filter_reloading();
    let handle = builder.reload_handle();
    builder.init();
    if !settled {
        let set = move |level: LevelFilter| {
            if let Err(error) = handle.reload(EnvFilter::default().add_directive(level.into())) {
                tracing::warn!("cannot change the log level: {error}");
            }
        };
        // Set once, here.
        let _ = LEVEL.set(Box::new(set));
    }
}

/// What a command would like to show; the user's own choice stays. Says whether it is shown now.
pub(crate) fn prefer(level: LevelFilter) -> bool {
    if let Some(set) = LEVEL.get() {
        set(level);
    }
    LEVEL.get().is_some()
}
