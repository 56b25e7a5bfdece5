//! The rules: one line each, all of them equalities of values, bit for bit, for finite numbers.
//!
//! Rounding is not an equality, so nothing here inserts or removes a `quantize` but where a `dequantize` by the same
//! scale stands right below it. Nothing is associative or commutative either: such rules only grow the e-graph.

use super::language::{Fact, Facts, Leaf, Parameters, Term};
use egg::{Applier, EGraph, Id, PatternAst, Rewrite, Subst, Symbol, Var, rewrite};
use qcompile_ir::DType;

type Egraph = EGraph<Term, Facts>;

/// Every rule; a rule that holds both ways counts twice.
#[rustfmt::skip]
pub(super) fn rules() -> Vec<Rewrite<Term, Facts>> {
    [
        rewrite!("relu-past-dequantize"; "(relu (dequantize ?q ?p))" <=> "(dequantize (relu ?q) ?p)" if keeps_sign("?p") if of_type("?q", &[DType::I8])),
        rewrite!("max-pool-past-dequantize"; "(max_pool (dequantize ?q ?p) ?a)" <=> "(dequantize (max_pool ?q ?a) ?p)" if positive("?p") if pools("?q", "?p", "?a")),
        rewrite!("reshape-past-dequantize"; "(reshape (dequantize ?q ?p) ?a)" <=> "(dequantize (reshape ?q ?a) ?p)" if per_tensor("?p")),
        rewrite!("slice-past-dequantize"; "(slice (dequantize ?q ?p) ?a)" <=> "(dequantize (slice ?q ?a) ?p)" if runs_elsewhere("?p", "?a")),
        rewrite!("concat-past-dequantize"; "(concat (dequantize ?o ?p) (dequantize ?q ?p) ?a)" <=> "(dequantize (concat ?o ?q ?a) ?p)" if runs_elsewhere("?p", "?a") if same_dtype("?o", "?q")),
        rewrite!("relu-past-quantize"; "(quantize (relu ?x) ?p ?t)" <=> "(relu (quantize ?x ?p ?t))" if keeps_sign("?p") if is_type("?t", &[DType::I8])),
        rewrite!("max-pool-past-quantize"; "(quantize (max_pool ?x ?a) ?p ?t)" <=> "(max_pool (quantize ?x ?p ?t) ?a)" if positive("?p") if pools("?x", "?p", "?a") if is_type("?t", POOLED)),
        rewrite!("reshape-past-quantize"; "(quantize (reshape ?x ?a) ?p ?t)" <=> "(reshape (quantize ?x ?p ?t) ?a)" if per_tensor("?p")),
        rewrite!("slice-past-quantize"; "(quantize (slice ?x ?a) ?p ?t)" <=> "(slice (quantize ?x ?p ?t) ?a)" if runs_elsewhere("?p", "?a")),
        rewrite!("concat-past-quantize"; "(quantize (concat ?x ?y ?a) ?p ?t)" <=> "(concat (quantize ?x ?p ?t) (quantize ?y ?p ?t) ?a)" if runs_elsewhere("?p", "?a") if same_dtype("?x", "?y")),
        rewrite!("relu-past-cast"; "(relu (cast ?x ?t))" <=> "(cast (relu ?x) ?t)"),
        rewrite!("max-pool-past-cast"; "(max_pool (cast ?x ?t) ?a)" <=> "(cast (max_pool ?x ?a) ?t)" if of_type("?x", POOLED) if is_type("?t", POOLED)),
        rewrite!("reshape-past-cast"; "(reshape (cast ?x ?t) ?a)" <=> "(cast (reshape ?x ?a) ?t)"),
        rewrite!("transpose-past-cast"; "(transpose (cast ?x ?t) ?a)" <=> "(cast (transpose ?x ?a) ?t)"),
        rewrite!("slice-past-cast"; "(slice (cast ?x ?t) ?a)" <=> "(cast (slice ?x ?a) ?t)"),
        rewrite!("concat-past-cast"; "(concat (cast ?x ?t) (cast ?y ?t) ?a)" <=> "(cast (concat ?x ?y ?a) ?t)" if same_dtype("?x", "?y")),
        vec![rewrite!("transpose-past-dequantize"; "(transpose (dequantize ?q ?p) ?a)" => { Swap::outwards(None) })],
        vec![rewrite!("transpose-past-dequantize-rev"; "(dequantize (transpose ?q ?a) ?p)" => { Swap::inwards(None) })],
        vec![rewrite!("transpose-past-quantize"; "(quantize (transpose ?q ?a) ?p ?t)" => { Swap::inwards(Some("?t")) })],
        vec![rewrite!("transpose-past-quantize-rev"; "(transpose (quantize ?q ?p ?t) ?a)" => { Swap::outwards(Some("?t")) })],
        vec![rewrite!("quantize-of-dequantize"; "(quantize (dequantize ?q ?p) ?p ?t)" => "?q" if comes_back("?q", "?p", "?t"))],
        vec![rewrite!("quantize-of-cast"; "(quantize (cast ?x ?t) ?p ?u)" => "(quantize ?x ?p ?u)" if widens("?x", "?t"))],
        vec![rewrite!("cast-of-cast"; "(cast (cast ?x ?t) ?u)" => "(cast ?x ?u)" if widens("?x", "?t"))],
        vec![rewrite!("cast-to-own-type"; "(cast ?x ?t)" => "?x" if own_type("?x", "?t"))],
        vec![rewrite!("amax-of-reshape"; "(amax (reshape ?x ?a))" => "(amax ?x)")],
        vec![rewrite!("amax-of-transpose"; "(amax (transpose ?x ?a))" => "(amax ?x)")],
        vec![rewrite!("amax-of-concat"; "(amax (concat ?x ?y ?a))" => "(max (amax ?x) (amax ?y))")],
        vec![rewrite!("transpose-of-transpose"; "(transpose (transpose ?x ?a) ?b)" => { Compose::new() })],
        vec![rewrite!("transpose-by-nothing"; "(transpose ?x ?a)" => "?x" if identity("?a"))],
        vec![rewrite!("reshape-of-reshape"; "(reshape (reshape ?x ?a) ?b)" => "(reshape ?x ?b)")],
        vec![rewrite!("reshape-to-own-shape"; "(reshape ?x ?a)" => "?x" if own_shape("?x", "?a"))],
    ]
    .concat()
}

/// The name of every rule, once each; also the name of its file test.
#[must_use]
pub fn rule_names() -> Vec<String> {
    rules()
        .iter()
        .map(|rule| rule.name.as_str().to_owned())
        .filter(|name| !name.ends_with("-rev"))
        .collect()
}

fn var(name: &str) -> Var {
    name.parse().expect("rules name variables with a question mark")
}

fn fact<'e>(egraph: &'e Egraph, subst: &Subst, var: Var) -> &'e Fact {
    &egraph[subst[var]].data
}

/// Every scale of the parameters is known to be a normal number above 0.
fn positive(parameters: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let parameters = var(parameters);
    move |egraph, _, subst| fact(egraph, subst, parameters).positive
}

fn parameters(egraph: &Egraph, subst: &Subst, var: Var) -> Option<Parameters> {
    fact(egraph, subst, var).parameters
}

/// Codes have the sign of what they stand for: scales are above 0, and there is no zero point.
fn keeps_sign(name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let name = var(name);
    move |egraph, _, subst| {
        fact(egraph, subst, name).positive
            && parameters(egraph, subst, name).is_some_and(|known| known.zero_point.is_none())
    }
}

/// The parameters have no axis.
fn per_tensor(name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let name = var(name);
    move |egraph, _, subst| {
        parameters(egraph, subst, name).is_some_and(|known| known.axis.is_none())
    }
}

/// The parameters run along no axis, or along another than a slice or a concat.
fn runs_elsewhere(name: &str, at: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (name, at) = (var(name), var(at));
    move |egraph, _, subst| {
        let Some(known) = parameters(egraph, subst, name) else { return false };
        match fact(egraph, subst, at).attribute {
            Some(Leaf::Axis(axis) | Leaf::Slice([axis, ..])) => known.axis != Some(axis),
            _ => false,
        }
    }
}

/// Types that max-pooling has a kernel for.
const POOLED: &[DType] = &[DType::F32, DType::BF16, DType::I8];

/// The values can be pooled, every window has a value, and the parameters are the same within a window.
fn pools(x: &str, name: &str, at: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (x, name, at) = (var(x), var(name), var(at));
    move |egraph, _, subst| {
        let Some(known) = parameters(egraph, subst, name) else { return false };
        let Some(Leaf::Pool(geometry)) = &fact(egraph, subst, at).attribute else { return false };
        let kernel =
            fact(egraph, subst, x).ty.as_ref().is_some_and(|ty| POOLED.contains(&ty.dtype));
        kernel && geometry.meets_input() && !matches!(known.axis, Some(1 | 2))
    }
}

/// The value is of one of these types.
fn of_type(x: &str, types: &'static [DType]) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let x = var(x);
    move |egraph, _, subst| {
        fact(egraph, subst, x).ty.as_ref().is_some_and(|ty| types.contains(&ty.dtype))
    }
}

/// It is one of these types.
fn is_type(
    name: &str,
    types: &'static [DType],
) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let name = var(name);
    move |egraph, _, subst| match fact(egraph, subst, name).attribute {
        Some(Leaf::Type(dtype)) => types.contains(&dtype),
        _ => false,
    }
}

/// The value is of the type.
fn own_type(x: &str, name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (x, name) = (var(x), var(name));
    move |egraph, _, subst| match (&fact(egraph, subst, x).ty, &fact(egraph, subst, name).attribute)
    {
        (Some(ty), Some(Leaf::Type(dtype))) => ty.dtype == *dtype,
        _ => false,
    }
}

/// The type holds every value of the type of x.
fn widens(x: &str, name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (x, name) = (var(x), var(name));
    move |egraph, _, subst| match (&fact(egraph, subst, x).ty, &fact(egraph, subst, name).attribute)
    {
        (Some(ty), Some(Leaf::Type(dtype))) => *dtype == DType::F32 && ty.dtype.is_float(),
        _ => false,
    }
}

/// Codes that are dequantized and quantized again by the same positive scale are what they were: integers of at most 8
/// bits within the range to which `quantize` clamps. The quotient is off by some parts in 2^24, which rounds away.
fn comes_back(q: &str, name: &str, t: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (q, name, t) = (var(q), var(name), var(t));
    move |egraph, _, subst| {
        let (codes, known) = (fact(egraph, subst, q), fact(egraph, subst, name));
        let (Some(ty), Some(parameters)) = (&codes.ty, &known.parameters) else {
            return false;
        };
        let same = fact(egraph, subst, t).attribute == Some(Leaf::Type(ty.dtype));
        let clamped = codes.in_range || parameters.zero_point.is_some();
        same && ty.dtype.size() == 1 && !ty.dtype.is_float() && known.positive && clamped
    }
}

/// Both have one element type, so that they can be joined; both may be any float before they are rounded.
fn same_dtype(x: &str, y: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (x, y) = (var(x), var(y));
    move |egraph, _, subst| match (&fact(egraph, subst, x).ty, &fact(egraph, subst, y).ty) {
        (Some(x), Some(y)) => x.dtype == y.dtype,
        _ => false,
    }
}

/// A permutation that moves nothing.
fn identity(name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let name = var(name);
    move |egraph, _, subst| match &fact(egraph, subst, name).attribute {
        Some(Leaf::Permutation(axes)) => axes.iter().enumerate().all(|(at, &axis)| at == axis),
        _ => false,
    }
}

/// The shape that the value has.
fn own_shape(x: &str, shape: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let (x, shape) = (var(x), var(shape));
    move |egraph, _, subst| match (
        &fact(egraph, subst, x).ty,
        &fact(egraph, subst, shape).attribute,
    ) {
        (Some(ty), Some(Leaf::Shape(shape))) => ty.shape == *shape,
        _ => false,
    }
}

fn permutation(egraph: &Egraph, subst: &Subst, var: Var) -> Option<Vec<usize>> {
    match &fact(egraph, subst, var).attribute {
        Some(Leaf::Permutation(axes)) => Some(axes.clone()),
        _ => None,
    }
}

/// Adds the term, unites it with the class and says whether that was new.
fn unite(egraph: &mut Egraph, class: Id, term: Term, rule: Symbol) -> Vec<Id> {
    let new = egraph.add(term);
    if egraph.union_trusted(class, new, rule) { vec![new] } else { Vec::new() }
}

/// `transpose(transpose(x, a), b)` as one transpose: its axis i is axis `a[b[i]]` of x.
#[derive(Debug)]
struct Compose {
    x: Var,
    a: Var,
    b: Var,
}

impl Compose {
    fn new() -> Compose {
        Compose { x: var("?x"), a: var("?a"), b: var("?b") }
    }
}

impl Applier<Term, Facts> for Compose {
    fn apply_one(
        &self,
        egraph: &mut Egraph,
        class: Id,
        subst: &Subst,
        _: Option<&PatternAst<Term>>,
        rule: Symbol,
    ) -> Vec<Id> {
        let (Some(a), Some(b)) =
            (permutation(egraph, subst, self.a), permutation(egraph, subst, self.b))
        else {
            return Vec::new();
        };
        let both = b.iter().map(|&axis| a[axis]).collect();
        let both = egraph.add(Term::Leaf(Leaf::Permutation(both)));
        unite(egraph, class, Term::Transpose([subst[self.x], both]), rule)
    }
}

/// Swaps a transpose by `a` with a quantization whose parameters run along axis i: along axis `a[i]` of the
/// transpose's operand.
struct Swap {
    /// The type of a `quantize`; none of a `dequantize`.
    to: Option<Var>,
    /// Whether the quantization ends up outside the transpose.
    outwards: bool,
    q: Var,
    a: Var,
    p: Var,
}

impl Swap {
    /// The quantization, which is outside, goes inside.
    fn inwards(to: Option<&str>) -> Swap {
        Swap { to: to.map(var), outwards: false, q: var("?q"), a: var("?a"), p: var("?p") }
    }

    /// The quantization, which is inside, goes outside.
    fn outwards(to: Option<&str>) -> Swap {
        Swap { outwards: true, ..Swap::inwards(to) }
    }

    fn quantization(&self, subst: &Subst, x: Id, parameters: Id) -> Term {
        match self.to {
            Some(to) => Term::Quantize([x, parameters, subst[to]]),
            None => Term::Dequantize([x, parameters]),
        }
    }
}

impl Applier<Term, Facts> for Swap {
    fn apply_one(
        &self,
        egraph: &mut Egraph,
        class: Id,
        subst: &Subst,
        _: Option<&PatternAst<Term>>,
        rule: Symbol,
    ) -> Vec<Id> {
        let (q, permuted) = (subst[self.q], subst[self.a]);
        let Some(axes) = permutation(egraph, subst, self.a) else { return Vec::new() };
        let Some(known) = parameters(egraph, subst, self.p) else { return Vec::new() };
        let moved = |axis: usize| match self.outwards {
            true => axes.iter().position(|&from| from == axis),
            false => axes.get(axis).copied(),
        };
        let axis = match known.axis.map(moved) {
            Some(None) => return Vec::new(),
            Some(moved) => moved,
            None => None,
        };
        let parameters = Parameters { axis, ..known }.term(egraph);
        let parameters = egraph.add(parameters);
        let term = if self.outwards {
            let inner = egraph.add(Term::Transpose([q, permuted]));
            self.quantization(subst, inner, parameters)
        } else {
            let inner = self.quantization(subst, q, parameters);
            Term::Transpose([egraph.add(inner), permuted])
        };
        unite(egraph, class, term, rule)
    }
}
