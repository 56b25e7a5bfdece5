//! Tests of the whole pass.
