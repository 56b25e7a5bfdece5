//! The order of the nodes, and what contradicts having one.

use crate::body::Body;
use crate::error::Problem;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// The nodes that the outputs need, operands first, in the file's order where possible. `outer` says which names are
/// defined around the graph.
///
/// # Errors
/// Values defined twice or not at all, and cycles.
pub(crate) fn order(body: &Body, outer: &dyn Fn(&str) -> bool) -> Result<Vec<usize>, Vec<Problem>> {
    let mut problems = Vec::new();
    let place = |index: usize| {
        let node = &body.nodes[index];
        Some(format!("{} ({})", node.name, node.proto.op_type))
    };
    let leaves = leaves(body, &mut problems);
    let mut producers: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, node) in body.nodes.iter().enumerate() {
        for output in node.proto.output.iter().filter(|output| !output.is_empty()) {
            let twice = leaves.contains(output.as_str());
            if producers.insert(output, index).is_some() || twice {
                let reason = format!("value `{output}` is defined twice");
                problems.push(Problem { place: place(index), reason });
            }
        }
    }
    // What each node reads of the results of others.
    let mut before: Vec<Vec<usize>> = Vec::with_capacity(body.nodes.len());
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); body.nodes.len()];
    for (index, node) in body.nodes.iter().enumerate() {
        let mut own = Vec::new();
        for input in node.reads() {
            if let Some(&producer) = producers.get(input) {
                users[producer].push(index);
                own.push(producer);
            } else if !leaves.contains(input) && !outer(input) {
                let reason = format!(
                    "input `{input}` is not defined (no input, initializer or result has this name)"
                );
                problems.push(Problem { place: place(index), reason });
            }
        }
        before.push(own);
    }
    let mut names = BTreeSet::new();
    for output in &body.outputs {
        let name = output.name.as_str();
        let reason = if !names.insert(name) {
            "is given twice"
        } else if !producers.contains_key(name) && !leaves.contains(name) && !outer(name) {
            "is not defined"
        } else {
            continue;
        };
        problems.push(Problem { place: Some(format!("output {name}")), reason: reason.to_owned() });
    }
    let ordered = sort(&users, before.iter().map(Vec::len).collect());
    if ordered.len() < body.nodes.len() {
        problems.extend(cycle(&ordered, &before).map(|index| Problem {
            place: place(index),
            reason: "depends on itself (a cycle)".to_owned(),
        }));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    let results = body.outputs.iter().filter_map(|output| producers.get(output.name.as_str()));
    let live = live(results.copied().collect(), &before);
    Ok(ordered.into_iter().filter(|&index| live[index]).collect())
}

/// Names that no node defines.
fn leaves<'a>(body: &'a Body, problems: &mut Vec<Problem>) -> BTreeSet<&'a str> {
    let mut leaves = BTreeSet::new();
    let mut inputs = BTreeSet::new();
    for (name, _) in &body.weights {
        if !leaves.insert(name.as_str()) {
            let place = Some(format!("initializer {name}"));
            problems.push(Problem { place, reason: "is defined twice".to_owned() });
        }
    }
    for input in &body.inputs {
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
fn cycle(ordered: &[usize], before: &[Vec<usize>]) -> impl Iterator<Item = usize> {
    let mut done = vec![false; before.len()];
    for &index in ordered {
        done[index] = true;
    }
    let mut seen = BTreeSet::new();
    let mut at = done.iter().position(|done| !done);
    while let Some(index) = at {
        if !seen.insert(index) {
            break;
        }
        at = before[index].iter().copied().find(|&at| !done[at]);
    }
    at.into_iter()
}

/// Whether each node is needed by one of `stack`.
fn live(mut stack: Vec<usize>, before: &[Vec<usize>]) -> Vec<bool> {
    let mut live = vec![false; before.len()];
    while let Some(index) = stack.pop() {
        if !std::mem::replace(&mut live[index], true) {
            stack.extend(&before[index]);
        }
    }
    live
}
