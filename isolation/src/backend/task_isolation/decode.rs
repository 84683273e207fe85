//! From the kernel's words to the crate's: causes, breaches, what is unmet.
//!
//! Contract: plain functions on plain memory. The kernel is believed, not trusted: a number that this
//! version does not know becomes [`Cause::Unknown`], and nothing it says can make them fail.

use super::uapi::{Args, Block, unmet};
use crate::cause::{Breach, Cause, Detail, Sender};
use crate::error::Unmet;
use crate::prepare::cpu::{self, Cpu, CpuList};
use nix::errno::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
/// In the detail of a system call: it came by the 32-bit interface.
const BY_32_BITS: u64 = 1 << 32;
/// Length of `syscall` and of `int $0x80`: the kernel names the instruction, a breach the one after it.
const INSTRUCTION: u64 = 2;

/// The cause of a number of the kernel's (`PR_TASK_ISOLATION_CAUSE_*`).
pub(crate) const fn cause(number: u32) -> Cause {
    match number {
        1 => Cause::Syscall,
        2 => Cause::PageFault,
        3 => Cause::Exception,
        4 => Cause::DeviceInterrupt,
        5 => Cause::TimerTick,
        6 => Cause::Reschedule,
        7 => Cause::FunctionCall,
        8 => Cause::TlbShootdown,
        9 => Cause::KernelTlbFlush,
        10 => Cause::TextSync,
        11 => Cause::Membarrier,
        12 => Cause::IrqWork,
        13 => Cause::Signal,
        14 => Cause::Preemption,
        15 => Cause::Migration,
        16 => Cause::Hotplug,
        17 => Cause::AffinityChange,
        18 => Cause::Ptrace,
        19 => Cause::StopMachine,
        20 => Cause::Nmi,
        21 => Cause::MachineCheck,
        22 => Cause::Thermal,
        23 => Cause::Platform,
        24 => Cause::Quiesce,
        _ => Cause::Unknown,
    }
}

/// The last breach of a block. `interrupted` is the instruction that the breach's handler interrupted, 0
/// where there was no handler.
pub(crate) fn breach(block: &Block, interrupted: u64, tsc: u64, in_slow_path: bool) -> Breach {
    let detail = block.detail.load(Ordering::Relaxed);
    let address = block.addr.load(Ordering::Relaxed);
    let instruction = interrupted;
    let cause = cause(block.cause.load(Ordering::Relaxed));
    let number = detail as u32;
    let detail = match cause {
        Cause::Syscall => Detail::Syscall {
            number: u64::from(number),
            call_address: address.wrapping_add(INSTRUCTION),
            arch: if detail & BY_32_BITS == 0 { X86_64 } else { I386 },
        },
        Cause::PageFault => Detail::Fault { address, instruction },
        // The handler may have interrupted another one, of the exception's own signal.
        Cause::Exception if address != 0 => Detail::At { instruction: address },
        Cause::DeviceInterrupt => Detail::Interrupt { irq: number.checked_sub(1), instruction },
        Cause::Signal => Detail::Signal { number, instruction },
        Cause::Preemption | Cause::Ptrace => Detail::Task { pid: number, instruction },
        Cause::Migration | Cause::Hotplug | Cause::AffinityChange => {
            Detail::Moved { to: number, instruction }
        }
        Cause::Quiesce => Detail::Unquiet { unmet: detail },
        _ => Detail::At { instruction },
    };
    let cpu = block.cpu.load(Ordering::Relaxed);
    Breach { cause, detail, cpu, tsc, in_slow_path, sender: sender(block) }
}

/// Who sent the interrupt, when the kernel names anybody.
fn sender(block: &Block) -> Option<Sender> {
    fn bytes<const WORDS: usize, const BYTES: usize>(words: &[AtomicU64; WORDS]) -> [u8; BYTES] {
        let mut text = [0; BYTES];
        for (part, word) in text.chunks_exact_mut(8).zip(words) {
            part.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        text
    }
    let sender = Sender {
        cpu: block.sender_cpu.load(Ordering::Relaxed).checked_sub(1),
        pid: Some(block.sender_pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0),
        comm: bytes(&block.sender_comm),
        function: bytes(&block.sender_func),
    };
    (sender != Sender::default()).then_some(sender)
}

/// What stood in the way when the kernel refused, each thing once; never empty.
pub(crate) fn refusal(prepared: Cpu, errno: Errno, args: &Args) -> Vec<Unmet> {
    reasons(prepared, cpu::allowed(), errno, args)
}

/// `prepared`: the CPU that the thread was prepared for; `allowed`: where it may run now.
fn reasons(prepared: Cpu, allowed: CpuList, errno: Errno, args: &Args) -> Vec<Unmet> {
    let mut all = Vec::new();
    let mut rest = args.unmet;
    // The kernel speaks of the CPU that the thread is on, which somebody may have changed.
    let cpu = allowed.iter().next().filter(|_| allowed.len() == 1).unwrap_or(prepared);
    if !allowed.iter().eq([prepared]) {
        rest |= unmet::AFFINITY;
    }
    let mut note = |bit: u64, reason: &dyn Fn() -> Unmet| {
        if rest & bit != 0 {
            rest &= !bit;
            all.push(reason());
        }
    };
    note(unmet::AFFINITY, &|| Unmet::AllowedCpus { cpu: prepared, allowed: allowed.clone() });
    note(unmet::NOHZ_FULL, &|| Unmet::NotNohzFull(cpu));
    note(unmet::CLOCK, &|| Unmet::ClockUnstable);
    note(unmet::ALONE, &|| Unmet::NotAlone(cpu));
    note(unmet::TICK, &|| Unmet::TickNeeded { cpu, by: tick_dependencies(args.tick_deps) });
    note(unmet::TIMER, &|| Unmet::TimerArmed(cpu));
    for (bit, what) in [
        (unmet::VMSTAT, "statistics of virtual memory"),
        (unmet::LRU, "batches of pages"),
        (unmet::SOFTIRQ, "soft interrupts"),
    ] {
        note(bit, &|| Unmet::WorkPending { cpu, what });
    }
    note(unmet::FAIR_SERVER, &|| Unmet::FairServerStays(cpu));
    if rest != 0 {
        all.push(Unmet::Unnamed { bits: rest });
    }
    if all.is_empty() {
        all.push(Unmet::Call { call: "prctl(PR_TASK_ISOLATION_ENABLE)", errno });
    }
    all
}

/// What needs the tick, by `1 << TICK_DEP_BIT_*` (linux/tick.h).
fn tick_dependencies(bits: u64) -> String {
    const NAMES: [&str; 6] = [
        "a POSIX CPU timer",
        "a perf event",
        "the scheduler",
        "an unstable clock",
        "RCU",
        "an expedited RCU grace period",
    ];
    let mut names: Vec<&str> =
        NAMES.into_iter().enumerate().filter(|(bit, _)| bits & 1 << bit != 0).map(|(_, name)| name).collect();
    if names.is_empty() {
        names.push("something that the kernel does not name");
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicU32;

    fn block(number: u32, detail: u64, addr: u64) -> Block {
        Block {
            cpu: AtomicU32::new(3),
            cause: AtomicU32::new(number),
            detail: AtomicU64::new(detail),
            addr: AtomicU64::new(addr),
            ..Block::default()
        }
    }

    #[test]
    fn each_cause_says_what_it_knows() {
        let at = Detail::At { instruction: 7 };
        let moved = Detail::Moved { to: 5, instruction: 7 };
        for (number, detail, expected, means) in [
            (1, 39, Cause::Syscall, Detail::Syscall { number: 39, call_address: 0x1002, arch: X86_64 }),
            (
                1,
                1 << 32 | 20,
                Cause::Syscall,
                Detail::Syscall { number: 20, call_address: 0x1002, arch: I386 },
            ),
            (2, 1, Cause::PageFault, Detail::Fault { address: 0x1000, instruction: 7 }),
            (3, 5, Cause::Exception, Detail::At { instruction: 0x1000 }),
            (4, 0, Cause::DeviceInterrupt, Detail::Interrupt { irq: None, instruction: 7 }),
            (4, 1, Cause::DeviceInterrupt, Detail::Interrupt { irq: Some(0), instruction: 7 }),
            (5, 0, Cause::TimerTick, at),
            (9, 0, Cause::KernelTlbFlush, at),
            (10, 0, Cause::TextSync, at),
            (11, 0, Cause::Membarrier, at),
            (13, 10, Cause::Signal, Detail::Signal { number: 10, instruction: 7 }),
            (14, 99, Cause::Preemption, Detail::Task { pid: 99, instruction: 7 }),
            (15, 5, Cause::Migration, moved),
            (16, 5, Cause::Hotplug, moved),
            (17, 5, Cause::AffinityChange, moved),
            (18, 99, Cause::Ptrace, Detail::Task { pid: 99, instruction: 7 }),
            (19, 0, Cause::StopMachine, at),
            (24, 0x30, Cause::Quiesce, Detail::Unquiet { unmet: 0x30 }),
            (25, 0, Cause::Unknown, at),
        ] {
            let seen = breach(&block(number, detail, 0x1000), 7, 11, false);
            assert_eq!((seen.cause, seen.detail), (expected, means));
            assert_eq!((seen.cpu, seen.tsc, seen.sender), (3, 11, None));
        }
    }

    #[test]
    fn numbers_of_the_kernel_have_causes_of_their_own() {
        let known: std::collections::BTreeSet<Cause> = (1..=24).map(cause).collect();
        assert_eq!(known.len(), 24);
        assert!(!known.contains(&Cause::Unknown));
    }

    #[test]
    fn a_sender_is_named() {
        let word = |text: &[u8; 8]| AtomicU64::new(u64::from_ne_bytes(*text));
        let block = Block { sender_cpu: AtomicU32::new(1), sender_pid: AtomicU32::new(42), ..block(8, 0, 0) };
        let block = Block {
            sender_comm: [word(b"a long n"), word(b"ame\0left")],
            sender_func: [
                word(b"flush_tl"),
                word(b"b_func\0\0"),
                word(&[0; 8]),
                word(&[0; 8]),
                word(&[0; 8]),
            ],
            ..block
        };
        let breach = breach(&block, 7, 0, false);
        let sender = breach.sender.unwrap();
        assert_eq!((sender.cpu, sender.pid), (Some(0), Some(42)));
        assert_eq!((sender.comm(), sender.function()), ("a long name", "flush_tlb_func"));
        let text = breach.to_string();
        assert_eq!(
            text,
            "tlb_shootdown at 0x7 on CPU 3, sent by a long name (42) on CPU 0 for flush_tlb_func"
        );
    }

    #[test]
    fn a_refusal_lists_everything_once() {
        let args = Args { unmet: 0x7f7, tick_deps: 0b101, ..Args::default() };
        let here: CpuList = [Cpu(3)].into_iter().collect();
        let refusal = |cpu, errno, args: &Args| reasons(cpu, here.clone(), errno, args);
        let unmet = refusal(Cpu(3), Errno::EINVAL, &args);
        let text: Vec<String> = unmet.iter().map(ToString::to_string).collect();
        assert_eq!(unmet.len(), 10, "{text:#?}");
        assert!(text.iter().any(|text| text.contains("a POSIX CPU timer, the scheduler")), "{text:#?}");
        let nothing = refusal(Cpu(3), Errno::ENOMEM, &Args::default());
        assert!(matches!(nothing[..], [Unmet::Call { errno: Errno::ENOMEM, .. }]), "{nothing:?}");
        let args = Args { unmet: 1 << 40 | 1 << 3, ..Args::default() };
        let unknown = refusal(Cpu(3), Errno::EBUSY, &args);
        assert!(matches!(unknown[..], [Unmet::Unnamed { bits }] if bits == 1 << 40 | 1 << 3), "{unknown:?}");
    }

    /// Whoever was moved to another CPU hears of that, and of what is wrong with the other one.
    #[test]
    fn a_refusal_elsewhere() {
        let args = Args { unmet: unmet::NOHZ_FULL, ..Args::default() };
        let elsewhere: CpuList = [Cpu(0)].into_iter().collect();
        let unmet = reasons(Cpu(3), elsewhere, Errno::EINVAL, &args);
        let [Unmet::AllowedCpus { cpu: Cpu(3), .. }, Unmet::NotNohzFull(Cpu(0))] = unmet[..] else {
            panic!("{unmet:?}")
        };
    }

    proptest! {
        /// Whatever a block says, it is decoded, shown and logged without harm.
        #[test]
        fn no_block_is_too_hostile(words in prop::array::uniform20(any::<u64>()), interrupted: u64) {
            let [a, b, c, d, cpu, pid, rest @ ..] = words;
            let block = Block {
                sender_cpu: AtomicU32::new(cpu as u32),
                sender_pid: AtomicU32::new(pid as u32),
                sender_comm: [rest[0], rest[1]].map(AtomicU64::new),
                sender_func: [rest[2], rest[3], rest[4], rest[5], rest[6]].map(AtomicU64::new),
                ..block(a as u32 % 40, b, c)
            };
            let seen = breach(&block, interrupted, d, false);
            let shown = (seen.to_string(), format!("{seen:?}"));
            prop_assert!(!shown.0.is_empty() && !shown.1.is_empty());
            let status = crate::Status::create("hostile").unwrap();
            status.words().record(&seen);
            prop_assert_eq!(status.breaches(0)[0].1.cause, seen.cause);
            let args = Args { unmet: a, tick_deps: b, ..Args::default() };
            prop_assert!(!refusal(Cpu(0), Errno::EBUSY, &args).is_empty());
        }
    }
}
