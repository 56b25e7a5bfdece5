//! Removes what need not be computed.
//!
//! *Before*: any graph. *After*: a graph that computes the same values with no op over constants alone, no ops that do
//! nothing, no value computed twice in a region, and as few layout changes as possible: transposes have moved
//! down and met their inverses, so that an imported image network is channels-last throughout, and what is left of them
//! above convolutions stands above their casts and codes, too; reshapes of matrices have moved down, so that what follows a
//! linear layer runs over its rows and columns.
//!
//! *Why here*: first, because every later pass sees fewer and plainer nodes (a layer is one product of its
//! weight); and last, because gradients and updates are written in general forms.

mod fold;
mod identity;
mod largest;
mod reshape;
mod share;
mod transpose;

pub(crate) use identity::splat;

use crate::PassError;
use qcompile_ir::{Graph, NodeId};

/// What may be removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether `stop_gradient` still says something: a backward pass is yet to be built.
    pub keep_stop_gradient: bool,
}

/// Every round removes something, so this bounds only what a defect could do.
const ROUNDS: usize = 20;

/// Simplifies until nothing changes. Values that remain keep their names, though one that moved across a transpose has
/// its axes in another order. Invalidates every [`NodeId`].
///
/// # Errors
/// Only by a defect.
pub fn run(graph: &mut Graph, options: &Options) -> Result<(), PassError> {
    for _ in 0..ROUNDS {
        graph.sweep();
        let mut changed = fold::run(graph)?;
        changed |= identity::run(graph, options)?;
        changed |= share::run(graph)?;
        changed |= transpose::sink(graph)?;
        changed |= reshape::sink(graph)?;
        // A gradient of a maximum of maxima may go elsewhere.
        changed |= !options.keep_stop_gradient && largest::run(graph)?;
        if !changed && !transpose::flatten(graph)? {
            break;
        }
    }
    transpose::raise_over_casts(graph)?;
    graph.sweep();
    Ok(())
}

/// Makes every user of `old` use `new`, which takes over the note where it has none of its own.
fn replace(graph: &mut Graph, old: NodeId, new: NodeId) -> Result<(), PassError> {
    graph.replace_uses(old, new)?;
    let note = graph.node(old).note.clone();
    let kept = graph.note_mut(new);
    kept.origin = kept.origin.take().or(note.origin);
    kept.sensitivity = kept.sensitivity.or(note.sensitivity);
    kept.precision = kept.precision.or(note.precision);
    kept.stored = kept.stored.or(note.stored);
    kept.quantizer = kept.quantizer.or(note.quantizer);
    if kept.channels.is_empty() {
        kept.channels = note.channels;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
