//! What a dataset was made from, and whether a configuration says otherwise.
//!
//! Input: the manifest, a configuration, and which of its keys somebody has set. Output: the first of those settings that the
//! dataset was not made with. Only what is recorded is compared, and only if somebody has set it: a dataset of an older version
//! records less, and a configuration need not say where a dataset is from.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use learn_domain::Config;
use learn_domain::config::{EmbedConfig, Precision, PrepareConfig, PromptConfig, RefineConfig, SplitPolicy};
use learn_domain::prompt::PromptTemplate;
use serde::{Deserialize, Serialize};

use crate::Dataset;
use crate::manifest::{EmbeddingInfo, FilterInfo, Manifest};

/// The settings of `embed` that decide the vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MadeFrom {
    pub source: VectorSource,
    pub refine: RefineConfig,
}

/// Where vectors came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum VectorSource {
    /// `embed.model`.
    Encoder {
        /// Its directory's name, links resolved.
        name: String,
        /// Where it was.
        path: PathBuf,
        max_tokens: u32,
        precision: Precision,
        prompt: PromptConfig,
    },
    /// `embed.endpoint`.
    Endpoint { model: String, prompt: PromptConfig },
    /// `embed.from`; the file's name.
    File { name: String },
}

impl MadeFrom {
    /// What `embed` makes vectors from; `name` is what the encoder, the server's model or the file is called.
    #[must_use]
    pub fn of(embed: &EmbedConfig, name: String) -> Self {
        let prompt = embed.prompt.clone();
        let source = match (&embed.from, &embed.endpoint.url) {
            (Some(_), _) => VectorSource::File { name },
            (None, Some(_)) => VectorSource::Endpoint { model: name, prompt },
            (None, None) => VectorSource::Encoder {
                name,
                path: embed.model.clone(),
                max_tokens: embed.max_tokens,
                precision: embed.precision,
                prompt,
            },
        };
        Self { source, refine: embed.refine.clone() }
    }
}

impl VectorSource {
    /// For people.
    fn described(&self) -> String {
        match self {
            Self::Encoder { name, .. } => format!("`{name}`"),
            Self::Endpoint { model, .. } => format!("a server's `{model}`"),
            Self::File { name } => format!("the file `{name}`"),
        }
    }

    fn prompt(&self) -> Option<&PromptConfig> {
        match self {
            Self::Encoder { prompt, .. } | Self::Endpoint { prompt, .. } => Some(prompt),
            Self::File { .. } => None,
        }
    }
}

/// A setting that somebody has given and that the dataset was not made with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {wanted}, but {} {found}: {remedy}, or leave the setting out", .dataset.display())]
pub struct Contradiction {
    pub key: &'static str,
    wanted: String,
    dataset: PathBuf,
    found: String,
    remedy: &'static str,
}

impl Dataset {
    /// The first setting of `config` that this dataset was not made with. `given` says of a dotted key whether somebody has
    /// set it.
    #[must_use]
    pub fn contradiction(&self, config: &Config, given: impl Fn(&str) -> bool) -> Option<Contradiction> {
        let model = &config.embed.model;
        let resolved = std::fs::canonicalize(model).unwrap_or_else(|_| model.clone());
        let names = [name_of(model), name_of(&resolved)];
        let settings = settings(self.manifest(), config, &names);
        let Setting { key, wanted, found, .. } =
            settings.into_iter().find(|setting| setting.differs && given(setting.key))?;
        let remedy = match key.starts_with("prepare.") {
            true => "prepare it again with `--replace`",
            false => "run `learn-launch embed CONFIG`",
        };
        Some(Contradiction { key, wanted, dataset: self.dir().to_path_buf(), found, remedy })
    }
}

/// One setting beside what the dataset was made with.
struct Setting {
    key: &'static str,
    differs: bool,
    wanted: String,
    /// What the dataset is or has instead: a predicate.
    found: String,
}

impl Setting {
    fn new(key: &'static str, differs: bool, wanted: impl ToString, found: impl Into<String>) -> Self {
        Self { key, differs, wanted: wanted.to_string(), found: found.into() }
    }
}

/// All settings that can be compared; `models` is how the encoder of the configuration may be called.
fn settings(manifest: &Manifest, config: &Config, models: &[String]) -> Vec<Setting> {
    let mut all = prepared(manifest, &config.prepare);
    // a model that reads no content does not mind whose embeddings there are
    if let Some(info) = manifest.embeddings.as_ref().filter(|_| config.model.item_input.has_content())
        && let Some(made) = &info.made_from
    {
        all.extend(embedded(info, made, &config.embed, models));
    }
    all
}

fn prepared(manifest: &Manifest, prepare: &PrepareConfig) -> Vec<Setting> {
    fn plain<T: PartialEq + Display>(key: &'static str, wanted: T, found: T) -> Setting {
        let differs = wanted != found;
        Setting::new(key, differs, wanted, format!("was prepared with {found}"))
    }
    let FilterInfo { k_core, min_length, max_length, keep_unseen_items } = manifest.filters;
    let split = manifest.split.policy;
    let filter = plain("prepare.k_core", prepare.k_core, k_core);
    let mut all = vec![
        // 0 and 1 keep all
        Setting { differs: prepare.k_core.max(1) != k_core.max(1), ..filter },
        plain("prepare.min_length", prepare.min_length, min_length),
        plain("prepare.max_length", prepare.max_length, max_length),
        plain("prepare.keep_unseen_items", prepare.keep_unseen_items, keep_unseen_items),
        plain("prepare.split", split_name(prepare.split), split_name(split)),
    ];
    if let Some(by_time) = &manifest.split.by_time {
        all.push(plain("prepare.valid_share", prepare.valid_share, by_time.valid_share));
        all.push(plain("prepare.test_share", prepare.test_share, by_time.test_share));
    }
    match (&manifest.labels, &prepare.interactions.label, prepare.interactions.label_at_least) {
        (None, Some(column), _) => {
            let found = "was prepared without conversion labels";
            all.push(Setting::new("prepare.interactions.label", true, column, found));
        }
        (Some(labels), _, Some(wanted)) => {
            let found = match labels.at_least {
                Some(at_least) => format!("was prepared with {at_least}"),
                None => "was prepared with labels of 0 and 1".into(),
            };
            let differs = labels.at_least != Some(wanted);
            all.push(Setting::new("prepare.interactions.label_at_least", differs, wanted, found));
        }
        _ => {}
    }
    all
}

fn embedded(info: &EmbeddingInfo, made: &MadeFrom, embed: &EmbedConfig, models: &[String]) -> Vec<Setting> {
    let has = format!("has embeddings of {}", made.source.described());
    let made_with = |found: &dyn Display| format!("{has} that were made with {found}");
    let mut all = vec![source(&made.source, embed, models, &has)];
    let from_model = embed.from.is_none() && embed.endpoint.url.is_none();
    if let VectorSource::Encoder { max_tokens, precision, .. } = &made.source
        && from_model
    {
        let differs = embed.max_tokens != *max_tokens;
        all.push(Setting::new("embed.max_tokens", differs, embed.max_tokens, made_with(max_tokens)));
        let [wanted, found] = [embed.precision, *precision].map(precision_name);
        all.push(Setting::new("embed.precision", wanted != found, wanted, made_with(&found)));
    }
    if let (VectorSource::Endpoint { .. }, Some(wanted)) = (&made.source, embed.endpoint.dimensions) {
        let found = made_with(&format_args!("{} dimensions", info.dim));
        all.push(Setting::new("embed.endpoint.dimensions", wanted != info.dim, wanted, found));
    }
    if let Some(prompt) = made.source.prompt() {
        let separated = PromptConfig { separator: prompt.separator.clone(), ..embed.prompt.clone() };
        let differs = PromptTemplate::new(&separated) != PromptTemplate::new(prompt);
        let found = made_with(&"the prompt in dataset.json");
        all.push(Setting::new("embed.prompt.sentences", differs, "another prompt", found));
        let [wanted, found] = [&embed.prompt.separator, &prompt.separator];
        let shown = made_with(&format_args!("{found:?}"));
        all.push(Setting::new("embed.prompt.separator", wanted != found, format!("{wanted:?}"), shown));
    }
    all.extend(refined(&made.refine, &embed.refine, &has));
    all
}

/// Whether the vectors are from elsewhere than the configuration says.
fn source(made: &VectorSource, embed: &EmbedConfig, models: &[String], has: &str) -> Setting {
    match (&embed.from, &embed.endpoint.url, made) {
        (Some(from), _, made) => {
            let same = matches!(made, VectorSource::File { name } if *name == name_of(from));
            Setting::new("embed.from", !same, from.display(), has)
        }
        (None, Some(_), VectorSource::Endpoint { model, .. }) => {
            let wanted = &embed.endpoint.model;
            Setting::new("embed.endpoint.model", wanted != model, wanted, has)
        }
        (None, Some(url), _) => Setting::new("embed.endpoint.url", true, url, has),
        (None, None, made) => {
            // it may have moved, or be called by a link
            let same = matches!(made, VectorSource::Encoder { name, path, .. }
                if models.contains(name) || models.contains(&name_of(path)));
            Setting::new("embed.model", !same, embed.model.display(), has)
        }
    }
}

fn refined(made: &RefineConfig, wanted: &RefineConfig, has: &str) -> Vec<Setting> {
    let found = |value: &dyn Display| match made.is_on() {
        true => format!("{has} that were refined with {value}"),
        false => format!("{has} without refinement"),
    };
    let number = |key, wanted: f64, made: f64| Setting::new(key, wanted != made, wanted, found(&made));
    let differs = wanted.whitening != made.whitening;
    let mut all = vec![
        Setting::new("embed.refine.whitening", differs, wanted.whitening, found(&made.whitening)),
        number("embed.refine.smoothing", wanted.smoothing, made.smoothing),
    ];
    // what changes nothing is no other setting
    if made.whitening {
        all.push(number("embed.refine.shrinkage", wanted.shrinkage, made.shrinkage));
    }
    if made.smoothing > 0.0 {
        all.push(number("embed.refine.smoothing_decay", wanted.smoothing_decay, made.smoothing_decay));
    }
    all
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn split_name(split: SplitPolicy) -> &'static str {
    match split {
        SplitPolicy::LeaveOneOut => "leave-one-out",
        SplitPolicy::ByTime => "by-time",
    }
}

fn precision_name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
        Precision::F16 => "f16",
    }
}

#[cfg(test)]
mod tests {
    use learn_domain::config::{ItemInput, Sentence};

    use super::*;
    use crate::manifest::{Counts, LabelInfo, SplitInfo, VERSION};

    /// Prepared by leave-one-out and embedded with these settings.
    fn manifest(config: &Config, name: &str) -> Manifest {
        let prepare = &config.prepare;
        let embeddings = EmbeddingInfo {
            dim: 8,
            dtype: "f16".into(),
            model: name.into(),
            fingerprint: "e".into(),
            files: Vec::new(),
            raw: None,
            made_from: Some(MadeFrom::of(&config.embed, name.into())),
        };
        Manifest {
            version: VERSION,
            name: "d".into(),
            fingerprint: "f".into(),
            counts: Counts::default(),
            time_scale: 1,
            split: SplitInfo { policy: prepare.split, by_time: None },
            filters: FilterInfo {
                k_core: prepare.k_core,
                min_length: prepare.min_length,
                max_length: prepare.max_length,
                keep_unseen_items: prepare.keep_unseen_items,
            },
            labels: None,
            files: Vec::new(),
            embeddings: Some(embeddings),
        }
    }

    fn base() -> Config {
        let mut config = Config::default();
        config.embed.model = "/models/minilm".into();
        config
    }

    /// The keys that differ, with what is said of the dataset.
    fn differing(manifest: &Manifest, config: &Config) -> Vec<(&'static str, String)> {
        let all = settings(manifest, config, &[name_of(&config.embed.model)]);
        all.into_iter().filter(|setting| setting.differs).map(|setting| (setting.key, setting.found)).collect()
    }

    fn assert_same(manifest: &Manifest, config: &Config) {
        let found = differing(manifest, config);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn each_setting_that_decides_a_dataset_is_compared() {
        let made = manifest(&base(), "minilm");
        assert_same(&made, &base());
        type Change = fn(&mut Config);
        let changes: [(&str, Change); 13] = [
            ("prepare.k_core", |c| c.prepare.k_core = 5),
            ("prepare.min_length", |c| c.prepare.min_length = 4),
            ("prepare.max_length", |c| c.prepare.max_length = 50),
            ("prepare.keep_unseen_items", |c| c.prepare.keep_unseen_items = false),
            ("prepare.split", |c| c.prepare.split = SplitPolicy::ByTime),
            ("prepare.interactions.label", |c| c.prepare.interactions.label = Some("liked".into())),
            ("embed.model", |c| c.embed.model = "/models/other".into()),
            ("embed.max_tokens", |c| c.embed.max_tokens = 12),
            ("embed.precision", |c| c.embed.precision = Precision::F16),
            ("embed.prompt.sentences", |c| c.embed.prompt.sentences = vec![Sentence::One("{title}".into())]),
            ("embed.prompt.separator", |c| c.embed.prompt.separator = "; ".into()),
            ("embed.refine.whitening", |c| c.embed.refine.whitening = true),
            ("embed.refine.smoothing", |c| c.embed.refine.smoothing = 1.0),
        ];
        for (key, change) in changes {
            let mut config = base();
            change(&mut config);
            let keys: Vec<_> = differing(&made, &config).into_iter().map(|(key, _)| key).collect();
            assert_eq!(keys, [key]);
        }
    }

    #[test]
    fn what_makes_the_same_is_the_same() {
        let made = manifest(&base(), "minilm");
        let changes: [fn(&mut Config); 6] = [
            |c| c.prepare.k_core = 1,
            |c| c.prepare.valid_share = 0.2,
            |c| c.embed.model = "elsewhere/minilm".into(),
            |c| c.embed.refine.shrinkage = 0.5,
            |c| c.embed.refine.smoothing_decay = 0.5,
            |c| (c.embed.batch_tokens, c.embed.shard_items, c.embed.processes) = (1, 2, 3),
        ];
        for change in changes {
            let mut config = base();
            change(&mut config);
            assert_same(&made, &config);
        }
        // the directory that a link leads to has another name
        assert_same(&manifest(&base(), "all-MiniLM-L6-v2"), &base());
        let mut wordings = base();
        wordings.embed.prompt.sentences =
            vec![Sentence::FirstThatFits(vec!["{Title}".into()]), Sentence::One("x".into())];
        let mut sentences = base();
        sentences.embed.prompt.sentences = vec![Sentence::One("{title}".into()), Sentence::One("x".into())];
        assert_same(&manifest(&sentences, "minilm"), &wordings);
    }

    #[test]
    fn vectors_of_another_kind_are_told_apart_and_files_go_by_their_names() {
        let mut file = base();
        file.embed.from = Some("/a/vectors.npy".into());
        let mut server = base();
        (server.embed.endpoint.url, server.embed.endpoint.model) = (Some("http://h/v1".into()), "m".into());
        let of_file = manifest(&file, "vectors.npy");
        let keys = |manifest: &Manifest, config: &Config| -> Vec<&str> {
            differing(manifest, config).into_iter().map(|(key, _)| key).collect()
        };
        let wanted = [("embed.model", "has embeddings of the file `vectors.npy`".to_owned())];
        assert_eq!(differing(&of_file, &base()), wanted);
        assert_eq!(keys(&of_file, &server), ["embed.endpoint.url"]);
        assert_eq!(keys(&manifest(&base(), "minilm"), &file), ["embed.from"]);
        file.embed.from = Some("b/vectors.npy".into());
        assert_eq!(keys(&of_file, &file), [""; 0]);
        file.embed.from = Some("b/others.npy".into());
        assert_eq!(keys(&of_file, &file), ["embed.from"]);
        // another prompt is nothing to a file
        file.embed.from = Some("vectors.npy".into());
        file.embed.prompt.separator = "; ".into();
        assert_eq!(keys(&of_file, &file), [""; 0]);

        let of_server = manifest(&server, "m");
        server.embed.endpoint.url = Some("http://elsewhere/v1".into());
        assert_eq!(keys(&of_server, &server), [""; 0], "a server may move");
        (server.embed.endpoint.model, server.embed.endpoint.dimensions) = ("n".into(), Some(4));
        assert_eq!(keys(&of_server, &server), ["embed.endpoint.model", "embed.endpoint.dimensions"]);
    }

    #[test]
    fn what_is_not_recorded_or_not_read_is_not_compared() {
        let mut config = base();
        (config.embed.model, config.embed.refine.whitening) = ("/other".into(), true);
        let mut made = manifest(&base(), "minilm");
        assert_eq!(differing(&made, &config).len(), 2);
        config.model.item_input = ItemInput::Id;
        assert_same(&made, &config);
        config.model.item_input = ItemInput::Content;
        if let Some(info) = &mut made.embeddings {
            info.made_from = None;
        }
        assert_same(&made, &config);
        made.embeddings = None;
        assert_same(&made, &config);
    }

    #[test]
    fn labels_are_compared_by_their_threshold() {
        let mut config = base();
        let mut made = manifest(&config, "minilm");
        made.labels = Some(LabelInfo { at_least: Some(4.0), conversions: 1 });
        // a column may be called otherwise
        config.prepare.interactions.label = Some("rating".into());
        assert_same(&made, &config);
        config.prepare.interactions.label_at_least = Some(4.0);
        assert_same(&made, &config);
        config.prepare.interactions.label_at_least = Some(5.0);
        let wanted = [("prepare.interactions.label_at_least", "was prepared with 4".to_owned())];
        assert_eq!(differing(&made, &config), wanted);
    }

    #[test]
    fn only_what_somebody_has_set_contradicts_and_the_message_names_the_way_out() {
        let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1");
        let dataset = Dataset::open(&stored).unwrap();
        let mut config = base();
        config.prepare.k_core = 5;
        config.embed.refine.whitening = true;
        assert_eq!(dataset.contradiction(&config, |_| false), None);
        assert_eq!(
            dataset.contradiction(&config, |key| key.starts_with("embed.")),
            None,
            "version 1 records no source"
        );
        let found = dataset.contradiction(&config, |_| true).unwrap();
        assert_eq!(found.key, "prepare.k_core");
        let text = found.to_string();
        for words in ["prepare.k_core is 5, but ", "v1 was prepared with 0: ", "`--replace`, or leave the setting out"]
        {
            assert!(text.contains(words), "{words} is not in {text}");
        }
    }
}
