//! Parses what stands behind `!`.

use super::{Line, LineError};
use crate::text::attribute::natural;
use crate::text::lex::Token;
use crate::text::literal;
use crate::{GradientRounding, Granularity, Note, Precision, Quantizer, Scaling};

impl Line<'_, '_> {
    pub(super) fn notes(&mut self) -> Result<Note, LineError> {
        let mut note = Note::default();
        while let Some(Token::Note(key)) = self.peek() {
            self.at += 1;
            self.sign('(')?;
            match *key {
                "origin" => note.origin = Some(self.text()?),
                "sensitivity" => note.sensitivity = Some(self.read("a number", literal::number)?),
                "outliers" => note.channels.outliers = self.channels()?,
                "input_outliers" => note.channels.input_outliers = self.channels()?,
                "points" => loop {
                    let channel = self.read("a channel", natural)?;
                    self.sign('=')?;
                    let count = self.read("a number of points", natural)?;
                    note.channels.points.push((channel, count));
                    if !self.is_sign(',') {
                        break;
                    }
                },
                "precision" => note.precision = Some(self.precision()?),
                "stored" => note.stored = Some(self.dtype()?),
                "quantizer" => note.quantizer = Some(self.quantizer()?),
                _ => return self.error(format!("there is no note {key:?}")),
            }
            self.sign(')')?;
        }
        if let Some(defect) = note.channels.defect() {
            return self.error(defect);
        }
        Ok(note)
    }

    fn channels(&mut self) -> Result<Vec<u32>, LineError> {
        let mut channels = Vec::new();
        loop {
            channels.push(self.read("a channel", natural)?);
            if !self.is_sign(',') {
                return Ok(channels);
            }
        }
    }

    fn quantizer(&mut self) -> Result<Quantizer, LineError> {
        self.key("weight")?;
        let weight = self.dtype()?;
        self.sign(',')?;
        let granularity = self.one_of("granularity", &Granularity::ALL, Granularity::name)?;
        self.sign(',')?;
        let rounding = self.one_of("rounding", &GradientRounding::ALL, GradientRounding::name)?;
        self.sign(',')?;
        let scaling = self.one_of("scaling", &Scaling::ALL, Scaling::name)?;
        Ok(Quantizer { weight, granularity, rounding, scaling })
    }

    /// `key=` and a word that names one of these.
    fn one_of<T: Copy>(
        &mut self,
        key: &str,
        all: &[T],
        name: fn(T) -> &'static str,
    ) -> Result<T, LineError> {
        self.key(key)?;
        let word = self.any_word(key)?;
        match all.iter().find(|one| name(**one) == word) {
            Some(one) => Ok(*one),
            None => self.error(format!("there is no {key} {word:?}")),
        }
    }

    fn key(&mut self, key: &str) -> Result<(), LineError> {
        if !self.word(key) {
            return self.error(format!("expected {key}="));
        }
        self.sign('=')
    }

    fn precision(&mut self) -> Result<Precision, LineError> {
        const KEYS: [&str; 5] = ["forward", "grad_input", "grad_weight", "mean", "update"];
        if !self.word(KEYS[0]) {
            return Ok(Precision::uniform(self.dtype()?));
        }
        self.sign('=')?;
        let mut precision = Precision::uniform(self.dtype()?);
        let Precision { forward: _, grad_input, grad_weight, mean, update } = &mut precision;
        for (key, dtype) in KEYS[1..].iter().zip([grad_input, grad_weight, mean, update]) {
            self.sign(',')?;
            self.key(key)?;
            *dtype = self.dtype()?;
        }
        Ok(precision)
    }
}
