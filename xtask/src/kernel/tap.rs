//! Reads the Test Anything Protocol as kselftests speak it (KTAP 1, Documentation/dev-tools/ktap.rst of Linux 6.12).
//!
//! Contract: what a program announced and did not report is a failure, and so is an exit status that says
//! otherwise than the results. Skips are skips; `# SKIP not here: ...` says that there is nothing to test.

use crate::report::Tally;

/// Exit status of a kselftest that skipped all.
const SKIPPED: i32 = 4;

/// Follows one program's output.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    tally: Tally,
    planned: Option<u64>,
    results: u64,
    bailed: bool,
    elsewhere: Vec<Elsewhere>,
}

/// A test that wants another boot: its reason to skip says `boot with PARAMETERS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Elsewhere {
    pub(crate) test: String,
    pub(crate) parameters: String,
}

impl Reader {
    /// Takes one line; says whether to show it.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        if line.starts_with("Bail out!") {
            self.bailed = true;
            return true;
        }
        if let Some(plan) = line.strip_prefix("1..") {
            let count: String = plan.chars().take_while(char::is_ascii_digit).collect();
            self.planned = count.parse().ok();
            if let Some((_, reason)) = plan.split_once("# SKIP") {
                self.skip(reason);
            }
            return false;
        }
        let (good, rest) = match (line.strip_prefix("not ok "), line.strip_prefix("ok ")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return true,
        };
        self.results += 1;
        let directive = |name: &str| rest.find(name).map(|at| &rest[at + name.len()..]);
        if let Some(reason) = directive("# SKIP") {
            match reason.split_once("boot with ") {
                Some((_, parameters)) => self.elsewhere.push(Elsewhere {
                    // fixture.variant.test: by the last part the program picks it.
                    test: rest
                        .split_whitespace()
                        .nth(1)
                        .and_then(|n| n.rsplit('.').next())
                        .unwrap_or("")
                        .to_owned(),
                    parameters: parameters.trim().to_owned(),
                }),
                None => self.skip(reason),
            }
            return true;
        }
        // A failure that is known and expected is as good as a pass to those who expect it.
        match good || directive("# XFAIL").is_some() || directive("# TODO").is_some() {
            true => self.tally.passed += 1,
            false => self.tally.failed += 1,
        }
        !good
    }

    fn skip(&mut self, reason: &str) {
        let reason = reason.trim().trim_start_matches([':', ' ']);
        match reason.strip_prefix("not here: ") {
            Some(why) => self.tally.not_here.push(why.to_owned()),
            None if reason.is_empty() => self.tally.skipped.push("a kselftest gave no reason".to_owned()),
            None => self.tally.skipped.push(reason.to_owned()),
        }
    }

    /// Tests so far that want another boot; they are not counted here.
    pub(crate) fn elsewhere(&mut self) -> Vec<Elsewhere> {
        std::mem::take(&mut self.elsewhere)
    }

    /// The counts, given the program's exit status; says what was wrong beyond single results.
    pub(crate) fn finish(mut self, status: i32) -> (Tally, Option<String>) {
        let missing = self.planned.unwrap_or(self.results).saturating_sub(self.results);
        let skipped = self.tally.skipped.len() + self.tally.not_here.len();
        let wrong = if self.bailed {
            Some("it bailed out".to_owned())
        } else if missing > 0 {
            Some(format!("{missing} of its tests gave no result (exit status {status})"))
        } else if status == SKIPPED && self.tally.failed == 0 {
            if skipped == 0 && self.results == 0 {
                self.tally.skipped.push("a kselftest skipped itself and gave no reason".to_owned());
            }
            None
        } else if status != 0 && self.tally.failed == 0 {
            Some(format!("exit status {status}, though no test failed"))
        } else if status == 0 && self.tally.failed > 0 {
            Some("exit status 0, though a test failed".to_owned())
        } else if self.results == 0 && skipped == 0 {
            Some("it reported no result".to_owned())
        } else {
            None
        };
        self.tally.failed += missing.max(u64::from(wrong.is_some()));
        (self.tally, wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, status: i32) -> (u64, u64, Vec<String>, Vec<String>, bool) {
        let mut reader = Reader::default();
        for line in text.lines() {
            reader.line(line);
        }
        let (tally, wrong) = reader.finish(status);
        (tally.passed, tally.failed, tally.skipped, tally.not_here, wrong.is_some())
    }

    #[test]
    fn results_are_counted() {
        let text =
            "TAP version 13\n1..3\n# chatter\nok 1 a\nok 2 b # XFAIL known\nnot ok 3 c\n# Totals: pass:2";
        assert_eq!(read(text, 1), (2, 1, vec![], vec![], false));
        assert_eq!(read("TAP version 13\n1..1\nok 1 a", 0), (1, 0, vec![], vec![], false));
    }

    #[test]
    fn skips_are_no_passes() {
        let text = "1..3\nok 1 a\nok 2 b # SKIP no 32-bit programs\nok 3 c # SKIP not here: one node";
        let (passed, failed, skipped, not_here, wrong) = read(text, 0);
        assert_eq!((passed, failed, wrong), (1, 0, false));
        assert_eq!(skipped, ["no 32-bit programs"]);
        assert_eq!(not_here, ["one node"]);
        assert_eq!(read("1..0 # SKIP no kernel for it", 4).2, ["no kernel for it"]);
        assert_eq!(read("", 4).2.len(), 1, "skipping without a word is a skip");
    }

    #[test]
    fn tests_that_want_another_boot_are_handed_on() {
        let mut reader = Reader::default();
        for line in ["1..2", "ok 1 iso.c33_sender # SKIP one node: boot with numa=fake=2", "ok 2 iso.b"] {
            reader.line(line);
        }
        let wanted = Elsewhere { test: "c33_sender".into(), parameters: "numa=fake=2".into() };
        assert_eq!(reader.elsewhere(), [wanted]);
        let (tally, wrong) = reader.finish(0);
        assert_eq!((tally, wrong), (Tally { passed: 1, ..Tally::default() }, None));
    }

    #[test]
    fn what_is_missing_failed() {
        let cases = [("1..4\nok 1 a\nok 2 b", 0, 2), ("1..4\nok 1 a\nok 2 b", 139, 2), ("", 0, 1)];
        for (text, status, failures) in cases {
            let (_, failed, _, _, wrong) = read(text, status);
            assert_eq!((failed, wrong), (failures, true), "{text:?}");
        }
    }

    #[test]
    fn a_status_that_contradicts_is_a_failure() {
        assert_eq!(read("1..1\nok 1 a", 139), (1, 1, vec![], vec![], true));
        assert_eq!(read("1..1\nnot ok 1 a", 0), (0, 2, vec![], vec![], true));
        assert!(read("1..2\nok 1 a\nBail out! no CPU", 1).4);
    }
}
