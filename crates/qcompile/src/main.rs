//! The `qcompile` command.
fn main() {}
