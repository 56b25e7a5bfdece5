//! What to train: patterns over names of initializers, nodes and operators.

use crate::ImportError;
use crate::body::{Body, is_weight};
use crate::function::node_name;
use onnx_protobuf::NodeProto;
use std::collections::{BTreeMap, BTreeSet};

/// Whether `text` matches a pattern of literal characters, `*` (any run) and `?` (any one).
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where to go on if the run that the last star stands for must be longer.
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == '*' {
            retry = Some((p + 1, t));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == text[t]) {
            p += 1;
            t += 1;
        } else if let Some((after, start)) = retry {
            retry = Some((after, start + 1));
            (p, t) = (after, start + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

/// The three names closest to `name`.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut by_distance: Vec<(usize, &str)> =
        names.take(10_000).map(|other| (distance(name, other), other)).collect();
    by_distance.sort_unstable();
    by_distance.truncate(3);
    by_distance.into_iter().map(|(_, name)| name.to_owned()).collect()
}

/// Levenshtein's distance of the first 64 characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Operators that pass a weight on, as far as patterns go.
const PASSING: [&str; 9] = [
    "Identity",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "Flatten",
    "QuantizeLinear",
    "DequantizeLinear",
];

/// Names of the initializers to be trained, if floats: those that `train` matches (all, if it is empty) and `freeze`
/// does not. The nodes of `body` count in the order of the file, with those of their subgraphs. An initializer without
/// an axis is a number that an exporter wrote so, as in `x * 0.5`: it is trained only if `train` has its own name.
pub(crate) fn trainable(
    body: &Body,
    train: &[String],
    freeze: &[String],
) -> Result<BTreeSet<String>, ImportError> {
    let mut initializers: BTreeSet<&str> =
        body.weights.iter().map(|(name, _)| name.as_str()).collect();
    let mut nodes: Vec<(&NodeProto, String)> = Vec::with_capacity(body.nodes.len());
    for node in &body.nodes {
        nodes.push((&node.proto, node.name.clone()));
        inner(&node.proto, &node.name, &mut initializers, &mut nodes);
    }
    let nodes = &nodes;
    let scalars: BTreeSet<&str> =
        body.weights.iter().filter(|(_, w)| w.is_scalar()).map(|(name, _)| name.as_str()).collect();
    // Which initializer a value is, perhaps under another shape.
    let mut source: BTreeMap<&str, &str> = initializers.iter().map(|&name| (name, name)).collect();
    for (node, _) in nodes {
        if PASSING.contains(&node.op_type.as_str())
            && let (Some(input), [output]) = (node.input.first(), &node.output[..])
            && let Some(&initializer) = source.get(input.as_str())
        {
            source.entry(output).or_insert(initializer);
        }
    }
    let select = |option: &'static str, patterns: &[String]| {
        let mut selected = BTreeSet::new();
        for pattern in patterns {
            let mut found = false;
            if !pattern.starts_with("op:") {
                for &name in initializers.iter().filter(|name| matches(pattern, name)) {
                    found = true;
                    selected.insert(name.to_owned());
                }
            }
            for (node, name) in nodes {
                let hit = match pattern.strip_prefix("op:") {
                    Some(op) => matches(op, &node.op_type),
                    None => matches(pattern, name),
                };
                if hit {
                    found = true;
                    let weights = node.input.iter().filter_map(|input| source.get(input.as_str()));
                    let weights = weights.filter(|name| !scalars.contains(*name));
                    selected.extend(weights.map(|&name| name.to_owned()));
                }
            }
            if !found {
                let names = initializers.iter().copied();
                let names = names.chain(nodes.iter().map(|(_, name)| name.as_str()));
                return Err(ImportError::NoMatch {
                    option,
                    value: pattern.clone(),
                    nearest: nearest(pattern, names),
                });
            }
        }
        Ok(selected)
    };
    let mut trained = if train.is_empty() {
        initializers.difference(&scalars).map(|&name| name.to_owned()).collect()
    } else {
        select("train", train)?
    };
    for name in select("freeze", freeze)? {
        trained.remove(&name);
    }
    Ok(trained)
}

/// A node that dequantizes an initializer: operator and operand, names of scale and zero point (of a bias, of both scales),
/// and the attributes that say how they lie. Equal ones make the same of it.
type Dequantizer<'a> = (&'a str, usize, [&'a str; 2], [i64; 3]);

/// Which weight in integers operand `at` of a node is, if it is one.
fn dequantizer(node: &NodeProto, at: usize) -> Option<Dequantizer<'_>> {
    let parameters = match (node.op_type.as_str(), at) {
        ("DequantizeLinear", 0) => [1, 2],
        ("QLinearConv" | "QLinearMatMul" | "QGemm", 3) => [4, 5],
        ("QLinearConv", 8) | ("QGemm", 6) => [1, 4],
        ("MatMulIntegerToFloat", 1) => [3, 5],
        ("DynamicQuantizeMatMul", 1) => [2, 3],
        _ => return None,
    };
    let names = parameters.map(|at| node.input.get(at).map_or("", String::as_str));
    let number = |name: &str, default: i64| {
        node.attribute.iter().find(|attribute| attribute.name == name).map_or(default, |a| a.i)
    };
    let attributes = [number("axis", 1), number("block_size", 0), number("transB", 0)];
    Some((&node.op_type, at, names, attributes))
}

/// Names of the initializers that nodes only dequantize, all in one way: what they hold is a weight in integers.
pub(crate) fn dequantized_only(body: &Body) -> BTreeSet<String> {
    let mut initializers: BTreeSet<&str> =
        body.weights.iter().map(|(name, _)| name.as_str()).collect();
    let mut nodes: Vec<(&NodeProto, String)> = Vec::new();
    for node in &body.nodes {
        nodes.push((&node.proto, node.name.clone()));
        inner(&node.proto, &node.name, &mut initializers, &mut nodes);
    }
    let mut only: BTreeMap<&str, Option<Dequantizer<'_>>> = BTreeMap::new();
    for (node, _) in &nodes {
        for (at, input) in node.input.iter().enumerate() {
            let this = dequantizer(node, at);
            let known = only.entry(input).or_insert(this);
            *known = known.filter(|known| Some(*known) == this);
        }
    }
    let outputs: BTreeSet<&str> = body.outputs.iter().map(|output| output.name.as_str()).collect();
    only.into_iter()
        .filter(|&(name, only)| {
            only.is_some() && initializers.contains(name) && !outputs.contains(name)
        })
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Adds what stands in the subgraphs of a node called `name`.
fn inner<'a>(
    node: &'a NodeProto,
    name: &str,
    initializers: &mut BTreeSet<&'a str>,
    nodes: &mut Vec<(&'a NodeProto, String)>,
) {
    for graph in node.attribute.iter().filter_map(|attribute| attribute.g.as_ref()) {
        initializers.extend(graph.initializer.iter().map(|tensor| tensor.name.as_str()));
        for (index, node) in graph.node.iter().enumerate() {
            if is_weight(node) {
                initializers.insert(&node.output[0]);
            }
            let name = format!("{name}/{}", node_name(node, index));
            inner(node, &name, initializers, nodes);
            nodes.push((node, name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_in_a_shell() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("layer?.*", "layer1.weight", true),
            ("layer?.*", "layer12.weight", false),
            ("*.bias", "a.bias.b", false),
            ("*a*b*c", "xxaxxbxxbxxc", true),
            ("conv", "conv1", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
        // Linear in the retries: no exponential blow-up.
        assert!(!matches(&"*a".repeat(30), &"a".repeat(29)));
    }

    #[test]
    fn the_nearest_names_come_first() {
        let names = ["fc1.weight", "fc2.weight", "conv.bias", "head"];
        assert_eq!(nearest("fc1.wieght", names.into_iter())[0], "fc1.weight");
    }
}
