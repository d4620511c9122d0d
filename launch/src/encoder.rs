//! Whether what `embed` takes vectors from is there, before a process is started for it.
//!
//! Input: the `[embed]` settings. Output: what they lack on this machine, with the remedy. What the files hold is for the
//! program that reads them.

use std::path::Path;

use learn_domain::config::EmbedConfig;

/// The files of an encoder; any one of each group.
const FILES: [&[&str]; 3] =
    [&["config.json"], &["tokenizer.json", "tokenizer.model"], &["model.safetensors", "model.safetensors.index.json"]];

/// Settings that `embed` cannot follow here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found}; {remedy}")]
pub struct Unusable {
    pub found: String,
    pub remedy: &'static str,
}

/// Where the vectors come from, for people. A server is not asked.
///
/// # Errors
/// The file of vectors or the encoder's directory is not there, or is something else.
pub fn find(embed: &EmbedConfig) -> Result<String, Unusable> {
    match (&embed.from, &embed.endpoint.url) {
        (Some(from), _) => vectors(from).map(|()| format!("vectors from {}", from.display())),
        (None, Some(url)) => Ok(format!("vectors from {url}")),
        (None, None) => directory(&embed.model).map(|()| embed.model.display().to_string()),
    }
}

fn vectors(from: &Path) -> Result<(), Unusable> {
    let problem = if !from.is_file() {
        "is not a file"
    } else if !from.extension().is_some_and(|ending| ending == "npy" || ending == "parquet") {
        "is neither .npy nor .parquet"
    } else {
        return Ok(());
    };
    let remedy = "set embed.from to the file of vectors, one row per item";
    Err(Unusable { found: format!("{} {problem}", from.display()), remedy })
}

fn directory(model: &Path) -> Result<(), Unusable> {
    let shown = model.display();
    let lacking: Vec<&str> = FILES
        .iter()
        .filter(|group| !group.iter().any(|name| model.join(name).is_file()))
        .map(|group| group[0])
        .collect();
    let found = match (model.is_dir(), lacking.as_slice()) {
        (true, []) => return Ok(()),
        (true, lacking) => format!("{shown} lacks {}", lacking.join(", ")),
        (false, _) => format!("{shown} is not a directory"),
    };
    let remedy = "set embed.model to a Hugging Face directory with config.json, tokenizer.json and model.safetensors, or \
                  embed.from to a file of vectors";
    Err(Unusable { found, remedy })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn an_encoder_has_its_files_in_either_form() {
        let folder = tempfile::tempdir().unwrap();
        let settings = |model: &str| EmbedConfig { model: folder.path().join(model), ..EmbedConfig::default() };
        let refused = |model: &str| find(&settings(model)).unwrap_err();
        assert!(refused("none").found.ends_with("none is not a directory"));
        assert!(refused("none").to_string().contains("set embed.model to"));
        for (name, files) in [
            ("whole", ["config.json", "tokenizer.json", "model.safetensors"]),
            ("sharded", ["config.json", "tokenizer.model", "model.safetensors.index.json"]),
        ] {
            let model = folder.path().join(name);
            fs::create_dir(&model).unwrap();
            fs::write(model.join(files[0]), "{}").unwrap();
            assert!(refused(name).found.ends_with("lacks tokenizer.json, model.safetensors"));
            files[1..].iter().for_each(|file| fs::write(model.join(file), "").unwrap());
            find(&settings(name)).unwrap();
        }
    }

    #[test]
    fn vectors_are_a_file_of_a_known_kind_and_come_before_the_encoder() {
        let folder = tempfile::tempdir().unwrap();
        let from = |name: &str| {
            let from = Some(folder.path().join(name));
            find(&EmbedConfig { from, model: "/none".into(), ..EmbedConfig::default() })
        };
        assert!(from("nosuch.npy").unwrap_err().to_string().contains("nosuch.npy is not a file; set embed.from to"));
        for name in ["catalogue.csv", "vectors.npy", "vectors.parquet"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert!(from("catalogue.csv").unwrap_err().found.ends_with("is neither .npy nor .parquet"));
        assert!(from("vectors.npy").is_ok() && from("vectors.parquet").is_ok());
    }

    #[test]
    fn a_server_needs_no_files() {
        let mut embed = EmbedConfig { model: "/none".into(), ..EmbedConfig::default() };
        embed.endpoint.url = Some("http://gpu-7:8000/v1".into());
        assert_eq!(find(&embed).unwrap(), "vectors from http://gpu-7:8000/v1");
    }
}
