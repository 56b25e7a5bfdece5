//! Einsum, as products of matrices and sums.

use super::Results;
use super::indexing::fixed_axis;
use crate::draft::{Draft, ValueId};
use crate::error::Obstacle;
use crate::index::product;
use crate::node::OnnxNode;
use qcompile_ir::{Dim, Op, ReduceOp};
use std::collections::BTreeMap;

/// What names an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Label {
    /// One of the axes of an ellipsis, counted from its end.
    Ellipsis(usize),
    Letter(u8),
}

/// A value and the labels of its axes, none of them twice.
#[derive(Clone, Debug)]
struct Term {
    value: ValueId,
    labels: Vec<Label>,
}

impl Term {
    fn dim(&self, draft: &Draft, label: Label) -> Option<Dim> {
        let axis = self.labels.iter().position(|&own| own == label)?;
        Some(draft.dims(self.value)[axis])
    }

    /// With the axes in this order, and 1 for labels that it does not have.
    fn arranged(&self, draft: &mut Draft, labels: &[Label]) -> Result<ValueId, Obstacle> {
        let own: Vec<Label> =
            labels.iter().copied().filter(|label| self.labels.contains(label)).collect();
        let permutation: Vec<usize> = own
            .iter()
            .filter_map(|label| self.labels.iter().position(|own| own == label))
            .collect();
        let dims: Vec<Dim> =
            labels.iter().map(|&label| self.dim(draft, label).unwrap_or(Dim::ONE)).collect();
        let turned = draft.transpose(self.value, &permutation)?;
        draft.reshape(turned, &dims)
    }

    /// Summed over the labels that nobody else needs.
    fn summed(self, draft: &mut Draft, kept: impl Fn(Label) -> bool) -> Result<Term, Obstacle> {
        let axes: Vec<usize> =
            (0..self.labels.len()).filter(|&axis| !kept(self.labels[axis])).collect();
        let sum = draft.reduce(ReduceOp::Sum, self.value, &axes)?;
        let value = draft.squeeze(sum, &axes)?;
        Ok(Term { value, labels: self.labels.into_iter().filter(|&label| kept(label)).collect() })
    }
}

pub(super) fn einsum(draft: &mut Draft, node: &OnnxNode) -> Results {
    let equation = node.attributes.string("equation", "")?;
    let inputs = node.all_inputs()?;
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    let wrong = |reason: &str| Obstacle::invalid(format!("the equation `{equation}` {reason}"));
    let (operands, output) = match equation.split_once("->") {
        Some((operands, output)) => (operands, Some(output)),
        None => (equation.as_str(), None),
    };
    let operands: Vec<&str> = operands.split(',').collect();
    if operands.len() != inputs.len() {
        return Err(wrong(&format!("has {} terms for {} inputs", operands.len(), inputs.len())));
    }
    let mut ellipsis = 0;
    let mut uses: BTreeMap<Label, usize> = BTreeMap::new();
    let mut terms = Vec::with_capacity(inputs.len());
    for (&text, &value) in operands.iter().zip(&inputs) {
        let rank = draft.rank(value);
        let letters = text.bytes().filter(u8::is_ascii_alphabetic).count();
        let labels = labels(text, rank.checked_sub(letters)).filter(|all| all.len() == rank);
        let labels = labels.ok_or_else(|| wrong(&format!("has `{text}` for rank {rank}")))?;
        for &label in &labels {
            *uses.entry(label).or_default() += 1;
            if let Label::Ellipsis(at) = label {
                ellipsis = ellipsis.max(at + 1);
            }
        }
        terms.push(diagonals(draft, value, labels)?);
    }
    let output = match output {
        Some(text) => labels(text, Some(ellipsis)).ok_or_else(|| wrong("has a bad result"))?,
        // Without a result: the ellipsis, and what is there once, by letter.
        None => (0..ellipsis)
            .rev()
            .map(Label::Ellipsis)
            .chain(uses.iter().filter_map(|(&label, &count)| {
                (count == 1 && matches!(label, Label::Letter(_))).then_some(label)
            }))
            .collect(),
    };
    let known = |label: &Label| uses.contains_key(label);
    let twice = (1..output.len()).any(|at| output[..at].contains(&output[at]));
    if !output.iter().all(known) || twice {
        return Err(wrong("has a result that its terms do not name once"));
    }
    let sizes = sizes(draft, &terms, &uses).map_err(|reason| wrong(&reason))?;
    repeat_alone(draft, &mut terms, &sizes)?;
    let mut terms = terms.into_iter();
    let mut result = terms.next().ok_or_else(|| wrong("has no term"))?;
    while let Some(next) = terms.next() {
        let later: Vec<Label> = terms.as_slice().iter().flat_map(|t| t.labels.clone()).collect();
        let kept = |label: Label| output.contains(&label) || later.contains(&label);
        result = contracted(draft, result, next, &sizes, kept)?;
    }
    let result = result.summed(draft, |label| output.contains(&label))?;
    let arranged = result.arranged(draft, &output)?;
    let dims: Vec<Dim> = output.iter().map(|label| sizes[label]).collect();
    Ok(vec![draft.broadcast(arranged, &dims)?])
}

/// The labels of a term whose ellipsis, if it has one, stands for so many axes.
fn labels(text: &str, ellipsis: Option<usize>) -> Option<Vec<Label>> {
    let mut labels = Vec::new();
    let mut rest = text.as_bytes();
    let mut found = false;
    while let [first, ..] = rest {
        if let Some(after) = rest.strip_prefix(b"...") {
            if std::mem::replace(&mut found, true) {
                return None;
            }
            labels.extend((0..ellipsis?).rev().map(Label::Ellipsis));
            rest = after;
        } else if first.is_ascii_alphabetic() {
            labels.push(Label::Letter(*first));
            rest = &rest[1..];
        } else {
            return None;
        }
    }
    Some(labels)
}

/// Every axis once: of two with one label the diagonal.
fn diagonals(draft: &mut Draft, mut value: ValueId, labels: Vec<Label>) -> Result<Term, Obstacle> {
    let mut single: Vec<Label> = Vec::with_capacity(labels.len());
    for label in labels {
        let axis = single.len();
        let Some(first) = single.iter().position(|&other| other == label) else {
            single.push(label);
            continue;
        };
        let size = fixed_axis(draft, value, axis, "takes the diagonal of")?;
        if draft.dims(value)[first] != Dim::fixed(size) {
            return Err(Obstacle::invalid(format!("{} has no diagonal", draft.ty(value))));
        }
        // The second beside the first: every size + 1 th element of the two is on the diagonal.
        let beside = draft.move_axis(value, axis, first + 1)?;
        let mut dims = draft.dims(beside).to_vec();
        let square = product(&dims[first..first + 2])?;
        dims.splice(first..first + 2, [square]);
        let flat = draft.reshape(beside, &dims)?;
        let op = Op::Slice { axis: first, start: 0, end: square.scale, step: size + 1 };
        value = draft.emit(op, &[flat])?;
    }
    Ok(Term { value, labels: single })
}

/// The size of each label: 1 gives way to any other.
fn sizes(
    draft: &Draft,
    terms: &[Term],
    uses: &BTreeMap<Label, usize>,
) -> Result<BTreeMap<Label, Dim>, String> {
    let mut sizes: BTreeMap<Label, Dim> = uses.keys().map(|&label| (label, Dim::ONE)).collect();
    for term in terms {
        for (&label, &dim) in term.labels.iter().zip(draft.dims(term.value)) {
            match sizes.insert(label, dim) {
                Some(size) if dim == Dim::ONE => {
                    sizes.insert(label, size);
                }
                Some(size) if size != dim && size != Dim::ONE => {
                    return Err(format!("has sizes {size} and {dim} for one label"));
                }
                _ => {}
            }
        }
    }
    Ok(sizes)
}

/// Leaves the axes of size 1 out that are repeated to the size of their label: what is repeated is not multiplied.
fn repeat_alone(
    draft: &mut Draft,
    terms: &mut [Term],
    sizes: &BTreeMap<Label, Dim>,
) -> Result<(), Obstacle> {
    for term in terms {
        let dims = draft.dims(term.value).to_vec();
        let (gone, left): (Vec<usize>, Vec<usize>) = (0..dims.len())
            .partition(|&axis| dims[axis] == Dim::ONE && sizes[&term.labels[axis]] != Dim::ONE);
        term.value = draft.squeeze(term.value, &gone)?;
        term.labels = left.into_iter().map(|axis| term.labels[axis]).collect();
    }
    Ok(())
}

/// The product of two terms, summed over the labels that are not kept.
fn contracted(
    draft: &mut Draft,
    a: Term,
    b: Term,
    sizes: &BTreeMap<Label, Dim>,
    kept: impl Fn(Label) -> bool,
) -> Result<Term, Obstacle> {
    let (in_a, in_b) = (a.labels.clone(), b.labels.clone());
    let a = a.summed(draft, |label| kept(label) || in_b.contains(&label))?;
    let b = b.summed(draft, |label| kept(label) || in_a.contains(&label))?;
    let part = |from: &[Label], other: &[Label], shared: bool, stays: bool| -> Vec<Label> {
        let fits = |label: &&Label| other.contains(label) == shared && kept(**label) == stays;
        from.iter().filter(fits).copied().collect()
    };
    let (batch, summed) =
        (part(&a.labels, &b.labels, true, true), part(&a.labels, &b.labels, true, false));
    let (rows, columns) =
        (part(&a.labels, &b.labels, false, true), part(&b.labels, &a.labels, false, true));
    let labels = [&batch[..], &rows, &columns].concat();
    let dims = |labels: &[Label]| labels.iter().map(|label| sizes[label]).collect::<Vec<Dim>>();
    if summed.is_empty() || !draft.dtype(a.value).is_float() {
        let all = [&labels[..], &summed].concat();
        let (x, y) = (a.arranged(draft, &all)?, b.arranged(draft, &all)?);
        let value = draft.mul(x, y)?;
        return Term { value, labels: all }.summed(draft, |label| !summed.contains(&label));
    }
    let matrix = |draft: &mut Draft, term: &Term, first: &[Label], second: &[Label]| {
        let x = term.arranged(draft, &[&batch[..], first, second].concat())?;
        let mut shape = dims(&batch);
        shape.extend([product(&dims(first))?, product(&dims(second))?]);
        draft.reshape(x, &shape)
    };
    let (x, y) = (matrix(draft, &a, &rows, &summed)?, matrix(draft, &b, &summed, &columns)?);
    let op = Op::Matmul { transpose_a: false, transpose_b: false };
    let result = draft.emit(op, &[x, y])?;
    let value = draft.reshape(result, &dims(&labels))?;
    Ok(Term { value, labels })
}
