//! The rules: one line each, all of them equalities of values, bit for bit, for finite numbers.
//!
//! Rounding is not an equality, so nothing here inserts or removes a `quantize` but where a `dequantize` by the same
//! scale stands right below it. Nothing is associative or commutative either: such rules only grow the e-graph.

use super::language::{Fact, Facts, Leaf, Term};
use egg::{Applier, EGraph, Id, PatternAst, Rewrite, Subst, Symbol, Var, rewrite};

type Egraph = EGraph<Term, Facts>;

/// Every rule; a rule that holds both ways counts twice.
#[rustfmt::skip]
pub(super) fn rules() -> Vec<Rewrite<Term, Facts>> {
    [
        rewrite!("relu-past-dequantize"; "(relu (dequantize ?q ?s))" <=> "(dequantize (relu ?q) ?s)" if positive("?s")),
        rewrite!("reshape-past-dequantize"; "(reshape (dequantize ?q ?s) ?a)" <=> "(dequantize (reshape ?q ?a) ?s)"),
        rewrite!("transpose-past-dequantize"; "(transpose (dequantize ?q ?s) ?a)" <=> "(dequantize (transpose ?q ?a) ?s)"),
        rewrite!("slice-past-dequantize"; "(slice (dequantize ?q ?s) ?a)" <=> "(dequantize (slice ?q ?a) ?s)"),
        rewrite!("concat-past-dequantize"; "(concat (dequantize ?p ?s) (dequantize ?q ?s) ?a)" <=> "(dequantize (concat ?p ?q ?a) ?s)"),
        rewrite!("relu-past-quantize"; "(quantize (relu ?x) ?s)" <=> "(relu (quantize ?x ?s))" if positive("?s")),
        rewrite!("reshape-past-quantize"; "(quantize (reshape ?x ?a) ?s)" <=> "(reshape (quantize ?x ?s) ?a)"),
        rewrite!("transpose-past-quantize"; "(quantize (transpose ?x ?a) ?s)" <=> "(transpose (quantize ?x ?s) ?a)"),
        rewrite!("slice-past-quantize"; "(quantize (slice ?x ?a) ?s)" <=> "(slice (quantize ?x ?s) ?a)"),
        rewrite!("concat-past-quantize"; "(quantize (concat ?x ?y ?a) ?s)" <=> "(concat (quantize ?x ?s) (quantize ?y ?s) ?a)" if same_dtype("?x", "?y")),
        rewrite!("relu-past-dequantize-along"; "(relu (dequantize_along ?q ?s ?i))" <=> "(dequantize_along (relu ?q) ?s ?i)" if positive("?s")),
        rewrite!("relu-past-quantize-along"; "(quantize_along (relu ?x) ?s ?i)" <=> "(relu (quantize_along ?x ?s ?i))" if positive("?s")),
        vec![rewrite!("transpose-past-dequantize-along"; "(transpose (dequantize_along ?q ?s ?i) ?a)" => { Along::outwards(Term::DequantizeAlong) })],
        vec![rewrite!("transpose-past-dequantize-along-rev"; "(dequantize_along (transpose ?q ?a) ?s ?i)" => { Along::inwards(Term::DequantizeAlong) })],
        vec![rewrite!("transpose-past-quantize-along"; "(quantize_along (transpose ?q ?a) ?s ?i)" => { Along::inwards(Term::QuantizeAlong) })],
        vec![rewrite!("transpose-past-quantize-along-rev"; "(transpose (quantize_along ?q ?s ?i) ?a)" => { Along::outwards(Term::QuantizeAlong) })],
        vec![rewrite!("quantize-of-dequantize"; "(quantize (dequantize ?q ?s) ?s)" => "?q" if in_range("?q") if positive("?s"))],
        vec![rewrite!("quantize-of-dequantize-along"; "(quantize_along (dequantize_along ?q ?s ?i) ?s ?i)" => "?q" if in_range("?q") if positive("?s"))],
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

/// All elements are known to be normal numbers above 0.
fn positive(name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let name = var(name);
    move |egraph, _, subst| fact(egraph, subst, name).positive
}

/// i8 without -128, which `quantize` never makes.
fn in_range(name: &str) -> impl Fn(&mut Egraph, Id, &Subst) -> bool + use<> {
    let name = var(name);
    move |egraph, _, subst| fact(egraph, subst, name).in_range
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

/// Swaps a transpose by `a` with an op whose scale runs along axis i: along axis `a[i]` of the transpose's operand.
struct Along {
    term: fn([Id; 3]) -> Term,
    /// Whether the op ends up outside the transpose.
    outwards: bool,
    q: Var,
    a: Var,
    s: Var,
    i: Var,
}

impl Along {
    /// The op, which is outside, goes inside.
    fn inwards(term: fn([Id; 3]) -> Term) -> Along {
        Along { term, outwards: false, q: var("?q"), a: var("?a"), s: var("?s"), i: var("?i") }
    }

    /// The op, which is inside, goes outside.
    fn outwards(term: fn([Id; 3]) -> Term) -> Along {
        Along { outwards: true, ..Along::inwards(term) }
    }
}

impl Applier<Term, Facts> for Along {
    fn apply_one(
        &self,
        egraph: &mut Egraph,
        class: Id,
        subst: &Subst,
        _: Option<&PatternAst<Term>>,
        rule: Symbol,
    ) -> Vec<Id> {
        let (q, scale, permuted) = (subst[self.q], subst[self.s], subst[self.a]);
        let Some(axes) = permutation(egraph, subst, self.a) else { return Vec::new() };
        let Some(Leaf::Axis(axis)) = fact(egraph, subst, self.i).attribute else {
            return Vec::new();
        };
        let moved = if self.outwards {
            axes.iter().position(|&from| from == axis)
        } else {
            axes.get(axis).copied()
        };
        let Some(moved) = moved else { return Vec::new() };
        let moved = egraph.add(Term::Leaf(Leaf::Axis(moved)));
        let term = if self.outwards {
            let inner = egraph.add(Term::Transpose([q, permuted]));
            (self.term)([inner, scale, moved])
        } else {
            let inner = egraph.add((self.term)([q, scale, moved]));
            Term::Transpose([inner, permuted])
        };
        unite(egraph, class, term, rule)
    }
}
