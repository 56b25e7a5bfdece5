//! The order of the nodes, and what contradicts having one.

use crate::error::Problem;
use onnx_protobuf::GraphProto;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// How a node is called in reports and notes: its name, or `Op_index`.
pub(crate) fn node_name(graph: &GraphProto, index: usize) -> String {
    let node = &graph.node[index];
    if node.name.is_empty() { format!("{}_{index}", node.op_type) } else { node.name.clone() }
}

/// The nodes that the outputs need, operands first, in the file's order where possible.
///
/// # Errors
/// Values defined twice or not at all, and cycles.
pub(crate) fn order(graph: &GraphProto) -> Result<Vec<usize>, Vec<Problem>> {
    let mut problems = Vec::new();
    let place =
        |index: usize| Some(format!("{} ({})", node_name(graph, index), graph.node[index].op_type));
    let leaves = leaves(graph, &mut problems);
    let mut producers: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        for output in node.output.iter().filter(|output| !output.is_empty()) {
            let twice = leaves.contains(output.as_str());
            if producers.insert(output, index).is_some() || twice {
                let reason = format!("value `{output}` is defined twice");
                problems.push(Problem { place: place(index), reason });
            }
        }
    }
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); graph.node.len()];
    let mut waiting = vec![0_usize; graph.node.len()];
    for (index, node) in graph.node.iter().enumerate() {
        for input in node.input.iter().filter(|input| !input.is_empty()) {
            if let Some(&producer) = producers.get(input.as_str()) {
                users[producer].push(index);
                waiting[index] += 1;
            } else if !leaves.contains(input.as_str()) {
                let reason = format!(
                    "input `{input}` is not defined (no input, initializer or result has this name)"
                );
                problems.push(Problem { place: place(index), reason });
            }
        }
    }
    if graph.output.is_empty() {
        problems.push(Problem { place: None, reason: "the model has no outputs".to_owned() });
    }
    let mut names = BTreeSet::new();
    for output in &graph.output {
        let reason = if !names.insert(output.name.as_str()) {
            "is given twice"
        } else if !producers.contains_key(output.name.as_str())
            && !leaves.contains(output.name.as_str())
        {
            "is not defined"
        } else {
            continue;
        };
        problems.push(Problem {
            place: Some(format!("output {}", output.name)),
            reason: reason.to_owned(),
        });
    }
    let ordered = sort(&users, waiting);
    if ordered.len() < graph.node.len() {
        problems.extend(cycle(graph, &ordered, &producers).map(|index| Problem {
            place: place(index),
            reason: "depends on itself (a cycle)".to_owned(),
        }));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let live = live(graph, &producers);
    Ok(ordered.into_iter().filter(|&index| live[index]).collect())
}

/// Names that no node defines.
fn leaves<'a>(graph: &'a GraphProto, problems: &mut Vec<Problem>) -> BTreeSet<&'a str> {
    let mut leaves = BTreeSet::new();
    let mut inputs = BTreeSet::new();
    let sparse = graph.sparse_initializer.iter().filter_map(|tensor| tensor.values.as_ref());
    let names = graph.initializer.iter().chain(sparse).map(|tensor| tensor.name.as_str());
    for name in names {
        if !leaves.insert(name) {
            let place = Some(format!("initializer {name}"));
            problems.push(Problem { place, reason: "is defined twice".to_owned() });
        }
    }
    for input in &graph.input {
        if input.name.is_empty() || !inputs.insert(input.name.as_str()) {
            let place = Some(format!("input {}", input.name));
            problems
                .push(Problem { place, reason: "has no name, or one that is taken".to_owned() });
        }
    }
    leaves.extend(inputs);
    leaves
}

/// The nodes that do not wait for each other.
fn sort(users: &[Vec<usize>], mut waiting: Vec<usize>) -> Vec<usize> {
    let mut ready: BinaryHeap<Reverse<usize>> = waiting
        .iter()
        .enumerate()
        .filter(|(_, count)| **count == 0)
        .map(|(index, _)| Reverse(index))
        .collect();
    let mut ordered = Vec::with_capacity(waiting.len());
    while let Some(Reverse(index)) = ready.pop() {
        ordered.push(index);
        for &user in &users[index] {
            waiting[user] -= 1;
            if waiting[user] == 0 {
                ready.push(Reverse(user));
            }
        }
    }
    ordered
}

/// A node on a cycle: going back from any unordered node, through unordered ones, comes around.
fn cycle(
    graph: &GraphProto,
    ordered: &[usize],
    producers: &BTreeMap<&str, usize>,
) -> impl Iterator<Item = usize> {
    let mut done = vec![false; graph.node.len()];
    for &index in ordered {
        done[index] = true;
    }
    let before = |index: usize| {
        let inputs = graph.node[index].input.iter();
        inputs.filter_map(|input| producers.get(input.as_str()).copied()).find(|&at| !done[at])
    };
    let mut seen = BTreeSet::new();
    let mut at = done.iter().position(|done| !done);
    while let Some(index) = at {
        if !seen.insert(index) {
            break;
        }
        at = before(index);
    }
    at.into_iter()
}

/// Whether each node is needed by an output.
fn live(graph: &GraphProto, producers: &BTreeMap<&str, usize>) -> Vec<bool> {
    let mut live = vec![false; graph.node.len()];
    let of = |name: &String| producers.get(name.as_str()).copied();
    let mut stack: Vec<usize> = graph.output.iter().filter_map(|output| of(&output.name)).collect();
    while let Some(index) = stack.pop() {
        if !std::mem::replace(&mut live[index], true) {
            stack.extend(graph.node[index].input.iter().filter_map(of));
        }
    }
    live
}
