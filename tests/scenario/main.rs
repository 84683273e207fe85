//! End-to-end scenarios, each in a process of its own: `scenario NAME [ARG...]`. They assert by
//! panicking; `tests/dataplane.rs` runs them and looks at the exit status.

mod faults;
mod forwarding;
mod isolation;
mod launching;
mod network;
mod nics;
mod peer;
mod rehearsal;
mod router;
#[path = "../sealed/seal.rs"]
mod seal;
mod sharing;
mod strict;
mod taps;

#[global_allocator]
static ALLOCATOR: seal::Counting = seal::Counting;

fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let all: &[(&str, fn())] = &[
        ("forwards-in-order", forwarding::forwards_in_order),
        ("stops-under-load", forwarding::stops_under_load),
        ("stops-on-sigterm", forwarding::stops_on_sigterm),
        ("two-workers-joined", forwarding::two_workers_joined),
        ("app-sees-the-link", forwarding::app_sees_the_link),
        ("bridge-follows-links", forwarding::bridge_follows_links),
        ("worker-killed", faults::worker_killed),
        ("worker-killed-in-many-places", faults::worker_killed_in_many_places),
        ("worker-panics", faults::worker_panics),
        ("worker-given-up", faults::worker_given_up),
        ("zygote-killed", faults::zygote_killed),
        ("run-until-killed", faults::run_until_killed),
        ("bridge-over-af-xdp", network::bridge_over_af_xdp),
        ("worker-killed-over-af-xdp", network::worker_killed_over_af_xdp),
        ("program-killed-over-af-xdp", network::program_killed_over_af_xdp),
        ("two-workers-on-two-queues", network::two_workers_on_two_queues),
        ("sealed-bridge", network::sealed_bridge),
        ("refused-frames-are-drops", network::refused_frames_are_drops),
        ("worker-killed-over-vfio", nics::worker_killed),
        ("program-killed-over-vfio", nics::program_killed),
        ("worker-hangs", faults::worker_hangs),
        ("one-dies-the-other-forwards", faults::one_dies_the_other_forwards),
        ("peer-lies", faults::peer_lies),
        ("bridge-over-taps", taps::bridge),
        ("sealed-bridge-over-taps", taps::sealed_bridge),
        ("worker-killed-over-taps", taps::worker_killed),
        ("tap-deleted", taps::deleted),
        ("link-flaps", network::link_flaps),
        ("interface-deleted", network::interface_deleted),
        ("rebinds-at-once", network::rebinds_at_once),
        ("shares-messages-counters-tables", sharing::messages_counters_tables),
        ("statistics-from-outside", sharing::statistics_from_outside),
        ("breach-syscall", isolation::breach_syscall),
        ("breach-page-fault", isolation::breach_page_fault),
        ("breach-allocation", isolation::breach_allocation),
        ("breach-stops", isolation::breach_stops),
        ("breach-aborts", isolation::breach_aborts),
        ("breach-that-cannot-be-mended", isolation::breach_that_cannot_be_mended),
        ("killed-at-its-breach", isolation::killed_at_its_breach),
        ("logs-by-the-ring", isolation::logs_by_the_ring),
        ("logs-by-the-slow-path", isolation::logs_by_the_slow_path),
        ("logs-too-much", isolation::logs_too_much),
        ("slow-path-budget", isolation::slow_path_budget),
        ("strict-worker-panics", isolation::strict_worker_panics),
        ("worker-drops-privileges", isolation::worker_drops_privileges),
        ("waits-without-privileges", isolation::waits_without_privileges),
        ("isolation-refusals", isolation::isolation_refusals),
        ("stopped-and-continued", isolation::stopped_and_continued),
        ("rehearsed-bridge-starts-as-new", rehearsal::bridge_starts_as_new),
        ("rehearsal-only-on-request", rehearsal::only_on_request),
        ("rehearsed-first-packets-do-not-fault", rehearsal::first_packets_do_not_fault),
        ("witnesses-see", strict::witnesses_see),
        ("unmaps-beside-a-process", strict::unmaps_beside_a_process),
        ("unmaps-beside-a-thread", strict::unmaps_beside_a_thread),
        ("senders-of-unmaps", strict::senders_of_unmaps),
        ("bridge-without-privileges", strict::bridge_without_privileges),
        ("strict-router", router::strict_router),
        ("arena-without-its-allocator", strict::arena_without_its_allocator),
        ("launch-refusals", launching::refusals),
        ("launch-app-that-panics-at-once", launching::app_that_panics_at_once),
    ];
    match all.iter().find(|(n, _)| *n == name) {
        Some((_, run)) => run(),
        None => {
            let names: Vec<_> = all.iter().map(|(name, _)| *name).collect();
            eprintln!("no scenario {name:?}; there are: {names:?}");
            std::process::exit(2);
        }
    }
}
