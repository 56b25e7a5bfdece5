//! The test suite of the workspace: one binary, one module for each kind of test.

mod cli;
mod coded_gradients;
mod command;
mod conformance;
mod dropout;
mod evaluation;
mod export;
mod filetests;
mod hostile;
mod lasting;
mod models;
mod oracle;
mod precisions;
mod products;
mod properties;
mod quantized_nets;
mod quantizers;
mod random_graph;
mod ranged;
mod refusals;
mod rematerialise;
mod state;
mod support;
mod tidy;
mod training;
