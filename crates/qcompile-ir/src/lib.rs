//! The language of the compiler.
