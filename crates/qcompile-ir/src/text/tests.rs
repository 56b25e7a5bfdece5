use super::*;
use crate::text::parse::parse_bounded;

/// Every op, attribute, note and kind of literal once.
const SAMPLE: &str = include_str!("sample.qir");

fn none(_: u64) -> Option<Arc<Tensor>> {
    None
}

fn messages(source: &str) -> String {
    parse(source, &none).expect_err("wrong").to_string()
}

#[test]
fn canonical_text_prints_as_it_was() {
    let graph = parse(SAMPLE, &none).expect("parses");
    assert_eq!(graph.to_string(), SAMPLE);
}

#[test]
fn large_tensors_go_by_digest() {
    let source = "graph @g {\n  param %w : f32[3, 9] = uniform seed=7\n  const %n : f32[] = #7fc000007fc00000\n}\n";
    assert!(messages(source).contains("3:22: no tensor #7fc000007fc00000"), "{}", messages(source));
    let graph = parse(&source.replace("#7fc000007fc00000", "nan"), &none).expect("parses");
    let text = graph.to_string();
    assert!(text.contains(" = #") && text.contains(" = nan"), "{text}");
    let store = tensors(&graph);
    assert_eq!(store.len(), 1);
    let again = parse(&text, &|digest| store.get(&digest).cloned()).expect("parses");
    assert_eq!(again.to_string(), text);
    assert!(parse(&text.replace("3, 9", "9, 3"), &|d| store.get(&d).cloned()).is_err());
}

#[test]
fn numbers_that_text_cannot_say_go_by_digest() {
    let odd = f32::from_bits(0x7fc0_0001);
    let tensor = Tensor::from_f32(&[2], &[odd, -0.0]).expect("two");
    assert_eq!(literal::inline(&tensor), None);
    let tensor = Tensor::from_f32(&[3], &[1e-30, -0.0, f32::NEG_INFINITY]).expect("three");
    assert_eq!(literal::inline(&tensor).as_deref(), Some("[1e-30, -0, -inf]"));
    let tensor = Tensor::from_i64(&[1, 1], &[i64::MAX]).expect("one");
    assert_eq!(literal::inline(&tensor).as_deref(), Some("[[9223372036854775807]]"));
}

#[test]
fn all_errors_are_reported_with_their_places() {
    let source = "graph @g {
  input %x : f32[N, 4]
  const %c : i8[2] = [1, 300]
forward:
  %y : f32[N, 4] = rely %x
  %z : f32[N, 4] = relu %y
  %x : f32[N, 4] = relu %x
  %w : f32[4] = relu %x
  %v : f32[N, 4] = relu %later
  %later : f32[N, 4] = relu %x axis=3
  next %x = %x
}";
    let errors = parse(source, &none).expect_err("wrong").0;
    let lines: Vec<usize> = errors.iter().map(|error| error.line).collect();
    assert_eq!(lines, [3, 5, 7, 8, 9, 10, 11], "{errors:?}");
    assert_eq!(errors[0].column, 26);
    assert!(errors[3].message.contains("declared f32[4], but relu gives f32[N, 4]"));
}

#[test]
fn odd_names_and_comments_are_read() {
    let source = "; a comment\ngraph @\"a b\" { ; here\n  input %\"x;\\u{a}\" : f32[]\n\n  return %\"x;\\u{a}\" as \"\\\"y\\\"\"\n}\n";
    let graph = parse(source, &none).expect("parses");
    assert_eq!(graph.outputs()[0].0, "\"y\"");
    let text = graph.to_string();
    assert_eq!(parse(&text, &none).expect("parses").to_string(), text);
}

#[test]
fn made_tensors_are_bounded_and_repeatable() {
    let source =
        |size: &str| format!("graph @g {{\n  param %w : f32[{size}] = normal seed=1 scale=0.5\n}}");
    assert!(messages(&source("999999999999")).contains("too large"));
    assert!(messages(&source("99999999999999999999999")).contains("expected a dimension"));
    let first = parse(&source("20"), &none).expect("parses").to_string();
    assert_eq!(first, "graph @g {\n  param %w : f32[20] = #99921ef7f5febe6e\n}\n");
}

#[test]
fn no_mutation_of_valid_text_panics() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).expect("small")
    };
    let interesting = b"%@!#\"\\;:=,[](){}N-9.\n x0\xff";
    for _ in 0..2000 {
        let mut bytes = SAMPLE.as_bytes().to_vec();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = interesting[random(interesting.len())],
                1 => bytes.insert(at, interesting[random(interesting.len())]),
                2 => {
                    bytes.remove(at);
                }
                _ => {
                    let end = (at + random(40)).min(bytes.len());
                    let part = bytes[at..end].to_vec();
                    let to = random(bytes.len());
                    bytes.splice(to..to, part);
                }
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(graph) = parse_bounded(&text, &none, 10_000) {
            let printed = graph.to_string();
            let store = tensors(&graph);
            let again = parse(&printed, &|digest| store.get(&digest).cloned()).expect("canonical");
            assert_eq!(again.to_string(), printed);
        }
    }
}
