//! One line of text to tokens.

/// A token; `Word` covers keywords, mnemonics, types and numbers alike.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token<'a> {
    /// `%name`, unescaped.
    Value(String),
    /// `@name`, unescaped.
    GraphName(String),
    /// `!name`.
    Note(&'a str),
    /// `#0123456789abcdef`.
    Digest(u64),
    /// `"text"`, unescaped.
    Text(String),
    /// A run of letters, digits and `_ . + -`.
    Word(&'a str),
    /// One of `: = , [ ] ( ) { }`.
    Sign(char),
}

/// A token and its column, counted in characters from 1.
pub(super) type Placed<'a> = (Token<'a>, usize);

/// Why a line has no tokens: column and message.
pub(super) type LexError = (usize, String);

/// The tokens of one line, without its comment.
pub(super) fn tokens(line: &str) -> Result<Vec<Placed<'_>>, LexError> {
    let mut lexer = Lexer { rest: line, column: 1 };
    let mut tokens = Vec::new();
    loop {
        lexer.take(|c| c.is_whitespace());
        let column = lexer.column;
        match lexer.rest.chars().next() {
            None | Some(';') => return Ok(tokens),
            Some(c) => tokens.push((lexer.token(c)?, column)),
        }
    }
}

struct Lexer<'a> {
    rest: &'a str,
    column: usize,
}

impl<'a> Lexer<'a> {
    fn take(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !accept(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        self.column += taken.chars().count();
        taken
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        self.column += 1;
        Some(c)
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, LexError> {
        Err((self.column, message.into()))
    }

    fn token(&mut self, first: char) -> Result<Token<'a>, LexError> {
        let word = |c: char| c.is_ascii_alphanumeric() || "_.+-".contains(c);
        match first {
            '%' => {
                self.next();
                Ok(Token::Value(self.name()?))
            }
            '@' => {
                self.next();
                Ok(Token::GraphName(self.name()?))
            }
            '!' => {
                self.next();
                Ok(Token::Note(self.take(word)))
            }
            '#' => {
                self.next();
                let digits = self.take(word);
                let digest = u64::from_str_radix(digits, 16).ok();
                match digest.filter(|_| digits.len() == 16) {
                    Some(digest) => Ok(Token::Digest(digest)),
                    None => self.error("a digest is # and 16 hexadecimal digits"),
                }
            }
            '"' => Ok(Token::Text(self.quoted()?)),
            ':' | '=' | ',' | '[' | ']' | '(' | ')' | '{' | '}' => {
                self.next();
                Ok(Token::Sign(first))
            }
            c if word(c) => Ok(Token::Word(self.take(word))),
            c => self.error(format!("unexpected character {c:?}")),
        }
    }

    fn name(&mut self) -> Result<String, LexError> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        let name = self.take(|c| c.is_ascii_alphanumeric() || "_./:-".contains(c));
        if name.is_empty() { self.error("expected a name") } else { Ok(name.to_owned()) }
    }

    fn quoted(&mut self) -> Result<String, LexError> {
        self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                None => return self.error("the quoted text has no end"),
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                Some(c) => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Result<char, LexError> {
        match self.next() {
            Some(c @ ('"' | '\\')) => Ok(c),
            Some('u') => {
                let open = self.next() == Some('{');
                let digits = self.take(|c| c.is_ascii_hexdigit());
                let close = self.next() == Some('}');
                let code = u32::from_str_radix(digits, 16).ok().and_then(char::from_u32);
                match code.filter(|_| open && close) {
                    Some(c) => Ok(c),
                    None => self.error("expected a character code as in \\u{a}"),
                }
            }
            _ => self.error("the escapes are \\\", \\\\ and \\u{..}"),
        }
    }
}
