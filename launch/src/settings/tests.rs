use std::io::Write as _;

use learn_domain::config::DeviceKind;
use proptest::prelude::*;

use super::*;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn resolver() -> Resolver {
    Resolver::new(&Config::default())
}

fn sets(assignments: &[&str]) -> Result<Config, SettingsError> {
    let assignments: Vec<String> = assignments.iter().map(ToString::to_string).collect();
    resolver().sets(&assignments)?.finish()
}

fn variables(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>().into_iter()
}

#[test]
fn a_later_layer_wins() {
    let file = file("[training]\nepochs = 2\nthreads = 2\nglobal_batch = 2\nmicro_batch = 2\n");
    let config = resolver()
        .file(file.path())
        .unwrap()
        .environment(variables(&[
            ("LEARN__TRAINING__THREADS", "3"),
            ("LEARN__TRAINING__GLOBAL_BATCH", "3"),
            ("LEARN__TRAINING__MICRO_BATCH", "3"),
            ("HOME", "/"),
            ("LEARN_LOG", "debug"),
        ]))
        .unwrap()
        .sets(&["training.global_batch=4".into(), "training.micro_batch=4".into()])
        .unwrap()
        .flag("--micro-batch", "training.micro_batch", Some(5))
        .unwrap()
        .flag("--epochs", "training.epochs", None::<u32>)
        .unwrap()
        .finish()
        .unwrap();
    let t = &config.training;
    assert_eq!((t.epochs, t.threads, t.global_batch, t.micro_batch), (2, 3, 4, 5));
    assert_eq!(config.model, Config::default().model, "what nobody sets keeps its default");
}

#[test]
fn the_last_layer_that_has_set_a_key_is_known() {
    let file = file("[cluster]\nworkers = 3\n");
    let resolver = resolver().file(file.path()).unwrap();
    let (value, origin) = resolver.set_by("cluster.workers").unwrap();
    assert_eq!((value.as_u64(), origin), (Some(3), &Origin::File { path: file.path().into(), line: 2 }));
    assert!(resolver.set_by("training.epochs").is_none(), "a default is nobody's");
    let resolver = resolver.sets(&["cluster.workers=4".into()]).unwrap();
    let (value, origin) = resolver.set_by("cluster.workers").unwrap();
    assert_eq!((value.as_u64(), origin), (Some(4), &Origin::Set("cluster.workers=4".into())));
}

#[test]
fn a_study_is_named_as_one() {
    let file = file("[study]\nname = \"towers\"\nconfig = \"base.toml\"\n");
    let text = resolver().file(file.path()).unwrap_err().to_string();
    assert!(text.contains("is a study") && text.contains("learn-launch study "), "{text}");
    let text = resolver().file(self::file("study = 1\n").path()).unwrap_err().to_string();
    assert!(text.contains("unknown key `study`"), "{text}");
}

#[test]
fn values_are_typed_by_their_key() {
    let config = sets(&[
        "training.epochs=3",
        "job.name = 2024",
        "job.runs_dir=\"quoted dir\"",
        "model.dropout=0",
        "model.learn_logit_scale=true",
        "cluster.device=cpu",
        "cluster.row_cache=2GiB",
        "cluster.heartbeat_timeout=1m",
        "evaluation.cutoffs=[10, 20]",
        "prepare.items.files=[\"a=b.csv\"]",
        "prepare.items.title=Title",
        "embed.from=vectors.npy",
    ])
    .unwrap();
    assert_eq!((config.training.epochs, config.job.name.as_str()), (3, "2024"));
    assert_eq!(config.job.runs_dir, Path::new("quoted dir"));
    assert_eq!((config.model.dropout, config.model.learn_logit_scale), (0.0, true));
    assert_eq!((config.cluster.device, config.cluster.row_cache.0), (DeviceKind::Cpu, 2 << 30));
    assert_eq!(config.evaluation.cutoffs, [10, 20]);
    assert_eq!(config.prepare.items.files, [PathBuf::from("a=b.csv")]);
    assert_eq!(config.prepare.items.title.as_deref(), Some("Title"));
    assert_eq!(config.embed.from.as_deref(), Some(Path::new("vectors.npy")));
    let variant = toml::from_str("embed.from = ''").unwrap();
    let unset = Resolver::new(&config).variant("none", &variant).unwrap().finish().unwrap();
    assert_eq!(unset.embed.from, None);
    let unset = Resolver::new(&config).sets(&["embed.from=".into()]).unwrap().finish().unwrap();
    assert_eq!(unset.embed.from, None);
}

#[test]
fn wrong_values_name_their_place_and_what_is_expected() {
    for (assignment, expected) in [
        ("training.epochs=many", "`many` is not a whole number"),
        ("training.epochs=-1", "-1 is not a whole number"),
        ("training.epochs=2.5", "2.5 is not a whole number"),
        ("model.dropout=a lot", "`a lot` is not a number"),
        ("model.learn_logit_scale=yes", "`yes` is not true or false"),
        ("cluster.device=gpu", "unknown variant `gpu`, expected one of `auto`, `cpu`, `cuda`"),
        ("cluster.row_cache=much", "`much` is not a size like"),
        ("cluster.heartbeat_timeout=15", "`15` is not a duration like"),
        ("evaluation.cutoffs=10", "10 is not a list like [1, 2]"),
        ("prepare.items.files=a.csv", "`a.csv` is not a list like [\"a\", \"b\"]"),
        ("embed.prompt.sentences=[3]", "a sentence is text, or a list of texts"),
        ("embed.prompt.sentences=[\"{titel}\"]", "did you mean {title}?"),
        ("model.dropout=nan", "not a finite number"),
        ("model.dropout=1.5", "must lie in [0, 1)"),
    ] {
        let message = sets(&[assignment]).unwrap_err().to_string();
        let key = assignment.split('=').next().unwrap();
        assert!(message.starts_with(&format!("--set {assignment}: {key}: ")), "{message}");
        assert!(message.contains(expected), "{message}");
    }
    let message = sets(&["training.epochs"]).unwrap_err().to_string();
    assert!(message.contains("section.key=value"), "{message}");
}

#[test]
fn an_unknown_key_of_a_file_names_the_line_and_the_nearest_key() {
    let file = file("# a comment\n[training]\nepochs = 3\nglobal_bacth = 4\n");
    let message = resolver().file(file.path()).unwrap_err().to_string();
    let place = format!("{}:4: ", file.path().display());
    assert!(message.starts_with(&place), "{message}");
    assert!(
        message.contains("unknown key `training.global_bacth`; did you mean `training.global_batch`?"),
        "{message}"
    );
}

#[test]
fn sections_are_checked_like_keys() {
    let message = |text| resolver().file(file(text).path()).unwrap_err().to_string();
    assert!(message("[nonsense]\n").contains("unknown key `nonsense`"));
    let meant = message("[trainig]\nepochs = 3\n");
    assert!(meant.contains(":2: unknown key `trainig.epochs`; did you mean `training.epochs`?"), "{meant}");
    let wrong = message("training = 3\n");
    assert!(wrong.contains("`training`; it is a section") && wrong.contains("epochs"), "{wrong}");
    let wrong = message("\n[training.epochs]\nx = 1\n");
    assert!(wrong.contains(":2: training.epochs") && wrong.contains("is not a value"), "{wrong}");
    assert!(message("[training\n").contains("is not valid TOML"));
    assert!(message("job.name = 1979-05-27\n").contains("is not a value"));
}

#[test]
fn an_environment_variable_is_refused_like_a_key() {
    let message = resolver().environment(variables(&[("LEARN__MODEL__LAYER", "3")])).unwrap_err().to_string();
    assert!(message.contains("environment variable LEARN__MODEL__LAYER: unknown key `model.layer`"), "{message}");
    assert!(message.contains("did you mean `model.layers`?"), "{message}");
    let message = resolver().environment(variables(&[("LEARN__MODEL__LAYERS", "x")])).unwrap_err().to_string();
    assert!(message.contains("`x` is not a whole number"), "{message}");
}

#[test]
fn a_nonsense_value_names_where_it_was_set() {
    let file = file("\n\n[model]\nheads = 7\n");
    let message = resolver().file(file.path()).unwrap().finish().unwrap_err().to_string();
    assert!(message.contains(":4: model.heads: must divide model.hidden"), "{message}");
}

#[test]
fn a_missing_file_is_named() {
    let message = resolver().file(Path::new("no/such.toml")).unwrap_err().to_string();
    assert!(message.contains("cannot read the configuration no/such.toml"), "{message}");
}

proptest! {
    #[test]
    fn what_is_written_as_toml_is_read_back(epochs in 1_u32.., dropout in 0.0..0.99_f64, name in "[a-z][a-z0-9 _-]{0,12}") {
        let mut config = Config::default();
        config.training.epochs = epochs;
        config.model.dropout = dropout;
        config.job.name = name;
        let file = file(&toml::to_string(&config).unwrap());
        prop_assert_eq!(resolver().file(file.path()).unwrap().finish().unwrap(), config);
    }

    #[test]
    fn no_text_makes_a_resolver_panic(key in ".{0,20}", value in ".{0,20}") {
        let _either = sets(&[&format!("{key}={value}")]);
    }
}

#[test]
fn what_somebody_has_set_is_known_with_its_place() {
    let file = file("[embed.refine]\nwhitening = false\n");
    let given = resolver().file(file.path()).unwrap().sets(&["prepare.k_core=5".into()]).unwrap().given();
    let place = |key: &str| given.origin(key).map(ToString::to_string);
    assert_eq!(place("prepare.k_core").as_deref(), Some("--set prepare.k_core=5"));
    assert!(place("embed.refine.whitening").is_some_and(|place| place.ends_with(".toml:2")), "a default can be set");
    assert_eq!(place("embed.refine.smoothing"), None);

    let mut later = resolver().sets(&["prepare.k_core=6".into()]).unwrap().given();
    later.after(&given);
    assert_eq!(later.origin("prepare.k_core"), Some(&Origin::Set("prepare.k_core=6".into())));
    assert!(later.origin("embed.refine.whitening").is_some());
}

#[test]
fn a_file_of_all_keys_says_only_what_is_no_default() {
    for text in [reference_toml(&Catalogue::of_config()), toml::to_string(&Config::default()).unwrap()] {
        // without a key that no dataset is compared by
        let text = text.replace("k_core = 0", "k_core = 5").replace("min_workers = 1\n", "");
        assert!(!text.contains("min_workers ="));
        let given = resolver().file(file(&text).path()).unwrap().given();
        assert_eq!(given.0.keys().collect::<Vec<_>>(), ["prepare.k_core"]);
        let part = text.replace("max_length = 0\n", "");
        let given = resolver().file(file(&part).path()).unwrap().given();
        assert!(given.origin("prepare.min_length").is_some(), "without one of them, all are meant");
        let set = resolver().file(file(&text).path()).unwrap().sets(&["embed.max_tokens=256".into()]).unwrap().given();
        assert_eq!(set.0.keys().collect::<Vec<_>>(), ["embed.max_tokens", "prepare.k_core"]);
    }
}
