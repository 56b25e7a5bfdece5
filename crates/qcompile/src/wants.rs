//! What the inputs of a training step want of a data set.

use crate::about::About;
use crate::data::{Binding, Dataset, InputType, LABEL, Target};
use crate::error::{Code, Error, Result};
use crate::tensors::{file_type, input_type, to_tensor};
use qcompile_ir::{DType, Graph, Op, TensorType};
use qcompile_passes::attach_loss::LossKind;
use qcompile_runtime::Values;

/// Inputs, label and batch size of a graph that has its loss.
#[derive(Debug, Clone)]
pub struct Wants {
    /// The model's inputs in ONNX order.
    pub inputs: Vec<(String, InputType)>,
    /// What the label is; none where the model computes its own loss.
    pub target: Option<Target>,
    /// The only batch size that the model takes, if it takes only one.
    pub fixed_batch: Option<usize>,
    /// Whether the first axes of the model's arrays are not all alike, so that none of them is samples: a sample is
    /// then all arrays of one step, and the data set has an axis of samples before theirs.
    pub whole: bool,
}

/// The loss of this word.
#[must_use]
pub fn loss_kind(word: &str) -> Option<LossKind> {
    LossKind::ALL.into_iter().find(|kind| kind.name() == word)
}

fn input<'g>(graph: &'g Graph, name: &str) -> Option<&'g TensorType> {
    let id = graph.find(name)?;
    matches!(graph.op(id), Op::Input(_)).then(|| graph.ty(id))
}

/// The type of the model's output that the loss is taken of.
#[must_use]
pub fn logits<'g>(graph: &'g Graph, about: &About) -> Option<&'g TensorType> {
    let port = about.outputs.first()?;
    let (_, id) = graph.outputs().iter().find(|(name, _)| *name == port.name)?;
    Some(graph.ty(*id))
}

impl Wants {
    /// What this graph wants. `about` says what the model's inputs and its loss are.
    ///
    /// # Errors
    /// [`Code::PlanFormat`] where the two do not agree.
    pub fn of(graph: &Graph, about: &About) -> Result<Wants> {
        let missing = |what: &str| Error::new(Code::PlanFormat, format!("the graph has no {what}"));
        let mut inputs = Vec::with_capacity(about.inputs.len());
        let mut symbolic = false;
        let mut firsts = Vec::new();
        for port in &about.inputs {
            let ty = input(graph, &port.name)
                .ok_or_else(|| missing(&format!("input `{}`", port.name)))?;
            if matches!(ty.dtype, DType::I4 | DType::U4) || ty.dtype.is_float8() {
                let cause =
                    format!("input `{}` is {}, which data sets do not have", port.name, ty.dtype);
                return Err(Error::new(Code::DataType, cause));
            }
            symbolic |= ty.shape.batch_axis().is_some();
            firsts.push(ty.shape.0.first().and_then(|dim| dim.as_fixed()));
            inputs.push((port.name.clone(), input_type(ty)));
        }
        let values = matches!(loss_kind(&about.loss), Some(LossKind::Mse | LossKind::Bce));
        if let Some(label) = input(graph, LABEL).filter(|_| values) {
            firsts.push(label.shape.0.first().and_then(|dim| dim.as_fixed()));
        }
        let whole = !symbolic && firsts.iter().any(|first| *first != firsts[0]);
        let fixed_batch = match firsts.first() {
            _ if symbolic => None,
            Some(&Some(first)) if !whole => Some(first),
            _ => Some(1),
        };
        let sample = |mut ty: InputType| {
            if whole {
                ty.shape.insert(0, None);
            }
            ty
        };
        let inputs: Vec<(String, InputType)> =
            inputs.into_iter().map(|(name, ty)| (name, sample(ty))).collect();
        let target = match loss_kind(&about.loss) {
            None => return Err(missing("loss")),
            Some(LossKind::Output) => None,
            Some(LossKind::CrossEntropy) => {
                let label = input(graph, LABEL).ok_or_else(|| missing("input `label`"))?;
                let logits = logits(graph, about).ok_or_else(|| missing("first output"))?;
                let classes = logits.shape.0.last().and_then(|dim| dim.as_fixed());
                let rows = label.shape.elements().ok_or_else(|| missing("rows of labels"))?;
                Some(Target::Classes {
                    classes: classes.ok_or_else(|| missing("number of classes"))?,
                    rows_per_sample: if rows.batch {
                        rows.scale
                    } else {
                        rows.scale / fixed_batch.unwrap_or(1).max(1)
                    },
                    dtype: file_type(label.dtype),
                })
            }
            Some(LossKind::Mse | LossKind::Bce) => {
                let label = input(graph, LABEL).ok_or_else(|| missing("input `label`"))?;
                Some(Target::Values(sample(input_type(label))))
            }
        };
        Ok(Wants { inputs, target, fixed_batch, whole })
    }

    /// Finds the arrays of a data set for the inputs.
    ///
    /// # Errors
    /// Of [`Dataset::bind`].
    pub fn bind<'d>(&self, data: &'d Dataset) -> Result<Binding<'d>> {
        data.bind(&self.inputs, self.target.as_ref())
    }

    /// The batch size to run with: `asked`, unless the model takes another one only.
    ///
    /// # Errors
    /// Usage, if the model takes only another one and this one was asked for in so many words.
    pub fn batch_size(&self, asked: Option<usize>, usual: usize) -> Result<usize> {
        match (self.fixed_batch, asked) {
            (Some(fixed), Some(asked)) if asked != fixed => {
                let cause = format!("the model takes batches of {fixed} only, not of {asked}");
                Err(Error::usage(cause).help(format!(
                    "use --batch-size {fixed}, or export the model with a symbolic batch axis"
                )))
            }
            (Some(fixed), _) => Ok(fixed),
            (None, asked) => Ok(asked.unwrap_or(usual)),
        }
    }

    /// The samples `rows` as the step takes them.
    ///
    /// # Errors
    /// Of [`Binding::batch`].
    pub fn batch(&self, binding: &Binding<'_>, rows: &[usize]) -> Result<Values> {
        let arrays = binding.batch(rows)?;
        let classes = matches!(self.target, Some(Target::Classes { .. }));
        arrays
            .into_iter()
            .map(|(name, mut array)| {
                // Classes come as rows, whatever their shape was.
                if self.whole && !(classes && name == LABEL) {
                    array.shape.remove(0);
                }
                let tensor = to_tensor(&name, array)?;
                Ok((name, tensor))
            })
            .collect()
    }
}
