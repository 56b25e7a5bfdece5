//! The nouns of a plan: slots, steps, bindings.

use crate::low::{MOST_AFFINE_PRODUCTS, MOST_I8_PRODUCTS};
use crate::{LoopNest, Primitive};
use qcompile_ir::{
    CollectiveOp, Dim, Graph, GraphError, LeafValues, NodeId, Region, Tensor, TensorType,
};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// `fixed + per_batch · N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Affine {
    /// The constant part.
    pub fixed: usize,
    /// The factor of the batch size.
    pub per_batch: usize,
}

impl Affine {
    /// Zero.
    pub const ZERO: Affine = Affine { fixed: 0, per_batch: 0 };

    /// Its value when the batch size is `batch`.
    #[must_use]
    pub const fn at(self, batch: usize) -> usize {
        self.fixed.saturating_add(self.per_batch.saturating_mul(batch))
    }

    /// Whether it is at most `other` for every batch size from 1 up.
    #[must_use]
    pub const fn within(self, other: Affine) -> bool {
        self.per_batch <= other.per_batch && self.at(1) <= other.at(1)
    }

    /// The sum; `None` on overflow.
    #[must_use]
    pub fn plus(self, other: Affine) -> Option<Affine> {
        Some(Affine {
            fixed: self.fixed.checked_add(other.fixed)?,
            per_batch: self.per_batch.checked_add(other.per_batch)?,
        })
    }

    /// The product with a constant; `None` on overflow.
    #[must_use]
    pub fn times(self, factor: usize) -> Option<Affine> {
        Some(Affine {
            fixed: self.fixed.checked_mul(factor)?,
            per_batch: self.per_batch.checked_mul(factor)?,
        })
    }

    /// As a dimension, if it is one.
    #[must_use]
    pub const fn as_dim(self) -> Option<Dim> {
        match (self.fixed, self.per_batch) {
            (fixed, 0) => Some(Dim::fixed(fixed)),
            (0, per_batch) => Some(Dim { scale: per_batch, batch: true }),
            _ => None,
        }
    }

    /// The larger of both for every batch size.
    #[must_use]
    pub fn max(self, other: Affine) -> Affine {
        Affine {
            fixed: self.fixed.max(other.fixed),
            per_batch: self.per_batch.max(other.per_batch),
        }
    }
}

impl From<Dim> for Affine {
    fn from(dim: Dim) -> Affine {
        if dim.batch {
            Affine { fixed: 0, per_batch: dim.scale }
        } else {
            Affine { fixed: dim.scale, per_batch: 0 }
        }
    }
}

impl fmt::Display for Affine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.fixed, self.per_batch) {
            (fixed, 0) => write!(f, "{fixed}"),
            (0, per_batch) => write!(f, "{per_batch}N"),
            (fixed, per_batch) => write!(f, "{per_batch}N+{fixed}"),
        }
    }
}

/// Index of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl SlotId {
    /// As an index into [`Plan::slots`].
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Who owns the memory of a slot, and how long its contents last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Storage {
    /// Given before every step.
    Input,
    /// Kept between steps, saved in checkpoints: parameters and state.
    Kept,
    /// Never written after it was loaded.
    Const,
    /// Readable after the step.
    Output,
    /// Shared by several values whose lifetimes do not overlap.
    Shared,
}

/// A piece of memory, aligned to 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Who owns it.
    pub storage: Storage,
    /// Its size in bytes.
    pub bytes: Affine,
}

/// A named value that a host reads or writes, dense row-major in its slot.
#[derive(Clone, Debug, PartialEq)]
pub struct Binding {
    /// Its name: the ONNX name for inputs, outputs and parameters.
    pub name: String,
    /// Its type.
    pub ty: TensorType,
    /// Where it is.
    pub slot: SlotId,
    /// What it holds at first (parameters, state, constants).
    pub initial: Option<Arc<Tensor>>,
}

/// What a step runs.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "a plan has hundreds of steps, each of them once")]
pub enum Kernel {
    /// One or more loop nests over the same split dimension. All nests run over one range of it before the next range, so
    /// a later nest may read what an earlier one wrote in the same range. At most the last has reductions that cross the split.
    Loops(Vec<LoopNest>),
    /// A hand-scheduled kernel.
    Primitive(Primitive),
    /// An exchange with the other ranks, in place.
    AllReduce {
        /// How ranks combine.
        op: CollectiveOp,
        /// The f32 values.
        members: Vec<Exchanged>,
    },
}

/// An f32 value that ranks combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchanged {
    /// Where it is, and the result afterwards.
    pub value: crate::Place,
    /// How many elements it has.
    pub elements: usize,
    /// What ranks send in its place.
    pub codes: Option<Codes>,
}

/// An f32 value as `codes[rows, row] · scales[rows]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Codes {
    /// Where the i8 codes are.
    pub codes: crate::Place,
    /// Where the f32 scales are.
    pub scales: crate::Place,
    /// Codes of one scale.
    pub row: usize,
}

impl Exchanged {
    /// Bytes that a rank receives from the others. A value in f32 is exchanged by shards: each rank gets its shard of the
    /// others' values, and then the other shards of the sum. Codes are exchanged whole: a shard of the sum would have to be
    /// rounded again.
    #[must_use]
    pub fn received(&self, ranks: usize) -> usize {
        let others = ranks.saturating_sub(1);
        match self.codes {
            Some(codes) => others * (self.elements + 4 * self.elements.div_ceil(codes.row.max(1))),
            None => Exchanged::received_in_f32(self.elements, ranks),
        }
    }

    /// The same for so many elements in f32.
    #[must_use]
    pub fn received_in_f32(elements: usize, ranks: usize) -> usize {
        8 * elements * ranks.saturating_sub(1) / ranks.max(1)
    }
}

/// One kernel at its place in the schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The name of the (last) value it computes.
    pub name: String,
    /// When it runs.
    pub region: Region,
    /// What runs.
    pub kernel: Kernel,
    /// So little work, whatever the batch, that one thread does it alone: neighbours that are serial need no barrier.
    pub serial: bool,
    /// What it makes of parameters lasts from step to step, and is written by the update, too: it runs where there was no
    /// update before, in the forward region.
    pub lasting: bool,
}

/// A training step as data: what runs in which order on which memory.
///
/// Made by [`build`](crate::build) only, from a verified graph.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) graph: Graph,
    pub(crate) slots: Vec<Slot>,
    pub(crate) steps: Vec<Step>,
    pub(crate) inputs: Vec<Binding>,
    pub(crate) outputs: Vec<Binding>,
    pub(crate) params: Vec<Binding>,
    pub(crate) states: Vec<Binding>,
    pub(crate) consts: Vec<Binding>,
    pub(crate) meta: BTreeMap<String, String>,
    pub(crate) batch_size: usize,
    /// What the forward region stores for the backward region, with its bytes.
    pub(crate) saved: Vec<(NodeId, Affine)>,
    pub(crate) evaluation: Option<Arc<Plan>>,
}

impl Plan {
    /// A plan from its parts: for tests of what comes after; everybody else uses [`build`](crate::build).
    ///
    /// # Errors
    /// [`VerifyError`](crate::VerifyError) if a step could leave its memory.
    #[allow(clippy::too_many_arguments, reason = "the parts of a plan")]
    pub fn assemble(
        graph: Graph,
        slots: Vec<Slot>,
        steps: Vec<Step>,
        inputs: Vec<Binding>,
        outputs: Vec<Binding>,
        params: Vec<Binding>,
        states: Vec<Binding>,
        consts: Vec<Binding>,
    ) -> Result<Plan, crate::VerifyError> {
        let plan = Plan {
            graph,
            slots,
            steps,
            inputs,
            outputs,
            params,
            states,
            consts,
            meta: BTreeMap::new(),
            batch_size: 1,
            saved: Vec::new(),
            evaluation: None,
        };
        crate::verify(&plan)?;
        Ok(plan)
    }

    /// The graph it was built from.
    #[must_use]
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// What was said about it: decisions, loss, optimizer and whatever else the compiler wants to remember.
    #[must_use]
    pub fn meta(&self) -> &BTreeMap<String, String> {
        &self.meta
    }

    /// The same plan with other things said about it.
    #[must_use]
    pub fn with_meta(mut self, meta: BTreeMap<String, String>) -> Plan {
        self.meta = meta;
        self
    }

    /// The same plan, and its evaluation form, whose parameters and states that are named begin with these values.
    ///
    /// # Errors
    /// Where a value has another type than its parameter or state.
    pub fn with_values(&self, values: &LeafValues) -> Result<Plan, GraphError> {
        let mut plan = Plan { graph: self.graph.with_values(values)?, ..self.clone() };
        for binding in plan.params.iter_mut().chain(&mut plan.states) {
            if let Some(value) = values.get(&binding.name) {
                binding.initial = Some(Arc::clone(value));
            }
        }
        let evaluation = self.evaluation.as_ref().map(|form| form.with_values(values));
        plan.evaluation = evaluation.transpose()?.map(Arc::new);
        Ok(plan)
    }

    /// The plan of the evaluation form: the forward region alone, where batch statistics are replaced by running ones.
    #[must_use]
    pub fn evaluation(&self) -> Option<&Plan> {
        self.evaluation.as_deref()
    }

    /// The same plan with another evaluation form.
    ///
    /// # Errors
    /// [`VerifyError`](crate::VerifyError) if that has a parameter or state that this plan lacks or has with another
    /// type, or an evaluation form of its own, or computes anything but the forward region.
    pub fn with_evaluation(mut self, evaluation: Option<Plan>) -> Result<Plan, crate::VerifyError> {
        if let Some(evaluation) = &evaluation {
            crate::verify::verify_evaluation(&self, evaluation)?;
        }
        self.evaluation = evaluation.map(Arc::new);
        Ok(self)
    }

    /// The parameter or state of this name.
    #[must_use]
    pub fn kept(&self, name: &str) -> Option<&Binding> {
        self.params.iter().chain(&self.states).find(|binding| binding.name == name)
    }

    /// The batch size that its memory is shared for.
    #[must_use]
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// The most samples that one worker may take at once, if there is a bound: a product of i8 whose sums run over them
    /// would wrap with more.
    #[must_use]
    pub fn largest_batch(&self) -> Option<usize> {
        let bound = |step: &Step| match &step.kernel {
            Kernel::Primitive(Primitive::Matmul(matmul, _)) if matmul.k.batch => {
                let affine = matmul.operands.scales()?.is_affine();
                let most = if affine { MOST_AFFINE_PRODUCTS } else { MOST_I8_PRODUCTS };
                most.checked_div(matmul.k.scale)
            }
            _ => None,
        };
        self.steps.iter().filter_map(bound).min()
    }

    /// All memory.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The schedule: forward, backward, comm, update.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Values given before every step.
    #[must_use]
    pub fn inputs(&self) -> &[Binding] {
        &self.inputs
    }

    /// Values readable after a step.
    #[must_use]
    pub fn outputs(&self) -> &[Binding] {
        &self.outputs
    }

    /// Trained values.
    #[must_use]
    pub fn params(&self) -> &[Binding] {
        &self.params
    }

    /// Values kept between steps that are not trained.
    #[must_use]
    pub fn states(&self) -> &[Binding] {
        &self.states
    }

    /// Constants.
    #[must_use]
    pub fn consts(&self) -> &[Binding] {
        &self.consts
    }

    /// The values of samples that the forward region stores and later regions read, in the order of the graph, with their
    /// bytes. Inputs and what is computed again are not among them.
    #[must_use]
    pub fn saved(&self) -> &[(NodeId, Affine)] {
        &self.saved
    }

    /// Bytes of [`saved`](Self::saved) values when the batch size is `batch`.
    #[must_use]
    pub fn saved_bytes(&self, batch: usize) -> usize {
        self.saved.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(bytes.at(batch)))
    }

    /// Bytes of all slots when the batch size is `batch` (without kernel scratch), each rounded up to 64.
    #[must_use]
    pub fn bytes(&self, batch: usize) -> usize {
        self.slots.iter().map(|slot| slot.bytes.at(batch).next_multiple_of(64)).sum()
    }
}

/// Bytes of a value of this type.
///
/// The type must have passed [`infer`](fn@qcompile_ir::infer), which bounds it.
#[must_use]
pub fn bytes_of(ty: &TensorType) -> Affine {
    let elements = ty.shape.elements().expect("verified: types are bounded");
    Affine::from(elements).times(ty.dtype.size()).expect("verified: types are bounded")
}

/// Row-major strides of a dense value of this shape. The type must have passed inference.
#[must_use]
pub fn dense_strides(dims: &[Dim]) -> Vec<Dim> {
    let mut strides = vec![Dim::ONE; dims.len()];
    for axis in (0..dims.len().saturating_sub(1)).rev() {
        strides[axis] =
            strides[axis + 1].times(dims[axis + 1]).expect("verified: types are bounded");
    }
    strides
}
