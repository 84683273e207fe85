//! Reads the output of Rust's test harness: counts, and tests that say they could not run.
//!
//! Contract: what is not understood is passed on and never counted. A test that cannot run on a
//! machine prints a line `skipped: REASON` and returns; the harness calls that "ok", we do not. One that
//! finds nothing here that it could be about (the CPU or the kernel has no such thing) prints
//! `not here: REASON`; that is listed, counts as no pass, and is no failure. In the guest, `skipped: boot with
//! PARAMETERS` (for the kernel) asks for another one.

/// What the output said.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Reasons of what did not run and should have.
    pub(crate) skipped: Vec<String>,
    /// Reasons of what there is nothing to run on here.
    pub(crate) not_here: Vec<String>,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped.iter().cloned());
        self.not_here.extend(other.not_here.iter().cloned());
    }
}

/// Follows the output line by line.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    tally: Tally,
    /// Tests that the harness counts as passed although they say that they did not run.
    said_skipped: u64,
    /// Inside the output of tests that passed, which is not shown.
    in_successes: bool,
    /// Whose output this is.
    test: Option<String>,
    /// Tests that want another boot of the guest, and its kernel's parameters.
    elsewhere: Vec<(String, String)>,
}

impl Reader {
    /// Takes one line; says whether to show it.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        let text = line.trim();
        if let Some(test) = text.strip_prefix("---- ").and_then(|rest| rest.split_once(" stdout ")) {
            self.test = Some(test.0.to_owned());
        }
        if let (Some(parameters), Some(test)) = (text.strip_prefix("skipped: boot with "), &self.test) {
            self.elsewhere.push((test.clone(), parameters.to_owned()));
            self.said_skipped += 1;
            return false;
        }
        if let Some(reason) = text.strip_prefix("skipped: ") {
            self.tally.skipped.push(reason.to_owned());
            self.said_skipped += 1;
            return true;
        }
        if let Some(reason) = text.strip_prefix("not here: ") {
            self.tally.not_here.push(reason.to_owned());
            self.said_skipped += 1;
            return true;
        }
        // At the start of the line only: our own tests print the results of tests that they play.
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.in_successes = false;
            self.tally.passed += before(counts, " passed");
            self.tally.failed += before(counts, " failed");
            for _ in 0..before(counts, " ignored") {
                self.tally.skipped.push("a test is marked #[ignore]".to_owned());
            }
            return true;
        }
        match text {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ => {}
        }
        !self.in_successes
    }

    /// Tests so far that want another boot, with the parameters; they are not counted.
    pub(crate) fn elsewhere(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.elsewhere)
    }

    pub(crate) fn finish(mut self) -> Tally {
        self.tally.passed = self.tally.passed.saturating_sub(self.said_skipped);
        self.tally
    }
}

/// The number right before `word`.
fn before(text: &str, word: &str) -> u64 {
    text.find(word)
        .and_then(|at| text[..at].rsplit(|c: char| !c.is_ascii_digit()).next())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Tally, Vec<&str>) {
        let mut reader = Reader::default();
        let shown = text.lines().filter(|line| reader.line(line)).collect();
        (reader.finish(), shown)
    }

    #[test]
    fn counts_of_several_binaries_add_up() {
        let (tally, _) = read(
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s\n\
             test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        );
        assert_eq!(tally, Tally { passed: 13, failed: 2, skipped: vec![], not_here: vec![] });
    }

    #[test]
    fn a_test_that_could_not_run_is_not_a_pass() {
        let (tally, shown) = read(
            "test wire ... ok\n\nsuccesses:\n\n---- wire stdout ----\nchatter\nskipped: no veth here\n\n\
             successes:\n    wire\n\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured",
        );
        assert_eq!(
            tally,
            Tally { passed: 1, failed: 0, skipped: vec!["no veth here".into()], not_here: vec![] }
        );
        assert!(!shown.contains(&"chatter"), "the output of passing tests is not shown");
        assert!(shown.contains(&"skipped: no veth here"));
    }

    #[test]
    fn results_that_a_test_prints_are_none() {
        let (tally, _) =
            read("  test result: FAILED. 2 passed; 1 failed; 0 ignored\ntest result: ok. 3 passed; 0 failed");
        assert_eq!((tally.passed, tally.failed), (3, 0));
    }

    #[test]
    fn an_ignored_test_is_a_skip() {
        let (tally, _) = read("test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured");
        assert_eq!(tally.skipped.len(), 1);
        assert_eq!(tally.passed, 1);
    }

    #[test]
    fn failures_are_shown() {
        let (_, shown) = read("successes:\nquiet\nfailures:\nloud\n");
        assert_eq!(shown, ["failures:", "loud"]);
    }
}
