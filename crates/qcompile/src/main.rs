//! The `qcompile` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    qcompile::commands::main()
}
