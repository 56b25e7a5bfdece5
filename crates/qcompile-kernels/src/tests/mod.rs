//! Every kernel on every tier against plain loops in f64 or i32.

mod attention;
mod bf16;
mod check;
mod convolution;
mod emulated;
mod indexing;
mod matrix;
mod recurrent;
mod rows;
mod windows;
mod winograd;
