//! The `qcompile-experiments` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    qcompile_experiments::main()
}
