//! The test suite of the workspace: one binary, one module for each kind of test.

mod evaluation;
mod filetests;
mod hostile;
mod models;
mod oracle;
mod properties;
mod random_graph;
mod support;
mod tidy;
mod training;
