//! Decides which layers run in int8 or bf16, writes that as `quantize`, `dequantize` pairs and pairs of casts, and moves
//! the pairs to where they cost least.
//!
//! *Before*: a forward graph with its loss, layers noted with their `sensitivity`. *After* [`run`]: every layer has
//! a [`Decision`] and the note `precision`; the operands of the chosen ones are
//! `dequantize(quantize(x, scale), scale)`, or `cast f32 (cast bf16 x)`. *Why here*: `differentiate` passes gradients
//! straight through the plain pairs, so they must stand before it, and moved pairs only after it.
//!
//! After `differentiate`, [`insert_backward`] does the same for the products of the backward pass, and [`optimise`] moves, merges and cancels pairs by equalities that hold bit for bit.
//! docs/quantization.md has the formulas and every rule.

mod activations;
mod backward;
mod bf16;
mod biases;
mod channels;
mod choice;
mod codes;
mod decide;
mod extract;
mod insert;
mod language;
mod layer;
mod numerics;
mod obstacle;
mod pack;
mod pairs;
#[cfg(test)]
mod pairs_tests;
mod permute;
mod ranged;
mod recurrence;
mod remove;
mod rules;
mod scale;
mod split;
mod step_size;
#[cfg(test)]
mod tests;
mod weights;
mod window;

pub use crate::stochastic::{Draws, quantize_stochastically};
pub use activations::activations;
pub use biases::round_biases;
pub use channels::ChannelPolicy;
pub use choice::PrecisionChoice;
pub use codes::Codes;
pub(crate) use decide::matches;
pub use decide::{Decision, LayerCost, Operations, Options, decide};
pub(crate) use insert::{Inserted, activations as insert_activations, forward as insert_forward};
pub(crate) use layer::{Candidate, is_stored, multiplied, parameter};
pub use layer::{Layer, activation_products, layers, other_products};
pub use numerics::{Numerics, OperandTypes};
pub(crate) use obstacle::{Asked, obstacle};
pub use pack::{pack4, unpack4};
pub use pairs::join_pairs;
pub use ranged::{Held, Scheme, WeightScales, Weights, insert_ranged};
pub use remove::remove;
pub use rules::rule_names;
pub(crate) use step_size::initial as initial_step_size;
pub use window::{Moves, optimise};

use crate::PassError;
use qcompile_ir::{DType, Graph, Op, Region};

/// The pass's word in errors.
const PASS: &str = "quantize";

/// Joins the pairs that the model has, decides, and inserts those of the forward pass. Call before `differentiate`.
///
/// # Errors
/// [`PassError::Unsupported`] if the options ask for what is not there; see [`decide`].
pub fn run(graph: &mut Graph, options: &Options) -> Result<Vec<Decision>, PassError> {
    join_pairs(graph)?;
    let decisions = decide(graph, options)?;
    if options.precision.base() == DType::BF16 {
        note_other_products(graph, options.operations);
    }
    insert(graph)?;
    Ok(decisions)
}

/// Products of two computed values, attention, and recurrent products with an R that is not trained are no layers; in bf16
/// they run as layers do.
fn note_other_products(graph: &mut Graph, operations: Operations) {
    for id in graph.order() {
        let node = graph.node(id);
        let product = matches!(
            node.op,
            Op::Matmul { .. } | Op::Conv2d(_) | Op::Attention { .. } | Op::Recurrence(_)
        );
        if product && node.region == Region::Forward && node.ty.dtype == DType::F32 {
            let precision = decide::high(operations, DType::BF16);
            graph.note_mut(id).precision.get_or_insert(precision);
        }
    }
}

/// Rounds the operands of the backward products as the notes say that `differentiate` copied from the layers. Returns
/// how many products read low precision.
///
/// # Errors
/// [`PassError::Graph`], a defect of this pass.
pub fn insert_backward(graph: &mut Graph) -> Result<usize, PassError> {
    backward::pass_straight(graph)?;
    let bf16 = bf16::insert_backward(graph)?;
    if bf16 > 0 {
        bf16::save_rounded(graph)?;
        bf16::store_exact(graph)?;
    }
    let int8 = backward::insert(graph)?;
    graph.sweep();
    Ok(int8 + bf16)
}

/// Inserts forward roundings as the notes say: products whose `precision` is bf16 or that are `stored` so, and layers
/// whose `precision` is int8 in the forward product, but for the channels noted.
///
/// # Errors
/// [`PassError::Unsupported`] if a note asks for what cannot be done.
pub fn insert(graph: &mut Graph) -> Result<(), PassError> {
    let undivided = layers(graph);
    for one in Candidate::all(graph, &undivided) {
        if let Some(reason) = obstacle::by_note(graph, one, false) {
            let name = &graph.node(one.node).name;
            return Err(decide::refusal(format!("the notes of {name}: {reason}")));
        }
    }
    for layer in undivided {
        let note = &graph.node(layer.node).note;
        let low = note.precision.is_some_and(|precision| precision.is_quantized());
        if low && !note.channels.is_empty() {
            split::channels(graph, &layer)?;
        }
    }
    bf16::insert_forward(graph)?;
    let mut inserted = Inserted::default();
    for layer in layers(graph) {
        let precision = graph.node(layer.node).note.precision;
        if precision.is_some_and(|precision| insert::is_quantized(precision.forward)) {
            insert_forward(graph, &layer, &mut inserted)?;
        }
    }
    for product in activation_products(graph) {
        let precision = graph.node(product).note.precision;
        if precision.is_some_and(|precision| insert::is_quantized(precision.forward)) {
            insert_activations(graph, product, &mut inserted)?;
        }
    }
    graph.sweep();
    Ok(())
}
