//! What an embedding run says to people: remarks on finished vectors, and what a run would make.
//!
//! Input: counts of `learn-embed`. Output: values that travel as JSON to `learn-launch`, and their words.

use serde::{Deserialize, Serialize};

/// What a person should know of the vectors of a dataset, besides that they are there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Remarks {
    /// Items without any field that the prompt names: all have the same vector.
    pub items_without_text: u64,
    /// Rows of the imported file whose id no item has.
    pub rows_left_out: u64,
    /// The imported file has no ids, so that a row's place says whose it is.
    pub rows_by_position: bool,
    /// Unknown of vectors that no encoder here has made.
    pub cut: Option<CutTexts>,
}

/// How many texts the encoder read in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutTexts {
    pub texts: u64,
    /// The texts that were counted.
    pub of: u64,
    /// Longest text in tokens: `embed.max_tokens`, or the model's own limit.
    pub max_tokens: u64,
}

impl Remarks {
    /// A sentence for each of them that is worth one.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        let without_text = (self.items_without_text > 0).then(|| {
            format!("{} items without any text all have the same vector (see prepare.items)", self.items_without_text)
        });
        let left_out = (self.rows_left_out > 0)
            .then(|| format!("{} rows of the file whose id no item has were left out", self.rows_left_out));
        let by_position = self.rows_by_position.then(|| {
            "no ids: row i of the file is taken for the i-th item id in the order of their texts (docs/embeddings.md)"
                .to_owned()
        });
        let cut = self.cut.as_ref().filter(|cut| cut.texts > 0).map(|cut| {
            format!("{} of {} texts were cut to {} tokens (embed.max_tokens)", cut.texts, cut.of, cut.max_tokens)
        });
        [without_text, left_out, by_position, cut].into_iter().flatten().collect()
    }
}

/// What an embedding run would make, and what of it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// The encoder, the server's model, or the file.
    pub model: String,
    pub source: SourceKind,
    pub items: u64,
    /// Unknown of a server that was not asked yet.
    pub dim: Option<u32>,
    pub shards: u64,
    pub shards_done: u64,
    /// Items of the other shards.
    pub items_left: u64,
    /// Requests for those items, to a server.
    pub requests: Option<u64>,
    /// Items without a row of this refinement; `None` if nothing is refined (`embed.refine`).
    pub items_to_refine: Option<u64>,
    pub items_without_text: u64,
    pub rows_by_position: bool,
}

/// Where vectors come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    Encoder,
    Endpoint,
    File,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_remark_is_a_sentence_and_nothing_is_said_of_nothing() {
        assert_eq!(Remarks::default().sentences(), Vec::<String>::new());
        let uncut = CutTexts { texts: 0, of: 9, max_tokens: 256 };
        assert!(Remarks { cut: Some(uncut), ..Remarks::default() }.sentences().is_empty());
        let all = Remarks {
            items_without_text: 2,
            rows_left_out: 3,
            rows_by_position: true,
            cut: Some(CutTexts { texts: 4, of: 9, max_tokens: 256 }),
        };
        let sentences = all.sentences();
        assert_eq!(sentences.len(), 4);
        assert!(sentences[0].starts_with("2 items without any text") && sentences[1].starts_with("3 rows"));
        assert!(sentences[2].contains("row i of the file is taken for the i-th item id"));
        assert_eq!(sentences[3], "4 of 9 texts were cut to 256 tokens (embed.max_tokens)");
    }
}
