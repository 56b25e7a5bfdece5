//! Text to a graph, line by line: an error ends its line, not the parse.

mod notes;

use super::attribute::{self, Attribute, natural};
use super::lex::{Placed, Token, tokens};
use super::literal::{self, Distribution, MAX_NESTING};
use crate::{DType, Graph, NodeId, Op, Region, Shape, Tensor, TensorType};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use thiserror::Error;

/// Elements that the `splat` and drawn literals of one text may make.
pub(super) const MAX_MADE_ELEMENTS: usize = 1 << 28;
const MAX_LINES: usize = 1 << 22;
const MAX_ERRORS: usize = 1000;

/// One thing that is wrong in a text.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{line}:{column}: {message}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

/// Everything that is wrong in a text (up to a thousand errors), in order of lines.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct ParseErrors(pub Vec<ParseError>);

impl fmt::Display for ParseErrors {
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

/// The graph of a text; `tensors` gives those that the text names by digest.
///
/// # Errors
/// Everything that does not fit the grammar (see [`crate::text`]) or that [`Graph::add`] refuses.
pub fn parse(
    source: &str,
    tensors: &dyn Fn(u64) -> Option<Arc<Tensor>>,
) -> Result<Graph, ParseErrors> {
    parse_bounded(source, tensors, MAX_MADE_ELEMENTS)
}

/// [`parse`] with a bound on the elements of made tensors.
pub(super) fn parse_bounded(
    source: &str,
    tensors: &dyn Fn(u64) -> Option<Arc<Tensor>>,
    elements: usize,
) -> Result<Graph, ParseErrors> {
    let mut parser = Parser {
        graph: None,
        closed: false,
        region: None,
        failed: BTreeSet::new(),
        tensors,
        elements,
    };
    let mut errors = Vec::new();
    let mut last = 1;
    for (line, text) in (1..).zip(source.lines()) {
        last = line;
        if line > MAX_LINES || errors.len() >= MAX_ERRORS {
            let message = "too many lines or errors: the rest was not read".to_owned();
            errors.push(ParseError { line, column: 1, message });
            break;
        }
        let read = tokens(text).and_then(|tokens| {
            let mut line = Line { tokens: &tokens, at: 0, end: text.chars().count() + 1 };
            let read = parser.line(&mut line);
            // A value whose definition failed is not reported again where it is used.
            if read.is_err()
                && let Some(Token::Value(name)) =
                    tokens.iter().map(|(token, _)| token).find(|t| matches!(t, Token::Value(_)))
            {
                parser.failed.insert(name.clone());
            }
            read
        });
        if let Err((column, message)) = read
            && !message.is_empty()
        {
            errors.push(ParseError { line, column, message });
        }
    }
    let unclosed = match &parser.graph {
        None => "expected graph @name {",
        Some(_) if !parser.closed => "expected } at the end",
        Some(_) => "",
    };
    if !unclosed.is_empty() && errors.is_empty() {
        errors.push(ParseError { line: last, column: 1, message: unclosed.to_owned() });
    }
    match parser.graph {
        Some(graph) if errors.is_empty() => Ok(graph),
        _ => Err(ParseErrors(errors)),
    }
}

/// Column and message. An empty message stands for the consequence of an error already reported.
type LineError = (usize, String);

struct Parser<'t> {
    graph: Option<Graph>,
    closed: bool,
    region: Option<Region>,
    failed: BTreeSet<String>,
    tensors: &'t dyn Fn(u64) -> Option<Arc<Tensor>>,
    elements: usize,
}

impl Parser<'_> {
    fn line<'a>(&mut self, line: &mut Line<'_, 'a>) -> Result<(), LineError> {
        let Some(first) = line.peek() else {
            return Ok(());
        };
        if self.closed {
            return line.error("nothing follows the closing }");
        }
        if self.graph.is_none() {
            return self.header(line);
        }
        match first {
            Token::Sign('}') => {
                line.at += 1;
                self.closed = true;
            }
            Token::Value(_) => self.statement(line)?,
            Token::Word("return") => self.outputs(line)?,
            Token::Word("next") => self.next(line)?,
            Token::Word(word @ ("input" | "param" | "state" | "const")) => {
                line.at += 1;
                self.leaf(word, line)?;
            }
            Token::Word(word) => {
                let Some(region) = Region::ALL.into_iter().find(|region| region.name() == *word)
                else {
                    return line.error(format!("a line does not start with {word:?}"));
                };
                line.at += 1;
                line.sign(':')?;
                self.region = Some(region);
            }
            _ => return line.error("expected a declaration, a statement or }"),
        }
        line.finish()
    }

    fn header(&mut self, line: &mut Line<'_, '_>) -> Result<(), LineError> {
        if !line.word("graph") {
            return line.error("expected graph @name {");
        }
        let Some(Token::GraphName(name)) = line.peek() else {
            return line.error("expected @name");
        };
        self.graph = Some(Graph::new(name));
        line.at += 1;
        line.sign('{')?;
        line.finish()
    }

    fn graph(&mut self) -> &mut Graph {
        self.graph.get_or_insert_with(|| Graph::new(""))
    }

    /// Reads a value that is defined already.
    fn used(&mut self, line: &mut Line<'_, '_>) -> Result<NodeId, LineError> {
        let (name, column) = line.value()?;
        match self.graph().find(&name) {
            Some(id) => Ok(id),
            None if self.failed.contains(&name) => Err((column, String::new())),
            None => Err((column, format!("{} is not defined above", crate::Name::from(&name)))),
        }
    }

    /// Reads a value that is not defined yet, and its type.
    fn defined(&mut self, line: &mut Line<'_, '_>) -> Result<(String, TensorType), LineError> {
        let (name, column) = line.value()?;
        if self.graph().find(&name).is_some() {
            return Err((column, format!("{} is defined already", crate::Name::from(&name))));
        }
        line.sign(':')?;
        Ok((name, line.ty()?))
    }

    fn leaf(&mut self, kind: &str, line: &mut Line<'_, '_>) -> Result<(), LineError> {
        let (name, ty) = self.defined(line)?;
        let column = line.column();
        let op = if kind == "input" {
            Op::Input(ty)
        } else {
            line.sign('=')?;
            let tensor = self.tensor(&ty, line)?;
            match kind {
                "param" => Op::Param(tensor),
                "state" => Op::State(tensor),
                _ => Op::Const(tensor),
            }
        };
        let note = line.notes()?;
        let added = self.graph().add(op, &[], name, Region::Forward);
        let id = added.map_err(|error| (column, error.to_string()))?;
        *self.graph().note_mut(id) = note;
        Ok(())
    }

    fn statement(&mut self, line: &mut Line<'_, '_>) -> Result<(), LineError> {
        let Some(region) = self.region else {
            return line.error("expected forward: (or another region) before the first statement");
        };
        let (name, ty) = self.defined(line)?;
        line.sign('=')?;
        let column = line.column();
        let mnemonic = line.any_word("an op")?;
        let mut operands = Vec::new();
        if matches!(line.peek(), Some(Token::Value(_))) {
            operands.push(self.used(line)?);
            while line.is_sign(',') {
                operands.push(self.used(line)?);
            }
        }
        let attributes = line.attributes()?;
        let note = line.notes()?;
        let op = attribute::op(mnemonic, attributes, &ty).map_err(|message| (column, message))?;
        let added = self.graph().add(op, &operands, name, region);
        let id = added.map_err(|error| (column, error.to_string()))?;
        let inferred = self.graph().ty(id).clone();
        if inferred != ty {
            return Err((column, format!("declared {ty}, but {mnemonic} gives {inferred}")));
        }
        *self.graph().note_mut(id) = note;
        Ok(())
    }

    fn outputs(&mut self, line: &mut Line<'_, '_>) -> Result<(), LineError> {
        line.at += 1;
        loop {
            let id = self.used(line)?;
            let name = if line.word("as") {
                line.text()?
            } else {
                self.graph().node(id).name.as_str().to_owned()
            };
            self.graph().add_output(&name, id);
            if !line.is_sign(',') {
                return Ok(());
            }
        }
    }

    fn next(&mut self, line: &mut Line<'_, '_>) -> Result<(), LineError> {
        line.at += 1;
        let column = line.column();
        let leaf = self.used(line)?;
        line.sign('=')?;
        let value = self.used(line)?;
        if self.graph().next().contains_key(&leaf) {
            return Err((
                column,
                format!("{} has a next value already", self.graph().node(leaf).name),
            ));
        }
        if !matches!(self.graph().op(leaf), Op::Param(_) | Op::State(_) | Op::Cast(_)) {
            return Err((
                column,
                format!("{} is neither param nor state", self.graph().node(leaf).name),
            ));
        }
        self.graph().set_next(leaf, value).map_err(|error| (column, error.to_string()))
    }

    fn tensor(
        &mut self,
        ty: &TensorType,
        line: &mut Line<'_, '_>,
    ) -> Result<Arc<Tensor>, LineError> {
        let column = line.column();
        let fail = |message: String| Err((column, message));
        let elements = ty.shape.elements().and_then(|dim| dim.as_fixed());
        let (Some(shape), Some(elements)) = (ty.shape.as_fixed(), elements) else {
            return fail(format!("{ty} has no constant size"));
        };
        if let Some(Token::Digest(digest)) = line.peek() {
            line.at += 1;
            return match (self.tensors)(*digest) {
                None => fail(format!("no tensor #{digest:016x} was given with this text")),
                Some(tensor) if tensor.ty() == *ty => Ok(tensor),
                Some(tensor) => fail(format!("#{digest:016x} is {}, not {ty}", tensor.ty())),
            };
        }
        let word = match line.peek() {
            Some(Token::Word(word @ ("splat" | "uniform" | "normal"))) => Some(*word),
            _ => None,
        };
        let made = match word {
            None => {
                let mut bytes = Vec::new();
                line.nested(ty.dtype, &shape, &mut bytes)?;
                Tensor::from_bytes(ty.dtype, shape, bytes)
            }
            Some(word) => {
                line.at += 1;
                self.elements = match self.elements.checked_sub(elements) {
                    Some(left) => left,
                    None => return fail(format!("{ty} is too large to be made from text")),
                };
                if word == "splat" {
                    let element = line.element(ty.dtype)?;
                    literal::splat(ty.dtype, &shape, elements, &element)
                } else {
                    let distribution =
                        if word == "normal" { Distribution::Normal } else { Distribution::Uniform };
                    let (seed, scale) = line.seed_and_scale()?;
                    literal::draw(ty.dtype, &shape, elements, distribution, seed, scale)
                }
            }
        };
        match made {
            Some(tensor) => Ok(Arc::new(tensor)),
            None => fail(format!("the value does not have the elements of {ty}")),
        }
    }
}

/// A cursor over the tokens of one line.
struct Line<'l, 'a> {
    tokens: &'l [Placed<'a>],
    at: usize,
    end: usize,
}

impl<'l, 'a> Line<'l, 'a> {
    fn peek(&self) -> Option<&'l Token<'a>> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn column(&self) -> usize {
        self.tokens.get(self.at).map_or(self.end, |(_, column)| *column)
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, LineError> {
        Err((self.column(), message.into()))
    }

    fn finish(&self) -> Result<(), LineError> {
        if self.at < self.tokens.len() {
            self.error("expected the end of the line")
        } else {
            Ok(())
        }
    }

    fn is_sign(&mut self, sign: char) -> bool {
        let found = self.peek() == Some(&Token::Sign(sign));
        self.at += usize::from(found);
        found
    }

    fn sign(&mut self, sign: char) -> Result<(), LineError> {
        if self.is_sign(sign) { Ok(()) } else { self.error(format!("expected {sign}")) }
    }

    fn word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Word(found)) if *found == word);
        self.at += usize::from(found);
        found
    }

    fn any_word(&mut self, what: &str) -> Result<&'a str, LineError> {
        match self.peek() {
            Some(Token::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => self.error(format!("expected {what}")),
        }
    }

    /// The next word, read by `read`.
    fn read<T>(&mut self, what: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, LineError> {
        let column = self.column();
        read(self.any_word(what)?).ok_or_else(|| (column, format!("expected {what}")))
    }

    fn value(&mut self) -> Result<(String, usize), LineError> {
        match self.peek() {
            Some(Token::Value(name)) => {
                let column = self.column();
                self.at += 1;
                Ok((name.clone(), column))
            }
            _ => self.error("expected a %value"),
        }
    }

    fn text(&mut self) -> Result<String, LineError> {
        match self.peek() {
            Some(Token::Text(text)) => {
                self.at += 1;
                Ok(text.clone())
            }
            _ => self.error("expected quoted text"),
        }
    }

    fn ty(&mut self) -> Result<TensorType, LineError> {
        let dtype = self.dtype()?;
        let mut dims = Vec::new();
        self.sign('[')?;
        if !self.is_sign(']') {
            loop {
                dims.push(self.read("a dimension", attribute::dim)?);
                if !self.is_sign(',') {
                    break;
                }
            }
            self.sign(']')?;
        }
        Ok(TensorType::new(dtype, Shape(dims)))
    }

    fn dtype(&mut self) -> Result<DType, LineError> {
        self.read("an element type", |word| word.parse().ok())
    }

    fn element(&mut self, dtype: DType) -> Result<Vec<u8>, LineError> {
        self.read(&format!("a number of type {dtype}"), |word| literal::element_bytes(dtype, word))
    }

    /// A list nested as `shape` says, appended to `bytes`.
    fn nested(
        &mut self,
        dtype: DType,
        shape: &[usize],
        bytes: &mut Vec<u8>,
    ) -> Result<(), LineError> {
        if shape.len() > MAX_NESTING {
            return self.error(format!("a list nests at most {MAX_NESTING} deep"));
        }
        let [size, inner @ ..] = shape else {
            bytes.extend(self.element(dtype)?);
            return Ok(());
        };
        self.sign('[')?;
        // Each element consumes a token, so a huge size ends at the end of the line.
        for position in 0..*size {
            if position > 0 {
                self.sign(',')?;
            }
            self.nested(dtype, inner, bytes)?;
        }
        self.sign(']')
    }

    fn seed_and_scale(&mut self) -> Result<(u64, f64), LineError> {
        if !self.word("seed") {
            return self.error("expected seed=");
        }
        self.sign('=')?;
        let seed = self.read("a whole number", natural)?;
        if !self.word("scale") {
            return Ok((seed, 1.0));
        }
        self.sign('=')?;
        Ok((seed, self.read("a number", literal::number)?))
    }

    fn attributes(&mut self) -> Result<Vec<Attribute<'a>>, LineError> {
        let mut attributes = Vec::new();
        while let Some(Token::Word(key)) = self.peek() {
            self.at += 1;
            let mut value = None;
            if self.is_sign('=') {
                value = Some(self.attribute_value()?);
            }
            attributes.push(Attribute { key, value });
        }
        Ok(attributes)
    }

    fn attribute_value(&mut self) -> Result<Vec<&'a str>, LineError> {
        if !self.is_sign('[') {
            return Ok(vec![self.any_word("a number")?]);
        }
        let mut words = Vec::new();
        if self.is_sign(']') {
            return Ok(words);
        }
        loop {
            words.push(self.any_word("a number")?);
            if !self.is_sign(',') {
                self.sign(']')?;
                return Ok(words);
            }
        }
    }
}
