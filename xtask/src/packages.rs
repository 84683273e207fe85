//! Debian packages that a command needs.
//!
//! Contract: as root on a machine with apt-get, what is missing is installed, by name and out loud.
//! Anywhere else nothing is changed: the error holds the command that would do it.

use std::process::{Command, Stdio};

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| out.stdout == b"installed")
}

/// Makes sure that the packages are there.
pub(crate) fn ensure(packages: &[&str]) -> Result<(), String> {
    let missing: Vec<&str> = packages.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let manual = format!("sudo apt-get update && sudo apt-get install --yes --no-install-recommends {list}");
    if !nix::unistd::geteuid().is_root() {
        return Err(format!("missing packages: {list}; only root can install them. Run: {manual}"));
    }
    eprintln!("installing Debian packages: {list}");
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            // Standard output is the report's.
            .stdout(std::io::stderr())
            .status()
            .is_ok_and(|status| status.success())
    };
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    if (apt(&["update"]) && apt(&install)) && missing.iter().all(|p| installed(p)) {
        return Ok(());
    }
    Err(format!("could not install {list}; see above. By hand: {manual}"))
}
