//! Every invariant of a graph, checked at each border.
//!
//! 1. Every node has the type that [`infer()`] derives from its operands' types.
//! 2. The operands of a node have the positions 0, 1, 2, ... without gap or repetition.
//! 3. No value depends on itself.
//! 4. No edge goes back a region; leaves are in the forward region.
//! 5. Names are unique and lead back to their node.
//! 6. Outputs are nodes of the graph and have names that differ.
//! 7. `next` leads from a param or state of the graph to a value of the same type, or from a cast of a param to the same
//!    cast of that param's next value. A leaf without `next` keeps its value.
//! 8. `all_reduce` is in the comm region, or in forward and backward for statistics that ranks share; not in update.
//! 9. Notes fit: a sensitivity is not NaN, channels ascend.
//!
//! The doors of [`Graph`] keep 1 to 4 on their own; they are checked again because a graph comes from many hands.

use crate::{Graph, NodeId, Op, Region, TensorType, infer};
use std::collections::BTreeSet;
use std::fmt;
use thiserror::Error;

/// One broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{name}: {reason}")]
pub struct VerifyError {
    /// The value with its sigil, as text writes it.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Every broken invariant, in order of the nodes.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct VerifyErrors(pub Vec<VerifyError>);

impl fmt::Display for VerifyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, error) in self.0.iter().enumerate() {
            if position > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

/// Checks every invariant that the module lists.
///
/// # Errors
/// All broken invariants.
pub fn verify(graph: &Graph) -> Result<(), VerifyErrors> {
    let mut verifier = Verifier { graph, errors: Vec::new() };
    for id in graph.ids() {
        verifier.node(id);
        verifier.note(id);
    }
    verifier.cycles();
    verifier.footer();
    if verifier.errors.is_empty() { Ok(()) } else { Err(VerifyErrors(verifier.errors)) }
}

struct Verifier<'g> {
    graph: &'g Graph,
    errors: Vec<VerifyError>,
}

impl Verifier<'_> {
    fn report(&mut self, id: NodeId, reason: impl Into<String>) {
        let name = self.graph.node(id).name.to_string();
        self.errors.push(VerifyError { name, reason: reason.into() });
    }

    fn node(&mut self, id: NodeId) {
        let graph = self.graph;
        let node = graph.node(id);
        let operands = graph.operands(id);
        let types: Vec<&TensorType> = operands.iter().map(|&operand| graph.ty(operand)).collect();
        match infer(&node.op, &types) {
            Ok(ty) if ty == node.ty => {}
            Ok(ty) => self.report(id, format!("has type {}, but its op gives {ty}", node.ty)),
            Err(error) => self.report(id, error.to_string()),
        }
        if !graph.operand_positions(id).into_iter().eq(0..operands.len()) {
            self.report(id, "the positions of its operands are not 0, 1, 2, ...");
        }
        for operand in operands {
            let from = graph.node(operand);
            if from.region > node.region {
                let (own, later) = (node.region.name(), from.region.name());
                self.report(id, format!("in region {own} uses {} of region {later}", from.name));
            }
        }
        if node.op.is_leaf() && node.region != Region::Forward {
            self.report(id, format!("is a leaf in region {}", node.region.name()));
        }
        if graph.find(node.name.as_str()) != Some(id) {
            self.report(id, "its name does not lead back to it");
        }
        if matches!(node.op, Op::AllReduce(_)) && node.region == Region::Update {
            self.report(id, "all_reduce is not allowed in region update");
        }
    }

    fn note(&mut self, id: NodeId) {
        let note = &self.graph.node(id).note;
        if note.sensitivity.is_some_and(f32::is_nan) {
            self.report(id, "its sensitivity is not a number");
        }
        if let Some(defect) = note.channels.defect() {
            self.report(id, defect);
        }
    }

    fn cycles(&mut self) {
        let order = self.graph.order();
        if order.len() == self.graph.len() {
            return;
        }
        let ordered: BTreeSet<NodeId> = order.into_iter().collect();
        for id in self.graph.ids().filter(|id| !ordered.contains(id)) {
            self.report(id, "depends on itself or on a value that does");
        }
    }

    fn footer(&mut self) {
        let graph = self.graph;
        let foreign = |name: &str| VerifyError {
            name: name.to_owned(),
            reason: "is no node of this graph".to_owned(),
        };
        let inside = |id: NodeId| id.index() < graph.len();
        let mut names = BTreeSet::new();
        for (name, id) in graph.outputs() {
            if !inside(*id) {
                self.errors.push(foreign(&format!("output {name:?}")));
            } else if !names.insert(name) {
                self.report(*id, format!("another output has the name {name:?}"));
            }
        }
        for (&leaf, &value) in graph.next() {
            if !inside(leaf) || !inside(value) {
                self.errors.push(foreign("a next value or its leaf"));
            } else if !matches!(graph.op(leaf), Op::Param(_) | Op::State(_))
                && !graph.lasts(leaf, value)
            {
                self.report(
                    leaf,
                    "has a next value, but is neither param nor state, nor a cast as its next value is",
                );
            } else if graph.ty(leaf) != graph.ty(value) {
                let (ty, next) = (graph.ty(leaf), graph.ty(value));
                self.report(leaf, format!("is {ty}, but its next value is {next}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Channels, Graph, Note, UnaryOp, text};
    use std::collections::BTreeMap;
    use std::path::Path;

    /// What is wrong with a text, by line: from the parser, or from the verifier at the value's definition.
    fn errors(source: &str) -> Vec<(usize, String)> {
        let graph = match text::parse(source, &|_| None) {
            Ok(graph) => graph,
            Err(errors) => return errors.0.into_iter().map(|e| (e.line, e.message)).collect(),
        };
        let line = |name: &str| {
            let defines = |line: &str| line.contains(&format!("{name} :"));
            source.lines().position(defines).map_or(0, |line| line + 1)
        };
        match verify(&graph) {
            Ok(()) => Vec::new(),
            Err(errors) => errors.0.into_iter().map(|e| (line(&e.name), e.reason)).collect(),
        }
    }

    #[test]
    fn every_file_breaks_what_it_says() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/filetests/verify");
        let mut files = 0;
        for entry in std::fs::read_dir(folder).expect("the folder is part of the repository") {
            let path = entry.expect("readable").path();
            let source = std::fs::read_to_string(&path).expect("readable");
            let found: BTreeMap<usize, String> = errors(&source).into_iter().collect();
            let expected: BTreeMap<usize, &str> = (1..)
                .zip(source.lines())
                .filter_map(|(at, line)| Some((at, line.split_once("; error: ")?.1)))
                .collect();
            assert!(!expected.is_empty(), "{}: expects nothing", path.display());
            assert!(found.keys().eq(expected.keys()), "{}: {found:?}", path.display());
            for (at, expected) in expected {
                let message = &found[&at];
                assert!(message.contains(expected), "{}:{at}: {message}", path.display());
            }
            files += 1;
        }
        assert!(files >= 10, "only {files} files");
    }

    #[test]
    fn what_text_cannot_say_is_checked_too() {
        let source = "graph @g {\n  input %x : f32[2]\nforward:\n  %y : f32[2] = relu %x\n}";
        let mut graph = text::parse(source, &|_| None).expect("parses");
        let y = graph.find("y").expect("defined");
        *graph.note_mut(y) = Note {
            channels: Channels { outliers: vec![3, 1], ..Channels::default() },
            ..Note::default()
        };
        let other = Graph::new("other");
        assert_eq!(verify(&other), Ok(()));
        let mut larger = graph.clone();
        let z = larger.add(Op::Unary(UnaryOp::Abs), &[y], "z", Region::Forward).expect("fits");
        graph.add_output("z", z);
        let message = verify(&graph).expect_err("two errors").to_string();
        assert_eq!(
            message,
            "%y: its outliers do not ascend\noutput \"z\": is no node of this graph"
        );
    }

    #[test]
    fn leaves_belong_to_forward() {
        let mut graph = Graph::new("g");
        let ty = TensorType::f32(crate::Shape::scalar());
        graph.add(Op::Input(ty), &[], "rate", Region::Update).expect("no operands");
        let message = verify(&graph).expect_err("misplaced").to_string();
        assert_eq!(message, "%rate: is a leaf in region update");
    }
}
