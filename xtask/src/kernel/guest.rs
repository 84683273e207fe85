//! One run of the guest: QEMU without KVM, the machine's own root read-only inside, one command.
//!
//! Contract: a guest ends with the command, at its time limit, when it falls silent, or when we are
//! killed, whichever is first. Dying without a status is an error that shows the console's end, never success.

use super::tools::in_path;
use super::{console, nics};
use nics::Taps;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The machine to boot.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) image: PathBuf,
    /// Directories that must be visible inside, wherever they are.
    pub(crate) keep: Vec<PathBuf>,
    pub(crate) cpus: u32,
    /// More kernel parameters.
    pub(crate) append: Vec<String>,
    /// More arguments for QEMU, such as devices.
    pub(crate) qemu: Vec<String>,
    /// With network devices and a way to the monitor: see `nics`.
    pub(crate) nics: bool,
    /// Shows the kernel's console as it comes.
    pub(crate) console: bool,
    /// Time is the number of instructions executed, a nanosecond each, on all CPUs together: they take turns.
    pub(crate) counted: bool,
}

/// What to run, and how long at most.
pub(crate) struct Job<'a> {
    /// A script for bash.
    pub(crate) script: &'a str,
    /// A directory of the host that the command may write to, as /run/results.
    pub(crate) results: Option<&'a Path>,
    pub(crate) limit: Duration,
    /// Without a line of output for this long, it hangs.
    pub(crate) silence: Duration,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Exited(i32),
    /// Panic, reset, or QEMU failed: what QEMU said.
    Died(String),
    TimedOut,
    Silent,
}

/// What became of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) console: String,
    /// Seconds of guest time until the command started.
    pub(crate) booted: Option<String>,
}

impl Outcome {
    /// The command's exit status, if the guest lived to tell and its kernel had nothing to complain about.
    pub(crate) fn status(&self) -> Result<i32, String> {
        let status = match &self.end {
            End::Exited(status) => *status,
            End::Died(said) => {
                return Err(format!(
                    "the guest died. {said}Its console ends:\n{}",
                    console::end(&self.console)
                ));
            }
            End::TimedOut => {
                return Err(format!(
                    "the guest ran into its time limit. Its console ends:\n{}",
                    console::end(&self.console)
                ));
            }
            End::Silent => {
                return Err(format!("the guest hangs. Its console ends:\n{}", console::end(&self.console)));
            }
        };
        match console::complaint(&self.console) {
            Some(text) => Err(format!("the guest's kernel complained:\n{text}")),
            None => Ok(status),
        }
    }
}

/// Kills QEMU however we leave.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// As the tests want it: CPU 0 for housekeeping, the others isolated.
    pub(crate) fn new(image: PathBuf) -> Self {
        Self {
            image,
            keep: Vec::new(),
            cpus: 4,
            append: Vec::new(),
            qemu: Vec::new(),
            nics: false,
            console: false,
            counted: false,
        }
    }

    /// Boots, runs the job, and hands on each line of its output as it comes.
    pub(crate) fn run(&self, job: &Job<'_>, mut line: impl FnMut(&str)) -> Result<Outcome, String> {
        let share = self.share(job.results)?;
        write(share.path(), "command", job.script)?;
        let mut qemu = self.qemu(share.path(), job.results)?;
        // Not stdio: at the end of its input it hangs up, and the guest would wait for it to come back.
        qemu.args([
            "-chardev",
            "file,id=out,path=/dev/stdout",
            "-device",
            "virtserialport,chardev=out,name=out",
        ]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Running(qemu.spawn().map_err(|e| format!("cannot start QEMU: {e}"))?);
        let lines = lines(child.0.stdout.take());
        let said = lines_of(child.0.stderr.take(), self.console);
        let end = follow(&lines, job, &mut line);
        if end.is_some() {
            let _ = child.0.kill();
        }
        let qemu_status = child.0.wait().map_err(|e| format!("cannot wait for QEMU: {e}"))?;
        let said: Vec<String> = said.iter().collect();
        let end = end.unwrap_or_else(|| match read(share.path(), "status").and_then(|s| s.parse().ok()) {
            Some(status) => End::Exited(status),
            None if qemu_status.success() => End::Died(String::new()),
            None => End::Died(format!("QEMU ended with {qemu_status}: {}\n", said.join("\n"))),
        });
        let console = fs::read(share.path().join(CONSOLE)).unwrap_or_default();
        Ok(Outcome {
            end,
            console: String::from_utf8_lossy(&console).replace('\r', ""),
            booted: read(share.path(), "booted"),
        })
    }

    /// An interactive shell, on our terminal.
    pub(crate) fn shell(&self, results: Option<&Path>) -> Result<(), String> {
        let share = self.share(results)?;
        let terminal = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
        write(share.path(), "terminal", &terminal)?;
        let mut qemu = self.qemu(share.path(), results)?;
        qemu.args(["-chardev", "stdio,id=out,signal=off", "-device", "virtconsole,chardev=out"]);
        let mut child = Running(qemu.spawn().map_err(|e| format!("cannot start QEMU: {e}"))?);
        let status = child.0.wait().map_err(|e| format!("cannot wait for QEMU: {e}"))?;
        if status.success() && read(share.path(), "status").is_some() {
            return Ok(());
        }
        let console = fs::read(share.path().join(CONSOLE)).unwrap_or_default();
        Err(format!(
            "the guest died. Its console ends:\n{}",
            console::end(&String::from_utf8_lossy(&console))
        ))
    }

    /// The directory by which we and the guest's init talk.
    fn share(&self, results: Option<&Path>) -> Result<tempfile::TempDir, String> {
        let share = tempfile::Builder::new().prefix("isoplane-guest-").tempdir();
        let share = share.map_err(|e| format!("cannot make a temporary directory: {e}"))?;
        let cwd = std::env::current_dir().map_err(|e| format!("no working directory: {e}"))?;
        write(share.path(), "cwd", &cwd.to_string_lossy())?;
        if results.is_some() {
            write(share.path(), "results", "")?;
        }
        let root = root()?;
        let keep = self.keep.iter().chain([&cwd, &root]).map(|dir| format!("{}\n", dir.display()));
        write(share.path(), "keep", &keep.collect::<String>())?;
        Ok(share)
    }

    /// The kernel's parameters.
    fn append(&self, init: &Path) -> String {
        let mut all = vec![
            "root=root rootfstype=9p rootflags=trans=virtio,version=9p2000.L,msize=262144,cache=loose ro"
                .into(),
            format!("init=\"{}\"", init.display()),
            // The console is for what goes wrong. A dead guest is to end, not to start again.
            "console=ttyS0 loglevel=5 panic=-1 oops=panic".into(),
            // What makes TCG's clock and an emulated machine's housekeeping keep off isolated CPUs; and on a busy
            // host the timer may come too late to count as working.
            "tsc=reliable no_timer_check nowatchdog mce=off".into(),
        ];
        if let Some(last) = self.cpus.checked_sub(1).filter(|last| *last > 0) {
            all.push(format!("nohz_full=1-{last} isolcpus=nohz,domain,managed_irq,1-{last}"));
            all.push(format!("rcu_nocbs=1-{last} irqaffinity=0"));
        }
        if self.counted {
            // With such a clock QEMU 7.2's HPET ticks twice as often as it should.
            all.push("hpet=disable".into());
        }
        all.extend(self.append.iter().cloned());
        all.join(" ")
    }

    /// QEMU, but for where the output goes.
    fn qemu(&self, share: &Path, results: Option<&Path>) -> Result<Command, String> {
        let init = root()?.join("kernel/guest/init");
        if in_path("qemu-system-x86_64").is_none() {
            return Err("qemu-system-x86_64 is not in PATH".into());
        }
        // Should we be killed, so is it.
        let taps = if self.nics { Taps::here() } else { Taps::None };
        let mut qemu = taps.command("qemu-system-x86_64").unwrap_or_else(|| {
            let mut plain = Command::new("setpriv");
            plain.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
            plain
        });
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        if self.counted {
            // Without sleep, time would jump to the next timeout whenever the guest waits for the host's files.
            qemu.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi"]);
        }
        qemu.args(["-cpu", "max", "-m", "3G", "-smp", &self.cpus.to_string()]);
        // Remapped interrupts and an IOMMU: VFIO works in there.
        qemu.args(["-M", "q35,kernel-irqchip=split"]);
        qemu.args(["-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"]);
        qemu.arg("-kernel").arg(&self.image).arg("-append").arg(self.append(&init));
        for (tag, path, more) in [
            ("root", Some(Path::new("/")), ",readonly=on"),
            ("job", Some(share), ""),
            ("results", results, ""),
        ] {
            let Some(path) = path else { continue };
            let mut shared =
                OsString::from(format!("local,id={tag},security_model=none,multidevs=remap{more},path="));
            shared.push(escaped(path));
            qemu.arg("-fsdev").arg(shared);
            qemu.args(["-device", &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}")]);
        }
        let log = share.join(CONSOLE);
        let mut console = OsString::from(match self.console {
            true => "file,id=console,path=/dev/stderr,logfile=",
            false => "file,id=console,path=",
        });
        console.push(escaped(&log));
        qemu.arg("-chardev").arg(console).args(["-serial", "chardev:console"]);
        qemu.args(["-device", "virtio-serial-pci"]);
        if self.nics {
            qemu.args(nics::arguments(&escaped(&nics::socket(share)), taps, self.counted));
        }
        qemu.args(&self.qemu);
        Ok(qemu)
    }
}

const CONSOLE: &str = "console";

/// The work tree's root, without `..`.
fn root() -> Result<PathBuf, String> {
    let root = crate::root();
    root.canonicalize().map_err(|e| format!("no work tree at {}: {e}", root.display()))
}

/// QEMU's options end at a comma, unless it is doubled.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn write(dir: &Path, name: &str, text: &str) -> Result<(), String> {
    let path = dir.join(name);
    fs::write(&path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

fn read(dir: &Path, name: &str) -> Option<String> {
    fs::read_to_string(dir.join(name)).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Lines as they come, until the other end closes.
fn lines(from: Option<impl std::io::Read + Send + 'static>) -> Receiver<String> {
    lines_of(from, false)
}

fn lines_of(from: Option<impl std::io::Read + Send + 'static>, show: bool) -> Receiver<String> {
    let (send, receive) = channel();
    if let Some(from) = from {
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut bytes = Vec::new();
            while from.read_until(b'\n', &mut bytes).is_ok_and(|n| n != 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_owned();
                if show {
                    eprintln!("{line}");
                }
                if send.send(line).is_err() {
                    break;
                }
                bytes.clear();
            }
        });
    }
    receive
}

/// Hands on lines until there are no more, or says why not to wait for more.
fn follow(lines: &Receiver<String>, job: &Job<'_>, line: &mut impl FnMut(&str)) -> Option<End> {
    let start = Instant::now();
    loop {
        let left = job.limit.saturating_sub(start.elapsed());
        match lines.recv_timeout(left.min(job.silence)) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) if start.elapsed() >= job.limit => return Some(End::TimedOut),
            Err(RecvTimeoutError::Timeout) => return Some(End::Silent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(end: End, console: &str) -> Outcome {
        Outcome { end, console: console.into(), booted: None }
    }

    #[test]
    fn only_a_healthy_guest_has_a_status() {
        assert_eq!(outcome(End::Exited(3), "[ 1.0] Linux\n").status(), Ok(3));
        for (end, console, said) in [
            (End::Exited(0), "[ 2.0] BUG: bad\n", "complained"),
            (End::Died(String::new()), "[ 2.0] Kernel panic - not syncing: x\n", "not syncing: x"),
            (End::Died("QEMU ended with 1: no such device\n".into()), "", "no such device"),
            (End::TimedOut, "[ 2.0] last words\n", "time limit"),
            (End::Silent, "[ 2.0] last words\n", "last words"),
        ] {
            let error = outcome(end, console).status().expect_err("no status");
            assert!(error.contains(said), "{said} in {error}");
        }
    }

    #[test]
    fn all_but_the_first_cpu_are_isolated() {
        let mut machine = Machine::new("bzImage".into());
        machine.cpus = 3;
        machine.append.push("task_isolation_debug".into());
        let text = machine.append(Path::new("/a b/init"));
        for part in [
            "nohz_full=1-2 ",
            "isolcpus=nohz,domain,managed_irq,1-2 ",
            "irqaffinity=0",
            "init=\"/a b/init\"",
            " task_isolation_debug",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        machine.cpus = 1;
        assert!(!machine.append(Path::new("/init")).contains("nohz_full"));
    }

    #[test]
    fn silence_and_time_limits_end_the_wait() {
        let job = |limit, silence| Job {
            script: "",
            results: None,
            limit: Duration::from_millis(limit),
            silence: Duration::from_millis(silence),
        };
        let (send, lines) = channel();
        send.send("one".to_owned()).expect("open");
        let mut seen = Vec::new();
        assert_eq!(
            follow(&lines, &job(60_000, 1), &mut |l: &str| seen.push(l.to_owned())),
            Some(End::Silent)
        );
        assert_eq!(seen, ["one"]);
        assert_eq!(follow(&lines, &job(1, 60_000), &mut |_: &str| ()), Some(End::TimedOut));
        drop(send);
        assert_eq!(follow(&lines, &job(60_000, 60_000), &mut |_: &str| ()), None);
    }

    #[test]
    fn commas_in_paths_survive() {
        assert_eq!(escaped(Path::new("/a,b")), "/a,,b");
    }
}
