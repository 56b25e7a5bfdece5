//! What an experiment found.

use qcompile::terminal::Table;

/// Tables, and the rules that they are held to.
#[derive(Debug, Default)]
pub struct Report {
    tables: Vec<(String, Table)>,
    rules: Vec<(String, bool)>,
}

impl Report {
    /// Adds a table under a heading.
    pub fn table(&mut self, heading: &str, table: Table) {
        self.tables.push((heading.to_owned(), table));
    }

    /// Adds a rule, in words with the figures, and whether it is met.
    pub fn rule(&mut self, rule: impl Into<String>, met: bool) {
        self.rules.push((rule.into(), met));
    }

    /// Whether there are rules, and every one is met.
    #[must_use]
    pub fn passes(&self) -> bool {
        !self.rules.is_empty() && self.rules.iter().all(|(_, met)| *met)
    }

    /// As text.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (heading, table) in &self.tables {
            text.push_str(&format!("{heading}\n{}\n", table.render(None)));
        }
        for (rule, met) in &self.rules {
            let word = if *met { "PASS" } else { "FAIL" };
            text.push_str(&format!("{word}  {rule}\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rule_that_is_not_met_fails_the_report() {
        let mut report = Report::default();
        assert!(!report.passes(), "nothing was shown");
        report.rule("1 < 2", true);
        assert!(report.passes());
        report.rule("2 < 1", false);
        assert!(!report.passes() && report.render() == "PASS  1 < 2\nFAIL  2 < 1\n");
    }
}
