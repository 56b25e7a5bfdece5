//! The terms of the e-graphs: ops that `quantize` and `dequantize` can move past, and what is known of each class.

use egg::{Analysis, DidMerge, EGraph, Id, define_language};
use qcompile_ir::{BinaryOp, DType, Op, PoolGeometry, Shape, TensorType, UnaryOp, infer};
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
    /// The result of a cast or of a quantize.
    Type(DType),
    /// The windows of a pool.
    Pool(PoolGeometry),
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
    /// Values come first, attributes last.
    pub(super) enum Term {
        "relu" = Relu([Id; 1]),
        "cast" = Cast([Id; 2]),
        "max_pool" = MaxPool([Id; 2]),
        "reshape" = Reshape([Id; 2]),
        "transpose" = Transpose([Id; 2]),
        "slice" = Slice([Id; 2]),
        "concat" = Concat([Id; 3]),
        // The value, the parameters and the type.
        "quantize" = Quantize([Id; 3]),
        "dequantize" = Dequantize([Id; 2]),
        // The parameters of both: a scale, which may run along an axis, and perhaps a zero point.
        "scale" = Scale([Id; 1]),
        "scale_along" = ScaleAlong([Id; 2]),
        "affine" = Affine([Id; 2]),
        "affine_along" = AffineAlong([Id; 3]),
        // The largest magnitude of all elements, a scalar: abs, reduce_max, reshape.
        "amax" = Amax([Id; 1]),
        "div" = Div([Id; 2]),
        "max" = Max([Id; 2]),
        Leaf(Leaf),
    }
}

/// By what values are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parameters {
    pub(super) scale: Id,
    pub(super) zero_point: Option<Id>,
    /// The axis that they run along.
    pub(super) axis: Option<usize>,
}

impl Parameters {
    /// As a term.
    pub(super) fn term(self, egraph: &mut EGraph<Term, Facts>) -> Term {
        let axis = self.axis.map(|axis| egraph.add(Term::Leaf(Leaf::Axis(axis))));
        match (self.zero_point, axis) {
            (None, None) => Term::Scale([self.scale]),
            (None, Some(axis)) => Term::ScaleAlong([self.scale, axis]),
            (Some(zero_point), None) => Term::Affine([self.scale, zero_point]),
            (Some(zero_point), Some(axis)) => Term::AffineAlong([self.scale, zero_point, axis]),
        }
    }
}

impl Term {
    /// Its children that are values, in the order of the op's operands, those of its parameters among them.
    pub(super) fn operands(&self, egraph: &EGraph<Term, Facts>) -> Vec<Id> {
        let with_parameters = |x: Id, parameters: Id| {
            let known = egraph[parameters].data.parameters;
            let both = known.map(|known| [Some(known.scale), known.zero_point]);
            std::iter::once(x).chain(both.into_iter().flatten().flatten()).collect()
        };
        match self {
            Term::Relu(ids) | Term::Amax(ids) => ids.to_vec(),
            Term::Cast(ids)
            | Term::MaxPool(ids)
            | Term::Reshape(ids)
            | Term::Transpose(ids)
            | Term::Slice(ids) => vec![ids[0]],
            Term::Concat(ids) => ids[..2].to_vec(),
            Term::Quantize([x, parameters, _]) | Term::Dequantize([x, parameters]) => {
                with_parameters(*x, *parameters)
            }
            Term::Div(ids) | Term::Max(ids) => ids.to_vec(),
            Term::Scale(_)
            | Term::ScaleAlong(_)
            | Term::Affine(_)
            | Term::AffineAlong(_)
            | Term::Leaf(_) => Vec::new(),
        }
    }

    /// The op it stands for; none for leaves, parameters and [`Term::Amax`].
    pub(super) fn op(&self, egraph: &EGraph<Term, Facts>) -> Option<Op> {
        let attribute = |id: &Id| egraph[*id].data.attribute.as_ref();
        let axis = |parameters: &Id| Some(egraph[*parameters].data.parameters?.axis);
        Some(match self {
            Term::Relu(_) => Op::Unary(UnaryOp::Relu),
            Term::Cast([_, to]) => match attribute(to)? {
                Leaf::Type(dtype) => Op::Cast(*dtype),
                _ => return None,
            },
            Term::MaxPool([_, geometry]) => match attribute(geometry)? {
                Leaf::Pool(geometry) => Op::MaxPool2d(*geometry),
                _ => return None,
            },
            Term::Reshape([_, shape]) => match attribute(shape)? {
                Leaf::Shape(shape) => Op::Reshape(shape.clone()),
                _ => return None,
            },
            Term::Transpose([_, permutation]) => match attribute(permutation)? {
                Leaf::Permutation(permutation) => Op::Transpose(permutation.clone()),
                _ => return None,
            },
            Term::Slice([_, slice]) => match attribute(slice)? {
                &Leaf::Slice([axis, start, end, step]) => Op::Slice { axis, start, end, step },
                _ => return None,
            },
            Term::Concat([_, _, at]) => match attribute(at)? {
                Leaf::Axis(axis) => Op::Concat { axis: *axis },
                _ => return None,
            },
            Term::Quantize([_, parameters, to]) => match attribute(to)? {
                Leaf::Type(dtype) => Op::Quantize { dtype: *dtype, axis: axis(parameters)? },
                _ => return None,
            },
            Term::Dequantize([_, parameters]) => Op::Dequantize { axis: axis(parameters)? },
            Term::Div(_) => Op::Binary(BinaryOp::Div),
            Term::Max(_) => Op::Binary(BinaryOp::Max),
            Term::Amax(_)
            | Term::Scale(_)
            | Term::ScaleAlong(_)
            | Term::Affine(_)
            | Term::AffineAlong(_)
            | Term::Leaf(_) => return None,
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
    /// The parameters, if it is such.
    pub(super) parameters: Option<Parameters>,
    /// Every element, or every scale of the parameters, is a normal number above 0.
    pub(super) positive: bool,
    /// Within the symmetric range, i8 without -128: what `quantize` without a zero point makes.
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
        let parameters = |scale: Id, zero_point: Option<Id>, axis: Option<Id>| {
            let axis = axis.and_then(|id| match fact(id).attribute {
                Some(Leaf::Axis(axis)) => Some(axis),
                _ => None,
            });
            let parameters = Some(Parameters { scale, zero_point, axis });
            Fact { parameters, positive: fact(scale).positive, ..Fact::default() }
        };
        let operands = term.operands(egraph);
        let all = |property: fn(&Fact) -> bool| operands.iter().all(|&id| property(fact(id)));
        let (positive, in_range) = match term {
            Term::Leaf(Leaf::Value(index)) => {
                return egraph.analysis.values.get(*index).cloned().unwrap_or_default();
            }
            Term::Leaf(attribute) => {
                return Fact { attribute: Some(attribute.clone()), ..Fact::default() };
            }
            Term::Scale([scale]) => return parameters(*scale, None, None),
            Term::ScaleAlong([scale, axis]) => return parameters(*scale, None, Some(*axis)),
            Term::Affine([scale, zero]) => return parameters(*scale, Some(*zero), None),
            Term::AffineAlong([scale, zero, axis]) => {
                return parameters(*scale, Some(*zero), Some(*axis));
            }
            Term::Amax(_) => {
                let ty = Some(TensorType::f32(Shape::scalar()));
                return Fact { ty, ..Fact::default() };
            }
            Term::Quantize(_) => (false, operands.len() == 2),
            Term::Max([a, b]) => (fact(*a).positive || fact(*b).positive, false),
            // A quotient of positive numbers may round to zero, a product with them and a narrower type too.
            // A window of a pool may be all padding.
            Term::Div(_) | Term::Dequantize(_) | Term::Cast(_) | Term::MaxPool(_) => (false, false),
            Term::Relu(_)
            | Term::Reshape(_)
            | Term::Transpose(_)
            | Term::Slice(_)
            | Term::Concat(_) => (all(|fact| fact.positive), all(|fact| fact.in_range)),
        };
        let types: Option<Vec<&TensorType>> =
            operands.iter().map(|&id| fact(id).ty.as_ref()).collect();
        let ty = term.op(egraph).zip(types).and_then(|(op, types)| infer(&op, &types).ok());
        Fact { ty, positive, in_range, ..Fact::default() }
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
            parameters: a.parameters.or(b.parameters),
            positive: a.positive || b.positive,
            in_range: a.in_range || b.in_range,
        };
        let changed = DidMerge(merged != *a, merged != b);
        *a = merged;
        changed
    }
}
