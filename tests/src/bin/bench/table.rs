//! The result of a measurement: rows with a figure, its yardstick, their comparison, and the goal.

use std::fmt;

/// One measurement's rows.
#[derive(Debug)]
pub(crate) struct Table {
    title: String,
    rows: Vec<Row>,
    notes: Vec<String>,
}

#[derive(Debug)]
struct Row {
    what: String,
    measured: String,
    yardstick: String,
    compared: String,
    goal: String,
    is_met: Option<bool>,
}

impl Table {
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), rows: Vec::new(), notes: Vec::new() }
    }

    /// Adds a figure with its yardstick and a goal.
    pub(crate) fn judged(
        &mut self,
        what: impl Into<String>,
        measured: impl Into<String>,
        yardstick: impl Into<String>,
        compared: impl Into<String>,
        (goal, is_met): (impl Into<String>, bool),
    ) {
        self.rows.push(Row {
            what: what.into(),
            measured: measured.into(),
            yardstick: yardstick.into(),
            compared: compared.into(),
            goal: goal.into(),
            is_met: Some(is_met),
        });
    }

    /// Adds a figure without a goal.
    pub(crate) fn told(
        &mut self,
        what: impl Into<String>,
        measured: impl Into<String>,
        yardstick: impl Into<String>,
        compared: impl Into<String>,
    ) {
        self.rows.push(Row {
            what: what.into(),
            measured: measured.into(),
            yardstick: yardstick.into(),
            compared: compared.into(),
            goal: String::new(),
            is_met: None,
        });
    }

    /// Adds a sentence below the table.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// How many goals were missed.
    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row.is_met == Some(false)).count()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEAD: [&str; 6] = ["what", "Nexus", "yardstick", "compared", "goal", ""];
        let rows: Vec<[&str; 6]> = self
            .rows
            .iter()
            .map(|row| {
                let verdict = match row.is_met {
                    Some(true) => "met",
                    Some(false) => "**missed**",
                    None => "",
                };
                [&*row.what, &*row.measured, &*row.yardstick, &*row.compared, &*row.goal, verdict]
            })
            .collect();
        let mut widths = HEAD.map(|head| head.chars().count());
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        writeln!(f, "## {}\n", self.title)?;
        let mut line = |cells: [&str; 6]| {
            f.write_str("|")?;
            cells.iter().zip(widths).try_for_each(|(cell, width)| write!(f, " {cell:width$} |"))?;
            f.write_str("\n")
        };
        line(HEAD)?;
        let rules = widths.map(|width| "-".repeat(width));
        line(rules.each_ref().map(String::as_str))?;
        rows.into_iter().try_for_each(line)?;
        self.notes.iter().try_for_each(|note| write!(f, "\n{note}\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_markdown_and_count_what_was_missed() {
        let mut table = Table::new("Things");
        table.judged("a", "3 µs", "1 µs", "3.0 x", ("≤ 2 x", false));
        table.judged("b", "1 µs", "1 µs", "1.0 x", ("≤ 2 x", true));
        table.told("c", "5", "", "");
        table.note("So it is.");
        assert_eq!(table.missed(), 1);
        assert_eq!(
            table.to_string(),
            "## Things\n\n\
             | what | Nexus | yardstick | compared | goal  |            |\n\
             | ---- | ----- | --------- | -------- | ----- | ---------- |\n\
             | a    | 3 µs  | 1 µs      | 3.0 x    | ≤ 2 x | **missed** |\n\
             | b    | 1 µs  | 1 µs      | 1.0 x    | ≤ 2 x | met        |\n\
             | c    | 5     |           |          |       |            |\n\
             \nSo it is.\n"
        );
    }
}
