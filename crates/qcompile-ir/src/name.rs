//! Names of values.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// The name of a value: unique in its graph, derived from the ONNX name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// The name as text, without sigil or quotes.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: AsRef<str> + ?Sized> From<&T> for Name {
    fn from(text: &T) -> Name {
        Name(text.as_ref().into())
    }
}

impl From<String> for Name {
    fn from(text: String) -> Name {
        Name(text.into())
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Prints with its sigil, quoted if it is not plain: `%conv1.weight`, `%"a b"`.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_./:-".contains(&byte);
        if !self.0.is_empty() && self.0.bytes().all(plain) {
            write!(f, "%{}", self.0)
        } else {
            write!(f, "%\"")?;
            for c in self.0.chars() {
                match c {
                    '"' => f.write_str("\\\"")?,
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_control() => write!(f, "\\u{{{:x}}}", u32::from(c))?,
                    c => write!(f, "{c}")?,
                }
            }
            f.write_str("\"")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_print_quoted() {
        assert_eq!(Name::from("a b\"\n").to_string(), "%\"a b\\\"\\u{a}\"");
    }
}
