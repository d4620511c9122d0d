//! SentencePiece models of the BPE kind (`tokenizer.model` of Llama, Mistral and Baichuan).
//!
//! Input: the model's protobuf; texts. Output: the ids that the sentencepiece library gives, without BOS and EOS. A text
//! becomes `▁` for each space (and one before it, if the model wants that); user-defined symbols stand whole, everything
//! else starts as single characters; the neighbours whose concatenation is the piece of the highest score are joined,
//! the leftmost first, until there are none; what is no piece becomes its bytes. Other kinds (unigram, no byte fallback,
//! a normalisation, trimmed spaces) are refused by name.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap, HashSet};

use prost::Message;

const SPACE: char = '▁';

/// `sentencepiece.ModelProto`, the parts that decide ids.
#[derive(Clone, PartialEq, Message)]
struct ModelFile {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceFile>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<TrainerFile>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<NormalizerFile>,
}

#[derive(Clone, PartialEq, Message)]
struct PieceFile {
    #[prost(string, tag = "1")]
    piece: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(enumeration = "Kind", optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerFile {
    /// 1 unigram (also if absent), 2 BPE, 3 word, 4 char.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, tag = "24")]
    treat_whitespace_as_suffix: bool,
    #[prost(bool, tag = "35")]
    byte_fallback: bool,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerFile {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", tag = "2")]
    precompiled_charsmap: Vec<u8>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// A BPE model with byte fallback.
#[derive(Debug)]
pub(super) struct SentencePiece {
    /// Pieces that joining may make, and user-defined symbols.
    pieces: HashMap<String, Piece>,
    /// Pieces that no joining makes: BOS, EOS, unknown.
    reserved: HashMap<String, u32>,
    symbols: Symbols,
    /// The piece of each byte, 256 of them.
    bytes: Vec<u32>,
    count: usize,
    dummy_prefix: bool,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    id: u32,
    score: f32,
    /// Taken apart again at the end.
    unused: bool,
}

/// User-defined symbols, found at the start of a text.
#[derive(Debug, Default)]
struct Symbols {
    all: HashSet<String>,
    /// Bytes of the longest.
    longest: usize,
}

/// A part of a text while it is joined with its neighbours: a linked list in a vector.
struct Part {
    /// Bytes of the text; empty once it belongs to its left neighbour.
    range: std::ops::Range<usize>,
    previous: Option<usize>,
    next: Option<usize>,
    /// A user-defined symbol, never joined.
    whole: bool,
}

/// Two neighbours that are a piece together.
struct Join {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both; another number means that one of them has changed since.
    size: usize,
}

impl Ord for Join {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Join {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Join {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Join {}

impl SentencePiece {
    /// Reads a model.
    ///
    /// # Errors
    /// It is damaged or of a kind that is not implemented; says which.
    pub(super) fn parse(file: &[u8]) -> Result<Self, String> {
        let file = ModelFile::decode(file).map_err(|error| format!("is not a SentencePiece model: {error}"))?;
        let dummy_prefix = file.check()?;
        let count = file.pieces.len();
        let (mut pieces, mut reserved, mut symbols) = (HashMap::new(), HashMap::new(), Symbols::default());
        let mut bytes = [None; 256];
        for (id, PieceFile { piece, score, kind }) in (0..).zip(file.pieces) {
            if piece.is_empty() {
                return Err(format!("piece {id} is empty"));
            }
            let kind = match kind {
                None => Kind::Normal,
                Some(kind) => Kind::try_from(kind).map_err(|_| format!("piece {id} is of the unknown kind {kind}"))?,
            };
            let twice = match kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => {
                    if kind == Kind::UserDefined {
                        symbols.add(&piece);
                    }
                    pieces.insert(piece, Piece { id, score, unused: kind == Kind::Unused }).is_some()
                }
                Kind::Unknown | Kind::Control => reserved.insert(piece, id).is_some(),
                Kind::Byte => {
                    let hex = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                    let value = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
                    let value = value.ok_or_else(|| format!("piece {id}, {piece:?}, is no byte"))?;
                    bytes[usize::from(value)].replace(id).is_some()
                }
            };
            if twice {
                return Err(format!("piece {id} is there twice"));
            }
        }
        let bytes = bytes.into_iter().collect::<Option<Vec<u32>>>().ok_or("has not all 256 byte pieces")?;
        Ok(Self { pieces, reserved, symbols, bytes, count, dummy_prefix })
    }

    /// How many ids there are.
    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// The id of a piece by its name.
    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        self.reserved.get(piece).copied().or_else(|| self.pieces.get(piece).map(|piece| piece.id))
    }

    /// The ids of a text.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut spaced = String::with_capacity(text.len() + 8);
        spaced.extend(self.dummy_prefix.then_some(SPACE));
        spaced.extend(text.chars().map(|character| if character == ' ' { SPACE } else { character }));
        let mut halves = HashMap::new();
        let parts = self.join(&spaced, &mut halves);
        let mut ids = Vec::new();
        for part in parts.iter().filter(|part| !part.range.is_empty()) {
            self.push(&spaced[part.range.clone()], &halves, &mut ids);
        }
        ids
    }

    /// Joins until nothing can be joined. `halves` says of what each unused piece was made.
    fn join<'a>(&self, text: &'a str, halves: &mut HashMap<&'a str, usize>) -> Vec<Part> {
        let mut parts = self.split(text);
        let mut joins = BinaryHeap::new();
        let mut consider = |parts: &[Part], left: Option<usize>, right: Option<usize>, joins: &mut BinaryHeap<Join>| {
            let (Some(left), Some(right)) = (left, right) else { return };
            if parts[left].whole || parts[right].whole {
                return;
            }
            let both = &text[parts[left].range.start..parts[right].range.end];
            if let Some(piece) = self.pieces.get(both) {
                joins.push(Join { score: piece.score, left, right, size: both.len() });
                if piece.unused {
                    halves.insert(both, parts[left].range.len());
                }
            }
        };
        for right in 1..parts.len() {
            consider(&parts, Some(right - 1), Some(right), &mut joins);
        }
        while let Some(Join { left, right, size, .. }) = joins.pop() {
            let (first, second) = (parts[left].range.clone(), parts[right].range.clone());
            if first.is_empty() || second.is_empty() || first.len() + second.len() != size {
                continue;
            }
            parts[left].range = first.start..second.end;
            parts[right].range = second.end..second.end;
            let next = parts[right].next;
            parts[left].next = next;
            if let Some(next) = next {
                parts[next].previous = Some(left);
            }
            consider(&parts, parts[left].previous, Some(left), &mut joins);
            consider(&parts, Some(left), next, &mut joins);
        }
        parts
    }

    /// User-defined symbols, else single characters.
    fn split(&self, text: &str) -> Vec<Part> {
        let mut parts = Vec::with_capacity(text.len());
        let mut start = 0;
        while let Some(character) = text[start..].chars().next() {
            let symbol = self.symbols.at_the_start_of(&text[start..]);
            let end = start + symbol.unwrap_or(character.len_utf8());
            let number = parts.len();
            parts.push(Part {
                range: start..end,
                previous: number.checked_sub(1),
                next: (end < text.len()).then_some(number + 1),
                whole: symbol.is_some(),
            });
            start = end;
        }
        parts
    }

    /// Adds the ids of a part: its own, those of its halves if it is unused, or those of its bytes.
    fn push(&self, part: &str, halves: &HashMap<&str, usize>, ids: &mut Vec<u32>) {
        match self.pieces.get(part) {
            Some(piece) if piece.unused => match halves.get(part) {
                Some(&middle) => {
                    self.push(&part[..middle], halves, ids);
                    self.push(&part[middle..], halves, ids);
                }
                None => ids.push(piece.id),
            },
            Some(piece) => ids.push(piece.id),
            None => ids.extend(part.bytes().map(|byte| self.bytes[usize::from(byte)])),
        }
    }
}

impl Symbols {
    fn add(&mut self, symbol: &str) {
        self.longest = self.longest.max(symbol.len());
        self.all.insert(symbol.to_owned());
    }

    /// Bytes of the longest symbol that a text starts with.
    fn at_the_start_of(&self, text: &str) -> Option<usize> {
        let lengths = (1..=self.longest.min(text.len())).rev();
        lengths.into_iter().find(|&length| text.get(..length).is_some_and(|start| self.all.contains(start)))
    }
}

impl ModelFile {
    /// Refuses what is not implemented; whether texts get a space before them.
    fn check(&self) -> Result<bool, String> {
        let refuse = |what: &str| {
            Err(format!("{what}, which is not implemented; take a tokenizer.json (AutoTokenizer...save_pretrained)"))
        };
        let trainer = self.trainer.clone().unwrap_or_default();
        let normalizer = self.normalizer.clone().unwrap_or_default();
        match trainer.model_type.unwrap_or(1) {
            2 => {}
            1 => return refuse("is a unigram model"),
            other => return refuse(&format!("is a model of type {other}")),
        }
        if !trainer.byte_fallback {
            return refuse("has no byte fallback");
        }
        if trainer.treat_whitespace_as_suffix {
            return refuse("keeps spaces at the end of words");
        }
        if !normalizer.precompiled_charsmap.is_empty() || !matches!(normalizer.name.as_str(), "" | "identity") {
            return refuse(&format!("normalises texts ({:?})", normalizer.name));
        }
        if normalizer.remove_extra_whitespaces.unwrap_or(true) {
            return refuse("removes extra spaces");
        }
        if !normalizer.escape_whitespaces.unwrap_or(true) {
            return refuse("does not escape spaces");
        }
        Ok(normalizer.add_dummy_prefix.unwrap_or(true))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn golden(model: &str, file: &str) -> Vec<u8> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model);
        std::fs::read(folder.join(file)).unwrap()
    }

    #[test]
    fn ids_are_those_of_the_sentencepiece_library() {
        for model in ["tiny-mistral", "tiny-baichuan"] {
            let pieces = SentencePiece::parse(&golden(model, "tokenizer.model")).unwrap();
            let cases: Vec<(String, Vec<u32>)> = serde_json::from_slice(&golden(model, "sentencepiece.json")).unwrap();
            assert!(cases.len() > 100 && pieces.count() == 380);
            for (text, ids) in cases {
                assert_eq!(pieces.encode(&text), ids, "{model}: {text:?}");
            }
        }
    }

    #[test]
    fn every_golden_model_has_an_unused_piece_that_texts_would_make() {
        for model in ["tiny-mistral", "tiny-baichuan"] {
            let pieces = SentencePiece::parse(&golden(model, "tokenizer.model")).unwrap();
            let (unused, piece) = pieces.pieces.iter().find(|(_, piece)| piece.unused).unwrap();
            let ids = pieces.encode(&unused.replace(SPACE, " "));
            assert!(!ids.contains(&piece.id) && ids.len() > 1, "{unused}: {ids:?}");
        }
    }

    fn changed(change: impl Fn(&mut ModelFile)) -> Result<SentencePiece, String> {
        let mut file = ModelFile::decode(golden("tiny-mistral", "tokenizer.model").as_slice()).unwrap();
        change(&mut file);
        SentencePiece::parse(&file.encode_to_vec())
    }

    fn normalizer(file: &mut ModelFile) -> &mut NormalizerFile {
        file.normalizer.as_mut().unwrap()
    }

    fn trainer(file: &mut ModelFile) -> &mut TrainerFile {
        file.trainer.as_mut().unwrap()
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        changed(|_| ()).unwrap();
        let refused = |change: fn(&mut ModelFile)| changed(change).unwrap_err();
        assert!(refused(|file| trainer(file).model_type = None).contains("unigram"));
        assert!(refused(|file| trainer(file).model_type = Some(4)).contains("type 4"));
        assert!(refused(|file| trainer(file).byte_fallback = false).contains("byte fallback"));
        assert!(refused(|file| trainer(file).treat_whitespace_as_suffix = true).contains("end of words"));
        assert!(refused(|file| normalizer(file).name = "nmt_nfkc".into()).contains("nmt_nfkc"));
        assert!(refused(|file| normalizer(file).precompiled_charsmap = vec![1]).contains("normalises"));
        assert!(refused(|file| normalizer(file).remove_extra_whitespaces = None).contains("extra spaces"));
        assert!(refused(|file| file.normalizer = None).contains("extra spaces"));
        assert!(refused(|file| normalizer(file).escape_whitespaces = Some(false)).contains("escape"));
    }

    #[test]
    fn damaged_models_are_refused() {
        let refused = |change: fn(&mut ModelFile)| changed(change).unwrap_err();
        assert!(refused(|file| file.pieces[5].piece.clear()).contains("piece 5 is empty"));
        assert!(refused(|file| file.pieces[300] = file.pieces[301].clone()).contains("there twice"));
        assert!(refused(|file| file.pieces[300].kind = Some(9)).contains("unknown kind 9"));
        assert!(refused(|file| file.pieces[3].piece = "<0xZZ>".into()).contains("is no byte"));
        assert!(refused(|file| drop(file.pieces.remove(3))).contains("256 byte pieces"));
        let whole = golden("tiny-mistral", "tokenizer.model");
        assert!(SentencePiece::parse(&whole[..whole.len() / 2]).is_err());
        assert!(SentencePiece::parse(b"{}").unwrap_err().contains("not a SentencePiece model"));
    }
}
