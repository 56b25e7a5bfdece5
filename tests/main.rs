//! The test suite of the workspace: one binary, one module for each kind of test.

mod filetests;
mod oracle;
mod tidy;
