//! Host checks against this machine and against made-up ones.

use isoplane_isolation::host::{self, CHECKS, Host, Request, Verdict};
use std::collections::BTreeSet;

#[test]
fn this_machine_is_understood() {
    let host = Host::real();
    let (cpus, _) = host::default_cpus(&host);
    let report = host::check(&host, &Request::new(cpus));
    assert_eq!(report.checks.len(), CHECKS.len());
    for check in &report.checks {
        eprintln!(
            "{:14} {:18} {} | {} | {:?}",
            check.verdict, check.id, check.found, check.wanted, check.fix
        );
        assert!(!check.found.is_empty() && !check.wanted.is_empty() && !check.why.is_empty(), "{}", check.id);
        assert_eq!(check.reason.is_some(), check.verdict == Verdict::NotApplicable, "{}", check.id);
        assert!(
            check.verdict < Verdict::Warning || !check.fix.is_empty(),
            "{}: a problem without a fix",
            check.id
        );
    }
    eprintln!("{}", report.boot_line());
}

#[test]
fn ids_are_unique() {
    let ids: BTreeSet<_> = CHECKS.iter().map(|info| info.id).collect();
    assert_eq!(ids.len(), CHECKS.len());
}
