//! `.qir`: the text form of a graph, printed canonically and parsed with every error reported.
//!
//! ```text
//! file      = "graph" "@"name "{" { line } "}"             ; one statement per line, `;` starts a comment
//! line      = leaf | region | statement | return | next
//! leaf      = "input" value ":" type { note }
//!           | ("param" | "state" | "const") value ":" type "=" tensor { note }
//! region    = ("forward" | "backward" | "comm" | "update") ":"
//! statement = value ":" type "=" mnemonic [ value { "," value } ] { attribute } { note }
//! return    = "return" value [ "as" string ] { "," value [ "as" string ] }
//! next      = "next" value "=" value
//! value     = "%" plain | "%" string                       ; plain: letters, digits and _ . / : -
//! type      = dtype "[" [ dim { "," dim } ] "]"            ; dim: 64, N, 128N
//! tensor    = number | nested list | "splat" number | "#" 16 hex digits
//!           | "uniform" "seed="n [ "scale="x ] | "normal" "seed="n [ "scale="x ]
//! attribute = word | word "=" ( number | "[" numbers "]" )
//! note      = "!" word "(" arguments ")"
//! ```
//!
//! A plain name may contain `:`, so a colon after a value needs a space before it. Values are defined before they
//! are used. Laws: `parse(print(g))` prints as `g` does, and the parser never panics.

mod attribute;
mod lex;
mod literal;
mod parse;
mod print;

pub use parse::{ParseError, ParseErrors, parse};

use crate::{Graph, Op, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The tensors that the text of this graph names only by digest: what its reader must be given beside the text.
#[must_use]
pub fn tensors(graph: &Graph) -> BTreeMap<u64, Arc<Tensor>> {
    graph
        .ids()
        .filter_map(|id| match graph.op(id) {
            Op::Param(tensor) | Op::State(tensor) | Op::Const(tensor) => Some(tensor),
            _ => None,
        })
        .filter(|tensor| literal::inline(tensor).is_none())
        .map(|tensor| (tensor.digest(), Arc::clone(tensor)))
        .collect()
}

#[cfg(test)]
mod tests;
