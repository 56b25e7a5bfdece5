//! Casts of parameters that last from step to step: the update writes the copy in low precision together with the
//! parameter, in one pass over both, and the next step's products find it.

use crate::PassError;
use crate::builder::Builder;
use qcompile_ir::{Graph, NodeId, Op, Region};

/// Lets the casts of parameters last that products and other kernels read: `next %w.cast = %w.cast.next`, which is the
/// same cast of `%w.next`. Values stay what they are. Returns how many there are.
///
/// *Before*: parameters have their `next` values.
///
/// # Errors
/// Only by a defect.
pub fn keep_casts(graph: &mut Graph) -> Result<usize, PassError> {
    let params = graph.leaves(|op| matches!(op, Op::Param(_)));
    let mut kept = 0;
    for param in params {
        let Some(&next) = graph.next().get(&param).filter(|next| **next != param) else { continue };
        for (cast, _) in graph.uses(param) {
            let Op::Cast(dtype) = *graph.op(cast) else { continue };
            if graph.node(cast).region != Region::Forward || !is_read_whole(graph, cast) {
                continue;
            }
            let name = graph.node(cast).name.as_str().to_owned();
            let value = Builder::new(graph, Region::Update, &name).cast("next", next, dtype)?;
            graph.set_next(cast, value)?;
            kept += 1;
        }
    }
    Ok(kept)
}

/// Whether a product or another kernel reads the value from memory, in whichever view or widened. Loops would cast where
/// they read.
fn is_read_whole(graph: &Graph, id: NodeId) -> bool {
    graph.uses(id).into_iter().any(|(user, _)| match graph.op(user) {
        Op::Reshape(_) | Op::Transpose(_) | Op::Cast(_) => is_read_whole(graph, user),
        Op::Matmul { .. }
        | Op::Conv2d(_)
        | Op::Conv2dGradInput(_)
        | Op::Recurrence(_)
        | Op::RecurrenceGrad { .. }
        | Op::Gather => true,
        _ => false,
    })
}
