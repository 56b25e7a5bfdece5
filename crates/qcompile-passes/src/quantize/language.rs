//! The terms of the e-graphs: ops that `quantize` and `dequantize` can move past, and what is known of each class.

use egg::{Analysis, DidMerge, EGraph, Id, define_language};
use qcompile_ir::{BinaryOp, DType, Op, Shape, TensorType, UnaryOp, infer};
use std::fmt;
use std::str::FromStr;

/// What stands at the end of a term: a value from outside the window, or an attribute of an op.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Leaf {
    /// The value of this index in [`Facts::values`].
    Value(usize),
    /// The result of a reshape.
    Shape(Shape),
    /// Axes of a transpose.
    Permutation(Vec<usize>),
    /// Axis, start, end and step of a slice.
    Slice([usize; 4]),
    /// The axis of a concat or of a scale.
    Axis(usize),
}

impl fmt::Display for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Patterns of rules name no leaf, so no text is one.
#[derive(Debug)]
pub(super) struct NoLeafInPatterns;

impl fmt::Display for NoLeafInPatterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a pattern names no leaf")
    }
}

impl FromStr for Leaf {
    type Err = NoLeafInPatterns;
    fn from_str(_: &str) -> Result<Self, NoLeafInPatterns> {
        Err(NoLeafInPatterns)
    }
}

define_language! {
    /// Attributes come last; scales before them. `_along` has a scale per index of an axis, the others a scalar one.
    pub(super) enum Term {
        "relu" = Relu([Id; 1]),
        "reshape" = Reshape([Id; 2]),
        "transpose" = Transpose([Id; 2]),
        "slice" = Slice([Id; 2]),
        "concat" = Concat([Id; 3]),
        "quantize" = Quantize([Id; 2]),
        "dequantize" = Dequantize([Id; 2]),
        "quantize_along" = QuantizeAlong([Id; 3]),
        "dequantize_along" = DequantizeAlong([Id; 3]),
        // The largest magnitude of all elements, a scalar: abs, reduce_max, reshape.
        "amax" = Amax([Id; 1]),
        "div" = Div([Id; 2]),
        "max" = Max([Id; 2]),
        Leaf(Leaf),
    }
}

impl Term {
    /// Its children that are values, in the order of the op's operands.
    pub(super) fn operands(&self) -> &[Id] {
        match self {
            Term::Relu(ids) | Term::Amax(ids) => ids,
            Term::Reshape(ids) | Term::Transpose(ids) | Term::Slice(ids) => &ids[..1],
            Term::Concat(ids) | Term::QuantizeAlong(ids) | Term::DequantizeAlong(ids) => &ids[..2],
            Term::Quantize(ids) | Term::Dequantize(ids) | Term::Div(ids) | Term::Max(ids) => ids,
            Term::Leaf(_) => &[],
        }
    }

    /// The op it stands for, given the attribute of a class; none for leaves and [`Term::Amax`].
    pub(super) fn op<'a>(&self, attribute: impl Fn(Id) -> Option<&'a Leaf>) -> Option<Op> {
        let axis = |id| match attribute(id) {
            Some(Leaf::Axis(axis)) => Some(*axis),
            _ => None,
        };
        Some(match self {
            Term::Relu(_) => Op::Unary(UnaryOp::Relu),
            Term::Reshape([_, shape]) => match attribute(*shape)? {
                Leaf::Shape(shape) => Op::Reshape(shape.clone()),
                _ => return None,
            },
            Term::Transpose([_, permutation]) => match attribute(*permutation)? {
                Leaf::Permutation(permutation) => Op::Transpose(permutation.clone()),
                _ => return None,
            },
            Term::Slice([_, slice]) => match attribute(*slice)? {
                &Leaf::Slice([axis, start, end, step]) => Op::Slice { axis, start, end, step },
                _ => return None,
            },
            Term::Concat([_, _, at]) => Op::Concat { axis: axis(*at)? },
            Term::Quantize(_) => Op::Quantize { dtype: DType::I8, axis: None },
            Term::Dequantize(_) => Op::Dequantize { axis: None },
            Term::QuantizeAlong([_, _, at]) => {
                Op::Quantize { dtype: DType::I8, axis: Some(axis(*at)?) }
            }
            Term::DequantizeAlong([_, _, at]) => Op::Dequantize { axis: Some(axis(*at)?) },
            Term::Div(_) => Op::Binary(BinaryOp::Div),
            Term::Max(_) => Op::Binary(BinaryOp::Max),
            Term::Amax(_) | Term::Leaf(_) => return None,
        })
    }
}

/// What is known of all terms of a class.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Fact {
    /// The type, if it is a value.
    pub(super) ty: Option<TensorType>,
    /// The attribute, if it is one.
    pub(super) attribute: Option<Leaf>,
    /// Every element is a normal number above 0.
    pub(super) positive: bool,
    /// i8 without -128: what `quantize` makes.
    pub(super) in_range: bool,
}

/// The values from outside, and how facts follow from facts.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// What is known of each value from outside.
    pub(super) values: Vec<Fact>,
}

impl Facts {
    fn of(egraph: &EGraph<Term, Facts>, term: &Term) -> Fact {
        let fact = |id: Id| &egraph[id].data;
        let all =
            |property: fn(&Fact) -> bool| term.operands().iter().all(|&id| property(fact(id)));
        let (positive, in_range) = match term {
            Term::Leaf(Leaf::Value(index)) => {
                return egraph.analysis.values.get(*index).cloned().unwrap_or_default();
            }
            Term::Leaf(attribute) => {
                return Fact { attribute: Some(attribute.clone()), ..Fact::default() };
            }
            Term::Amax(_) => {
                let ty = Some(TensorType::f32(Shape::scalar()));
                return Fact { ty, ..Fact::default() };
            }
            Term::Quantize(_) | Term::QuantizeAlong(_) => (false, true),
            Term::Max([a, b]) => (fact(*a).positive || fact(*b).positive, false),
            // A quotient of positive numbers may round to zero, a product with them too.
            Term::Div(_) | Term::Dequantize(_) | Term::DequantizeAlong(_) => (false, false),
            Term::Relu(_)
            | Term::Reshape(_)
            | Term::Transpose(_)
            | Term::Slice(_)
            | Term::Concat(_) => (all(|fact| fact.positive), all(|fact| fact.in_range)),
        };
        let types: Option<Vec<&TensorType>> =
            term.operands().iter().map(|&id| fact(id).ty.as_ref()).collect();
        let ty = term
            .op(|id| fact(id).attribute.as_ref())
            .zip(types)
            .and_then(|(op, types)| infer(&op, &types).ok());
        Fact { ty, attribute: None, positive, in_range }
    }
}

impl Analysis<Term> for Facts {
    type Data = Fact;

    fn make(egraph: &mut EGraph<Term, Facts>, term: &Term, _: Id) -> Fact {
        Facts::of(egraph, term)
    }

    fn merge(&mut self, a: &mut Fact, b: Fact) -> DidMerge {
        debug_assert_eq!(a.ty, b.ty, "a rule equates values of two types");
        let merged = Fact {
            ty: a.ty.clone().or_else(|| b.ty.clone()),
            attribute: a.attribute.clone().or_else(|| b.attribute.clone()),
            positive: a.positive || b.positive,
            in_range: a.in_range || b.in_range,
        };
        let changed = DidMerge(merged != *a, merged != b);
        *a = merged;
        changed
    }
}
