//! What a thread does to itself before it can be isolated, each judged by what the kernel says of it.

#[path = "../common/mod.rs"]
mod common;

mod cpu;
mod memory;
mod privileges;
mod scheduling;
mod signals;

use std::process::ExitCode;

fn main() -> ExitCode {
    common::main(common::tests![
        memory::nothing_faults_after_preparing,
        memory::without_preparing_the_same_faults,
        memory::malloc_gives_nothing_back,
        memory::over_a_finite_limit_malloc_still_works,
        memory::a_limit_below_what_is_there_is_said_and_nothing_is_locked,
        memory::a_limit_of_nothing_is_no_matter_for_who_has_the_capability,
        memory::the_limit_is_raised_as_far_as_it_may_be,
        memory::a_small_stack_is_touched_to_its_end_and_no_further,
        memory::the_main_stack_is_touched_within_its_limit,
        cpu::pinning_is_seen_by_the_kernel_and_undone,
        cpu::a_cpu_that_is_not_there,
        cpu::a_cpu_that_is_not_ours,
        cpu::who_else_wants_to_run_is_named,
        scheduling::auto_leaves_a_shared_cpu_alone,
        scheduling::auto_takes_an_isolated_cpu,
        scheduling::keep_keeps,
        scheduling::fifo_on_a_shared_cpu_says_what_it_does,
        scheduling::a_refused_priority_changes_nothing,
        scheduling::the_former_policy_comes_back,
        signals::only_the_open_ones_arrive,
        signals::a_blocked_one_waits_until_restored,
        privileges::dropping_is_for_good,
        privileges::keeping_changes_nothing,
        privileges::dropping_to_root_is_refused,
        privileges::without_permission_nothing_is_half_dropped,
        privileges::locking_goes_on_after_dropping,
        privileges::what_cannot_be_kept_is_given_up_before,
        privileges::who_has_dropped_may_drop_again,
        privileges::the_wish_to_die_with_the_parent,
    ])
}
