//! Compresses what the forward pass saves for the backward pass.
//!
//! *Before*: a graph with forward and backward region.
//!
//! *After*: where the backward region read a large forward value, it reads a copy that was stored in bf16 or f16, in 8 or in 4
//! bits, and is restored where it is read first; the forward region reads what it read before. As in ActNN (Chen et al.
//! 2021, arXiv:2104.14129), integers have a smallest value and a step for each block of a sample, and are rounded at random:
//! with levels L (255 or 15),
//!
//! ```text
//! step = max(max x - min x, 1e-30) / L        code = min(floor((x - min x) / step + u), L)        x' = code · step + min x
//! ```
//!
//! so that the mean of x' is x, and gradients, which are linear in each saved value, keep their mean. What decides
//! between branches stays exact: a comparison is made in the forward region and saved as bits; what a max-pool, a recurrent
//! layer, a loss or another rounding reads is saved as it is. A value that is made of restored ones by sums, products
//! and quotients is made again instead of being saved, too.
//!
//! *Why here*: last, because values are computed in the order in which nodes were made: a code stands right behind its
//! value, and what is restored right before who reads it first.

mod codes;
mod find;

pub(crate) use find::late;

use crate::PassError;
use crate::builder::Builder;
use codes::Copy;
use find::{Found, Treatment};
use qcompile_ir::{DType, Graph, NodeId, Op, Region};
use std::collections::{BTreeMap, BTreeSet};

/// How a saved value is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// Rounded to bf16.
    Bf16,
    /// Rounded to f16, and held within its range.
    F16,
    /// A code of 8 bits; a smallest value and a step for each block.
    Int8,
    /// A code of 4 bits, two in a byte.
    Int4,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 4] = [Format::Bf16, Format::F16, Format::Int8, Format::Int4];

    /// The word on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::Int8 => "int8",
            Format::Int4 => "int4",
        }
    }

    /// The float type that it rounds to, if it does that alone.
    const fn float(self) -> Option<DType> {
        match self {
            Format::Bf16 => Some(DType::BF16),
            Format::F16 => Some(DType::F16),
            Format::Int8 | Format::Int4 => None,
        }
    }
}

/// Which values are saved how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// How.
    pub format: Format,
    /// Of which nodes, by name or ONNX name, `*` and `?` standing for any characters and one; all without it.
    pub pattern: Option<String>,
}

impl std::fmt::Display for Rule {
    /// As on the command line: `saved=int8:conv*`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "saved={}", self.format.name())?;
        self.pattern.iter().try_for_each(|pattern| write!(f, ":{pattern}"))
    }
}

impl std::str::FromStr for Rule {
    type Err = String;
    /// `saved=FORMAT` or `saved=FORMAT:PATTERN`.
    fn from_str(text: &str) -> Result<Rule, String> {
        let wanted = || {
            let formats: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
            format!(
                "saved=FORMAT or saved=FORMAT:PATTERN is wanted, FORMAT one of {}",
                formats.join(", ")
            )
        };
        let rule = text.strip_prefix("saved=").ok_or_else(wanted)?;
        let (word, pattern) = match rule.split_once(':') {
            Some((_, "")) => return Err(wanted()),
            Some((word, pattern)) => (word, Some(pattern.to_owned())),
            None => (rule, None),
        };
        let format = Format::ALL.into_iter().find(|format| format.name() == word);
        Ok(Rule { format: format.ok_or_else(wanted)?, pattern })
    }
}

/// A value that is saved in fewer bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The value.
    pub name: String,
    /// What was asked for.
    pub asked: Format,
    /// What it is in: int8 in the place of int4 where the elements of a sample are odd in number.
    pub format: Format,
}

/// What the backward pass reads of the forward pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Each compressed value.
    pub compressed: Vec<Compressed>,
    /// Bytes that all saved values take for each sample.
    pub bytes_per_sample: usize,
}

/// Compresses by the rules; of several that match a value the last counts.
///
/// # Errors
/// [`PassError::Unsupported`] for a pattern that matches no saved value.
pub fn run(graph: &mut Graph, rules: &[Rule]) -> Result<Saved, PassError> {
    find::hoist_comparisons(graph, rules)?;
    graph.sweep();
    let found = find::find(graph, rules)?;
    let mut rebuilt = Rebuilt {
        old: graph,
        new: Graph::new(graph.name()),
        found: &found,
        ids: BTreeMap::new(),
        copies: BTreeMap::new(),
        restored: BTreeMap::new(),
    };
    rebuilt.nodes()?;
    let compressed = rebuilt.compressed();
    let Rebuilt { mut new, ids, .. } = rebuilt;
    new.set_outputs(graph.outputs().iter().map(|(name, id)| (name.clone(), ids[id])).collect());
    for (leaf, value) in graph.next() {
        new.set_next(ids[leaf], ids[value])?;
    }
    *graph = new;
    graph.sweep();
    Ok(Saved { compressed, bytes_per_sample: saved_bytes(graph) })
}

/// A copy of a graph, in which codes stand right behind the values that they are of: values are computed in the order
/// of the graph, and the memory of one is free once its code is there.
struct Rebuilt<'g> {
    old: &'g Graph,
    new: Graph,
    found: &'g Found,
    ids: BTreeMap<NodeId, NodeId>,
    /// The stored copy of each compressed value.
    copies: BTreeMap<NodeId, Copy>,
    /// What the backward region reads in the place of a forward value.
    restored: BTreeMap<NodeId, NodeId>,
}

impl Rebuilt<'_> {
    fn nodes(&mut self) -> Result<(), PassError> {
        // Comparisons that were made forward stand behind all that they need.
        let mut waiting: BTreeSet<NodeId> = self.found.masks.clone();
        let order = self.old.order();
        let late = find::late(self.old, &order);
        for &id in order.iter().filter(|id| !late.contains(id)) {
            if self.ids.contains_key(&id) {
                continue;
            }
            self.with_late(id, &late)?;
            let ready: Vec<NodeId> = self
                .old
                .uses(id)
                .into_iter()
                .map(|(user, _)| user)
                .filter(|user| waiting.contains(user))
                .filter(|user| {
                    let computed = |of: &NodeId| self.ids.contains_key(&find::base(self.old, *of));
                    self.old.operands(*user).iter().all(computed)
                })
                .collect();
            for mask in ready {
                if waiting.remove(&mask) {
                    for operand in self.old.operands(mask) {
                        self.views(operand)?;
                    }
                    self.node(mask)?;
                }
            }
        }
        order.iter().try_for_each(|&id| self.with_late(id, &late))
    }

    /// Copies a node, and before it what it needs of those that wait for whoever needs them.
    fn with_late(&mut self, id: NodeId, late: &BTreeSet<NodeId>) -> Result<(), PassError> {
        let mut stack = vec![(id, false)];
        while let Some((id, ready)) = stack.pop() {
            if self.ids.contains_key(&id) {
                continue;
            }
            if ready {
                self.node(id)?;
                continue;
            }
            stack.push((id, true));
            let operands = self.old.operands(id).into_iter().rev();
            stack.extend(operands.filter(|of| late.contains(of)).map(|of| (of, false)));
        }
        Ok(())
    }

    /// Copies a view, and what it shows it through.
    fn views(&mut self, id: NodeId) -> Result<(), PassError> {
        let mut chain = vec![id];
        while let Some(&last) = chain.last().filter(|last| !self.ids.contains_key(last)) {
            chain.push(self.old.operand(last, 0));
        }
        chain.pop();
        chain.into_iter().rev().try_for_each(|view| self.node(view))
    }

    fn node(&mut self, id: NodeId) -> Result<(), PassError> {
        let node = self.old.node(id);
        let mut operands = Vec::new();
        for operand in self.old.operands(id) {
            operands.push(match node.region {
                Region::Backward => self.read(operand)?,
                _ => self.ids[&operand],
            });
        }
        // The step that random numbers count may be there already.
        let new = match (node.op.is_leaf(), self.new.find(node.name.as_str())) {
            (true, Some(known)) if *self.new.op(known) == node.op => known,
            _ => self.new.add(node.op.clone(), &operands, node.name.clone(), node.region)?,
        };
        *self.new.note_mut(new) = node.note.clone();
        self.ids.insert(id, new);
        let mut b = Builder::new(&mut self.new, Region::Forward, node.name.as_str());
        let copy = if self.found.masks.contains(&id) {
            Some(b.bits(new)?)
        } else if let Some(Treatment::Stored(format)) = self.found.values.get(&id) {
            Some(b.stored(new, *format)?)
        } else {
            None
        };
        if let Some(copy) = copy {
            self.copies.insert(id, copy);
        }
        Ok(())
    }

    /// What a node of the backward region reads where it read `id`.
    fn read(&mut self, id: NodeId) -> Result<NodeId, PassError> {
        if let Some(&known) = self.restored.get(&id) {
            return Ok(known);
        }
        // From the value that is stored back to the one that is read, so that no chain is as deep as the stack.
        let mut chain = vec![id];
        while let Some(&last) = chain.last() {
            if self.restored.contains_key(&last) || !find::is_view(self.old, last) {
                break;
            }
            chain.push(self.old.operand(last, 0));
        }
        let base = chain[chain.len() - 1];
        // A transposed input would be saved as a copy of what stays there anyway.
        let input = matches!(self.old.op(base), Op::Input(_))
            && chain.iter().any(|view| matches!(self.old.op(*view), Op::Transpose(_)));
        let restored = self.restored.contains_key(&base) || self.found.is_read_restored(base);
        let mut value = match (input, restored) {
            (true, _) => self.ids[&base],
            (false, true) => self.base(base)?,
            (false, false) => return Ok(self.ids[&id]),
        };
        for &view in chain[..chain.len() - 1].iter().rev() {
            value = self.again(view, &[value])?;
            self.restored.insert(view, value);
        }
        Ok(value)
    }

    /// The restored value of a stored one, or of one that is made again.
    fn base(&mut self, id: NodeId) -> Result<NodeId, PassError> {
        if let Some(&known) = self.restored.get(&id) {
            return Ok(known);
        }
        let value = match self.copies.get(&id) {
            Some(copy) => {
                let name = self.old.node(id).name.as_str().to_owned();
                let like = self.old.ty(id).clone();
                let mut b = Builder::new(&mut self.new, Region::Backward, &name);
                b.restored(copy, &like)?
            }
            None => {
                let mut operands = Vec::new();
                for operand in self.old.operands(id) {
                    operands.push(self.read(operand)?);
                }
                self.again(id, &operands)?
            }
        };
        self.restored.insert(id, value);
        Ok(value)
    }

    /// A forward node once more, in the backward region.
    fn again(&mut self, id: NodeId, operands: &[NodeId]) -> Result<NodeId, PassError> {
        let node = self.old.node(id);
        let name = format!("{}.restored", node.name.as_str());
        Ok(self.new.add(node.op.clone(), operands, name, Region::Backward)?)
    }

    /// What is compressed, and in what it is.
    fn compressed(&self) -> Vec<Compressed> {
        let stored = self.found.values.iter().filter_map(|(&id, treatment)| {
            let Treatment::Stored(asked) = *treatment else { return None };
            let name = self.old.node(id).name.as_str().to_owned();
            Some(Compressed { name, asked, format: self.copies.get(&id)?.format() })
        });
        stored.collect()
    }
}

/// Bytes for each sample of the forward values that the backward region reads.
fn saved_bytes(graph: &Graph) -> usize {
    let backward = graph.ids().filter(|&id| graph.node(id).region == Region::Backward);
    let read: BTreeSet<NodeId> =
        backward.flat_map(|id| graph.operands(id)).map(|id| find::base(graph, id)).collect();
    let bytes = |id: NodeId| {
        let node = graph.node(id);
        let elements = node.ty.shape.elements().filter(|elements| elements.batch);
        let stored = node.region == Region::Forward && !node.op.is_leaf();
        elements.filter(|_| stored).map_or(0, |elements| elements.scale * node.ty.dtype.size())
    };
    read.into_iter().map(bytes).sum()
}

#[cfg(test)]
mod tests;
