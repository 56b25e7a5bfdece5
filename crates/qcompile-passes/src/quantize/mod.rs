//! Decides which layers run in int8, writes that as `quantize`, `dequantize` pairs, and moves the pairs to where
//! they cost least.
//!
//! *Before*: a forward graph with its loss, layers noted with their `sensitivity`. *After* [`run`]: every layer has
//! a [`Decision`] and the note `precision`; the operands of the chosen ones are
//! `dequantize(quantize(x, scale), scale)`. *Why here*: `differentiate` passes gradients straight through the plain
//! pairs, so they must stand before it, and moved pairs only after it.
//!
//! After `differentiate`, [`insert_backward`] does the same for the products that give the gradients of layer
//! inputs, and [`optimise`] moves, merges and cancels pairs by equalities that hold bit for bit.
//! docs/quantization.md has the formulas and every rule.

mod backward;
mod decide;
mod extract;
mod insert;
mod language;
mod layer;
mod rules;
mod split;
#[cfg(test)]
mod tests;
mod window;

pub use backward::insert_backward;
pub use decide::{Decision, LayerCost, Operations, Options, PrecisionChoice, decide};
pub(crate) use insert::{Inserted, forward as insert_forward};
pub use layer::{Layer, layers};
pub use rules::rule_names;
pub use window::{Moves, optimise};

use crate::PassError;
use qcompile_ir::{DType, Graph};

/// The pass's word in errors.
const PASS: &str = "quantize";

/// Decides and inserts the forward pairs. Call before `differentiate`.
///
/// # Errors
/// [`PassError::Unsupported`] if the options ask for what is not there; see [`decide`].
pub fn run(graph: &mut Graph, options: &Options) -> Result<Vec<Decision>, PassError> {
    let decisions = decide(graph, options)?;
    insert(graph)?;
    Ok(decisions)
}

/// Inserts forward pairs as the notes say: layers whose `precision` is int8 in the forward product, but for the
/// channels in `outliers`.
///
/// # Errors
/// [`PassError::Unsupported`] if a note asks for what cannot be done.
pub fn insert(graph: &mut Graph) -> Result<(), PassError> {
    let mut inserted = Inserted::default();
    for layer in layers(graph) {
        let note = &graph.node(layer.node).note;
        let Some(precision) = note.precision else { continue };
        let low = precision.forward == DType::I8 || precision.grad_input == DType::I8;
        if low && !note.outliers.is_empty() {
            split::outliers(graph, &layer, &mut inserted)?;
        } else if precision.forward == DType::I8 {
            insert_forward(graph, &layer, &mut inserted)?;
        }
    }
    graph.sweep();
    Ok(())
}
